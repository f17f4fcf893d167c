"""What storing one module privately loses, at every rank and format, without trying them one by one.

Rows are packed independently, so quantising the balanced SVD factors once at full rank gives the error
of every truncation, and of every spread of 4, 3 and 2 bits over the singular directions, from small
Gram matrices. Tasks of one shape are measured together. Of long rows a sample of blocks stands for all,
where no error is promised.

Losses are squared norms in the module's ``Metric``: Frobenius, or as the model sees them.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from vllm_vlora.fitting.whitening import FROBENIUS, Metric
from vllm_vlora.planning.allocation import Point, pareto_front
from vllm_vlora.planning.changes import Changes, Sides, by_rows, changes_of, grams_of
from vllm_vlora.planning.number_formats import NARROW, NARROW_FORMAT, TRELLIS
from vllm_vlora.quantize import (
    FLOAT_DTYPES,
    NF4_BLOCK,
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
# Rows of twice so many blocks are measured by as many of them, drawn by this seed.
_SAMPLED_BLOCKS, _SAMPLE_SEED = 16, 0x5A3B1E
# How far the energy of a sample may be from its share of a row's, as a factor.
_UNEVEN = 1.25
# Share of ||delta_W||^2 that is lost at least where a sample loses nothing.
_SOMETHING = 1e-12
# Of a float32 product of long rows, as a share of the product of their norms.
_ROUNDING = 1e-6


def seen_squared_norm(a: torch.Tensor, b: torch.Tensor, scale: float, metric: Metric) -> float:
    """||scale * B A||^2 in the metric, float64."""
    white_a, white_b_t = metric.factors(a, b)
    return squared_norm(white_a, white_b_t.T, scale)


class PrivateOption(NamedTuple):
    """One way to store one module of one task privately; a plan of very many has one of each.

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
    sampled: bool = False,
) -> list[Measured]:
    """Measure every rank in every format, of several tasks at once.

    Args:
        factors: (A (r, d_in), B (d_out, r), scale) of each task, all of one shape.
        formats: the number formats to try, and ``NARROW`` or ``TRELLIS``.
        own_format: the one in which the adapters' own factors lose nothing.
        sampled: long rows may be measured by a sample of their blocks, where the metric is Frobenius:
            the losses are then expected ones, within a few per cent.

    Raises:
        ValueError: a value does not fit a format.
    """
    a = torch.stack([a for a, _, _ in factors]).float()
    b_t = torch.stack([b for _, b, _ in factors]).float().mT.contiguous()
    scales = torch.tensor([scale for _, _, scale in factors], dtype=torch.float64)
    sides = a, b_t, *leading_factors(a, b_t, scales.to(a.device), metric)
    even = torch.zeros(len(factors), dtype=torch.bool)
    if sampled and metric == FROBENIUS:
        even = torch.stack([_is_even(rows) for rows in sides[:4]]).all(0).cpu()
    found: dict[int, Measured] = {}
    for by_sample in even.unique().tolist():
        places = torch.nonzero(even == by_sample).flatten()
        at = slice(None) if len(places) == len(factors) else places.to(a.device)
        own_a, own_b_t, svd_a, svd_b_t, norms = (side[at] for side in sides)
        kept = scales[places]
        stack = _Stack(own_a, own_b_t, svd_a, svd_b_t, norms, kept, metric, by_sample)
        found.update(zip(places.tolist(), _measure_stack(stack, formats, own_format)))
    return [found[place] for place in range(len(factors))]


def _measure_stack(stack: _Stack, formats: Sequence[str], own_format: str) -> list[Measured]:
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


def _sample_of(rows: torch.Tensor) -> torch.Tensor:
    """The sample of rows (n, r, d); of rows that are not long, all."""
    count = rows.shape[2] // NF4_BLOCK
    if count < 2 * _SAMPLED_BLOCKS:
        return rows
    # Drawn, since heads and what else returns every so many columns would fall together with a stride.
    generator = torch.Generator(device="cpu").manual_seed(_SAMPLE_SEED)
    drawn = torch.randperm(count, generator=generator, device="cpu")[:_SAMPLED_BLOCKS]
    blocks = rows[:, :, : count * NF4_BLOCK].unflatten(2, (count, NF4_BLOCK))
    return blocks[:, :, drawn.sort().values.to(rows.device)].flatten(2)


