"""Encode what a plan chose, and measure the errors of the numbers as they are stored."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from vllm_vlora.adapters.collection import Module, Progress
from vllm_vlora.fitting.whitening import FROBENIUS, Metric
from vllm_vlora.planning.executors import Executor
from vllm_vlora.planning.flat_curves import FlatProjection
from vllm_vlora.planning.plan import Block, Budget, Plan, SharedFlat
from vllm_vlora.planning.private_curves import PrivateOption, leading_factors, seen_squared_norm
from vllm_vlora.planning.scratch import CoreSpool, FittedBases
from vllm_vlora.planning.survey import Survey, Surveyor, SurveySettings
from vllm_vlora.quantize import pack, stack_rows, unpack
from vllm_vlora.representations.decode import (
    decode,
    decode_together,
    decoded_error,
    relative_errors,
)
from vllm_vlora.representations.factors import (
    ScaledFactors,
    changes_nothing,
    product_norm,
    relative,
    squared_norm,
)
from vllm_vlora.representations.flat import pack_flat
from vllm_vlora.representations.joint import dual_rows, encode_core
from vllm_vlora.representations.private import encode_stacked, encode_trellis
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule

_ATTEMPTS = 8
# Tasks that are projected at once: their products with a basis take half the time of one after another.
_TOGETHER = 8
# How many times as many numbers are worked on at once where codes are searched: each step of the search
# then has so many more rows.
_SEARCHED_TOGETHER = 8


class EncodedTask(NamedTuple):
    """A task's modules, in the adapter's order, and their relative errors together.

    ``error`` is Frobenius; ``seen`` is in the modules' metrics, the same without calibration.
    """

    modules: dict[str, StoredModule]
    error: float
    seen: float


class Loss(NamedTuple):
    """||delta_W' - delta_W||^2 and ||delta_W||^2: Frobenius, and in the metric."""

    lost: float
    norm: float
    seen_lost: float
    seen_norm: float

    @property
    def error(self) -> float:
        """Relative, Frobenius."""
        return relative(self.lost, self.norm)


@dataclass(frozen=True)
class Encoder:
    """What encoding needs beside the plan; ``settings`` are those of the survey."""

    survey: Survey
    settings: SurveySettings
    bases: FittedBases
    executor: Executor
    scratch: Path
    progress: Progress

    def encode_within(
        self, plan: Plan, budget: Budget, again: Callable[[torch.Tensor], Plan | None]
    ) -> tuple[Plan, CoreSpool | None]:
        """Encode a plan's cores; the plan returned has measured losses in place of planned ones.

        Planned losses know the rounding of the cores only nearly. Where that breaks a promised
        error, the plan is made ``again`` for slightly smaller ones. Without cores no attempt kept
        the promise.
        """
        limits = budget.limits
        for attempt in range(_ATTEMPTS):
            folder = self.scratch / f"cores{attempt}"
            measured, cores = self._encode_cores(plan, CoreSpool(folder))
            if limits is None or budget.allows(measured.losses):
                return measured, cores
            shutil.rmtree(folder)
            excess = (measured.losses - limits).clamp(min=0)
            targets = limits - 2 ** (attempt + 1) * excess
            smaller = again(targets) if bool((targets > 0).all()) else None
            if smaller is None:
                break
            plan = smaller
        return measured, None

    def _encode_cores(self, plan: Plan, cores: CoreSpool) -> tuple[Plan, CoreSpool]:
        """The plan with measured losses, and the filled spool."""
        collection, weights = self.survey.collection, self.survey.weights
        losses = torch.zeros(len(collection.adapters), dtype=torch.float64)
        jobs = [
            CoreJob(name, tuple((b, plan.stored_rows(b)) for b in blocks), None)
            for name, blocks in plan.blocks.items()
        ]
        jobs += [CoreJob(name, (), flat) for name, flat in plan.flat.items()]
        worker = CoreEncoder(Surveyor(collection, self.settings), self.bases)
        for done, (found, job) in enumerate(zip(self.executor.run(worker, jobs), jobs), 1):
            for task, stored, seen_lost in found:
                cores.append(task, job.module, stored)
                losses[task] += seen_lost * weights[task]
            self.progress("encode", done, len(jobs))
        for (task, _), option in plan.private.items():
            losses[task] += option.loss * weights[task]
        return replace(plan, losses=losses), cores

    def encode_tasks(self, plan: Plan, cores: CoreSpool | None) -> Iterator[EncodedTask]:
        """Every task in its order: what is kept on disk, read back, and the rest, encoded now."""
        surveyor = Surveyor(self.survey.collection, self.settings)
        spools = [] if cores is None else [cores]
        with TemporaryDirectory(prefix="private", dir=self.scratch) as folder:
            # A metric's square roots are taken once a module, not for every task again.
            if self.settings.calibration is not None:
                spools.append(
                    self._encode_private(surveyor, plan, CoreSpool(Path(folder) / "kept"))
                )
            worker = TaskEncoder(surveyor, plan, tuple(spools))
            for tasks in self.executor.run(worker, _small_runs(surveyor)):
                yield from tasks

    def _encode_private(self, surveyor: Surveyor, plan: Plan, kept: CoreSpool) -> CoreSpool:
        """The spool, filled module by module with what tasks have of their own."""
        options: dict[str, list[tuple[int, PrivateOption]]] = {}
        for (task, name), option in plan.private.items():
            options.setdefault(name, []).append((task, option))
        worker = PrivateEncoder(surveyor)
        jobs = list(options.items())
        for done, (found, (name, _)) in enumerate(zip(self.executor.run(worker, jobs), jobs), 1):
            for task, stored in found:
                kept.append(task, name, stored)
            self.progress("encode private", done, len(jobs))
        return kept


