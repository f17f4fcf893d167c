"""What storing one module privately loses, at every rank and format, without trying them one by one.

Rows are packed independently, so quantising the balanced SVD factors once at full rank gives the error
of every truncation, and of every spread of 4, 3 and 2 bits over the singular directions, from small
Gram matrices. Tasks of one shape are measured together.

Losses are squared norms in the module's ``Metric``: Frobenius, or as the model sees them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from vllm_vlora.fitting.whitening import FROBENIUS, Metric
from vllm_vlora.planning.allocation import Point, pareto_front
from vllm_vlora.planning.changes import Changes, by_rows, changes_of, grams_of
from vllm_vlora.planning.number_formats import NARROW, NARROW_FORMAT, TRELLIS
from vllm_vlora.quantize import (
    as_stored,
    as_stored_narrow,
    narrow_row_nbytes,
    row_nbytes,
    trellis_row_nbytes,
)
from vllm_vlora.representations.factors import ScaledFactors, squared_norm, stacked_svd

# Every cut between 4, 3 and 2 bits up to this rank, about as many cuts above it.
_NARROW_CUTS = 20
# Points of a narrow curve that are kept; the front of a rank-16 module has some 60.
_NARROW_POINTS = 32
# Share of a row's energy that a trellis code of so many bits loses: means over rows of five collections,
# which differ by 2 to 4 %.
_TRELLIS_LOST = {4: 0.0059, 3: 0.0211, 2: 0.0768}
_NOISE_SEED = 0x7E1115


def seen_squared_norm(a: torch.Tensor, b: torch.Tensor, scale: float, metric: Metric) -> float:
    """||scale * B A||^2 in the metric, float64."""
    white_a, white_b_t = metric.factors(a, b)
    return squared_norm(white_a, white_b_t.T, scale)


@dataclass(frozen=True, slots=True)
class PrivateOption:
    """One way to store one module of one task privately.

    Attributes:
        format: number format. rank: rows kept.
        original: the adapter's own factors rather than its balanced SVD factors.
        nbytes: of the packed factors. loss: ||delta_W' - delta_W||^2 in the module's metric.
        bits: rows with 4, 3 and 2 bits; None where all have the format's.
    """

    format: str
    rank: int
    original: bool
    nbytes: int
    loss: float
    bits: tuple[int, int, int] | None = None

    @property
    def is_searched(self) -> bool:
        """Whether its codes are found by a search, which takes its time, and ``loss`` is expected."""
        return self.format == "trellis"


@dataclass(frozen=True, slots=True)
class PrivateCurve:
    """Losses of one module of one task in one format, held compactly between passes.

    Attributes:
        format: number format. row_nbytes: of a row of A and one of B transposed.
        losses: of the first 1, 2, ... balanced SVD factors.
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

    def loss(self, number: int) -> float:
        """Of an option."""
        return self.original_loss if number == 0 else self.losses[number - 1]

    def points(self, weight: float) -> list[Point]:
        """(bytes, weighted loss) of every option."""
        points = [(self.original_rank * self.row_nbytes, self.original_loss * weight)]
        row = self.row_nbytes
        return points + [(rank * row, loss * weight) for rank, loss in enumerate(self.losses, 1)]


@dataclass(frozen=True, slots=True)
class NarrowCurve:
    """The spreads of 4, 3 and 2 bits over the leading SVD factors that nothing smaller beats.

    Attributes:
        format: number format.
        nbytes, losses: of every option. cuts: its rows with 4, 3 and 2 bits, one after another.
    """

    format: str
    nbytes: array[int]
    losses: array[float]
    cuts: array[int]

    @property
    def count(self) -> int:
        """Number of options."""
        return len(self.nbytes)

    def option(self, number: int) -> PrivateOption:
        """The options by rising bytes."""
        n4, n3, n2 = self.cuts[3 * number : 3 * number + 3]
        bits = (n4, n3, n2) if n3 or n2 else None
        nbytes, loss = self.nbytes[number], self.losses[number]
        return PrivateOption(self.format, n4 + n3 + n2, False, nbytes, loss, bits)

    def loss(self, number: int) -> float:
        """Of an option."""
        return self.losses[number]

    def points(self, weight: float) -> list[Point]:
        """(bytes, weighted loss) of every option."""
        return [(nbytes, loss * weight) for nbytes, loss in zip(self.nbytes, self.losses)]


Curve = PrivateCurve | NarrowCurve


