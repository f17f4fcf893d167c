"""The ``flat`` representation: each task is a point in a module's principal components (vlora).

A and B transposed of every task are flattened; what is shared is their means and leading principal
components, what a task has of its own is k numbers a side. The components depend on how a factor pair
is turned (A and B give the same delta_W as R A and B R^-1), so this suits adapters that were trained
from one common start.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_vlora.fitting.flat_basis import FlatFit
from vllm_vlora.fitting.whitening import Metric
from vllm_vlora.planning.changes import Sides, changes_of, grams_of
from vllm_vlora.quantize import FLOAT_DTYPES, is_finite, row_nbytes, unpack
from vllm_vlora.representations.factors import ScaledFactors
from vllm_vlora.representations.flat import encode_flat, pack_flat
from vllm_vlora.representations.spec import FlatSpec
from vllm_vlora.representations.stored import FlatBasis, StoredModule

_WIDTHS = 10
# Tasks that are measured at once.
_BATCH = 16


@dataclass(frozen=True)
class FlatCurve:
    """Losses of all tasks of a module on flat bases of several widths, in one format.

    Attributes:
        specs: the widths. losses: ||delta_W' - delta_W||^2 in the metric, (tasks, specs) float64.
        loadings_format: number format of the tasks' own numbers.
    """

    specs: list[FlatSpec]
    losses: torch.Tensor
    loadings_format: str


@dataclass(frozen=True)
class FlatGroup:
    """The tasks of a module on a flat basis, and format label -> curve."""

    tasks: tuple[int, ...]
    curves: Mapping[str, FlatCurve]


def flat_rows(fit: FlatFit) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and components stacked as stored: ((k + 1) rank, d_out) and ((k + 1) rank, d_in)."""
    u = torch.cat([fit.mean_b[None], fit.components_b])
    v = torch.cat([fit.mean_a[None], fit.components_a])
    return u.flatten(0, 1), v.flatten(0, 1)


def flat_nbytes(spec: FlatSpec, d_out: int, d_in: int) -> int:
    """Bytes of a module's flat basis."""
    rows_u, rows_v = (spec.k_out + 1) * spec.rank, (spec.k_in + 1) * spec.rank
    return rows_u * row_nbytes(spec.format, d_out) + rows_v * row_nbytes(spec.format, d_in)


def loadings_nbytes(spec: FlatSpec, format: str) -> int:
    """Bytes of one task's own numbers of one module."""
    return (spec.k_out + spec.k_in) * FLOAT_DTYPES[format].itemsize


def flat_widths(most: int) -> list[int]:
    """Numbers of components worth considering, 1 .. most, at most ten of them."""
    return sorted({max(1, round(most * (i + 1) / _WIDTHS)) for i in range(_WIDTHS)})


class FlatProjection:
    """Nearest points to tasks on a packed flat basis, as loadings in a float format."""

    def __init__(self, basis: FlatBasis, format: str) -> None:
        self._rank, self._format = basis.rank, format
        self._sides = [_Side(unpack(matrix).double(), basis.rank) for matrix in (basis.v, basis.u)]

    def __call__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> StoredModule:
        """A task's loadings, least squares on each side."""
        row_a = _padded(a.double(), self._rank)
        row_b = _padded(b.double().T * scale, self._rank)
        side_a, side_b = self._sides
        return encode_flat(
            side_a.loadings(row_a).float(), side_b.loadings(row_b).float(), self._format, self._rank
        )


def _padded(rows: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - rows.shape[0])).flatten()


