"""Add tasks to a checkpoint without touching those that stay.

``add_adapters`` projects a new adapter on the shared bases where they carry it and stores it privately
where they do not (``projection``), and on request lets the bases grow (``basis_growth``). Passes over
the new adapters: measure, where bases may grow measure again, encode the cores, write. Memory is one
adapter, one module's basis and planning numbers; the checkpoint is the old one or the new one at every
moment.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from vllm_vlora.adapters.collection import Collection, Module, Progress, reading_warnings
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.losses import Losses
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.successor import Successor, edit_target, edited
from vllm_vlora.compression.budgets import MARGIN
from vllm_vlora.compression.encoding import Loss, encode_kept, measure_loss
from vllm_vlora.editing.basis_growth import BasisGrowth, Growth
from vllm_vlora.editing.growth_offers import grown
from vllm_vlora.editing.new_tasks import NewTasks
from vllm_vlora.editing.options import AddedTask, AddOptions, AddReport, check_output
from vllm_vlora.editing.projection import (
    BlockMeter,
    CoreOption,
    Rows,
    Target,
    TaskPlan,
    TaskPlanner,
)
from vllm_vlora.editing.targets import POOR, plan_within, why
from vllm_vlora.editing.targets import targets as targets_of
from vllm_vlora.errors import TaskIdError
from vllm_vlora.planning.scratch import CoreSpool
from vllm_vlora.representations.factors import relative
from vllm_vlora.representations.joint import basis_rows
from vllm_vlora.representations.spec import BasisSpec, ModuleSpec
from vllm_vlora.representations.stored import Basis, StoredModule
from vllm_vlora.wording import some_of


def add_adapters(
    checkpoint: str | Path,
    adapters: Mapping[str, Adapter],
    options: AddOptions | None = None,
    *,
    expand: bool = False,
    replace_tasks: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> AddReport:
    """Add adapters (task id -> opened adapter) to a checkpoint, in place or as the folder ``output``.

    The files of the tasks that it has stay byte for byte, and so do the bases unless they grow; grown,
    they keep their old rows, so that every old task decodes to the same numbers.

    Args:
        expand: let shared bases grow by directions of the new adapters, as far as that keeps more of
            each of them than the same bytes would otherwise.
        replace_tasks: a task that the checkpoint has already is replaced instead of an error.
        force: replace a checkpoint at ``output``.
        progress: called with (stage, done, total).

    Raises:
        AdapterError: no adapters, or some that do not fit the checkpoint's modules.
        BudgetError: a task cannot meet the budget, or would be worse than none.
        CheckpointError, DataError: the checkpoint or the calibration cannot be read.
        OutputError: the checkpoint cannot be written, or was changed meanwhile.
        TaskIdError: a task id that is not allowed, or that the checkpoint has already.

    Examples:
        >>> report = add_adapters(checkpoint, {"new": open_adapter(adapter_dirs[0])})
        >>> report.tasks[0].task_id, list(Checkpoint.open(checkpoint).tasks)[-1]
        ('new', 'new')
    """
    started = time.monotonic()
    options = options or AddOptions()
    target = edit_target(checkpoint, output)
    check_output(target, adapters, options.calibration)
    with edited(checkpoint, output, force=force) as (opened, folder):
        collection = Collection(adapters, opened.modules)
        if not replace_tasks:
            check_new(opened, collection.task_ids)
        scratch = folder / ".scratch"
        scratch.mkdir()
        new = NewTasks(opened, collection, options)
        addition = Addition(new, options, scratch, progress or (lambda *_: None))
        report = addition.write(folder, expand)
        shutil.rmtree(scratch)
    report.path = target
    report.seconds = time.monotonic() - started
    return report


def check_new(checkpoint: Checkpoint, task_ids: Sequence[str]) -> None:
    """Raise TaskIdError if the checkpoint has one of these tasks already."""
    known = [task_id for task_id in task_ids if task_id in checkpoint.tasks]
    if known:
        named = some_of(map(repr, known))
        raise TaskIdError(
            f"{checkpoint.path} has {named} already; replace with --replace (replace_tasks=True in "
            "Python), or give another id with --name NEW_ID=PATH"
        )


class Addition:
    """Plans, encodes and writes new tasks.

    Args:
        scratch: an existing folder for what waits between the passes; the caller removes it.
    """

    def __init__(
        self, new: NewTasks, options: AddOptions, scratch: Path, progress: Progress
    ) -> None:
        self._new = new
        self._options = options
        self._scratch = scratch
        self._progress = progress
        self._growing = BasisGrowth(new, scratch, progress)

    def write(self, folder: Path, expand: bool) -> AddReport:
        """Plan, encode and write everything into an existing folder; the manifest comes last.

        Raises:
            BudgetError: a task cannot meet its target.
        """
        choices = self._new.measure(self._progress)
        planners = [
            self._new.planner(choices, task) for task in range(len(self._new.collection.task_ids))
        ]
        targets, words = targets_of(self._new, self._options, planners)
        growth = self._growing.grow(choices, targets) if expand else None
        plans = []
        for task, (planner, target) in enumerate(zip(planners, targets)):
            grown_plan = None if growth is None else growth.plans.get(task)
            plans.append(grown_plan or plan_within(self._new, self._options, planner, target, task))
        modules = self._growing.modules(growth)
        spool = self._encode(plans, modules, growth)
        writer = self._write_bases(folder, growth)
        added = {}
        for task, task_id in enumerate(self._new.collection.task_ids):
            charge = 0 if growth is None else round(growth.charges.get(task, 0.0))
            private = planners[task].best_private(targets[task])
            written = self._write_task(writer, plans[task], spool, task)
            added[task_id] = self._added(
                task, planners[task], plans[task], private, charge, written, targets[task]
            )
            self._progress("write", task + 1, len(targets))
        for task_id in self._new.checkpoint.tasks:
            if task_id not in added:
                writer.copy_task(self._new.checkpoint, task_id)
        # A replaced task keeps its place.
        writer.tasks.arrange(dict.fromkeys([*self._new.checkpoint.tasks, *added]))
        report = writer.finish_edited()
        return AddReport(
            folder,
            list(added.values()),
            self._new.checkpoint.nbytes,
            report.nbytes,
            report.original_nbytes,
            words,
            0 if growth is None else len(growth.rows),
            0 if growth is None else self._growing.nbytes(growth),
            self._warnings(list(added.values()), expand, growth),
            losses=Losses.of(
                {task: writer.tasks[task] for task in added},
                writer.modules,
                {task: found.seen_error for task, found in added.items()},
            ),
            calibrated=self._options.calibration is not None,
        )

    def _encode(
        self, plans: Sequence[TaskPlan], modules: Sequence[ModuleSpec], growth: Growth | None
    ) -> _Encoded:
        """The cores that were planned, with their errors."""
        wanted: dict[str, list[tuple[int, CoreOption]]] = {}
        for task, plan in enumerate(plans):
            for name, option in zip(self._new.collection.adapters[task].modules, plan.options):
                if isinstance(option, CoreOption):
                    wanted.setdefault(name, []).append((task, option))
        encoded = _Encoded(CoreSpool(self._scratch / "cores"))
        final = {spec.name: spec.basis for spec in modules}
        for done, (module, basis) in enumerate(self._new.walk(list(wanted)), 1):
            assert basis is not None
            metric = self._new.surveyor.metric(module.name)
            basis = self._grown_basis(module, basis, growth)
            blocks: dict[Rows, BlockMeter] = {}
            tasks = [task for task, _ in wanted[module.name]]
            for (task, option), (a, b, scale) in zip(
                wanted[module.name], self._new.collection.read_module(module, tasks)
            ):
                rows = self._block_of(module.name, option.rows, final[module.name])
                if rows not in blocks:
                    blocks[rows] = BlockMeter(basis, rows, metric)
                block, (u_start, u_stop, v_start, v_stop) = blocks[rows], option.rows
                with self._new.collection.naming(task, module.name):
                    stored, _ = block.encode(
                        block.project(a, b, scale),
                        u_stop - u_start,
                        v_stop - v_start,
                        option.format,
                    )
                loss = measure_loss(a, b, scale, stored, basis_rows(stored, basis), metric)
                whole = (0, basis.u.rows, 0, basis.v.rows)
                kept = None if stored.rows == whole else stored.rows
                stored = replace(stored, rows=kept, error=loss.error)
                encoded.cores.append(task, module.name, stored)
                encoded.losses[task, module.name] = loss
            self._progress("encode", done, len(wanted))
        return encoded

    def _grown_basis(self, module: Module, basis: Basis, growth: Growth | None) -> Basis:
        if growth is None or module.name not in growth.rows:
            return basis
        more = BasisSpec(*growth.rows[module.name], basis.u.format)
        added = growth.bases.read(module, 0, more)
        return grown(basis, added.u, added.v)

    def _block_of(self, name: str, rows: Rows, basis: BasisSpec | None) -> Rows:
        """The block that a core stands on; its leading rows are the core's."""
        assert basis is not None
        for block in self._new.blocks[name]:
            starts_alike = (block[0], block[2]) == (rows[0], rows[2])
            if starts_alike and rows[1] <= block[1] and rows[3] <= block[3]:
                return block
        return rows[0], basis.k_out, rows[2], basis.k_in

    def _write_bases(self, folder: Path, growth: Growth | None) -> Successor:
        writer = Successor(
            folder,
            self._new.checkpoint,
            allow_large_error=self._options.allow_large_error,
        )
        if growth is None:
            writer.keep_bases()
        else:
            modules = self._new.collection.modules
            writer.write_bases(
                lambda name, basis: (
                    self._grown_basis(modules[name], basis, growth) if name in modules else basis
                )
            )
        for module in self._new.added:
            writer.add_module(module.name, module.d_in, module.d_out, module.kind)
        return writer

    def _write_task(
        self, writer: Successor, plan: TaskPlan, encoded: _Encoded, task: int
    ) -> _Written:
        adapter = self._new.collection.adapters[task]
        cores = encoded.cores.read(task)
        modules, losses = dict[str, StoredModule](), []
        for (name, (a, b, scale)), option in zip(
            self._new.collection.read_task(task, list(adapter.modules)), plan.options
        ):
            if isinstance(option, CoreOption):
                modules[name] = cores[name]
                losses.append(encoded.losses[task, name])
                continue
            with self._new.collection.naming(task, name):
                modules[name], loss = encode_kept(
                    a, b, scale, option, self._new.surveyor.metric(name)
                )
            losses.append(loss)
        error = relative(sum(x.lost for x in losses), sum(x.norm for x in losses))
        seen = relative(sum(x.seen_lost for x in losses), sum(x.seen_norm for x in losses))
        record = writer.add_task(
            self._new.collection.task_ids[task],
            modules,
            original_nbytes=adapter.original_nbytes,
            error=error,
            adapter_config=adapter.config,
            source=adapter.name,
            extra=adapter.extra_tensors(),
            renamed=adapter.renamed,
            seen_error=seen,
            companions=adapter.companions if self._options.tokenizers else None,
        )
        ranks = [segment.rank for segment in record.segments]
        return _Written(record.lora_nbytes, (min(ranks), max(ranks)), error, seen)

    def _added(
        self,
        task: int,
        planner: TaskPlanner,
        plan: TaskPlan,
        private: TaskPlan | None,
        charge: int,
        written: _Written,
        target: Target,
    ) -> AddedTask:
        adapter = self._new.collection.adapters[task]
        return AddedTask(
            self._new.collection.task_ids[task],
            adapter.name,
            plan.kind,
            written.ranks,
            adapter.original_nbytes,
            written.nbytes,
            charge,
            written.error,
            written.seen,
            planner.carried,
            None if private is None else private.error,
            None if private is None else private.nbytes,
            why(planner, plan, private, charge, target),
        )

    def _warnings(
        self, added: Sequence[AddedTask], expand: bool, growth: Growth | None
    ) -> list[str]:
        new = self._new.collection
        found = reading_warnings(dict(zip(new.task_ids, new.adapters)))
        for task_id, adapter in zip(new.task_ids, new.adapters):
            base = self._new.checkpoint.base_model
            if None not in (adapter.base_model, base) and adapter.base_model != base:
                found.append(
                    f"task {task_id!r} names the base model {adapter.base_model}, the checkpoint "
                    f"{base}; if they are not copies of one model, the task will not work"
                )
        if expand and growth is None:
            found.append("no basis has grown: new rows cost more than they keep")
        worst = self._new.worst_error
        # What the checkpoint records are errors of weights, and such are compared; but a new task of
        # which the model sees little is not poor, whatever its weights say.
        poor = [
            task.task_id
            for task in added
            if min(task.error, task.seen_error) > worst * POOR * (1 + MARGIN)
        ]
        if poor and self._options.max_error is None:
            named = some_of(map(repr, poor))
            found.append(
                f"{named} {'loses' if len(poor) == 1 else 'lose'} far more than any task that the "
                f"checkpoint had ({worst:.3f}): allow more bytes (--ratio, --max-error)"
                + ("" if expand else ", let bases grow (--expand)")
                + ", or fit everything anew (--rebuild)"
            )
        return found


class _Written(NamedTuple):
    """What a task's file came to: bytes, ranks, and errors measured on its numbers."""

    nbytes: int
    ranks: tuple[int, int]
    error: float
    seen: float


@dataclass
class _Encoded:
    """Cores on disk, and what each of them lost: (task, module name) -> loss."""

    cores: CoreSpool
    losses: dict[tuple[int, str], Loss] = field(default_factory=dict)
