"""Device functions that dequantise packed matrices in registers; needs Triton to import.

They follow the rounding points of ``vllm_vlora.quantize``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_vlora.quantize import NF4_BLOCK, NF4_CODEBOOK, SCALE_BLOCK

_BOOK = tl.constexpr(NF4_CODEBOOK)
_NF4_BLOCK = tl.constexpr(NF4_BLOCK)
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)


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
):
    """Elements ``[rows, cols]`` of a packed matrix, dequantised; masked elements are zero."""
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
    else:
        # Neighbouring threads read the same byte: the same sector serves them, and any first
        # column, odd ones included, works.
        byte = tl.load(codes_ptr + rows * codes_stride + (cols >> 1), mask=mask, other=0)
        values = nf4_value((byte.to(tl.int32) >> ((1 - (cols & 1)) * 4)) & 15)
        block = cols // _NF4_BLOCK
        scales = tl.load(scales_ptr + rows * scales_stride + block, mask=mask, other=0)
        if FORMAT == "nf4-dq":
            ranges = ranges_ptr + rows * ranges_stride + (block // _SCALE_BLOCK) * 2
            low = tl.load(ranges, mask=mask, other=0.0)
            step = tl.load(ranges + 1, mask=mask, other=0.0)
            values = values * (low + scales.to(tl.float32) * step)
        else:
            values = values * scales
    return values
