"""Grow a module's shared basis for new tasks: rows behind the old ones, which stay as they are.

What the old rows U, V do not hold of the new tasks' delta_W is (I - P_U) delta_W on the left and
delta_W (I - P_V) on the right. The leading directions of both, over all new tasks, are orthogonal to
the old rows, and so they can stand behind them in one block: an old core names its leading rows and
decodes to the same numbers. How many rows pay is decided by a price per byte, as in ``sharing``: a
row's bytes count once, what the tasks save by it counts for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_vlora.adapters.collection import Module
from vllm_vlora.editing.projection import BlockMeter, ModuleChoices, Projection, Rows
from vllm_vlora.fitting.orthonormal import OrthonormalBasis
from vllm_vlora.fitting.whitening import Metric
from vllm_vlora.planning.allocation import bisect_price, lower_hull
from vllm_vlora.planning.joint_curves import JointCurve, core_nbytes, rows_nbytes, widths_path
from vllm_vlora.quantize import PackedMatrix, row_nbytes, stack_rows, unpack
from vllm_vlora.representations.spec import BasisSpec
from vllm_vlora.representations.stored import Basis

# Directions carried beside those wanted while the new tasks are merged one by one.
_OVERSAMPLE = 16
# Squares of the singular values of unit-normalised updates: below this is rounding.
_LEAST_ENERGY = 1e-10
# A module that gains more per byte than the others may grow by more than its share of the bytes.
_SHARE_SLACK = 4
# Growth is decided among this many widths.
_WIDTHS = 24


# --- directions ----------------------------------------------------------------------------------


class ResidualFit:
    """The leading directions of what a block does not hold of some tasks, one task after another.

    Every task counts by the share of its delta_W that the block leaves. Memory is
    16 (d_in + d_out) (most + 16) bytes, whatever the number of tasks.

    Args:
        basis: packed. rows: of the block. most_out, most_in: directions wanted.
    """

    def __init__(
        self, basis: Basis, rows: Rows, metric: Metric, most_out: int, most_in: int
    ) -> None:
        self._metric = metric
        u, v = basis.u.row_slice(*rows[:2]), basis.v.row_slice(*rows[2:])
        self._basis = OrthonormalBasis(u, v, metric)
        self._u, self._v = unpack(u).double(), unpack(v).double()
        self._most = most_out, most_in
        self._left = torch.zeros(0, self._u.shape[1], dtype=torch.float64)
        self._right = torch.zeros(0, self._v.shape[1], dtype=torch.float64)

    def add(self, a: torch.Tensor, b: torch.Tensor, scale: float, norm: float) -> None:
        """Count one task in; ``norm`` is its ||delta_W||^2 of this module, in the metric."""
        if norm <= 0:
            return
        white_a, white_b_t = self._metric.factors(a, b)
        q_u, q_v = self._basis.q_u, self._basis.q_v
        root = scale / math.sqrt(norm)
        r_a = torch.linalg.qr(white_a.T)[1]
        r_b = torch.linalg.qr(white_b_t.T)[1]
        left = root * r_a @ (white_b_t - (white_b_t @ q_u) @ q_u.T)
        right = root * r_b @ (white_a - (white_a @ q_v) @ q_v.T)
        self._left = _merge(self._left, left, self._most[0] + _OVERSAMPLE)
        self._right = _merge(self._right, right, self._most[1] + _OVERSAMPLE)

    def directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for U transposed and for V, float32: orthonormal, and orthogonal to the block's."""
        left = self._metric.unwhiten_b_t(_strong(self._left, self._most[0]))
        right = self._metric.unwhiten_a(_strong(self._right, self._most[1]))
        return _beside(left, self._u), _beside(right, self._v)


def _merge(kept: torch.Tensor, rows: torch.Tensor, limit: int) -> torch.Tensor:
    """At most ``limit`` orthogonal rows with nearly the Gram matrix of all rows (sequential SVD)."""
    q, r = torch.linalg.qr(torch.cat([kept, rows]).T)
    left, sigma, _ = torch.linalg.svd(r, full_matrices=False)
    return (q @ (left * sigma)[:, :limit]).T