def _is_even(rows: torch.Tensor) -> torch.Tensor:
    """Of each task's rows (n, r, d), whether a sample has about its share of every row's energy.

    A row whose numbers are in few blocks, as one of a fused layer's parts, is measured as a whole.
    """
    part = _sample_of(rows)
    share = part.shape[2] / rows.shape[2] * torch.linalg.vector_norm(rows, dim=2).square()
    energy = torch.linalg.vector_norm(part, dim=2).square()
    # Beyond this range squares in float32 say nothing.
    sound = ((energy > 1e-30) & (energy < 1e30)) | ~rows.any(2)
    return (sound & (energy <= _UNEVEN * share) & (share <= _UNEVEN * energy)).all(1)


class _Rows:
    """Rows (n, r, d) float32 of one side as they are measured: a sample has the energy of the whole.

    Attributes:
        values: the sampled columns, or all.
    """

    def __init__(self, rows: torch.Tensor, sampled: bool) -> None:
        self._whole, self._part, self.values = rows, rows, rows
        self._weight: torch.Tensor | None = None
        if sampled:
            self._part = _sample_of(rows)
            energy, own = (
                torch.linalg.vector_norm(x, dim=2, keepdim=True) for x in (rows, self._part)
            )
            self._weight = torch.where(own > 0, energy / own, 0.0)
            self.values = self._part * self._weight

    # Rounded first and scaled afterwards: what a format holds exactly it is to hold here too.

    def as_stored(self, format: str) -> torch.Tensor:
        """As a format stores them."""
        amax = None
        if format == "int8":
            # The scale of a row is its greatest number's, in whichever block that lies.
            low, high = self._whole.aminmax(dim=2, keepdim=True)
            amax = torch.maximum(high, -low).flatten(0, 1)
        return self._scaled(by_rows(lambda rows: as_stored(rows, format, amax), self._part))

    def as_stored_narrow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """With 3 bits, and with 2."""
        three, two = as_stored_narrow(self._part.flatten(0, 1))
        shape = self._part.shape[:2]
        return self._scaled(three.unflatten(0, shape)), self._scaled(two.unflatten(0, shape))

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._weight is None else rows * self._weight

    def held_by(self, format: str) -> torch.Tensor:
        """(n,) whether a format of plain numbers holds all columns of each update's rows exactly."""
        dtype = FLOAT_DTYPES.get(format)
        if dtype is None:
            return torch.zeros(len(self._whole), dtype=torch.bool, device=self._whole.device)
        return (self._whole.to(dtype).float() == self._whole).flatten(1).all(1)


class _Stack:
    """Updates of one shape: their own factors, and the leading ones with what rounding them changes.

    Args:
        a: (n, r, d_in). b_t: B transposed, (n, r, d_out); float32. scales: (n,) float64.
        svd_a, svd_b_t, norms: their ``leading_factors``.
        sampled: rows are measured by a sample.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b_t: torch.Tensor,
        svd_a: torch.Tensor,
        svd_b_t: torch.Tensor,
        norms: torch.Tensor,
        scales: torch.Tensor,
        metric: Metric,
        sampled: bool,
    ) -> None:
        self.a, self.b_t, self.norms, self.scales = a, b_t, norms, scales
        self._metric, self.sampled = metric, sampled
        self.leading_grams = grams_of((svd_a, svd_b_t), metric)
        self._leading = _Rows(svd_a, sampled), _Rows(svd_b_t, sampled)
        self._rounded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def rank(self) -> int:
        """Of the leading factors."""
        return self._leading[0].values.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        """d_in and d_out."""
        return self.a.shape[2], self.b_t.shape[2]

    def rounded(self, format: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The leading factors as a format stores them."""
        if format not in self._rounded:
            a, b_t = (side.as_stored(format) for side in self._leading)
            self._rounded[format] = a, b_t
        return self._rounded[format]

    def narrow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The leading factors with 4, 3 and 2 bits, one after another: (n, 3 q, d)."""
        found = []
        for wide, side in zip(self.rounded(NARROW_FORMAT), self._leading):
            found.append(torch.cat([wide, *side.as_stored_narrow()], dim=1))
        return found[0], found[1]

    def trellis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in trellis codes, nearly: searching for the codes would take a microsecond a number.

        What comes back of a row is drawn as from the test channel of as much loss (Cover and Thomas,
        *Elements of Information Theory*, 10.3.2).
        """
        a, b_t = (_through_channel(side.values) for side in self._leading)
        return a, b_t

    def changes(self, stored: tuple[torch.Tensor, torch.Tensor]) -> Changes:
        """What storing does to the leading rank-one terms; stored are one or more rows of each."""
        values = tuple(side.values for side in self._leading)
        return changes_of(values, self.leading_grams, stored, self._metric)

    def own_changes(self, format: str) -> Changes:
        """What a format does to the terms of the own factors."""
        sides, grams = self._own
        stored = tuple(side.as_stored(format) for side in sides)
        return changes_of(tuple(side.values for side in sides), grams, stored, self._metric)

    def holds_own(self, format: str) -> torch.Tensor:
        """(n,) whether a format holds the own factors exactly."""
        a, b_t = (side.held_by(format) for side in self._own[0])
        return (a & b_t).cpu()

    @cached_property
    def _own(self) -> tuple[tuple[_Rows, _Rows], Sides]:
        """The own factors' rows, and the products of all their columns in the metric."""
        grams = grams_of((self.a, self.b_t), self._metric)
        return (_Rows(self.a, self.sampled), _Rows(self.b_t, self.sampled)), grams


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
    rank, row = stack.a.shape[1], sum(row_nbytes(format, cols) for cols in stack.widths)
    return [
        PrivateCurve(format, row, array("d", found), rank, own)
        for found, own in zip(losses, own_losses)
    ]


