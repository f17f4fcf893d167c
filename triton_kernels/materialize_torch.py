"""The plan of ``materialize`` for devices without Triton, above all CPUs.

It gives what the reference defines, at the cost of few and cheap calls, since a task's factors are
many and small. Measured on a task of 112 factors, 2.5 million values:

* Copying a factor against its direction in memory took 50 us, along it 8 us. So everything here works
  in the order in which ``out`` lies, and a private factor is held that way.
* NF4 codes are looked up for many factors at once, and lists of tensors are copied in one call.
* Jobs run in chunks whose float32 values stay in a core's cache from one step to the next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import torch
import torch.nn.functional as F

from vllm_vlora.quantize import FLOAT_DTYPES, NF4_BLOCK, nf4_scales, nf4_values, unpack
from vllm_vlora.triton_kernels.materialize import MaterializeJob, OutTable, check_outs

# Values computed at a time: 1 MiB of float32.
_CHUNK = 1 << 18
# Between these bounds nothing is rounded when a power of two is put on a scale and not on the product.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**100


class TorchPlan:
    """Jobs that passed their checks as steps over lists of tensors."""

    def __init__(self, jobs: Sequence[MaterializeJob]) -> None:
        self._jobs = tuple(jobs)
        self._own = OutTable([job.out for job in jobs])
        self._fitting: WeakSet[OutTable] = WeakSet()
        with torch.no_grad():
            self._steps = list(_make_steps(jobs))

    def warm_up(self) -> None:
        """Nothing is compiled here."""

    @torch.no_grad()
    def run(self, outs: OutTable | None = None) -> None:
        """See :class:`vllm_vlora.triton_kernels.materialize.MaterializePlan`."""
        if outs is None:
            outs = self._own
        elif outs not in self._fitting:
            check_outs(self._jobs, outs)
            self._fitting.add(outs)
        for step in self._steps:
            step.run(outs)


class _Step(Protocol):
    def run(self, outs: OutTable) -> None: ...


@dataclass(frozen=True)
class _Region:
    """Rows and columns of the tensor at a place, in the order in which it lies.

    With ``flip`` the view is transposed: of a slot's B, which is passed as (rank, d_out), it is the
    slot's own (d_out, rank).
    """

    key: tuple[int, int, int, int, int, bool]

    def of(self, outs: OutTable) -> torch.Tensor:
        """The view into ``outs``."""
        return outs.view(self.key, lambda: self._make(outs))

    def in_blocks(self, outs: OutTable) -> torch.Tensor:
        """The view with its columns (before a flip) cut into blocks of NF4."""
        along = 0 if self.key[-1] else 1
        return outs.view(
            (*self.key, NF4_BLOCK), lambda: self.of(outs).unflatten(along, (-1, NF4_BLOCK))
        )

    def _make(self, outs: OutTable) -> torch.Tensor:
        place, row, end_row, col, end_col, flip = self.key
        view = outs.outs[place][row:end_row, col:end_col]
        return view.T if flip else view


def _make_steps(jobs: Sequence[MaterializeJob]) -> Iterator[_Step]:
    kinds: dict[Callable[[list[_Item]], _Step], list[_Item]] = {
        _Copy: [],
        _Lookup: [],
        _Unpacked: [],
        _Product: [],
    }
    zeros: list[_Region] = []
    for place, job in enumerate(jobs):
        item = _Item(place, job)
        zeros += item.remainder()
        if job.rank == 0 or job.width == 0:
            continue
        if job.left is not None:
            kinds[_Product].append(item)
        else:
            kinds[_kind_of(job.matrix.format)].append(item)
    if zeros:
        yield _Zero(zeros)
    for kind, items in kinds.items():
        # What is alike runs together.
        groups: dict[object, list[_Item]] = {}
        for item in items:
            key = (item.job.out.dtype, item.job.matrix.format, item.job.scale == 1.0)
            groups.setdefault(key, []).append(item)
        for group in groups.values():
            for chunk in _chunks(group):
                yield kind(chunk)


@dataclass(frozen=True)
class _Item:
    """A job and the place of its tensor in tables."""

    place: int
    job: MaterializeJob

    @property
    def flip(self) -> bool:
        """Whether out lies column by column."""
        return self.job.out.stride(0) < self.job.out.stride(1)

    @property
    def exact(self) -> bool:
        """Whether out holds float32, so that steps may compute in place."""
        return self.job.out.dtype == torch.float32

    @property
    def target(self) -> _Region:
        """Where the product goes."""
        return self._region(0, self.job.rank, 0, self.job.width)

    def remainder(self) -> Iterator[_Region]:
        """What of out is zeroed."""
        (n_rows, n_cols), rank, width = self.job.out.shape, self.job.rank, self.job.width
        if rank < n_rows and n_cols > 0:
            yield self._region(rank, n_rows, 0, n_cols)
        if width < n_cols and rank > 0:
            yield self._region(0, rank, width, n_cols)

    def turned(self, matrix: torch.Tensor) -> torch.Tensor:
        """A (rows, columns) matrix in the order of the target's view."""
        return matrix.T if self.flip else matrix

    def _region(self, row: int, end_row: int, col: int, end_col: int) -> _Region:
        return _Region((self.place, row, end_row, col, end_col, self.flip))


