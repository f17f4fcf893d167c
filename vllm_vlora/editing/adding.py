"""Add tasks to a checkpoint, or remove some, without touching those that stay.

``add_adapters`` projects a new adapter on the shared bases where they carry it and stores it privately
where they do not (``projection``), and on request lets the bases grow (``growth``). Passes over the new
adapters: measure, where bases may grow measure again, encode the cores, write. Memory is one adapter,
one module's basis and planning numbers; the checkpoint is the old one or the new one at every moment.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from vllm_vlora.adapters.collection import Collection, Module, Progress
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.manifest import BasisSpec, ModuleSpec, Segment, basis_nbytes
from vllm_vlora.checkpoint.reader import Basis, Checkpoint, StoredModule
from vllm_vlora.checkpoint.successor import Successor, edited
from vllm_vlora.compression.encoding import Loss, encode_kept, measure_loss, relative
from vllm_vlora.compression.options import DEFAULT_RATIO, CompressOptions
from vllm_vlora.editing.growth_offers import (
    Offer,
    ResidualFit,
    decide_growth,
    grown,
    growth_limits,
    make_offer,
    options_hull,
)
from vllm_vlora.editing.projection import (
    BlockMeter,
    CoreOption,
    ModuleChoices,
    Rows,
    Target,
    TaskPlan,
    TaskPlanner,
    choices_of,
    used_blocks,
)
from vllm_vlora.errors import AdapterError, BudgetError, OptionError, TaskIdError
from vllm_vlora.fitting.whitening import Metric
from vllm_vlora.planning.number_formats import formats_to_try
from vllm_vlora.planning.private_curves import rows_nbytes
from vllm_vlora.planning.scratch import CoreSpool, FittedBases
from vllm_vlora.planning.survey import SurveyJob, Surveyor, SurveySettings, check_calibration
from vllm_vlora.representations.decode import basis_rows
from vllm_vlora.wording import some_of

# Losses are compared up to float64 rounding; the margin keeps a promise exact.
_MARGIN = 1e-6
# A new task is poor when it loses this many times what the poorest one of the checkpoint loses: one that
# the bases were not fitted to always loses somewhat more.
_POOR = 1.5
# Tasks for which growing did not pay are taken out and the rest is fitted again, this often.
_GROWTH_ROUNDS = 6
# Growth is decided for these parts of the bytes, and the best one is kept: a price does not know what
# files' headers cost, nor what is left over where one task's budget ends.
_ROOMS = (1.0, 0.7, 0.5)
_LIMITS = (1.0, 2.0, 0.5)


@dataclass(frozen=True)
class AddOptions:
    """What new tasks may take. At most one of ``ratio``, ``max_bytes``, ``max_error``.

    Attributes:
        ratio: a new adapter's LoRA weights at 16 bits each over the bytes of its file (and of its
            share of the rows by which bases grow) is to be at least this; one or less sets no limit.
            Default: the checkpoint's ratio, bases counted, so that adding keeps it; a task that would
            lose more than 1.5 times what any of the checkpoint's does gets more bytes, until it does
            not or has a ratio of 3.5.
        max_bytes: all new tasks together, divided by the sizes of their originals.
        max_error: as of ``CompressOptions``, of the new tasks.
        quantize, double_quantize, dtype, calibration: as of ``CompressOptions``.

    Raises:
        OptionError: unknown, out of range or contradictory values.

    Examples:
        >>> AddOptions(ratio=4).max_error is None
        True
        >>> AddOptions(ratio=4, max_error=0.1)
        Traceback (most recent call last):
        vllm_vlora.errors.OptionError: ratio and max_error contradict each other; give only one of them
    """

    ratio: float | None = None
    max_bytes: int | None = None
    max_error: float | None = None
    quantize: str = "auto"
    double_quantize: bool = True
    dtype: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        CompressOptions(
            ratio=self.ratio,
            max_bytes=self.max_bytes,
            max_error=self.max_error,
            quantize=self.quantize,
            double_quantize=self.double_quantize,
            dtype=self.dtype,
            calibration=self.calibration,
        )


@dataclass
class AddedTask:
    """What became of one new task.

    Attributes:
        kind: ``projected`` on the bases, ``private``, or ``mixed``, some modules either way.
        nbytes: its file without extra tensors. grown_nbytes: its share of the rows added for it.
        error: measured ||delta_W' - delta_W||_F / ||delta_W||_F over all modules.
        seen_error: as the calibrated model sees it; without calibration it is ``error``.
        carried: the share of ||delta_W||^2 that the bases hold, where it has modules with one.
        private_error, private_nbytes: of the best private storage within the same limit (as seen),
            None where none meets it.
        why: one line that says why it is stored so.
    """

    task_id: str
    source: str
    kind: str
    ranks: tuple[int, int]
    original_nbytes: int
    nbytes: int
    grown_nbytes: int
    error: float
    seen_error: float
    carried: float
    private_error: float | None
    private_nbytes: int | None
    why: str


@dataclass
class AddReport:
    """What adding did: sizes of the whole checkpoint before and after, and each new task.

    ``grown`` counts the modules whose basis has grown, ``grown_nbytes`` the bytes of their new rows.
    ``budget`` says what the new tasks were allowed, in words.

    Examples:
        >>> new = {"new": open_adapter(adapter_dirs[0])}
        >>> report = add_adapters(checkpoint, new, AddOptions(max_error=0.1))
        >>> report.nbytes > report.nbytes_before, report.tasks[0].error <= 0.1
        (True, True)
    """

    path: Path
    tasks: list[AddedTask]
    nbytes_before: int
    nbytes: int
    original_nbytes: int
    budget: str
    grown: int = 0
    grown_nbytes: int = 0
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Of the checkpoint as it is now."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.inf


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
        BudgetError: a task cannot meet the budget.
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
    collection = Collection(adapters)
    with edited(checkpoint, output, force=force) as (opened, folder):
        if not replace_tasks:
            check_new(opened, collection.task_ids)
        scratch = folder / ".scratch"
        scratch.mkdir()
        report = Addition(opened, collection, options, scratch, progress).write(folder, expand)
        shutil.rmtree(scratch)
    report.path = Path(checkpoint if output is None else output)
    report.seconds = time.monotonic() - started
    return report


def remove_tasks(
    checkpoint: str | Path,
    task_ids: Sequence[str],
    *,
    output: str | Path | None = None,
    force: bool = False,
) -> int:
    """Remove tasks from a checkpoint, in place or as the folder ``output``; bases stay as they are.

    Returns:
        The bytes that were freed, of its safetensors files.

    Raises:
        TaskNotFoundError: no such task. OptionError: no task would be left.
        CheckpointError, OutputError: as :func:`add_adapters`.

    Examples:
        >>> freed = remove_tasks(checkpoint, ["task_1", "task_3"])
        >>> freed > 0, list(Checkpoint.open(checkpoint).tasks)
        (True, ['task_0', 'task_2'])
    """
    with edited(checkpoint, output, force=force) as (opened, folder):
        freed = sum(opened.record(task_id).nbytes for task_id in dict.fromkeys(task_ids))
        kept = [task_id for task_id in opened.tasks if task_id not in set(task_ids)]
        if not kept:
            raise OptionError(
                f"{checkpoint}: no task would be left; delete the folder instead of its last task"
            )
        writer = Successor(folder, opened)
        writer.keep_bases()
        for task_id in kept:
            writer.copy_task(opened, task_id)
        writer.finish_edited()
    return freed


def check_new(checkpoint: Checkpoint, task_ids: Sequence[str]) -> None:
    """Raise TaskIdError if the checkpoint has one of these tasks already."""
    known = [task_id for task_id in task_ids if task_id in checkpoint.tasks]
    if known:
        named = some_of(map(repr, known))
        raise TaskIdError(
            f"{checkpoint.path} has {named} already; replace with --replace (replace_tasks=True in "
            "Python), or give another id with --name NEW_ID=PATH"
        )


@dataclass
class _Growth:
    """The rows by which bases grow, and for whom.

    Attributes:
        bases: keeps the rows, as group 0. rows: module name -> (rows of U, rows of V).
        plans: of the tasks that they were fitted to. charges: what each pays for them, in bytes.
    """

    bases: FittedBases
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    plans: dict[int, TaskPlan] = field(default_factory=dict)
    charges: dict[int, float] = field(default_factory=dict)


class Addition:
    """Some adapters and the checkpoint that they are added to.

    Args:
        scratch: an existing folder for what waits between the passes; the caller removes it.

    Raises:
        AdapterError: a module has another shape in the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        collection: Collection,
        options: AddOptions,
        scratch: Path,
        progress: Progress | None = None,
    ) -> None:
        self.checkpoint, self.collection = checkpoint, collection
        self._options = options
        self._scratch = scratch
        self._progress = progress or (lambda *_: None)
        self._formats = formats_to_try(
            collection, options.quantize, options.dtype, options.double_quantize
        )
        settings = SurveySettings(self._formats, calibration=options.calibration)
        self._surveyor = Surveyor(collection, settings)
        self._specs = {spec.name: spec for spec in checkpoint.modules}
        self._new = [m for name, m in collection.modules.items() if name not in self._specs]
        for module in self._new:
            self._specs[module.name] = ModuleSpec(
                module.name, module.d_in, module.d_out, module.kind
            )
        self._places = {name: place for place, name in enumerate(self._specs)}
        self._check_shapes()
        check_calibration(options.calibration, collection)
        self._blocks = self._find_blocks()
        self._growth: _Growth | None = None

    def _check_shapes(self) -> None:
        for name, module in self.collection.modules.items():
            spec = self._specs[name]
            if (module.d_in, module.d_out, module.kind) != (spec.d_in, spec.d_out, spec.kind):
                task_id = self.collection.task_ids[module.tasks[0]]
                raise AdapterError(
                    f"module {name} is a {module.d_out} x {module.d_in} {module.kind} in task "
                    f"{task_id!r} and a {spec.d_out} x {spec.d_in} {spec.kind} in the checkpoint; "
                    "add adapters of its base model only"
                )

    def _find_blocks(self) -> dict[str, list[Rows]]:
        segments: dict[int, list[Segment]] = {}
        for record in self.checkpoint.tasks.values():
            for segment in record.segments:
                segments.setdefault(segment.module, []).append(segment)
        return {
            name: used_blocks(self._specs[name], segments.get(self._places[name], []))
            for name in self.collection.modules
        }

    # --- reading ---------------------------------------------------------------------------------

    def _walk(self, names: Sequence[str]) -> Iterator[tuple[Module, Basis | None]]:
        """These modules with their bases as the checkpoint has them; one shard is held at a time."""
        wanted = dict.fromkeys(names)
        if any(self._specs[name].basis is not None for name in wanted):
            for name, basis in self.checkpoint.bases():
                if name in wanted:
                    del wanted[name]
                    yield self.collection.modules[name], basis
        for name in wanted:
            yield self.collection.modules[name], None

    def _cores(self, spec: ModuleSpec) -> list[str]:
        return [] if spec.basis is None else self._formats.cores(spec.basis.format)

    # --- measuring and planning ------------------------------------------------------------------

    def measure(self) -> dict[tuple[int, str], ModuleChoices]:
        """The chain of every module of every new task, on the bases as they are."""
        found: dict[tuple[int, str], ModuleChoices] = {}
        names = list(self.collection.modules)
        self._progress("measure", 0, len(names))
        for done, (module, basis) in enumerate(self._walk(names), 1):
            survey = self._surveyor(SurveyJob(module.name, True, ()))
            metric = self._surveyor.metric(module.name)
            blocks = []
            if basis is not None:
                blocks = [BlockMeter(basis, rows, metric) for rows in self._blocks[module.name]]
            formats = self._cores(self._specs[module.name])
            for task, factors in zip(module.tasks, self.collection.read_module(module)):
                with self.collection.naming(task, module.name):
                    found[task, module.name] = choices_of(
                        self._places[module.name],
                        factors,
                        survey.private[task],
                        survey.norms[task],
                        blocks,
                        formats,
                    )
            self._progress("measure", done, len(names))
        return found

    def planner(self, choices: Mapping[tuple[int, str], ModuleChoices], task: int) -> TaskPlanner:
        """The planner of one new task."""
        adapter = self.collection.adapters[task]
        chains = [choices[task, name] for name in adapter.modules]
        return TaskPlanner(list(self._specs.values()), chains, adapter.extra)

    def targets(self, planners: Sequence[TaskPlanner]) -> tuple[list[Target], str]:
        """What each new task may take or lose, and that in words."""
        options, sizes = self._options, [a.original_nbytes for a in self.collection.adapters]
        if options.max_error is not None:
            limit = (options.max_error * (1 - _MARGIN)) ** 2
            return [Target(loss=limit)] * len(sizes), f"a relative error of {options.max_error:g}"
        if options.max_bytes is not None:
            total = sum(sizes)
            shares = [options.max_bytes * size // total for size in sizes]
            return [Target(share) for share in shares], f"{options.max_bytes} bytes together"
        ratio = self.checkpoint.ratio if options.ratio is None else options.ratio
        if ratio <= 1:
            return [Target()] * len(sizes), "no limit of bytes"
        if options.ratio is not None:
            return [Target(math.floor(size / ratio)) for size in sizes], f"{ratio:g}x"
        found = [self._default(planner, size) for planner, size in zip(planners, sizes)]
        words = f"{ratio:.2f}x, the checkpoint's ratio, bases counted"
        if ratio > DEFAULT_RATIO:
            words += (
                f"; up to {DEFAULT_RATIO}x for tasks that would lose far more than those it has"
            )
        return found, words

    def _default(self, planner: TaskPlanner, size: int) -> Target:
        """The checkpoint's ratio; more bytes, up to the default ratio, for a task that is too poor.

        Whoever compressed relatives to a small part of their size wants no stranger at that ratio.
        """
        target = Target(math.floor(size / self.checkpoint.ratio))
        most = Target(math.floor(size / DEFAULT_RATIO))
        assert target.nbytes is not None
        assert most.nbytes is not None
        plan = planner.best(target)
        limit = (self._worst_error * _POOR) ** 2
        if (plan is not None and plan.loss <= limit) or most.nbytes <= target.nbytes:
            return target
        enough = planner.best(Target(loss=limit))
        return most if enough is None or enough.nbytes > most.nbytes else Target(enough.nbytes)

    @property
    def _worst_error(self) -> float:
        """Of the tasks that the checkpoint has."""
        return max((record.error for record in self.checkpoint.tasks.values()), default=math.inf)

    def _plan(self, planner: TaskPlanner, target: Target, task: int) -> TaskPlan:
        plan = planner.best(target)
        if plan is not None:
            return plan
        task_id = self.collection.task_ids[task]
        if target.loss is not None:
            least = planner.best(Target())
            assert least is not None
            raise BudgetError(
                f"task {task_id!r} cannot be kept within a relative error of "
                f"{self._options.max_error}; the least reachable is {least.error:.3g}; allow a "
                "larger error, or quantize none or auto"
            )
        nbytes = planner.least_nbytes()
        original = self.collection.adapters[task].original_nbytes
        raise BudgetError(
            f"task {task_id!r} does not fit into {target.nbytes} bytes; the least is {nbytes}: give "
            f"a ratio of at most {math.floor(original / nbytes * 100) / 100:g}, or allow more bytes"
        )

    # --- growing ---------------------------------------------------------------------------------

    def grow(
        self,
        choices: Mapping[tuple[int, str], ModuleChoices],
        targets: Sequence[Target],
    ) -> _Growth | None:
        """Let bases grow for the tasks that keep more by it; None where there are none.

        The new rows are paid for out of these tasks' targets. A task that would keep less than its
        whole target keeps without new rows is left out, and the rest is tried again.
        """
        takers = [task for task, target in enumerate(targets) if target != Target()]
        for attempt in range(_GROWTH_ROUNDS):
            if not takers:
                break
            self._progress("grow", attempt, _GROWTH_ROUNDS)
            growth = _Growth(FittedBases(self._scratch / f"growth{attempt}"))
            offers = self._offers(choices, takers, targets, growth)
            best, gains = growth, dict[int, float]()
            for rows in self._decide(choices, offers, takers, targets):
                tried = _Growth(growth.bases, rows)
                fresh = {**choices, **self._measure_grown(choices, takers, tried)}
                self._plan_grown(fresh, takers, targets, tried)
                found = {t: self._gain(choices, t, targets[t], tried) for t in takers}
                found = {task: gain for task, gain in found.items() if gain > 0}
                if sum(found.values()) > sum(gains.values()):
                    best, gains = tried, found
            if len(gains) == len(takers):
                return best
            takers = list(gains)
        return None

    def _plan_grown(
        self,
        choices: Mapping[tuple[int, str], ModuleChoices],
        takers: Sequence[int],
        targets: Sequence[Target],
        growth: _Growth,
    ) -> None:
        """Plan the tasks on grown bases, and give back the rows that none of them uses."""
        budget = sum(targets[task].nbytes or 0 for task in takers)
        cost = self._grown_nbytes(growth)
        for task in takers:
            target = targets[task]
            if target.nbytes is not None:
                target = Target(target.nbytes - math.ceil(cost * target.nbytes / budget))
            plan = self.planner(choices, task).best(target)
            if plan is not None:
                growth.plans[task] = plan
        users = self._trim(growth)
        for name, tasks in users.items():
            for task in tasks:
                share = self._rows_nbytes(name, growth.rows[name]) / len(tasks)
                growth.charges[task] = growth.charges.get(task, 0.0) + share

    def _trim(self, growth: _Growth) -> dict[str, list[int]]:
        """Keep the rows that are used; returns who uses new rows of each module."""
        used: dict[str, tuple[int, int]] = {}
        users: dict[str, list[int]] = {}
        for task, plan in growth.plans.items():
            for name, option in zip(self.collection.adapters[task].modules, plan.options):
                spec = self._specs[name].basis
                if not isinstance(option, CoreOption) or spec is None:
                    continue
                more = option.rows[1] - spec.k_out, option.rows[3] - spec.k_in
                if max(more) > 0:
                    most = used.get(name, (0, 0))
                    used[name] = max(most[0], more[0]), max(most[1], more[1])
                    users.setdefault(name, []).append(task)
        growth.rows = used
        return users

    def _grown_nbytes(self, growth: _Growth) -> int:
        """What the basis files grow by, headers included."""
        return basis_nbytes(self._modules(growth)) - basis_nbytes(self._modules(None))

    def _modules(self, growth: _Growth | None) -> list[ModuleSpec]:
        """The modules as they are to be written."""
        specs = []
        for spec in self._specs.values():
            more = (0, 0) if growth is None else growth.rows.get(spec.name, (0, 0))
            basis = spec.basis
            if basis is not None:
                basis = BasisSpec(basis.k_out + more[0], basis.k_in + more[1], basis.format)
            specs.append(ModuleSpec(spec.name, spec.d_in, spec.d_out, spec.kind, basis, spec.flat))
        return specs

    def _rows_nbytes(self, name: str, rows: tuple[int, int]) -> int:
        spec = self._specs[name]
        assert spec.basis is not None
        return rows_nbytes(BasisSpec(*rows, spec.basis.format), spec.d_out, spec.d_in)

    def _gain(
        self,
        choices: Mapping[tuple[int, str], ModuleChoices],
        task: int,
        target: Target,
        growth: _Growth,
    ) -> float:
        """What a task loses less (or, within an error, takes less) than without new rows.

        Zero if it has no use for them or does better without.
        """
        plan, charge = growth.plans.get(task), math.ceil(growth.charges.get(task, 0.0))
        if plan is None or not charge:
            return 0.0
        if target.nbytes is not None:
            target = Target(max(target.nbytes, plan.nbytes + charge))
        without = self.planner(choices, task).best(target)
        if without is None:
            return math.inf
        if target.nbytes is None:
            return float(without.nbytes - plan.nbytes - charge)
        return without.loss - plan.loss

    def _offers(
        self,
        choices: Mapping[tuple[int, str], ModuleChoices],
        takers: Sequence[int],
        targets: Sequence[Target],
        growth: _Growth,
    ) -> list[Offer]:
        names = [name for name, blocks in self._blocks.items() if self._last_block(name, blocks)]
        offers = []
        for module, basis in self._walk(names):
            assert basis is not None
            tasks = tuple(task for task in module.tasks if task in set(takers))
            if tasks:
                offer = self._offer(module, basis, tasks, choices, takers, targets, growth)
                offers += [] if offer is None else [offer]
        return offers

    def _last_block(self, name: str, blocks: Sequence[Rows]) -> Rows | None:
        """The block at the end of a module's basis, behind which it can grow."""
        basis = self._specs[name].basis
        if basis is None:
            return None
        return next((r for r in blocks if (r[1], r[3]) == (basis.k_out, basis.k_in)), None)

    def _offer(
        self,
        module: Module,
        basis: Basis,
        tasks: tuple[int, ...],
        choices: Mapping[tuple[int, str], ModuleChoices],
        takers: Sequence[int],
        targets: Sequence[Target],
        growth: _Growth,
    ) -> Offer | None:
        name, spec = module.name, self._specs[module.name].basis
        rows = self._last_block(name, self._blocks[name])
        assert spec is not None
        assert rows is not None
        most = growth_limits(module, spec, tasks, self._share(module, tasks, takers, targets))
        if max(most) < 1:
            return None
        metric = self._surveyor.metric(name)
        fit = ResidualFit(basis, rows, metric, *most)
        factors = self.collection.read_module
        for task, (a, b, scale) in zip(tasks, factors(module, tasks)):
            fit.add(a, b, scale, choices[task, name].norm)
        u, v = fit.directions()
        growth.bases.save(module, 0, u, v)
        more = BasisSpec(len(u), len(v), spec.format)
        block = self._grown_block(module, basis, more, growth, metric)
        projections = [block.project(*f) for f in factors(module, tasks)]
        weights = [self._weight(choices, task) for task in tasks]
        mine = [choices[task, name] for task in tasks]
        return make_offer(
            module, spec, block, projections, mine, tasks, weights, self._cores(self._specs[name])
        )

    def _share(
        self,
        module: Module,
        tasks: Sequence[int],
        takers: Sequence[int],
        targets: Sequence[Target],
    ) -> float:
        """This module's even share of the bytes of the tasks that may grow it."""
        adapters = self.collection.adapters
        share = 0.0
        for task in tasks:
            size, nbytes = adapters[task].original_nbytes, targets[task].nbytes
            allowed = size if nbytes is None else nbytes
            share += allowed * 2 * adapters[task].modules[module.name].numel / size
        return share

    def _weight(self, choices: Mapping[tuple[int, str], ModuleChoices], task: int) -> float:
        names = self.collection.adapters[task].modules
        norm = math.fsum(choices[task, name].norm for name in names)
        return 1 / norm if norm > 0 else 0.0

    def _grown_block(
        self, module: Module, basis: Basis, more: BasisSpec, growth: _Growth, metric: Metric
    ) -> BlockMeter:
        """The last block with the first rows of those fitted behind it."""
        rows = self._last_block(module.name, self._blocks[module.name])
        assert rows is not None
        added = growth.bases.read(module, 0, more)
        larger = (rows[0], rows[1] + more.k_out, rows[2], rows[3] + more.k_in)
        return BlockMeter(grown(basis, added.u, added.v), larger, metric)

    def _decide(
        self,
        choices: Mapping[tuple[int, str], ModuleChoices],
        offers: Sequence[Offer],
        takers: Sequence[int],
        targets: Sequence[Target],
    ) -> list[dict[str, tuple[int, int]]]:
        """Growths to try: module name -> (rows of U, rows of V)."""
        offered = {(task, offer.module) for offer in offers for task in offer.tasks}
        fixed = [
            (task, options_hull(choices[task, name], self._weight(choices, task)))
            for task in takers
            for name in self.collection.adapters[task].modules
            if (task, name) not in offered
        ]
        limit = targets[takers[0]].loss
        if limit is not None:
            found = [decide_growth(offers, fixed, None, part * limit) for part in _LIMITS]
        else:
            room = sum((targets[t].nbytes or 0) - self._header(choices, t) for t in takers)
            found = [decide_growth(offers, fixed, part * room, None) for part in _ROOMS]
        return [rows for place, rows in enumerate(found) if rows and rows not in found[:place]]

    def _header(self, choices: Mapping[tuple[int, str], ModuleChoices], task: int) -> int:
        """About what the header of a task's file takes: as with the smallest option everywhere."""
        return self.planner(choices, task).least_header()

    def _measure_grown(
        self,
        choices: Mapping[tuple[int, str], ModuleChoices],
        takers: Sequence[int],
        growth: _Growth,
    ) -> dict[tuple[int, str], ModuleChoices]:
        """The chains that are other ones on the grown bases."""
        fresh = {}
        for module, basis in self._walk(list(growth.rows)):
            spec = self._specs[module.name].basis
            assert basis is not None
            assert spec is not None
            metric = self._surveyor.metric(module.name)
            more = BasisSpec(*growth.rows[module.name], spec.format)
            block = self._grown_block(module, basis, more, growth, metric)
            tasks = [task for task in module.tasks if task in set(takers)]
            for task, factors in zip(tasks, self.collection.read_module(module, tasks)):
                old = choices[task, module.name]
                with self.collection.naming(task, module.name):
                    new = choices_of(
                        old.module,
                        factors,
                        old.private,
                        old.norm,
                        [block],
                        self._cores(self._specs[module.name]),
                    )
                # What the bases carried is said of them as they were.
                cores = [*old.cores, *new.cores]
                fresh[task, module.name] = replace(new, cores=cores, carried=old.carried)
        return fresh

    # --- writing ---------------------------------------------------------------------------------

    def write(self, folder: Path, expand: bool) -> AddReport:
        """Plan, encode and write everything into an existing folder; the manifest comes last.

        Raises:
            BudgetError: a task cannot meet its target.
        """
        choices = self.measure()
        planners = [self.planner(choices, task) for task in range(len(self.collection.task_ids))]
        targets, words = self.targets(planners)
        growth = self.grow(choices, targets) if expand else None
        plans = []
        for task, (planner, target) in enumerate(zip(planners, targets)):
            grown_plan = None if growth is None else growth.plans.get(task)
            plans.append(grown_plan or self._plan(planner, target, task))
        modules = self._modules(growth)
        spool = self._encode(plans, modules, growth)
        writer = self._write_bases(folder, growth)
        added = {}
        for task, task_id in enumerate(self.collection.task_ids):
            charge = 0 if growth is None else round(growth.charges.get(task, 0.0))
            private = planners[task].best_private(targets[task])
            written = self._write_task(writer, plans[task], spool, task)
            added[task_id] = self._added(
                task, planners[task], plans[task], private, charge, written, targets[task]
            )
            self._progress("write", task + 1, len(targets))
        for task_id in self.checkpoint.tasks:
            if task_id not in added:
                writer.copy_task(self.checkpoint, task_id)
        _order(writer, [*self.checkpoint.tasks, *added])
        report = writer.finish_edited()
        return AddReport(
            folder,
            list(added.values()),
            self.checkpoint.nbytes,
            report.nbytes,
            report.original_nbytes,
            words,
            0 if growth is None else len(growth.rows),
            0 if growth is None else self._grown_nbytes(growth),
            self._warnings(list(added.values()), expand, growth),
        )

    def _encode(
        self, plans: Sequence[TaskPlan], modules: Sequence[ModuleSpec], growth: _Growth | None
    ) -> _Encoded:
        """The cores that were planned, with their errors."""
        wanted: dict[str, list[tuple[int, CoreOption]]] = {}
        for task, plan in enumerate(plans):
            for name, option in zip(self.collection.adapters[task].modules, plan.options):
                if isinstance(option, CoreOption):
                    wanted.setdefault(name, []).append((task, option))
        encoded = _Encoded(CoreSpool(self._scratch / "cores"))
        final = {spec.name: spec.basis for spec in modules}
        for done, (module, basis) in enumerate(self._walk(list(wanted)), 1):
            assert basis is not None
            metric = self._surveyor.metric(module.name)
            basis = self._grown_basis(module, basis, growth)
            blocks: dict[Rows, BlockMeter] = {}
            tasks = [task for task, _ in wanted[module.name]]
            for (task, option), (a, b, scale) in zip(
                wanted[module.name], self.collection.read_module(module, tasks)
            ):
                rows = self._block_of(module.name, option.rows, final[module.name])
                if rows not in blocks:
                    blocks[rows] = BlockMeter(basis, rows, metric)
                block, (u_start, u_stop, v_start, v_stop) = blocks[rows], option.rows
                with self.collection.naming(task, module.name):
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

    def _grown_basis(self, module: Module, basis: Basis, growth: _Growth | None) -> Basis:
        if growth is None or module.name not in growth.rows:
            return basis
        more = BasisSpec(*growth.rows[module.name], basis.u.format)
        added = growth.bases.read(module, 0, more)
        return grown(basis, added.u, added.v)

    def _block_of(self, name: str, rows: Rows, basis: BasisSpec | None) -> Rows:
        """The block that a core stands on; its leading rows are the core's."""
        assert basis is not None
        for block in self._blocks[name]:
            starts_alike = (block[0], block[2]) == (rows[0], rows[2])
            if starts_alike and rows[1] <= block[1] and rows[3] <= block[3]:
                return block
        return rows[0], basis.k_out, rows[2], basis.k_in

    def _write_bases(self, folder: Path, growth: _Growth | None) -> Successor:
        writer = Successor(folder, self.checkpoint)
        if growth is None:
            writer.keep_bases()
        else:
            modules = self.collection.modules
            writer.write_bases(
                lambda name, basis: (
                    self._grown_basis(modules[name], basis, growth) if name in modules else basis
                )
            )
        for module in self._new:
            writer.add_module(module.name, module.d_in, module.d_out, module.kind)
        return writer

    def _write_task(
        self, writer: Successor, plan: TaskPlan, encoded: _Encoded, task: int
    ) -> _Written:
        adapter = self.collection.adapters[task]
        cores = encoded.cores.read(task)
        modules, losses = dict[str, StoredModule](), []
        for (name, (a, b, scale)), option in zip(
            self.collection.read_task(task, list(adapter.modules)), plan.options
        ):
            if isinstance(option, CoreOption):
                modules[name] = cores[name]
                losses.append(encoded.losses[task, name])
                continue
            with self.collection.naming(task, name):
                modules[name], loss = encode_kept(a, b, scale, option, self._surveyor.metric(name))
            losses.append(loss)
        error = relative(sum(x.lost for x in losses), sum(x.norm for x in losses))
        seen = relative(sum(x.seen_lost for x in losses), sum(x.seen_norm for x in losses))
        record = writer.add_task(
            self.collection.task_ids[task],
            modules,
            original_nbytes=adapter.original_nbytes,
            error=error,
            adapter_config=adapter.config,
            source=adapter.name,
            extra=adapter.extra_tensors(),
        )
        ranks = [segment.rank for segment in record.segments]
        return _Written(record.lora_nbytes, (min(ranks), max(ranks)), error, seen)

    # --- saying what was done --------------------------------------------------------------------

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
        adapter = self.collection.adapters[task]
        return AddedTask(
            self.collection.task_ids[task],
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
            _why(planner, plan, private, charge, target),
        )

    def _warnings(
        self, added: Sequence[AddedTask], expand: bool, growth: _Growth | None
    ) -> list[str]:
        found = []
        for task_id, adapter in zip(self.collection.task_ids, self.collection.adapters):
            base = self.checkpoint.base_model
            if None not in (adapter.base_model, base) and adapter.base_model != base:
                found.append(
                    f"task {task_id!r} names the base model {adapter.base_model}, the checkpoint "
                    f"{base}; if they are not copies of one model, the task will not work"
                )
        if expand and growth is None:
            found.append("no basis has grown: new rows cost more than they keep")
        worst = self._worst_error
        poor = [task.task_id for task in added if task.error > worst * _POOR * (1 + _MARGIN)]
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


def _order(writer: Successor, task_ids: Sequence[str]) -> None:
    """List the tasks in this order; a replaced task keeps its place."""
    writer.tasks = {task_id: writer.tasks[task_id] for task_id in dict.fromkeys(task_ids)}


def _why(
    planner: TaskPlanner, plan: TaskPlan, private: TaskPlan | None, charge: int, target: Target
) -> str:
    if not any(choice.cores for choice in planner.choices):
        return "none of its modules has a shared basis"
    held = f"the shared bases hold {planner.carried:.1%} of it"
    if plan.kind == "private":
        least = math.sqrt(max(1 - planner.carried, 0.0))
        return f"{held}; on them it would lose {least:.3f} at least, so private factors keep more"
    rows = f", and {charge} bytes of new rows more" if charge else ""
    if private is None:
        return f"{held}{rows}; all private it would not fit"
    if target.loss is not None:
        return f"{held}{rows}; all private it would take {private.nbytes} bytes, not {plan.nbytes}"
    return f"{held}{rows}; all private it would lose {private.error:.3f}, not {plan.error:.3f}"
