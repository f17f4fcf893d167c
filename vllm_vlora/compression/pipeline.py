"""Compress a collection of adapters into a checkpoint.

Passes over the adapters: measure (and fit bases), where only some tasks share a basis fit again,
encode the cores, write the tasks. Every pass reads an adapter's weights a fixed number of times and
holds one module of one adapter at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vllm_vlora.adapters.collection import Collection, Module, Progress, common_base_model
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.card import model_card
from vllm_vlora.checkpoint.layout import basis_nbytes
from vllm_vlora.checkpoint.report import (
    Candidate,
    CompressReport,
    CurvePoint,
    TaskReport,
    report_task,
)
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.compression.encoding import EncodedTask, Encoder, stored_basis, stored_flat
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.publishing import publish_checkpoint
from vllm_vlora.errors import BudgetError, OptionError
from vllm_vlora.fitting.clusters import cluster_tasks
from vllm_vlora.planning.executors import Executor
from vllm_vlora.planning.number_formats import Formats, formats_to_try
from vllm_vlora.planning.plan import Budget, Plan
from vllm_vlora.planning.problem import (
    Problem,
    flat_problem,
    joint_problems,
    make_plans,
    mixed_problem,
    private_problems,
)
from vllm_vlora.planning.scratch import CoreSpool, FittedBases
from vllm_vlora.planning.sharing import SHARED_LOSS, Sharing, decide_sharing
from vllm_vlora.planning.survey import (
    FittedGroup,
    Group,
    Survey,
    SurveyJob,
    SurveySettings,
    check_calibration,
    directions,
    survey_modules,
)

# Planned errors equal measured ones up to float64 rounding; the margin keeps a promise exact.
_MARGIN = 1e-6
# Starting processes takes some seconds; below this many bytes they do not pay.
_PARALLEL_NBYTES = 64 << 20
# Up to this many (task, module) pairs, every number format is also planned by itself for the report.
_ALONE_ENTRIES = 20_000
_FLAT_ADAPTERS = 128
# Under an error limit: the sizes, of the best plan so far, at which sharing is decided.
_SIZES = (0.9, 0.6, 0.35)
# Losses below this are the very numbers, which no basis gives.
_EXACT = 1e-5
_CURVE_RATIOS = (2, 3, 3.5, 4, 6, 8, 12, 16, 24, 32)


def compress(
    adapters: Mapping[str, Adapter],
    output: str | Path,
    options: CompressOptions | None = None,
    *,
    force: bool = False,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress adapters (task id -> opened adapter) into the checkpoint folder ``output``.

    Memory is one module's factors and bases, one task and planning numbers; the adapters are read
    a fixed number of times. The folder appears complete or not at all.

    Args:
        adapters: in the order in which the checkpoint is to list them.
        force: replace an existing checkpoint.
        base_model: overrides what the adapters' configs name.
        progress: called with (stage, done, total).

    Raises:
        AdapterError: no adapters, two that contradict each other, or weights that are not finite.
        BudgetError: no allowed plan meets the budget; says how near one can get.
        DataError: the calibration cannot be read.
        OutputError: ``output`` exists and is not to be replaced, or cannot be written.
        TaskIdError: a task id that is not allowed.

    Examples:
        >>> tasks = {f"task_{i}": open_adapter(path) for i, path in enumerate(adapter_dirs)}
        >>> report = compress(tasks, folder / "checkpoint", CompressOptions(max_error=0.1))
        >>> report.worst_error <= 0.1, validate(folder / "checkpoint")
        (True, [])
    """

    def make(folder: Path, scratch: Path) -> CompressReport:
        collection = Collection(adapters)
        compression = Compression(collection, options or CompressOptions(), scratch, progress)
        return compression.write(folder, compression.choose(), base_model)

    return publish_checkpoint(output, force, make)


