"""Files that belong to a checkpoint's tasks, found by name: held-out text, and original adapters."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vllm_vlora.adapters.discovery import find_adapters
from vllm_vlora.adapters.peft_folder import Adapter, open_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_entry import column
from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.task_ids import encode_task_id
from vllm_vlora.wording import count_of, some_of

logger = logging.getLogger(__name__)

_DATA_SUFFIXES = (".jsonl", ".txt")


class KnownTasks(Protocol):
    """The tasks that data can belong to: those of a checkpoint, or of one that is to be made."""

    @property
    def path(self) -> Path: ...
    @property
    def tasks(self) -> Mapping[str, Any]: ...
    def record(self, task: str) -> Any: ...


def find_data(checkpoint: KnownTasks, given: Iterable[str]) -> dict[str, list[Path]]:
    """Task id -> data files, from ``TASK=FILE`` and from folders of files named as tasks.

    A file that is given twice is one: intervals would be of twice as many examples. Files of a folder
    that no task is named after are named in a warning.

    Raises:
        OptionError: not of that form, or a folder has no file of any task, or two of one name.
        TaskNotFoundError: the checkpoint has no such task.
    """
    found: dict[str, list[Path]] = {}
    for text in given:
        if Path(text).expanduser().is_dir():
            folder = Path(text).expanduser()
            files = _data_in(folder)
            matches = _match_tasks(checkpoint, files)
            if not matches:
                raise OptionError(
                    f"--data {text}: no file there is named as a task of {checkpoint.path} with "
                    ".jsonl or .txt; give --data TASK=FILE"
                )
            unused = [path.name for path in files.values() if path not in matches.values()]
            if unused:
                logger.warning(
                    "--data %s: no task is named as %s, which are left out; give --data TASK=FILE for "
                    "what is one's text",
                    text,
                    some_of(unused),
                )
        else:
            matches = dict([_parse_pair(checkpoint, "--data", text, "FILE")])
        for task, path in matches.items():
            known = found.setdefault(task, [])
            if not any(path.resolve() == other.resolve() for other in known):
                known.append(path)
    # In the checkpoint's order, whatever the order of the options.
    return {task: found[task] for task in checkpoint.tasks if task in found}


def _data_in(folder: Path) -> dict[str, Path]:
    """Name -> file; by listing, since a task may be called "../x"."""
    names: dict[str, Path] = {}
    for child in sorted(folder.iterdir()):
        if child.suffix.lower() not in _DATA_SUFFIXES or not child.is_file():
            continue
        other = names.setdefault(child.stem, child)
        if other is not child:
            raise OptionError(
                f"--data {folder} has {other.name} and {child.name}, of which one task's text can be "
                "but one; take one away, or give --data TASK=FILE for each"
            )
    return names


def find_originals(
    checkpoint: Checkpoint, folders: Iterable[str], named: Iterable[str] = ()
) -> dict[str, Path]:
    """Task id -> folder of its original; a folder given by name goes before one that was found.

    In a folder of adapters the sub-folder counts that has the task's id (one folder a part, where it has
    slashes), its portable name, or the name that the adapter had when it was compressed, if one task
    alone had it and none is called so.

    Args:
        folders: of ``--adapters``. named: of ``--adapter``, ``TASK=PATH``, each for one task.

    Raises:
        OptionError: not of the form ``TASK=PATH``, or a folder has no original of any task.
        TaskNotFoundError: the checkpoint has no such task.
    """
    found: dict[str, Path] = {}
    for text in folders:
        matches = _originals_in(checkpoint, text, "--adapters", "; give --adapter TASK=PATH")
        found = {**matches, **found}
    found.update(_parse_pair(checkpoint, "--adapter", text, "PATH") for text in named)
    return found


def open_originals(
    checkpoint: Checkpoint, folder: str | Path, task_ids: Sequence[str] | None = None
) -> dict[str, Adapter]:
    """Task id -> original adapter, opened, as ``find_originals`` finds them in a folder.

    Args:
        task_ids: those wanted, by default all of the checkpoint.

    Raises:
        OptionError: no such folder.
        AdapterError: some are not there, which are named, or cannot be opened.
    """
    wanted = list(checkpoint.tasks) if task_ids is None else list(task_ids)
    if not wanted:
        return {}
    paths = _originals_in(checkpoint, folder, "--originals", "; name the folders as the tasks")
    missing = [task_id for task_id in wanted if task_id not in paths]
    if missing:
        raise AdapterError(
            f"{folder} has no adapter for {len(missing)} of {count_of(len(wanted), 'task')}: "
            f"{some_of(map(repr, missing))}; each is expected in a folder of the task's id, or of the "
            "name that it had when it was compressed; remove tasks whose original is lost"
        )
    return {task_id: open_adapter(paths[task_id]) for task_id in wanted}


def _originals_in(
    checkpoint: Checkpoint, given: str | Path, option: str, advice: str
) -> dict[str, Path]:
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise OptionError(f"{option} {given}: no such folder")
    matches = _match_tasks(checkpoint, _adapters_in(checkpoint, folder), by_source=True)
    if not matches:
        raise OptionError(
            f"{option} {given}: no sub-folder is an adapter that a task of {checkpoint.path} is named "
            f"after{advice}"
        )
    return matches


def _adapters_in(checkpoint: Checkpoint, folder: Path) -> dict[str, Path]:
    """Name -> adapter folder: those that compressing the folder would find, and by id any deeper."""
    found = find_adapters(folder).adapters
    # Of adapters in a folder's own sub-folders the name counts as well, whatever lies around them.
    found |= {child.name: child for child in sorted(folder.iterdir()) if _is_adapter(child)}
    for task in checkpoint.tasks:
        # An id may be anything, also a path that leads out of the folder.
        parts = task.split("/")
        if len(parts) > 1 and not {"", ".", ".."} & set(parts) and _is_adapter(folder / task):
            found[task] = folder / task
    return found


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _match_tasks(
    checkpoint: KnownTasks, paths: Mapping[str, Path], *, by_source: bool = False
) -> dict[str, Path]:
    own = {task: (task, encode_task_id(task)) for task in checkpoint.tasks}
    source = dict(zip(checkpoint.tasks, column(checkpoint.tasks, "source"))) if by_source else {}
    times = Counter(source.values())
    # What is one task's own name says nothing about the task whose adapter was called so.
    taken = {name for names in own.values() for name in names}
    found = {}
    for task in checkpoint.tasks:
        names = list(own[task])
        if task in source and times[source[task]] == 1 and source[task] not in taken:
            names.append(source[task])
        path = next((paths[name] for name in names if name in paths), None)
        if path is not None:
            found[task] = path
    return found


def _parse_pair(checkpoint: KnownTasks, option: str, text: str, what: str) -> tuple[str, Path]:
    # A task id may hold "=", so known ids come first, the longest one before all.
    known = [task for task in checkpoint.tasks if text.startswith(f"{task}=")]
    task = max(known, key=len) if known else text.partition("=")[0]
    path = text[len(task) + 1 :]
    if not task or not path:
        raise OptionError(f"{option} {text!r} is neither a folder nor of the form TASK={what}")
    checkpoint.record(task)
    return task, Path(path).expanduser()