def _own_losses(stack: _Stack, format: str) -> list[float]:
    """Zero only where the format holds the own factors: what is planned as lossless is not measured."""
    changes = stack.own_changes(format).inner
    # Changes of terms that cancel may cancel too, but for float32's rounding of their products.
    rounding = _ROUNDING * changes.diagonal(dim1=1, dim2=2).abs().sqrt().sum(1).square()
    lost = (changes.sum((1, 2)).clamp(min=0) + rounding) * stack.scales.square()
    if stack.sampled:
        # Of the columns that are not in the sample nothing is known.
        least = torch.where(stack.holds_own(format), 0.0, _SOMETHING * stack.norms.cpu())
        lost = torch.maximum(lost, least)
    return lost.tolist()


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
    rank = stack.rank
    terms, cross, inner = stack.changes(spread.stored(stack))
    cuts = _cuts(rank)
    rows = [sum(spread.row_nbytes(cols, bits) for cols in stack.widths) for bits in (4, 3, 2)]
    counts = torch.stack([cuts[:, 0], cuts[:, 1] - cuts[:, 0], cuts[:, 2] - cuts[:, 1]], dim=1)
    nbytes = (counts * torch.tensor(rows)).sum(dim=1).tolist()
    # What the chosen rows' changes have in common with all terms, less that with the chosen ones.
    with_all = cross[:, :, :rank].sum(2)
    between = inner + cross + cross.mT
    left = torch.nn.functional.pad(
        terms[:, :rank, :rank].flip(1, 2).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).flip(1),
        (0, 1),
    )
    chosen = _chosen(cuts, rank)
    losses = left[:, cuts[:, 2]] - 2 * with_all @ chosen.T
    # One by one: all of many tasks' cuts at once would take gigabytes.
    squares = torch.stack([(chosen @ gram * chosen).sum(1) for gram in between])
    losses = (losses + squares).clamp(min=0)
    triples = counts.tolist()
    curves: list[Curve] = []
    for found in losses.tolist():
        front = pareto_front(list(zip(nbytes, found)), _NARROW_POINTS)
        curves.append(
            NarrowCurve(
                spread.format,
                array("q", [nbytes[i] for i in front]),
                array("d", [found[i] for i in front]),
                array("H", itertools.chain.from_iterable(triples[i] for i in front)),
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


def _chosen(cuts: torch.Tensor, rank: int) -> torch.Tensor:
    """(cuts, 3 rank): one where a row of the three packings, one after another, is chosen, else zero."""
    starts = torch.cat([torch.zeros(len(cuts), 1, dtype=cuts.dtype), cuts[:, :2]], dim=1)
    rows = torch.arange(rank)
    chosen = (starts[:, :, None] <= rows) & (rows < cuts[:, :, None])
    return chosen.flatten(1).double()
