"""Compress a collection of adapters into a checkpoint.

Passes over the adapters: measure (and fit bases), encode the cores, write the tasks. Every pass reads an
adapter's weights a fixed number of times and holds one module of one adapter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from vllm_vlora.adapters.collection import Collection, Progress
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.losses import is_worthless, worthless_error
from vllm_vlora.checkpoint.report import Candidate, CompressReport, CurvePoint
from vllm_vlora.compression.budgets import (
    budget_of,
    default_unreachable,
    gate_of,
    out_of_reach,
)
from vllm_vlora.compression.candidates import Candidates, too_many_components
from vllm_vlora.compression.encoding import Encoder
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.publishing import Chosen, publish_checkpoint, write_checkpoint
from vllm_vlora.errors import BudgetError, OptionError
from vllm_vlora.planning.executors import Executor
from vllm_vlora.planning.number_formats import formats_to_try
from vllm_vlora.planning.plan import Budget, Plan
from vllm_vlora.planning.scratch import CoreSpool, FittedBases
from vllm_vlora.planning.survey import SurveySettings, check_calibration

_Found = TypeVar("_Found")
CURVE_RATIOS = (2, 3, 3.5, 4, 6, 8, 12, 16, 24, 32)


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
        BudgetError: no allowed plan meets the budget; says how near one can get. Or a task would be
            stored with a relative error above 1, and ``allow_large_error`` is not set.
        DataError: the calibration cannot be read.
        OutputError: ``output`` exists and is not to be replaced, is or holds an
            adapter, or cannot be written.
        TaskIdError: a task id that is not allowed.

    Examples:
        >>> tasks = {f"task_{i}": open_adapter(path) for i, path in enumerate(adapter_dirs)}
        >>> report = compress(tasks, folder / "checkpoint", CompressOptions(max_error=0.1))
        >>> report.worst_error <= 0.1, validate(folder / "checkpoint")
        (True, [])
    """

    chosen = options or CompressOptions()

    def make(folder: Path, scratch: Path) -> CompressReport:
        with Compression(Collection(adapters), chosen, scratch, progress) as compression:
            return compression.write(folder, compression.choose(), base_model)

    return publish_checkpoint(output, force, make, adapters, chosen)


