"""What storing one module on a shared basis of any width loses, and the bytes it takes.

The rows of a packed basis are orthonormalised in order, so one core at full width gives the error of
every smaller basis, whatever its two widths. Losses are squared norms in the module's ``Metric``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from vllm_vlora.fitting.whitening import FROBENIUS, Metric
from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, as_stored, row_nbytes, unpack
from vllm_vlora.representations.factors import ScaledFactors, gram_cholesky
from vllm_vlora.representations.joint import core_shape
from vllm_vlora.representations.spec import BasisSpec

# What rounding one matrix loses of its squared norm, measured on Gaussian matrices. Factors are two.
_ROUNDING = {
    "float32": 0.0,
    "bfloat16": 2.75e-6,
    "float16": 4.5e-8,
    "int8": 6.0e-5,
    "nf4": 9.0e-3,
    "nf4-dq": 9.0e-3,
}


@dataclass(frozen=True)
class JointCurve:
    """What shared bases of several widths, in one format, capture of each task's delta_W.

    Attributes:
        bases: the widths that were measured, each at least as wide as the one before.
        captured: part of ||delta_W||^2, (tasks of the group, bases) float32.
        norms: ||delta_W||^2 of every task of the group, float64.
    """

    bases: list[BasisSpec]
    captured: torch.Tensor
    norms: torch.Tensor

    def losses(self, core_format: str, ranks: Sequence[int], factored: bool) -> torch.Tensor:
        """||delta_W' - delta_W||^2 with least-squares cores in this format, (tasks, bases) float64.

        The rounding of the cores is the expected one.
        """
        captured = self.captured.double()
        noise = _ROUNDING[core_format]
        distinct, places = torch.tensor(ranks).unique(return_inverse=True)
        by_rank = [
            [core_shape(rank, b.k_out, b.k_in, factored)[0] == "factors" for b in self.bases]
            for rank in distinct.tolist()
        ]
        pairs = torch.tensor(by_rank)[places]
        rounding = captured * noise * (1 + pairs.double())
        return (self.norms[:, None] - captured).clamp(min=0) + rounding


class JointMeter:
    """What each width of a packed basis captures of a task.

    Args:
        u: U transposed, packed, (k_out, d_out). v: V, packed, (k_in, d_in).
        metric: of the module.
    """

    def __init__(self, u: PackedMatrix, v: PackedMatrix, metric: Metric = FROBENIUS) -> None:
        self._metric = metric
        self._u = _OrthonormalRows.of(metric.b_t(unpack(u)))
        self._v = _OrthonormalRows.of(metric.a(unpack(v)))

    @classmethod
    def fitted(cls, white_u: torch.Tensor, white_v: torch.Tensor, metric: Metric) -> JointMeter:
        """Of a basis before it is packed, whose rows are orthonormal in the metric."""
        meter = cls.__new__(cls)
        meter._metric = metric
        meter._u, meter._v = _OrthonormalRows(white_u), _OrthonormalRows(white_v)
        return meter

    def captured(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """(k_out, k_in) float64: [i, j] is the part of ||delta_W||^2 that i+1 and j+1 rows hold.

        With least-squares cores (``dual_rows``) that were not rounded, the rest is the loss.
        """
        (left,), (right,) = self._sides([(a, b, scale)])
        return (left.T @ right).square().cumsum(0).cumsum(1)

    def captured_between(
        self, factors: Sequence[ScaledFactors], outs: Sequence[int], ins: Sequence[int]
    ) -> torch.Tensor:
        """(tasks, outs, ins) float64: ``captured`` at every pair of these rising widths."""
        left, right = self._sides(factors)
        left_grams = _gram_prefixes(left, outs).transpose(0, 1).flatten(2)
        right_grams = _gram_prefixes(right, ins).transpose(0, 1).flatten(2)
        return left_grams @ right_grams.mT

    def captured_at(
        self, factors: Sequence[ScaledFactors], widths: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """(tasks, widths) float64: ``captured`` at these (k_out, k_in), neither of which ever falls.

        With L and R the core's factors cut to a width, ||L^T R||^2 = tr((L L^T) (R R^T)): small sums
        in place of a whole core.
        """
        left, right = self._sides(factors)
        left_grams = _gram_prefixes(left, [k_out for k_out, _ in widths])
        right_grams = _gram_prefixes(right, [k_in for _, k_in in widths])
        return (left_grams * right_grams).sum(dim=(2, 3)).T

    def _sides(self, factors: Sequence[ScaledFactors]) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (tasks, r, k_out) and (tasks, r, k_in) float64 of the cores on the orthonormal rows."""
        count = len(factors)
        a = torch.cat([a for a, _, _ in factors]).float()
        b_t = torch.cat([b.T for _, b, _ in factors]).float()
        scales = torch.tensor(
            [scale for _, _, scale in factors], dtype=torch.float64, device=a.device
        )
        left = self._u.coordinates(self._metric.b_t(b_t)).unflatten(0, (count, -1))
        right = self._v.coordinates(self._metric.a(a)).unflatten(0, (count, -1))
        return left * scales[:, None, None], right


