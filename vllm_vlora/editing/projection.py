"""How a task that a checkpoint does not have yet is best stored in it: projected or privately.

A module of the task has one *chain* of options: every private one (``private_curves``), and a core on
each block of the module's shared basis, on the block's leading rows only where that pays, in each format
of cores. The losses are measured on the numbers that would be stored, the bytes are those of the
file with its header, and the plan without any core is always among those compared: at equal bytes
no task keeps less than it would privately.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_vlora.checkpoint.layout import task_nbytes
from vllm_vlora.fitting.orthonormal import OrthonormalBasis
from vllm_vlora.fitting.whitening import Metric
from vllm_vlora.planning.allocation import (
    Point,
    build_path,
    cheapest_within,
    fit_to_budget,
    pareto_front,
)
from vllm_vlora.planning.joint_curves import JointCurve, core_nbytes, widths_path
from vllm_vlora.planning.private_curves import Curve, PrivateOption
from vllm_vlora.representations.factors import ScaledFactors, squared_norm
from vllm_vlora.representations.joint import core_factors, encode_joint
from vllm_vlora.representations.spec import BasisSpec, ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis, StoredModule

Rows = tuple[int, int, int, int]
"""(u_start, u_stop, v_start, v_stop) of a module's basis."""

# Cores of one block in one format that are encoded to measure them exactly; expected losses choose them.
_MEASURED_CORES = 12


@dataclass(frozen=True, slots=True)
class CoreOption:
    """A core on some rows of the module's basis; ``loss`` as of ``private_curves.PrivateOption``."""

    rows: Rows
    format: str
    form: str
    rank: int
    nbytes: int
    loss: float


Option = PrivateOption | CoreOption


# --- one block of a basis ------------------------------------------------------------------------


