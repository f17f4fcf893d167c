"""Which adapters a command line names, and under which task ids."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vlora.errors import AdapterError, TaskIdError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.adapters.peft_folder import Adapter

_ADAPTER_CONFIG = "adapter_config.json"


def expand(ref: str) -> list[str]:
    """The adapters that one argument stands for: itself, or the sub-folders of a collection.

    A folder is a collection when it has no ``adapter_config.json`` and some sub-folder has one;
    sub-folders without one are left out.
    """
    path = Path(ref).expanduser()
    if not path.is_dir() or (path / _ADAPTER_CONFIG).exists():
        return [ref]
    children = sorted(child for child in path.iterdir() if (child / _ADAPTER_CONFIG).is_file())
    return [str(child) for child in children] or [ref]


def parse_name(text: str) -> tuple[str, str]:
    """``ID=PATH`` -> (ID, PATH); the first ``=`` parts them.

    Raises:
        TaskIdError: there is no ``=``, or nothing on one side of it.
    """
    task_id, equals, path = text.partition("=")
    if not (task_id and equals and path):
        raise TaskIdError(f"--name {text!r} is not of the form ID=PATH")
    return task_id, path


def collect(refs: Iterable[str], names: Iterable[str]) -> dict[str, Adapter]:
    """Open every adapter and give each a task id.

    Args:
        refs: adapters, already expanded; the task id is the folder's or repository's name.
        names: ``ID=PATH``. A path that is also among ``refs`` gets the id instead of its own name,
            any other is one more adapter.

    Returns:
        Task id -> opened adapter, in the order given.

    Raises:
        AdapterError: an adapter cannot be opened.
        TaskIdError: an id is impossible, or two adapters have the same.
    """
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.task_ids import validate_task_id

    named: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for task_id, path in map(parse_name, names):
        named.setdefault(_identity(path), []).append(task_id)
        paths[_identity(path)] = path
    chosen: list[tuple[str, str | None]] = []
    for ref in refs:
        ids = named.pop(_identity(ref), None)
        chosen += [(ref, task_id) for task_id in ids] if ids else [(ref, None)]
    chosen += [(paths[key], task_id) for key, ids in named.items() for task_id in ids]

    adapters: dict[str, Adapter] = {}
    refs_by_id: dict[str, str] = {}
    for ref, given in chosen:
        adapter = open_adapter(ref)
        task_id = validate_task_id(adapter.name if given is None else given)
        if task_id in adapters:
            raise _collision(task_id, refs_by_id[task_id], ref)
        adapters[task_id] = adapter
        refs_by_id[task_id] = ref
    if not adapters:
        raise AdapterError("no adapter given; name at least one folder or Hub id")
    return adapters


def _collision(task_id: str, first: str, second: str) -> TaskIdError:
    if _identity(first) == _identity(second):
        return TaskIdError(f"adapter {first} is given twice; name it once")
    return TaskIdError(
        f"adapters {first} and {second} have the same task id {task_id!r}; "
        f"give one another id with --name NEW_ID={second}"
    )


def _identity(ref: str) -> str:
    path = Path(ref).expanduser()
    return os.path.realpath(path) if path.exists() else ref


def collect_shown(
    given: Iterable[str], names: Iterable[str], messages: Console
) -> dict[str, Adapter]:
    """As :func:`collect`, of arguments not yet expanded; says how many a folder stands for."""
    from vllm_vlora.tools.summary import line

    refs: list[str] = []
    for ref in given:
        found = expand(ref)
        if found != [ref]:
            line(messages, f"{ref} is a folder of adapters: {len(found)} found")
        refs += found
    return collect(refs, names)
