"""Which adapters a command line names, and under which task ids."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vlora.errors import AdapterError, TaskIdError
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.urls import is_remote, local_folder
from vllm_vlora.wording import count_of, some_of

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.adapters.peft_folder import Adapter

_MOST_SHOWN = 20
_SKIP = "; or give --skip-unreadable, which compresses the others"


def parse_name(text: str) -> tuple[str, str]:
    """``ID=PATH`` -> (ID, PATH); the first ``=`` parts them.

    Raises:
        TaskIdError: there is no ``=``, or nothing on one side of it.
    """
    task_id, equals, path = text.partition("=")
    if not (task_id and equals and path):
        raise TaskIdError(f"--name {text!r} is not of the form ID=PATH")
    return task_id, path


@dataclass(frozen=True)
class Inputs:
    """What a command line names.

    Attributes:
        adapters: task id -> opened adapter, in the order given.
        folders: a folder of adapters that was given -> how many were found in it.
        passed_over: folder or file in such a folder -> why it is not among them.
    """

    adapters: dict[str, Adapter]
    folders: dict[str, int]
    passed_over: dict[str, str]

    @property
    def left_out(self) -> list[dict[str, str]]:
        """``passed_over`` as ``--json`` prints it."""
        return [{"path": path, "why": why} for path, why in self.passed_over.items()]


def collect(
    refs: Iterable[str],
    names: Iterable[str | tuple[str, str]],
    skip_unreadable: bool | None = None,
) -> Inputs:
    """Open every adapter and give each a task id.

    Args:
        refs: adapters, and folders that hold some; the task id is the folder's or repository's name, or
            the part of the path that tells the adapters of a folder apart.
        names: ``ID=PATH``, or the two apart. A path that is also among ``refs`` or in a folder of theirs
            gets the id instead of its own name, any other is one more adapter.
        skip_unreadable: leave folders out whose adapter cannot be opened, if there are others; None for
            a command without that option.

    Raises:
        AdapterError: adapters cannot be opened; all are named that are folders here.
        TaskIdError: an id is impossible, or two adapters have the same.
    """
    from vllm_vlora.adapters.peft_folder import open_adapter

    found = Inputs({}, {}, {})
    named: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for task_id, path in (parse_name(one) if isinstance(one, str) else one for one in names):
        named.setdefault(_identity(path), []).append(task_id)
        paths[_identity(path)] = path
    chosen: list[tuple[str, str | None, str | None]] = []
    for place, own in (pair for ref in refs for pair in _expand(ref, found)):
        ids = named.pop(_identity(place), None)
        chosen += [(place, own, task_id) for task_id in ids] if ids else [(place, own, None)]
    chosen += [(paths[key], None, task_id) for key, ids in named.items() for task_id in ids]

    refs_by_id: dict[str, str] = {}
    refused: dict[str, AdapterError] = {}
    for ref, own, given in chosen:
        try:
            opened = open_adapter(ref)
        except AdapterError as error:
            # Of a Hub that cannot be reached, every further one would take as long to say the same.
            if not os.path.isdir(Path(ref).expanduser()):
                raise
            refused[ref] = error
            continue
        adapter = opened if own is None else replace(opened, name=own)
        task_id = validate_task_id(given) if given is not None else _own_id(adapter.name, ref)
        if task_id in found.adapters:
            raise _collision(task_id, refs_by_id[task_id], ref)
        found.adapters[task_id] = adapter
        refs_by_id[task_id] = ref
    if refused and not (skip_unreadable and found.adapters):
        offered = skip_unreadable is not None and found.adapters
        raise _all_of([*refused.values()], len(chosen), _SKIP if offered else "")
    found.passed_over.update({ref: str(error) for ref, error in refused.items()})
    if not found.adapters:
        raise AdapterError("no adapter given; name at least one folder or Hub id")
    return found


def _all_of(refused: list[AdapterError], count: int, advice: str) -> AdapterError:
    """One error that says of every adapter why it cannot be read."""
    if len(refused) == 1 and not advice:
        return refused[0]
    said = "; ".join(map(str, refused)) + advice
    if len(refused) == 1:
        return AdapterError(said)
    return AdapterError(f"{len(refused)} of {count_of(count, 'adapter')} cannot be read: {said}")


def _expand(ref: str, found: Inputs) -> list[tuple[str, str | None]]:
    """The adapters that one argument stands for, with ids where it is a folder of adapters."""
    # As a path it would be the working folder, which nobody means by a variable that is not set.
    if not ref:
        raise AdapterError("an adapter's name is empty; give a folder, a Hub id or a URL")
    path = _fetched(ref) if is_remote(ref) else local_folder(ref) or Path(ref).expanduser()
    if not path.is_dir():
        return [(ref, None)]
    from vllm_vlora.adapters.discovery import find_adapters
    from vllm_vlora.adapters.lookalikes import describe_folder

    inside = find_adapters(path)
    found.passed_over.update({str(place): why for place, why in inside.passed_over.items()})
    if not inside.adapters and inside.passed_over and describe_folder(path) is None:
        reasons = (f"{place.name}: {why}" for place, why in inside.passed_over.items())
        raise AdapterError(f"{ref}: no adapter in it; {some_of(reasons, 3)}")
    itself = any(os.path.samefile(place, path) for place in inside.adapters.values())
    if itself or not inside.adapters:
        return [(ref, None)]
    found.folders[ref] = len(inside.adapters)
    return [(str(folder), task_id) for task_id, folder in inside.adapters.items()]


def _fetched(url: str) -> Path:
    from vllm_vlora.adapters.peft_folder import find_adapter

    return find_adapter(url)


def _own_id(name: str, ref: str) -> str:
    try:
        return validate_task_id(name)
    except TaskIdError as error:
        raise TaskIdError(f"{error}, or give the adapter an id with --name ID={ref}") from error


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
    given: Iterable[str],
    names: Iterable[str | tuple[str, str]],
    messages: Console,
    skip_unreadable: bool | None = None,
) -> Inputs:
    """As :func:`collect`; says how many adapters a folder stands for, and what there was left out."""
    from vllm_vlora.tools.summary import line

    found = collect(given, names, skip_unreadable)
    for ref, count in found.folders.items():
        line(messages, f"{ref} is a folder of adapters: {count} found")
    shown = list(found.passed_over.items())[:_MOST_SHOWN]
    for place, why in shown:
        line(messages, f"Left out {place}: {why}", style="yellow")
    if len(found.passed_over) > len(shown):
        rest = len(found.passed_over) - len(shown)
        line(messages, f"Left out {count_of(rest, 'more place')}; --json names all", style="yellow")
    return found
