"""Matrices packed row by row: plain floats, int8, NF4 and trellis codes.

Every row is packed on its own, so the packing of the first ``r`` rows is the first ``r`` rows of
the packing: a task may be cut to a smaller rank, or a basis to fewer components, without
unpacking.

==========  ==========================================  ===========================================
format      parts (each ``[rows, ...]``)                value of element ``[i, j]``
==========  ==========================================  ===========================================
float32,    ``values`` ``[cols]``                       ``values[i, j]``
float16,
bfloat16
int8        ``codes`` int8 ``[cols]``,                  ``codes[i, j] * scales[i, 0]``
            ``scales`` float32 ``[1]``
nf4         ``codes`` uint8 ``[32 * blocks]``,          ``NF4_CODEBOOK[code] * scales[i, j // 64]``
            ``scales`` float32 ``[blocks]``
nf4-dq      ``codes`` as nf4, ``scale_codes`` uint8     as nf4, with ``scales[i, b] = lo + step *
            ``[blocks]``, ``scale_range`` float32       scale_codes[i, b]`` and ``lo, step =
            ``[ceil(blocks / 256), 2]``                 scale_range[i, b // 256]``
trellis     ``codes`` uint8 ``[32 * blocks + 8]``,      ``TRELLIS_TABLES[widths[i, 0]][w] *
            ``widths`` uint8 ``[1]``,                   scales[i, 0]``, ``w`` the 8 bits of ``codes[i]``
            ``scales`` float32 ``[1]``                  from bit ``j * widths[i, 0]`` on (``trellis``)
==========  ==========================================  ===========================================

``blocks = ceil(cols / 64)``; the last block of a row is padded with zeros. A byte of NF4 codes
holds the earlier value in its high nibble, as bitsandbytes writes it.

Rounding points, which every kernel that reads a packed matrix shares: a value is *one* float32
product, ``float32(code value) * float32(scale)``, and a rounding to the wanted dtype comes after
it. The scale of nf4-dq has no rounding point inside its product: ``step`` keeps 16 significant
bits, so ``step * code`` is exact in float32, with or without a fused multiply-add.

A row of nf4-dq may be *narrow*: it uses 8 or 4 of the 16 codes (:data:`NARROW_CODES`) and takes 3 or
2 bits an element on disk (``narrow_codes``). In memory it is a row of nf4-dq like any other, or one of a
``narrow_rows.NarrowMatrix``.

A row of trellis codes has 4, 3 or 2 bits an element, which ``widths`` says. On disk it takes no byte more
than that (:func:`stored_code_nbytes`); in memory every row has room for 4, zeros behind its own.

Sources: NF4 and double quantisation, Dettmers et al., *QLoRA*, NeurIPS 2023 (arXiv 2305.14314);
the float32 code values and decision thresholds are those of bitsandbytes (``dQuantizeNF4``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F

from vllm_vlora.trellis import (
    TRELLIS_WIDTHS,
    encode_windows,
    join_windows,
    split_windows,
    stream_nbytes,
    trellis_table,
)
from vllm_vlora.trellis_tables import TRELLIS_TABLES

SHARED_FORMATS = ("float32", "float16", "bfloat16", "int8", "nf4", "nf4-dq")
FORMATS = (*SHARED_FORMATS, "trellis")
"""Private factors may have any of these; what tasks share, and what stands on it, one of the first."""
NF4_BLOCK = 64
SCALE_BLOCK = 256
TRELLIS_ROOM = 8
"""Bytes of a trellis row in memory behind those of its whole blocks of 64 with 4 bits."""

NF4_CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The value of each 4-bit code: quantiles of the normal distribution, as float32 values."""

NF4_THRESHOLDS = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)
"""The code of ``x`` in [-1, 1] is the number of thresholds that ``x`` is strictly above."""

NARROW_CODES = MappingProxyType({3: (0, 1, 3, 5, 7, 10, 13, 15), 2: (0, 4, 11, 15)})
"""Bits of a narrow row -> the NF4 codes that it may use, ascending.

Of all 12870 sets of 8 codes and 1820 of 4, these lose 0.0313 and 0.1118 of the energy of Gaussian blocks
of 64, each with its best scale; the best sets lose 0.0312 and 0.1117. The set of 8 holds the exact zero;
in one of 4 it would cost 15 % more (0.129).
"""

FLOAT_DTYPES = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)
"""The formats that store values as they are, and the dtype of their one part."""
FORMAT_OF_DTYPE = MappingProxyType({dtype: name for name, dtype in FLOAT_DTYPES.items()})
"""The other way round."""

# Float dtype -> an integer one of its size, and the bits of infinity.
_BITS = MappingProxyType(
    {
        torch.bfloat16: (torch.int16, 0x7F80),
        torch.float16: (torch.int16, 0x7C00),
        torch.float32: (torch.int32, 0x7F80_0000),
        torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    }
)
# Larger tensors than a core's cache holds are faster read once, and in several threads.
_CACHED_NBYTES = 4 << 20

# Entry b holds the two values of byte b as one 8-byte word: one look-up gives both, and copying
# words is several times faster than copying pairs of floats.
_NF4_WORDS = torch.tensor(
    [pair for high in NF4_CODEBOOK for low in NF4_CODEBOOK for pair in (high, low)],
    dtype=torch.float32,
    device="cpu",
).view(torch.float64)
_INT8_MAX = 127
# The greatest float32 whose 127-fold is still finite: with a larger scale the code 127 of a row
# that holds values near float32's maximum would come back as infinity.
_INT8_SCALE_MAX = 132104.046875 * 2.0**104
# Elements quantised at a time: the temporaries of one chunk mostly stay in a core's cache. A GPU needs
# many to be busy.
_CHUNK_ELEMENTS = 1 << 17
_GPU_CHUNK_ELEMENTS = 1 << 24
# Rows that are put into trellis codes at a time.
_SEARCHED = 1 << 12
# Scales that are tried for a narrow block, in units of its amax. Each is then replaced by the
# least-squares scale of the codes it gives: four times as many would save 0.3 % of the error.
_NARROW_FRACTIONS = tuple(0.4 + 0.08 * step for step in range(10))