def _chunks(items: list[_Item]) -> Iterator[list[_Item]]:
    chunk: list[_Item] = []
    values = 0
    for item in items:
        size = item.job.rank * item.job.width
        if chunk and values + size > _CHUNK:
            yield chunk
            chunk, values = [], 0
        chunk.append(item)
        values += size
    if chunk:
        yield chunk


class _Zero:
    def __init__(self, regions: list[_Region]) -> None:
        self._regions = regions

    def run(self, outs: OutTable) -> None:
        torch._foreach_zero_([region.of(outs) for region in self._regions])


class _Copy:
    """Private factors of floats or int8: ``out = codes * scales * scale``, without what is 1.

    All items have one dtype of out and one format.
    """

    def __init__(self, items: list[_Item]) -> None:
        self._targets = [item.target for item in items]
        self._codes: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []
        factors: list[float] = []
        for item in items:
            job, factor, parts = item.job, item.job.scale, item.job.matrix.parts
            codes = parts["values"] if "values" in parts else parts["codes"]
            # A copy in the order of the slot, or the part itself where it has that order.
            window = item.turned(codes[:, job.start : job.start + job.width])
            self._codes.append(window.contiguous() if item.flip else window)
            if "scales" in parts:
                scales, factor = _fold(item.turned(parts["scales"]), factor)
                self._scales.append(scales)
            factors.append(factor)
        self._factors = factors if any(factor != 1.0 for factor in factors) else []
        self._in_place = items[0].exact or not (self._scales or self._factors)

    def run(self, outs: OutTable) -> None:
        targets = [target.of(outs) for target in self._targets]
        values = targets if self._in_place else _like(targets)
        torch._foreach_copy_(values, self._codes)
        if self._scales:
            torch._foreach_mul_(values, self._scales)
        if self._factors:
            torch._foreach_mul_(values, self._factors)
        if values is not targets:
            torch._foreach_copy_(targets, values)


class _Lookup:
    """Private factors in NF4: one look-up for all of them, then one product each."""

    def __init__(self, items: list[_Item]) -> None:
        self._factors = [_Nf4Factor(item) for item in items]
        self._codes = [factor.codes for factor in self._factors]
        self._sizes = [len(codes) for codes in self._codes]

    def run(self, outs: OutTable) -> None:
        device, total = self._codes[0].device, sum(self._sizes)
        codes = _SCRATCH.take(torch.int32, total, device)
        torch._foreach_copy_(list(codes.split(self._sizes)), self._codes)
        values = nf4_values(codes, out=_SCRATCH.take(torch.float64, total, device))
        for factor, piece in zip(self._factors, values.split([2 * size for size in self._sizes])):
            factor.write(outs, piece)


class _Nf4Factor:
    """One factor: its bytes in the order of the slot, and scales that broadcast against the blocks.

    Attributes:
        codes: uint8, 1-D: the bytes of (rank, blocks, 64) values, or, of a flipped target, those of
            (blocks, 64, rank) values with the rank rounded up to an even number.
    """

    def __init__(self, item: _Item) -> None:
        job = item.job
        self._item, self._target, self._rank = item, item.target, job.rank
        first, last = job.start // NF4_BLOCK, -(-(job.start + job.width) // NF4_BLOCK)
        self._offset, blocks = job.start - first * NF4_BLOCK, last - first
        half = NF4_BLOCK // 2
        matrix = job.matrix.widened()
        codes = matrix.parts["codes"][:, first * half : last * half]
        scales = nf4_scales(matrix)[:, first:last]
        if item.flip:
            codes = _flip_codes(codes)
            scales = scales.T.contiguous().unsqueeze(1)
            self._shape = (blocks, NF4_BLOCK, job.rank + job.rank % 2)
        else:
            scales = scales.unsqueeze(2)
            self._shape = (job.rank, blocks, NF4_BLOCK)
        self.codes = codes.reshape(-1)
        self._scales, self._factor = _fold(scales, job.scale)
        # Whole blocks go to a float32 slot without a stop on the way.
        self._direct = item.exact and self._offset == 0 and job.width == blocks * NF4_BLOCK

    def write(self, outs: OutTable, values: torch.Tensor) -> None:
        """Write the factor, given the codebook's values of its codes."""
        values = values.view(self._shape)
        if self._item.flip and self._shape[2] != self._rank:
            values = values[:, :, : self._rank]
        if self._direct:
            target = self._target.in_blocks(outs)
            torch.mul(values, self._scales, out=target)
            if self._factor != 1.0:
                target.mul_(self._factor)
            return
        values.mul_(self._scales)
        if self._factor != 1.0:
            values.mul_(self._factor)
        along = 0 if self._item.flip else 1
        values = values.flatten(along, along + 1)
        self._target.of(outs).copy_(values.narrow(along, self._offset, self._item.job.width))


