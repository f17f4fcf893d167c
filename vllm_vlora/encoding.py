"""Encode what a plan chose, and measure the errors of the numbers as they are stored."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_vlora.checkpoint import Basis, FlatBasis, StoredModule
from vllm_vlora.collection import Collection, Module, Progress
from vllm_vlora.executors import Executor
from vllm_vlora.flat import FlatProjection, pack_flat
from vllm_vlora.measure import PrivateOption, leading_factors, squared_norm
from vllm_vlora.plan import Block, Budget, Plan, SharedBasis
from vllm_vlora.quantize import stack_rows, unpack
from vllm_vlora.representations import (
    decode,
    dual_rows,
    encode_joint,
    encode_narrow,
    encode_private,
    relative_error,
)
from vllm_vlora.scratch import CoreSpool, FittedBases
from vllm_vlora.survey import Survey, Surveyor, SurveySettings
from vllm_vlora.whitening import FROBENIUS, Metric

_ATTEMPTS = 8


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
        return _relative(self.lost, self.norm)


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
            CoreJob(name, tuple((b, plan.stored_rows(b)) for b in blocks))
            for name, blocks in plan.blocks.items()
        ]
        worker = CoreEncoder(Surveyor(collection, self.settings), self.bases)
        for done, (job, found) in enumerate(zip(jobs, self.executor.run(worker, jobs)), 1):
            for task, stored, seen_lost in found:
                cores.append(task, job.module, stored)
                losses[task] += seen_lost * weights[task]
            self.progress("encode", done, len(jobs))
        for (task, _), option in plan.private.items():
            losses[task] += option.loss * weights[task]
        return replace(plan, losses=losses), cores

    def encode_task(self, plan: Plan, cores: CoreSpool | None, task: int) -> EncodedTask:
        """One task's cores, read back, and its private modules, encoded now."""
        collection = self.survey.collection
        names = list(collection.adapters[task].modules)
        joint = cores.read(task) if cores else {}
        surveyor = Surveyor(collection, self.settings)
        flat = {name: _flat_basis(plan, self.bases, collection, name) for name in plan.flat}
        modules, losses = dict[str, StoredModule](), []
        for name, (a, b, scale) in collection.read_task(task, names):
            metric = surveyor.metric(name)
            if name in joint:
                norm = squared_norm(a, b, scale)
                modules[name] = joint[name]
                # The metric's loss of a core was measured when it was encoded.
                losses.append(Loss(joint[name].error ** 2 * norm, norm, 0.0, 0.0))
                continue
            if name in flat:
                basis = flat[name]
                stored = FlatProjection(basis)(a, b, scale, plan.flat[name].loadings_format)
                losses.append(measure_loss(a, b, scale, stored, basis, metric))
                modules[name] = replace(stored, error=losses[-1].error)
                continue
            option = plan.private[task, name]
            with collection.naming(task, name):
                stored = encode_option(a, b, scale, option, metric)
            # Zero is only ever planned where the stored numbers are the adapter's own.
            if option.original and option.loss == 0:
                norm = squared_norm(a, b, scale)
                loss = Loss(0.0, norm, 0.0, 0.0)
            else:
                loss = measure_loss(a, b, scale, stored, None, metric)
            modules[name] = replace(stored, error=loss.error)
            losses.append(loss)
        error = _relative(sum(x.lost for x in losses), sum(x.norm for x in losses))
        seen = math.sqrt(max(float(plan.losses[task]), 0.0))
        return EncodedTask(modules, error, error if metric_is_plain(self.settings) else seen)


def metric_is_plain(settings: SurveySettings) -> bool:
    """Whether losses are Frobenius."""
    return settings.calibration is None


class CoreJob(NamedTuple):
    """The cores of one module: its blocks, and the rows that their segments are to name."""

    module: str
    blocks: tuple[tuple[Block, tuple[int, int, int, int] | None], ...]