@dataclass(frozen=True)
class _OrthonormalRows:
    """Rows, orthonormalised in their order, by what their products with other rows become.

    Attributes:
        factor: R of the rows, R^T Q; None where they are orthonormal.
    """

    rows: torch.Tensor
    factor: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: torch.Tensor) -> _OrthonormalRows:
        """By a Cholesky factor of the Gram matrix, or else by QR (``gram_cholesky``)."""
        factor = gram_cholesky(rows, torch.float32)
        if factor is None:
            return cls(torch.linalg.qr(rows.double().T)[0].T.float())
        return cls(rows, factor.mT.float())

    def coordinates(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, k) float64: products of rows (n, d) with the orthonormal ones."""
        products = rows @ self.rows.T
        if self.factor is not None:
            products = torch.linalg.solve_triangular(self.factor, products, upper=True, left=False)
        return products.double()


def _gram_prefixes(rows: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """(ends, n, r, r): rows[..., :end] @ rows[..., :end].mT for each of the rising ends."""
    starts = [0, *ends[:-1]]
    parts = [rows[..., start:end] for start, end in zip(starts, ends)]
    return torch.stack([part @ part.mT for part in parts]).cumsum(0)


class FittedWidths(NamedTuple):
    """What a fitted basis captures before it is packed.

    Attributes:
        pairs: (k_out, k_in) worth considering. captured: of ||delta_W||^2, (tasks, pairs) float32.
        energies: of U and of V, what the first rows hold of all tasks together, at each of
            ``widths_to_try``; float64.
    """

    pairs: list[tuple[int, int]]
    captured: torch.Tensor
    energies: tuple[torch.Tensor, torch.Tensor]


# From this length on, what rounding rows does to what they capture is told by how much it changes them.
_LONG = 1024


def captured_packed(
    fitted: FittedWidths, u_t: torch.Tensor, v: torch.Tensor, format: str
) -> torch.Tensor | None:
    """What is left of ``fitted.captured`` when the orthonormal rows are packed, as it is expected.

    Changes e with |e|^2 = c of k orthonormal rows of length d: what lies in their span, k / d of it,
    only turns them; the rest makes their Gram matrix (1 + c (1 - k / d)) I, and what they capture as
    much less.

    Args:
        u_t: U transposed (k_out, d_out). v: (k_in, d_in).

    Returns:
        None where rows are too short for this, and it is to be measured.
    """
    kept = torch.ones(len(fitted.pairs), dtype=torch.float64)
    for side, (rows, energy) in enumerate(zip((u_t, v), fitted.energies)):
        length = rows.shape[1]
        if length < _LONG:
            return None
        tried = widths_to_try(len(rows))
        some = rows[torch.tensor(tried, device=rows.device) - 1]
        changed = (as_stored(some, format) - some).square().sum(1).double().cpu()
        # Every row counts by what it holds, and stands for those since the last one tried.
        parts = energy.diff(prepend=energy.new_zeros(1)).clamp(min=0)
        changed = (changed * parts).cumsum(0) / parts.cumsum(0).clamp(min=1e-300)
        ends = [pair[side] for pair in fitted.pairs]
        outside = 1 - torch.tensor(ends, dtype=torch.float64) / length
        kept /= 1 + changed[[tried.index(end) for end in ends]] * outside
    return (fitted.captured * kept).float()


def widths_to_try(most: int) -> list[int]:
    """Numbers of components from 1 to ``most``, each about a sixteenth above the one before."""
    widths = [1]
    while widths[-1] < most:
        widths.append(min(widths[-1] + max(1, widths[-1] // 16), most))
    return widths


def widths_path(captured: torch.Tensor, row_out: float, row_in: float) -> list[tuple[int, int]]:
    """``path_between`` of all widths.

    Args:
        captured: (k_out, k_in), as of ``JointMeter`` summed over the tasks.
    """
    outs, ins = map(widths_to_try, captured.shape)
    places = torch.tensor(outs)[:, None] - 1, torch.tensor(ins) - 1
    return path_between(captured[places], outs, ins, row_out, row_in)


def path_between(
    captured: torch.Tensor, outs: Sequence[int], ins: Sequence[int], row_out: float, row_in: float
) -> list[tuple[int, int]]:
    """Pairs (k_out, k_in) worth considering, each grown from the one before on its better side.

    Args:
        captured: (outs, ins), by the widths of ``widths_to_try`` on either side.
        row_out, row_in: bytes that one more row on either side takes, its share of the cores
            included.
    """
    rows = captured.tolist()
    i = j = 0
    path = [(outs[0], ins[0])]
    while i + 1 < len(outs) or j + 1 < len(ins):
        steps = []
        for grow_out, grow_in in ((1, 0), (0, 1), (1, 1)):
            to_i, to_j = min(i + grow_out, len(outs) - 1), min(j + grow_in, len(ins) - 1)
            nbytes = (outs[to_i] - outs[i]) * row_out + (ins[to_j] - ins[j]) * row_in
            if nbytes > 0:
                steps.append(((rows[to_i][to_j] - rows[i][j]) / nbytes, to_i, to_j))
        _, i, j = max(steps)
        path.append((outs[i], ins[j]))
    return path


def joint_nbytes(
    basis: BasisSpec,
    d_out: int,
    d_in: int,
    ranks: Sequence[int],
    core_format: str,
    factored: bool = False,
) -> int:
    """Bytes of one module's basis and of the cores of tasks with these ranks."""
    cores = sum(
        count * core_nbytes(basis, rank, core_format, factored)
        for rank, count in Counter(ranks).items()
    )
    return rows_nbytes(basis, d_out, d_in) + cores


@lru_cache(maxsize=1 << 16)
def rows_nbytes(basis: BasisSpec, d_out: int, d_in: int) -> int:
    """Bytes of one module's basis."""
    rows = basis.k_out * row_nbytes(basis.format, d_out)
    return rows + basis.k_in * row_nbytes(basis.format, d_in)


@lru_cache(maxsize=1 << 16)
def core_nbytes(basis: BasisSpec, rank: int, core_format: str, factored: bool = False) -> int:
    """Bytes of the core of one task of this rank."""
    form, kept, elements = core_shape(rank, basis.k_out, basis.k_in, factored)
    if core_format in FLOAT_DTYPES:
        return elements * FLOAT_DTYPES[core_format].itemsize
    if form == "dense":
        return basis.k_out * row_nbytes(core_format, basis.k_in)
    return kept * (row_nbytes(core_format, basis.k_in) + row_nbytes(core_format, basis.k_out))