@dataclass
class PrivateEncoder:
    """Encodes one module's private factors; travels to other processes."""

    surveyor: Surveyor

    def __call__(
        self, job: tuple[str, Sequence[tuple[int, PrivateOption]]]
    ) -> list[tuple[int, StoredModule]]:
        """(task number, what is stored with its Frobenius error) of (module name, its options).

        Raises:
            AdapterError: a value cannot be packed.
        """
        name, options = job
        collection, metric = self.surveyor.collection, self.surveyor.metric(name)
        factors = self.surveyor.read(collection.modules[name], [task for task, _ in options])
        found = []
        for (task, option), (a, b, scale) in zip(options, factors):
            with collection.naming(task, name):
                found.append((task, encode_kept(a, b, scale, option, metric)[0].cpu()))
        return found


def _small_runs(surveyor: Surveyor) -> list[range]:
    """All tasks, neighbours together as long as they have no more numbers than are worked on at once."""
    runs: list[range] = []
    elements = 0
    for task, adapter in enumerate(surveyor.collection.adapters):
        own = sum(module.numel for module in adapter.modules.values())
        elements += own
        if runs and elements <= surveyor.batch_elements:
            runs[-1] = range(runs[-1].start, task + 1)
        else:
            runs.append(range(task, task + 1))
            elements = own
    return runs


class _Update(NamedTuple):
    """One module of one task that is to be stored as an option says."""

    task: int
    name: str
    factors: ScaledFactors
    option: PrivateOption

    @property
    def layout(self) -> tuple[object, ...]:
        """The same of what can be encoded together."""
        (a, b, _), option = self.factors, self.option
        if option.is_searched:
            return ("searched",)
        stored = option.format, option.rank, option.original, option.loss == 0, option.bits
        return a.shape, b.shape, a.dtype, b.dtype, *stored


_Encoded = dict[tuple[int, str], tuple[StoredModule, Loss]]
"""(task number, module name) -> what is stored, and what that lost."""