class _Side:
    def __init__(self, rows: torch.Tensor, rank: int) -> None:
        points = rows.reshape(-1, rank * rows.shape[1])
        self._mean, self._components = points[0], points[1:]
        gram = self._components @ self._components.T
        # Packing leaves the components nearly orthonormal; the trace keeps a zero one solvable.
        floor = 1e-12 * float(gram.diagonal().mean())
        self._gram = gram + max(floor, 1e-30) * torch.eye(
            len(gram), dtype=gram.dtype, device=gram.device
        )

    def loadings(self, row: torch.Tensor) -> torch.Tensor:
        """(k,) of one flattened factor."""
        return torch.linalg.solve(self._gram, self._components @ (row - self._mean))

    def products(self, rows: torch.Tensor) -> torch.Tensor:
        """(tasks, k) with each component, less the mean's, of flattened factors (tasks, rank d)."""
        return (rows - self._mean) @ self._components.T

    def points(self, products: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """(tasks, rank d): the nearest points on the first components, loadings rounded."""
        gram = self._gram[:width, :width].double()
        loadings = torch.linalg.solve(gram, products[:, :width].double().T).T.to(dtype).float()
        return torch.addmm(self._mean, loadings, self._components[:width])


def measure_flat(
    factors: Iterator[ScaledFactors],
    u: torch.Tensor,
    v: torch.Tensor,
    specs: Sequence[FlatSpec],
    loadings_format: str,
    metric: Metric,
) -> FlatCurve | None:
    """What every width loses of every task; widths do not fall from one spec to the next.

    None where the numbers, with the scale alpha / r in them, are too large for a 16-bit format.

    Rows are packed independently, so that one packing at the last width serves all of them.
    """
    if not (is_held(u, specs[-1].format) and is_held(v, specs[-1].format)):
        return None
    meter = _FlatMeter(pack_flat(u, v, specs[-1]), specs, FLOAT_DTYPES[loadings_format], metric)
    losses: list[torch.Tensor] = []
    while batch := list(itertools.islice(factors, _BATCH)):
        losses.append(meter.losses(batch))
    found = torch.cat(losses).cpu()
    # Loadings that overflow.
    return FlatCurve(list(specs), found, loadings_format) if is_finite(found) else None


def is_held(matrix: torch.Tensor, format: str) -> bool:
    """Whether no value is too large for a number format; quantised ones scale by the row."""
    dtype = FLOAT_DTYPES.get(format)
    return dtype is None or float(matrix.abs().max()) <= torch.finfo(dtype).max


class _FlatMeter:
    """What each width of one packed flat basis loses of some tasks at a time.

    One task at a time, the components would be read from memory for each.
    """

    def __init__(
        self, basis: FlatBasis, specs: Sequence[FlatSpec], dtype: torch.dtype, metric: Metric
    ) -> None:
        self._specs, self._dtype, self._metric, self._rank = specs, dtype, metric, basis.rank
        self._side_a, self._side_b = (
            _Side(unpack(matrix), basis.rank) for matrix in (basis.v, basis.u)
        )

    def losses(self, batch: Sequence[ScaledFactors]) -> torch.Tensor:
        """||delta_W' - delta_W||^2 in the metric, (tasks, specs) float64."""
        rows_a = torch.stack([_padded(a.float(), self._rank) for a, _, _ in batch])
        rows_b = torch.stack([_padded(b.T.float() * scale, self._rank) for _, b, scale in batch])
        rows = self._unflattened(rows_a, rows_b)
        grams = grams_of(rows, self._metric)
        right_a, right_b = self._side_a.products(rows_a), self._side_b.products(rows_b)
        losses = []
        for spec in self._specs:
            points_a = self._side_a.points(right_a, spec.k_in, self._dtype)
            points_b = self._side_b.points(right_b, spec.k_out, self._dtype)
            points = self._unflattened(points_a, points_b)
            # D of all terms together is what the point lacks of the update.
            changed = changes_of(rows, grams, points, self._metric).inner.sum((1, 2))
            losses.append(changed.clamp_(min=0))
        return torch.stack(losses, dim=1)

    def _unflattened(self, *sides: torch.Tensor) -> Sides:
        """Flattened factors as (tasks, rank, d)."""
        return tuple(side.unflatten(1, (self._rank, -1)) for side in sides)