@dataclass
class CoreEncoder:
    """Encodes the cores of one module; travels to other processes."""

    surveyor: Surveyor
    bases: FittedBases

    def __call__(self, job: CoreJob) -> list[tuple[int, StoredModule, float]]:
        """(task number, core with its Frobenius error, loss in the metric) of every sharer.

        Raises:
            AdapterError: a value cannot be packed.
        """
        collection = self.surveyor.collection
        module, metric = collection.modules[job.module], self.surveyor.metric(job.module)
        found = []
        for block, rows in job.blocks:
            shared = block.shared
            basis = self.bases.read(module, block.group[1], shared.spec)
            project = CoreProjection(basis, metric, shared)
            for task, (a, b, scale) in zip(
                shared.tasks, collection.read_module(module, shared.tasks)
            ):
                with collection.naming(task, job.module):
                    stored = project(a, b, scale)
                loss = measure_loss(a, b, scale, stored, basis, metric)
                found.append((task, replace(stored, error=loss.error, rows=rows), loss.seen_lost))
        return found


class CoreProjection:
    """Least-squares cores on one basis, in the metric: (S_out^T U)^+ S_out^T delta_W S_in (V S_in)^+.

    A basis that packing has bent, or that a metric stretches, is not orthonormal; its dual rows take
    the place of its transpose.
    """

    def __init__(self, basis: Basis, metric: Metric, shared: SharedBasis) -> None:
        self._dual_u = dual_rows(metric.b_t(unpack(basis.u).double()))
        self._dual_v = dual_rows(metric.a(unpack(basis.v).double()))
        self._metric, self._shared = metric, shared

    def __call__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> StoredModule:
        """The core of one task, without its error."""
        white_a = self._metric.a(a.float())
        white_b = self._metric.b_t(b.T.float()).T
        return encode_joint(
            white_a,
            white_b,
            scale,
            self._dual_u,
            self._dual_v,
            self._shared.core_format,
            factored=self._shared.factored,
        )


def encode_option(
    a: torch.Tensor, b: torch.Tensor, scale: float, option: PrivateOption, metric: Metric
) -> StoredModule:
    """Private factors as an option says; its error is the caller's to measure."""
    if option.original:
        return encode_private(a, b, scale, option.format)
    svd_a, svd_b_t = (rows[: option.rank] for rows in leading_factors(a, b, scale, metric))
    if option.bits is None:
        return encode_private(svd_a, svd_b_t.T, 1.0, option.format)
    return encode_narrow(svd_a, svd_b_t.T, 1.0, option.bits)


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
    lost, norm = relative_error(a, b, scale, plain, basis)
    if metric == FROBENIUS:
        return Loss(lost, norm, lost, norm)
    new_a, new_b = decode(plain, basis)
    difference_a = torch.cat([new_a.double(), a.double()])
    difference_b = torch.cat([new_b.double(), -scale * b.double()], dim=1)
    white_a, white_b = metric.a(difference_a), metric.b_t(difference_b.T).T
    seen_norm = squared_norm(metric.a(a.double()), metric.b_t(b.T.double()).T, scale)
    return Loss(lost, norm, squared_norm(white_a, white_b, 1.0), seen_norm)


def _relative(lost: float, norm: float) -> float:
    # A delta_W of zero is stored as zero, so there is nothing to divide.
    return math.sqrt(lost / norm) if norm > 0 else math.sqrt(lost)


def stored_flat(
    plan: Plan, bases: FittedBases, collection: Collection, name: str
) -> FlatBasis | None:
    """The flat basis of a module as it is stored; None where it has none."""
    return _flat_basis(plan, bases, collection, name) if name in plan.flat else None


def _flat_basis(plan: Plan, bases: FittedBases, collection: Collection, name: str) -> FlatBasis:
    return pack_flat(*bases.read_flat(collection.modules[name]), plan.flat[name].spec)


def stored_basis(plan: Plan, bases: FittedBases, module: Module) -> Basis | None:
    """The blocks of a module's groups beside each other; None where it has no basis."""
    blocks = plan.blocks.get(module.name)
    if not blocks:
        return None
    parts = [bases.read(module, block.group[1], block.shared.spec) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    return Basis(stack_rows([p.u for p in parts]), stack_rows([p.v for p in parts]))
