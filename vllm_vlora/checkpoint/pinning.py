"""A checkpoint's content by one digest, and references that say which content they mean.

    FOLDER@sha256:HEX    org/name@sha256:HEX    org/name@revision@sha256:HEX    s3://...@sha256:HEX

HEX is the SHA-256 of ``vlora_config.json`` and, where there are such, ``attachments.json``,
``aliases.json`` and ``router.json`` behind it, as ``encode_config``, ``encode_attachments``,
``encode_aliases`` and ``encode_router`` write them. The manifest names the digest of every file with
tensors, by way of ``tasks.json`` or ``tasks.index``, the second that of every tokenizer and template, the
third says what names mean, and the fourth names the digest of the network that picks tasks, so that
nothing that is served can differ while the digest is the same. The card and the index of the shards,
which no reader uses, are not part of it. What is digested is what was decoded, not the file once more:
between two reads a file may be another one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_vlora.checkpoint.aliases import Aliases, encode_aliases
from vllm_vlora.checkpoint.attachments import Attached, encode_attachments
from vllm_vlora.checkpoint.manifest import Config, FileRef, encode_config, plain
from vllm_vlora.checkpoint.router_files import RouterRecord, encode_router
from vllm_vlora.errors import CheckpointError
from vllm_vlora.representations.spec import ModuleSpec, Segment

_MARK = "@sha256:"


def content_digest(
    config: Config,
    attachments: Mapping[str, Attached],
    aliases: Aliases,
    router: RouterRecord | None,
) -> str:
    """SHA-256, in hex, of a manifest, of the index of what is kept with its tasks, of the aliases and of
    the router.
    """
    digest = hashlib.sha256(encode_config(config))
    if attachments:
        digest.update(encode_attachments(attachments))
    if aliases:
        digest.update(encode_aliases(aliases))
    if router is not None:
        digest.update(encode_router(router))
    return digest.hexdigest()


def basis_digest(basis: Iterable[FileRef]) -> str:
    """Names the content of all bases."""
    return hashlib.sha256("".join(ref.sha256 for ref in basis).encode()).hexdigest()


def identity_of(segments: Iterable[Segment], modules: Sequence[ModuleSpec]) -> bytes:
    """What of segments says something about the weights, as JSON; as in format 1 where they can."""
    return msgspec.json.encode([_identity(segment, modules) for segment in segments])


def _identity(s: Segment, modules: Sequence[ModuleSpec]) -> list[Any]:
    fields = [plain(modules[s.module]), s.representation, s.format, s.rank, s.scale, s.core]
    later = [s.bits, s.rows]
    return fields + later if any(later) else fields


def task_digest(sha256: str, identity: bytes, basis: str | None) -> str:
    """Identity of a task's weights, 32 hex digits.

    Args:
        sha256: of its file. identity: of its segments (:func:`identity_of`). basis: the digest of all
            bases; None where none of its modules has one.
    """
    content = msgspec.json.encode([sha256, msgspec.Raw(identity)]) + (basis or "").encode()
    return hashlib.sha256(content).hexdigest()[:32]


def stands_on_basis(segments: Iterable[Segment], modules: Sequence[ModuleSpec]) -> bool:
    """Whether a module of these segments has something that its tasks share."""
    used = (modules[segment.module] for segment in segments)
    return any(module.basis is not None or module.flat is not None for module in used)


def split_pin(ref: str | Path) -> tuple[str | Path, str | None]:
    """A reference without the digest that it may end with, and the digest.

    Raises:
        CheckpointError: what stands behind ``@sha256:`` is no SHA-256.

    Examples:
        >>> split_pin("org/name@main@sha256:" + "0123456789abcdef" * 4)[0]
        'org/name@main'
    """
    where, mark, digest = str(ref).rpartition(_MARK)
    if not mark:
        return ref, None
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(
            f"checkpoint {str(ref)!r}: behind {_MARK} stand the 64 hex digits that `vllm-vlora info` "
            "shows"
        )
    return where, digest


def pinned(where: str | Path, digest: str | None) -> str:
    """The reference to a checkpoint with this content; with any where ``digest`` is None."""
    return f"{where}{_MARK}{digest}" if digest is not None else str(where)


def absolute_ref(ref: str) -> str:
    """A reference that means the same from any folder: a folder with its whole path, a Hub id as it is.

    Raises:
        CheckpointError: what stands behind ``@sha256:`` is no SHA-256.
    """
    where, digest = split_pin(ref)
    folder = Path(where).expanduser()
    return pinned(folder.absolute() if folder.is_dir() else where, digest)


def check_content(path: str | Path, found: str, wanted: str) -> None:
    """Raise CheckpointError where a checkpoint's content is not the one that was asked for."""
    if found != wanted:
        raise CheckpointError(
            f"{path}: its content is sha256:{found}, not sha256:{wanted}, which was asked for; bring the "
            "checkpoint that has it, or ask for this one"
        )
