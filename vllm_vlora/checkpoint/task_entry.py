"""What lists and sums say of a task: small enough to be held for every task of a large checkpoint.

A record (``manifest.TaskRecord``) has a segment for each module; a ``TaskEntry`` is what follows from
it in a few numbers. A ``TaskTable`` knows the entries of its tasks without their records. Whatever goes
over all tasks of a checkpoint asks ``entries`` and ``column`` here, and reads records only of the tasks
that need them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_vlora.checkpoint.manifest import FileRef, TaskRecord, task_file
from vllm_vlora.checkpoint.serving import carried_tensors

MIXED = "mixed"
"""In place of a format's or a representation's name where several are in use."""
# Of a module of which nothing is left the error is 1 up to the rounding of what is stored.
LOST_MODULE = 0.99


class TaskEntry(NamedTuple):
    """A task in a list; the first fields are those of its record.

    ``min_rank`` and ``max_rank`` are 0 and ``representation`` and ``format`` ``mixed`` without modules.
    ``lost_modules`` counts those of whose update nothing is left, ``narrow_rows`` says whether some rows
    of NF4 have 3 or 2 bits, ``carries`` whether there are heads or other whole modules.
    """

    sha256: str
    nbytes: int
    lora_nbytes: int
    original_nbytes: int
    error: float
    source: str
    min_rank: int
    max_rank: int
    representation: str
    format: str
    lost_modules: int
    no_update: bool
    narrow_rows: bool
    carries: bool


class TaskTable(Mapping[str, TaskRecord]):
    """Tasks whose entries are known without reading their records."""

    @abstractmethod
    def entry(self, task_id: str) -> TaskEntry:
        """What lists say of a task.

        Raises:
            KeyError: no such task.
        """

    def entries(self) -> Iterator[tuple[str, TaskEntry]]:
        """Every task with what lists say of it, in their order."""
        return ((task_id, self.entry(task_id)) for task_id in self)

    def column(self, name: str) -> Sequence[Any]:
        """One field of every task's entry, in the order of the tasks."""
        return [getattr(entry, name) for _, entry in self.entries()]


def entry_of(record: TaskRecord) -> TaskEntry:
    """What lists say of a task with this record."""
    segments = record.segments
    ranks = [segment.rank for segment in segments]
    return TaskEntry(
        record.sha256,
        record.nbytes,
        record.lora_nbytes,
        record.original_nbytes,
        record.error,
        record.source,
        min(ranks, default=0),
        max(ranks, default=0),
        common(segment.representation for segment in segments),
        common(segment.format for segment in segments),
        sum(segment.error >= LOST_MODULE for segment in segments),
        has_no_update(record),
        any(segment.has_narrow_rows for segment in segments),
        bool(carried_tensors(record)),
    )


def entry(tasks: Mapping[str, TaskRecord], task_id: str) -> TaskEntry:
    """What lists say of a task of these."""
    return tasks.entry(task_id) if isinstance(tasks, TaskTable) else entry_of(tasks[task_id])


def entries(tasks: Mapping[str, TaskRecord]) -> Iterator[tuple[str, TaskEntry]]:
    """Every task with what lists say of it, in their order."""
    if isinstance(tasks, TaskTable):
        return tasks.entries()
    return ((task_id, entry_of(record)) for task_id, record in tasks.items())


def task_files(tasks: Mapping[str, TaskRecord]) -> Iterator[FileRef]:
    """The file of every task, known without their records."""
    for task_id, (sha256, nbytes) in zip(
        tasks, zip(column(tasks, "sha256"), column(tasks, "nbytes"))
    ):
        yield FileRef(task_file(task_id), sha256, nbytes)


def column(tasks: Mapping[str, TaskRecord], name: str) -> Sequence[Any]:
    """One field of every task's record that its entry has too, in their order."""
    if isinstance(tasks, TaskTable):
        return tasks.column(name)
    return [getattr(record, name) for record in tasks.values()]


def common(values: Iterable[str]) -> str:
    """The one value that all have, or ``mixed``."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else MIXED


def has_no_update(record: TaskRecord) -> bool:
    """Whether a task's LoRA weights are known to change nothing, and did so before they were stored."""
    return all(segment.scale == 0 and segment.error == 0 for segment in record.segments)
