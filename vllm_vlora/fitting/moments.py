"""Second moments H = E[x x^T], gathered row by row in bounded memory.

Up to a width the whole matrix is kept. Beyond it a moment is kept as a few strong directions and a
diagonal, found in one pass: Y = sum x x^T Omega for a fixed orthonormal test matrix Omega (d, p)
gives the Nystroem approximation Y (Omega^T Y)^+ Y^T, which never exceeds H, so that the diagonal of
what it leaves is not negative (Tropp, Yurtsever, Udell and Cevher, 2017, arXiv 1706.05736,
algorithm 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_vlora.fitting.whitening import Whitener, Whitening, whiten

OVERSAMPLING = 64
"""Columns of the test matrix beyond the directions that are kept; they make these accurate."""

_BLOCK = 256


@dataclass(frozen=True)
class FullMoment:
    """H as it is: ``matrix`` (d, d) float32, symmetric."""

    matrix: torch.Tensor

    @property
    def mean(self) -> float:
        """The mean of the diagonal, in squared units of x."""
        return float(self.matrix.double().diagonal().mean())

    def dense(self) -> torch.Tensor:
        """H (d, d) float64."""
        return self.matrix.double()

    def whiten(self, damping: float) -> Whitening:
        """A square root of H / mean + damping * I."""
        return whiten(self.matrix, damping)


@dataclass(frozen=True)
class LowRankMoment:
    """H = Q^T diag(values) Q + diag(rest).

    Attributes:
        directions: Q (p, d) float32, rows orthonormal.
        values: (p,) float32, not negative, falling.
        rest: (d,) float32, not negative: the diagonal of what the directions leave.
    """

    directions: torch.Tensor
    values: torch.Tensor
    rest: torch.Tensor

    @property
    def mean(self) -> float:
        """The mean of the diagonal, in squared units of x."""
        return float(self.values.double().sum() + self.rest.double().sum()) / len(self.rest)

    def dense(self) -> torch.Tensor:
        """H (d, d) float64; for tests and small d."""
        q = self.directions.double()
        return (q.T * self.values.double()) @ q + torch.diag(self.rest.double())

    def whiten(self, damping: float) -> Whitening:
        """A square root of H / mean + damping * I."""
        return Whitener.from_directions(self.directions, self.values, self.rest, damping)


Moment = FullMoment | LowRankMoment


class FullSum:
    """Adds rows up to a full moment; 4 d^2 bytes."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Add sum x x^T over rows (n, d)."""
        rows = rows.float()
        # The lower triangle is the upper one's mirror, so most of it is left out.
        for start in range(0, rows.shape[1], _BLOCK):
            block = rows[:, start : start + _BLOCK]
            self._sum[start : start + _BLOCK, start:].addmm_(block.T, rows[:, start:])

    def moment(self, count: int) -> FullMoment:
        """The sum over ``count``."""
        upper = (self._sum.cpu() / count).triu_()
        return FullMoment(upper + upper.triu(1).T)


class SketchSum:
    """Adds rows up to a low-rank moment; 4 d (directions + OVERSAMPLING + 1) bytes."""

    def __init__(self, width: int, directions: int, device: torch.device) -> None:
        self._directions = directions
        self._columns = min(width, directions + OVERSAMPLING)
        self._sketch = torch.zeros(width, self._columns, device=device)
        self._diagonal = torch.zeros(width, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Add sum x x^T Omega and sum x^2 over rows (n, d)."""
        rows = rows.float()
        omega = _test_matrix(len(self._diagonal), self._columns, rows.device)
        self._sketch.addmm_(rows.T, rows @ omega)
        self._diagonal += rows.square().sum(0)

    def moment(self, count: int) -> LowRankMoment:
        """The sum over ``count``, as its strongest directions and a diagonal."""
        sketch, diagonal = (
            self._sketch.cpu().double() / count,
            self._diagonal.cpu().double() / count,
        )
        omega = _test_matrix(*sketch.shape, torch.device("cpu")).double()
        q, values = _nystroem(sketch, omega)
        q, values = q[:, : self._directions], values[: self._directions]
        rest = (diagonal - (q.square() * values).sum(1)).clamp(min=0)
        return LowRankMoment(q.T.float().contiguous(), values.float(), rest.float())


def new_sum(width: int, full: int, directions: int, device: torch.device) -> FullSum | SketchSum:
    """A full sum up to the width ``full``, a sketch of ``directions`` directions beyond."""
    return FullSum(width, device) if width <= full else SketchSum(width, directions, device)


@lru_cache(maxsize=8)
def _test_matrix(width: int, columns: int, device: torch.device) -> torch.Tensor:
    """Omega (width, columns) float32 with orthonormal columns: the same in every process."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.float().to(device)


def _nystroem(sketch: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors (d, p) and falling eigenvalues (p,) of Y (Omega^T Y)^+ Y^T, float64."""
    # A small shift, taken off again at the end, keeps the factor below definite. The sums are
    # float32, so the shift is of that precision.
    shift = torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(sketch))
    if shift == 0:
        return omega, torch.zeros(omega.shape[1], dtype=omega.dtype)
    shifted = sketch + shift * omega
    inner = omega.T @ shifted
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    kept = values > shift / 2
    half = shifted @ (vectors[:, kept] / values[kept].sqrt())
    q, stretch, _ = torch.linalg.svd(half, full_matrices=False)
    return q, (stretch.square() - shift).clamp(min=0)
