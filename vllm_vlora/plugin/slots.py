"""Where a task's factors go: every slice of every LoRA layer of the served model, as plain tensors.

This module knows tensors only. ``seams`` reads vLLM's layers and describes each of their slices as a
``SliceLayout``; here the layouts are checked against a checkpoint and turned into materialize jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from vllm_vlora.checkpoint import Checkpoint
from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.manifest import ModuleSpec
from vllm_vlora.plugin.layouts import Run, SliceLayout
from vllm_vlora.plugin.resident import ResidentTask
from vllm_vlora.representations import SideSource
from vllm_vlora.triton_kernels.materialize import MaterializeJob, materialize


@dataclass
class SlotWriter:
    """Writes tasks into slots.

    ``layouts`` has every slice of every layer. The views of a slot are made once and kept: making
    them costs more than the small products that fill them.
    """

    layouts: list[SliceLayout]
    max_rank: int
    _views: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def check(
        self, checkpoint: Checkpoint, task_ids: Iterable[str], engine_name: Callable[[str], str]
    ) -> None:
        """Raise ModelMismatchError, naming the module or task, when the model cannot take a task."""
        layouts: dict[str, list[SliceLayout]] = {}
        for layout in self.layouts:
            layouts.setdefault(layout.name, []).append(layout)
        used: set[int] = set()
        for task_id in task_ids:
            record = checkpoint.record(task_id)
            used.update(segment.module for segment in record.segments)
            if record.max_rank > self.max_rank:
                raise ModelMismatchError(
                    f"{checkpoint.path}: task {task_id!r} has rank {record.max_rank}, the engine "
                    f"allows {self.max_rank}; start vLLM with --max-lora-rank {record.max_rank} or "
                    "the next rank that it offers"
                )
        for module in (checkpoint.modules[index] for index in sorted(used)):
            name = engine_name(module.name)
            if name not in layouts:
                raise ModelMismatchError(
                    f"{checkpoint.path}: the served model has no LoRA layer for module "
                    f"{module.name}; it is another architecture, or --lora-target-modules leaves the "
                    "module out"
                )
            for layout in layouts[name]:
                _check_shape(str(checkpoint.path), module, layout)

    def write(self, slot: int, task: ResidentTask) -> None:
        """Fill a slot whole with a task; slices that the task does not adapt become zero."""
        views = self._views.get(slot)
        if views is None:
            views = [(layout.a(slot), layout.b(slot)) for layout in self.layouts]
            self._views[slot] = views
        jobs: list[MaterializeJob] = []
        for layout, (view_a, view_b) in zip(self.layouts, views):
            sources = task.sources.get(layout.name)
            if sources is None:
                view_a.zero_()
                view_b.zero_()
                continue
            jobs += _jobs(view_a, sources[0], layout.runs_a)
            jobs += _jobs(view_b, sources[1], layout.runs_b)
        materialize(jobs)


def _jobs(view: torch.Tensor, source: SideSource, runs: Iterable[Run]) -> Iterator[MaterializeJob]:
    runs = tuple(runs)
    for run in runs:
        out = view
        width = min(run.width, source.matrix.cols - run.source)
        if len(runs) > 1:
            out = view[:, run.target : run.target + run.width]
        yield MaterializeJob(out, source.matrix, source.left, source.scale, run.source, width)


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