class BlockMeter:
    """Some rows of a module's packed basis, and the cores that tasks have on its leading ones.

    With the metric's QR of the rows, S_out^T U = Q_u R_u and V S_in = R_v^T Q_v^T, the core of the
    first p and q rows that loses least is R_u^-1 (Q_u^T delta_W Q_v) R_v^-T, of the leading p x q.

    Args:
        basis: the module's whole basis. rows: those that the block has.
    """

    def __init__(self, basis: Basis, rows: Rows, metric: Metric) -> None:
        self.rows = rows
        u, v = basis.u.row_slice(*rows[:2]), basis.v.row_slice(*rows[2:])
        self._metric = metric
        self._basis = OrthonormalBasis(u, v, metric)
        self._format = u.format

    def project(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> Projection:
        """What the block holds of one task's delta_W."""
        white_a, white_b_t = self._metric.factors(a, b)
        left, right = self._basis.sides(white_a, white_b_t, scale)
        return Projection(left.T, right, squared_norm(white_a, white_b_t.T, scale))

    def encode(
        self, projection: Projection, k_out: int, k_in: int, format: str
    ) -> tuple[StoredModule, float]:
        """The core on the first rows, which it names, and what the numbers stored lose.

        Raises:
            ValueError: a value does not fit the format.
        """
        r_u, r_v = self._basis.r_u[:k_out, :k_out], self._basis.r_v[:k_in, :k_in]
        left, right = projection.left[:k_out], projection.right[:, :k_in]
        core_b = torch.linalg.solve_triangular(r_u, left, upper=True)
        core_a = torch.linalg.solve_triangular(r_v, right.T, upper=True).T
        u_start, _, v_start, _ = self.rows
        rows = (u_start, u_start + k_out, v_start, v_start + k_in)
        eyes = torch.eye(k_out), torch.eye(k_in)
        stored = encode_joint(core_a, core_b, 1.0, *eyes, format, rows)
        new_a, new_b_t = (x.double() for x in core_factors(stored))
        wanted = left @ right
        difference = wanted - r_u @ (new_b_t.T @ new_a) @ r_v.T
        loss = projection.norm - float(wanted.square().sum()) + float(difference.square().sum())
        return stored, max(loss, 0.0)

    def options(
        self, projection: Projection, rank: int, formats: Sequence[str]
    ) -> list[CoreOption]:
        """The cores worth considering for a task of this rank, measured.

        Raises:
            ValueError: a value does not fit a format.
        """
        captured = projection.captured
        widths = widths_path(captured, 1.0, 1.0)
        bases = [BasisSpec(*width, self._format) for width in widths]
        places = torch.tensor(widths).T - 1
        curve = JointCurve(
            bases,
            captured[places[0], places[1]][None].float(),
            torch.tensor([projection.norm], dtype=torch.float64),
        )
        found = []
        for format in formats:
            expected = curve.losses(format, [rank], False)[0].tolist()
            sizes = [core_nbytes(basis, rank, format) for basis in bases]
            for place in pareto_front(list(zip(sizes, expected)), _MEASURED_CORES):
                stored, loss = self.encode(projection, *widths[place], format)
                assert stored.rows is not None
                assert stored.core is not None
                found.append(
                    CoreOption(stored.rows, format, stored.core, stored.rank, sizes[place], loss)
                )
        return found


@dataclass(frozen=True)
class Projection:
    """A delta_W seen by a block: left (k_out, r) and right (r, k_in) in the block's coordinates.

    ``norm`` is the whole ||delta_W||^2 in the module's metric.
    """

    left: torch.Tensor
    right: torch.Tensor
    norm: float

    @property
    def captured(self) -> torch.Tensor:
        """(k_out, k_in): [i, j] is the part of ||delta_W||^2 that i+1 and j+1 rows hold."""
        return (self.left @ self.right).square().cumsum(0).cumsum(1)


def used_blocks(spec: ModuleSpec, segments: Sequence[Segment]) -> list[Rows]:
    """The rows of a module's basis that tasks use together, without those inside of others.

    Args:
        segments: of this module, of every task or of :meth:`Checkpoint.usage`. Without any that uses the
            basis it is one block.
    """
    if spec.basis is None:
        return []
    whole = (0, spec.basis.k_out, 0, spec.basis.k_in)
    used = {s.rows or whole for s in segments if s.is_joint} or {whole}
    return sorted(r for r in used if not any(r != other and _inside(r, other) for other in used))


def _inside(rows: Rows, other: Rows) -> bool:
    u_start, u_stop, v_start, v_stop = other
    return u_start <= rows[0] and rows[1] <= u_stop and v_start <= rows[2] and rows[3] <= v_stop


# --- one task ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleChoices:
    """The chain of one module of a task.

    Attributes:
        module: its place in the checkpoint that is written.
        private: label -> curve. cores: on any block.
        norm: ||delta_W||^2. carried: what the block that holds most of it holds.
    """

    module: int
    private: Mapping[str, Curve]
    cores: Sequence[CoreOption]
    norm: float
    carried: float = 0.0

    def options(self, labels: Sequence[str], formats: Sequence[str]) -> list[Option]:
        """Those privately with these labels, and the cores in these formats."""
        found: list[Option] = [core for core in self.cores if core.format in formats]
        for label in labels:
            curve = self.private[label]
            found += [curve.option(number) for number in range(curve.count)]
        return found


@dataclass(frozen=True)
class TaskPlan:
    """An option for every module, in the order of the task's.

    ``loss`` is ||delta_W' - delta_W||^2 / ||delta_W||^2 of the task, ``nbytes`` of its file.
    """

    options: tuple[Option, ...]
    loss: float
    nbytes: int

    @property
    def error(self) -> float:
        """Relative."""
        return math.sqrt(self.loss)

    @property
    def cores(self) -> int:
        """How many of its modules stand on a basis."""
        return sum(isinstance(option, CoreOption) for option in self.options)

    @property
    def kind(self) -> str:
        """``projected``, ``private``, or ``mixed``."""
        if not self.cores:
            return "private"
        return "projected" if self.cores == len(self.options) else "mixed"


@dataclass(frozen=True)
class Target:
    """What a task may take (``nbytes``) or lose (``loss``); None of both: keep as much as can be."""

    nbytes: int | None = None
    loss: float | None = None

    def order(self, plan: TaskPlan) -> tuple[float, float]:
        """Sorts plans that meet the target, the best one first."""
        if self.loss is not None:
            return plan.nbytes, plan.loss
        return plan.loss, plan.nbytes


@dataclass(frozen=True)
class TaskPlanner:
    """Chooses an option for every module of one task.

    Attributes:
        modules: of the checkpoint that is written, with the bases that options name.
        choices: of the task's modules. extra: dtype and shape of its tensors that are not LoRA.
    """

    modules: list[ModuleSpec]
    choices: Sequence[ModuleChoices]
    extra: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def norm(self) -> float:
        """||delta_W||^2 over all modules."""
        return math.fsum(choice.norm for choice in self.choices)

    @property
    def carried(self) -> float:
        """The share of ||delta_W||^2 that the shared bases hold, at their best block a module."""
        return math.fsum(c.carried for c in self.choices) / self.norm if self.norm > 0 else 0.0

    def best(self, target: Target) -> TaskPlan | None:
        """The best plan that meets a target; None if nothing does."""
        return min(self._plans(target, self._mixtures()), key=target.order, default=None)

    def best_private(self, target: Target) -> TaskPlan | None:
        """The same among the plans without a core."""
        kinds = [(labels, ()) for labels in self._private_kinds()]
        return min(self._plans(target, kinds), key=target.order, default=None)

    def least_nbytes(self) -> int:
        """Bytes of the smallest file that can be had."""
        found = []
        for labels, formats in self._mixtures():
            chains = [c.options(labels, formats) for c in self.choices]
            found.append(self._plan([min(chain, key=_size) for chain in chains]).nbytes)
        return min(found)

    def least_header(self) -> int:
        """Bytes of a file's header where all modules are stored alike."""
        found = []
        for labels, formats in self._mixtures():
            smallest = [min(c.options(labels, formats), key=_size) for c in self.choices]
            found.append(self._file_nbytes(smallest) - sum(map(_size, smallest)))
        return min(found)

    def segments(self, options: Sequence[Option]) -> list[Segment]:
        """What the manifest says of these options; scales and errors left out."""
        return [_segment(c.module, option) for c, option in zip(self.choices, options)]

    def _private_kinds(self) -> list[tuple[str, ...]]:
        labels = tuple(self.choices[0].private)
        alone: list[tuple[str, ...]] = [(label,) for label in labels]
        return [*alone, labels] if len(labels) > 1 else alone

    def _mixtures(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """(private labels, formats of cores): each kind by itself, and all.

        Every kind that a file has costs entries of its header, which small adapters feel.
        """
        formats = tuple(dict.fromkeys(core.format for c in self.choices for core in c.cores))
        cores = [(), *((format,) for format in formats)]
        if len(formats) > 1:
            cores.append(formats)
        for labels in self._private_kinds():
            yield from ((labels, kinds) for kinds in cores)
        for kinds in cores[1:]:
            if all(any(core.format in kinds for core in c.cores) for c in self.choices):
                yield (), kinds

    def _plans(
        self, target: Target, mixtures: Iterator[tuple[tuple[str, ...], tuple[str, ...]]] | list
    ) -> Iterator[TaskPlan]:
        for labels, formats in mixtures:
            chains = [c.options(labels, formats) for c in self.choices]
            found = self._solve(chains, target)
            if found is not None:
                plan = self._plan([chain[i] for chain, i in zip(chains, found)])
                if target.nbytes is None or plan.nbytes <= target.nbytes:
                    yield plan

    def _solve(self, chains: list[list[Option]], target: Target) -> list[int] | None:
        scale = 1 / self.norm if self.norm > 0 else 0.0
        points: list[list[Point]] = [[(o.nbytes, o.loss * scale) for o in c] for c in chains]
        if target.loss is not None:
            return cheapest_within(points, target.loss)
        if target.nbytes is None:
            return [_faithful(chain) for chain in points]

        def sizes(chosen: list[int]) -> tuple[int, int]:
            plan = self._plan([chain[i] for chain, i in zip(chains, chosen)])
            return sum(option.nbytes for option in plan.options), plan.nbytes

        return fit_to_budget(build_path(len(points), points.__getitem__), sizes, target.nbytes)

    def _plan(self, options: Sequence[Option]) -> TaskPlan:
        loss = math.fsum(option.loss for option in options)
        relative = loss / self.norm if self.norm > 0 else 0.0
        return TaskPlan(tuple(options), relative, self._file_nbytes(options))

    def _file_nbytes(self, options: Sequence[Option]) -> int:
        return task_nbytes(self.segments(options), self.modules, self.extra)


def _faithful(points: Sequence[Point]) -> int:
    """The option that loses least, in the fewest bytes."""
    return min(range(len(points)), key=lambda i: (points[i][1], points[i][0]))


def _size(option: Option) -> int:
    return option.nbytes


def _segment(module: int, option: Option) -> Segment:
    if isinstance(option, PrivateOption):
        return Segment(module, "private", option.format, option.rank, bits=option.bits)
    return Segment(module, "joint", option.format, option.rank, core=option.form, rows=option.rows)


def choices_of(
    module: int,
    factors: ScaledFactors,
    private: Mapping[str, Curve],
    norm: float,
    blocks: Sequence[BlockMeter],
    formats: Sequence[str],
) -> ModuleChoices:
    """The chain of one module of one task.

    Args:
        factors: (A, B, scale). private, norm: as a survey measured them.
        blocks: of the module's basis. formats: of cores.

    Raises:
        ValueError: a value does not fit a format.
    """
    a, b, scale = factors
    rank = a.shape[0]
    cores: list[CoreOption] = []
    carried = 0.0
    for block in blocks:
        projection = block.project(a, b, scale)
        cores += block.options(projection, rank, formats)
        carried = max(carried, float(projection.captured[-1, -1]))
    return ModuleChoices(module, private, cores, norm, carried)
