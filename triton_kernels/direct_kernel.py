"""The Triton kernels of the direct path's joint part, and the launch of both parts; needs Triton.

    shrink   z = V x             all slices at once: they share x
    core     w[t, i] = C[slot(t), i] z[t, i]
    expand   y[t, i] += U_i^T w[t, i]

Three launches, each of which reads what it needs once. For 64 tokens of 64 tasks in ``qkv_proj`` of an
8-billion model (d_in 4096, 6144 columns, k = 64 a slice, bfloat16) they move V 1.5 MiB, x 0.5 MiB,
cores 1.5 MiB, U 0.75 MiB, y twice 0.75 MiB and twice 0.75 MiB of float32 partial sums that stay in the
L2 cache; slots of rank 16 would be 36 MiB. Two launches would save one gap of some microseconds but were
not taken: with the core inside expand, each of the 96 blocks of columns reads every token's core anew
(48 MiB from L2), and the other way, the last block of shrink to arrive applying the cores, needs
atomics and waits on memory order for the same gain.

In a captured graph everything a launch depends on is a number of the layer, of the table or of x's
shape, so that it replays with other tasks and other tokens; outside of one, no more is launched than
the batch has. Which tokens have a core is read from the records in the kernel: w is written and read
for those alone, and y is not touched for others, so that it keeps its bits and temporaries need no
zeroing. Each launch begins while the one ahead of it still runs (``device.wait_for_previous``), with
the records, the core or U, and then waits for z or w.

Shrink and expand put tokens of all tasks together on the tensor cores. A tile of one token, which is
what most cores see in decode, is multiplied and summed in registers instead: a core of 8 KiB needs no
shared memory, and all partial sums of z are loaded at once.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix
from vllm_vlora.triton_kernels import direct
from vllm_vlora.triton_kernels.dequantise import load_tile
from vllm_vlora.triton_kernels.device import (
    DECODE_TOKENS,
    NO_PDL,
    PART_ALIGNMENT,
    Chain,
    Options,
    Rest,
    aligned,
    aligned_pointer,
    capturing,
    choose_tiles,
    count_blocks,
    cut_columns,
    load_sum,
    low_precision,
    multiply,
    on_amd,
    pdl_options,
    pick,
    pick_block,
    power_of_two,
    start_dependents,
    wait_for_previous,
)
from vllm_vlora.triton_kernels.direct import TILE_SIZES, DirectLayer, Routing, SlotTable
from vllm_vlora.triton_kernels.launch import Launch
from vllm_vlora.triton_kernels.private_kernel import begin_private

# A slice's part of w begins, and is filled up, to a multiple of this many columns: w is read 16 bytes
# at a time whatever the sizes k are.
_W_ALIGNMENT = 16
# Programs that the shrink should have, where cutting d_in can give them. GPUs have 100 to 150
# multiprocessors, and every part costs a write and a read of its sums.
_WANTED = 192

_FIELDS = tl.constexpr(direct.RECORD_FIELDS)
_CORE = tl.constexpr(direct.CORE)
_CORE_RANK = tl.constexpr(direct.CORE_RANK)
_W_COLS = tl.constexpr(_W_ALIGNMENT)


@triton.jit(do_not_specialize=["tokens", "k_total"])
def _shrink_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    x_ptr,
    codes_ptr,
    scales_ptr,
    ranges_ptr,
    tokens,
    k_total,
    d_in,
    part_cols,
    x_stride,
    codes_stride,
    scales_stride,
    ranges_stride,
    FORMAT: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``z[part, tokens, ks] = x V^T`` over the part's columns of x.

    Grid (blocks of V's rows, parts of d_in, blocks of tokens); z is ``[parts, T, k_total]``, float32
    partial sums or, of one part, the dtype of x.
    """
    start_dependents(PDL)
    wait_for_previous(PDL)
    ks = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_live = rows < tokens
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    first = part * part_cols
    for start in range(first, tl.minimum(first + part_cols, d_in), BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_live = cols < d_in
        x = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :],
            mask=row_live[:, None] & col_live[None, :],
            other=0.0,
        )
        v = load_tile(
            codes_ptr,
            scales_ptr,
            ranges_ptr,
            codes_stride,
            scales_stride,
            ranges_stride,
            ks,
            cols,
            ks < k_total,
            col_live,
            FORMAT,
        )
        total = multiply(x, tl.trans(v.to(dtype)), total, LOW_PRECISION)
    places = (part.to(tl.int64) * tokens + rows)[:, None] * k_total + ks[None, :]
    mask = row_live[:, None] & (ks < k_total)[None, :]
    tl.store(z_ptr + places, total.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_parts(z_ptrs, live, DTYPE: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token's z from its partial sums, once they are there; rounded, as float32."""
    wait_for_previous(PDL)
    z = tl.load(z_ptrs, mask=live, other=0.0).to(tl.float32)
    return tl.sum(z, axis=0).to(DTYPE).to(tl.float32)


@triton.jit
def _core_one(  # type: ignore[no-untyped-def]
    core_ptr,
    z_ptr,
    part_stride,
    rank,
    k_in,
    k_out,
    outs,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``C[outs] z`` for the one token whose z begins at ``z_ptr``, by multiplying and adding.

    Each block of the core is under way before z is there.
    """
    dtype: tl.constexpr = core_ptr.dtype.element_ty
    parts = tl.arange(0, PARTS).to(tl.int64)[:, None] * part_stride
    w = tl.zeros((BLOCK_OUT,), dtype=tl.float32)
    # A dense core is one pass over its own rows.
    for row in range(0, tl.maximum(rank, 1), BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        rows_ptr = core_ptr + rows * (k_in + k_out)
        inner = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for start in range(0, k_in, BLOCK_IN):
            ins = start + tl.arange(0, BLOCK_IN)
            in_live = (ins < k_in)[None, :]
            z_ptrs = z_ptr + parts + ins[None, :]
            if rank == 0:
                dense = tl.load(
                    core_ptr + outs[:, None] * k_in + ins[None, :],
                    mask=(outs < k_out)[:, None] & in_live,
                    other=0.0,
                )
                z = _sum_parts(z_ptrs, in_live, dtype, PDL)
                w += tl.sum(dense.to(tl.float32) * z[None, :], axis=1)
            else:
                a = tl.load(
                    rows_ptr[:, None] + ins[None, :],
                    mask=(rows < rank)[:, None] & in_live,
                    other=0.0,
                )
                z = _sum_parts(z_ptrs, in_live, dtype, PDL)
                inner += tl.sum(a.to(tl.float32) * z[None, :], axis=1)
        if rank > 0:
            b = tl.load(
                rows_ptr[:, None] + k_in + outs[None, :],
                mask=(rows < rank)[:, None] & (outs < k_out)[None, :],
                other=0.0,
            )
            w += tl.sum(inner.to(dtype).to(tl.float32)[:, None] * b.to(tl.float32), axis=0)
    return w


@triton.jit
def _core_tile(  # type: ignore[no-untyped-def]
    core_ptr,
    z_ptrs,
    part_stride,
    live,
    rank,
    k_in,
    k_out,
    outs,
    LOW_PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``z C[outs]^T`` for the tokens whose z begin at ``z_ptrs``."""
    dtype: tl.constexpr = core_ptr.dtype.element_ty
    w = tl.zeros((BLOCK_T, BLOCK_OUT), dtype=tl.float32)
    for row in range(0, tl.maximum(rank, 1), BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        rows_ptr = core_ptr + rows * (k_in + k_out)
        inner = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for start in range(0, k_in, BLOCK_IN):
            ins = start + tl.arange(0, BLOCK_IN)
            in_live = (ins < k_in)[None, :]
            z_places = z_ptrs[:, None] + ins[None, :]
            z = load_sum(z_places, part_stride, live[:, None] & in_live, PARTS).to(dtype)
            if rank == 0:
                dense = tl.load(
                    core_ptr + outs[:, None] * k_in + ins[None, :],
                    mask=(outs < k_out)[:, None] & in_live,
                    other=0.0,
                )
                w = multiply(z, tl.trans(dense), w, LOW_PRECISION)
            else:
                a = tl.load(
                    rows_ptr[:, None] + ins[None, :],
                    mask=(rows < rank)[:, None] & in_live,
                    other=0.0,
                )
                inner = multiply(z, tl.trans(a), inner, LOW_PRECISION)
        if rank > 0:
            b = tl.load(
                rows_ptr[:, None] + k_in + outs[None, :],
                mask=(rows < rank)[:, None] & (outs < k_out)[None, :],
                other=0.0,
            )
            w = multiply(inner.to(dtype), b, w, LOW_PRECISION)
    return w


@triton.jit(
    do_not_specialize=[
        "slices",
        "first_number",
        "k_ins",
        "k_outs",
        "z_starts",
        "w_starts",
        "part_stride",
    ]
)
def _core_kernel(  # type: ignore[no-untyped-def]
    w_ptr,
    z_ptr,
    records_ptr,
    order_ptr,
    tiles_ptr,
    slices,
    first_number,
    places,
    k_ins,
    k_outs,
    z_starts,
    w_starts,
    z_stride,
    w_stride,
    part_stride,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    ONE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``w = C z`` for one tile of tokens, which share a core, and one block of w's columns.

    Grid (tiles, slices with a basis, blocks of columns). A slice's part of w is filled up with zeros
    to a multiple of 16 columns. ``ALIGNED``: every size k is a multiple of 8, so that rows of cores
    begin at 16 bytes. ``ONE``: tiles of one token have a way of their own.
    """
    start_dependents(PDL)
    tile_ptr = tiles_ptr + tl.program_id(0) * 3
    place = tl.program_id(1)
    slot = tl.load(tile_ptr)
    first = tl.load(tile_ptr + 1)
    count = tl.load(tile_ptr + 2)
    k_in = aligned(pick(k_ins, place, COUNT), 8, ALIGNED)
    k_out = aligned(pick(k_outs, place, COUNT), 8, ALIGNED)
    z_start = aligned(pick(z_starts, place, COUNT), 8, ALIGNED)
    w_start = aligned(pick(w_starts, place, COUNT), _W_COLS, True)
    number = first_number + pick(places, place, COUNT)
    record_ptr = records_ptr + (slot.to(tl.int64) * slices + number) * _FIELDS
    core = tl.load(record_ptr + _CORE, mask=count > 0, other=0)
    first_out = tl.program_id(2) * BLOCK_OUT
    if (core == 0) | (first_out >= k_out):
        wait_for_previous(PDL)
    else:
        rank = tl.load(record_ptr + _CORE_RANK).to(tl.int32)
        dtype: tl.constexpr = w_ptr.dtype.element_ty
        core_ptr = aligned_pointer(core, dtype, ALIGNED)
        outs = first_out + tl.arange(0, BLOCK_OUT)
        filled = outs < tl.cdiv(k_out, _W_COLS) * _W_COLS
        z_ptr += z_start
        w_ptr += w_start
        if ONE:  # noqa: SIM102 (known when compiled, so the rest is left out)
            if count == 1:
                token = tl.load(order_ptr + first).to(tl.int64)
                one = _core_one(
                    core_ptr,
                    z_ptr + token * z_stride,
                    part_stride,
                    rank,
                    k_in,
                    k_out,
                    outs,
                    PARTS,
                    PDL,
                    BLOCK_OUT,
                    BLOCK_IN,
                    BLOCK_R,
                )
                tl.store(w_ptr + token * w_stride + outs, one.to(dtype), mask=filled)
        if count > (1 if ONE else 0):
            wait_for_previous(PDL)
            lanes = tl.arange(0, BLOCK_T)
            live = lanes < count
            tokens = tl.load(order_ptr + first + lanes, mask=live, other=0).to(tl.int64)
            w = _core_tile(
                core_ptr,
                z_ptr + tokens * z_stride,
                part_stride,
                live,
                rank,
                k_in,
                k_out,
                outs,
                LOW_PRECISION,
                PARTS,
                BLOCK_T,
                BLOCK_OUT,
                BLOCK_IN,
                BLOCK_R,
            )
            w_ptrs = w_ptr + tokens[:, None] * w_stride + outs[None, :]
            tl.store(w_ptrs, w.to(dtype), mask=live[:, None] & filled[None, :])


@triton.jit(
    do_not_specialize=[
        "slices", "first_number", "block_starts", "y_starts", "widths", "w_starts", "k_outs", "tokens",
        "codes_strides", "scales_strides", "ranges_strides",
    ]
)  # fmt: skip
def _expand_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    w_ptr,
    records_ptr,
    token_slots_ptr,
    codes_ptrs,
    scales_ptrs,
    ranges_ptrs,
    slices,
    first_number,
    places,
    block_starts,
    y_starts,
    widths,
    w_starts,
    k_outs,
    codes_strides,
    scales_strides,
    ranges_strides,
    tokens,
    y_stride,
    w_stride,
    COUNT: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y += w U`` on one block of tokens, of whatever slots, and of columns.

    Grid (blocks of columns over all slices with a basis, blocks of tokens). ``ALIGNED``: slices
    begin and end at multiples of 16 columns in y, and U's rows at 16 bytes.
    """
    start_dependents(PDL)
    place, block = pick_block(tl.program_id(0), block_starts, COUNT)
    number = first_number + pick(places, place, COUNT)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_batch = rows < tokens
    slots = tl.load(token_slots_ptr + rows, mask=in_batch, other=0).to(tl.int64)
    cores = tl.load(
        records_ptr + (slots * slices + number) * _FIELDS + _CORE, mask=in_batch, other=0
    )
    live = cores != 0
    if tl.max(live.to(tl.int32), axis=0) == 0:
        wait_for_previous(PDL)
    else:
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        width = aligned(pick(widths, place, COUNT), 16, ALIGNED)
        y_start = aligned(pick(y_starts, place, COUNT), 16, ALIGNED)
        w_start = aligned(pick(w_starts, place, COUNT), _W_COLS, True)
        k_out = pick(k_outs, place, COUNT)
        k_filled = tl.cdiv(k_out, _W_COLS) * _W_COLS
        codes_ptr = pick(codes_ptrs, place, COUNT)
        # By way of an integer: the choice loses what is known of the pointers' alignment.
        address = aligned(codes_ptr.to(tl.int64), 16, ALIGNED)
        codes_ptr = aligned_pointer(address, codes_ptr.dtype.element_ty, ALIGNED)
        codes_stride = aligned(pick(codes_strides, place, COUNT), 16, ALIGNED)
        scales_ptr, scales_stride = codes_ptr, 0
        ranges_ptr, ranges_stride = codes_ptr, 0
        if FORMAT != "float":
            scales_ptr = pick(scales_ptrs, place, COUNT)
            scales_stride = pick(scales_strides, place, COUNT)
        if FORMAT == "nf4-dq":
            ranges_ptr = pick(ranges_ptrs, place, COUNT)
            ranges_stride = pick(ranges_strides, place, COUNT)
        cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
        col_live = cols < width
        total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        y_places = y_ptr + rows.to(tl.int64)[:, None] * y_stride + y_start + cols[None, :]
        mask = live[:, None] & col_live[None, :]
        for start in range(0, k_out, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            # U is under way before w is there.
            u = load_tile(
                codes_ptr,
                scales_ptr,
                ranges_ptr,
                codes_stride,
                scales_stride,
                ranges_stride,
                ks,
                cols,
                ks < k_out,
                col_live,
                FORMAT,
            )
            wait_for_previous(PDL)
            w = tl.load(
                w_ptr + rows.to(tl.int64)[:, None] * w_stride + w_start + ks[None, :],
                mask=live[:, None] & (ks < k_filled)[None, :],
                other=0.0,
            )
            total = multiply(w, u.to(dtype), total, LOW_PRECISION)
        y = tl.load(y_places, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_places, (y + total).to(dtype), mask=mask)


# --- the host's part -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """A slice with a basis; the fields are named after the kernels' arguments."""

    places: int
    k_ins: int
    k_outs: int
    z_starts: int
    w_starts: int
    y_starts: int
    widths: int
    u: PackedMatrix


@dataclass(frozen=True)
class _Plan:
    """What a layer's launches need and no batch changes; it must not hold the layer itself.

    Attributes:
        v: V, or None when no slice has a basis.
        shrink: the shrink's arguments for V.
        w_total, k_max: columns of w, and the largest k of any slice.
        core: the core's arguments for the slices with a basis.
        expands: arguments of each launch of expand: one a format of U, which is nearly always one.
    """

    v: PackedMatrix | None
    shrink: dict[str, Any]
    w_total: int
    k_max: int
    core: dict[str, Any]
    expands: tuple[dict[str, Any], ...]
    sized: dict[tuple[int, bool, int, torch.dtype, Chain], _Sized] = field(default_factory=dict)
    options: dict[torch.device, Options] = field(default_factory=dict)

    def pdl(self, device: torch.device) -> Options:
        """``pdl_options``, asked once."""
        if device not in self.options:
            self.options[device] = pdl_options(device)
        return self.options[device]

    @property
    def v_rows(self) -> int:
        """Columns of z."""
        return 0 if self.v is None else self.v.rows


@dataclass(frozen=True)
class _Sized:
    """What a class of token counts adds to a plan.

    Attributes:
        shrink: (tokens a block, launch), or None for the vendor's product.
        row_blocks, parts: blocks of V's rows, parts of d_in.
        core, out_blocks: the core's launch, and blocks of w's columns a slice at most.
        expands: (blocks of columns, tokens a block, launch) for the U of each format.
    """

    shrink: tuple[int, Launch] | None
    row_blocks: int
    parts: int
    core: Launch
    out_blocks: int
    expands: tuple[tuple[int, int, Launch], ...]


# Finding a layer's arguments anew would cost the host more than a launch.
_PLANS: WeakKeyDictionary[DirectLayer, _Plan] = WeakKeyDictionary()


def launch_direct(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> None:
    """Enqueue both parts for arguments that have passed ``add_direct``'s checks; no wait.

    Raises:
        ValueError: a part of V or of a U is not contiguous along its rows.
    """
    begin_direct(x, layer, table, routing, ahead=False)(y)


def begin_direct(
    x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing, *, ahead: bool
) -> Rest:
    """Enqueue what needs x alone.

    Args:
        ahead: the rest comes on another stream, after y.

    Returns:
        Enqueues the rest, which adds to y; it has to come on a stream that waits for the one here.

    Raises:
        ValueError: a part of V or of a U is not contiguous along its rows.
    """
    if x.shape[0] == 0 or not (routing.routed or capturing(x)):
        return _nothing
    plan = _PLANS.get(layer)
    if plan is None:
        plan = _PLANS[layer] = _make_plan(layer)
    rests = []
    # A launch that begins early has one launch before it: the one of its own stream.
    chained = plan.pdl(x.device)
    chain = Chain(NO_PDL, chained, NO_PDL) if ahead else Chain(chained, chained, chained)
    with _on_device(x):
        if plan.v is not None:
            rests.append(_begin_joint(x, plan, table, routing, chain))
            chain = replace(chain, first=chained)
        if layer.private:
            rests.append(begin_private(x, layer, table, routing, chain))

    def finish(y: torch.Tensor) -> None:
        with _on_device(y):
            for rest in rests:
                rest(y)

    return finish


def _nothing(y: torch.Tensor) -> None:
    """No token has a direct task."""


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _make_plan(layer: DirectLayer) -> _Plan:
    members = []
    z_start = w_start = y_start = 0
    for place, part in enumerate(layer.slices):
        if part.u is not None and part.k_in and part.k_out:
            assert part.u.cols == part.width
            k_in, k_out = part.k_in, part.k_out
            members.append(
                _Member(place, k_in, k_out, z_start, w_start, y_start, part.width, part.u)
            )
            w_start += count_blocks(k_out, _W_ALIGNMENT) * _W_ALIGNMENT
        z_start += part.k_in
        y_start += part.width
    if layer.v is None or not members:
        return _Plan(None, {}, 0, 0, {}, ())
    assert (layer.v.rows, layer.v.cols) == (z_start, layer.d_in)
    by_format: dict[str, list[_Member]] = {}
    for member in members:
        by_format.setdefault(member.u.format, []).append(member)
    core = _columns(members, "places", "k_ins", "k_outs", "z_starts", "w_starts")
    sizes = [*core["k_ins"], *core["k_outs"]]
    core["ALIGNED"] = all(size % 8 == 0 for size in sizes)
    # Apart from the places: Triton makes constants of some elements of a tuple, so that with numbers in
    # it nearly every block of a model would have kernels of its own.
    core["first_number"] = layer.index
    expands = tuple(
        {**_expand_arguments(group), "first_number": layer.index} for group in by_format.values()
    )
    shrink = _matrix_arguments(layer.v, "V")
    return _Plan(layer.v, shrink, w_start, max(sizes), core, expands)


def _columns(members: list[_Member], *names: str) -> dict[str, Any]:
    """The members' fields as tuples, by name, and how many members there are."""
    columns = {name: tuple(getattr(member, name) for member in members) for name in names}
    return {**columns, "COUNT": len(members)}


def _expand_arguments(members: list[_Member]) -> dict[str, Any]:
    arguments = _columns(members, "places", "y_starts", "widths", "w_starts", "k_outs")
    matrices = [_matrix_arguments(member.u, "U") for member in members]
    arguments["FORMAT"] = matrices[0].pop("FORMAT")
    for name in matrices[0]:
        arguments[f"{name}s"] = tuple(matrix[name] for matrix in matrices)
    multiples = [*arguments["widths"], *arguments["y_starts"], *arguments["codes_strides"]]
    multiples += [codes.data_ptr() for codes in arguments["codes_ptrs"]]
    arguments["ALIGNED"] = all(value % 16 == 0 for value in multiples)
    return arguments


def _matrix_arguments(matrix: PackedMatrix, name: str) -> dict[str, Any]:
    """A packed matrix as the kernels take it."""
    for part_name, part in matrix.parts.items():
        if part.shape[-1] > 1 and part.stride(-1) != 1:
            raise ValueError(
                f"direct: part {part_name!r} of {name} must be contiguous along its rows, its "
                f"strides are {list(part.stride())}: call .contiguous() on it first"
            )
    parts = matrix.parts
    codes = parts["values"] if "values" in parts else parts["codes"]
    scales = parts["scale_codes"] if "scale_codes" in parts else parts.get("scales")
    ranges = parts.get("scale_range")
    if ranges is not None and not ranges.is_contiguous():
        ranges = ranges.contiguous()
    return {
        "codes_ptr": codes,
        "scales_ptr": scales,
        "ranges_ptr": ranges,
        "codes_stride": codes.stride(0),
        "scales_stride": 0 if scales is None else scales.stride(0),
        "ranges_stride": 0 if ranges is None else ranges.stride(0),
        "FORMAT": "float" if matrix.format in FLOAT_DTYPES else matrix.format,
    }


def _begin_joint(
    x: torch.Tensor, plan: _Plan, table: SlotTable, routing: Routing, chain: Chain
) -> Rest:
    tokens, slices = x.shape[0], table.records.shape[1]
    tile, tiles = choose_tiles(x, routing)
    key = (power_of_two(tokens, 16, 64), tokens > DECODE_TOKENS, tile, x.dtype, chain)
    sized = plan.sized.get(key)
    if sized is None:
        sized = plan.sized[key] = _make_sized(plan, tokens, tile, x, chain)
    z = _launch_shrink(x, plan, sized)
    w = torch.empty((tokens, plan.w_total), dtype=x.dtype, device=x.device)
    sized.core(
        (tiles, plan.core["COUNT"], sized.out_blocks),
        w_ptr=w,
        z_ptr=z,
        records_ptr=table.records,
        order_ptr=routing.order,
        tiles_ptr=routing.tiles[tile],
        slices=slices,
        part_stride=tokens * plan.v_rows,
    )

    def expand(y: torch.Tensor) -> None:
        for col_blocks, block_t, launch in sized.expands:
            launch(
                (col_blocks, count_blocks(tokens, block_t), 1),
                y_ptr=y,
                w_ptr=w,
                records_ptr=table.records,
                token_slots_ptr=routing.token_slots,
                slices=slices,
                tokens=tokens,
                y_stride=y.stride(0),
            )

    return expand


def _make_sized(plan: _Plan, tokens: int, tile: int, x: torch.Tensor, chain: Chain) -> _Sized:
    """All launches, for which the layer, the dtype and the class of token counts are fixed."""
    shrink, row_blocks, parts = _make_shrink(plan, tokens, x, chain)
    config = core_config(tile, plan.k_max, x.dtype)
    out_blocks = count_blocks(max(plan.core["k_outs"]), config["BLOCK_OUT"])
    strides = {"z_stride": plan.v_rows, "w_stride": plan.w_total, "PARTS": parts}
    core = Launch(_core_kernel, {**plan.core, **config, **strides, **dict(chain.middle)})
    expands = tuple(_make_expand(plan, arguments, tokens, x, chain) for arguments in plan.expands)
    return _Sized(shrink, row_blocks, parts, core, out_blocks, expands)


def _make_shrink(
    plan: _Plan, tokens: int, x: torch.Tensor, chain: Chain
) -> tuple[tuple[int, Launch] | None, int, int]:
    """((tokens a block, launch) or None for the vendor's product, blocks of V's rows, parts)."""
    v = plan.v
    assert v is not None
    if tokens > DECODE_TOKENS and FLOAT_DTYPES.get(v.format) == x.dtype:
        return None, 1, 1
    config = shrink_config(tokens, plan.shrink["FORMAT"], x.dtype, on_amd(x.device))
    row_blocks, parts, part_cols = count_blocks(v.rows, int(config["BLOCK_K"])), 1, v.cols
    if tokens <= DECODE_TOKENS:
        # The cut is the layer's own: graphs of all sizes share one compiled kernel. A longer batch has
        # programs enough.
        parts, part_cols = cut_columns(v.cols, row_blocks, PART_ALIGNMENT, _WANTED)
    sizes = {"k_total": v.rows, "d_in": v.cols, "part_cols": part_cols}
    launch = Launch(_shrink_kernel, {**sizes, **plan.shrink, **config, **dict(chain.first)})
    return (int(config["BLOCK_T"]), launch), row_blocks, parts


def _make_expand(
    plan: _Plan, arguments: dict[str, Any], tokens: int, x: torch.Tensor, chain: Chain
) -> tuple[int, int, Launch]:
    """(blocks of columns, tokens a block, launch) for the U of one format."""
    config = expand_config(tokens, plan.k_max, arguments["FORMAT"], x.dtype)
    block_starts = [0]
    for width in arguments["widths"]:
        block_starts.append(block_starts[-1] + count_blocks(width, config["BLOCK_D"]))
    col_blocks = block_starts.pop()
    fixed = {"block_starts": tuple(block_starts), "w_stride": plan.w_total, **arguments, **config}
    launch = Launch(_expand_kernel, {**fixed, **dict(chain.rest)})
    return col_blocks, int(config["BLOCK_T"]), launch


def _launch_shrink(x: torch.Tensor, plan: _Plan, sized: _Sized) -> torch.Tensor:
    """z as ``[parts, T, k_total]``: float32 partial sums, or one part in the dtype of x."""
    v, tokens = plan.v, x.shape[0]
    assert v is not None
    dtype = torch.float32 if sized.parts > 1 else x.dtype
    z = torch.empty((sized.parts, tokens, v.rows), dtype=dtype, device=x.device)
    if sized.shrink is None:
        # A plain dense product, large enough for the vendor's kernels.
        torch.mm(x, v.parts["values"].t(), out=z[0])
        return z
    block_t, launch = sized.shrink
    grid = (sized.row_blocks, sized.parts, count_blocks(tokens, block_t))
    launch(grid, z_ptr=z, x_ptr=x, tokens=tokens, x_stride=x.stride(0))
    return z


def shrink_config(tokens: int, format: str, dtype: torch.dtype, amd: bool) -> dict[str, int | bool]:
    """The shrink's compile-time arguments, apart from the format."""
    low = low_precision(dtype)
    # For 64 tokens four take 72 KiB of shared memory. A program has 64 KiB on AMD's GPUs, and two is what
    # AMD advises for a product.
    stages = 4 if format == "float" and not amd else 2
    # Floats go straight to shared memory; values to dequantise pass through registers, where wider
    # blocks spill.
    deep = 128 if format == "float" else 32
    return {
        "LOW_PRECISION": low,
        "BLOCK_T": power_of_two(tokens, 16, 64) if low else 16,
        "BLOCK_K": 32 if tokens <= DECODE_TOKENS or not low else 64,
        # A float32 product runs on the FMA units with its operands in registers.
        "BLOCK_D": deep if low else 16,
        "num_stages": stages if low else 1,
    }


def core_config(tile: int, k_max: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """The core's compile-time arguments; ``tile``: the size of its tiles of tokens."""
    low = low_precision(dtype)
    most = 64 if low else (32 if tile == 16 else 16)
    return {
        "LOW_PRECISION": low,
        "ONE": tile == TILE_SIZES[0],
        "BLOCK_T": tile,
        "BLOCK_OUT": power_of_two(k_max, 16, most),
        "BLOCK_IN": power_of_two(k_max, 16, most),
        "BLOCK_R": 16,
        # One token's core of 64 x 64 is 64 values a thread of two warps.
        "num_warps": (2 if low else 4) if tile == TILE_SIZES[0] else 8,
        "num_stages": 2 if low else 1,
    }


def expand_config(
    tokens: int, k_max: int, format: str, dtype: torch.dtype
) -> dict[str, int | bool]:
    """The expansion's compile-time arguments, apart from the format and the slices."""
    low = low_precision(dtype)
    deep = 64 if format == "float" else 16
    block_t = power_of_two(tokens, 16, 64) if low else 16
    return {
        "LOW_PRECISION": low,
        "BLOCK_T": block_t,
        "BLOCK_D": 128 if tokens > DECODE_TOKENS and low else 64,
        "BLOCK_K": power_of_two(k_max, 16, deep) if low else 16,
        "num_warps": 8 if block_t == 64 else 4,
        # k is a block or two: nothing to pipeline.
        "num_stages": 1,
    }
