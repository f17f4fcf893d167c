"""Where a task's factors go: every slice of every LoRA layer of the served model, as plain tensors.

This module knows tensors only. ``layers`` reads vLLM's layers and describes each of their slices as a
``SliceLayout``; here the layouts are checked against a checkpoint and turned into plans of materialize.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace

import torch

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.plugin.layouts import Run, SliceLayout
from vllm_vlora.plugin.resident import ResidentTask
from vllm_vlora.representations.spec import ModuleSpec
from vllm_vlora.representations.stored import SideSource
from vllm_vlora.triton_kernels.materialize import (
    MaterializeJob,
    MaterializePlan,
    OutTable,
    plan_materialize,
)


@dataclass
class _Slot:
    """One slot: where it is written, and what may lie there.

    Attributes:
        sides: the slot's A and B of every layout, whole, in the layouts' order.
        table: the same cut into the layouts' runs, in the order of a task's jobs.
        all_rows: the rows of each of ``sides``, kept since asking thousands of tensors takes long.
        rows: for each of ``sides`` how many of its first rows may hold something other than zero.
    """

    sides: list[torch.Tensor]
    table: OutTable
    all_rows: list[int]
    rows: list[int]


@dataclass(frozen=True)
class _TaskPlan:
    """How one task is written to any slot; ``rows`` are its ranks, side by side as in a slot."""

    plan: MaterializePlan
    rows: list[int]


@dataclass
class SlotWriter:
    """Writes tasks into slots.

    ``layouts`` has every slice of every layer that it fills, ``others`` those that another writer fills,
    which ``check`` alone looks at, and ``elsewhere`` names modules that other pipeline-parallel ranks
    write. What a task's writes need is arranged once and kept until the task is dropped: some 300 bytes
    a factor on a GPU, and on a CPU a copy of the packed factors that do not lie as the slots do (see
    ``plan_materialize``).

    A slot keeps what was written to it when its adapter leaves, so the writer remembers how far each
    side of a slot is filled, and zeroes only what the next task leaves of that. Of a slot that it
    has not written nothing is known. Who writes to slots beside it must say so with ``forget``.
    """

    layouts: list[SliceLayout]
    max_rank: int
    others: list[SliceLayout] = field(default_factory=list)
    elsewhere: Collection[str] = ()
    _slots: dict[int, _Slot] = field(default_factory=dict)
    _plans: dict[str, _TaskPlan] = field(default_factory=dict)

    def check(
        self, checkpoint: Checkpoint, task_ids: Iterable[str], engine_name: Callable[[str], str]
    ) -> None:
        """Raise ModelMismatchError, naming the module or task, when the model cannot take a task."""
        layouts: dict[str, list[SliceLayout]] = {}
        for layout in (*self.layouts, *self.others):
            layouts.setdefault(layout.name, []).append(layout)
        used: set[int] = set()
        task_ids = list(task_ids)
        for task_id in task_ids:
            record = checkpoint.record(task_id)
            used.update(segment.module for segment in record.segments)
            if record.max_rank > self.max_rank:
                raise ModelMismatchError(
                    f"{checkpoint.path}: task {task_id!r} has rank {record.max_rank}, the engine "
                    f"allows {self.max_rank}; start vLLM with --max-lora-rank {record.max_rank} or "
                    "the next rank that it offers"
                )
        names = {index: engine_name(checkpoint.modules[index].name) for index in sorted(used)}
        if len(set(names.values())) < len(names):
            _check_once(checkpoint, task_ids, names)
        for index, name in names.items():
            module = checkpoint.modules[index]
            if name in self.elsewhere:
                continue
            if name not in layouts:
                raise ModelMismatchError(
                    f"{checkpoint.path}: the served model has no LoRA layer for module "
                    f"{module.name}; it is another architecture, or --lora-target-modules leaves the "
                    "module out"
                )
            for layout in layouts[name]:
                _check_shape(str(checkpoint.path), module, layout)

    def prepare(self, task: ResidentTask) -> None:
        """Arrange a task's writes and compile them now, which its first ``write`` would do otherwise."""
        self._plan(task, 0).plan.warm_up()

    def write(self, slot: int, task: ResidentTask) -> None:
        """Fill a slot whole with a task; slices that the task does not adapt become zero."""
        into, planned = self._slot(slot), self._plan(task, slot)
        stale = [
            side[rank:rows]
            for side, rank, rows in zip(into.sides, planned.rows, into.rows)
            if rank < rows
        ]
        # Should anything fail on the way, nothing is known of the slot.
        self.forget(slot)
        if stale:
            torch._foreach_zero_(stale)
        planned.plan.run(into.table)
        into.rows = planned.rows

    def forget(self, slot: int) -> None:
        """Take back what is known of a slot's content: stock code has written to it."""
        if slot in self._slots:
            self._slots[slot].rows = self._slots[slot].all_rows

    def drop(self, path: str) -> None:
        """Let go of what is kept for a task's writes, if anything is."""
        self._plans.pop(path, None)

    def _slot(self, slot: int) -> _Slot:
        held = self._slots.get(slot)
        if held is None:
            sides, regions = [], []
            for layout in self.layouts:
                for view, runs in (
                    (layout.a(slot), layout.runs_a),
                    (layout.b(slot), layout.runs_b),
                ):
                    sides.append(view)
                    regions += _regions(view, runs)
            rows = [len(side) for side in sides]
            held = self._slots[slot] = _Slot(sides, OutTable(regions), rows, rows)
        return held

    def _plan(self, task: ResidentTask, slot: int) -> _TaskPlan:
        held = self._plans.get(task.path)
        if held is None:
            into = self._slot(slot)
            outs = iter(into.table.outs)
            jobs: list[MaterializeJob] = []
            rows: list[int] = []
            for layout, held_a in zip(self.layouts, into.sides[::2]):
                source_a, source_b = task.sources.get(layout.name, (None, None))
                sources = _rows_of(source_a, layout.first_row, len(held_a)), source_b
                for source, runs in zip(sources, (layout.runs_a, layout.runs_b)):
                    rows.append(0 if source is None else source.rank)
                    jobs += [_job(next(outs), source, run) for run in runs]
            held = self._plans[task.path] = _TaskPlan(plan_materialize(jobs), rows)
        return held


