"""What storing one module privately loses, at every rank and format, without trying them one by one.

Rows are packed independently, so quantising the balanced SVD factors once at full rank gives the error
of every truncation, and of every spread of 4, 3 and 2 bits over the singular directions, from small
Gram matrices.

Losses are squared norms in the module's ``Metric``: Frobenius, or as the model sees them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_vlora.fitting.whitening import FROBENIUS, Metric
from vllm_vlora.planning.allocation import Point, pareto_front
from vllm_vlora.planning.number_formats import NARROW, NARROW_FORMAT
from vllm_vlora.quantize import narrow_row_nbytes, pack, pack_narrow, row_nbytes, unpack
from vllm_vlora.representations.factors import balanced_svd, squared_norm

# Every cut between 4, 3 and 2 bits up to this rank, about as many cuts above it.
_NARROW_CUTS = 20
# Points of a narrow curve that are kept; the front of a rank-16 module has some 60.
_NARROW_POINTS = 32


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
        nbytes, losses: of every option. cuts: its rows with 4, 3 and 2 bits, one after another.
    """

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
        return PrivateOption(NARROW_FORMAT, n4 + n3 + n2, False, nbytes, loss, bits)

    def loss(self, number: int) -> float:
        """Of an option."""
        return self.losses[number]

    def points(self, weight: float) -> list[Point]:
        """(bytes, weighted loss) of every option."""
        return [(nbytes, loss * weight) for nbytes, loss in zip(self.nbytes, self.losses)]


Curve = PrivateCurve | NarrowCurve


def leading_factors(
    a: torch.Tensor, b: torch.Tensor, scale: float, metric: Metric
) -> tuple[torch.Tensor, torch.Tensor]:
    """SVD factors of scale * B A in the metric: A' (q, d_in) and B' transposed (q, d_out).

    The first t rows of both are the best approximation of rank t that the metric knows (Eckart-Young
    on S_out^T delta_W S_in, taken back).
    """
    white_a, white_b_t = metric.factors(a, b, torch.float32)
    svd_a, svd_b, _ = balanced_svd(white_a, white_b_t.T, scale)
    return metric.unwhiten_a(svd_a), metric.unwhiten_b_t(svd_b.T.contiguous())


def measure_private(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    formats: Sequence[str],
    own_format: str,
    metric: Metric = FROBENIUS,
) -> list[Curve]:
    """Measure every rank in every format.

    Args:
        a: (r, d_in). b: (d_out, r). scale: of B A.
        formats: the number formats to try, and ``NARROW``.
        own_format: the one in which the adapter's own factors lose nothing.

    Raises:
        ValueError: a value does not fit a format.
    """
    factors = _Factors(a, b, scale, metric)
    curves: list[Curve] = []
    for format in formats:
        if format == NARROW:
            curves.append(_measure_narrow(factors))
        else:
            curves.append(_measure_format(factors, format, own_format))
    return curves


class _Factors:
    """One delta_W: its own factors, its leading ones, and what packed rows capture of it."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float, metric: Metric) -> None:
        self.a, self.b_t, self.scale, self.metric = a, b.T.contiguous(), scale, metric
        self.svd_a, self.svd_b_t = leading_factors(a, b, scale, metric)
        # Of rows that lie as such: how they lie decides in which order a product sums.
        self._white_a, white_b_t = metric.factors(a, self.b_t.T)
        self._white_b_t = white_b_t * scale
        grams = (self._white_a @ self._white_a.T) * (self._white_b_t @ self._white_b_t.T)
        self.norm = max(float(grams.sum()), 0.0)
        self._rounded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def rounded(self, format: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The leading factors as a format stores them."""
        if format not in self._rounded:
            self._rounded[format] = (
                unpack(pack(self.svd_a, format)),
                unpack(pack(self.svd_b_t, format)),
            )
        return self._rounded[format]

    def grams(
        self, rows_a: torch.Tensor, rows_b_t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For the rank-one terms of these rows: their product with delta_W, and with each other."""
        white_a, white_b_t = self.metric.factors(rows_a, rows_b_t.T)
        cross = ((white_b_t @ self._white_b_t.T) * (white_a @ self._white_a.T)).sum(dim=1)
        return cross, (white_b_t @ white_b_t.T) * (white_a @ white_a.T)


def _measure_format(factors: _Factors, format: str, own_format: str) -> PrivateCurve:
    cross, gram = factors.grams(*factors.rounded(format))
    squares = gram.cumsum(0).cumsum(1).diagonal()
    losses = (factors.norm - 2 * cross.cumsum(0) + squares).clamp(min=0).tolist()
    own_loss = 0.0 if format == own_format else _own_loss(factors, format)
    rank, d_in, d_out = *factors.a.shape, factors.b_t.shape[1]
    row = row_nbytes(format, d_in) + row_nbytes(format, d_out)
    return PrivateCurve(format, row, array("d", losses), rank, own_loss)


def _own_loss(factors: _Factors, format: str) -> float:
    rows_a = unpack(pack(factors.a.float(), format))
    rows_b_t = unpack(pack(factors.b_t.float(), format)).double() * factors.scale
    cross, gram = factors.grams(rows_a, rows_b_t)
    return max(factors.norm - 2 * float(cross.sum()) + float(gram.sum()), 0.0)


def _measure_narrow(factors: _Factors) -> NarrowCurve:
    rank = factors.svd_a.shape[0]
    rows_a, rows_b_t = (
        torch.cat([wide, *(unpack(pack_narrow(rows, bits)) for bits in (3, 2))])
        for wide, rows in zip(factors.rounded(NARROW_FORMAT), (factors.svd_a, factors.svd_b_t))
    )
    cross, gram = factors.grams(rows_a, rows_b_t)
    cuts = _cuts(rank)
    losses = (
        factors.norm - 2 * _cut_sums(cross, cuts, rank) + _cut_squares(gram, cuts, rank)
    ).clamp(min=0)
    d_in, d_out = factors.svd_a.shape[1], factors.svd_b_t.shape[1]
    rows = [narrow_row_nbytes(d_in, bits) + narrow_row_nbytes(d_out, bits) for bits in (4, 3, 2)]
    counts = torch.stack([cuts[:, 0], cuts[:, 1] - cuts[:, 0], cuts[:, 2] - cuts[:, 1]], dim=1)
    nbytes = (counts * torch.tensor(rows)).sum(dim=1).tolist()
    front = pareto_front(list(zip(nbytes, losses.tolist())), _NARROW_POINTS)
    return NarrowCurve(
        array("q", [nbytes[i] for i in front]),
        array("d", losses[front].tolist()),
        array("H", counts[front].flatten().tolist()),
    )


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
    sums = torch.nn.functional.pad(values.cumsum(0), (1, 0))
    return sum((sums[stop] - sums[start] for start, stop in _bounds(cuts, rank)), torch.zeros(1))


def _cut_squares(gram: torch.Tensor, cuts: torch.Tensor, rank: int) -> torch.Tensor:
    sums = torch.nn.functional.pad(gram.cumsum(0).cumsum(1), (1, 0, 1, 0))
    bounds = _bounds(cuts, rank)
    total = torch.zeros(len(cuts), dtype=gram.dtype)
    for top, bottom in bounds:
        for left, right in bounds:
            total += sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return total
