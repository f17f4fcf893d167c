"""Aliases of a checkpoint: set and taken away in place, without touching a file of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from pathlib import Path

from vllm_vlora.atomic import exclusive, write_file_atomic
from vllm_vlora.blend_names import is_alone, parse_blend
from vllm_vlora.blending.blended import BlendedCheckpoint
from vllm_vlora.checkpoint.aliases import (
    ALIASES_FILE,
    Aliases,
    Route,
    checked_routes,
    encode_aliases,
    kind_of,
    read_aliases,
)
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import BlendError, OptionError
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.wording import some_of

_FORMS = {
    "task": "give the id of one task",
    "blend": "write one as sql*0.7+french*0.3",
    "canary": "write one as 'sql-v7 90, sql-v8 10'",
}
_ROUTE = re.compile(r"\s*(\S.*?)\s+([0-9]{1,7})\s*(?:,|\Z)", re.DOTALL)


def set_alias(
    checkpoint: str | Path, name: str, target: str, *, kind: str | None = None
) -> tuple[Route, ...]:
    """Give a task, a blend or a canary another name, or an alias another target; in place.

    Args:
        checkpoint: its folder.
        name: what requests may call it.
        target: a task id; a blend as requests write it, ``sql*0.7+french*0.3``; or several of either
            with their shares, ``sql-v7 90, sql-v8 10``.
        kind: ``task``, ``blend`` or ``canary``: what the target must be. Default: any.

    Returns:
        The alias' routes.

    Raises:
        TaskNotFoundError: ``kind`` is task, and there is none of that name.
        BlendError: the target cannot be read, names a task that there is not, is of another kind, or
            cannot be blended.
        TaskIdError: the name is not allowed. OptionError: it is a task's name, or no folder is given.
        CheckpointError, OutputError: the checkpoint cannot be read or written.

    Examples:
        >>> set_alias(checkpoint, "prod", "task_0 90, task_1 10")[1].share
        10
        >>> remove_alias(checkpoint, "prod")
    """
    validate_task_id(name)
    routes: list[tuple[Route, ...]] = []

    def change(aliases: Aliases, opened: Checkpoint) -> Aliases:
        if name in opened.tasks:
            raise OptionError(f"{name!r} is a task of {checkpoint}; give the alias another name")
        if target in aliases and target not in opened.tasks:
            raise BlendError(
                f"{target!r} is an alias, and an alias stands for tasks; give what it stands for"
            )
        try:
            routes.append(parse_routes(target, opened.tasks))
        except BlendError:
            if kind == "task":
                # Whoever wants one task wrote no blend: the tasks that there are help more.
                opened.entry(target)
            raise
        if kind is not None and kind != kind_of(routes[0]):
            found = kind_of(routes[0])
            raise BlendError(f"{target!r} is a {found} and no {kind}; {_FORMS[kind]}")
        for _, blend in routes[0]:
            if not is_alone(blend):
                # Refuses what cannot be blended.
                BlendedCheckpoint(opened, blend, "", "")
        return {**aliases, name: routes[0]}

    _edit(checkpoint, change)
    return routes[0]


def remove_alias(checkpoint: str | Path, name: str) -> None:
    """Take an alias away, in place.

    Raises:
        OptionError: there is no such alias, or no folder is given.
        CheckpointError, OutputError: the checkpoint cannot be read or written.
    """

    def change(aliases: Aliases, opened: Checkpoint) -> Aliases:
        if name not in aliases:
            raise OptionError(f"{checkpoint} has no alias {name!r}; it has: {some_of(aliases)}")
        return {other: routes for other, routes in aliases.items() if other != name}

    _edit(checkpoint, change)


def parse_routes(text: str, tasks: Container[str]) -> tuple[Route, ...]:
    """The routes that a text names: one task or blend, or several with shares.

    Raises:
        BlendError: it names none of these tasks, or what follows a name is no share.
    """
    try:
        return (Route(1, parse_blend(text, tasks)),)
    except BlendError:
        if not _ROUTE.match(text):
            raise
    routes, start = [], 0
    while start < len(text):
        found = _ROUTE.match(text, start)
        if found is None:
            raise BlendError(
                f"{text[start:].strip()!r} is no target with a share; write NAME SHARE, NAME SHARE"
            )
        try:
            routes.append(Route(int(found[2]), parse_blend(found[1], tasks)))
        except BlendError as error:
            # Two targets without a comma look like one whose name holds blanks.
            raise BlendError(f"{error}; write NAME SHARE, NAME SHARE") from error
        start = found.end()
    if text.rstrip().endswith(","):
        raise BlendError("a target is missing behind the last comma")
    return checked_routes(routes)


def _edit(checkpoint: str | Path, change: Callable[[Aliases, Checkpoint], Aliases]) -> None:
    target = Path(checkpoint).expanduser()
    if not target.is_dir():
        raise OptionError(f"{checkpoint} is no folder; pull it, and give its folder")
    with exclusive(target):
        opened = Checkpoint.open(target)
        # Whatever they name: an alias of a task that is gone must be open to mending.
        aliases = change(read_aliases(opened.path, None), opened)
        # A file of none, too: who looks at it sees that it was changed.
        write_file_atomic(opened.path / ALIASES_FILE, encode_aliases(aliases))