def _regions(view: torch.Tensor, runs: tuple[Run, ...]) -> list[torch.Tensor]:
    if len(runs) == 1:
        return [view]
    return [view[:, run.target : run.target + run.width] for run in runs]


def _rows_of(source: SideSource | None, first: int, count: int) -> SideSource | None:
    """At most ``count`` rows of a source from ``first`` on; None where there are none."""
    if source is None or source.rank <= first:
        return None
    stop = min(first + count, source.rank)
    if (first, stop) == (0, source.rank):
        return source
    if source.left is not None:
        return replace(source, left=source.left[first:stop])
    return replace(source, matrix=source.matrix.row_slice(first, stop))


def _job(region: torch.Tensor, source: SideSource | None, run: Run) -> MaterializeJob:
    """The job of one run; rows beyond the task's rank are not its business."""
    if source is None:
        return MaterializeJob.zero(region[:0])
    width = min(run.width, source.matrix.cols - run.source)
    out = region[: source.rank]
    return MaterializeJob(out, source.matrix, source.left, source.scale, run.source, width)


def _check_once(checkpoint: Checkpoint, task_ids: Iterable[str], names: dict[int, str]) -> None:
    """Refuse a task with two modules for one layer, of which only one could be in its slot."""
    for task_id in task_ids:
        first: dict[str, str] = {}
        for segment in checkpoint.record(task_id).segments:
            module = checkpoint.modules[segment.module].name
            other = first.setdefault(names[segment.module], module)
            if other != module:
                raise ModelMismatchError(
                    f"{checkpoint.path}: task {task_id!r} adapts the layer {names[segment.module]} of "
                    f"the served model twice, as {other} and as {module}; make the adapter anew, or "
                    "leave the task out of the served checkpoint"
                )


def _check_shape(where: str, module: ModuleSpec, layout: SliceLayout) -> None:
    have, want = (module.d_out, module.d_in), (layout.d_out, layout.d_in)
    fits = have == want
    if layout.at_most:
        fits = have[0] <= want[0] and have[1] <= want[1]
    if not fits:
        raise ModelMismatchError(
            f"{where}: module {module.name} is {have[0]} x {have[1]} (d_out x d_in) in the checkpoint "
            f"and {want[0]} x {want[1]} in the served model; the checkpoint is of another model"
        )