def predict(
    adapters: Mapping[str, Adapter],
    options: CompressOptions | None = None,
    *,
    ratios: Sequence[float] = _CURVE_RATIOS,
    progress: Progress | None = None,
) -> list[CurvePoint]:
    """The error that every size would cost, for each ratio that can be had; writes nothing.

    Args:
        options: as of :func:`compress`; a budget in them is replaced by each of the ratios.

    Raises:
        As :func:`compress`.

    Examples:
        >>> tasks = {f"task_{i}": open_adapter(path) for i, path in enumerate(adapter_dirs)}
        >>> points = predict(tasks, ratios=[0.3, 0.6])
        >>> points[0].candidate.nbytes < sum(t.original_nbytes for t in tasks.values()) / 0.3
        True
    """
    options = replace(
        options or CompressOptions(), ratio=min(ratios), max_bytes=None, max_error=None
    )
    with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
        collection = Collection(adapters)
        compression = Compression(collection, options, Path(scratch), progress)
        points = []
        for ratio in ratios:
            nbytes = math.floor(collection.original_nbytes / ratio)
            plans = compression.plans(Budget(nbytes, compression.gate()))[0]
            if plans:
                best = min(plans, key=lambda plan: plan.likely_error)
                points.append(CurvePoint(ratio, _candidate(best)))
        return points


@dataclass(frozen=True)
class Chosen:
    """The plan to write and what it is written from; cores are those of shared bases."""

    plan: Plan
    candidates: list[Candidate]
    cores: CoreSpool | None