def _strong(rows: torch.Tensor, most: int) -> torch.Tensor:
    energy = rows.square().sum(dim=1)
    return rows[: min(most, int((energy > _LEAST_ENERGY).sum()))]


def _beside(rows: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows of which the first n span, with the block, what the first n given ones do."""
    q = torch.linalg.qr(block.T)[0]
    # Twice is enough (Giraud and others, 2005), also where a metric has bent the rows.
    for _ in range(2):
        rows = rows - (rows @ q) @ q.T
    return torch.linalg.qr(rows.T)[0].T.float().contiguous()


def grown(basis: Basis, u: PackedMatrix, v: PackedMatrix) -> Basis:
    """The basis with these rows behind its own."""
    return Basis(stack_rows([basis.u, u]), stack_rows([basis.v, v]))


# --- what growing offers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What rows more of one module's basis would save its tasks.

    Attributes:
        module: its name. tasks: those that adapt it.
        grown: rows more of U and of V, rising; the first is none at all.
        rows_nbytes: (widths,) what these rows take.
        base: of each task, (options, 2) bytes and relative losses without growing.
        cores: (tasks, formats, widths, 2) the same of cores that use all rows of a width.
    """

    module: str
    tasks: tuple[int, ...]
    grown: list[tuple[int, int]]
    rows_nbytes: np.ndarray
    base: list[np.ndarray]
    cores: np.ndarray

    def decide(self, price: float) -> tuple[int, np.ndarray]:
        """The width that is best at a price per byte, and (tasks, 2) bytes and losses at it."""
        price_of = np.array([price, 1.0])
        without = [options @ price_of for options in self.base]
        least = np.array([costs.min() for costs in without])
        with_core = (self.cores @ price_of).transpose(0, 2, 1)
        formats = with_core.argmin(axis=2)
        best = np.minimum.accumulate(with_core.min(axis=2), axis=1)
        total = np.minimum(best, least[:, None]).sum(axis=0) + price * self.rows_nbytes
        width = int(total.argmin())
        spent = np.empty((len(self.tasks), 2))
        for place, costs in enumerate(without):
            if best[place, width] < least[place]:
                at = int(with_core[place, : width + 1].min(axis=1).argmin())
                spent[place] = self.cores[place, formats[place, at], at]
            else:
                spent[place] = self.base[place][int(costs.argmin())]
        return width, spent


def growth_limits(
    module: Module, basis: BasisSpec, tasks: Sequence[int], share: float
) -> tuple[int, int]:
    """(rows of U, rows of V) by which a basis could grow at most.

    Args:
        share: bytes that are this module's even share of the budget.
    """
    ranks = dict(zip(module.tasks, module.ranks))
    total = sum(min(ranks[task], module.d_in, module.d_out) for task in tasks)
    row = row_nbytes(basis.format, module.d_out) + row_nbytes(basis.format, module.d_in)
    most = min(total, int(share * _SHARE_SLACK / row))
    return min(most, module.d_out - basis.k_out), min(most, module.d_in - basis.k_in)


def make_offer(
    module: Module,
    basis: BasisSpec,
    block: BlockMeter,
    projections: Sequence[Projection],
    choices: Sequence[ModuleChoices],
    tasks: tuple[int, ...],
    weights: Sequence[float],
    formats: Sequence[str],
) -> Offer:
    """Measure what every growth of a module would save.

    Args:
        basis: as it is. block: with all the rows that it could grow by.
        projections: of these tasks on that block. choices: their chains without it.
        weights: 1 / ||delta_W||^2 of each task. formats: of cores.
    """
    k_out = basis.k_out - block.rows[0]
    k_in = basis.k_in - block.rows[2]
    ranks = dict(zip(module.tasks, module.ranks))
    captured = [projection.captured for projection in projections]
    total = torch.zeros_like(captured[0])
    for part, projection in zip(captured, projections):
        if projection.norm > 0:
            total += part / projection.norm
    cores = 2.0 * sum(ranks[task] for task in tasks)
    row_out = row_nbytes(basis.format, module.d_out) + cores
    row_in = row_nbytes(basis.format, module.d_in) + cores
    path = widths_path(total[k_out - 1 :, k_in - 1 :], row_out, row_in)
    path = [path[0], *path[1 :: -(-len(path) // _WIDTHS)]]
    widths = [(k_out - 1 + more_out, k_in - 1 + more_in) for more_out, more_in in path]
    rows = [(more_out - 1, more_in - 1) for more_out, more_in in path]
    rows_size = [
        rows_nbytes(BasisSpec(*more, basis.format), module.d_out, module.d_in) for more in rows
    ]
    specs = [BasisSpec(*width, basis.format) for width in widths]
    places = torch.tensor(widths).T - 1
    curve = JointCurve(
        specs,
        torch.stack([part[places[0], places[1]] for part in captured]).float(),
        torch.tensor([projection.norm for projection in projections], dtype=torch.float64),
    )
    by_rank = [ranks[task] for task in tasks]
    scale = np.array(weights)[:, None]
    values = np.empty((len(tasks), len(formats), len(widths), 2))
    for number, format in enumerate(formats):
        sizes = {r: [core_nbytes(spec, r, format) for spec in specs] for r in set(by_rank)}
        values[:, number, :, 0] = [sizes[rank] for rank in by_rank]
        values[:, number, :, 1] = curve.losses(format, by_rank, False).numpy() * scale
    base = [options_hull(choice, weight) for choice, weight in zip(choices, weights)]
    return Offer(module.name, tasks, rows, np.array(rows_size, dtype=float), base, values)


def options_hull(choices: ModuleChoices, weight: float) -> np.ndarray:
    """(options, 2) bytes and weighted losses of the options that matter at some price."""
    options = choices.options(
        tuple(choices.private), tuple(dict.fromkeys(c.format for c in choices.cores))
    )
    points = [(option.nbytes, option.loss * weight) for option in options]
    return np.array([points[i] for i in lower_hull(points)], dtype=float)


# --- deciding ------------------------------------------------------------------------------------


def decide_growth(
    offers: Sequence[Offer],
    fixed: Iterable[tuple[int, np.ndarray]],
    nbytes: float | None,
    limit: float | None,
) -> dict[str, tuple[int, int]]:
    """How far each module grows, in rows of U and of V; those that do not are left out.

    Decided at the price at which all tasks together take ``nbytes``, or none loses more than ``limit``.

    Args:
        fixed: (task, its options' bytes and losses) of modules that cannot grow.
        limit: the largest relative loss of a task; in place of ``nbytes``.
    """
    others = list(fixed)

    def decide(price: float) -> tuple[dict[str, tuple[int, int]], dict[int, np.ndarray], float]:
        rows, spent, size = dict[str, tuple[int, int]](), dict[int, np.ndarray](), 0.0
        for offer in offers:
            width, by_task = offer.decide(price)
            size += offer.rows_nbytes[width]
            if width:
                rows[offer.module] = offer.grown[width]
            for task, part in zip(offer.tasks, by_task):
                spent[task] = spent.get(task, 0.0) + part
        for task, options in others:
            best = options[int((options @ np.array([price, 1.0])).argmin())]
            spent[task] = spent.get(task, 0.0) + best
        return rows, spent, size + sum(part[0] for part in spent.values())

    def enough(price: float) -> bool:
        """Whether the price is high enough, or under a limit of loss too high."""
        _, spent, size = decide(price)
        if limit is not None:
            return any(part[1] > limit for part in spent.values())
        assert nbytes is not None
        return size <= nbytes

    low, high = bisect_price(enough)
    return decide(low if limit is not None else high)[0]