@dataclass
class TaskEncoder:
    """Puts tasks together; travels to other processes.

    Attributes:
        spools: what was encoded before, with its errors.
    """

    surveyor: Surveyor
    plan: Plan
    spools: tuple[CoreSpool, ...]

    def __call__(self, tasks: Sequence[int]) -> list[EncodedTask]:
        """The modules of each task as they are stored, and its errors.

        Raises:
            AdapterError: a value cannot be packed.
        """
        encoded: _Encoded = {}
        waiting, elements = list[_Update](), 0
        for task in tasks:
            for update in self._updates(task, encoded):
                waiting.append(update)
                elements += update.factors[0].numel() + update.factors[1].numel()
                times = _SEARCHED_TOGETHER if update.option.is_searched else 1
                if elements >= times * self.surveyor.batch_elements:
                    self._encode(waiting, encoded)
                    waiting, elements = [], 0
        self._encode(waiting, encoded)
        return [self._together(task, encoded) for task in tasks]

    def _updates(self, task: int, encoded: _Encoded) -> Iterator[_Update]:
        """What of a task is left to encode; the rest goes into ``encoded``."""
        collection, device = self.surveyor.collection, self.surveyor.device
        kept = {name: module for spool in self.spools for name, module in spool.read(task).items()}
        for name, (a, b, scale) in collection.read_task(
            task, list(collection.adapters[task].modules)
        ):
            a, b = a.to(device), b.to(device)
            if name in kept:
                norm = squared_norm(a, b, scale)
                loss = Loss(kept[name].error ** 2 * norm, norm, 0.0, 0.0)
                encoded[task, name] = kept[name], loss
            else:
                yield _Update(task, name, (a, b, scale), self.plan.private[task, name])

    def _encode(self, updates: Sequence[_Update], encoded: _Encoded) -> None:
        by_layout: dict[tuple[object, ...], list[_Update]] = {}
        for update in updates:
            by_layout.setdefault(update.layout, []).append(update)
        for alike in by_layout.values():
            factors, options = [u.factors for u in alike], [u.option for u in alike]
            encode = encode_searched if options[0].is_searched else encode_alike
            try:
                found = encode(factors, options, FROBENIUS)
            except ValueError:
                # One of them; which one, is worth a second attempt.
                for update in alike:
                    with self.surveyor.collection.naming(update.task, update.name):
                        encode([update.factors], [update.option], FROBENIUS)
                raise
            for update, (stored, loss) in zip(alike, found):
                encoded[update.task, update.name] = stored.cpu(), loss

    def _together(self, task: int, encoded: _Encoded) -> EncodedTask:
        names = self.surveyor.collection.adapters[task].modules
        found = {name: encoded[task, name] for name in names}
        lost = sum(loss.lost for _, loss in found.values())
        error = relative(lost, sum(loss.norm for _, loss in found.values()))
        seen = math.sqrt(max(float(self.plan.losses[task]), 0.0))
        modules = {name: stored for name, (stored, _) in found.items()}
        return EncodedTask(modules, error, seen if self.surveyor.calibrated else error)


class CoreJob(NamedTuple):
    """What one module's sharers have of their own: cores of its blocks, with the rows that their
    segments are to name, or loadings on its flat basis."""

    module: str
    blocks: tuple[tuple[Block, tuple[int, int, int, int] | None], ...]
    flat: SharedFlat | None