def predict(
    adapters: Mapping[str, Adapter],
    options: CompressOptions | None = None,
    *,
    ratios: Sequence[float] = CURVE_RATIOS,
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
    if not ratios:
        raise OptionError("no ratio to predict; give one or more")
    given = options or CompressOptions()
    options = replace(
        given,
        ratio=min(ratios),
        # Which a ratio without a limit would not take; each plan below has a number of bytes.
        gate=given.gate if min(ratios) > 1 else None,
        max_bytes=None,
        max_error=None,
        num_components=None,
    )
    with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
        collection = Collection(adapters)
        points = []
        with Compression(collection, options, Path(scratch), progress) as compression:
            for ratio in ratios:
                nbytes = math.floor(collection.original_nbytes / ratio)
                budget = Budget(nbytes, gate_of(given, collection))
                plans = [
                    plan
                    for plan in compression.candidates.plans(budget)[0]
                    if not compression.is_refused(plan)
                ]
                if plans:
                    best = min(plans, key=lambda plan: plan.likely_error)
                    points.append(CurvePoint(ratio, _candidate(best)))
        return points


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
        budget = self.budget()
        limit = budget.nbytes
        # Under an error limit a joint plan is only wanted if it is smaller than the originals.
        if budget.by_size or not bounded:
            limit = collection.original_nbytes
        formats = formats_to_try(
            collection,
            options.number_format,
            options.dtype,
            options.double_quantize,
            options.codes,
        )
        self._settings = SurveySettings(
            formats,
            options.num_components,
            limit,
            options.seed,
            options.calibration,
            options.device,
            sampled=bounded and budget.limits is None and options.calibration is None,
        )
        self._bases = FittedBases(scratch / "fit")
        self._executor = Executor(options.executor, options.jobs)
        self.candidates = Candidates(
            collection, options, self._settings, self._bases, self._executor, self._progress
        )
        check_calibration(options.calibration, collection)
        self._encodings = 0
        few = too_many_components(collection, options)
        self.warnings = [] if few is None else [few]

    def __enter__(self) -> Compression:
        """All passes within the block have the same processes."""
        self._executor.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.__exit__(*error)

    def budget(self) -> Budget:
        """What the options ask for."""
        return budget_of(self._options, self.collection)

    def choose(self, budget: Budget | None = None) -> Chosen:
        """The best plan within a budget, by default the options', with its cores encoded.

        Where nothing meets a budget that nobody asked for, the one that loses the least.

        Raises:
            BudgetError: nothing meets the budget.
        """
        if budget is not None:
            return self._choose(budget)
        return self._or_best(self._choose)

    def _or_best(self, choose: Callable[[Budget], _Found]) -> _Found:
        """What is chosen within the options' budget; without one that was asked for, or else the best."""
        try:
            return choose(self.budget())
        except BudgetError:
            if self._options.has_budget:
                raise
            self.warnings.append(default_unreachable(self._options))
            return choose(Budget())

    def _choose(self, budget: Budget) -> Chosen:
        plans, misses = self.candidates.plans(budget)
        order = sorted(range(len(plans)), key=lambda i: budget.order(plans[i]))
        best, cores = None, None
        worthless: Plan | None = None
        known: list[Plan] = []
        for place in order:
            plan = plans[place]
            if best is not None and budget.clearly_prefers(best, plan):
                break
            own = budget.of_kind(plan.representation)
            twin = next((p for p in known if p.keeps_the_same(plan) and own.allows(p.losses)), None)
            if twin is not None:  # Under another name; its cores are the ones that it would get.
                plans[place] = replace(plan, losses=twin.losses)
                continue
            encoded = self._measured(plan, budget, misses)
            if encoded is None:
                continue
            measured, spool = encoded
            plans[place] = measured
            known.append(measured)
            if self.is_refused(measured):
                worthless = worthless or measured
            elif best is None or budget.order(measured) < budget.order(best):
                best, cores = measured, spool
        if best is None:
            raise self._refusal(budget, misses, worthless)
        kept = sorted(plans, key=budget.order)
        return Chosen(best, [_candidate(plan) for plan in _distinct(kept, best)], cores)

    def best_of_each(self) -> list[Chosen]:
        """The best plan of every ``Plan.form`` within the options' budget, with cores encoded.

        One that is the best of two forms comes once.

        Raises:
            BudgetError: nothing meets the budget.
        """
        return self._or_best(self._best_of_each)

    def _best_of_each(self, budget: Budget) -> list[Chosen]:
        plans, misses = self.candidates.plans(budget)
        found: list[tuple[Plan, CoreSpool | None]] = []
        # As they were planned, by form.
        best: dict[tuple[str, bool], Plan] = {}
        worthless: Plan | None = None
        for plan in sorted(plans, key=budget.order):
            if plan.form in best:
                continue
            if any(plan.keeps_the_same(other) for other in best.values()):
                best[plan.form] = plan  # Judged under its other name.
                continue
            encoded = self._measured(plan, budget, misses)
            if encoded is None:
                continue
            if self.is_refused(encoded[0]):
                worthless = worthless or encoded[0]
            else:
                best[plan.form] = plan
                found.append(encoded)
        if not found:
            raise self._refusal(budget, misses, worthless)
        return [Chosen(plan, [_candidate(plan)], cores) for plan, cores in found]

    def is_refused(self, plan: Plan) -> bool:
        """Whether a task would be worse than none, and that is not asked for."""
        return not self._options.allow_large_error and is_worthless(plan.worst_error)

    def _refusal(
        self, budget: Budget, misses: Sequence[float], worthless: Plan | None
    ) -> BudgetError:
        """Why there is no plan; ``worthless`` is the best one that meets the budget, if one does."""
        if worthless is not None:
            task = int(worthless.losses.argmax())
            return worthless_error(self.collection.task_ids[task], worthless.worst_error)
        nearest = min(misses, default=math.inf)
        return BudgetError(out_of_reach(self._options, self.collection, budget, nearest))

    def _measured(
        self, plan: Plan, budget: Budget, misses: list[float]
    ) -> tuple[Plan, CoreSpool | None] | None:
        """The plan with measured losses, and its cores; None, and a miss more, if it breaks a promise."""
        budget = budget.of_kind(plan.representation)
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
            for found in self.candidates.plans(tighter)[0]
            if found.representation == plan.representation and found.format == plan.format
        ]
        return min(plans, key=tighter.order, default=None)

    def _encoder(self, folder: Path) -> Encoder:
        return Encoder(
            self.candidates.survey,
            self._settings,
            self._bases,
            self._executor,
            folder,
            self._progress,
        )

    def write(
        self,
        folder: Path,
        chosen: Chosen,
        base_model: str | None = None,
        *,
        kl_kept: Mapping[str, float | None] | None = None,
        chosen_by: str = "",
        kept: Sequence[str] = (),
        trial: bool = False,
    ) -> CompressReport:
        """Write a chosen plan into an existing folder, as ``write_checkpoint`` does.

        Args:
            trial: it is judged and thrown away, so that tokenizers are left out.
        """
        encoder = self._encoder(self._scratch)
        return write_checkpoint(
            folder,
            chosen,
            encoder,
            base_model,
            kl_kept=kl_kept,
            chosen_by=chosen_by,
            kept=kept,
            allow_large_error=self._options.allow_large_error,
            tokenizers=self._options.tokenizers and not trial,
            warnings=[*self.warnings, *self.candidates.warnings],
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