class Compression:
    """One collection, measured once; plans are chosen and written as often as wanted.

    Args:
        scratch: an existing folder for what waits between the passes; the caller removes it.
        bounded: whether the options' budget bounds the widths of bases; otherwise only the originals'
            size does, for budgets that come later.
    """

    def __init__(
        self,
        collection: Collection,
        options: CompressOptions,
        scratch: Path,
        progress: Progress | None = None,
        *,
        bounded: bool = True,
    ) -> None:
        self.collection = collection
        self._options = options
        self._scratch = scratch
        self._progress = progress or (lambda *_: None)
        self._formats: Formats = formats_to_try(
            collection, options.number_format, options.dtype, options.double_quantize
        )
        self._shareable = _modules_to_share(collection, options)
        _check_components(self._shareable, options)
        limit = self.budget().nbytes
        # Under an error limit a joint plan is only wanted if it is smaller than the originals.
        if options.max_error is not None or not bounded:
            limit = collection.original_nbytes
        self._settings = SurveySettings(
            self._formats, options.num_components, limit, options.seed, options.calibration
        )
        check_calibration(options.calibration, collection)
        self._bases = FittedBases(scratch / "fit")
        self._executor = _executor(collection, options)
        self._refits: dict[tuple[str, tuple[tuple[int, ...], ...]], dict[int, FittedGroup]] = {}
        self._numbers = itertools.count(1001)
        self._encodings = 0

    # --- measuring -------------------------------------------------------------------------------

    @cached_property
    def survey(self) -> Survey:
        """What every way of storing each module alone, or on one basis for all, would lose."""
        options, joint_only = self._options, self._options.shares in ("joint", "factored", "flat")
        flat = self._tries_flat()
        shared = {module.name for module in self._shareable}
        sketch, only_flat = self._may_cluster(), options.shares == "flat"
        jobs = [
            SurveyJob(
                module.name,
                private=not (joint_only and module.name in shared),
                groups=((0, module.tasks),) if module.name in shared and not only_flat else (),
                flat=flat and module.name in shared,
                sketch=sketch and module.name in shared,
            )
            for module in self.collection.modules.values()
        ]
        survey = self._run(Survey(self.collection), jobs, "measure")
        if joint_only and options.clusters != "auto" and int(options.clusters) > 1:
            survey = self._clustered(survey) or survey
        return survey

    def _tries_flat(self) -> bool:
        if self._options.shares == "flat":
            return True
        # A flat basis holds whole adapters: with many of them it is large, and slow to fit.
        ranks = {rank for module in self._shareable for rank in module.ranks}
        few = 2 < len(self.collection.adapters) <= _FLAT_ADAPTERS
        return self._options.shares == "auto" and len(ranks) == 1 and few

    def _may_cluster(self) -> bool:
        clusters = self._options.clusters
        if clusters == "auto":
            return self._options.shares == "auto" and len(self.collection.adapters) >= 6
        return int(clusters) > 1

    def _run(self, survey: Survey, jobs: Sequence[SurveyJob], stage: str) -> Survey:
        return survey_modules(
            survey, jobs, self._settings, self._bases, self._executor, self._progress, stage
        )

    def _clustered(self, survey: Survey) -> Survey | None:
        """The survey with a basis for each cluster in place of one for all; None without any."""
        if survey.affinity is None:
            return None
        clusters = cluster_tasks(survey.affinity, self._options.clusters)
        if len(clusters) < 2:
            return None
        jobs = []
        for module in self._shareable:
            groups = [
                (1 + number, tuple(task for task in cluster if task in set(module.tasks)))
                for number, cluster in enumerate(clusters)
            ]
            least = 1 if self._options.shares != "auto" else 2
            kept = tuple((number, tasks) for number, tasks in groups if len(tasks) >= least)
            jobs.append(SurveyJob(module.name, False, kept))
        return self._run(replace(survey, joint={}), jobs, "fit clusters")

    # --- planning --------------------------------------------------------------------------------

    def gate(self) -> torch.Tensor | None:
        """The largest loss of each task beside a number of bytes."""
        return None if self._options.gate is None else self._limits(self._options.gate)

    def budget(self) -> Budget:
        """What the options ask for."""
        options = self._options
        if options.max_error is not None:
            return Budget(limits=self._limits(options.max_error))
        if options.max_bytes is not None:
            return Budget(options.max_bytes, self.gate())
        if options.num_components is not None or options.wanted_ratio <= 1:
            return Budget(None, None)
        nbytes = math.floor(self.collection.original_nbytes / options.wanted_ratio)
        return Budget(nbytes, self.gate())

    def _limits(self, error: float) -> torch.Tensor:
        limit = (error * (1 - _MARGIN)) ** 2
        return torch.full((len(self.collection.adapters),), limit, dtype=torch.float64)

    def plans(self, budget: Budget) -> tuple[list[Plan], list[float]]:
        """Every plan that meets a budget; if there are none, how near each kind comes."""
        plans, misses = make_plans(self._private_problems(), budget)
        best = min(plans, key=budget.order, default=None)
        if best is not None and budget.is_perfect(best):
            return plans, misses
        problems = itertools.chain(self._joint_problems(), self._flat_problems())
        joint, joint_misses = make_plans(problems, budget)
        plans, misses = plans + joint, misses + joint_misses
        if self._options.shares == "auto" and self.survey.joint:
            plans += self._mixed_plans(budget, min(plans, key=budget.order, default=None))
        return plans, misses

    def _private_problems(self) -> Iterator[Problem]:
        if self._options.shares in ("joint", "factored", "flat"):
            return
        labels = self._formats.private_labels
        problems = list(private_problems(self.survey, labels))
        if len(self.survey.private) > _ALONE_ENTRIES:
            problems = problems[-1:]
        yield from problems

    def _joint_problems(self) -> Iterator[Problem]:
        if self.survey.joint:
            yield from self._problems_on_bases(self.survey)

    def _problems_on_bases(self, survey: Survey) -> Iterator[Problem]:
        """Every task on a basis, for each format of the bases and of the cores."""
        shares = "factored" if self._options.shares == "factored" else "joint"
        for label in self._formats.labels:
            found = next(iter(survey.joint.values()))
            cores = self._formats.cores(found.curves[label].bases[0].format)
            yield from joint_problems(survey, label, cores, shares)

    def _flat_problems(self) -> Iterator[Problem]:
        if self.survey.flat:
            for label in self._formats.labels:
                yield flat_problem(self.survey, label)

    def _mixed_plans(self, budget: Budget, best: Plan | None) -> list[Plan]:
        """Plans in which some tasks share a basis, with one for all, and with one a cluster."""
        headers = 0 if best is None else best.nbytes - best.data_nbytes
        sizes: list[int] = []
        if budget.nbytes is not None:
            sizes = [budget.nbytes - headers]
        elif best is not None:
            sizes = [round(best.data_nbytes * part) for part in _SIZES]
        plans = []
        surveys = [self.survey]
        if self._clusters is not None:
            surveys.append(self._clusters)
            plans += make_plans(self._problems_on_bases(self._clusters), budget)[0]
        for survey in surveys:
            for size in sizes:
                plan = self._mixed_plan(survey, size, budget)
                if plan is not None:
                    plans.append(plan)
        return plans

    @cached_property
    def _clusters(self) -> Survey | None:
        return self._clustered(self.survey)

    def _mixed_plan(self, survey: Survey, nbytes: int, budget: Budget) -> Plan | None:
        # Whoever may lose nothing stays private, and must not keep the others from sharing.
        alone = () if budget.limits is None else torch.nonzero(budget.limits < _EXACT).flatten()
        private = frozenset(int(task) for task in alone)
        # Under error limits the error itself is what counts.
        counted = 1.0 if budget.by_size else SHARED_LOSS
        sharing = decide_sharing(survey, self._formats, nbytes, private, counted)
        if not sharing.sharers:
            return None
        survey = self._refitted(survey, sharing)
        sharing = decide_sharing(survey, self._formats, nbytes, private, counted)
        return mixed_problem(survey, sharing).solve(budget) if sharing.sharers else None

    def _refitted(self, survey: Survey, sharing: Sharing) -> Survey:
        """Bases that only some of their tasks turned out to share, fitted again to these.

        Each is fitted once: later plans often end with the same sharers.
        """
        groups: dict[Group, FittedGroup] = {}
        wanted: dict[str, list[tuple[int, ...]]] = {}
        for group, found in survey.joint.items():
            if group not in sharing.sharers:
                continue
            tasks = sharing.sharers[group][2]
            if len(tasks) == len(found.tasks):
                groups[group] = found
            else:
                wanted.setdefault(group[0], []).append(tasks)
        # How wide a basis may be depends on those beside it, so they are fitted together.
        keys = [(name, tuple(sharers)) for name, sharers in wanted.items()]
        self._fit_again([key for key in keys if key not in self._refits])
        for key in keys:
            groups.update(((key[0], number), fit) for number, fit in self._refits[key].items())
        return replace(survey, joint=groups)

    def _fit_again(self, keys: Sequence[tuple[str, tuple[tuple[int, ...], ...]]]) -> None:
        jobs = [
            SurveyJob(name, False, tuple((next(self._numbers), tasks) for tasks in sharers))
            for name, sharers in keys
        ]
        if jobs:
            found = self._run(Survey(self.collection), jobs, "fit again").joint
            for key, job in zip(keys, jobs):
                self._refits[key] = {n: found[job.module, n] for n, _ in job.groups}

    # --- choosing --------------------------------------------------------------------------------

    def choose(self, budget: Budget | None = None) -> Chosen:
        """The best plan within a budget, by default the options', with its cores encoded.

        Raises:
            BudgetError: nothing meets the budget.
        """
        budget = budget or self.budget()
        plans, misses = self.plans(budget)
        order = sorted(range(len(plans)), key=lambda i: budget.order(plans[i]))
        best, cores = None, None
        for place in order:
            plan = plans[place]
            if best is not None and budget.clearly_prefers(best, plan):
                break
            encoded = self._measured(plan, budget, misses)
            if encoded is None:
                continue
            measured, spool = encoded
            plans[place] = measured
            if best is None or budget.order(measured) < budget.order(best):
                best, cores = measured, spool
        if best is None:
            raise BudgetError(self._out_of_reach(budget, min(misses, default=math.inf)))
        kept = sorted(plans, key=budget.order)
        return Chosen(best, [_candidate(plan) for plan in _distinct(kept, best)], cores)

    def best_of_each(self) -> list[Chosen]:
        """The best plan of every representation within the options' budget, with cores encoded.

        Raises:
            BudgetError: nothing meets the budget.
        """
        budget = self.budget()
        plans, misses = self.plans(budget)
        found: dict[str, tuple[Plan, CoreSpool | None]] = {}
        for plan in sorted(plans, key=budget.order):
            if plan.representation in found:
                continue
            encoded = self._measured(plan, budget, misses)
            if encoded is not None:
                found[plan.representation] = encoded
        if not found:
            raise BudgetError(self._out_of_reach(budget, min(misses, default=math.inf)))
        return [Chosen(plan, [_candidate(plan)], cores) for plan, cores in found.values()]

    def _measured(
        self, plan: Plan, budget: Budget, misses: list[float]
    ) -> tuple[Plan, CoreSpool | None] | None:
        """The plan with measured losses, and its cores; None, and a miss more, if it breaks a promise."""
        if not plan.joint and not plan.flat:
            return plan, None
        measured, cores = self._encode(plan, budget)
        if cores is None:
            misses.append(measured.worst_error)
            return None
        return measured, cores

    def _encode(self, plan: Plan, budget: Budget) -> tuple[Plan, CoreSpool | None]:
        folder = self._scratch / f"encoding{self._encodings}"
        folder.mkdir()
        self._encodings += 1
        return self._encoder(folder).encode_within(plan, budget, partial(self._again, plan, budget))

    def _again(self, plan: Plan, budget: Budget, limits: torch.Tensor) -> Plan | None:
        """A plan of the same kind for smaller limits."""
        tighter = Budget(budget.nbytes, limits)
        plans = [
            found
            for found in self.plans(tighter)[0]
            if found.representation == plan.representation and found.format == plan.format
        ]
        return min(plans, key=tighter.order, default=None)

    def _encoder(self, folder: Path) -> Encoder:
        return Encoder(
            self.survey, self._settings, self._bases, self._executor, folder, self._progress
        )

    def _out_of_reach(self, budget: Budget, nearest: float) -> str:
        """The line that says how near one can get: to the error, or to the bytes."""
        representation, quantize = self._options.shares, self._options.quantize
        if budget.by_size:
            advice = "allow a larger error"
            if quantize not in ("auto", "none"):
                advice += ", or quantize none or auto"
            elif representation == "joint":
                advice += ", or use representation auto or private"
            return (
                f"no {representation} plan with quantize {quantize} keeps every task within a "
                f"relative error of {self._options.max_error}; the least reachable for the worst "
                f"task is {nearest:.3g}; {advice}"
            )
        advice = (
            "ask for a smaller ratio" if self._options.max_bytes is None else "allow more bytes"
        )
        if self._options.gate is not None:
            advice += f", or a gate above {self._options.gate:g}"
        if quantize not in ("auto", "nf4"):
            advice += ", or quantize auto or nf4"
        if representation != "auto" and representation != "private":
            advice += ", or use representation auto"
        if not math.isfinite(nearest):
            return f"no {representation} plan keeps every task within the gate; {advice}"
        reached = math.floor(self.collection.original_nbytes / nearest * 100) / 100
        asked = (
            f"a ratio of {self._options.wanted_ratio:g}"
            if self._options.max_bytes is None
            else f"{self._options.max_bytes} bytes"
        )
        return (
            f"{asked} is out of reach for {representation} plans with quantize {quantize}: the "
            f"smallest reaches {reached:g} ({int(nearest)} bytes); {advice}"
        )

    # --- writing ---------------------------------------------------------------------------------

    def write(
        self,
        folder: Path,
        chosen: Chosen,
        base_model: str | None = None,
        *,
        recovered: Mapping[str, float | None] | None = None,
        kept: Sequence[str] = (),
    ) -> CompressReport:
        """Write a chosen plan as a checkpoint into an existing folder; the manifest comes last.

        Args:
            recovered, kept: of the report, where the model was run.
        """
        common, warning = common_base_model(
            dict(zip(self.collection.task_ids, self.collection.adapters))
        )
        writer = CheckpointWriter(folder, base_model or common)
        for module in self.collection.modules.values():
            basis = stored_basis(chosen.plan, self._bases, module)
            flat = stored_flat(chosen.plan, self._bases, module)
            writer.add_module(module.name, module.d_in, module.d_out, module.kind, basis, flat)
        tasks = []
        encoder = self._encoder(self._scratch)
        for task, encoded in enumerate(encoder.encode_tasks(chosen.plan, chosen.cores)):
            tasks.append(self._write_task(writer, task, encoded))
            self._progress("write", len(tasks), len(self.collection.task_ids))
        bases = basis_nbytes(writer.modules)
        report = CompressReport(
            path=folder,
            tasks=tasks,
            representation=chosen.plan.representation,
            format=chosen.plan.format,
            original_nbytes=self.collection.original_nbytes,
            nbytes=bases + sum(task.nbytes for task in tasks),
            basis_nbytes=bases,
            candidates=chosen.candidates,
            warnings=[] if warning is None else [warning],
            raised=[self.collection.task_ids[task] for task in chosen.plan.raised],
            calibrated=self._options.calibration is not None,
            recovered=dict(recovered or {}),
            kept=list(kept),
        )
        writer.finish(model_card(base_model or common, report))
        return report

    def _write_task(self, writer: CheckpointWriter, task: int, encoded: EncodedTask) -> TaskReport:
        task_id, adapter = self.collection.task_ids[task], self.collection.adapters[task]
        record = writer.add_task(
            task_id,
            encoded.modules,
            original_nbytes=adapter.original_nbytes,
            error=encoded.error,
            adapter_config=adapter.config,
            source=adapter.name,
            extra=adapter.extra_tensors(),
        )
        return replace(report_task(task_id, record), seen_error=encoded.seen)