@dataclass
class CoreEncoder:
    """Encodes the cores and loadings of one module; travels to other processes."""

    surveyor: Surveyor
    bases: FittedBases

    def __call__(self, job: CoreJob) -> list[tuple[int, StoredModule, float]]:
        """(task number, what is stored with its Frobenius error, loss in the metric) of every sharer.

        Raises:
            AdapterError: a value cannot be packed.
        """
        module = self.surveyor.collection.modules[job.module]
        metric = self.surveyor.metric(job.module)
        found = []
        for block, rows in job.blocks:
            shared = block.shared
            basis = self.bases.read(module, block.group[1], shared.spec).to(self.surveyor.device)
            project = CoreProjection(basis, metric, shared.core_format, shared.factored)
            # Read once, and not for every task again.
            read = Basis(pack(unpack(basis.u), "float32"), pack(unpack(basis.v), "float32"))
            encode = project.together
            for task, stored, seen in self._encode(module, shared.tasks, encode, read, metric):
                found.append((task, replace(stored, rows=rows), seen))
        if job.flat is not None:
            u, v = self.bases.read_flat(module)
            device = self.surveyor.device
            flat = pack_flat(u.to(device), v.to(device), job.flat.spec)
            nearest = FlatProjection(flat, job.flat.loadings_format)

            def encode_flat(factors: Sequence[ScaledFactors]) -> Iterator[StoredModule]:
                return (nearest(*one) for one in factors)

            found += self._encode(module, job.flat.tasks, encode_flat, flat, metric)
        return found

    def _encode(
        self,
        module: Module,
        tasks: Sequence[int],
        project: Callable[[Sequence[ScaledFactors]], Iterator[StoredModule]],
        basis: Basis,
        metric: Metric,
    ) -> Iterator[tuple[int, StoredModule, float]]:
        pairs = zip(tasks, self.surveyor.read(module, tasks))
        while batch := list(itertools.islice(pairs, _TOGETHER)):
            projected = project([factors for _, factors in batch])
            stored = [self._next(task, module, *factors, projected) for task, factors in batch]
            decoded = decode_together(stored, basis)
            for (task, (a, b, scale)), one, (new_a, new_b) in zip(batch, stored, decoded):
                loss = decoded_loss(a, b, scale, new_a, new_b, metric)
                yield task, replace(one, error=loss.error).cpu(), loss.seen_lost

    def _next(
        self,
        task: int,
        module: Module,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        projected: Iterator[StoredModule],
    ) -> StoredModule:
        with self.surveyor.collection.naming(task, module.name):
            stored = next(projected)
        # The nearest point that the components hold is not zero.
        return replace(stored, scale=0.0) if changes_nothing(a, b, scale) else stored


class CoreProjection:
    """Least-squares cores on one basis, in the metric: (S_out^T U)^+ S_out^T delta_W S_in (V S_in)^+.

    A basis that packing has bent, or that a metric stretches, is not orthonormal; its dual rows take
    the place of its transpose.
    """

    def __init__(
        self, basis: Basis, metric: Metric, core_format: str, factored: bool = False
    ) -> None:
        self._dual_u = dual_rows(metric.b_t(unpack(basis.u).double()))
        self._dual_v = dual_rows(metric.a(unpack(basis.v).double()))
        self._metric, self._core_format, self._factored = metric, core_format, factored

    def __call__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> StoredModule:
        """The core of one task, without its error."""
        return next(self.together([(a, b, scale)]))

    def together(self, factors: Sequence[ScaledFactors]) -> Iterator[StoredModule]:
        """The cores of several tasks; the basis is read once and not for each."""
        white = [self._metric.factors(a, b, torch.float32) for a, b, _ in factors]
        ranks = [len(a) for a, _ in white]
        lefts = torch.cat([b_t for _, b_t in white]) @ self._dual_u.T
        rights = torch.cat([a for a, _ in white]) @ self._dual_v.T
        for left, right, (_, _, scale) in zip(lefts.split(ranks), rights.split(ranks), factors):
            yield encode_core(left * scale, right, self._core_format, factored=self._factored)


def encode_kept(
    a: torch.Tensor, b: torch.Tensor, scale: float, option: PrivateOption, metric: Metric
) -> tuple[StoredModule, Loss]:
    """Private factors as an option says, with their error, and what they lost."""
    encode = encode_searched if option.is_searched else encode_alike
    return encode([(a, b, scale)], [option], metric)[0]


def encode_searched(
    factors: Sequence[ScaledFactors], options: Sequence[PrivateOption], metric: Metric
) -> list[tuple[StoredModule, Loss]]:
    """``encode_kept`` of updates in trellis codes, of any shapes: the search wants many rows at once."""
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for (a, b, scale), option in zip(factors, options):
        own = torch.tensor([scale], dtype=torch.float64, device=a.device)
        for side, rows in zip(sides, leading_factors(a[None], b.T[None], own, metric)):
            side.append(rows[0, : option.rank])
    bits = [option.bits or (option.rank, 0, 0) for option in options]
    found = []
    for (a, b, scale), stored in zip(factors, encode_trellis(*sides, bits)):
        loss = measure_loss(a, b, scale, stored, None, metric)
        found.append(_with_error(stored, loss))
    return found


