"""Rows of 4, 3 and 2 bits in one matrix, as a device holds them when it is to hold no bit more.

A row of nf4-dq that uses 8 or 4 of the 16 codes is *narrow* (``quantize.pack_narrow``): 3 or 2 bits an
element on disk, 4 in a ``PackedMatrix``. A :class:`NarrowMatrix` keeps the 3 and 2. With i(j) the place
of element j's code among those of its row, i's bits lie in three planes:

==========  ====================  =====================================  =========================
plane       rows                  16 elements take                       element k of them
==========  ====================  =====================================  =========================
low         all                   4 bytes, the lowest two bits of i      bits ``4 (k % 8) + 2 (k // 8)``
middle      of 4 and of 3 bits    2 bytes, the third bit                 bit ``4 (k % 4) + k // 4``
top         of 4 bits             2 bytes, the fourth                    bit ``4 (k % 4) + k // 4``
==========  ====================  =====================================  =========================

(little-endian). So a kernel gets eight places of four bits, one a nibble, from each word of the low plane
with two instructions, and from the others with a few more, whatever the rows' bits are; and a plane's
row begins where its number says, since rows with more bits come first. This order is no file's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vllm_vlora.quantize import (
    NARROW_CODES,
    NF4_BLOCK,
    NF4_CODEBOOK,
    SCALE_BLOCK,
    PackedMatrix,
    narrow_places,
    narrow_row_nbytes,
)

NARROW_FORMAT = "nf4-narrow"
"""``format`` of a :class:`NarrowMatrix`; a file has no such format."""
CODEBOOKS = (*NF4_CODEBOOK, *(NF4_CODEBOOK[code] for bits in (3, 2) for code in NARROW_CODES[bits]))
"""The values of the places of rows of 4 bits, then of 3 from :data:`BOOK_OF_3` on, then of 2."""
BOOK_OF_3, BOOK_OF_2 = 16, 24

Bits = tuple[int, int, int]
"""How many rows have 4, 3 and 2 bits; they follow each other in this order."""
Planes = tuple[torch.Tensor, ...]
"""As many planes of some blocks as their rows have."""


@dataclass(frozen=True)
class NarrowMatrix(PackedMatrix):
    """A matrix of nf4-dq rows with 4, 3 or 2 bits an element, as many as each row needs.

    Its values are those of :meth:`widened`. ``parts``: ``codes`` uint8, 1-D, the planes one after
    another; ``scale_codes`` and ``scale_range`` as nf4-dq has them.

    Attributes:
        bits: rows with 4, 3 and 2 bits.
        first_block: the place of the first block in its group of scales, in a cut of columns; the
            range of block b is number ``(first_block + b) // 256``.
    """

    bits: Bits = (0, 0, 0)
    first_block: int = 0

    def __post_init__(self) -> None:
        blocks = -(-self.cols // NF4_BLOCK)
        groups = -(-(self.first_block + blocks) // SCALE_BLOCK) if blocks else 0
        wanted = {
            "codes": (torch.uint8, (sum(plane_nbytes(self.bits, blocks)),)),
            "scale_codes": (torch.uint8, (self.rows, blocks)),
            "scale_range": (torch.float32, (self.rows, groups, 2)),
        }
        found = {name: (part.dtype, tuple(part.shape)) for name, part in self.parts.items()}
        if self.format != NARROW_FORMAT or sum(self.bits) != self.rows or found != wanted:
            raise ValueError(
                f"a {self.rows} x {self.cols} {NARROW_FORMAT} matrix with {list(self.bits)} rows of 4, "
                f"3 and 2 bits has the parts {wanted}, got {found} as {self.format}"
            )
        if len({part.device for part in self.parts.values()}) > 1:
            raise ValueError(f"the parts of a {NARROW_FORMAT} matrix are on several devices")

    def planes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The low, middle and top plane as views: uint8, ``[rows that have it, bytes of a row]``."""
        blocks = self.parts["scale_codes"].shape[1]
        flat = self.parts["codes"].split(list(plane_nbytes(self.bits, blocks)))
        sizes = zip(flat, _plane_rows(self.bits), _BLOCK_NBYTES)
        low, middle, top = (plane.view(rows, size * blocks) for plane, rows, size in sizes)
        return low, middle, top

    @property
    def word(self) -> int:
        """What a kernel must know of it: rows of 4 bits in its lowest 16 bits, those of 4 and 3 in the
        next 16, then 8 bits with ``first_block``."""
        four, three, _ = self.bits
        return four | (four + three) << 16 | self.first_block << 32

    def widened(self) -> PackedMatrix:
        """The same values with 4 bits for every code: nf4-dq, or nf4 of a cut inside of a group."""
        low, middle, top = self.planes()
        places = _places(low, middle, top)
        parts_of = zip((4, 3, 2), places.split(list(self.bits)))
        codes = torch.cat([part if n == 4 else _codes_of(part, n) for n, part in parts_of]).view(
            self.rows, places.shape[1] // 2, 2
        )
        parts = {**self.parts, "codes": (codes[..., 0] << 4) | codes[..., 1]}
        if not self.first_block:
            return PackedMatrix("nf4-dq", self.rows, self.cols, parts)
        return PackedMatrix(
            "nf4", self.rows, self.cols, {"codes": parts["codes"], "scales": self._scales()}
        )

    def _scales(self) -> torch.Tensor:
        """As ``quantize.nf4_scales``, from where the cut begins in its group."""
        codes, ranges = self.parts["scale_codes"], self.parts["scale_range"]
        places = torch.arange(codes.shape[1], device=codes.device) + self.first_block
        low, step = ranges[:, places // SCALE_BLOCK].unbind(2)
        return torch.addcmul(low, codes.float(), step)

    def row_slice(self, start: int, stop: int) -> PackedMatrix:
        """A copy of rows ``start`` to ``stop`` (exclusive); ValueError when they do not exist."""
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start}:{stop} are not within 0:{self.rows}")
        ends = (self.bits[0], sum(self.bits[:2]), self.rows)
        cuts = [min(max(end, start), stop) for end in ends]
        bits = (cuts[0] - start, cuts[1] - cuts[0], cuts[2] - cuts[1])
        planes = [plane[start:stop] for plane in self.planes()]
        parts = {
            "codes": torch.cat([plane.flatten() for plane in planes]),
            "scale_codes": self.parts["scale_codes"][start:stop],
            "scale_range": self.parts["scale_range"][start:stop],
        }
        return replace(self, rows=stop - start, bits=bits, parts=parts)

    def column_blocks(self, start: int, stop: int) -> PackedMatrix:
        """A copy of the columns from ``start``, rounded down to a multiple of 64, to ``stop``.

        Scales stay as they are, unlike those of nf4-dq: ``first_block`` says where in its group the
        first one lies.

        Raises:
            ValueError: the columns do not exist.
        """
        if not 0 <= start <= stop <= self.cols:
            raise ValueError(f"columns {start}:{stop} are not within 0:{self.cols}")
        first, last = start // NF4_BLOCK, -(-stop // NF4_BLOCK)
        planes = [
            plane[:, first * size : last * size]
            for plane, size in zip(self.planes(), _BLOCK_NBYTES)
        ]
        place = self.first_block + first
        groups = slice(place // SCALE_BLOCK, -(-(self.first_block + last) // SCALE_BLOCK))
        parts = {
            "codes": torch.cat([plane.flatten() for plane in planes]),
            "scale_codes": self.parts["scale_codes"][:, first:last].clone(
                memory_format=torch.contiguous_format
            ),
            "scale_range": self.parts["scale_range"][:, groups if last > first else slice(0)].clone(
                memory_format=torch.contiguous_format
            ),
        }
        cols = max(stop - first * NF4_BLOCK, 0)
        return replace(self, cols=cols, parts=parts, first_block=place % SCALE_BLOCK)


# Bytes that a block of 64 elements takes in each plane.
_BLOCK_NBYTES = (16, 8, 8)
# Bytes: kernels read so many at a time.
_ALIGNMENT = 16


def _plane_rows(bits: Bits) -> tuple[int, int, int]:
    """Rows that each plane has."""
    return sum(bits), bits[0] + bits[1], bits[0]


def plane_nbytes(bits: Bits, blocks: int) -> tuple[int, int, int]:
    """Bytes of each plane of a matrix whose rows have so many blocks of 64."""
    low, middle, top = (n * size * blocks for n, size in zip(_plane_rows(bits), _BLOCK_NBYTES))
    return low, middle, top


def narrow_nbytes(bits: Bits, cols: int) -> int:
    """Bytes of a :class:`NarrowMatrix` of ``cols`` columns that begin with a group of scales."""
    return sum(count * narrow_row_nbytes(cols, width) for count, width in zip(bits, (4, 3, 2)))


def narrow_matrix(wide: PackedMatrix, bits: Bits) -> NarrowMatrix:
    """An nf4-dq matrix whose rows use no more codes than their bits have, without the bits to spare.

    Raises:
        ValueError: another format, bits that do not sum to the rows, or a code that such rows lack.
    """
    if wide.format != "nf4-dq":
        raise ValueError(f"only rows of nf4-dq can be narrow, these are {wide.format}")
    split = zip((4, 3, 2), wide.parts["codes"].split(list(bits)))
    rows = [planes_of(narrow_places(part, width), width) for width, part in split]
    parts = {**wide.parts, "codes": torch.cat(_in_order(rows))}
    return NarrowMatrix(NARROW_FORMAT, wide.rows, wide.cols, parts, bits)


def stack_narrow(matrices: Sequence[NarrowMatrix]) -> NarrowMatrix:
    """The rows of several whole matrices in one, first those of 4 bits of each, then of 3, then of 2.

    Raises:
        ValueError: they differ in columns, or are cut inside of a group of scales.
    """
    if len({(m.cols, m.first_block) for m in matrices}) != 1 or matrices[0].first_block:
        raise ValueError("only whole matrices of as many columns are stacked")
    pieces = [[part.row_slice(*cut) for cut in _by_bits(part.bits)] for part in matrices]
    ordered = [rows for of_one_width in zip(*pieces) for rows in of_one_width if rows.rows]
    planes = zip(*(rows.planes() for rows in ordered))
    parts = {name: torch.cat([rows.parts[name] for rows in ordered]) for name in ordered[0].parts}
    parts["codes"] = torch.cat([plane.flatten() for group in planes for plane in group])
    four, three, two = (sum(m.bits[place] for m in matrices) for place in range(3))
    return replace(matrices[0], rows=four + three + two, parts=parts, bits=(four, three, two))


def _by_bits(bits: Bits) -> list[tuple[int, int]]:
    """(start, stop) of the rows of 4, 3 and 2 bits."""
    four, three, _ = bits
    return [(0, four), (four, four + three), (four + three, sum(bits))]


class NarrowCodes:
    """The ``codes`` of many matrices in one tensor: each in its own would take up to 511 bytes more."""

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []
        self._takers: list[tuple[int, int, Callable[[torch.Tensor], None]]] = []
        self._nbytes = 0

    def add(self, rows: Sequence[Planes], taker: Callable[[torch.Tensor], None]) -> None:
        """Add a matrix: the planes of its rows of 4, 3 and 2 bits, as far as there are any.

        ``taker`` is called with its codes by ``place``.
        """
        pieces = _in_order(rows)
        size = sum(len(piece) for piece in pieces)
        self._takers.append((self._nbytes, size, taker))
        padding = -size % _ALIGNMENT
        if padding:
            pieces.append(pieces[0].new_zeros(padding))
        self._pieces += pieces
        self._nbytes += size + padding

    def place(self) -> None:
        """Put all of them together."""
        if not self._pieces:
            return
        whole = torch.cat(self._pieces)
        for start, size, taker in self._takers:
            taker(whole[start : start + size])


def _in_order(rows: Sequence[Planes]) -> list[torch.Tensor]:
    """The pieces of ``codes``, 1-D, from the planes of rows with more bits to such with less."""
    return [planes[place].flatten() for place in range(3) for planes in rows if place < len(planes)]


def planes_of(places: torch.Tensor, bits: int) -> Planes:
    """The planes of blocks of rows with so many bits.

    Args:
        places: uint8 ``[blocks, 64]``.

    Returns:
        uint8 ``[blocks, 16]``, the low plane, and as far as such rows have them ``[blocks, 8]``, the
        middle and the top one.
    """
    halves = (places & 3).view(-1, 4, 2, 8)
    low = _join_nibbles(halves[:, :, 0] | (halves[:, :, 1] << 2))
    return low, *(_bit_plane(places, bit) for bit in range(2, bits))


def _bit_plane(places: torch.Tensor, bit: int) -> torch.Tensor:
    quarters = ((places >> bit) & 1).view(-1, 4, 4, 4)
    nibbles = quarters[:, :, 0]
    for place in range(1, 4):
        nibbles = nibbles | (quarters[:, :, place] << place)
    return _join_nibbles(nibbles)


def _join_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    """``[n, 4, m]`` nibbles as bytes ``[n, 2 m]``, the earlier the lower."""
    pairs = nibbles.reshape(len(nibbles), 2 * nibbles.shape[2], 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _split_nibbles(joined: torch.Tensor) -> torch.Tensor:
    return torch.stack([joined & 15, joined >> 4], dim=-1).flatten(-2)


def _places(low: torch.Tensor, middle: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The places that planes of whole rows hold, ``[rows, 64 * blocks]``; absent bits are zero."""
    rows, units = len(low), low.shape[1] // 4
    nibbles = _split_nibbles(low).view(rows, units, 1, 8)
    places = torch.cat([nibbles & 3, nibbles >> 2], dim=2).view(rows, 16 * units)
    for bit, plane in ((2, middle), (3, top)):
        quarters = _split_nibbles(plane).view(len(plane), units, 1, 4)
        found = torch.cat([(quarters >> place) & 1 for place in range(4)], dim=2)
        places[: len(plane)] |= found.view(len(plane), 16 * units) << bit
    return places


def _codes_of(places: torch.Tensor, bits: int) -> torch.Tensor:
    kept = torch.tensor(NARROW_CODES[bits], dtype=torch.uint8, device=places.device)
    return kept[places.int()]
