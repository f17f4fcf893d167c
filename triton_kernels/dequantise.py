"""Device functions that dequantise packed matrices in registers; needs Triton to import.

They follow the rounding points of ``vllm_vlora.quantize``. A packed row is read in units of eight columns
that are looked up in ``codebook.CODEBOOK`` where rows are aligned, else element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_vlora.narrow_rows import BOOK_OF_2, BOOK_OF_3, NARROW_FORMAT
from vllm_vlora.quantize import NARROW_CODES, NF4_BLOCK, NF4_CODEBOOK, SCALE_BLOCK
from vllm_vlora.trellis import WINDOW
from vllm_vlora.triton_kernels.codebook import TRELLIS_BOOK

_BOOK = tl.constexpr(NF4_CODEBOOK)
_NF4_BLOCK = tl.constexpr(NF4_BLOCK)
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
_NARROW = tl.constexpr(NARROW_FORMAT)
_BOOK_OF_3 = tl.constexpr(BOOK_OF_3)
_BOOK_OF_2 = tl.constexpr(BOOK_OF_2)
_TRELLIS_BOOK = tl.constexpr(TRELLIS_BOOK)
# Of eight columns each, in a block.
_UNITS = tl.constexpr(NF4_BLOCK // 8)
# Of a trellis row's table; those of 4, 3 and 2 bits follow each other.
_WINDOWS = tl.constexpr(1 << WINDOW)


def _code_word(bits: int) -> int:
    """The NF4 codes of such rows as nibbles of one int32, the first the lowest."""
    word = sum(code << (4 * place) for place, code in enumerate(NARROW_CODES[bits]))
    return word - (word >> 31 << 32)


_CODES_OF_3 = tl.constexpr(_code_word(3))
_CODES_OF_2 = tl.constexpr(_code_word(2))


@triton.jit
def nf4_value(code):  # type: ignore[no-untyped-def]
    """The codebook's value of a 4-bit code, as a tree of 15 selects.

    A table in memory would have to be put on the device by a copy, and either kept there or sent
    with every call; the tree needs neither.
    """
    bit = (code & 1) != 0
    v0 = tl.where(bit, _BOOK[1], _BOOK[0])
    v1 = tl.where(bit, _BOOK[3], _BOOK[2])
    v2 = tl.where(bit, _BOOK[5], _BOOK[4])
    v3 = tl.where(bit, _BOOK[7], _BOOK[6])
    v4 = tl.where(bit, _BOOK[9], _BOOK[8])
    v5 = tl.where(bit, _BOOK[11], _BOOK[10])
    v6 = tl.where(bit, _BOOK[13], _BOOK[12])
    v7 = tl.where(bit, _BOOK[15], _BOOK[14])
    bit = (code & 2) != 0
    v0 = tl.where(bit, v1, v0)
    v1 = tl.where(bit, v3, v2)
    v2 = tl.where(bit, v5, v4)
    v3 = tl.where(bit, v7, v6)
    bit = (code & 4) != 0
    v0 = tl.where(bit, v1, v0)
    v1 = tl.where(bit, v3, v2)
    return tl.where((code & 8) != 0, v1, v0)


@triton.jit
def narrow_planes(address, bits, held_rows, blocks):  # type: ignore[no-untyped-def]
    """(low, middle, top, rows with a middle bit, rows with a top bit, blocks) of a narrow matrix.

    Args:
        address: of its ``codes``, int64. bits: ``NarrowMatrix.word``. held_rows: rows of the whole
            matrix. blocks: of a row.

    Returns:
        The planes' addresses, int64, both numbers of rows, and ``blocks``.
    """
    with_top = (bits & 65535).to(tl.int32)
    with_middle = ((bits >> 16) & 65535).to(tl.int32)
    middle = address + held_rows.to(tl.int64) * blocks * 16
    top = middle + with_middle.to(tl.int64) * blocks * 8
    return address, middle, top, with_middle, with_top, blocks


@triton.jit
def _narrow_codes(planes, rows, cols, mask):  # type: ignore[no-untyped-def]
    """The NF4 codes of elements ``[rows, cols]`` of a narrow matrix, one load an element and plane."""
    low_ptr = planes[0].to(tl.pointer_type(tl.uint8))
    middle_ptr = planes[1].to(tl.pointer_type(tl.uint8))
    top_ptr = planes[2].to(tl.pointer_type(tl.uint8))
    # int32: of int64 the compiler would keep twice the registers, and a plane is far below 2 GiB.
    unit = rows.to(tl.int32) * (planes[5] * 4) + (cols >> 4)
    low = tl.load(low_ptr + unit * 4 + ((cols & 7) >> 1), mask=mask, other=0).to(tl.int32)
    place = (low >> (((cols & 1) << 2) | ((cols >> 2) & 2))) & 3
    byte = unit * 2 + ((cols & 3) >> 1)
    shift = ((cols & 1) << 2) | ((cols >> 2) & 3)
    middle = tl.load(middle_ptr + byte, mask=mask & (rows < planes[3]), other=0).to(tl.int32)
    top = tl.load(top_ptr + byte, mask=mask & (rows < planes[4]), other=0).to(tl.int32)
    place |= (((middle >> shift) & 1) << 2) | (((top >> shift) & 1) << 3)
    codes = tl.where(rows < planes[3], _CODES_OF_3, _CODES_OF_2)
    return tl.where(rows < planes[4], place, (codes >> (4 * place)) & 15)


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    codes_ptr,
    scales_ptr,
    ranges_ptr,
    codes_stride,
    scales_stride,
    ranges_stride,
    rows,
    cols,
    row_mask,
    col_mask,
    FORMAT: tl.constexpr,
    planes=None,
    first_block=0,
    book_ptr=None,
):
    """Elements ``[rows, cols]`` of a packed matrix, dequantised; masked elements are zero.

    ``planes`` (see ``narrow_planes``) and ``first_block`` are those of a narrow matrix; ``codes_ptr``
    and its stride are for the others. Trellis codes need ``book_ptr``, see ``load_block``; their
    ``ranges`` are the rows' widths.
    """
    mask = row_mask[:, None] & col_mask[None, :]
    rows = rows.to(tl.int64)[:, None]
    cols = cols[None, :]
    # One assignment a branch and no early return: what follows a return would be compiled too.
    if FORMAT == "float":
        values = tl.load(codes_ptr + rows * codes_stride + cols, mask=mask, other=0.0)
    elif FORMAT == "int8":
        codes = tl.load(codes_ptr + rows * codes_stride + cols, mask=mask, other=0)
        scales = tl.load(scales_ptr + rows * scales_stride, mask=row_mask[:, None], other=0.0)
        values = codes.to(tl.float32) * scales
    elif FORMAT == "trellis":
        width_ptrs = ranges_ptr.to(tl.pointer_type(tl.uint8)) + rows * ranges_stride
        widths = tl.load(width_ptrs, mask=row_mask[:, None], other=4).to(tl.int32)
        bit = cols * widths
        byte_ptrs = codes_ptr + rows * codes_stride + (bit >> 3)
        pair = tl.load(byte_ptrs, mask=mask, other=0).to(tl.int32)
        pair |= tl.load(byte_ptrs + 1, mask=mask, other=0).to(tl.int32) << 8
        scales = tl.load(scales_ptr + rows * scales_stride, mask=row_mask[:, None], other=0.0)
        window = (4 - widths) * _WINDOWS + ((pair >> (bit & 7)) & (_WINDOWS - 1))
        values = tl.load(book_ptr + _TRELLIS_BOOK + window, mask=mask, other=0.0) * scales
    else:
        # Neighbouring threads read the same byte: the same sector serves them, and any first
        # column, odd ones included, works.
        if FORMAT == _NARROW:
            code = _narrow_codes(planes, rows, cols, mask)
        else:
            byte = tl.load(codes_ptr + rows * codes_stride + (cols >> 1), mask=mask, other=0)
            code = (byte.to(tl.int32) >> ((1 - (cols & 1)) * 4)) & 15
        values = nf4_value(code)
        block = cols // _NF4_BLOCK
        scales = tl.load(scales_ptr + rows * scales_stride + block, mask=mask, other=0)
        if FORMAT == "nf4":
            values = values * scales
        else:
            if FORMAT == _NARROW:
                block += first_block
            ranges = ranges_ptr + rows * ranges_stride + (block // _SCALE_BLOCK) * 2
            low = tl.load(ranges, mask=mask, other=0.0)
            step = tl.load(ranges + 1, mask=mask, other=0.0)
            values = values * (low + scales.to(tl.float32) * step)
    return values


@triton.jit
def row_tables(  # type: ignore[no-untyped-def]
    where, addresses, book_ptr, rows, row_live, FORMAT: tl.constexpr
):
    """(where a row's values are looked up, bits that its codes have), of the tensor ``rows``."""
    tables = book_ptr
    widths = 4
    if FORMAT == "trellis":
        width_ptrs = where[2].to(tl.pointer_type(tl.uint8)) + rows * where[5]
        widths = tl.load(width_ptrs, mask=row_live, other=4).to(tl.int32)
        tables = book_ptr + _TRELLIS_BOOK + (4 - widths) * _WINDOWS
    elif FORMAT == _NARROW:
        with_top, with_middle = addresses[3] & 65535, (addresses[3] >> 16) & 65535
        books = tl.where(rows < with_middle, tl.where(rows < with_top, 0, _BOOK_OF_3), _BOOK_OF_2)
        tables = book_ptr + books
    return tables, widths


@triton.jit
def load_units(  # type: ignore[no-untyped-def]
    where, addresses, rows, units, live, widths, FORMAT: tl.constexpr
):
    """Units of eight neighbouring columns: (their codes in one number each, their scales).

    All tensors have one axis, and nothing promises that the codes are aligned: so Triton gives a thread
    a unit and the next thread the next, and values are looked up, scaled and summed where the codes
    are. With two axes, or 16 bytes a thread, it takes the codes through shared memory into another
    layout to look them up, and sums rows across threads (six shuffles a value); in a loop with stages
    it copies each value looked up into shared memory. A test reads the compiled layouts.

    Args:
        where, addresses: of the matrix, see ``load_block``.
        rows, units: int32, ``[N]``; live: which there are; others have scale 0.
        widths: what ``row_tables`` gives.
    """
    if FORMAT == "trellis":
        # Eight windows of a row lie in five bytes, or in fewer.
        byte_ptrs = where[0] + (rows * where[3] + units * widths)
        codes = tl.load(byte_ptrs, mask=live, other=0).to(tl.uint64)
        for place in tl.static_range(1, 5):
            byte = tl.load(byte_ptrs + place, mask=live, other=0).to(tl.uint64)
            codes |= byte << (8 * place)
        scales = tl.load(where[1] + rows * where[4], mask=live, other=0.0)
    else:
        blocks = units // _UNITS
        scales = tl.load(where[1] + (rows * where[4] + blocks), mask=live, other=0)
        if FORMAT == _NARROW:
            codes = _load_narrow(addresses, where[3] // 16, rows, units, live)
            blocks += addresses[5]
        else:
            word_ptr = addresses[0].to(tl.pointer_type(tl.int32))
            words = rows * (where[3] // 4) + units
            codes = tl.load(word_ptr + words, mask=live, other=0).to(tl.uint32)
        if FORMAT != "nf4":
            range_ptrs = where[2] + (rows * where[5] + blocks // _SCALE_BLOCK * 2)
            low = tl.load(range_ptrs, mask=live, other=0.0)
            step = tl.load(range_ptrs + 1, mask=live, other=0.0)
            scales = low + scales.to(tl.float32) * step
    return codes, scales


@triton.jit
def unit_places(first_row, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows from ``first_row`` on, units from 0 on) of each unit of ``[ROWS, COLS]``, with one axis."""
    places = tl.arange(0, ROWS * (COLS // 8))
    return first_row + places // (COLS // 8), places % (COLS // 8)


@triton.jit
def _load_narrow(addresses, blocks, rows, units, live):  # type: ignore[no-untyped-def]
    """Words of eight places of four bits, the first the lowest, whatever the rows' bits."""
    planes = narrow_planes(addresses[0], addresses[3], addresses[4], blocks)
    low_ptr = planes[0].to(tl.pointer_type(tl.int32))
    middle_ptr = planes[1].to(tl.pointer_type(tl.int16))
    top_ptr = planes[2].to(tl.pointer_type(tl.int16))
    # Two units share a word of each plane.
    words = rows * (blocks * 4) + units // 2
    shift = (units & 1) * 2
    low = tl.load(low_ptr + words, mask=live, other=0).to(tl.uint32)
    middle = tl.load(middle_ptr + words, mask=live & (rows < planes[3]), other=0)
    top = tl.load(top_ptr + words, mask=live & (rows < planes[4]), other=0)
    middle = middle.to(tl.uint32) & 0xFFFF
    top = top.to(tl.uint32) & 0xFFFF
    # Bit 4 i of 16 goes to bit 4 i, bit 4 i + 1 to bit 16 + 4 i, and likewise from bit 2 on.
    middle = ((middle | (middle << 15)) >> shift) & 0x11111111
    top = ((top | (top << 15)) >> shift) & 0x11111111
    return ((low >> shift) & 0x33333333) | (middle << 2) | (top << 3)


@triton.jit
def look_up(  # type: ignore[no-untyped-def]
    codes, tables, widths, PLACE: tl.constexpr, FORMAT: tl.constexpr
):
    """The values, without their scales, of column PLACE of units."""
    if FORMAT == "trellis":
        index = ((codes >> (PLACE * widths)) & (_WINDOWS - 1)).to(tl.int32)
    elif FORMAT == _NARROW:
        index = ((codes >> (4 * PLACE)) & 15).to(tl.int32)
    else:
        # The higher half of a byte is the first of its two columns.
        index = ((codes >> (4 * (PLACE ^ 1))) & 15).to(tl.int32)
    return tl.load(tables + index)


@triton.jit
def join_places(v0, v1, v2, v3, v4, v5, v6, v7):  # type: ignore[no-untyped-def]
    """``[N, 2, 2, 2]`` in the order of the columns, from ``[N]`` of each place of a unit."""
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(even, odd)


@triton.jit
def scaled_units(  # type: ignore[no-untyped-def]
    codes, scales, tables, widths, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``[ROWS, COLS]`` from units, rounded to DTYPE."""
    values = join_places(
        look_up(codes, tables, widths, 0, FORMAT) * scales,
        look_up(codes, tables, widths, 1, FORMAT) * scales,
        look_up(codes, tables, widths, 2, FORMAT) * scales,
        look_up(codes, tables, widths, 3, FORMAT) * scales,
        look_up(codes, tables, widths, 4, FORMAT) * scales,
        look_up(codes, tables, widths, 5, FORMAT) * scales,
        look_up(codes, tables, widths, 6, FORMAT) * scales,
        look_up(codes, tables, widths, 7, FORMAT) * scales,
    )  # fmt: skip
    return values.reshape(ROWS, COLS).to(DTYPE)


@triton.jit
def _load_values(  # type: ignore[no-untyped-def]
    where,
    addresses,
    book_ptr,
    rows,
    row_live,
    cols,
    col_live,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Elements ``[rows, cols]``, rounded to DTYPE."""
    planes = addresses
    if FORMAT == _NARROW:
        planes = narrow_planes(addresses[0], addresses[3], addresses[4], where[3] // 16)
    values = load_tile(
        where[0], where[1], where[2], where[3], where[4], where[5],
        rows, cols, row_live, col_live, FORMAT, planes, addresses[5], book_ptr,
    )  # fmt: skip
    return values.to(DTYPE)


@triton.jit
def load_block(  # type: ignore[no-untyped-def]
    where,
    addresses,
    book_ptr,
    first_row,
    rank,
    first,
    live_cols,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``[first_row : first_row + ROWS, first : first + COLS]``, rounded to DTYPE, of a packed matrix.

    Args:
        where: pointers to its codes (of a narrow one, the low plane), scales and ranges, and the
            strides of their rows, int32 where ALIGNED.
        addresses: those of the same three parts, int64, the first alone is read; of a narrow matrix
            also the word of its rows' bits, its rows, and the place of the first block in its group of
            scales.
        book_ptr: ``codebook.CODEBOOK``.
        rank: its rows; those beyond are 0.
        live_cols: how many of the COLS columns there are; those beyond have any finite value.
        ALIGNED: rows begin at 16 bytes, and ``first`` is a multiple of 8.
    """
    if ALIGNED and FORMAT != "float" and FORMAT != "int8":
        rows, units = unit_places(first_row, ROWS, COLS)
        live = (rows < rank) & (units * 8 < live_cols)
        tables, widths = row_tables(where, addresses, book_ptr, rows, live, FORMAT)
        codes, scales = load_units(where, addresses, rows, first // 8 + units, live, widths, FORMAT)
        values = scaled_units(codes, scales, tables, widths, FORMAT, DTYPE, ROWS, COLS)
    else:
        rows = first_row + tl.arange(0, ROWS)
        cols = tl.arange(0, COLS)
        values = _load_values(
            where, addresses, book_ptr, rows, rows < rank, first + cols, cols < live_cols,
            FORMAT, DTYPE,
        )  # fmt: skip
    return values
