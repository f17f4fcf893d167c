"""Codes of rows of numbers: those that we store, and candidates that might lose less.

Every function takes rows ``[rows, cols]`` float32 and gives what comes back after decoding, and the
bits an element that this takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from vllm_vlora.quantize import (
    narrow_row_nbytes,
    pack,
    pack_narrow,
    pack_trellis,
    row_nbytes,
    trellis_row_nbytes,
    unpack,
)

Coded = tuple[torch.Tensor, float]
# A candidate stores one float16 scale a row.
ROW_SCALE_BITS = 16
# Trained on so many Gaussian numbers, in so many rounds; twice as many gain under 1 %.
_TRAINING_ROWS, _TRAINING_COLS, _TRAINING_ROUNDS = 128, 512, 12


def stored(rows: torch.Tensor, bits: int) -> Coded:
    """Rows as a checkpoint has them: int8 (8 bits), nf4-dq (4), its narrow rows (3 and 2)."""
    cols = rows.shape[1]
    if bits == 8:
        return unpack(pack(rows, "int8")), 8 * row_nbytes("int8", cols) / cols
    packed = pack(rows, "nf4-dq") if bits == 4 else pack_narrow(rows, bits)
    return unpack(packed), 8 * narrow_row_nbytes(cols, bits) / cols


def stored_trellis(rows: torch.Tensor, bits: int) -> Coded:
    """Rows as a checkpoint has them with ``--codes trellis``: 4, 3 or 2 bits."""
    return unpack(pack_trellis(rows, bits)), 8 * trellis_row_nbytes(
        rows.shape[1], bits
    ) / rows.shape[1]


def entropy_coded(rows: torch.Tensor, bits: int) -> Coded:
    """As :func:`stored` with 4, 3 or 2 bits, the codes at their entropy: the least that any lossless
    coder of single codes could come to."""
    values, nominal = stored(rows, bits)
    packed = pack(rows, "nf4-dq") if bits == 4 else pack_narrow(rows, bits)
    codes = packed.parts["codes"]
    places = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)[:, : rows.shape[1]]
    counts = torch.bincount(places.flatten().long(), minlength=16).double()
    share = counts[counts > 0] / counts.sum()
    return values, nominal - bits - float((share * share.log2()).sum())


def lloyd_max(rows: torch.Tensor, bits: int) -> Coded:
    """The best scalar code of Gaussian numbers, with one scale a row."""
    points = lloyd_max_points(bits)
    return _with_row_scale(rows, lambda x: points[torch.bucketize(x, _middles(points))], bits)


@cache
def lloyd_max_points(bits: int) -> torch.Tensor:
    """Its 2^bits values, rising (Lloyd 1982; for 2 bits +-0.4528 and +-1.510, Max 1960)."""
    points = _normal_quantiles(1 << bits)
    sample = _normal_quantiles(1 << 16)
    for _ in range(200):
        points = _means(sample, torch.bucketize(sample, _middles(points)), points)
    return points


@dataclass(frozen=True)
class Trellis:
    """A trellis code: element t's value is ``table[w_t]``, where w_t are the last ``window`` bits of the
    row's stream when ``bits`` more have been read for each element.

    Consecutive windows overlap, so a decoder needs the stream and the table alone, from any place on;
    the encoder finds the best stream of a row by dynamic programming (Viterbi), 2^window steps for an
    element. As QTIP has it (Tseng et al. 2024, arXiv 2406.11235), with a trained table.
    """

    bits: int
    window: int
    table: torch.Tensor

    @classmethod
    def trained(cls, bits: int, window: int) -> Trellis:
        """A table of Gaussian quantiles in a random order, each then the mean of what it stands for."""
        generator = torch.Generator().manual_seed(0)
        table = _normal_quantiles(1 << window)
        table = table[torch.randperm(len(table), generator=generator)]
        sample = torch.randn(_TRAINING_ROWS, _TRAINING_COLS, generator=generator)
        for _ in range(_TRAINING_ROUNDS):
            table = _means(
                sample.flatten(), cls(bits, window, table).encode(sample).flatten(), table
            )
        return cls(bits, window, table)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """The windows ``[rows, cols]`` whose values are nearest to rows of variance 1."""
        count, cols = rows.shape
        into, states = 1 << self.bits, 1 << self.window
        cost = torch.zeros(count, states)
        came_from = torch.empty(cols, count, states // into, dtype=torch.uint8)
        for place in range(cols):
            # A window's last bits are the next one's first: its first `bits` bits fall out.
            best, came_from[place] = cost.view(count, into, states // into).min(1)
            away = (self.table - rows[:, place, None]).square_()
            cost = (away.view(count, states // into, into) + best[:, :, None]).view(count, states)
        windows = torch.empty(count, cols, dtype=torch.long)
        last, row = cost.argmin(1), torch.arange(count)
        for place in reversed(range(cols)):
            windows[:, place] = last
            kept = last >> self.bits
            last = kept | came_from[place, row, kept].long() << (self.window - self.bits)
        return windows

    def coded(self, rows: torch.Tensor) -> Coded:
        """Rows with one scale each; the first window's surplus bits are counted."""
        values, bits = _with_row_scale(rows, lambda x: self.table[self.encode(x)], self.bits)
        return values, bits + (self.window - self.bits) / rows.shape[1]


def _with_row_scale(
    rows: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor], bits: int
) -> Coded:
    """Normalised rows through ``nearest``, each with its least-squares scale in float16."""
    norms = rows.square().mean(1, keepdim=True).sqrt()
    values = nearest(rows / norms)
    scales = (rows * values).sum(1, keepdim=True) / values.square().sum(1, keepdim=True)
    return values * scales.half().float(), bits + ROW_SCALE_BITS / rows.shape[1]


def _normal_quantiles(count: int) -> torch.Tensor:
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (torch.erfinv(2 * levels - 1) * math.sqrt(2)).float()


def _middles(points: torch.Tensor) -> torch.Tensor:
    return (points[1:] + points[:-1]) / 2


def _means(values: torch.Tensor, places: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The mean of the values at each place, what was there before where there are none."""
    counts = torch.bincount(places, minlength=len(before))
    sums = torch.zeros(len(before), dtype=torch.float64).index_add_(0, places, values.double())
    return torch.where(counts > 0, sums / counts.clamp(min=1), before.double()).float()
