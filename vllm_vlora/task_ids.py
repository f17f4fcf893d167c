"""What a task may be called, and the file name that stands for it.

A task id is what a client writes into the ``model`` field of a request, so nearly any text is
allowed. File systems allow far less: names that differ only in case collide on macOS and Windows,
``CON`` cannot exist on Windows, and ``../x`` must never leave its folder. The encoding below is
injective also after lower-casing, so two tasks never share a file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from vllm_vlora.errors import TaskIdError

MAX_TASK_ID_LENGTH = 256
MAX_ENCODED_LENGTH = 120

_SPECIAL = re.compile("[^a-z0-9_.-]")
# Windows reserves these with any extension after the first dot, so "con.safetensors" too.
_RESERVED_STEM = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)")
# Cc control characters, Zl and Zp line breaks in all but name, Cs lone surrogates (not encodable).
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DIGEST_SEPARATOR = "~~"


def validate_task_id(task_id: str) -> str:
    """Return ``task_id`` unchanged when it may name a task.

    A task id has 1 to 256 characters (Unicode code points), none of them a control character, a
    line separator or a lone surrogate. It is compared code point by code point: no normalisation.

    Raises:
        TaskIdError: naming the id and the rule it breaks.
    """
    if not isinstance(task_id, str):
        raise TaskIdError(f"task id {task_id!r} is not text; give a string")
    if not task_id:
        raise TaskIdError("task id is empty; give the task a name")
    if len(task_id) > MAX_TASK_ID_LENGTH:
        raise TaskIdError(
            f"task id {_shown(task_id)} has {len(task_id)} characters; "
            f"at most {MAX_TASK_ID_LENGTH} are allowed"
        )
    forbidden = _FORBIDDEN.search(task_id)
    if forbidden:
        raise TaskIdError(
            f"task id {_shown(task_id)} holds the control character or lone surrogate "
            f"U+{ord(forbidden[0]):04X}; remove it"
        )
    return task_id


def validate_task_ids(task_ids: Sequence[str]) -> None:
    """The same for very many at once.

    Raises:
        TaskIdError: naming the first id that breaks a rule.
    """
    if _FORBIDDEN.search("".join(task_ids)) or not all(
        1 <= len(task_id) <= MAX_TASK_ID_LENGTH for task_id in task_ids
    ):
        for task_id in task_ids:
            validate_task_id(task_id)


def encode_task_id(task_id: str) -> str:
    """Return the file name (without extension) that stands for ``task_id``.

    Lower-case ASCII letters, digits and ``_ . -`` stand for themselves; every other character is
    written as ``~xx`` for each byte of its UTF-8 form. The first character is also escaped where
    it is ``.`` or ``-`` or begins a name that Windows reserves, and a final ``.`` always is. A
    result longer than 120 characters is cut and followed by ``~~`` and the SHA-256 of the id.

    The result matches ``[a-z0-9_.~-]{1,120}``. Distinct ids get distinct results: escaping is
    reversible, ``~~`` occurs in no escaped text, and cut names differ in their digests.

    Raises:
        TaskIdError: the id is not valid (see :func:`validate_task_id`).
    """
    encoded = _SPECIAL.sub(lambda found: _escape_bytes(found[0]), validate_task_id(task_id))
    usual = task_id[0] not in ".-" and task_id[-1] != "." and not _RESERVED_STEM.match(encoded)
    if usual and len(encoded) <= MAX_ENCODED_LENGTH:
        return encoded
    pieces = [_escape(character) for character in task_id]
    if task_id[0] in ".-" or _RESERVED_STEM.match("".join(pieces)):
        pieces[0] = _escape_bytes(task_id[0])
    if task_id[-1] == ".":
        pieces[-1] = _escape_bytes(".")
    encoded = "".join(pieces)
    if len(encoded) <= MAX_ENCODED_LENGTH:
        return encoded
    digest = hashlib.sha256(task_id.encode()).hexdigest()
    room = MAX_ENCODED_LENGTH - len(_DIGEST_SEPARATOR) - len(digest)
    return f"{_fitting_prefix(pieces, room)}{_DIGEST_SEPARATOR}{digest}"


def _escape(character: str) -> str:
    return _escape_bytes(character) if _SPECIAL.match(character) else character


def _escape_bytes(character: str) -> str:
    return "".join(f"~{byte:02x}" for byte in character.encode())


def _fitting_prefix(pieces: list[str], room: int) -> str:
    """Whole pieces only: half an escape before the separator could be read in two ways."""
    prefix = ""
    for piece in pieces:
        if len(prefix) + len(piece) > room:
            break
        prefix += piece
    return prefix


def _shown(task_id: str) -> str:
    return ascii(task_id if len(task_id) <= 40 else task_id[:37] + "...")
