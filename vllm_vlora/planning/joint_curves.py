"""What storing one module on a shared basis of any width loses, and the bytes it takes.

The rows of a packed basis are orthonormalised in order, so one core at full width gives the error of
every smaller basis, whatever its two widths. Losses are squared norms in the module's ``Metric``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_vlora.fitting.orthonormal import OrthonormalBasis
from vllm_vlora.fitting.whitening import FROBENIUS, Metric
from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, row_nbytes
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
        by_rank = {
            rank: [core_shape(rank, b.k_out, b.k_in, factored)[0] == "factors" for b in self.bases]
            for rank in set(ranks)
        }
        pairs = torch.tensor([by_rank[rank] for rank in ranks])
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
        # Orthonormal to float64's rounding; what single factors capture is kept in float32 anyway.
        self._basis = OrthonormalBasis(u, v, metric, torch.float32)

    def energy(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """(k_out, k_in) float64: the squared entries of the core on the orthonormal rows."""
        left, right = self._sides(a, b, scale)
        return (left.T @ right).square()

    def captured(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """(k_out, k_in) float64: [i, j] is the part of ||delta_W||^2 that i+1 and j+1 rows hold.

        With least-squares cores (``dual_rows``) that were not rounded, the rest is the loss.
        """
        return self.energy(a, b, scale).cumsum(0).cumsum(1)

    def captured_at(
        self, a: torch.Tensor, b: torch.Tensor, scale: float, widths: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """(widths,) float64: ``captured`` at these (k_out, k_in), neither of which ever falls.

        With L and R the core's factors cut to a width, ||L^T R||^2 = tr((L L^T) (R R^T)): small sums
        in place of a whole core.
        """
        left, right = self._sides(a, b, scale)
        left_grams = _gram_prefixes(left, [k_out for k_out, _ in widths])
        right_grams = _gram_prefixes(right, [k_in for _, k_in in widths])
        return (left_grams * right_grams).sum(dim=(1, 2))

    def _sides(
        self, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (r, k_out) and (r, k_in) float64 of the core on the orthonormal rows."""
        return self._basis.sides(*self._metric.factors(a, b, torch.float32), scale)


def _gram_prefixes(rows: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """(ends, r, r): rows[:, :end] @ rows[:, :end].T for each of the rising ends."""
    starts = [0, *ends[:-1]]
    grams = [rows[:, start:end] @ rows[:, start:end].T for start, end in zip(starts, ends)]
    return torch.stack(grams).cumsum(0)


def widths_path(captured: torch.Tensor, row_out: float, row_in: float) -> list[tuple[int, int]]:
    """Pairs (k_out, k_in) worth considering, each grown from the one before on its better side.

    Args:
        captured: (k_out, k_in), as of ``JointMeter`` summed over the tasks.
        row_out, row_in: bytes that one more row on either side takes, its share of the cores
            included.
    """
    most_out, most_in = captured.shape
    k_out = k_in = 1
    path = [(1, 1)]
    while k_out < most_out or k_in < most_in:
        here = float(captured[k_out - 1, k_in - 1])
        steps = []
        for grow_out, grow_in in ((1, 0), (0, 1), (1, 1)):
            to_out = min(k_out + grow_out * max(1, k_out // 16), most_out)
            to_in = min(k_in + grow_in * max(1, k_in // 16), most_in)
            nbytes = (to_out - k_out) * row_out + (to_in - k_in) * row_in
            if nbytes > 0:
                gain = float(captured[to_out - 1, to_in - 1]) - here
                steps.append((gain / nbytes, to_out, to_in))
        _, k_out, k_in = max(steps)
        path.append((k_out, k_in))
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