@dataclass(frozen=True)
class PackedMatrix:
    """A ``rows x cols`` matrix whose rows are packed independently.

    Attributes:
        format: one of :data:`FORMATS`.
        rows: number of rows.
        cols: number of columns (of the matrix, without the padding of NF4).
        parts: part name -> tensor ``[rows, ...]``; see :func:`part_specs`.

    Raises:
        ValueError: the parts are not those of the format, or differ from it in shape, dtype or
            device.
    """

    format: str
    rows: int
    cols: int
    parts: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        specs = part_specs(self.format, self.cols)
        if self.parts.keys() != specs.keys():
            raise ValueError(
                f"a {self.format} matrix has the parts {sorted(specs)}, got {sorted(self.parts)}"
            )
        for name, (dtype, row_shape) in specs.items():
            part = self.parts[name]
            shape = (self.rows, *row_shape)
            if part.dtype != dtype or tuple(part.shape) != shape:
                raise ValueError(
                    f"part {name!r} of a {self.rows} x {self.cols} {self.format} matrix is {dtype} "
                    f"{list(shape)}, got {part.dtype} {list(part.shape)}"
                )
            if part.device != self.device:
                raise ValueError(
                    f"part {name!r} is on {part.device}, other parts are on {self.device}: move "
                    "them to one device"
                )

    @property
    def device(self) -> torch.device:
        """The device that holds every part."""
        return next(iter(self.parts.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def to(self, device: torch.device | str) -> PackedMatrix:
        """The same matrix on ``device``; shares memory when it is there already."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

    def widened(self) -> PackedMatrix:
        """The same matrix in one of :data:`FORMATS`: itself, see ``narrow_rows.NarrowMatrix``."""
        return self

    @property
    def is_zero(self) -> bool:
        """Whether every value is zero: the numbers of a float format are, or the scales of another."""
        sizes = next(n for n in ("values", "scales", "scale_range") if n in self.parts)
        return not bool(self.parts[sizes].any())

    def row_slice(self, start: int, stop: int) -> PackedMatrix:
        """Rows ``start`` to ``stop`` (exclusive) as a view; ValueError when they do not exist."""
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start}:{stop} are not within 0:{self.rows}")
        parts = {name: part[start:stop] for name, part in self.parts.items()}
        return PackedMatrix(self.format, stop - start, self.cols, parts)

    def by_columns(self) -> PackedMatrix:
        """The same matrix with its values or int8 codes column by column in memory.

        So they lie in an engine's slot for a transposed factor, which a CPU then fills several times
        faster. NF4 codes come in pairs of columns; such a matrix is returned as it is.
        """
        name = "codes" if self.format == "int8" else "values"
        if self.format not in (*FLOAT_DTYPES, "int8"):
            return self
        parts = {**self.parts, name: self.parts[name].T.contiguous().T}
        return PackedMatrix(self.format, self.rows, self.cols, parts)

    def by_rows(self) -> PackedMatrix:
        """The same matrix with each part row by row in memory, as the kernels read it."""
        if all(part.is_contiguous() for part in self.parts.values()):
            return self
        return replace(self, parts={n: part.contiguous() for n, part in self.parts.items()})

    def column_blocks(self, start: int, stop: int) -> PackedMatrix:
        """A copy of the columns from ``start``, rounded down to a multiple of 64, to ``stop``.

        The cut is at NF4's blocks in every format, so that matrices of several formats cut alike.
        Doubly quantised scales become plain float32 ones, whose groups of blocks a cut would tear.

        Raises:
            ValueError: the columns do not exist.
        """
        if not 0 <= start <= stop <= self.cols:
            raise ValueError(f"columns {start}:{stop} are not within 0:{self.cols}")
        first = start // NF4_BLOCK
        if self.format == "trellis":
            return self._trellis_blocks(first, stop)
        if self.format in FLOAT_DTYPES or self.format == "int8":
            name = "codes" if self.format == "int8" else "values"
            format, parts = self.format, dict(self.parts)
            parts[name] = parts[name][:, first * NF4_BLOCK : stop]
        else:
            last, half = -(-stop // NF4_BLOCK), NF4_BLOCK // 2
            format = "nf4"
            parts = {
                "codes": self.parts["codes"][:, first * half : last * half],
                "scales": nf4_scales(self)[:, first:last],
            }
        # Where a cut is all of a part, contiguous() would return the part itself.
        parts = {n: p.clone(memory_format=torch.contiguous_format) for n, p in parts.items()}
        return PackedMatrix(format, self.rows, stop - first * NF4_BLOCK, parts)

    def _trellis_blocks(self, first: int, stop: int) -> PackedMatrix:
        """A copy of the columns from a block on: the streams of that element, of each row."""
        parts = {name: part.clone() for name, part in self.parts.items()}
        cols = stop - first * NF4_BLOCK
        (_, (room,)) = part_specs("trellis", cols)["codes"]
        codes = parts["codes"] = self.parts["codes"].new_zeros(self.rows, room)
        for width, rows in trellis_rows(self):
            start, nbytes = first * NF4_BLOCK * width // 8, stream_nbytes(cols, width)
            codes[rows, :nbytes] = self.parts["codes"][rows, start : start + nbytes]
        return PackedMatrix("trellis", self.rows, cols, parts)


def part_specs(format: str, cols: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Each part of a ``format`` matrix with ``cols`` columns: its dtype and the shape of a row.

    Raises:
        ValueError: an unknown format or a negative number of columns.
    """
    if cols < 0:
        raise ValueError(f"a matrix cannot have {cols} columns")
    if format in FLOAT_DTYPES:
        return {"values": (FLOAT_DTYPES[format], (cols,))}
    if format == "int8":
        return {"codes": (torch.int8, (cols,)), "scales": (torch.float32, (1,))}
    blocks = -(-cols // NF4_BLOCK)
    codes = (torch.uint8, (blocks * NF4_BLOCK // 2,))
    if format == "trellis":
        # Room for the last window, and for what a kernel reads in words.
        room = codes[1][0] + TRELLIS_ROOM if cols else 0
        return {
            "codes": (torch.uint8, (room,)),
            "widths": (torch.uint8, (1,)),
            "scales": (torch.float32, (1,)),
        }
    if format == "nf4":
        return {"codes": codes, "scales": (torch.float32, (blocks,))}
    if format == "nf4-dq":
        return {
            "codes": codes,
            "scale_codes": (torch.uint8, (blocks,)),
            "scale_range": (torch.float32, (-(-blocks // SCALE_BLOCK), 2)),
        }
    raise ValueError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")


def row_nbytes(format: str, cols: int) -> int:
    """Bytes that one row of ``cols`` columns takes in ``format``."""
    total = 0
    for dtype, shape in part_specs(format, cols).values():
        total += dtype.itemsize * torch.Size(shape).numel()
    return total


def pack(matrix: torch.Tensor, format: str) -> PackedMatrix:
    """Pack ``matrix`` ``[rows, cols]`` (any floating dtype), each row on its own.

    The quantised formats start from the float32 values. With ``amax`` the largest magnitude of
    the row or block:

    - int8: ``scale = amax / 127``, ``code = round(x / scale)`` (ties to even); the error of a
      value is at most ``scale / 2``.
    - nf4: ``scale = amax``, ``code`` by :data:`NF4_THRESHOLDS` on ``x / amax``; the error is at
      most half the widest gap of the codebook, 0.152 ``amax``. (bitsandbytes' GPU kernel
      multiplies by the rounded ``1 / amax``, which may differ by one code where ``x / amax`` is
      within a rounding of a threshold; the division also serves denormal ``amax``.)
    - nf4-dq: the codes are those of nf4, chosen with the true ``amax`` as in QLoRA; the scales
      are then stored as 8-bit steps between the least and the greatest of each 256.
    - trellis: :func:`pack_trellis` with 4 bits an element.

    Zeros, and so all-zero rows, come back as exact zeros. Magnitudes below float32's normal range
    (1.2e-38) are accepted; as the scale itself then has few bits, their errors may be larger.

    Raises:
        ValueError: not a 2-D floating tensor, an unknown format, a value that is NaN or infinite,
            or one that is too large for the format.
    """
    _check_matrix(matrix)
    if format == "trellis":
        return pack_trellis(matrix, TRELLIS_WIDTHS[0])
    rows, cols = matrix.shape
    specs = part_specs(format, cols)
    matrix = matrix.detach()
    parts = {
        name: torch.empty((rows, *shape), dtype=dtype, device=matrix.device)
        for name, (dtype, shape) in specs.items()
    }
    if cols > 0:
        step = _chunk_rows(matrix)
        for start in range(0, rows, step):
            chunk = matrix[start : start + step]
            for name, part in _pack_rows(chunk, format).items():
                parts[name][start : start + step] = part
    return PackedMatrix(format, rows, cols, parts)


def pack_narrow(matrix: torch.Tensor, bits: int) -> PackedMatrix:
    """Pack ``matrix`` ``[rows, cols]`` as nf4-dq with the codes of 3- or 2-bit rows only.

    For each block a scale is searched that makes ``sum_j (x_j - scale * code_j)^2`` small:
    codes by rounding at each of a grid of scales, each with its least-squares scale, the best of
    them kept. The scales are then stored as nf4-dq has them, and the codes are chosen again for the
    stored scales. Every row is packed on its own; zeros of a block of zeros come back as exact zeros.

    Args:
        bits: 3 or 2.

    Returns:
        An nf4-dq matrix, whose codes are those of a 4-bit row.

    Raises:
        ValueError: as :func:`pack`; bits other than 3 and 2.
    """
    if bits not in NARROW_CODES:
        raise ValueError(f"narrow rows have 3 or 2 bits, got {bits}")
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"pack_narrow needs a 2-D floating-point matrix, got {matrix.dtype} "
            f"{list(matrix.shape)}"
        )
    if matrix.numel() == 0:
        return pack(matrix, "nf4-dq")
    return stack_rows([_pack_narrow_rows(chunk, bits) for chunk in _chunks(matrix)])


def pack_trellis(matrix: torch.Tensor, widths: int | torch.Tensor) -> PackedMatrix:
    """Pack ``matrix`` ``[rows, cols]`` in trellis codes.

    A row becomes the stream whose values are nearest to it in units of its root mean square, and the
    least-squares scale of these values. Takes about a microsecond a number on one core, if there are a
    hundred rows and more of a width. Rows of zeros come back as exact zeros.

    Args:
        widths: bits an element, 4, 3 or 2; of all rows, or of each ``[rows]``.

    Raises:
        ValueError: as :func:`pack`; another width.
    """
    _check_matrix(matrix)
    rows, cols = matrix.shape
    of_rows = torch.as_tensor(widths, device=matrix.device).expand(rows)
    if not bool(torch.isin(of_rows, torch.tensor(TRELLIS_WIDTHS, device=matrix.device)).all()):
        raise ValueError(f"trellis rows have 4, 3 or 2 bits, got {widths}")
    packed = PackedMatrix("trellis", rows, cols, _trellis_parts(of_rows, cols))
    for width, chosen in trellis_rows(packed) if matrix.numel() else ():
        found = [_pack_trellis_rows(p, width) for p in matrix.detach()[chosen].split(_SEARCHED)]
        packed.parts["scales"][chosen] = torch.cat([scales for _, scales in found])
        streams = torch.cat([streams for streams, _ in found])
        packed.parts["codes"][chosen, : streams.shape[1]] = streams
    return packed


def stored_code_nbytes(format: str, cols: int, bits: int) -> int:
    """Bytes on disk of the codes of a row of ``cols`` columns with 4, 3 or 2 bits an element."""
    if format == "trellis":
        return stream_nbytes(cols, bits)
    return -(-cols // NF4_BLOCK) * NF4_BLOCK * bits // 8


def trellis_row_nbytes(cols: int, width: int) -> int:
    """Bytes on disk of a trellis row of ``cols`` columns: its stream and its scale."""
    return stream_nbytes(cols, width) + torch.float32.itemsize


def stored_streams(codes: torch.Tensor, cols: int, width: int) -> torch.Tensor:
    """``codes`` of trellis rows of ``cols`` columns and one width as they lie on disk."""
    return codes[:, : stream_nbytes(cols, width)]


def trellis_parts_of(streams: torch.Tensor, cols: int, width: int) -> dict[str, torch.Tensor]:
    """``codes`` and ``widths`` in memory of such rows."""
    parts = _trellis_parts(torch.full((len(streams),), width, device=streams.device), cols)
    parts["codes"][:, : streams.shape[1]] = streams
    return {"codes": parts["codes"], "widths": parts["widths"]}


def trellis_rows(packed: PackedMatrix) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """(width, which rows) of each width that rows of a trellis matrix have."""
    widths = packed.parts["widths"][:, 0]
    for width in TRELLIS_WIDTHS:
        of_width = widths == width
        if bool(of_width.all()):
            yield width, slice(None)
            return
        rows = of_width.nonzero()[:, 0]
        if len(rows):
            yield width, rows


def as_stored(matrix: torch.Tensor, format: str, amax: torch.Tensor | None = None) -> torch.Tensor:
    """The float32 values that ``pack`` would store, in less time than packing and unpacking take.

    Args:
        amax: for int8, where these are columns of longer rows, the greatest magnitude in each of those,
            ``[rows, 1]``.

    Raises:
        ValueError: as :func:`pack`.
    """
    if format == "int8":
        chunks = _chunks(matrix)
        tops = [None] * len(chunks) if amax is None else amax.split(_chunk_rows(matrix))
        both = (_int8_codes(chunk, top) for chunk, top in zip(chunks, tops))
        return torch.cat([codes.mul_(scales) for codes, scales in both])
    if format not in ("nf4", "nf4-dq"):
        return unpack(pack(matrix, format))
    found = []
    for chunk in _chunks(matrix):
        units, scales = _nf4_units(chunk, format)
        if format == "nf4-dq":
            scales = _stored_scales(*_pack_scales(scales))
        values = _value_of(units, NF4_THRESHOLDS, NF4_CODEBOOK)
        found.append(values.mul_(scales.unsqueeze(2)).flatten(1)[:, : matrix.shape[1]])
    return torch.cat(found)


def as_stored_narrow(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 values that ``pack_narrow`` would store with 3 bits and with 2, but for rounding.

    Raises:
        ValueError: as :func:`pack`.
    """
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for chunk in _chunks(matrix):
        blocks, amax = _blocks_of(chunk, "nf4-dq")
        searched = _narrow_scales(blocks, amax, matrix.shape[1], (3, 2))
        for rows, scales, bits in zip(found, searched, (3, 2)):
            scales = _stored_scales(*_pack_scales(scales))
            values = _value_of(
                _narrow_units(blocks, scales), _narrow_thresholds(bits), _narrow_book(bits)
            )
            rows.append(values.mul_(scales.unsqueeze(2)).flatten(1)[:, : matrix.shape[1]])
    return torch.cat(found[0]), torch.cat(found[1])


def _chunks(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A matrix cut by rows into what is quantised at a time."""
    return matrix.detach().split(_chunk_rows(matrix))


def _chunk_rows(matrix: torch.Tensor) -> int:
    elements = _CHUNK_ELEMENTS if matrix.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    return max(1, elements // max(1, matrix.shape[1]))


def stack_rows(parts: Sequence[PackedMatrix]) -> PackedMatrix:
    """The rows of several matrices one after another, as packed.

    Raises:
        ValueError: no matrices, or they differ in format, columns or device.
    """
    kinds = {(part.format, part.cols, part.device) for part in parts}
    if len(kinds) != 1:
        raise ValueError(
            "stack_rows needs matrices of one format, one number of columns and one device, got "
            f"{sorted(map(str, kinds)) or 'none'}"
        )
    if len(parts) == 1:
        return parts[0]
    ((format, cols, _),) = kinds
    joined = {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts}
    return PackedMatrix(format, sum(part.rows for part in parts), cols, joined)


def narrow_row_nbytes(cols: int, bits: int) -> int:
    """Bytes on disk of an nf4-dq row of ``cols`` columns with 4, 3 or 2 bits an element."""
    blocks = -(-cols // NF4_BLOCK)
    return row_nbytes("nf4-dq", cols) - blocks * NF4_BLOCK * (4 - bits) // 8


def narrow_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """NF4 codes of 3- or 2-bit rows as they lie on disk.

    With ``i(j)`` the place of element j's code in :data:`NARROW_CODES`, a block of 64 has 16 bytes of
    the two (at 3 bits: the upper two) bits of each i, four elements a byte, the earlier the higher;
    at 3 bits 8 bytes follow with the lowest bit of each i, eight elements a byte, the earlier the
    higher.

    Args:
        codes: uint8, bytes of two NF4 codes in whole blocks: ``[..., 32 * blocks]``.
        bits: 3 or 2.

    Returns:
        uint8 ``[..., 8 * bits * blocks]``.

    Raises:
        ValueError: a code that such rows do not have.
    """
    words = codes.reshape(codes.numel() // 2, 2).view(torch.int16)[:, 0].int() & 0xFFFF
    keys = torch.index_select(_narrow_keys(bits).to(codes.device), 0, words).view(-1, 16)
    if bool((keys < 0).any()):
        raise ValueError(_OTHER_CODES.format(bits))
    planes = [(keys >> 4 * (bits - 2)).to(torch.uint8)]
    if bits == 3:
        lowest = (keys & 15).to(torch.uint8)
        planes.append((lowest[:, ::2] << 4) | lowest[:, 1::2])
    return torch.cat(planes, dim=1).view(*codes.shape[:-1], codes.shape[-1] * bits // 4)


_OTHER_CODES = "the codes are not those of rows with {} bits: pack with pack_narrow"


@cache
def _narrow_keys(bits: int) -> torch.Tensor:
    """The inverse of ``_wide_words``: the key of every word, -1 for those that such rows do not have."""
    words = _wide_words(bits).int() & 0xFFFF
    keys = torch.full((1 << 16,), -1, dtype=torch.int16, device="cpu")
    keys[words] = torch.arange(len(words), dtype=torch.int16, device="cpu")
    return keys


def narrow_places(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The place of each NF4 code among those of rows with so many bits.

    Args:
        codes: uint8, bytes of two NF4 codes in whole blocks: ``[..., 32 * blocks]``.
        bits: 4, 3 or 2; with 4 a place is the code.

    Returns:
        uint8 ``[blocks of all rows, 64]``.

    Raises:
        ValueError: a code that such rows do not have.
    """
    pairs = torch.stack([codes >> 4, codes & 15], dim=-1)
    pairs = pairs.view(pairs.numel() // NF4_BLOCK, NF4_BLOCK)
    if bits == 4:
        return pairs
    places = torch.full((16,), 255, dtype=torch.uint8, device=codes.device)
    kept = torch.tensor(NARROW_CODES[bits], device=codes.device)
    places[kept] = torch.arange(len(kept), dtype=torch.uint8, device=codes.device)
    index = places[pairs.int()]
    if bool((index == 255).any()):
        raise ValueError(_OTHER_CODES.format(bits))
    return index


def stored_places(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """``narrow_places`` from the codes of rows with so many bits as they lie on disk."""
    if bits == 4:
        return narrow_places(stored, 4)
    planes = stored.reshape(stored.numel() // (8 * bits), 8 * bits)
    places = _split_bits(planes[:, :16], 2)
    return places if bits == 2 else (places << 1) | _split_bits(planes[:, 16:], 1)


def widen_codes(narrow: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`narrow_codes`: ``[..., 8 * bits * blocks]`` to ``[..., 32 * blocks]``."""
    planes = narrow.reshape(narrow.numel() // (8 * bits), 8 * bits).int()
    keys = planes[:, :16]
    if bits == 3:
        lowest = torch.stack([planes[:, 16:] >> 4, planes[:, 16:] & 15], dim=2).flatten(1)
        keys = (keys << 4) | lowest
    words = torch.index_select(_wide_words(bits).to(narrow.device), 0, keys.flatten())
    return words.view(torch.uint8).view(*narrow.shape[:-1], narrow.shape[-1] * 4 // bits)


@cache
def _wide_words(bits: int) -> torch.Tensor:
    """For four elements as ``widen_codes`` keys them, their two bytes of NF4 codes as one word.

    A key is a byte with two bits of each and, at 3 bits, four bits with the lowest one of each.
    """
    keys = torch.arange(1 << (4 * bits), device="cpu")
    places = _split_bits((keys >> (4 * (bits - 2)))[:, None], 2)
    if bits == 3:
        places = (places << 1) | _split_bits((keys << 4)[:, None], 1)[:, :4]
    codes = torch.tensor(NARROW_CODES[bits], device="cpu")[places]
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    return pairs.to(torch.uint8).view(torch.int16)[:, 0].contiguous()


def unpack(
    packed: PackedMatrix,
    dtype: torch.dtype = torch.float32,
    start: int = 0,
    stop: int | None = None,
) -> torch.Tensor:
    """Columns ``start`` to ``stop`` (all by default) of the matrix, ``[rows, stop - start]``.

    A float format asked for in its own dtype is a view of the packed values, not a copy.

    Raises:
        ValueError: the columns do not exist.
    """
    stop = packed.cols if stop is None else stop
    if not 0 <= start <= stop <= packed.cols:
        raise ValueError(f"columns {start}:{stop} are not within 0:{packed.cols}")
    packed = packed.widened()
    parts = packed.parts
    if packed.format in FLOAT_DTYPES:
        return parts["values"][:, start:stop].to(dtype)
    if packed.format == "int8":
        return (parts["codes"][:, start:stop].float() * parts["scales"]).to(dtype)
    if packed.format == "trellis":
        return _unpack_trellis(packed, start, stop).to(dtype)
    return _unpack_nf4(packed, start, stop).to(dtype)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape and dtype holds neither NaN nor infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.detach()
    # Nothing makes a finite sum of a NaN or an infinity. A fourth of the time of what follows on 4 x 64;
    # where finite values overflow, that decides.
    if values.dtype in _BITS and math.isfinite(values.sum().item()):
        return True
    if values.dtype in _BITS and values.device.type == "cpu" and values.nbytes <= _CACHED_NBYTES:
        # As integers, infinities and NaN have the greatest bits, with a sign and without one. This took a
        # third of aminmax() on 14336 x 16, and a sixteenth on its transpose.
        integer, inf = _BITS[values.dtype]
        bits = values.view(integer).numpy()
        sign = 1 << 8 * values.itemsize - 1
        return bool(bits.max() < inf) and int(bits.view(f"u{values.itemsize}").max()) < inf | sign
    # One-byte floats have no least and greatest value of their own.
    values = values.float() if values.itemsize == 1 else values
    # A NaN or an infinity is also the least or the greatest value; this reads a tensor once and took
    # a twentieth of isfinite().all() on 14336 x 16.
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())


def _check_matrix(matrix: torch.Tensor) -> None:
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"pack needs a 2-D floating-point matrix, got {matrix.dtype} {list(matrix.shape)}"
        )


def _check_held(stored: torch.Tensor, matrix: torch.Tensor, format: str) -> None:
    """Refuse a matrix that packing cannot hold.

    Args:
        stored: its values in the type that packing starts from, or the greatest magnitudes among them.
    """
    if is_finite(stored):
        return
    if not is_finite(matrix):
        raise ValueError("the matrix holds NaN or infinite values, which cannot be packed")
    raise ValueError(
        f"the matrix holds values too large for {format} (largest magnitude "
        f"{matrix.abs().max().item():g}): pack it in a wider format"
    )


def _pack_rows(matrix: torch.Tensor, format: str) -> dict[str, torch.Tensor]:
    if format in FLOAT_DTYPES:
        values = matrix.to(FLOAT_DTYPES[format])
        _check_held(values, matrix, format)
        return {"values": values}
    if format == "int8":
        return _pack_int8(matrix)
    codes, scales = _nf4_codes(matrix, format)
    codes = _join_nibbles(codes)
    if format == "nf4":
        return {"codes": codes, "scales": scales}
    scale_codes, scale_range = _pack_scales(scales)
    return {"codes": codes, "scale_codes": scale_codes, "scale_range": scale_range}


def _pack_int8(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales = _int8_codes(matrix)
    return {"codes": codes.to(torch.int8), "scales": scales}


def _int8_codes(
    matrix: torch.Tensor, amax: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The code of every element, float32, and the rows' scales; ``amax`` as of ``as_stored``."""
    values = matrix.float()
    if amax is None:
        amax = values.abs().amax(dim=1, keepdim=True)
    _check_held(amax, matrix, "int8")
    scales = (amax / _INT8_MAX).clamp_(max=_INT8_SCALE_MAX)
    # A zero scale (a zero row, or an amax that underflows) gives x / 0; such rows have code 0.
    codes = torch.where(scales > 0, values / scales, 0.0).round_()
    return codes.clamp_(-_INT8_MAX, _INT8_MAX), scales


def _pack_trellis_rows(matrix: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The streams of rows, as they lie on disk, and their scales."""
    _check_held(matrix.float().abs().amax(dim=1), matrix, "trellis")
    values = matrix.double()
    size = values.square().mean(dim=1, keepdim=True).sqrt()
    units = torch.where(size > 0, values / size, 0.0)
    windows = encode_windows(units.float(), width)
    found = trellis_table(width, matrix.device)[windows.int()].double()
    scales = (units * found).sum(dim=1, keepdim=True) / found.square().sum(dim=1, keepdim=True)
    scales = (scales.clamp(min=0) * size).float()
    _check_held(scales * max(map(abs, TRELLIS_TABLES[width])), matrix, "trellis")
    # The first value of the table is positive: a row of zeros has no negative ones.
    streams = join_windows(windows, width)
    return torch.where(scales > 0, streams, torch.zeros_like(streams)), scales


def _trellis_parts(widths: torch.Tensor, cols: int) -> dict[str, torch.Tensor]:
    """The parts of a matrix of zeros whose rows have these widths."""
    parts = {
        name: torch.zeros(len(widths), *shape, dtype=dtype, device=widths.device)
        for name, (dtype, shape) in part_specs("trellis", cols).items()
    }
    parts["widths"][:, 0] = widths
    return parts


def _unpack_trellis(packed: PackedMatrix, start: int, stop: int) -> torch.Tensor:
    first = start // 8
    values = torch.empty(packed.rows, stop - start, device=packed.device)
    for width, rows in trellis_rows(packed):
        streams = packed.parts["codes"][rows, first * width :]
        windows = split_windows(streams, width, stop - 8 * first)[:, start - 8 * first :]
        values[rows] = trellis_table(width, packed.device)[windows]
    return values * packed.parts["scales"]


def _nf4_codes(matrix: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The code of every element, uint8 ``[rows, blocks, 64]``, and the scales of the blocks."""
    units, scales = _nf4_units(matrix, format)
    return _count_above(units, NF4_THRESHOLDS), scales


def _nf4_units(matrix: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every element in units of its block's scale, ``[rows, blocks, 64]``, and these scales."""
    blocks, scales = _blocks_of(matrix, format)
    # A block of zeros has the code of zero.
    return blocks / torch.where(scales > 0, scales, 1.0)[..., None], scales


def _blocks_of(matrix: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in whole blocks, padded with zeros: float32 ``[rows, blocks, 64]``, and each one's amax."""
    rows, cols = matrix.shape
    values = matrix.float().contiguous()
    blocks = F.pad(values, (0, -cols % NF4_BLOCK)).view(rows, -1, NF4_BLOCK)
    amax = blocks.abs().amax(dim=2)
    _check_held(amax, matrix, format)
    return blocks, amax


def _join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[rows, blocks, 64]`` as bytes of two, ``[rows, 32 * blocks]``."""
    pairs = codes.view(len(codes), -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


@dataclass(frozen=True)
class _Cells:
    """Equal cells of [-1, 1] with at most one of some ascending bounds in each.

    Attributes:
        count: of the cells. below: how many bounds lie in earlier cells than each, uint8.
        edge: the bound in each cell, float32; above all values where there is none.
    """

    count: int
    below: torch.Tensor
    edge: torch.Tensor

    @classmethod
    @cache
    def of(cls, bounds: tuple[float, ...], device: torch.device) -> _Cells:
        """For these float32 values, ascending and strictly within (-1, 1)."""
        values = torch.tensor(bounds, dtype=torch.float32, device="cpu")
        count = 1 << math.ceil(math.log2(2 / min((float(values.diff().min()), 1.0))))
        # Numbered as values will be, so that rounding puts a bound and what equals it into one cell.
        cells = _cell_numbers(values, count).long()
        edge = torch.full((count + 1,), 2.0, device="cpu")
        edge[cells] = values
        below = torch.searchsorted(cells, torch.arange(count + 1, device="cpu"))
        assert len(cells.unique()) == len(bounds)
        return cls(count, below.to(device, torch.uint8), edge.to(device))


def _cell_numbers(values: torch.Tensor, count: int) -> torch.Tensor:
    half = count / 2
    return torch.add(half, values, alpha=half).int()


def _count_above(values: torch.Tensor, bounds: tuple[float, ...]) -> torch.Tensor:
    """How many of some ascending bounds each value in [-1, 1] is strictly above, uint8.

    Two look-ups and a comparison, whatever the number of bounds: a quarter of the time of a
    comparison with each of 15, and an eighth of that of ``torch.bucketize``.
    """
    cells = _Cells.of(bounds, values.device)
    flat = values.flatten()
    numbers = _cell_numbers(flat, cells.count)
    counts = torch.index_select(cells.below, 0, numbers)
    counts += torch.gt(flat, torch.index_select(cells.edge, 0, numbers)).view(torch.uint8)
    return counts.view(values.shape)


def _value_of(
    units: torch.Tensor, bounds: tuple[float, ...], book: tuple[float, ...]
) -> torch.Tensor:
    """``book[_count_above(units, bounds)]`` without the codes: two look-ups and a comparison."""
    cells = _Cells.of(bounds, units.device)
    flat = units.flatten()
    numbers = _cell_numbers(flat, cells.count)
    above = torch.gt(flat, torch.index_select(cells.edge, 0, numbers))
    places = numbers.mul_(2).add_(above)
    return torch.index_select(_both_values(bounds, book, units.device), 0, places).view(units.shape)


@cache
def _both_values(
    bounds: tuple[float, ...], book: tuple[float, ...], device: torch.device
) -> torch.Tensor:
    """The values of what lies in each cell, up to the cell's bound and above it, one after another."""
    below = _Cells.of(bounds, device).below.long()
    values = torch.tensor(book, dtype=torch.float32, device=device)
    above = (below + 1).clamp_(max=len(book) - 1)
    return torch.stack([values[below], values[above]], dim=1).flatten()


def _pack_narrow_rows(matrix: torch.Tensor, bits: int) -> PackedMatrix:
    blocks, amax = _blocks_of(matrix, "nf4-dq")
    (scales,) = _narrow_scales(blocks, amax, matrix.shape[1], (bits,))
    scale_codes, scale_range = _pack_scales(scales)
    codes = _narrow_row_codes(blocks, _stored_scales(scale_codes, scale_range), bits)
    parts = {
        "codes": _join_nibbles(codes),
        "scale_codes": scale_codes,
        "scale_range": scale_range,
    }
    return PackedMatrix("nf4-dq", len(matrix), matrix.shape[1], parts)


def _narrow_row_codes(blocks: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The NF4 codes of narrow rows for the scales that are stored, uint8 like ``blocks``."""
    index = _count_above(_narrow_units(blocks, scales), _narrow_thresholds(bits))
    kept = torch.tensor(NARROW_CODES[bits], dtype=torch.uint8, device=blocks.device)
    return torch.index_select(kept, 0, index.flatten().int()).view(blocks.shape)


def _narrow_book(bits: int) -> tuple[float, ...]:
    return tuple(NF4_CODEBOOK[code] for code in NARROW_CODES[bits])


def _narrow_units(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Every element in units of its block's stored scale, within [-1, 1]."""
    scales = scales.unsqueeze(2)
    used = scales > 0
    units = (blocks / torch.where(used, scales, 1.0)).clamp_(-1, 1)
    if not bool(used.all()):
        # The product is zero whatever the code, and +0.0 with one that is not negative.
        units = torch.where(used, units, 1.0)
    return units


def _narrow_scales(
    blocks: torch.Tensor, amax: torch.Tensor, cols: int, widths: tuple[int, ...]
) -> list[torch.Tensor]:
    """For each number of bits every block's scale, ``[rows, blocks]``, as ``pack_narrow`` searches it.

    The thresholds of all scales together cut [-1, 1] into intervals, in each of which an element has one
    code at each scale: one look-up of a row of values gives its codes at all scales.
    """
    bounds, code_values = _search_tables(widths)
    code_values = code_values.to(blocks.device)
    rows, count, width = blocks.shape
    units = blocks / torch.where(amax > 0, amax, 1.0).unsqueeze(2)
    places = _count_above(units, bounds).view(rows * count, width).int()
    squares = code_values.square()
    product = F.embedding_bag(
        places, code_values, mode="sum", per_sample_weights=units.view(rows * count, width)
    )
    norm = F.embedding_bag(places, squares, mode="sum")
    # Padding has no weight; its zeros lie in one interval, in the last block of each row.
    norm[count - 1 :: count] -= (-cols % NF4_BLOCK) * squares[sum(bound < 0 for bound in bounds)]
    # With its best scale, product / norm, a choice of codes explains this much of the energy.
    gain = torch.where((norm > 0) & (product > 0), product.square() / norm, 0.0)
    scale = torch.where(gain > 0, product / norm, 0.0)
    found = []
    for gains, scales in zip(gain.chunk(len(widths), 1), scale.chunk(len(widths), 1)):
        best = scales.gather(1, gains.argmax(dim=1, keepdim=True)).view(rows, count)
        found.append((best * amax).clamp_(max=torch.finfo(torch.float32).max))
    return found


@cache
def _search_tables(widths: tuple[int, ...]) -> tuple[tuple[float, ...], torch.Tensor]:
    """The thresholds of all scales, ascending, and each interval's code value at each scale.

    The scales are those of the first number of bits, then those of the next.
    """
    fractions = torch.tensor(_NARROW_FRACTIONS, device="cpu")[:, None]
    tables = [fractions * torch.tensor(_narrow_thresholds(bits), device="cpu") for bits in widths]
    bounds = torch.cat([table.flatten() for table in tables]).unique()
    # An interval begins at a bound, and what lies in it is above that bound; the first begins at -1.
    starts = torch.cat([torch.tensor([-1.0], device="cpu"), bounds]).expand(len(fractions), -1)
    columns = []
    for bits, table in zip(widths, tables):
        book = torch.tensor(NF4_CODEBOOK, device="cpu")[list(NARROW_CODES[bits])]
        columns.append(book[torch.searchsorted(table, starts.contiguous(), right=True)])
    return tuple(bounds.tolist()), torch.cat(columns).T.contiguous()


@cache
def _narrow_thresholds(bits: int) -> tuple[float, ...]:
    """The midpoints between the values of the narrow codes."""
    book = torch.tensor(NF4_CODEBOOK, device="cpu")[list(NARROW_CODES[bits])]
    return tuple(((book[1:] + book[:-1]) / 2).tolist())


def _split_bits(joined: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields of 1 or 2 bits ``[n, 64]`` of bytes ``[n, 8 * bits]``, the earlier the higher."""
    mask = (1 << bits) - 1
    fields = [(joined >> (8 - bits * (place + 1))) & mask for place in range(8 // bits)]
    return torch.stack(fields, dim=2).flatten(1)


def _pack_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, count = scales.shape
    width = min(max(count, 1), SCALE_BLOCK)
    # Padded with copies of a scale, so that the least and the greatest are those of real scales.
    padding = scales[:, -1:].expand(rows, -count % width)
    groups = torch.cat([scales, padding], dim=1).view(rows, -1, width).double()
    low, high = groups.aminmax(dim=2)
    # Cut to 16 significant bits: code * step is then exact in float32, so that a fused
    # multiply-add and a product followed by a sum give the same scale on every device.
    step = ((high - low) / 255).view(torch.int64).bitwise_and_(-(1 << 37)).view(torch.float64)
    step = step.float().double()
    codes = torch.where(step.unsqueeze(2) > 0, (groups - low.unsqueeze(2)) / step.unsqueeze(2), 0.0)
    codes = codes.round_().clamp_(0, 255).to(torch.uint8).view(rows, -1)[:, :count]
    # Without the padding's places between the rows, which no file takes.
    return codes.contiguous(), torch.stack([low, step], dim=2).float()


def nf4_scales(packed: PackedMatrix) -> torch.Tensor:
    """The float32 scale of each block, ``[rows, blocks]``, of an nf4 or nf4-dq matrix."""
    if packed.format == "nf4":
        return packed.parts["scales"]
    return _stored_scales(packed.parts["scale_codes"], packed.parts["scale_range"])


def _stored_scales(codes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    low, step = ranges.unbind(2)
    if ranges.shape[1] > 1:
        low, step = (
            side.repeat_interleave(SCALE_BLOCK, dim=1)[:, : codes.shape[1]] for side in (low, step)
        )
    return torch.addcmul(low, codes.float(), step)


def nf4_values(codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The two codebook values of each byte, the high nibble's first: float32, twice as many.

    Args:
        codes: 1-D int32, bytes of NF4 codes.
        out: 1-D float64 of as many elements, whose memory takes the values.
    """
    words = _NF4_WORDS.to(codes.device)
    return torch.index_select(words, 0, codes, out=out).view(torch.float32)


def _unpack_nf4(packed: PackedMatrix, start: int, stop: int) -> torch.Tensor:
    first, last = start // NF4_BLOCK, -(-stop // NF4_BLOCK)
    half = NF4_BLOCK // 2
    codes = packed.parts["codes"][:, first * half : last * half].int()
    values = nf4_values(codes.flatten()).view(packed.rows, last - first, NF4_BLOCK)
    values = values * nf4_scales(packed)[:, first:last].unsqueeze(2)
    offset = first * NF4_BLOCK
    return values.flatten(1)[:, start - offset : stop - offset]
