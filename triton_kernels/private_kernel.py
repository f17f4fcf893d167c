"""The Triton kernels of the direct path's private part and their launch; needs Triton to import.

    shrink   h[t, i] = A[slot(t), i] x[t]
    expand   y[t, i] += (scale h[t, i]) B[slot(t), i]

straight from the packed factors of each task, at its own rank and in its own format: two launches for
all slices. A record's format chooses between bodies in one kernel, the same one for all threads of a
program, so tasks of several formats may share a batch; a kernel has the bodies of those formats alone
that the layer's tasks have.

In decode nearly every tile is one token, and the work is to read each task's factors once. For 64
tasks of rank 16 in ``qkv_proj`` of a 7-billion model these are 48 MiB in bfloat16 and 14 MiB in NF4.
What bounds them is the chain of loads from tile to record to factors, and, of packed ones, the
instructions that decode a value. So a tile of one token is multiplied and summed in registers, by
programs that are large enough to be few; the next launch begins early and has its factors under way
while this one still runs. A packed row is read in units of eight columns, a thread a unit
(``load_units``): its values are looked up in a table of 64 bytes that stays in the L1 cache, and are
multiplied as they come; a unit's sum is scaled, not its values, and nothing is rounded before. A
tensor-core product would pad the rank to 16 and send every value through shared memory. Tiles of more
tokens use it nevertheless, since they decode once for all of them.

h is kept as float32 sums over parts of d_in, which expand adds in a fixed order: no atomics, the same
bits in every run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from vllm_vlora.narrow_rows import NARROW_FORMAT
from vllm_vlora.quantize import NF4_BLOCK, SCALE_BLOCK, TRELLIS_ROOM
from vllm_vlora.triton_kernels import direct
from vllm_vlora.triton_kernels.dequantise import (
    join_places,
    load_block,
    load_units,
    look_up,
    row_tables,
    scaled_units,
    unit_places,
)
from vllm_vlora.triton_kernels.device import (
    Chain,
    Rest,
    aligned,
    aligned_pointer,
    choose_tiles,
    count_blocks,
    cut_columns,
    load_sum,
    low_precision,
    multiply,
    pick,
    pick_block,
    power_of_two,
    start_dependents,
    wait_for_previous,
)
from vllm_vlora.triton_kernels.direct import TILE_SIZES, DirectLayer, Routing, SlotTable
from vllm_vlora.triton_kernels.launch import Launch

_FIELDS = tl.constexpr(direct.RECORD_FIELDS)
_RANK = tl.constexpr(direct.RANK)
_SCALE = tl.constexpr(direct.SCALE)
_FORMAT = tl.constexpr(direct.FORMAT)
_BITS = tl.constexpr(direct.BITS)
_NARROW = tl.constexpr(NARROW_FORMAT)
_A = tl.constexpr(direct.A_CODES)
_B = tl.constexpr(direct.B_CODES)
_FORMATS = tl.constexpr(tuple(sorted(direct.FORMAT_CODES, key=direct.FORMAT_CODES.__getitem__)))
_NARROW_BIT = tl.constexpr(1 << direct.FORMAT_CODES[NARROW_FORMAT])
_FORMAT_COUNT = tl.constexpr(len(direct.FORMAT_CODES))
_BLOCK = tl.constexpr(NF4_BLOCK)
_BYTES = tl.constexpr(NF4_BLOCK // 2)
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
_TRELLIS_ROOM = tl.constexpr(TRELLIS_ROOM)

# By the size of tiles: columns of d_in that a part should have at least, since fewer would be mostly
# start-up; programs that a shrink should have; and the tiles that a batch is expected to have: in
# decode the cut has to do for one token too.
_LEAST_PART = {16: 1024, 64: 512}
_WANTED = {16: 192, 64: 400}
_EXPECTED_TILES = {16: 1, 64: 32}


@triton.jit
def _load_record(  # type: ignore[no-untyped-def]
    tile_ptr, records_ptr, slices, first_number, place, max_rank
):
    """(place of its first token, tokens, record of its task, private rank) of a tile.

    The rank is 0 where there is nothing to do; no row from ``max_rank`` on is read.
    """
    slot = tl.load(tile_ptr)
    first_token = tl.load(tile_ptr + 1)
    count = tl.load(tile_ptr + 2)
    record_ptr = records_ptr + (slot.to(tl.int64) * slices + first_number + place) * _FIELDS
    rank = tl.load(record_ptr + _RANK, mask=count > 0, other=0).to(tl.int32)
    return first_token, count, record_ptr, tl.minimum(rank, max_rank)


# --- a packed factor -------------------------------------------------------------------------------


@triton.jit
def _load_addresses(record_ptr, FIRST: tl.constexpr, FORMATS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a record says of A (FIRST is its first field) or of B.

    Returns:
        The addresses of the three parts, int64; for narrow factors also the word of their rows' bits,
        their rows, and the place of the first block in its group of scales.
    """
    bits = tl.full((), 0, tl.int64)
    # In this order: the interpreter has numbers for constexpr arguments.
    if (_NARROW_BIT & FORMATS) != 0:
        bits = tl.load(record_ptr + _BITS)
    return (
        tl.load(record_ptr + FIRST),
        tl.load(record_ptr + FIRST + 1),
        tl.load(record_ptr + FIRST + 2),
        bits,
        tl.load(record_ptr + _RANK),
        ((bits >> (32 if FIRST == _A else 40)) & 255).to(tl.int32),
    )


