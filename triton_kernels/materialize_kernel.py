"""The Triton kernel of ``materialize`` and its plan; needs Triton to import.

One launch runs any number of jobs. Its grid counts the tiles of all of them; a table in device memory
says which job a tile belongs to, and another has one row of integers a job: addresses, strides,
sizes. What the compiler must know (formats, dtypes, tile sizes, which way ``out`` lies) is the same
for all jobs of a launch, so a call takes one launch for each such kind among its jobs: two for a task
whose modules are all stored alike, one for the As and one for the transposed Bs.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from vllm_vlora.narrow_rows import NARROW_FORMAT, NarrowMatrix
from vllm_vlora.quantize import FLOAT_DTYPES
from vllm_vlora.triton_kernels.codebook import CODEBOOK
from vllm_vlora.triton_kernels.dequantise import load_block
from vllm_vlora.triton_kernels.device import aligned_pointer, low_precision, multiply, on_amd
from vllm_vlora.triton_kernels.materialize import (
    MaterializeJob,
    OutTable,
    check_outs,
    to_device,
)

# The columns of a job's row, all int64.
FIELDS = (
    "place", "first_tile", "n_rows", "n_cols", "rank", "k", "start", "width", "scale",
    "out_stride_row", "out_stride_col", "left", "left_stride", "codes", "codes_stride",
    "scales", "scales_stride", "ranges", "ranges_stride", "bits",
)  # fmt: skip
_COLUMNS = tl.constexpr(len(FIELDS))
_PLACE = tl.constexpr(FIELDS.index("place"))
_FIRST_TILE = tl.constexpr(FIELDS.index("first_tile"))
_N_ROWS = tl.constexpr(FIELDS.index("n_rows"))
_N_COLS = tl.constexpr(FIELDS.index("n_cols"))
_RANK = tl.constexpr(FIELDS.index("rank"))
_K = tl.constexpr(FIELDS.index("k"))
_START = tl.constexpr(FIELDS.index("start"))
_WIDTH = tl.constexpr(FIELDS.index("width"))
_SCALE = tl.constexpr(FIELDS.index("scale"))
_OUT_STRIDE_ROW = tl.constexpr(FIELDS.index("out_stride_row"))
_OUT_STRIDE_COL = tl.constexpr(FIELDS.index("out_stride_col"))
_LEFT = tl.constexpr(FIELDS.index("left"))
_LEFT_STRIDE = tl.constexpr(FIELDS.index("left_stride"))
_CODES = tl.constexpr(FIELDS.index("codes"))
_CODES_STRIDE = tl.constexpr(FIELDS.index("codes_stride"))
_SCALES = tl.constexpr(FIELDS.index("scales"))
_SCALES_STRIDE = tl.constexpr(FIELDS.index("scales_stride"))
_RANGES = tl.constexpr(FIELDS.index("ranges"))
_RANGES_STRIDE = tl.constexpr(FIELDS.index("ranges_stride"))
_BITS = tl.constexpr(FIELDS.index("bits"))
_NARROW = tl.constexpr(NARROW_FORMAT)

# Elements: 16 bytes of a 16-bit slot, the widest store. Ranks that vLLM offers are multiples of it.
ALIGNMENT = 8
_ALIGNMENT = tl.constexpr(ALIGNMENT)


@triton.jit
def _integer(row, field, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A size or stride of a job; ``ALIGNED`` promises a multiple of ``ALIGNMENT``."""
    value = tl.load(row + field)
    if ALIGNED:
        value = tl.multiple_of(value, _ALIGNMENT)
    return value


