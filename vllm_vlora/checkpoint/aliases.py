"""Names for tasks, blends and canaries that travel in a checkpoint, beside the weights.

    CKPT/aliases.json   {"version": 1, "aliases": {name: [{"share": 90, "terms": {task id: "0.7"}}, ...]}}

A name has one *route* or several. A route is a blend, mostly of one task with the weight "1"; of several,
each takes requests in the proportion of its share, which is a canary. Nothing of it is needed to decode a
task, so the manifest does not know of it, and a checkpoint with aliases reads as one without to whatever
does not look for them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from vllm_vlora.blend_names import Blend, Term, checked_blend, is_alone, weight_text
from vllm_vlora.checkpoint.beside import VERSION, decode_beside, read_beside
from vllm_vlora.checkpoint.manifest import is_checkpoint
from vllm_vlora.errors import BlendError, CheckpointError, OutputError, TaskIdError
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.wording import quoted

ALIASES_FILE = "aliases.json"
MAX_ROUTES = 16
MAX_SHARE = 1_000_000


class Route(NamedTuple):
    """One of the things that an alias stands for, and its part of the alias' requests."""

    share: int
    blend: Blend


Aliases: TypeAlias = Mapping[str, tuple[Route, ...]]
"""Name -> its routes."""


class _Route(msgspec.Struct, forbid_unknown_fields=True):
    share: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARE)]
    terms: dict[str, str]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    aliases: dict[str, list[_Route]]


def read_aliases(checkpoint: Path, tasks: Container[str] | None) -> dict[str, tuple[Route, ...]]:
    """The aliases in a checkpoint's folder, none where it has no such file.

    Args:
        tasks: those of the checkpoint, which are all that an alias may name; None to read the file
            whatever it names, for who mends it.

    Raises:
        CheckpointError: the file is damaged or newer, or does not fit the tasks.
    """
    file = checkpoint / ALIASES_FILE
    data = read_beside(file)
    if data is None:
        return {}
    aliases = decode_aliases(data, file)
    fault = None if tasks is None else alias_fault(aliases, tasks)
    if fault is not None:
        raise CheckpointError(f"{file}: {fault}; {_mend(checkpoint, fault.alias)}")
    return aliases


def decode_aliases(data: bytes, file: Path = Path(ALIASES_FILE)) -> dict[str, tuple[Route, ...]]:
    """The aliases that ``encode_aliases`` wrote, whatever they name.

    Raises:
        CheckpointError: the text is damaged or newer.
    """
    found = decode_beside(file, data, _File)
    return {name: _routes(file, name, routes) for name, routes in found.aliases.items()}


def encode_aliases(aliases: Aliases) -> bytes:
    """``aliases.json``, indented for people, the same for the same aliases."""
    content = {
        name: [
            _Route(share, {task: weight_text(weight) for task, weight in sorted(blend)})
            for share, blend in routes
        ]
        for name, routes in sorted(aliases.items())
    }
    return msgspec.json.format(msgspec.json.encode(_File(VERSION, content)))


class AliasFault(str):
    """What is wrong, and the alias that it is wrong with."""

    alias: str


def alias_fault(aliases: Aliases, tasks: Container[str]) -> AliasFault | None:
    """Why these aliases cannot stand beside these tasks; None where they can."""
    for name, routes in aliases.items():
        missing = [t.task for route in routes for t in route.blend if t.task not in tasks]
        if missing or name in tasks:
            fault = AliasFault(
                f"alias {name!r} names task {missing[0]!r}, which there is not"
                if missing
                else f"alias {name!r} has the name of a task"
            )
            fault.alias = name
            return fault
    return None


def refuse_fault(aliases: Aliases, tasks: Container[str], checkpoint: Path) -> None:
    """Refuse to write a checkpoint whose aliases do not fit its tasks.

    Raises:
        OutputError: naming the alias, and how it is taken away.
    """
    fault = alias_fault(aliases, tasks)
    if fault is not None:
        raise OutputError(f"{fault} with this change; {_mend(checkpoint, fault.alias)}")


def kind_of(routes: tuple[Route, ...]) -> str:
    """Whether an alias is of a ``task``, a ``blend`` or a ``canary``."""
    if len(routes) > 1:
        return "canary"
    return "task" if is_alone(routes[0].blend) else "blend"


def keep_aliases(old: Path, new: Path, tasks: Container[str]) -> None:
    """Write the aliases of a checkpoint, if ``old`` is one, into the folder that takes its place.

    Raises:
        OutputError: as :func:`refuse_fault`. CheckpointError: their file is damaged.
    """
    aliases = read_aliases(old, None) if is_checkpoint(old) else {}
    refuse_fault(aliases, tasks, old)
    if aliases:
        (new / ALIASES_FILE).write_bytes(encode_aliases(aliases))


def _mend(checkpoint: Path, name: str) -> str:
    line = quoted(["vllm-vlora", "alias", str(checkpoint), "--remove", "--", name])
    return f"give it another target, or take it away first: {line}"


def _routes(file: Path, name: str, routes: list[_Route]) -> tuple[Route, ...]:
    try:
        validate_task_id(name)
        return checked_routes(
            Route(r.share, checked_blend(Term(t, _weight(w)) for t, w in r.terms.items()))
            for r in routes
        )
    except (BlendError, TaskIdError) as error:
        raise CheckpointError(f"{file}: alias {name!r}: {error}") from error


def checked_routes(routes: Iterable[Route]) -> tuple[Route, ...]:
    """Routes of one alias.

    Raises:
        BlendError: none, too many, or a share that is none.
    """
    found = tuple(routes)
    if not 1 <= len(found) <= MAX_ROUTES:
        raise BlendError(f"an alias has 1 to {MAX_ROUTES} targets, got {len(found)}")
    for share, _ in found:
        if not 1 <= share <= MAX_SHARE:
            raise BlendError(f"share {share} is not a whole number from 1 to {MAX_SHARE}")
    return found


def _weight(text: str) -> Decimal:
    try:
        weight = Decimal(text)
    except InvalidOperation as error:
        raise BlendError(f"weight {text!r} is no number") from error
    if not weight.is_finite() or weight_text(weight) != text:
        raise BlendError(f"weight {text!r} is not written plainly, as 0.7")
    return weight
