"""What storing one module loses, for every choice there is, without trying them one by one.

- ``measure_private``: rows are packed independently, so quantising the balanced SVD factors once at
  full rank gives the error of every truncation from small Gram matrices.
- ``JointMeter``: the rows of a packed basis are orthonormalised in order, so one core at full width
  gives the error of every shorter basis.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_vlora.allocation import Point
from vllm_vlora.manifest import BasisSpec
from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, pack, row_nbytes, unpack
from vllm_vlora.representations import balanced_svd, core_shape

# Rounding two factors to p significant bits loses about 2 (2^-p)^2 / 6 of the squared norm; measured
# on random cores: 5.5e-6 for bfloat16 (p = 8), 9e-8 for float16 (p = 11).
_CORE_ROUNDING = {"float32": 0.0, "bfloat16": 5.5e-6, "float16": 9e-8}


def squared_norm(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    """||scale * B A||_F^2 in float64 from the factors' Gram matrices."""
    a, b = a.double(), b.double()
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0) * scale**2


@dataclass(frozen=True, slots=True)
class PrivateOption:
    """One way to store one module of one task privately.

    Attributes:
        format: number format. rank: rows kept.
        original: the adapter's own factors rather than its balanced SVD factors.
        nbytes: of the packed factors. loss: ||delta_W' - delta_W||_F^2.
    """

    format: str
    rank: int
    original: bool
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class PrivateCurve:
    """Losses of one module of one task in one format, held compactly between passes.

    Attributes:
        format: number format. row_nbytes: of a row of A and one of B transposed.
        losses: ||delta_W' - delta_W||_F^2 for the first 1, 2, ... balanced SVD factors.
        original_rank, original_loss: the adapter's own factors instead, at their whole rank.
    """

    format: str
    row_nbytes: int
    losses: array[float]
    original_rank: int
    original_loss: float

    @property
    def count(self) -> int:
        """Number of options: the adapter's own factors, then every rank of the SVD factors."""
        return 1 + len(self.losses)

    def option(self, number: int) -> PrivateOption:
        """Option 0 is the adapter's own factors, option t the first t SVD factors."""
        if number == 0:
            rank, loss = self.original_rank, self.original_loss
        else:
            rank, loss = number, self.losses[number - 1]
        return PrivateOption(self.format, rank, number == 0, rank * self.row_nbytes, loss)

    def points(self, weight: float) -> list[Point]:
        """(bytes, weighted loss) of every option."""
        points = [(self.original_rank * self.row_nbytes, self.original_loss * weight)]
        row = self.row_nbytes
        return points + [(rank * row, loss * weight) for rank, loss in enumerate(self.losses, 1)]


def measure_private(
    a: torch.Tensor, b: torch.Tensor, scale: float, formats: Sequence[str], own_format: str
) -> list[PrivateCurve]:
    """Measure every rank in every format.

    Args:
        a: (r, d_in). b: (d_out, r). scale: of B A.
        formats: the formats to try.
        own_format: the one in which the adapter's own factors lose nothing.

    Raises:
        ValueError: a value does not fit a format.
    """
    rank, d_in, d_out = a.shape[0], a.shape[1], b.shape[0]
    norm = squared_norm(a, b, scale)
    svd_a, svd_b, _ = balanced_svd(a, b, scale)
    curves = []
    for format in formats:
        # One packing and one Gram matrix a side serve the SVD factors and the adapter's own.
        exact = format == own_format
        new_a, new_b = (svd_a, svd_b.T) if exact else (torch.cat([svd_a, a]), _cat_rows(svd_b, b))
        kept = svd_a.shape[0]
        packed_a = unpack(pack(new_a, format)).double()
        packed_b = unpack(pack(new_b, format)).double()
        packed_b[kept:] *= scale
        cross = ((packed_b @ b.double()) * (packed_a @ a.double().T)).sum(dim=1) * scale
        gram = (packed_b @ packed_b.T) * (packed_a @ packed_a.T)
        squares = gram[:kept, :kept].cumsum(0).cumsum(1).diagonal()
        losses = (norm - 2 * cross[:kept].cumsum(0) + squares).clamp(min=0).tolist()
        whole = norm - 2 * float(cross[kept:].sum()) + float(gram[kept:, kept:].sum())
        row = row_nbytes(format, d_in) + row_nbytes(format, d_out)
        own_loss = 0.0 if exact else max(whole, 0.0)
        curves.append(PrivateCurve(format, row, array("d", losses), rank, own_loss))
    return curves


def _cat_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([left, right], dim=1).T.contiguous()


@dataclass(frozen=True)
class JointCurve:
    """Losses of all tasks of one module on a shared basis in one format.

    Attributes:
        bases: the widths that were measured. core_format: number format of the cores.
        losses: ||delta_W' - delta_W||_F^2, (tasks of the module, bases) float64.
    """

    bases: list[BasisSpec]
    core_format: str
    losses: torch.Tensor


class JointMeter:
    """What each number of components of a packed basis loses of a task.

    Args:
        u: U transposed, packed, (k_out, d_out). v: V, packed, (k_in, d_in).
        grid: the numbers of components to measure, each cut to k_out and k_in.
    """

    def __init__(self, u: PackedMatrix, v: PackedMatrix, grid: Sequence[int]) -> None:
        self._q_u = torch.linalg.qr(unpack(u).double().T)[0]
        self._q_v = torch.linalg.qr(unpack(v).double().T)[0]
        self._grid = torch.tensor(list(grid))

    def captured(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """Part of ||delta_W||_F^2 that the first k components hold, for each k of the grid.

        With least-squares cores (``dual_rows``) that were not rounded, the rest is the loss.
        """
        left = (self._q_u.T @ b.double()) * scale
        squares = (left @ (a.double() @ self._q_v)).square()
        # An entry (i, j) of the core is kept by every k above both i and j.
        count = max(squares.shape)
        gains = torch.zeros(count, dtype=torch.float64)
        gains[: squares.shape[0]] += squares.tril().sum(dim=1)
        gains[: squares.shape[1]] += squares.triu(1).sum(dim=0)
        return gains.cumsum(0)[self._grid.clamp(max=count) - 1]


def joint_losses(captured: torch.Tensor, norm: float, core_format: str) -> torch.Tensor:
    """||delta_W' - delta_W||_F^2 from what is captured, with the expected rounding of the core."""
    return (norm - captured).clamp(min=0) + _CORE_ROUNDING[core_format] * captured


def component_grid(most: int) -> list[int]:
    """Numbers of components worth considering, 1 .. most: all up to 32, then in steps of 1/16."""
    grid, value = [], 1
    while value < most:
        grid.append(value)
        value += max(1, value // 16)
    return [*grid, most]


def joint_nbytes(
    basis: BasisSpec, d_out: int, d_in: int, ranks: Sequence[int], core_format: str
) -> int:
    """Bytes of one module's basis and of the cores of tasks with these ranks."""
    rows = basis.k_out * row_nbytes(basis.format, d_out)
    rows += basis.k_in * row_nbytes(basis.format, d_in)
    elements = sum(core_shape(rank, basis.k_out, basis.k_in)[2] for rank in ranks)
    return rows + elements * FLOAT_DTYPES[core_format].itemsize
