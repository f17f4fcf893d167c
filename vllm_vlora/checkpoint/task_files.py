"""Files that belong to a checkpoint's tasks, found by name: held-out text, and original adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_vlora.errors import OptionError

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.reader import Checkpoint


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

    Raises:
        OptionError: not of that form, or a folder has no file of any task.
        TaskNotFoundError: the checkpoint has no such task.
    """
    found: dict[str, list[Path]] = {}
    for text in given:
        if Path(text).expanduser().is_dir():
            folder = Path(text).expanduser()
            # By listing, since a task may be called "../x".
            names = {
                child.stem: child
                for child in sorted(folder.iterdir())
                if child.suffix in _DATA_SUFFIXES and child.is_file()
            }
            matches = _match_tasks(checkpoint, names)
            if not matches:
                raise OptionError(
                    f"--data {text}: no file there is named as a task of {checkpoint.path} with "
                    ".jsonl or .txt; give --data TASK=FILE"
                )
        else:
            matches = dict([_parse_pair(checkpoint, "--data", text, "FILE")])
        for task, path in matches.items():
            found.setdefault(task, []).append(path)
    # In the checkpoint's order, whatever the order of the options.
    return {task: found[task] for task in checkpoint.tasks if task in found}


def find_originals(
    checkpoint: Checkpoint, folders: Iterable[str], named: Iterable[str]
) -> dict[str, Path]:
    """Task id -> folder of its original; a folder given by name goes before one that was found.

    In a folder of adapters the sub-folder counts that has the task's id, its portable name, or the
    name that the adapter had when it was compressed, if one task alone had it.

    Raises:
        OptionError: not of the form ``TASK=PATH``, or a folder has no original of any task.
        TaskNotFoundError: the checkpoint has no such task.
    """
    found: dict[str, Path] = {}
    for text in folders:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise OptionError(f"--adapters {text}: no such folder")
        names = {
            child.name: child
            for child in sorted(folder.iterdir())
            if (child / "adapter_config.json").is_file()
        }
        matches = _match_tasks(checkpoint, names, by_source=True)
        if not matches:
            raise OptionError(
                f"--adapters {text}: no sub-folder is an adapter that a task of {checkpoint.path} is "
                "named after; give --adapter TASK=PATH"
            )
        found = {**matches, **found}
    found.update(_parse_pair(checkpoint, "--adapter", text, "PATH") for text in named)
    return found


def _match_tasks(
    checkpoint: KnownTasks, paths: Mapping[str, Path], *, by_source: bool = False
) -> dict[str, Path]:
    from vllm_vlora.task_ids import encode_task_id

    sources = [record.source for record in checkpoint.tasks.values()] if by_source else []
    found = {}
    for task, record in checkpoint.tasks.items():
        names = [task, encode_task_id(task)]
        if by_source and sources.count(record.source) == 1:
            names.append(record.source)
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