def encode_alike(
    factors: Sequence[ScaledFactors], options: Sequence[PrivateOption], metric: Metric
) -> list[tuple[StoredModule, Loss]]:
    """``encode_kept`` of updates of one shape, whose options differ in what they lose at most."""
    option = options[0]
    a = torch.stack([a for a, _, _ in factors])
    b_t = torch.stack([b.T for _, b, _ in factors])
    scales = [scale for _, _, scale in factors]
    wide_scales = torch.tensor(scales, dtype=torch.float64, device=a.device)
    if option.original:
        stored = encode_stacked(a, b_t, scales, option.format)
    else:
        rows = leading_factors(a, b_t, wide_scales, metric)[:2]
        first_a, first_b = (side[:, : option.rank] for side in rows)
        ones = [1.0] * len(factors)
        stored = encode_stacked(first_a, first_b, ones, option.format, option.bits)
    # Zero is only ever planned where the stored numbers are the adapter's own (``_own_losses``).
    if option.original and option.loss == 0:
        losses = [
            Loss(0.0, squared_norm(*found), 0.0, seen_squared_norm(*found, metric))
            for found in factors
        ]
    elif metric == FROBENIUS:
        both = relative_errors(a, b_t, wide_scales, stored)
        losses = [Loss(lost, norm, lost, norm) for lost, norm in both]
    else:
        losses = [
            measure_loss(*found, module, None, metric) for found, module in zip(factors, stored)
        ]
    return [_with_error(module, loss) for module, loss in zip(stored, losses)]


def _with_error(stored: StoredModule, loss: Loss) -> tuple[StoredModule, Loss]:
    """The same with its error. Of an update of zero nothing is left that rounding factors could make."""
    if loss.norm == 0 and loss.lost > 0:
        return replace(stored, scale=0.0), Loss(0.0, 0.0, 0.0, 0.0)
    return replace(stored, error=loss.error), loss


def measure_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    stored: StoredModule,
    basis: Basis | None,
    metric: Metric,
) -> Loss:
    """What encoding lost. ``basis`` is the group's own, of which ``stored`` uses every row."""
    plain = replace(stored, rows=None)
    return decoded_loss(a, b, scale, *decode(plain, basis), metric)


def decoded_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    new_a: torch.Tensor,
    new_b: torch.Tensor,
    metric: Metric,
) -> Loss:
    """``measure_loss`` of what the stored numbers decode to."""
    lost, norm = decoded_error(a, b, scale, new_a, new_b)
    if metric == FROBENIUS:
        return Loss(lost, norm, lost, norm)
    difference_a = torch.cat([new_a.double(), a.double()])
    difference_b = torch.cat([new_b.double(), -scale * b.double()], dim=1)
    white_a, white_b = metric.a(difference_a), metric.b_t(difference_b.T).T
    seen_norm = seen_squared_norm(a, b, scale, metric)
    return Loss(lost, norm, product_norm(white_a, white_b), seen_norm)


def stored_flat(plan: Plan, bases: FittedBases, module: Module) -> FlatBasis | None:
    """The flat basis of a module as it is stored; None where it has none."""
    flat = plan.flat.get(module.name)
    return None if flat is None else pack_flat(*bases.read_flat(module), flat.spec)


def stored_basis(plan: Plan, bases: FittedBases, module: Module) -> Basis | None:
    """The blocks of a module's groups beside each other; None where it has no basis."""
    blocks = plan.blocks.get(module.name)
    if not blocks:
        return None
    parts = [bases.read(module, block.group[1], block.shared.spec) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    return Basis(stack_rows([p.u for p in parts]), stack_rows([p.v for p in parts]))