@triton.jit
def _materialize_kernel(  # type: ignore[no-untyped-def]
    jobs_ptr,
    outs_ptr,
    tiles_ptr,
    book_ptr,
    OUT: tl.constexpr,
    LEFT: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    FORMAT: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    TF32: tl.constexpr,
    ORDER: tl.constexpr,
    ALIGNED_IN: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One ``BLOCK_M x BLOCK_N`` tile of one job; grid (tiles of all jobs).

    jobs_ptr: int64 ``[jobs, len(FIELDS)]``; outs_ptr: int64 addresses, read at a job's place;
    tiles_ptr: int32 ``[tiles]``, each tile's job; book_ptr: ``CODEBOOK``, or None. A job's tiles follow
    each other, column blocks fastest. LEFT is None for the identity.
    """
    tile = tl.program_id(0)
    row = jobs_ptr + tl.load(tiles_ptr + tile).to(tl.int64) * _COLUMNS
    # int32 where values are small: indices made of int64 would take twice the registers.
    n_rows = _integer(row, _N_ROWS, ALIGNED_OUT and ORDER == "columns").to(tl.int32)
    n_cols = _integer(row, _N_COLS, ALIGNED_OUT and ORDER == "rows").to(tl.int32)
    rank = tl.load(row + _RANK).to(tl.int32)
    k = tl.load(row + _K).to(tl.int32)
    start = _integer(row, _START, ALIGNED_IN).to(tl.int32)
    width = _integer(row, _WIDTH, ALIGNED_IN).to(tl.int32)
    scale = tl.load(row + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    codes_address = tl.load(row + _CODES)
    first_block = 0
    bits = tl.full((), 0, tl.int64)
    if FORMAT == _NARROW:
        bits = tl.load(row + _BITS)
        first_block = ((bits >> 32) & 255).to(tl.int32)
    addresses = (codes_address, codes_address, codes_address, bits, k, first_block)
    where = (
        aligned_pointer(codes_address, CODES, ALIGNED_IN),
        aligned_pointer(tl.load(row + _SCALES), SCALES, False),
        aligned_pointer(tl.load(row + _RANGES), tl.float32, False),
        _integer(row, _CODES_STRIDE, ALIGNED_IN).to(tl.int32),
        tl.load(row + _SCALES_STRIDE).to(tl.int32),
        tl.load(row + _RANGES_STRIDE).to(tl.int32),
    )

    tile -= tl.load(row + _FIRST_TILE).to(tl.int32)
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    first_row = tile // col_blocks * BLOCK_M
    first_col = tile % col_blocks * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    row_live = rows < rank
    col_live = cols < width
    if LEFT is None:
        value = load_block(
            where, addresses, book_ptr, first_row, rank, start + first_col, width - first_col,
            FORMAT, tl.float32, ALIGNED_IN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        left_ptr = aligned_pointer(tl.load(row + _LEFT), LEFT, False)
        left_stride = tl.load(row + _LEFT_STRIDE)
        # Products of 16-bit floats take them as they are.
        RIGHT: tl.constexpr = CODES if LOW_PRECISION else tl.float32
        value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Tiles that are all remainder read nothing.
        live = (first_row < rank) & (first_col < width)
        for k0 in range(0, tl.where(live, k, 0), BLOCK_K):
            ks = k0 + tl.arange(0, BLOCK_K)
            k_live = ks < k
            left = tl.load(
                left_ptr + rows.to(tl.int64)[:, None] * left_stride + ks[None, :],
                mask=row_live[:, None] & k_live[None, :],
                other=0.0,
            )
            right = load_block(
                where, addresses, book_ptr, k0, k, start + first_col, width - first_col,
                FORMAT, RIGHT, ALIGNED_IN, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            value = multiply(left, right, value, LOW_PRECISION, TF32)
    inside = row_live[:, None] & col_live[None, :]
    value = tl.where(inside, value * scale, 0.0)

    out_ptr = aligned_pointer(tl.load(outs_ptr + tl.load(row + _PLACE)), OUT, ALIGNED_OUT)
    rows_out = rows.to(tl.int64)[:, None]
    cols_out = cols.to(tl.int64)[None, :]
    if ORDER == "rows":
        offsets = rows_out * _integer(row, _OUT_STRIDE_ROW, ALIGNED_OUT) + cols_out
    elif ORDER == "columns":
        offsets = rows_out + cols_out * _integer(row, _OUT_STRIDE_COL, ALIGNED_OUT)
    else:
        offsets = rows_out * tl.load(row + _OUT_STRIDE_ROW)
        offsets += cols_out * tl.load(row + _OUT_STRIDE_COL)
    tl.store(
        out_ptr + offsets,
        value.to(out_ptr.dtype.element_ty),
        mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :],
    )


_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


class KernelPlan:
    """Jobs that passed their checks as tables in device memory and launches over them.

    Attributes:
        launches: what one run launches.

    Raises:
        ValueError: a part of a packed matrix is not contiguous along its rows.
    """

    def __init__(self, jobs: Sequence[MaterializeJob]) -> None:
        self._jobs = tuple(jobs)
        self._own = OutTable([job.out for job in jobs])
        # Tables that passed their checks, and whether each is as aligned as the jobs' own tensors.
        self._fitting: WeakKeyDictionary[OutTable, bool] = WeakKeyDictionary()
        # Kept, since the tables hold addresses only.
        self._reads = [_read(job) for job in jobs]
        groups = _by_kind(self._jobs, self._reads)
        # The plan's own: what one of an engine that sleeps had put on the device is not there.
        book = None
        if any(map(_has_codes, groups)):
            book = to_device(CODEBOOK, torch.float32, jobs[0].out.device)
        self.launches = [
            _make_launch(
                kind,
                [(place, self._jobs[place], self._reads[place]) for place in places],
                book if _has_codes(kind) else None,
            )
            for kind, places in groups.items()
        ]

    def warm_up(self) -> None:
        """See :class:`vllm_vlora.triton_kernels.materialize.MaterializePlan`."""
        for launch in self.launches:
            # Without a grid nothing is launched.
            self._launch(launch, self._own.pointers, {}, None)

    def run(self, outs: OutTable | None = None) -> None:
        """See :class:`vllm_vlora.triton_kernels.materialize.MaterializePlan`."""
        if not self.launches:
            return
        outs = self._own if outs is None else outs
        if outs not in self._fitting:
            check_outs(self._jobs, outs)
            self._fitting[outs] = _is_as_aligned(outs, self._own)
        weaker = {} if self._fitting[outs] else {"ALIGNED_OUT": False}
        pointers = outs.pointers
        for launch in self.launches:
            self._launch(launch, pointers, weaker, (len(launch.tiles),))

    @staticmethod
    def _launch(
        launch: Launch, pointers: torch.Tensor, constants: dict[str, Any], grid: tuple[int] | None
    ) -> None:
        arguments = (launch.jobs, pointers, launch.tiles, launch.book)
        constants = launch.constants | constants
        on_device = torch.cuda.device(pointers.device) if pointers.is_cuda else None
        with on_device or contextlib.nullcontext():
            if grid is None:
                _materialize_kernel.warmup(*arguments, grid=(1,), **constants)
            else:
                _materialize_kernel[grid](*arguments, **constants)


@dataclass(frozen=True)
class _Read:
    """What a job reads, as the kernel takes it; ``codes`` of a narrow matrix are its low plane."""

    left: torch.Tensor | None
    codes: torch.Tensor
    scales: torch.Tensor | None
    ranges: torch.Tensor | None
    bits: int


@dataclass(frozen=True)
class Kind:
    """What sets jobs of different launches apart.

    Attributes:
        out: dtype of out.
        order: "rows" or "columns", in which out is contiguous, or "any".
        left: dtype of left; None for the identity.
        format: of the matrix; "float" for all three float formats.
        codes, scales: dtypes of these parts; any where the format has no scales.
    """

    out: torch.dtype
    order: str
    left: torch.dtype | None
    format: str
    codes: torch.dtype
    scales: torch.dtype


@dataclass(frozen=True)
class Launch:
    """One launch: its jobs' rows and its tiles' jobs on the device, and the compile-time arguments.

    ``book`` is what codes are looked up in, None of formats that have none.
    """

    jobs: torch.Tensor
    tiles: torch.Tensor
    book: torch.Tensor | None
    constants: dict[str, Any]


def _read(job: MaterializeJob) -> _Read:
    parts, left = job.matrix.parts, job.left
    for name, part in parts.items():
        if part.shape[-1] > 1 and part.stride(-1) != 1:
            raise ValueError(
                f"materialize: part {name!r} of the matrix must be contiguous along its rows, its "
                f"strides are {list(part.stride())}: call .contiguous() on it first"
            )
    if left is not None and left.shape[1] > 1 and left.stride(1) != 1:
        left = left.contiguous()
    ranges = parts.get("scale_range", parts.get("widths"))
    codes, bits = parts["values"] if "values" in parts else parts["codes"], 0
    if isinstance(job.matrix, NarrowMatrix):
        codes, bits = job.matrix.planes()[0], job.matrix.word
    return _Read(
        left,
        codes,
        parts["scale_codes"] if "scale_codes" in parts else parts.get("scales"),
        None if ranges is None else ranges.contiguous(),
        bits,
    )


def _is_as_aligned(outs: OutTable, planned: OutTable) -> bool:
    pairs = zip(outs.outs, planned.outs)
    return all(out.data_ptr() % 16 == 0 or own.data_ptr() % 16 != 0 for out, own in pairs)


def _by_kind(jobs: Sequence[MaterializeJob], reads: Sequence[_Read]) -> dict[Kind, list[int]]:
    """The places of the jobs of each launch; jobs that read nothing join another launch if they can."""
    groups: dict[Kind, list[int]] = {}
    idle = []
    for place, (job, read) in enumerate(zip(jobs, reads)):
        if job.out.numel() == 0:
            continue
        if _is_idle(job):
            idle.append(place)
        else:
            groups.setdefault(_kind(job, read), []).append(place)
    for place in idle:
        own = _kind(jobs[place], reads[place])
        fits = (kind for kind in groups if (kind.out, kind.order) == (own.out, own.order))
        groups.setdefault(next(fits, own), []).append(place)
    return groups


def _is_idle(job: MaterializeJob) -> bool:
    return job.rank == 0 or job.width == 0 or job.matrix.rows == 0


def _kind(job: MaterializeJob, read: _Read) -> Kind:
    format = job.matrix.format
    return Kind(
        job.out.dtype,
        _order(job.out),
        None if read.left is None else read.left.dtype,
        "float" if format in FLOAT_DTYPES else format,
        read.codes.dtype,
        torch.float32 if read.scales is None else read.scales.dtype,
    )


def _order(out: torch.Tensor) -> str:
    if out.stride(1) == 1 or out.shape[1] == 1:
        return "rows"
    return "columns" if out.stride(0) == 1 or out.shape[0] == 1 else "any"


def _has_codes(kind: Kind) -> bool:
    return kind.format not in ("float", "int8")


def _make_launch(
    kind: Kind, jobs: Sequence[tuple[int, MaterializeJob, _Read]], book: torch.Tensor | None
) -> Launch:
    # One set of tile sizes for all: a rank below the greatest leaves rows of its tiles unused, which
    # costs less than another launch.
    rank = max(job.rank for _, job, _ in jobs) or max(job.out.shape[0] for _, job, _ in jobs)
    k = max(job.matrix.rows for _, job, _ in jobs)
    aligned_in = all(_is_aligned_in(job, read) for _, job, read in jobs)
    aligned_out = all(_is_aligned_out(job, kind.order) for _, job, _ in jobs)
    device = jobs[0][1].out.device
    tf32 = not on_amd(device)
    constants = kernel_constants(kind, rank, k, aligned_in, aligned_out, tf32)
    table: list[int] = []
    tiles: list[int] = []
    block_m, block_n = constants["BLOCK_M"], constants["BLOCK_N"]
    for index, (place, job, read) in enumerate(jobs):
        table += _row(place, len(tiles), job, read)
        n_rows, n_cols = job.out.shape
        tiles += [index] * (-(-n_rows // block_m) * -(-n_cols // block_n))
    return Launch(
        to_device(table, torch.int64, device),
        to_device(tiles, torch.int32, device),
        book,
        constants,
    )


def _is_aligned_in(job: MaterializeJob, read: _Read) -> bool:
    """Whether what ``ALIGNED_IN`` promises is true of this job."""
    sizes = (job.start, job.width, read.codes.stride(0))
    aligned = all(size % ALIGNMENT == 0 for size in sizes) and read.codes.data_ptr() % 16 == 0
    return aligned or _is_idle(job)


def _is_aligned_out(job: MaterializeJob, order: str) -> bool:
    """Whether what ``ALIGNED_OUT`` promises is true of this job."""
    if order == "any":
        return False
    along = 1 if order == "rows" else 0
    sizes = (job.out.shape[along], job.out.stride(1 - along))
    return all(size % ALIGNMENT == 0 for size in sizes) and job.out.data_ptr() % 16 == 0


def _row(place: int, first_tile: int, job: MaterializeJob, read: _Read) -> list[int]:
    n_rows, n_cols = job.out.shape
    (scale,) = struct.unpack("<i", struct.pack("<f", job.scale))
    sizes = [place, first_tile, n_rows, n_cols]
    # In another kind's launch nothing must be read.
    sizes += [0] * 4 if _is_idle(job) else [job.rank, job.matrix.rows, job.start, job.width]
    row = [*sizes, scale, *job.out.stride()]
    for tensor in (read.left, read.codes, read.scales, read.ranges):
        row += (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
    row.append(read.bits)
    assert len(row) == len(FIELDS)
    return row


def kernel_constants(
    kind: Kind, rank: int, k: int, aligned_in: bool, aligned_out: bool, tf32: bool
) -> dict[str, Any]:
    """The compile-time arguments for jobs of a kind up to a rank and k, and ``num_stages``.

    16-bit floats of one type go to the tensor cores as they are. So does every other product for an
    out of 16 bits, in TF32 where the device has that; else it is multiplied as float32.
    """
    same = kind.format == "float" and kind.left == kind.codes
    native = same and low_precision(kind.codes)
    tensor_cores = native or (tf32 and kind.out != torch.float32)
    if kind.left is None:
        # No sum over k: as few rows as there are, and columns enough for 4 warps.
        block_m, block_n = min(triton.next_power_of_2(max(rank, 1)), 16), 128
    else:
        block_m = min(triton.next_power_of_2(max(rank, 16)), 64 if tensor_cores else 32)
        block_n = 128 if block_m == 16 else 64
    # A float32 product runs on the FMA units with its operands in registers. With 64 rows of out,
    # 32 rows of the matrix, or loads kept in flight, the compiler spills some of them. A product in
    # TF32 has 32: of what was joined from bytes each thread holds 8 neighbours along k, and where there
    # are less than 4 times as many, Triton 3.6 and 3.7 multiply some twice and others never.
    block_k = 16
    if native:
        block_k = min(triton.next_power_of_2(max(k, 16)), 32)
    elif tensor_cores:
        block_k = 32
    return {
        "OUT": _TRITON_DTYPES[kind.out],
        "LEFT": None if kind.left is None else _TRITON_DTYPES[kind.left],
        "CODES": _TRITON_DTYPES[kind.codes],
        "SCALES": _TRITON_DTYPES[kind.scales],
        "FORMAT": kind.format,
        "LOW_PRECISION": native,
        "TF32": tensor_cores,
        "ORDER": kind.order,
        "ALIGNED_IN": aligned_in,
        "ALIGNED_OUT": aligned_out,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_stages": 2 if native else 1,
    }
