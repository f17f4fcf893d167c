"""What a compression did: the report of ``compress``, its tasks and the candidates it weighed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vllm_vlora.checkpoint.losses import Losses
from vllm_vlora.checkpoint.manifest import TaskRecord
from vllm_vlora.checkpoint.task_entry import TaskEntry, column, common, entries, entry_of
from vllm_vlora.representations.spec import ModuleSpec


class Candidate(NamedTuple):
    """A plan that was considered: its exact bytes, and the tasks' relative errors under it.

    ``format`` is that of private factors or of the bases: a number format, ``own`` where adapters
    of several dtypes each keep theirs, or ``mixed`` where every module has the one that suits it.
    ``kl_kept`` is the mean KL kept (``evaluation.fidelity``), where the model was asked.
    """

    representation: str
    format: str
    nbytes: int
    mean_error: float
    worst_error: float
    kl_kept: float | None = None


class CurvePoint(NamedTuple):
    """What a ratio would cost: the best plan found for it, with predicted errors."""

    ratio: float
    candidate: Candidate


@dataclass
class TaskReport:
    """What became of one task.

    ``ranks`` is the least and the greatest rank kept of its modules, ``nbytes`` its file without
    extra tensors, ``error`` the measured ||delta_W' - delta_W||_F / ||delta_W||_F over all modules.
    ``seen_error`` is the same as the calibrated model sees it; without calibration it is ``error``.
    """

    task_id: str
    source: str
    ranks: tuple[int, int]
    original_nbytes: int
    nbytes: int
    error: float
    representation: str
    format: str
    seen_error: float = 0.0


@dataclass
class CompressReport:
    """What ``compress`` did: sizes of the files, and errors measured on what they hold.

    ``raised`` are the tasks that got more than their share of the bytes to pass the gate.
    ``chosen_by`` says what the choice went by. ``kl_kept`` is set where the model judged: the KL kept of
    every task that was judged (None where it is undefined).
    ``kept`` is set by ``compress_to_quality``: the tasks that are stored as they were, since less would
    not do.
    ``losses`` has what must be said of tasks that lost much. ``extra_nbytes`` are those of heads and
    other tensors beside the LoRA weights, which ``nbytes`` leaves out.

    Examples:
        >>> tasks = {f"task_{i}": open_adapter(path) for i, path in enumerate(adapter_dirs)}
        >>> report = compress(tasks, folder / "checkpoint", CompressOptions(max_error=0.05))
        >>> report.worst_error <= 0.05
        True
        >>> [task.task_id for task in report.tasks]
        ['task_0', 'task_1', 'task_2', 'task_3']
    """

    path: Path
    tasks: list[TaskReport]
    representation: str
    format: str
    original_nbytes: int
    nbytes: int
    basis_nbytes: int
    candidates: list[Candidate]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    raised: list[str] = field(default_factory=list)
    calibrated: bool = False
    chosen_by: str = ""
    kl_kept: dict[str, float | None] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    extra_nbytes: int = 0

    @property
    def ratio(self) -> float:
        """``original_nbytes / nbytes``."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.inf

    @property
    def mean_error(self) -> float:
        """Mean of the tasks' errors."""
        return sum(task.error for task in self.tasks) / len(self.tasks)

    @property
    def worst_error(self) -> float:
        """The greatest of the tasks' errors."""
        return max(task.error for task in self.tasks)

    @property
    def rms_error(self) -> float:
        """Root mean square of the tasks' errors, which ``auto`` compares."""
        return math.sqrt(sum(task.error**2 for task in self.tasks) / len(self.tasks))


def report_contents(
    path: Path,
    tasks: Mapping[str, TaskRecord],
    modules: Sequence[ModuleSpec],
    basis_nbytes: int,
) -> CompressReport:
    """Sizes and recorded errors of every task; nothing is measured anew.

    Args:
        tasks: task id -> record, in the checkpoint's order. modules: what their segments name.
        basis_nbytes: of its basis files.
    """
    reports = [_report_entry(task_id, entry) for task_id, entry in entries(tasks)]
    # A task without modules has no representation that could differ.
    stored = [task for task in reports if task.ranks[1]]
    return CompressReport(
        path=path,
        tasks=reports,
        representation=common(task.representation for task in stored),
        format=common(task.format for task in stored),
        original_nbytes=sum(task.original_nbytes for task in reports),
        nbytes=basis_nbytes + sum(task.nbytes for task in reports),
        basis_nbytes=basis_nbytes,
        candidates=[],
        losses=Losses.of(tasks, modules),
        extra_nbytes=extra_nbytes(tasks),
    )


def extra_nbytes(tasks: Mapping[str, TaskRecord]) -> int:
    """Bytes of the tensors beside the LoRA weights: heads and the like, kept as they were."""
    return sum(column(tasks, "nbytes")) - sum(column(tasks, "lora_nbytes"))


def report_task(task_id: str, record: TaskRecord) -> TaskReport:
    """One task's sizes and its recorded error."""
    return _report_entry(task_id, entry_of(record))


def _report_entry(task_id: str, entry: TaskEntry) -> TaskReport:
    return TaskReport(
        task_id,
        entry.source,
        (entry.min_rank, entry.max_rank),
        entry.original_nbytes,
        entry.lora_nbytes,
        entry.error,
        entry.representation,
        entry.format,
        entry.error,
    )