def leading_factors(
    a: torch.Tensor, b_t: torch.Tensor, scales: torch.Tensor, metric: Metric
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD factors of each scale * B A in the metric, and their squared norms in it (``stacked_svd``).

    The first t rows of both are the best approximation of rank t that the metric knows (Eckart-Young
    on S_out^T delta_W S_in, taken back).

    Args:
        a: (n, r, d_in). b_t: B transposed, (n, r, d_out). scales: (n,) float64.
    """
    if metric == FROBENIUS:
        return stacked_svd(a, b_t, scales)
    svd_a, svd_b_t, norms = stacked_svd(
        by_rows(metric.a, a.float()), by_rows(metric.b_t, b_t.float()), scales
    )
    return by_rows(metric.unwhiten_a, svd_a), by_rows(metric.unwhiten_b_t, svd_b_t), norms


class Measured(NamedTuple):
    """What storing one module of one task privately loses; ``norm`` is ||delta_W||^2 in the metric."""

    curves: list[Curve]
    norm: float


def measure_private(
    factors: Sequence[ScaledFactors],
    formats: Sequence[str],
    own_format: str,
    metric: Metric = FROBENIUS,
) -> list[Measured]:
    """Measure every rank in every format, of several tasks at once.

    Args:
        factors: (A (r, d_in), B (d_out, r), scale) of each task, all of one shape.
        formats: the number formats to try, and ``NARROW`` or ``TRELLIS``.
        own_format: the one in which the adapters' own factors lose nothing.

    Raises:
        ValueError: a value does not fit a format.
    """
    stack = _Stack(factors, metric)
    by_format: list[Sequence[Curve]] = []
    for format in formats:
        if format in _SPREAD:
            by_format.append(_measure_spread(stack, _SPREAD[format]))
        else:
            by_format.append(_measure_format(stack, format, own_format))
    return [
        Measured([curves[task] for curves in by_format], norm)
        for task, norm in enumerate(stack.norms.tolist())
    ]


class _Stack:
    """Updates of one shape: their own factors, and the leading ones with what rounding them changes."""

    def __init__(self, factors: Sequence[ScaledFactors], metric: Metric) -> None:
        self.a = torch.stack([a for a, _, _ in factors])
        self.b_t = torch.stack([b.T for _, b, _ in factors])
        self.scales = torch.tensor([scale for _, _, scale in factors], dtype=torch.float64)
        self._metric = metric
        scales = self.scales.to(self.a.device)
        self.svd_a, self.svd_b_t, self.norms = leading_factors(self.a, self.b_t, scales, metric)
        self._rounded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def rounded(self, format: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The leading factors as a format stores them."""
        if format not in self._rounded:
            self._rounded[format] = (
                by_rows(lambda rows: as_stored(rows, format), self.svd_a),
                by_rows(lambda rows: as_stored(rows, format), self.svd_b_t),
            )
        return self._rounded[format]

    def narrow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The leading factors with 4, 3 and 2 bits, one after another: (n, 3 q, d)."""
        found = []
        for wide, rows in zip(self.rounded(NARROW_FORMAT), (self.svd_a, self.svd_b_t)):
            flat = as_stored_narrow(rows.flatten(0, 1))
            found.append(torch.cat([wide, *(x.unflatten(0, rows.shape[:2]) for x in flat)], dim=1))
        return found[0], found[1]

    def trellis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in trellis codes, nearly: searching for the codes would take a microsecond a number.

        What comes back of a row is drawn as from the test channel of as much loss (Cover and Thomas,
        *Elements of Information Theory*, 10.3.2).
        """
        a, b_t = (_through_channel(rows) for rows in (self.svd_a, self.svd_b_t))
        return a, b_t

    def changes(self, stored: tuple[torch.Tensor, torch.Tensor]) -> Changes:
        """What storing does to the leading rank-one terms; stored are one or more rows of each."""
        return changes_of((self.svd_a, self.svd_b_t), self.leading_grams, stored, self._metric)

    @cached_property
    def leading_grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Products of the leading factors' rows in the metric."""
        return grams_of((self.svd_a, self.svd_b_t), self._metric)

    def own_changes(self, format: str) -> Changes:
        """What a format does to the terms of the own factors."""
        rows = self.a.float(), self.b_t.float()
        stored = tuple(by_rows(lambda r: as_stored(r, format), side) for side in rows)
        return changes_of(rows, self.own_grams, stored, self._metric)

    @cached_property
    def own_grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Products of the own factors' rows in the metric."""
        return grams_of((self.a.float(), self.b_t.float()), self._metric)


def _measure_format(stack: _Stack, format: str, own_format: str) -> list[Curve]:
    terms, cross, inner = stack.changes(stack.rounded(format))
    # With the first t terms stored: the rest's norm, less its products with the changes, plus theirs.
    rest = terms.flip(1, 2).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).flip(1)
    rest = torch.nn.functional.pad(rest[:, 1:], (0, 1))
    beside = cross.flip(2).cumsum(2).flip(2)
    beside = torch.nn.functional.pad(beside[:, :, 1:], (0, 1)).cumsum(1)
    products = beside.diagonal(dim1=1, dim2=2)
    squares = inner.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
    losses = (rest - 2 * products + squares).clamp(min=0).tolist()
    own_losses = [0.0] * len(losses) if format == own_format else _own_losses(stack, format)
    (_, rank, d_in), d_out = stack.a.shape, stack.b_t.shape[2]
    row = row_nbytes(format, d_in) + row_nbytes(format, d_out)
    return [
        PrivateCurve(format, row, array("d", found), rank, own)
        for found, own in zip(losses, own_losses)
    ]


