"""Device functions that dequantise packed matrices in registers; needs Triton to import.

They follow the rounding points of ``vllm_vlora.quantize``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_vlora.narrow_rows import NARROW_FORMAT
from vllm_vlora.quantize import NARROW_CODES, NF4_BLOCK, NF4_CODEBOOK, SCALE_BLOCK
from vllm_vlora.trellis import WINDOW

_BOOK = tl.constexpr(NF4_CODEBOOK)
_NF4_BLOCK = tl.constexpr(NF4_BLOCK)
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
_NARROW = tl.constexpr(NARROW_FORMAT)
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
    table_ptr=None,
):
    """Elements ``[rows, cols]`` of a packed matrix, dequantised; masked elements are zero.

    ``planes`` (see ``narrow_planes``) and ``first_block`` are those of a narrow matrix; ``codes_ptr``
    and its stride are for the others. Trellis codes need ``table_ptr``, of the ``TRELLIS_TABLES``; their
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
        values = tl.load(table_ptr + window, mask=mask, other=0.0) * scales
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
