"""Materialize: write the LoRA factors of tasks into the slot tensors of a serving engine.

    out[i, j] = scale * sum_k left[i, k] * matrix[k, start + j]     for i < r and j < width
    out[i, j] = 0                                                   elsewhere

``matrix`` is a packed basis (or, without ``left``, a task's own packed factor) and is dequantised
on the way. A slot's A is ``out`` itself; a slot's B is passed transposed.

This file holds the operation's definition: the job, its checks, the torch reference and the
dispatch. The Triton kernel stands with its launcher in ``materialize_kernel.py``, which is imported
only when it runs, so that machines without Triton can use the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, unpack

_DTYPES = frozenset(FLOAT_DTYPES.values())


@dataclass(frozen=True)
class MaterializeJob:
    """One factor of one module of one task.

    Attributes:
        out: ``[R, W]`` float32, float16 or bfloat16, of any non-zero strides; overwritten
            entirely.
        matrix: ``(k, d)``, in any packed format.
        left: ``[r, k]`` float32, float16 or bfloat16 with ``r <= R``; or None for the identity,
            where ``r = k``.
        scale: multiplies the result; finite.
        start: first column of ``matrix`` to read; any, also inside an NF4 block.
        width: number of columns to read, at most ``W``; the rest of ``out`` is zeroed.
    """

    out: torch.Tensor
    matrix: PackedMatrix
    left: torch.Tensor | None
    scale: float
    start: int
    width: int

    @property
    def rank(self) -> int:
        """r: the number of rows of ``out`` that are not zeroed."""
        return self.matrix.rows if self.left is None else self.left.shape[0]


def materialize(jobs: Sequence[MaterializeJob]) -> None:
    """Run ``jobs``: Triton for tensors on a CUDA or ROCm device, the torch reference elsewhere.

    Nothing is written unless every job passes its checks. On a GPU the work is enqueued on the
    current stream and the host does not wait for it.

    Raises:
        ValueError: a job's shapes, dtypes, strides or devices do not fit together.
    """
    for job in jobs:
        _check(job)
    # ROCm devices, too, are of the type "cuda" in torch.
    on_gpu = [job for job in jobs if job.out.is_cuda]
    if on_gpu:
        _launch(on_gpu)
    if len(on_gpu) < len(jobs):
        _reference([job for job in jobs if not job.out.is_cuda])


def materialize_reference(jobs: Sequence[MaterializeJob]) -> None:
    """The definition of the operation in torch, on any device.

    Rounding points: a dequantised value is one float32 product (see ``vllm_vlora.quantize``); the
    sum over k is accumulated in float32 from float32 products, its order unspecified; ``scale`` is
    applied in float32 to the sum; the result is rounded once to the dtype of ``out``. (On a GPU
    the precision of float32 products follows torch's own setting.)

    Raises:
        ValueError: as :func:`materialize`.
    """
    for job in jobs:
        _check(job)
    _reference(jobs)


def materialize_triton(jobs: Sequence[MaterializeJob]) -> None:
    """The operation by the Triton kernel, with the rounding points of the reference.

    Raises:
        ValueError: as :func:`materialize`.
        ImportError: Triton is not installed.
    """
    for job in jobs:
        _check(job)
    _launch(jobs)


def _check(job: MaterializeJob) -> None:
    out, left, matrix = job.out, job.left, job.matrix
    if out.dim() != 2 or out.dtype not in _DTYPES:
        raise ValueError(
            "materialize: out must be a 2-D float32, float16 or bfloat16 tensor, got "
            f"{out.dtype} {list(out.shape)}"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride())):
        raise ValueError(
            f"materialize: out has a stride of zero ({list(out.stride())}), so its elements share "
            "memory: pass a tensor that is not expanded"
        )
    if left is not None:
        if left.dim() != 2 or left.dtype not in _DTYPES:
            raise ValueError(
                "materialize: left must be a 2-D float32, float16 or bfloat16 tensor, got "
                f"{left.dtype} {list(left.shape)}"
            )
        if left.shape[1] != matrix.rows:
            raise ValueError(
                f"materialize: left has {left.shape[1]} columns, the matrix {matrix.rows} rows; "
                "they must agree"
            )
        if left.device != out.device:
            raise ValueError(f"materialize: left is on {left.device}, out on {out.device}")
    if matrix.device != out.device:
        raise ValueError(f"materialize: the matrix is on {matrix.device}, out on {out.device}")
    if job.rank > out.shape[0]:
        raise ValueError(f"materialize: {job.rank} rows do not fit the {out.shape[0]} rows of out")
    if not 0 <= job.width <= out.shape[1]:
        raise ValueError(
            f"materialize: a width of {job.width} does not fit the {out.shape[1]} columns of out"
        )
    if not 0 <= job.start <= matrix.cols - job.width:
        raise ValueError(
            f"materialize: columns {job.start}:{job.start + job.width} are not within the "
            f"{matrix.cols} columns of the matrix"
        )
    if not math.isfinite(job.scale):
        raise ValueError(f"materialize: the scale must be finite, got {job.scale}")


@torch.no_grad()
def _reference(jobs: Sequence[MaterializeJob]) -> None:
    for job in jobs:
        rank, width = job.rank, job.width
        target = job.out[:rank, :width]
        # A float matrix keeps its dtype here: a bf16 factor then reaches a bf16 slot as one copy.
        dtype = FLOAT_DTYPES.get(job.matrix.format, torch.float32)
        matrix = unpack(job.matrix, dtype, job.start, job.start + width)
        if job.left is None:
            target.copy_(matrix if job.scale == 1.0 else matrix.float() * job.scale)
        elif target.dtype == torch.float32:
            # Straight into the slot, whatever its strides; beta = 0 ignores what was there.
            target.addmm_(job.left.float(), matrix.float(), beta=0, alpha=job.scale)
        else:
            target.copy_(torch.mm(job.left.float(), matrix.float()).mul_(job.scale))
        if rank < job.out.shape[0]:
            job.out[rank:].zero_()
        if width < job.out.shape[1]:
            job.out[:rank, width:].zero_()


def _launch(jobs: Sequence[MaterializeJob]) -> None:
    from vllm_vlora.triton_kernels.materialize_kernel import launch_materialize

    for job in jobs:
        launch_materialize(job)