@triton.jit
def _locate(  # type: ignore[no-untyped-def]
    addresses, cols, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    """(codes, scales, ranges), pointers and row strides, of a packed matrix of ``cols`` columns.

    addresses: what ``_load_addresses`` gives. ``load_block`` takes both.
    """
    blocks = tl.cdiv(cols, _BLOCK)
    ranges_ptr = addresses[2].to(tl.pointer_type(tl.float32))
    if FORMAT == "float":
        codes_ptr = aligned_pointer(addresses[0], DTYPE, ALIGNED)
        codes_stride = aligned(cols, 16, ALIGNED)
    elif FORMAT == "int8":
        codes_ptr = aligned_pointer(addresses[0], tl.int8, ALIGNED)
        codes_stride = aligned(cols, 16, ALIGNED)
    elif FORMAT == _NARROW:
        codes_ptr = aligned_pointer(addresses[0], tl.uint8, ALIGNED)
        codes_stride = blocks * (_BYTES // 2)
    else:
        codes_ptr = aligned_pointer(addresses[0], tl.uint8, ALIGNED)
        codes_stride = blocks * _BYTES
    if FORMAT == "nf4-dq" or FORMAT == _NARROW:
        scales_ptr = addresses[1].to(tl.pointer_type(tl.uint8))
    else:
        scales_ptr = addresses[1].to(tl.pointer_type(tl.float32))
    if FORMAT == "trellis":
        codes_stride += _TRELLIS_ROOM
    if FORMAT == "int8" or FORMAT == "trellis":
        scales_stride = 1
    else:
        scales_stride = blocks
    if FORMAT == "trellis":
        ranges_stride = 1
    elif FORMAT == _NARROW:
        ranges_stride = tl.cdiv(blocks + addresses[5], _SCALE_BLOCK) * 2
    else:
        ranges_stride = tl.cdiv(blocks, _SCALE_BLOCK) * 2
    return codes_ptr, scales_ptr, ranges_ptr, codes_stride, scales_stride, ranges_stride


@triton.jit
def _load_units_of_a(  # type: ignore[no-untyped-def]
    where, addresses, rows, units, rank, start_in, start, stop, widths, FORMAT: tl.constexpr
):
    """``load_units`` of the columns from ``start`` on, before ``stop``, of a slice at ``start_in``."""
    live = (rows < rank) & (start + units * 8 < stop)
    return load_units(where, addresses, rows, (start_in + start) // 8 + units, live, widths, FORMAT)


@triton.jit
def _split_places(values, UNITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The opposite, from ``[8 UNITS]``."""
    even, odd = tl.split(values.reshape(UNITS, 2, 2, 2))
    v04, v26 = tl.split(even)
    v15, v37 = tl.split(odd)
    v0, v4 = tl.split(v04)
    v1, v5 = tl.split(v15)
    v2, v6 = tl.split(v26)
    v3, v7 = tl.split(v37)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _sum_rows(  # type: ignore[no-untyped-def]
    codes, weights, tables, widths, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """``[COLS]``, the sum over rows of units times ``weights [ROWS, COLS // 8]``."""
    return join_places(
        tl.sum(_as_rows(codes, tables, widths, 0, FORMAT, ROWS) * weights, axis=0),
        tl.sum(_as_rows(codes, tables, widths, 1, FORMAT, ROWS) * weights, axis=0),
        tl.sum(_as_rows(codes, tables, widths, 2, FORMAT, ROWS) * weights, axis=0),
        tl.sum(_as_rows(codes, tables, widths, 3, FORMAT, ROWS) * weights, axis=0),
        tl.sum(_as_rows(codes, tables, widths, 4, FORMAT, ROWS) * weights, axis=0),
        tl.sum(_as_rows(codes, tables, widths, 5, FORMAT, ROWS) * weights, axis=0),
        tl.sum(_as_rows(codes, tables, widths, 6, FORMAT, ROWS) * weights, axis=0),
        tl.sum(_as_rows(codes, tables, widths, 7, FORMAT, ROWS) * weights, axis=0),
    ).reshape(COLS)  # fmt: skip


@triton.jit
def _times_x(  # type: ignore[no-untyped-def]
    codes, x, tables, widths, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """``[ROWS, COLS // 8]``, each unit of each row times its columns of ``x [COLS]``, unscaled."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _split_places(x.to(tl.float32), COLS // 8)
    total = _as_rows(codes, tables, widths, 0, FORMAT, ROWS) * x0[None, :]
    total += _as_rows(codes, tables, widths, 1, FORMAT, ROWS) * x1[None, :]
    total += _as_rows(codes, tables, widths, 2, FORMAT, ROWS) * x2[None, :]
    total += _as_rows(codes, tables, widths, 3, FORMAT, ROWS) * x3[None, :]
    total += _as_rows(codes, tables, widths, 4, FORMAT, ROWS) * x4[None, :]
    total += _as_rows(codes, tables, widths, 5, FORMAT, ROWS) * x5[None, :]
    total += _as_rows(codes, tables, widths, 6, FORMAT, ROWS) * x6[None, :]
    total += _as_rows(codes, tables, widths, 7, FORMAT, ROWS) * x7[None, :]
    return total


@triton.jit
def _as_rows(  # type: ignore[no-untyped-def]
    codes, tables, widths, PLACE: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr
):
    values = look_up(codes, tables, widths, PLACE, FORMAT)
    return values.reshape(ROWS, values.shape[0] // ROWS)


@triton.jit
def _load_format(  # type: ignore[no-untyped-def]
    addresses,
    held_cols,
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
    """``[first_row : first_row + ROWS, first : first + COLS]``, rounded to DTYPE, of a matrix.

    Args:
        held_cols: columns of the matrix.
        rank: its rows; those beyond are 0.
        live_cols: how many of the COLS columns there are; those beyond have any finite value.
        ALIGNED: rows begin at 16 bytes, and ``first`` is a multiple of 8.
    """
    where = _locate(addresses, held_cols, FORMAT, DTYPE, ALIGNED)
    return load_block(
        where, addresses, book_ptr, first_row, rank, first, live_cols,
        FORMAT, DTYPE, ALIGNED, ROWS, COLS,
    )  # fmt: skip


@triton.jit
def _load_any(  # type: ignore[no-untyped-def]
    format,
    addresses,
    held_cols,
    book_ptr,
    first_row,
    rank,
    first,
    live_cols,
    FORMATS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``_load_format`` for a format known at run time, one of those whose bits FORMATS has.

    By a branch even where there is one format only. The compiler looks for the bits of what a
    product's operand was loaded as, not beyond a branch, and has each thread hold so many neighbours
    along the product's inner side as make 32 bits of them: 8 of what came from nibbles. Where that
    side has less than 4 times as many, here 16, Triton 3.6 multiplies some twice and others never.
    """
    values = tl.zeros((ROWS, COLS), dtype=DTYPE)
    for code in tl.static_range(_FORMAT_COUNT):
        if (FORMATS >> code) & 1:  # noqa: SIM102 (known when compiled)
            if format == code:
                # Triton before 3.7 takes an element of a constexpr tuple for a string.
                FORMAT: tl.constexpr = _FORMATS[code]
                values = _load_format(
                    addresses, held_cols, book_ptr, first_row, rank, first, live_cols,
                    FORMAT, DTYPE, ALIGNED, ROWS, COLS,
                )  # fmt: skip
    return values


# --- shrink ----------------------------------------------------------------------------------------


@triton.jit
def _shrink_one(  # type: ignore[no-untyped-def]
    x_ptr,
    addresses,
    book_ptr,
    first_row,
    rank,
    start_in,
    d_in,
    first,
    stop,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``A[first_row : first_row + ROWS, first:stop] x[first:stop]`` of one token.

    A's next columns are under way while those before are multiplied, its first before x is there.
    Sums over columns are made once, at the end: they go across threads.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    cols = tl.arange(0, COLS)
    if ALIGNED and FORMAT != "float" and FORMAT != "int8":
        where = _locate(addresses, start_in + d_in, FORMAT, dtype, ALIGNED)
        rows, units = unit_places(first_row, ROWS, COLS)
        tables, widths = row_tables(where, addresses, book_ptr, rows, rows < rank, FORMAT)
        codes, scales = _load_units_of_a(
            where, addresses, rows, units, rank, start_in, first, stop, widths, FORMAT
        )
        wait_for_previous(PDL)
        total = tl.zeros((ROWS, COLS // 8), dtype=tl.float32)
        for start in tl.range(first, stop, COLS, num_stages=1):
            x = tl.load(x_ptr + start + cols, mask=start + cols < stop, other=0.0)
            next_codes, next_scales = _load_units_of_a(
                where, addresses, rows, units, rank, start_in, start + COLS, stop, widths, FORMAT
            )
            part = _times_x(codes, x, tables, widths, FORMAT, ROWS, COLS)
            total += part * scales.reshape(ROWS, COLS // 8)
            codes = next_codes
            scales = next_scales
        sums = tl.sum(total, axis=1)
    else:
        a = _load_format(
            addresses, start_in + d_in, book_ptr, first_row, rank, start_in + first, stop - first,
            FORMAT, dtype, ALIGNED, ROWS, COLS,
        )  # fmt: skip
        wait_for_previous(PDL)
        x = tl.load(x_ptr + first + cols, mask=first + cols < stop, other=0.0)
        total = a.to(tl.float32) * x.to(tl.float32)[None, :]
        for start in range(first + COLS, stop, COLS):
            x = tl.load(x_ptr + start + cols, mask=start + cols < stop, other=0.0)
            a = _load_format(
                addresses, start_in + d_in, book_ptr, first_row, rank, start_in + start, stop - start,
                FORMAT, dtype, ALIGNED, ROWS, COLS,
            )  # fmt: skip
            total += a.to(tl.float32) * x.to(tl.float32)[None, :]
        sums = tl.sum(total, axis=1)
    return sums


@triton.jit
def _shrink_tile(  # type: ignore[no-untyped-def]
    x_ptrs,
    token_live,
    addresses,
    book_ptr,
    first_row,
    rank,
    start_in,
    d_in,
    first,
    stop,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``A[rows, first:stop] x[:, first:stop]^T`` for the tokens whose rows ``x_ptrs`` are.

    A stands on the left: Triton 3.6 does not compile the transpose of what NF4 was decoded to.
    """
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    total = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
    if ALIGNED and FORMAT != "float" and FORMAT != "int8":
        where = _locate(addresses, start_in + d_in, FORMAT, dtype, ALIGNED)
        rows, units = unit_places(first_row, BLOCK_R, BLOCK_D)
        tables, widths = row_tables(where, addresses, book_ptr, rows, rows < rank, FORMAT)
        codes, scales = _load_units_of_a(
            where, addresses, rows, units, rank, start_in, first, stop, widths, FORMAT
        )
        for start in tl.range(first, stop, BLOCK_D, num_stages=1):
            cols = start + tl.arange(0, BLOCK_D)
            mask = token_live[:, None] & (cols < stop)[None, :]
            x = tl.load(x_ptrs[:, None] + cols[None, :], mask=mask, other=0.0)
            next_codes, next_scales = _load_units_of_a(
                where, addresses, rows, units, rank, start_in, start + BLOCK_D, stop, widths, FORMAT
            )
            a = scaled_units(codes, scales, tables, widths, FORMAT, dtype, BLOCK_R, BLOCK_D)
            total = multiply(a, tl.trans(x), total, LOW_PRECISION)
            codes = next_codes
            scales = next_scales
    else:
        for start in range(first, stop, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            mask = token_live[:, None] & (cols < stop)[None, :]
            x = tl.load(x_ptrs[:, None] + cols[None, :], mask=mask, other=0.0)
            a = _load_format(
                addresses, start_in + d_in, book_ptr, first_row, rank, start_in + start, stop - start,
                FORMAT, dtype, ALIGNED, BLOCK_R, BLOCK_D,
            )  # fmt: skip
            total = multiply(a, tl.trans(x), total, LOW_PRECISION)
    return total


@triton.jit(
    do_not_specialize=[
        "slices", "first_number", "starts", "max_rank", "part_stride", "slice_stride",
    ]
)  # fmt: skip
def _shrink_kernel(  # type: ignore[no-untyped-def]
    h_ptr,
    x_ptr,
    records_ptr,
    order_ptr,
    tiles_ptr,
    book_ptr,
    slices,
    first_number,
    starts,
    d_in,
    part_cols,
    max_rank,
    x_stride,
    part_stride,
    slice_stride,
    COUNT: tl.constexpr,
    FORMATS: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_ROWS: tl.constexpr,
    ONE_COLS: tl.constexpr,
):
    """``h[part, i, t, rows] = A x`` over a part of d_in, for one tile of tokens, all of one task.

    Grid (tiles, slices, parts of d_in); h is float32 ``[parts, slices, T, max_rank]``. ``ALIGNED``:
    A's rows begin, and this rank's columns in them, at multiples of 64 columns. A tile of one token
    is multiplied ``ONE_ROWS`` rows at a time; its first block of A is under way before x is there.
    """
    start_dependents(PDL)
    place = tl.program_id(1)
    part = tl.program_id(2)
    first_token, count, record_ptr, rank = _load_record(
        tiles_ptr + tl.program_id(0) * 3, records_ptr, slices, first_number, place, max_rank
    )
    if rank == 0:
        wait_for_previous(PDL)
    else:
        format = tl.load(record_ptr + _FORMAT).to(tl.int32)
        addresses = _load_addresses(record_ptr, _A, FORMATS)
        start_in = aligned(pick(starts, place, COUNT), 64, ALIGNED)
        first = part * part_cols
        stop = tl.minimum(first + part_cols, d_in)
        h_ptr += part.to(tl.int64) * part_stride + place.to(tl.int64) * slice_stride
        if count == 1:
            token = tl.load(order_ptr + first_token).to(tl.int64)
            for row in range(0, rank, ONE_ROWS):
                rows = row + tl.arange(0, ONE_ROWS)
                one = tl.zeros((ONE_ROWS,), dtype=tl.float32)
                for code in tl.static_range(_FORMAT_COUNT):
                    if (FORMATS >> code) & 1:  # noqa: SIM102 (known when compiled)
                        if format == code:
                            FORMAT: tl.constexpr = _FORMATS[code]
                            one = _shrink_one(
                                x_ptr + token * x_stride, addresses, book_ptr, row, rank,
                                start_in, d_in, first, stop,
                                FORMAT, ALIGNED, PDL, ONE_ROWS, ONE_COLS,
                            )  # fmt: skip
                tl.store(h_ptr + token * max_rank + rows, one, mask=rows < rank)
        else:
            wait_for_previous(PDL)
            lanes = tl.arange(0, BLOCK_T)
            token_live = lanes < count
            tokens = tl.load(order_ptr + first_token + lanes, mask=token_live, other=0).to(tl.int64)
            for row in range(0, rank, BLOCK_R):
                rows = row + tl.arange(0, BLOCK_R)
                h = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
                # The format is chosen outside of the loop over columns, which is long and pipelined.
                for code in tl.static_range(_FORMAT_COUNT):
                    if (FORMATS >> code) & 1:  # noqa: SIM102 (known when compiled)
                        if format == code:
                            OTHER: tl.constexpr = _FORMATS[code]
                            h = _shrink_tile(
                                x_ptr + tokens * x_stride, token_live, addresses, book_ptr,
                                row, rank, start_in, d_in, first, stop,
                                OTHER, ALIGNED, LOW_PRECISION, BLOCK_T, BLOCK_R, BLOCK_D,
                            )  # fmt: skip
                tl.store(
                    h_ptr + tokens[None, :] * max_rank + rows[:, None],
                    h,
                    mask=token_live[None, :] & (rows < rank)[:, None],
                )


# --- expand ----------------------------------------------------------------------------------------


@triton.jit
def _expand_one(  # type: ignore[no-untyped-def]
    h_ptrs,
    addresses,
    book_ptr,
    rank,
    scale,
    held_cols,
    start_out,
    first,
    width,
    part_stride,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
    DTYPE: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``(scale h) B[:, first : first + COLS]`` of one token.

    The first rows, mostly all of them, are under way before h is there.
    """
    total = tl.zeros((COLS,), dtype=tl.float32)
    # What is no four bits a number takes more registers.
    FOUR_BITS: tl.constexpr = FORMAT == "nf4" or FORMAT == "nf4-dq"
    MOST: tl.constexpr = 16 if FOUR_BITS else 8 if FORMAT == "float" or FORMAT == "int8" else 4
    ROWS: tl.constexpr = MOST if MAX_ROWS > MOST else MAX_ROWS
    if ALIGNED and FORMAT != "float" and FORMAT != "int8":
        where = _locate(addresses, held_cols, FORMAT, DTYPE, ALIGNED)
        rows, units = unit_places(0, ROWS, COLS)
        col_live = first + units * 8 < width
        units += (start_out + first) // 8
        tables, widths = row_tables(where, addresses, book_ptr, rows, rows < rank, FORMAT)
        codes, scales = load_units(
            where, addresses, rows, units, (rows < rank) & col_live, widths, FORMAT
        )
        wait_for_previous(PDL)
        h = _load_h(h_ptrs, 0, rank, scale, part_stride, PARTS, DTYPE, ROWS)
        weights = h[:, None] * scales.reshape(ROWS, COLS // 8)
        total += _sum_rows(codes, weights, tables, widths, FORMAT, ROWS, COLS)
        for row in tl.range(ROWS, rank, ROWS, num_stages=1):
            rows += ROWS
            tables, widths = row_tables(where, addresses, book_ptr, rows, rows < rank, FORMAT)
            codes, scales = load_units(
                where, addresses, rows, units, (rows < rank) & col_live, widths, FORMAT
            )
            h = _load_h(h_ptrs, row, rank, scale, part_stride, PARTS, DTYPE, ROWS)
            weights = h[:, None] * scales.reshape(ROWS, COLS // 8)
            total += _sum_rows(codes, weights, tables, widths, FORMAT, ROWS, COLS)
    else:
        b = _load_format(
            addresses, held_cols, book_ptr, 0, rank, start_out + first, width - first,
            FORMAT, DTYPE, ALIGNED, ROWS, COLS,
        )  # fmt: skip
        wait_for_previous(PDL)
        h = _load_h(h_ptrs, 0, rank, scale, part_stride, PARTS, DTYPE, ROWS)
        total += tl.sum(h[:, None] * b.to(tl.float32), axis=0)
        for row in range(ROWS, rank, ROWS):
            b = _load_format(
                addresses, held_cols, book_ptr, row, rank, start_out + first, width - first,
                FORMAT, DTYPE, ALIGNED, ROWS, COLS,
            )  # fmt: skip
            h = _load_h(h_ptrs, row, rank, scale, part_stride, PARTS, DTYPE, ROWS)
            total += tl.sum(h[:, None] * b.to(tl.float32), axis=0)
    return total


@triton.jit
def _load_h(  # type: ignore[no-untyped-def]
    h_ptrs, first_row, rank, scale, part_stride, PARTS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """``scale h``, the sum of its parts, of one token's rows, rounded to DTYPE."""
    rows = first_row + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS).to(tl.int64)[:, None] * part_stride
    h = tl.load(h_ptrs + parts + rows[None, :], mask=(rows < rank)[None, :], other=0.0)
    return (tl.sum(h, axis=0) * scale).to(DTYPE).to(tl.float32)


@triton.jit
def _load_h_tile(  # type: ignore[no-untyped-def]
    h_ptrs, live, first_row, rank, scale, part_stride, PARTS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The same of several tokens, as an operand of a product."""
    rows = first_row + tl.arange(0, ROWS)
    mask = live[:, None] & (rows < rank)[None, :]
    h = load_sum(h_ptrs[:, None] + rows[None, :], part_stride, mask, PARTS)
    return (h * scale).to(DTYPE)


@triton.jit(
    do_not_specialize=[
        "slices", "first_number", "block_starts", "y_starts", "widths", "starts", "max_rank",
        "part_stride", "slice_stride",
    ]
)  # fmt: skip
def _expand_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    h_ptr,
    records_ptr,
    order_ptr,
    tiles_ptr,
    book_ptr,
    slices,
    first_number,
    block_starts,
    y_starts,
    widths,
    starts,
    max_rank,
    y_stride,
    part_stride,
    slice_stride,
    COUNT: tl.constexpr,
    FORMATS: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_ROWS: tl.constexpr,
    ONE_COLS: tl.constexpr,
):
    """``y += (scale h) B`` on one tile of tokens, all of one task, and ONE_COLS columns.

    Grid (groups of columns over all slices, tiles); ``h`` as the shrink left it. ``ALIGNED``: slices
    begin and end at multiples of 64 columns in y and in B. ``ONE_ROWS`` as for the shrink. ``WHOLE``: no
    rank is more than BLOCK_R, so that h is read once.
    """
    start_dependents(PDL)
    place, group = pick_block(tl.program_id(0), block_starts, COUNT)
    first_token, count, record_ptr, rank = _load_record(
        tiles_ptr + tl.program_id(1) * 3, records_ptr, slices, first_number, place, max_rank
    )
    if rank == 0:
        wait_for_previous(PDL)
    else:
        scale = tl.load(record_ptr + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
        format = tl.load(record_ptr + _FORMAT).to(tl.int32)
        addresses = _load_addresses(record_ptr, _B, FORMATS)
        width = aligned(pick(widths, place, COUNT), 64, ALIGNED)
        start_out = aligned(pick(starts, place, COUNT), 64, ALIGNED)
        y_ptr += aligned(pick(y_starts, place, COUNT), 64, ALIGNED)
        h_ptr += place.to(tl.int64) * slice_stride
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        first = group * ONE_COLS
        if count == 1:
            token = tl.load(order_ptr + first_token).to(tl.int64)
            one_cols = first + tl.arange(0, ONE_COLS)
            one = tl.zeros((ONE_COLS,), dtype=tl.float32)
            for code in tl.static_range(_FORMAT_COUNT):
                if (FORMATS >> code) & 1:  # noqa: SIM102 (known when compiled)
                    if format == code:
                        FORMAT: tl.constexpr = _FORMATS[code]
                        one = _expand_one(
                            h_ptr + token * max_rank, addresses, book_ptr, rank, scale,
                            start_out + width, start_out, first, width, part_stride,
                            FORMAT, PARTS, ALIGNED, PDL, dtype, ONE_ROWS, ONE_COLS,
                        )  # fmt: skip
            places = y_ptr + token * y_stride + one_cols
            held = tl.load(places, mask=one_cols < width, other=0.0).to(tl.float32)
            tl.store(places, (held + one).to(dtype), mask=one_cols < width)
        else:
            wait_for_previous(PDL)
            lanes = tl.arange(0, BLOCK_T)
            live = lanes < count
            tokens = tl.load(order_ptr + first_token + lanes, mask=live, other=0).to(tl.int64)
            scaled = tl.zeros((BLOCK_T, BLOCK_R), dtype=dtype)
            if WHOLE:
                scaled = _load_h_tile(
                    h_ptr + tokens * max_rank, live, 0, rank, scale, part_stride,
                    PARTS, dtype, BLOCK_R,
                )  # fmt: skip
            for start in range(first, tl.minimum(first + ONE_COLS, width), BLOCK_D):
                cols = start + tl.arange(0, BLOCK_D)
                # y comes from the memory, all else from the cache: asked for first.
                y_ptrs = y_ptr + cols[None, :] + tokens[:, None] * y_stride
                mask = live[:, None] & (cols < width)[None, :]
                y = tl.load(y_ptrs, mask=mask, other=0.0)
                total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
                for row in range(0, rank, BLOCK_R):
                    if not WHOLE:
                        scaled = _load_h_tile(
                            h_ptr + tokens * max_rank, live, row, rank, scale, part_stride,
                            PARTS, dtype, BLOCK_R,
                        )  # fmt: skip
                    b = _load_any(
                        format, addresses, start_out + width, book_ptr, row, rank,
                        start_out + start, width - start,
                        FORMATS, dtype, ALIGNED, BLOCK_R, BLOCK_D,
                    )  # fmt: skip
                    total = multiply(scaled, b, total, LOW_PRECISION)
                tl.store(y_ptrs, (y.to(tl.float32) + total).to(dtype), mask=mask)


# --- the host's part -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Both launches' arguments that no batch changes; it must not hold the layer itself.

    Attributes:
        sized: (size of tiles, dtype and device of x, chain) -> the launches, for which these are fixed.
    """

    shrink: dict[str, Any]
    expand: dict[str, Any]
    sized: dict[tuple[int, torch.dtype, torch.device, Chain], _Sized] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sized:
    """Parts of d_in, groups of blocks of columns, and both launches."""

    parts: int
    groups: int
    shrink: Launch
    expand: Launch


_PLANS: WeakKeyDictionary[DirectLayer, _Plan] = WeakKeyDictionary()


def begin_private(
    x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing, chain: Chain
) -> Rest:
    """Enqueue the shrink for arguments that have passed ``add_direct``'s checks; no wait.

    Returns:
        Enqueues the expansion into y, once y holds the base layer's output.
    """
    plan = _PLANS.get(layer)
    if plan is None:
        plan = _PLANS[layer] = _make_plan(layer)
    tokens, count = x.shape[0], len(layer.slices)
    size, tiles = choose_tiles(x, routing)
    key = (size, x.dtype, x.device, chain)
    sized = plan.sized.get(key)
    if sized is None:
        sized = plan.sized[key] = _make_sized(plan, layer, size, x, chain)
    h = torch.empty(
        (sized.parts, count, tokens, layer.max_rank), dtype=torch.float32, device=x.device
    )
    common = {
        "h_ptr": h,
        "records_ptr": table.records,
        "order_ptr": routing.order,
        "tiles_ptr": routing.tiles[size],
        "book_ptr": table.codebook,
        "slices": table.records.shape[1],
        "part_stride": count * tokens * layer.max_rank,
        "slice_stride": tokens * layer.max_rank,
    }
    sized.shrink((tiles, count, sized.parts), x_ptr=x, x_stride=x.stride(0), **common)

    def expand(y: torch.Tensor) -> None:
        sized.expand((sized.groups, tiles, 1), y_ptr=y, y_stride=y.stride(0), **common)

    return expand


def _make_sized(
    plan: _Plan, layer: DirectLayer, size: int, x: torch.Tensor, chain: Chain
) -> _Sized:
    """Both launches with all arguments that depend on the layer, the size of tiles and the dtype."""
    count = len(layer.slices)
    # A tile of narrow rows takes more registers than others: of 32 rows some would be put aside.
    max_rank = min(layer.max_rank, 16) if NARROW_FORMAT in layer.formats else layer.max_rank
    shrink = shrink_config(size, max_rank, x.dtype)
    expand = expand_config(size, max_rank, x.dtype)
    programs = count * _EXPECTED_TILES[size]
    parts, part_cols = cut_columns(layer.d_in, programs, _LEAST_PART[size], _WANTED[size])
    widths = plan.expand["widths"]
    groups = [count_blocks(width, expand["ONE_COLS"]) for width in widths]
    block_starts = tuple(sum(groups[:place]) for place in range(count))
    common = {"first_number": layer.index, "max_rank": layer.max_rank, "COUNT": count}
    common["FORMATS"] = _format_bits(layer)
    return _Sized(
        parts,
        sum(groups),
        Launch(
            _shrink_kernel,
            {"part_cols": part_cols, **common, **plan.shrink, **shrink, **dict(chain.first)},
        ),
        Launch(
            _expand_kernel,
            {
                "block_starts": block_starts,
                "PARTS": parts,
                "WHOLE": layer.max_rank <= expand["BLOCK_R"],
                **common,
                **plan.expand,
                **expand,
                **dict(chain.rest),
            },
        ),
    )


def _format_bits(layer: DirectLayer) -> int:
    return sum(1 << direct.FORMAT_CODES[format] for format in layer.formats)


def _make_plan(layer: DirectLayer) -> _Plan:
    parts = layer.slices
    widths = tuple(part.width for part in parts)
    starts_in = tuple(part.start_in for part in parts)
    starts_out = tuple(part.start_out for part in parts)
    return _Plan(
        shrink={
            "starts": starts_in,
            "d_in": layer.d_in,
            "ALIGNED": all(size % NF4_BLOCK == 0 for size in (layer.d_in, *starts_in)),
        },
        expand={
            "y_starts": tuple(sum(widths[:place]) for place in range(len(parts))),
            "widths": widths,
            "starts": starts_out,
            "ALIGNED": all(size % NF4_BLOCK == 0 for size in (*widths, *starts_out)),
        },
    )


def shrink_config(size: int, max_rank: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """The shrink's compile-time arguments, apart from what the layer fixes; ``size`` of tiles.

    The sizes are those at which no format's body takes more than 168 registers where the layer is
    aligned; others are right, but slower.
    """
    low, small = low_precision(dtype), size == TILE_SIZES[0]
    block_r = power_of_two(max_rank, 16, 32 if low and not small else 16)
    return {
        "LOW_PRECISION": low,
        "BLOCK_T": size,
        "BLOCK_R": block_r,
        # A float32 product runs on the FMA units with its operands in registers.
        "BLOCK_D": (128 if small else 64) if low else 16,
        "ONE_ROWS": power_of_two(max_rank, 1, 16),
        "ONE_COLS": 256,
        "num_warps": 4,
        "num_stages": 2 if low else 1,
    }


def expand_config(size: int, max_rank: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """The expansion's compile-time arguments, apart from what the layer fixes."""
    low, small = low_precision(dtype), size == TILE_SIZES[0]
    return {
        "LOW_PRECISION": low,
        "BLOCK_T": size,
        "BLOCK_R": power_of_two(max_rank, 16, 32 if low and not small else 16),
        "BLOCK_D": 128 if small and low else 64,
        "ONE_ROWS": power_of_two(max_rank, 1, 16 if small else 8),
        "ONE_COLS": 1024 if small else 512,
        "num_warps": 4 if small else 8,
        "num_stages": 1,
    }