def _executor(collection: Collection, options: CompressOptions) -> Executor:
    if options.executor != "auto":
        return Executor(options.executor, options.jobs)
    pays = options.jobs > 1 or collection.original_nbytes >= _PARALLEL_NBYTES
    return Executor("processes" if pays else "serial", options.jobs)


def _modules_to_share(collection: Collection, options: CompressOptions) -> list[Module]:
    """Linear modules that two tasks adapt: of one task a basis is a detour over its factors.

    Whoever asks for joint, or for a number of components, gets bases all the same.
    """
    if options.shares == "private":
        return []
    linear = [module for module in collection.modules.values() if module.kind == "linear"]
    shared = [module for module in linear if len(module.tasks) > 1]
    if options.shares == "auto":
        return shared
    if options.shares == "flat":
        if not shared:
            raise OptionError("flat needs a linear module that two tasks adapt; use private")
        return shared
    chosen = linear if options.num_components is not None or not shared else shared
    if not chosen:
        raise OptionError("joint needs a linear module, and these adapters have none; use private")
    return chosen


def _check_components(modules: Sequence[Module], options: CompressOptions) -> None:
    """Refuse more components than any module has; modules that have fewer keep all of theirs."""
    wanted = options.num_components
    if wanted is None or not modules:
        return
    if options.shares == "flat":
        most, what = max(len(m.tasks) for m in modules) - 1, "components beside the adapters' mean"
    else:
        most, what = max(map(directions, modules)), "directions in any module"
    if wanted > most:
        raise OptionError(
            f"num_components is {wanted}, but there are only {most} {what}; ask for at most {most}"
        )


def _candidate(plan: Plan) -> Candidate:
    return Candidate(
        plan.representation, plan.format, plan.nbytes, plan.mean_error, plan.worst_error
    )


def _distinct(plans: Sequence[Plan], best: Plan) -> list[Plan]:
    """The chosen plan, and the best of each other kind (representation and format)."""
    found = {(best.representation, best.format): best}
    for plan in plans:
        found.setdefault((plan.representation, plan.format), plan)
    return list(found.values())
