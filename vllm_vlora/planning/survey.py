"""Passes over the whole collection that measure what every way of storing it would lose.

One job a module reads its factors of all adapters and returns numbers; fitted bases wait on disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from vllm_vlora.adapters.collection import Collection, Module, Progress
from vllm_vlora.fitting.calibration import Calibration
from vllm_vlora.fitting.clusters import affinities, sketch_tasks
from vllm_vlora.fitting.flat_basis import fit_flat
from vllm_vlora.fitting.shared_basis import fit_bases
from vllm_vlora.fitting.whitening import FROBENIUS, Metric
from vllm_vlora.planning.executors import Executor, device_of
from vllm_vlora.planning.flat_curves import FlatGroup, flat_rows, flat_widths, measure_flat
from vllm_vlora.planning.joint_curves import (
    FittedWidths,
    JointCurve,
    JointMeter,
    captured_packed,
    joint_nbytes,
    path_between,
    widths_to_try,
)
from vllm_vlora.planning.number_formats import Formats
from vllm_vlora.planning.private_curves import Curve, measure_private, seen_squared_norm
from vllm_vlora.planning.scratch import FittedBases
from vllm_vlora.quantize import FORMAT_OF_DTYPE, pack, row_nbytes
from vllm_vlora.representations.factors import ScaledFactors
from vllm_vlora.representations.spec import BasisSpec, FlatSpec

# Fits are made somewhat wider than a module's even share of the budget, since a module that gains
# more per byte than the others gets more than its share.
_SHARE_SLACK = 4
# Cost grows with the width, and a core on so many rows hardly saves bytes: at 4096 columns it has a
# quarter of the numbers of the factors.
MOST_COMPONENTS = 1024
# Numbers of several tasks that are measured at once: more gain nothing, and leave a core's cache. A GPU
# needs many to be busy.
_BATCH_ELEMENTS = 1 << 19
_GPU_BATCH_ELEMENTS = 1 << 25
# Factors of one module that wait in memory for the next pass; more are read again.
_HELD_BYTES = 64 << 20
# A wide basis is read from memory for each batch.
_METER_ELEMENTS = 1 << 22
# Each component of a flat basis is as large as an adapter, and all are held at once.
_MOST_FLAT = 64

Group = tuple[str, int]
"""(module name, number): tasks that may share one basis of this module."""


@dataclass(frozen=True)
class FittedGroup:
    """A basis fitted to some tasks of a module, and what its widths capture.

    Attributes:
        tasks: their numbers. curves: format label -> curve.
    """

    tasks: tuple[int, ...]
    curves: Mapping[str, JointCurve]


@dataclass(frozen=True)
class Survey:
    """What the passes found out; norms and losses are in the metric of each module.

    Attributes:
        norms: (task number, module name) -> ||delta_W||^2.
        private: (task number, module name) -> label -> curve.
        joint: of the groups that have a basis fitted. flat: of the modules with a flat basis fitted.
        affinity: (tasks, tasks), summed over the modules that were sketched.
    """

    collection: Collection
    norms: Mapping[tuple[int, str], float] = field(default_factory=dict)
    private: Mapping[tuple[int, str], Mapping[str, Curve]] = field(default_factory=dict)
    joint: Mapping[Group, FittedGroup] = field(default_factory=dict)
    flat: Mapping[str, FlatGroup] = field(default_factory=dict)
    affinity: torch.Tensor | None = None

    @cached_property
    def weights(self) -> list[float]:
        """1 / ||delta_W||^2 of each task, so that every task counts alike."""
        totals = [0.0] * len(self.collection.adapters)
        for (task, _), norm in self.norms.items():
            totals[task] += norm
        return [1 / total if total > 0 else 0.0 for total in totals]


@dataclass(frozen=True)
class SurveySettings:
    """What to measure.

    Attributes:
        formats: the number formats to try.
        num_components: the only width of a basis to measure; None measures all.
        byte_limit: of all files together, which bounds the width; None for no limit.
        seed: of the fits' random start.
        calibration: folder of the second moments; None measures in the Frobenius norm.
        device: what measures and fits, as of ``executors.device_of``.
        sampled: expected losses of private storage will do, as of ``measure_private``.
    """

    formats: Formats
    num_components: int | None = None
    byte_limit: int | None = None
    seed: int = 0
    calibration: str | None = None
    device: str = "cpu"
    sampled: bool = False


class SurveyJob(NamedTuple):
    """What to do for one module.

    ``private``: measure private storage. ``groups``: (number, tasks) to fit a basis to. ``sketch``:
    of every task, to find out who resembles whom. ``flat``: fit a flat basis too.
    """

    module: str
    private: bool
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    sketch: bool = False
    flat: bool = False


class ModuleSurvey(NamedTuple):
    """What one job found out, on the CPU; ``bases`` are (U transposed, V) of each group."""

    norms: dict[int, float]
    private: dict[int, dict[str, Curve]]
    joint: dict[int, FittedGroup]
    bases: dict[int, tuple[torch.Tensor, torch.Tensor]]
    affinity: torch.Tensor | None
    flat: tuple[FlatGroup, torch.Tensor, torch.Tensor] | None


def survey_modules(
    survey: Survey,
    jobs: Sequence[SurveyJob],
    settings: SurveySettings,
    bases: FittedBases,
    executor: Executor,
    progress: Progress,
    stage: str,
) -> Survey:
    """The survey with what these jobs measure, in place of what it had of the same modules.

    Args:
        bases: keeps what was fitted.
    """
    norms, private, joint = dict(survey.norms), dict(survey.private), dict(survey.joint)
    affinity, flat = survey.affinity, dict(survey.flat)
    worker = Surveyor(survey.collection, settings)
    progress(stage, 0, len(jobs))
    # The results first: zip ends with them, and no generator is left to be closed some time later.
    for done, (found, job) in enumerate(zip(executor.run(worker, jobs), jobs), 1):
        module = survey.collection.modules[job.module]
        norms.update({(task, job.module): norm for task, norm in found.norms.items()})
        private.update({(task, job.module): curves for task, curves in found.private.items()})
        for number, group in found.joint.items():
            joint[job.module, number] = group
            bases.save(module, number, *found.bases[number])
        if found.flat is not None:
            flat[job.module], u, v = found.flat
            bases.save_flat(module, u, v)
        if found.affinity is not None:
            if affinity is None:
                count = len(survey.collection.adapters)
                affinity = torch.zeros(count, count)
            tasks = torch.tensor(module.tasks)
            affinity[tasks[:, None], tasks] += found.affinity
        progress(stage, done, len(jobs))
    return replace(survey, norms=norms, private=private, joint=joint, flat=flat, affinity=affinity)


@dataclass
class Surveyor:
    """Does jobs; travels to other processes, where it opens the calibration for itself.

    A module's factors and metric are put on the device where they are read; what is made of them is
    there too.
    """

    collection: Collection
    settings: SurveySettings
    _calibration: Calibration | None = None
    _held: dict[int, ScaledFactors] = field(default_factory=dict)

    def __call__(self, job: SurveyJob) -> ModuleSurvey:
        """Measure one module.

        Raises:
            AdapterError: a value cannot be packed.
        """
        module = self.collection.modules[job.module]
        self._hold(module, job)
        try:
            return self._measured(module, job)
        finally:
            self._held = {}

    def _hold(self, module: Module, job: SurveyJob) -> None:
        """Keep a module's factors from one pass to the next, unless they are many."""
        tasks = module.tasks
        if not (job.private or job.sketch or job.flat):
            tasks = tuple(task for _, group in job.groups for task in group)
        nbytes = module.dtype.itemsize * (module.d_in + module.d_out) * sum(_ranks(module, tasks))
        if nbytes <= _HELD_BYTES:
            self._held = dict(zip(tasks, self.read(module, tasks)))

    def read(self, module: Module, tasks: Sequence[int]) -> Iterator[ScaledFactors]:
        """(A, B, scale) of these tasks, on the device."""
        if self._held:
            return (self._held[task] for task in tasks)
        found, device = self.collection.read_module(module, tasks), self.device
        return ((a.to(device), b.to(device), scale) for a, b, scale in found)

    @property
    def device(self) -> torch.device:
        """What works on the jobs in this process."""
        return device_of(self.settings.device)

    def _measured(self, module: Module, job: SurveyJob) -> ModuleSurvey:
        metric = self.metric(job.module)
        norms, private = {}, {}
        if job.private:
            for task, curves, norm in self._private(module, metric):
                private[task], norms[task] = curves, norm
        joint, bases = {}, {}
        for number, tasks in job.groups:
            joint[number], bases[number] = self._group(module, tasks, metric, len(job.groups))
            norms.update(zip(tasks, next(iter(joint[number].curves.values())).norms.tolist()))
        affinity = self._affinity(module) if job.sketch else None
        flat = self._flat(module, metric) if job.flat else None
        if flat is not None:
            factors = self.read(module, module.tasks)
            norms.update((t, seen_squared_norm(*f, metric)) for t, f in zip(module.tasks, factors))
        return ModuleSurvey(norms, private, joint, bases, affinity, flat)

    @property
    def batch_elements(self) -> int:
        """Numbers of several updates that are worked on at once."""
        return _BATCH_ELEMENTS if self.device.type == "cpu" else _GPU_BATCH_ELEMENTS

    @property
    def calibrated(self) -> bool:
        """Whether errors are measured in another metric than Frobenius."""
        return self.settings.calibration is not None

    def metric(self, module: str) -> Metric:
        """How errors of this module are measured."""
        if self.settings.calibration is None:
            return FROBENIUS
        if self._calibration is None:
            # Whoever made the settings has compared the digests (check_calibration); a process for
            # each job would read all files again.
            self._calibration = Calibration.open(self.settings.calibration, verify=False)
        found = self._calibration
        if found.covers(module):
            return replace(found.metric(module), weight=found.weight(module)).to(self.device)
        # Nothing was seen of this module; it counts as the others do in the middle.
        weights = sorted(found.weight(record.name) for record in found.modules)
        return Metric(weight=weights[len(weights) // 2])

    def _affinity(self, module: Module) -> torch.Tensor:
        factors = self.read(module, module.tasks)
        return affinities(sketch_tasks(factors, seed=module.index)).cpu()

    def _flat(self, module: Module, metric: Metric) -> tuple[FlatGroup, torch.Tensor, torch.Tensor]:
        """Fit a flat basis to all tasks of a module; measure its widths, in formats that hold it."""
        rank, formats = max(module.ranks), self.settings.formats
        most = min(max(len(module.tasks) - 1, 1), _MOST_FLAT)
        if self.settings.num_components is not None:
            most = min(most, self.settings.num_components)
        fit = fit_flat(
            lambda: self.read(module, module.tasks),
            rank,
            module.d_in,
            module.d_out,
            most,
            seed=self.settings.seed,
        )
        u, v = flat_rows(fit)
        kept = len(fit.components_a)
        widths = [kept] if self.settings.num_components is not None else flat_widths(kept)
        curves = {}
        for label, format in zip(formats.labels, formats.of(module.dtype)):
            specs = [FlatSpec(rank, k, k, format) for k in widths]
            own = formats.cores(format)[0]
            factors = self.read(module, module.tasks)
            curve = measure_flat(factors, u, v, specs, own, metric)
            if curve is not None:
                curves[label] = curve
        return FlatGroup(module.tasks, curves), u.cpu(), v.cpu()

    def _private(
        self, module: Module, metric: Metric
    ) -> Iterator[tuple[int, dict[str, Curve], float]]:
        """(task number, format label -> curve, ||delta_W||^2), of tasks of one shape together."""
        for dtype, batch in self._alike(module, module.tasks):
            by_label = self.settings.formats.private_of(dtype)
            distinct = list(dict.fromkeys(by_label))
            own = FORMAT_OF_DTYPE[dtype]
            try:
                found = measure_private(
                    [f for _, f in batch], distinct, own, metric, self.settings.sampled
                )
            except ValueError:
                # One of them; which one, is worth a second measurement.
                for task, factors in batch:
                    with self.collection.naming(task, module.name):
                        measure_private([factors], distinct, own, metric, self.settings.sampled)
                raise
            for (task, _), (curves, norm) in zip(batch, found):
                by_format = dict(zip(distinct, curves))
                labels = zip(self.settings.formats.private_labels, by_label)
                yield task, {label: by_format[format] for label, format in labels}, norm

    def _alike(
        self, module: Module, tasks: Sequence[int], elements: int | None = None
    ) -> Iterator[tuple[torch.dtype, list[tuple[int, ScaledFactors]]]]:
        """Neighbouring tasks of one rank and dtype, with so many elements at once at most."""
        parts = [self.collection.adapters[task].modules[module.name] for task in tasks]
        kinds = [(part.dtype, part.rank) for part in parts]
        factors = zip(tasks, self.read(module, tasks))
        for (dtype, rank), run in itertools.groupby(kinds):
            if elements is None or self.device.type != "cpu":
                elements = self.batch_elements
            most = max(elements // (rank * (module.d_in + module.d_out)), 1)
            left = len(list(run))
            while left:
                batch = list(itertools.islice(factors, min(most, left)))
                left -= len(batch)
                yield dtype, batch

    def _group(
        self, module: Module, tasks: tuple[int, ...], metric: Metric, groups: int
    ) -> tuple[FittedGroup, tuple[torch.Tensor, torch.Tensor]]:
        """Fit a basis, as wide as it could be wanted, and measure every width."""

        def read() -> Iterator[ScaledFactors]:
            for a, b, scale in self.read(module, tasks):
                white_a, white_b_t = metric.factors(a, b, torch.float32)
                yield white_a, white_b_t.T, scale

        most = self._most_components(module, tasks, groups)
        white_u, white_v = fit_bases(
            read, module.d_in, module.d_out, most, seed=self.settings.seed, keep=bool(self._held)
        )
        u_t = _orthonormal(metric.unwhiten_b_t(white_u), metric is FROBENIUS)
        v = _orthonormal(metric.unwhiten_a(white_v), metric is FROBENIUS)
        # Together the blocks are no wider than the module, on either side.
        u_t, v = u_t[: module.d_out // groups], v[: module.d_in // groups]
        norms = torch.tensor(
            [seen_squared_norm(*found, metric) for found in self.read(module, tasks)],
            dtype=torch.float64,
        )
        fitted = JointMeter.fitted(white_u[: len(u_t)], white_v[: len(v)], metric)
        widths = self._widths(module, tasks, u_t, v, norms, fitted)
        curves = self._curves(module, tasks, u_t, v, widths, norms, metric)
        k_out, k_in = map(max, zip(*widths.pairs))
        return FittedGroup(tasks, curves), (u_t[:k_out].clone().cpu(), v[:k_in].clone().cpu())

    def _most_components(self, module: Module, tasks: tuple[int, ...], groups: int) -> int:
        ranks = _ranks(module, tasks)
        # The blocks of several groups stand beside each other in one basis.
        widest = max(max(module.d_in, module.d_out) // groups, 1)
        most = min(widest, sum(min(rank, module.d_in, module.d_out) for rank in ranks))
        settings = self.settings
        if settings.num_components is not None:
            return min(most, settings.num_components)
        if settings.byte_limit is None:
            return most
        share = settings.byte_limit * module.original_nbytes / self.collection.original_nbytes
        share *= len(tasks) / len(module.tasks)
        most = min(most, MOST_COMPONENTS)
        return _most_components(module, ranks, settings.formats, most, share * _SHARE_SLACK)

    def _widths(
        self,
        module: Module,
        tasks: tuple[int, ...],
        u_t: torch.Tensor,
        v: torch.Tensor,
        norms: torch.Tensor,
        meter: JointMeter,
    ) -> FittedWidths:
        """The widths to measure, and what they capture before they are packed."""
        outs, ins = widths_to_try(len(u_t)), widths_to_try(len(v))
        captured = torch.empty(len(tasks), len(outs), len(ins))
        total, place = torch.zeros(len(outs), len(ins), dtype=torch.float64), 0
        weights = torch.where(norms > 0, 1 / norms, 0.0)
        for _, batch in self._alike(module, tasks, _METER_ELEMENTS):
            found = meter.captured_between([found for _, found in batch], outs, ins).cpu()
            rows = slice(place, place + len(batch))
            total += torch.einsum("toi,t->oi", found, weights[rows])
            captured[rows], place = found, rows.stop
        path = self._path(module, tasks, total, outs, ins)
        places = [(outs.index(k_out), ins.index(k_in)) for k_out, k_in in path]
        at_out, at_in = map(list, zip(*places))
        return FittedWidths(path, captured[:, at_out, at_in], (total[:, -1], total[-1]))

    def _path(
        self,
        module: Module,
        tasks: tuple[int, ...],
        total: torch.Tensor,
        outs: Sequence[int],
        ins: Sequence[int],
    ) -> list[tuple[int, int]]:
        """The pairs (k_out, k_in) to measure; ``total`` is what all of them capture."""
        if self.settings.num_components is not None:
            return [(outs[-1], ins[-1])]
        format = min(
            self.settings.formats.of(module.dtype),
            key=lambda f: row_nbytes(f, module.d_in) + row_nbytes(f, module.d_out),
        )
        # A row more on one side adds one number to every row of that side's core factor.
        cores = 2.0 * sum(min(rank, outs[-1], ins[-1]) for rank in _ranks(module, tasks))
        row_out = row_nbytes(format, module.d_out) + cores
        return path_between(total, outs, ins, row_out, row_nbytes(format, module.d_in) + cores)

    def _curves(
        self,
        module: Module,
        tasks: tuple[int, ...],
        u_t: torch.Tensor,
        v: torch.Tensor,
        widths: FittedWidths,
        norms: torch.Tensor,
        metric: Metric,
    ) -> dict[str, JointCurve]:
        by_label = self.settings.formats.of(module.dtype)
        meters, captured = dict[str, JointMeter](), dict[str, torch.Tensor]()
        for format in dict.fromkeys(by_label):
            if format == "float32":  # What is fitted is.
                captured[format] = widths.captured
                continue
            expected = captured_packed(widths, u_t, v, format) if metric is FROBENIUS else None
            if expected is None:
                expected = torch.zeros_like(widths.captured)
                meters[format] = JointMeter(pack(u_t, format), pack(v, format), metric)
            captured[format] = expected
        place = 0
        # Nothing is read again for nothing.
        for _, batch in self._alike(module, tasks, _METER_ELEMENTS) if meters else ():
            factors = [found for _, found in batch]
            rows = slice(place, place + len(batch))
            for format, meter in meters.items():
                captured[format][rows] = meter.captured_at(factors, widths.pairs).float().cpu()
            place = rows.stop
        return {
            label: JointCurve(
                [BasisSpec(*w, format) for w in widths.pairs], captured[format], norms
            )
            for label, format in zip(self.settings.formats.labels, by_label)
        }


def directions(module: Module) -> int:
    """The most components that a shared basis of a module can have on either side."""
    ranks = sum(min(rank, module.d_in, module.d_out) for rank in module.ranks)
    return min(max(module.d_in, module.d_out), ranks)


def check_calibration(path: str | None, collection: Collection) -> None:
    """Read a calibration whole, and compare it with the adapters; nothing where there is none.

    Raises:
        DataError: it cannot be read, is damaged, or is another model's.
    """
    if path is not None:
        Calibration.open(path).check_shapes(
            (module.name, module.d_in, module.d_out) for module in collection.modules.values()
        )


def _orthonormal(rows: torch.Tensor, already: bool) -> torch.Tensor:
    """Orthonormal rows of which the first n span what the first n given ones do."""
    if already:
        return rows
    return torch.linalg.qr(rows.double().T)[0].T.float().contiguous()


def _ranks(module: Module, tasks: Sequence[int]) -> list[int]:
    ranks = dict(zip(module.tasks, module.ranks))
    return [ranks[task] for task in tasks]


def _most_components(
    module: Module, ranks: Sequence[int], formats: Formats, most: int, share: float
) -> int:
    """The most components, up to ``most``, that take ``share`` bytes in the smallest format."""

    def least_nbytes(components: int) -> int:
        k_out, k_in = min(components, module.d_out), min(components, module.d_in)
        return min(
            joint_nbytes(BasisSpec(k_out, k_in, format), module.d_out, module.d_in, ranks, core)
            for format in formats.of(module.dtype)
            for core in formats.cores(format)
        )

    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if least_nbytes(middle) <= share:
            low = middle
        else:
            high = middle - 1
    return low