def _own_losses(stack: _Stack, format: str) -> list[float]:
    lost = stack.own_changes(format).inner.sum((1, 2)).clamp(min=0)
    return (lost * stack.scales.square()).tolist()


def _through_channel(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, r, d) with 4, 3 and 2 bits, one after another: (n, 3 r, d)."""
    # The same noise for every task, so that a plan does not depend on which are measured together.
    generator = torch.Generator(device="cpu").manual_seed(_NOISE_SEED)
    noise = torch.randn(rows.shape[1:], generator=generator, device="cpu").to(rows.device)
    # What is lost of each row is that share exactly.
    energy = rows.square().sum(dim=2, keepdim=True)
    along = (rows * noise).sum(dim=2, keepdim=True) / energy.clamp(min=1e-30)
    noise = noise - along * rows
    noise = noise * (energy / noise.square().sum(dim=2, keepdim=True).clamp(min=1e-30)).sqrt()
    found = [
        (1 - lost) * rows + math.sqrt(lost * (1 - lost)) * noise for lost in _TRELLIS_LOST.values()
    ]
    return torch.cat(found, dim=1)


class _Spread(NamedTuple):
    """Codes of 4, 3 and 2 bits: their format, what comes back of them, and the bytes of a row."""

    format: str
    stored: Callable[[_Stack], tuple[torch.Tensor, torch.Tensor]]
    row_nbytes: Callable[[int, int], int]


_SPREAD = {
    NARROW: _Spread(NARROW_FORMAT, _Stack.narrow, narrow_row_nbytes),
    TRELLIS: _Spread("trellis", _Stack.trellis, trellis_row_nbytes),
}


def _measure_spread(stack: _Stack, spread: _Spread) -> list[Curve]:
    rank = stack.svd_a.shape[1]
    terms, cross, inner = stack.changes(spread.stored(stack))
    cuts = _cuts(rank)
    d_in, d_out = stack.svd_a.shape[2], stack.svd_b_t.shape[2]
    rows = [spread.row_nbytes(d_in, bits) + spread.row_nbytes(d_out, bits) for bits in (4, 3, 2)]
    counts = torch.stack([cuts[:, 0], cuts[:, 1] - cuts[:, 0], cuts[:, 2] - cuts[:, 1]], dim=1)
    nbytes = (counts * torch.tensor(rows)).sum(dim=1).tolist()
    # What the chosen rows' changes have in common with all terms, less that with the chosen ones.
    with_all = cross[:, :, :rank].sum(2)
    between = inner + cross + cross.mT
    left = torch.nn.functional.pad(
        terms[:, :rank, :rank].flip(1, 2).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).flip(1),
        (0, 1),
    )
    losses = left[:, cuts[:, 2]] - 2 * _cut_sums(with_all, cuts, rank)
    losses = (losses + _cut_squares(between, cuts, rank)).clamp(min=0)
    curves: list[Curve] = []
    for found in losses:
        front = pareto_front(list(zip(nbytes, found.tolist())), _NARROW_POINTS)
        curves.append(
            NarrowCurve(
                spread.format,
                array("q", [nbytes[i] for i in front]),
                array("d", found[front].tolist()),
                array("H", counts[front].flatten().tolist()),
            )
        )
    return curves


def _cuts(rank: int) -> torch.Tensor:
    """(cuts, 3): where 4 bits end, where 3 bits end, where 2 bits end; the last is positive."""
    step = -(-rank // _NARROW_CUTS)
    ends = torch.arange(0, rank + 1, step)
    if ends[-1] != rank:
        ends = torch.cat([ends, torch.tensor([rank])])
    triples = torch.cartesian_prod(ends, ends, ends)
    first, second, last = triples.unbind(1)
    return triples[(first <= second) & (second <= last) & (last > 0)]


def _bounds(cuts: torch.Tensor, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Start and end of each width's rows among the three packings stacked."""
    first, second, last = cuts.unbind(1)
    zero = torch.zeros_like(first)
    return [
        (zero, first),
        (rank + first, rank + second),
        (2 * rank + second, 2 * rank + last),
    ]


def _cut_sums(values: torch.Tensor, cuts: torch.Tensor, rank: int) -> torch.Tensor:
    sums = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    bounds = _bounds(cuts, rank)
    return sum((sums[:, stop] - sums[:, start] for start, stop in bounds), torch.zeros(1))


def _cut_squares(gram: torch.Tensor, cuts: torch.Tensor, rank: int) -> torch.Tensor:
    sums = torch.nn.functional.pad(gram.cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
    width, bounds = 3 * rank + 1, _bounds(cuts, rank)
    total = torch.zeros(len(gram), len(cuts), dtype=gram.dtype)
    for top, bottom in bounds:
        for left, right in bounds:
            total += sums[:, bottom * width + right] - sums[:, top * width + right]
            total += sums[:, top * width + left] - sums[:, bottom * width + left]
    return total
