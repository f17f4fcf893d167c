"""The Triton kernel of ``materialize`` and its launcher; needs Triton to import."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from vllm_vlora.quantize import FLOAT_DTYPES
from vllm_vlora.triton_kernels.dequantise import load_tile
from vllm_vlora.triton_kernels.materialize import MaterializeJob


@triton.jit(do_not_specialize=["n_rows", "n_cols", "rank", "k", "width"])
def _materialize_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    left_ptr,
    codes_ptr,
    scales_ptr,
    ranges_ptr,
    scale,
    n_rows,
    n_cols,
    rank,
    k,
    start,
    width,
    out_stride_row,
    out_stride_col,
    left_stride_row,
    left_stride_col,
    codes_stride,
    scales_stride,
    ranges_stride,
    FORMAT: tl.constexpr,
    IDENTITY: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One ``BLOCK_M x BLOCK_N`` tile of ``out``; grid (column blocks, row blocks)."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_live = rows < rank
    col_live = cols < width
    if IDENTITY:
        value = load_tile(
            codes_ptr,
            scales_ptr,
            ranges_ptr,
            codes_stride,
            scales_stride,
            ranges_stride,
            rows,
            start + cols,
            row_live,
            col_live,
            FORMAT,
        ).to(tl.float32)
    else:
        value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Tiles that are all remainder read nothing.
        live = (tl.program_id(1) * BLOCK_M < rank) & (tl.program_id(0) * BLOCK_N < width)
        for k0 in range(0, tl.where(live, k, 0), BLOCK_K):
            ks = k0 + tl.arange(0, BLOCK_K)
            k_live = ks < k
            left = tl.load(
                left_ptr
                + rows.to(tl.int64)[:, None] * left_stride_row
                + ks[None, :] * left_stride_col,
                mask=row_live[:, None] & k_live[None, :],
                other=0.0,
            )
            right = load_tile(
                codes_ptr,
                scales_ptr,
                ranges_ptr,
                codes_stride,
                scales_stride,
                ranges_stride,
                ks,
                start + cols,
                k_live,
                col_live,
                FORMAT,
            )
            if LOW_PRECISION:
                # Products of two 16-bit floats are exact in the float32 accumulator.
                value = tl.dot(left, right, value)
            else:
                # "ieee": the default would round float32 operands to TF32.
                value = tl.dot(
                    left.to(tl.float32), right.to(tl.float32), value, input_precision="ieee"
                )
    inside = row_live[:, None] & col_live[None, :]
    value = tl.where(inside, value * scale, 0.0)
    tl.store(
        out_ptr
        + rows.to(tl.int64)[:, None] * out_stride_row
        + cols.to(tl.int64)[None, :] * out_stride_col,
        value.to(out_ptr.dtype.element_ty),
        mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :],
    )


_INTERPRETED = not isinstance(_materialize_kernel, triton.JITFunction)


def launch_materialize(job: MaterializeJob) -> None:
    """Enqueue one job that has passed its checks: one launch, no wait.

    Raises:
        ValueError: a part of the packed matrix is not contiguous along its rows.
    """
    out, left, matrix = job.out, job.left, job.matrix
    if out.numel() == 0:
        return
    parts = matrix.parts
    for name, part in parts.items():
        if part.shape[-1] > 1 and part.stride(-1) != 1:
            raise ValueError(
                f"materialize: part {name!r} of the matrix must be contiguous along its rows, its "
                f"strides are {list(part.stride())}: call .contiguous() on it first"
            )
    codes = parts["values"] if "values" in parts else parts["codes"]
    scales = parts["scale_codes"] if "scale_codes" in parts else parts.get("scales")
    ranges = parts.get("scale_range")
    if ranges is not None and not ranges.is_contiguous():
        ranges = ranges.contiguous()
    n_rows, n_cols = out.shape
    config = tile_config(job.rank, matrix.rows, matrix.format, None if left is None else left.dtype)
    grid = (triton.cdiv(n_cols, config["BLOCK_N"]), triton.cdiv(n_rows, config["BLOCK_M"]))
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        _materialize_kernel[grid](
            out,
            left,
            codes,
            scales,
            ranges,
            job.scale,
            n_rows,
            n_cols,
            job.rank,
            matrix.rows,
            job.start,
            job.width,
            out.stride(0),
            out.stride(1),
            left.stride(0) if left is not None else 0,
            left.stride(1) if left is not None else 0,
            codes.stride(0),
            scales.stride(0) if scales is not None else 0,
            ranges.stride(0) if ranges is not None else 0,
            **config,
        )


def tile_config(
    rank: int, k: int, format: str, left_dtype: torch.dtype | None
) -> dict[str, str | bool | int]:
    """The compile-time arguments for a job: format, arithmetic, tile sizes and pipeline stages.

    ``left_dtype`` is None for the identity. 16-bit floats of one type go to the tensor cores; any
    other pair is multiplied as float32.
    """
    is_16_bit = left_dtype in (torch.float16, torch.bfloat16)
    low_precision = is_16_bit and left_dtype == FLOAT_DTYPES.get(format)
    if low_precision and left_dtype == torch.bfloat16 and _INTERPRETED:
        # The interpreter keeps bfloat16 as its bits and would multiply those.
        low_precision = False
    if left_dtype is None:
        # No sum over k: as few rows as there are, and columns enough for 4 warps.
        block_m, block_n = min(triton.next_power_of_2(max(rank, 1)), 16), 128
    else:
        block_m = min(triton.next_power_of_2(max(rank, 16)), 64 if low_precision else 32)
        block_n = 128 if block_m == 16 else 64
    # A float32 product runs on the FMA units with its operands in registers. With 64 rows of out,
    # 32 rows of the matrix, or loads kept in flight, the compiler spills some of them.
    block_k = min(triton.next_power_of_2(max(k, 16)), 32) if low_precision else 16
    return {
        "FORMAT": "float" if format in FLOAT_DTYPES else format,
        "IDENTITY": left_dtype is None,
        "LOW_PRECISION": low_precision,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_stages": 2 if low_precision else 1,
    }