class _Unpacked:
    """Private factors in trellis codes, one after another."""

    def __init__(self, items: list[_Item]) -> None:
        self._items = [(item, item.target) for item in items]

    def run(self, outs: OutTable) -> None:
        for item, region in self._items:
            job = item.job
            values = unpack(job.matrix, torch.float32, job.start, job.start + job.width)
            region.of(outs).copy_(item.turned(values.mul_(job.scale)))


def _kind_of(format: str) -> type[_Copy | _Lookup | _Unpacked]:
    """What runs private factors in a format."""
    if format == "trellis":
        return _Unpacked
    return _Copy if format in FLOAT_DTYPES or format == "int8" else _Lookup


class _Product:
    """``scale * left @ matrix``, one product a job; bases become float32 on the way."""

    def __init__(self, items: list[_Item]) -> None:
        self._items = [(item, item.target) for item in items]

    def run(self, outs: OutTable) -> None:
        for item, region in self._items:
            target, job = region.of(outs), item.job
            assert job.left is not None
            matrix, left = item.turned(_dense(job)), item.turned(job.left.float())
            first, second = (matrix, left) if item.flip else (left, matrix)
            if item.exact:
                # Straight into the slot; beta = 0 ignores what was there.
                target.addmm_(first, second, beta=0, alpha=job.scale)
            else:
                target.copy_(torch.mm(first, second).mul_(job.scale))


def _dense(job: MaterializeJob) -> torch.Tensor:
    """The job's window of its matrix in float32, (k, width); good until the next call."""
    stop = job.start + job.width
    if job.matrix.format not in FLOAT_DTYPES or job.matrix.format == "float32":
        return unpack(job.matrix, torch.float32, job.start, stop)
    values = job.matrix.parts["values"][:, job.start : stop]
    by_columns = values.stride(0) == 1
    values = values.T if by_columns else values
    dense = _SCRATCH.take(torch.float32, values.numel(), values.device).view(values.shape)
    dense.copy_(values)
    return dense.T if by_columns else dense


def _flip_codes(codes: torch.Tensor) -> torch.Tensor:
    """NF4 bytes [rows, bytes] with pairs of columns -> [columns, bytes] with pairs of rows."""
    nibbles = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)
    nibbles = F.pad(nibbles, (0, 0, 0, len(codes) % 2))
    return ((nibbles[0::2] << 4) | nibbles[1::2]).T.contiguous()


def _fold(scales: torch.Tensor, factor: float) -> tuple[torch.Tensor, float]:
    """Put a factor on the scales where that gives the same bits: the scales, and the factor left."""
    if factor == 1.0 or abs(math.frexp(factor)[0]) != 0.5:
        return scales, factor
    folded = scales * factor
    for tensor in (scales, folded):
        size = tensor.abs()
        if not ((size == 0) | ((size > _SMALLEST) & (size < _LARGEST))).all():
            return scales, factor
    return folded, 1.0


def _like(targets: list[torch.Tensor]) -> list[torch.Tensor]:
    """Float32 scratch of the targets' shapes."""
    sizes = [target.numel() for target in targets]
    flat = _SCRATCH.take(torch.float32, sum(sizes), targets[0].device)
    return [piece.view(target.shape) for piece, target in zip(flat.split(sizes), targets)]


class _Scratch(threading.local):
    """Buffers of one thread that grow and stay: fresh memory costs more than filling it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, dtype: torch.dtype, count: int, device: torch.device) -> torch.Tensor:
        """1-D memory of any content, good until the next call for the same dtype."""
        held = self._buffers.get((dtype, device))
        if held is None or len(held) < count:
            # Memory made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                held = torch.empty(count, dtype=dtype, device=device)
            self._buffers[dtype, device] = held
        return held[:count]


_SCRATCH = _Scratch()
