"""Trellis-coded rows: a number is looked up by bits that it shares with its neighbours.

A row is a stream of bits. The value of its element t is ``table[w_t]`` times the row's scale,
with w_t the :data:`WINDOW` bits from bit ``t * width`` on, 2, 3 or 4 bits an element; a byte's lowest
bit comes first. Windows overlap, so a decoder needs the stream and the table alone, from any element on:
two bytes and a shift. An encoder finds the stream whose values are nearest to a row by dynamic
programming (Viterbi) over the 256 windows.

Costs are whole numbers, so that a row becomes the same bytes on every device.

Source: Tseng et al., *QTIP*, NeurIPS 2024 (arXiv 2406.11235), whose bitshift trellis this is, with
trained tables.
"""

from __future__ import annotations

from functools import cache

import torch

from vllm_vlora.trellis_tables import TRELLIS_TABLES

WINDOW = 8
"""Bits that a value is looked up by."""
TRELLIS_WIDTHS = tuple(TRELLIS_TABLES)
"""Bits an element that a row may have: 4, 3 and 2."""

_WINDOWS = 1 << WINDOW
# A number is compared with the table as the nearest of so many levels a unit, up to so many units.
_LEVELS, _REACH = 64, 6
# A cost counts in these parts of a square unit, and stands above the bits that say where from.
_COST_PARTS, _FROM_BITS = 1 << 12, 4
# Steps after which the least cost is taken off; int32 holds 300 of the greatest.
_RENORMALISED = 128
# Rows that are searched at once stay in a core's cache, a GPU needs many; and bytes of where from.
_ROWS_AT_ONCE, _GPU_ROWS_AT_ONCE = 256, 1 << 14
_FROM_NBYTES = 1 << 28


def stream_nbytes(cols: int, width: int) -> int:
    """Bytes of a row's stream: the first window, and ``width`` bits for each further element."""
    return -(-(cols * width + WINDOW - width) // 8) if cols else 0


def encode_windows(units: torch.Tensor, width: int) -> torch.Tensor:
    """The windows whose table values are nearest to rows of numbers of variance one.

    Args:
        units: float32 ``[rows, cols]``, finite. width: bits an element.

    Returns:
        uint8 ``[rows, cols]``.
    """
    rows, cols = units.shape
    if not rows or not cols:
        return torch.empty(rows, cols, dtype=torch.uint8, device=units.device)
    most = _ROWS_AT_ONCE if units.device.type == "cpu" else _GPU_ROWS_AT_ONCE
    at_once = max(1, min(most, _FROM_NBYTES // (cols * (_WINDOWS >> width))))
    return torch.cat([_search(part, width) for part in units.split(at_once)])


def _search(units: torch.Tensor, width: int) -> torch.Tensor:
    """``encode_windows`` of rows that fit into memory together.

    A state is a window with its bits reversed, the oldest the highest: those that a state may follow are
    then ``_WINDOWS >> width`` apart. Its key is the cost of the best stream that ends in it, and below
    that its own highest bits: the least of keys says which state it was.
    """
    away, order = _costs(width, units.device)
    (rows, cols), kept = units.shape, _WINDOWS >> width
    levels = (units * _LEVELS).round_().clamp_(-_LEVELS * _REACH, _LEVELS * _REACH)
    levels = (levels.T.contiguous() + _LEVELS * _REACH).int()
    came_from = torch.empty(cols, rows, kept, dtype=torch.uint8, device=units.device)
    keys = torch.index_select(away, 0, levels[0])
    for place in range(1, cols):
        best = keys
        while best.shape[1] > kept:
            best = torch.minimum(*best.chunk(2, 1))
        came_from[place] = best  # The lowest byte of each.
        best &= -1 << _FROM_BITS
        if place % _RENORMALISED == 0:
            best -= best.amin(1, keepdim=True)
        torch.index_select(away, 0, levels[place], out=keys)
        keys.view(rows, kept, 1 << width).add_(best[:, :, None])
    states = torch.empty(cols, rows, dtype=torch.int64, device=units.device)
    states[-1] = last = (keys >> _FROM_BITS).argmin(1)
    for place in range(cols - 1, 0, -1):
        after = last >> width
        found = came_from[place].gather(1, after[:, None])[:, 0] & ((1 << _FROM_BITS) - 1)
        states[place - 1] = last = after | found.long() << (WINDOW - width)
    return order[states.T]


@cache
def _costs(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What every state costs at every level, int32, over its highest bits; and each one's window."""
    states = torch.arange(_WINDOWS, device="cpu")
    bits = torch.arange(WINDOW, device="cpu")[:, None]
    order = (((states >> bits) & 1) << (WINDOW - 1 - bits)).sum(0)
    values = trellis_table(width, torch.device("cpu"))[order].double()
    levels = torch.arange(-_LEVELS * _REACH, _LEVELS * _REACH + 1, device="cpu").double() / _LEVELS
    squares = (levels[:, None] - values).square().mul_(_COST_PARTS).round_().int()
    costs = (squares << _FROM_BITS) | (states >> (WINDOW - width)).int()
    return costs.to(device), order.to(device, torch.uint8)


def join_windows(windows: torch.Tensor, width: int) -> torch.Tensor:
    """The streams, uint8 ``[rows, stream_nbytes]``, that these windows ``[rows, cols]`` are of."""
    cols = windows.shape[1]
    first_bits = 8 * torch.arange(stream_nbytes(cols, width), device=windows.device)
    element, shift = first_bits // width, first_bits % width
    # Beyond the last window zeros enter.
    padded = [windows.int()]
    for _ in range(WINDOW // width + 1):
        padded.append(padded[-1][:, -1:] >> width)
    held = torch.cat(padded, dim=1)
    joined = (held[:, element] >> shift) | (held[:, element + 1] << (width - shift))
    return joined.to(torch.uint8)


def split_windows(streams: torch.Tensor, width: int, cols: int) -> torch.Tensor:
    """The windows ``[rows, cols]``, int32, of the first elements of streams.

    Args:
        streams: uint8 ``[rows, bytes]``, a byte more than whole groups of eight elements take.
    """
    groups = -(-cols // 8)
    held = streams[:, : groups * width + 1].int()
    pairs = (held[:, :-1] | (held[:, 1:] << 8)).view(len(streams), groups, width)
    windows = [(pairs[..., bit // 8] >> bit % 8) & 255 for bit in range(0, 8 * width, width)]
    return torch.stack(windows, dim=2).flatten(1)[:, :cols]


@cache
def trellis_tables(device: torch.device) -> torch.Tensor:
    """The value of each window, float32 on a device: of 4 bits, then of 3, then of 2."""
    tables = torch.tensor(list(TRELLIS_TABLES.values()), dtype=torch.float32, device="cpu")
    return tables.flatten().to(device)


def trellis_table(width: int, device: torch.device) -> torch.Tensor:
    """Those of rows with so many bits an element."""
    return trellis_tables(device).chunk(len(TRELLIS_WIDTHS))[TRELLIS_WIDTHS.index(width)]
