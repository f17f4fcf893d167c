"""Materialize: write the LoRA factors of tasks into the slot tensors of a serving engine.

    out[i, j] = scale * sum_k left[i, k] * matrix[k, start + j]     for i < r and j < width
    out[i, j] = 0                                                   elsewhere

``matrix`` is a packed basis (or, without ``left``, a task's own packed factor) and is dequantised
on the way. A slot's A is ``out`` itself; a slot's B is passed transposed. All jobs of one call run
together: on a GPU in as few launches as there are kinds of arithmetic among them.

What a job reads stays the same from one slot to the next and only ``out`` changes, so the jobs of a
task may be planned once and run for any slot: ``plan_materialize(jobs).run(slot)`` with the slot's
tensors as an ``OutTable``.

This file holds the operation's definition: the job, its checks, the torch reference and the
dispatch. The Triton kernel stands with its plan in ``materialize_kernel.py``, which is imported only
when it runs, so that machines without Triton can do without; the plan for other devices stands in
``materialize_torch.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

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

    @classmethod
    def zero(cls, out: torch.Tensor) -> MaterializeJob:
        """A job that reads nothing and zeroes ``out``."""
        nothing = torch.empty(0, 0, dtype=torch.float32, device=out.device)
        return cls(out, PackedMatrix("float32", 0, 0, {"values": nothing}), None, 1.0, 0, 0)


class OutTable:
    """What a plan may write to: for each of its jobs a tensor, in the jobs' order.

    One table describes one slot of an engine; every plan whose jobs follow the same order takes it.
    A table keeps what plans derive from its tensors, so make it once a slot.

    Attributes:
        outs: 2-D tensors of one device.
    """

    def __init__(self, outs: Sequence[torch.Tensor]) -> None:
        self.outs = tuple(outs)
        self._views: dict[object, torch.Tensor] = {}

    @cached_property
    def pointers(self) -> torch.Tensor:
        """The address of each tensor's first element, int64, on their device."""
        return to_device([out.data_ptr() for out in self.outs], torch.int64, self.outs[0].device)

    def view(self, key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A view of one of the tensors under ``key``, made once: making views costs as much as
        filling small ones."""
        held = self._views.get(key)
        if held is None:
            held = self._views[key] = make()
        return held


class MaterializePlan(Protocol):
    """Jobs that passed their checks, arranged to run at the cost of their arithmetic alone.

    A plan holds on to the tensors of its jobs; what they read must not change meanwhile.
    """

    def warm_up(self) -> None:
        """Have everything compiled that ``run`` launches; nothing is written.

        A kernel takes some two seconds the first time on a machine, which would be a step's otherwise.
        """

    def run(self, outs: OutTable | None = None) -> None:
        """Run the jobs, into their own ``out`` or into the tensors of ``outs``.

        On a GPU the work is enqueued on the current stream and the host does not wait for it; a plan
        and its tables belong to the stream on which they were made.

        Args:
            outs: for each job a tensor with the dtype, strides and device of the job's ``out`` that
                is at least as large; what lies outside of the job's shape is left as it is.

        Raises:
            ValueError: a tensor of ``outs`` does not fit its job.
        """


def plan_materialize(jobs: Sequence[MaterializeJob]) -> MaterializePlan:
    """Check ``jobs`` and arrange them for their device: Triton for CUDA and ROCm, else torch.

    On a CPU a plan may hold copies of packed matrices in the order of the slots (never decoded; none
    where the parts lie that way already, see ``PackedMatrix.by_columns``).

    Raises:
        ValueError: a job's shapes, dtypes, strides or devices do not fit together, or the jobs are
            on different devices.
    """
    _check_all(jobs)
    # ROCm devices, too, are of the type "cuda" in torch.
    if jobs and jobs[0].out.is_cuda:
        return _kernel_plan(jobs)
    from vllm_vlora.triton_kernels.materialize_torch import TorchPlan

    return TorchPlan(jobs)


def materialize(jobs: Sequence[MaterializeJob]) -> None:
    """Run ``jobs`` once: a plan and its run. Nothing is written unless every job passes its checks.

    Raises:
        ValueError: as :func:`plan_materialize`.
    """
    plan_materialize(jobs).run()


def materialize_reference(jobs: Sequence[MaterializeJob]) -> None:
    """The definition of the operation in torch, on any device.

    Rounding points: a dequantised value is one float32 product (see ``vllm_vlora.quantize``); the
    sum over k is accumulated in float32 from float32 products, its order unspecified; ``scale`` is
    applied in float32 to the sum; the result is rounded once to the dtype of ``out``. (On a GPU
    the precision of float32 products follows torch's own setting. The kernel takes NVIDIA's TF32 for an
    ``out`` of 16 bits, which cuts operands to 11 significant bits, as many as float16 has.)

    Raises:
        ValueError: as :func:`materialize`.
    """
    _check_all(jobs)
    for job in jobs:
        run_reference(job)


def materialize_triton(jobs: Sequence[MaterializeJob]) -> None:
    """The operation by the Triton kernel, with the rounding points of the reference.

    Raises:
        ValueError: as :func:`materialize`.
        ImportError: Triton is not installed.
    """
    _check_all(jobs)
    _kernel_plan(jobs).run()


def check_outs(jobs: Sequence[MaterializeJob], outs: OutTable) -> None:
    """Raise ValueError unless the plan of these jobs may write to these tensors."""
    if len(outs.outs) != len(jobs):
        raise ValueError(f"materialize: {len(outs.outs)} tensors for {len(jobs)} jobs")
    for place, (job, out) in enumerate(zip(jobs, outs.outs)):
        same = (out.dtype, out.device, out.stride()) == (
            job.out.dtype,
            job.out.device,
            job.out.stride(),
        )
        if not same or any(have < want for have, want in zip(out.shape, job.out.shape)):
            raise ValueError(
                f"materialize: tensor {place} is {out.dtype} {list(out.shape)} with strides "
                f"{list(out.stride())} on {out.device}; its job was planned for {job.out.dtype} "
                f"{list(job.out.shape)} with strides {list(job.out.stride())} on {job.out.device}"
            )


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as a tensor on ``device``; the host does not wait for a GPU."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor
    # torch keeps the pinned memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def _check_all(jobs: Sequence[MaterializeJob]) -> None:
    for job in jobs:
        _check(job)
    devices = {job.out.device for job in jobs}
    if len(devices) > 1:
        raise ValueError(
            "materialize: the jobs of one call must be on one device, these are on "
            f"{', '.join(sorted(map(str, devices)))}"
        )


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
def run_reference(job: MaterializeJob) -> None:
    """The definition of one job that has passed its checks."""
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


def _kernel_plan(jobs: Sequence[MaterializeJob]) -> MaterializePlan:
    from vllm_vlora.triton_kernels.materialize_kernel import KernelPlan

    return KernelPlan(jobs)
