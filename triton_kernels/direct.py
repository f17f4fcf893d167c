"""Direct: add a batch's LoRA updates to a layer's output, without slots of A and B.

For a token t that uses slot s, and for each slice i of the layer (q, k and v of ``qkv_proj``, say),
which owns the columns ``offset_i : offset_i + width_i`` of y:

    y_i[t] += U_i^T C[s, i] V_i x[t]                          where the slot's task is joint in i
    y_i[t] += scale[s, i] * B[s, i] A[s, i] x[t]              where it is private in i

with V_i (k_in x d_in) and U_i (k_out x width_i) shared by all tasks and held once, C a task's core,
and A, B its own packed factors, read where they lie: no copy and no padding, each at its own rank.

This file holds the operation's definition: its tensors, their checks, the reference and the dispatch.
``direct_torch`` runs it by runs of equal slots on CPU; ``direct_kernel`` has the Triton kernels.

Rounding points: z = V x, w = C z (in factor form also A_c z) and h = scale * A x are accumulated in
float32 and rounded once to the dtype of x; dequantised values are rounded to the dtype of x; what is
added to y is accumulated in float32, and y is rounded once a term.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from vllm_vlora.narrow_rows import NARROW_FORMAT, NarrowMatrix
from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, unpack
from vllm_vlora.triton_kernels.codebook import CODEBOOK

# One int64 record a slot and slice; zeros mean "no update". Kernels read these fields by number.
CORE = 0  # address of the core
CORE_RANK = 1  # 0: dense (k_out, k_in); r: r rows of A_c (k_in) followed by B_c (k_out)
RANK = 2  # of the private factors; 0: none
SCALE = 3  # of the private factors: the bits of a float32
FORMAT = 4  # of the private factors, a number of FORMAT_CODES
A_CODES, A_SCALES, A_RANGES = 5, 6, 7  # addresses of the parts of A (r, d_in)
B_CODES, B_SCALES, B_RANGES = 8, 9, 10  # and of B transposed (r, d_out)
ADDRESS_FIELDS = (CORE, A_CODES, A_SCALES, A_RANGES, B_CODES, B_SCALES, B_RANGES)
BITS = 11  # of narrow factors: ``NarrowMatrix.word`` of A, and in 8 bits more B's first block
RECORD_FIELDS = 12
FORMAT_CODES = {"float": 0, "int8": 1, "nf4": 2, "nf4-dq": 3, NARROW_FORMAT: 4, "trellis": 5}
RECORD_NBYTES = RECORD_FIELDS * 8
TILE_SIZES = (16, 64)
# Elements between the starts of two cores: their addresses are multiples of 16 bytes.
CORE_ALIGNMENT = 8


@dataclass(frozen=True)
class SliceTask:
    """What one task adds to one slice: a core on the shared basis, or private factors.

    Attributes:
        core: in the dtype of x, contiguous: ``[k_out, k_in]`` when ``core_rank`` is 0, else
            ``[core_rank, k_in + k_out]``, whose row j is row j of A_c and then row j of B_c, with
            C = B_c^T A_c.
        core_rank: 0 for a dense core.
        a, b: packed A ``(r, start_in + d_in)`` and B transposed ``(r, start_out + width)``, see
            :class:`DirectSlice`, in one format; a float format is the dtype of x.
        scale: of the private factors.
    """

    core: torch.Tensor | None = None
    core_rank: int = 0
    a: PackedMatrix | None = None
    b: PackedMatrix | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class DirectSlice:
    """One slice of a layer on this tensor-parallel rank.

    Attributes:
        width: its columns of y.
        start_in, start_out: the columns of the held A and of B transposed that this rank's x and y
            begin with. What is held ends where they end: ``start_in + d_in`` columns of A,
            ``start_out + width`` of B transposed; the rows' distance follows from that.
        u: U ``(k_out, width)``, or None without a shared basis.
        k_in: rows of V that belong to it; 0 without a shared basis.
    """

    width: int
    start_in: int
    start_out: int
    u: PackedMatrix | None
    k_in: int

    @property
    def k_out(self) -> int:
        """Rows of U."""
        return 0 if self.u is None else self.u.rows


@dataclass(frozen=True, eq=False)
class DirectLayer:
    """A linear layer that takes direct tasks.

    Attributes:
        index: number of its first slice in the records.
        d_in: columns of x.
        slices: in the order of y's columns, which they fill without gaps.
        v: the slices' V stacked, ``(sum of k_in, d_in)``; None when no slice has a basis.
        max_rank: the largest rank of a private task here; the kernels read no rows beyond it.
        formats: kinds of packed factors that a private task may have here, keys of ``FORMAT_CODES``:
            the kernels know no others.
    """

    index: int
    d_in: int
    slices: tuple[DirectSlice, ...]
    v: PackedMatrix | None
    max_rank: int
    formats: tuple[str, ...] = tuple(FORMAT_CODES)

    @property
    def private(self) -> bool:
        """Whether any task may be private here; otherwise that pass is left out."""
        return self.max_rank > 0

    @property
    def width(self) -> int:
        """Columns of y."""
        return sum(s.width for s in self.slices)


@dataclass(frozen=True)
class DirectTask:
    """A task for the slot table: its slices by number, and its records ``[slices, fields]`` int64."""

    slices: Mapping[int, SliceTask]
    records: torch.Tensor


def make_task(slices: Mapping[int, SliceTask], count: int, device: torch.device) -> DirectTask:
    """Describe a task to the kernels: one row of addresses and numbers a slice.

    Args:
        slices: slice number -> the task's update; the tensors must live as long as the task.
        count: slices of all layers.
        device: of the slot table.
    """
    rows = np.zeros((count, RECORD_FIELDS), dtype=np.int64)
    for number, part in slices.items():
        rows[number] = _record(part)
    return DirectTask(dict(slices), torch.from_numpy(rows).to(device))


def _record(part: SliceTask) -> list[int]:
    record = [0] * RECORD_FIELDS
    if part.core is not None:
        record[CORE], record[CORE_RANK] = _address(part.core), part.core_rank
    if part.a is not None and part.b is not None and part.a.rows:
        assert part.a.format == part.b.format
        assert part.a.rows == part.b.rows
        record[RANK] = part.a.rows
        record[SCALE] = struct.unpack("<i", struct.pack("<f", part.scale))[0]
        kind = "float" if part.a.format in FLOAT_DTYPES else part.a.format
        record[FORMAT] = FORMAT_CODES[kind]
        record[A_CODES : A_RANGES + 1] = _addresses(part.a)
        record[B_CODES : B_RANGES + 1] = _addresses(part.b)
        record[BITS] = _bits(part.a, part.b)
    return record


def _bits(a: PackedMatrix, b: PackedMatrix) -> int:
    if not (isinstance(a, NarrowMatrix) and isinstance(b, NarrowMatrix)):
        return 0
    assert a.bits == b.bits
    return a.word | b.first_block << 40


def _addresses(matrix: PackedMatrix) -> list[int]:
    names = [("values", "codes"), ("scales", "scale_codes"), ("scale_range", "widths")]
    return [
        next((_address(matrix.parts[name]) for name in group if name in matrix.parts), 0)
        for group in names
    ]


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor lies; on a GPU the kernels read 16 bytes at a time."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu" or tensor.data_ptr() % 16 == 0
    return tensor.data_ptr()


class SlotTable:
    """The tasks in the slots. Slot ``slots`` is the one of tokens without a direct task.

    Attributes:
        slots: how many tasks one batch may hold.
        records: ``[slots + 1, slices, RECORD_FIELDS]`` int64 on the device, at a fixed address, so that
            a captured graph sees what the slots hold now.
        tasks: the task in each slot, for the host; None where there is none.
        codebook: what codes are looked up in, on the device.
    """

    def __init__(self, slots: int, slices: int, device: torch.device) -> None:
        self.slots = slots
        self.records = torch.zeros(
            (slots + 1, slices, RECORD_FIELDS), dtype=torch.int64, device=device
        )
        self.tasks: list[DirectTask | None] = [None] * (slots + 1)
        self.codebook = torch.tensor(CODEBOOK, dtype=torch.float32, device=device)

    def release(self, slot: int) -> None:
        """Let go of a slot's task. Its record stays on the device, which no token refers to any more.

        Nothing is written: the device's memory may be away, as while an engine sleeps.
        """
        self.tasks[slot] = None

    def set(self, slot: int, task: DirectTask) -> None:
        """Put a task into a slot: one copy of its records, on the current stream."""
        assert 0 <= slot < self.slots
        self.records[slot].copy_(task.records, non_blocking=True)
        self.tasks[slot] = task

    def part(self, slot: int, number: int) -> SliceTask | None:
        """What a slot's task adds to a slice; None for nothing."""
        task = self.tasks[slot]
        return None if task is None else task.slices.get(number)


def routing_nbytes(tokens: int, slots: int) -> int:
    """Bytes on the device of a :class:`Routing` of so many tokens and slots."""
    return 4 * sum(_routing_words(tokens, slots))


def _routing_words(tokens: int, slots: int) -> list[int]:
    """A slot and a place a token, and three words a tile of each size."""
    return [tokens] * 2 + [3 * _most_tiles(tokens, slots, size) for size in TILE_SIZES]


def _most_tiles(tokens: int, slots: int, size: int) -> int:
    return min(tokens, slots + tokens // size)


@dataclass
class Routing:
    """Which slot each token of the batch uses, in buffers of fixed addresses.

    Attributes:
        max_tokens: the longest batch.
        slots: slots of the table; the number ``slots`` stands for "no direct task".
        token_slots: int32 ``[max_tokens]``; beyond the batch ``slots``.
        order: int32 ``[max_tokens]``, token numbers grouped by slot, those without one left out.
        tiles: tile size -> int32 ``[max_tiles(max_tokens), 3]``: (slot, first place in ``order``,
            count) of up to that many tokens of one slot; count is 0 beyond the batch's tiles.
        routed, live_tiles: tokens of the last batch that have a direct task, and its tiles by size.
        derived: what a host path keeps until the next update.
    """

    max_tokens: int
    slots: int
    device: torch.device
    derived: dict[object, object] = field(default_factory=dict)
    routed: int = 0
    live_tiles: dict[int, int] = field(default_factory=lambda: dict.fromkeys(TILE_SIZES, 0))

    def __post_init__(self) -> None:
        counts = _routing_words(self.max_tokens, self.slots)
        self._buffer = torch.zeros(sum(counts), dtype=torch.int32, device=self.device)
        self.token_slots, self.order, *tiles = self._buffer.split(counts)
        self.tiles = {size: t.view(-1, 3) for size, t in zip(TILE_SIZES, tiles)}
        self.token_slots.fill_(self.slots)
        self._batch = np.zeros(0, dtype=np.int32)
        self._runs: list[tuple[int, int, int]] | None = []

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(first token, end, slot) of neighbours with one slot, in token order; for a host path alone."""
        if self._runs is None:
            self._runs = self._find_runs(self._batch)
        return self._runs

    @property
    def tokens(self) -> int:
        """Tokens of the last batch."""
        return len(self._batch)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._buffer.nbytes

    def max_tiles(self, tokens: int, size: int) -> int:
        """The most tiles that a batch of ``tokens`` tokens can have."""
        return _most_tiles(tokens, self.slots, size)

    def update(self, token_slots: np.ndarray) -> None:
        """Take a new batch: the slot of each of its tokens; one copy to the device.

        Raises:
            ValueError: more than ``max_tokens`` tokens, or a slot that does not exist.
        """
        count = len(token_slots)
        if count > self.max_tokens:
            raise ValueError(f"direct: {count} tokens, the routing has room for {self.max_tokens}")
        if count and not 0 <= token_slots.min() <= token_slots.max() <= self.slots:
            raise ValueError(f"direct: slots must be 0 to {self.slots}")
        self.derived.clear()
        self._batch, self._runs = token_slots.copy(), None
        host = torch.zeros(
            len(self._buffer), dtype=torch.int32, pin_memory=self._buffer.is_cuda
        )  # A new one each time: the copy of the last one may still be under way.
        flat = host.numpy()
        flat[: self.max_tokens] = self.slots
        flat[:count] = token_slots
        order = np.argsort(token_slots, kind="stable")
        order = order[: count - int((token_slots == self.slots).sum())]
        self.routed = len(order)
        flat[self.max_tokens : self.max_tokens + len(order)] = order
        end = 2 * self.max_tokens
        groups = _find_groups(token_slots[order])
        for size, tiles in self.tiles.items():
            rows = _cut_tiles(groups, size)
            flat[end : end + rows.size] = rows.reshape(-1)
            self.live_tiles[size] = len(rows)
            end += tiles.numel()
        self._buffer.copy_(host, non_blocking=True)

    def _find_runs(self, token_slots: np.ndarray) -> list[tuple[int, int, int]]:
        edges = np.flatnonzero(np.diff(token_slots)) + 1
        starts = [0, *edges.tolist()] if len(token_slots) else []
        ends = [*edges.tolist(), len(token_slots)]
        return [
            (start, end, slot)
            for start, end in zip(starts, ends)
            if (slot := int(token_slots[start])) != self.slots
        ]


class _Groups(NamedTuple):
    """Places with equal slots in an order: the slot, first place and length of each."""

    slots: np.ndarray
    first: np.ndarray
    counts: np.ndarray


def _find_groups(grouped: np.ndarray) -> _Groups:
    """The groups of slots of which equal ones stand together."""
    first = np.flatnonzero(np.diff(grouped, prepend=-1))
    return _Groups(grouped[first], first, np.diff(first, append=len(grouped)))


def _cut_tiles(groups: _Groups, size: int) -> np.ndarray:
    """Rows (slot, first place, count) that cut each group into tiles."""
    tiles = -(-groups.counts // size)
    group = np.repeat(np.arange(len(tiles)), tiles)
    within = np.arange(len(group)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    starts = groups.first[group] + within * size
    left = np.minimum(size, groups.counts[group] - within * size)
    return np.stack([groups.slots[group], starts, left], axis=1).astype(np.int32)


def add_direct(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> None:
    """Add every direct task's update to y in place: Triton on a GPU, torch by runs on CPU.

    On a GPU the host does not wait, so that the launches can be captured; the batch may be padded:
    tokens beyond ``routing``'s last batch are left as they are. What the last batch does not need is
    not launched; a captured graph, which is replayed for others, has all launches.

    Args:
        y: ``[T, layer.width]`` output of the base layer, rows contiguous.
        x: ``[T, layer.d_in]``, rows contiguous, of the dtype of y and of the cores.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit together.
    """
    _check(y, x, layer, table, routing)
    if x.shape[0] == 0:
        return
    if x.is_cuda:
        from vllm_vlora.triton_kernels.direct_kernel import launch_direct

        launch_direct(y, x, layer, table, routing)
    else:
        from vllm_vlora.triton_kernels.direct_torch import add_by_runs

        add_by_runs(y, x, layer, table, routing)


def begin_direct(
    x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> Callable[[torch.Tensor], None]:
    """On a GPU, enqueue on the current stream what needs x alone, while y is still being computed.

    Returns:
        Called with y, on a stream that waits for this one, it enqueues the rest of ``add_direct``.

    Raises:
        ValueError: as :func:`add_direct`; x is not on a GPU.
    """
    if not x.is_cuda:
        raise ValueError("direct: an addition is begun ahead of y on a GPU only")
    from vllm_vlora.triton_kernels.direct_kernel import begin_direct as begin

    return begin(x, layer, table, routing, ahead=True)


def warm_up_batches(max_tokens: int) -> list[tuple[int, int]]:
    """(tokens, how many of them have a task) of batches that need every kernel there is among them.

    The kernels depend on the number of tokens by a few classes only, see ``device.choose_tiles``.
    """
    wanted = [(16, 1), (32, 1), (64, 1), (512, 1), (512, 512), (1025, 1)]
    return sorted({(min(n, max_tokens), min(routed, max_tokens)) for n, routed in wanted})


@torch.no_grad()
def warm_up(
    layers: Iterable[DirectLayer],
    table: SlotTable,
    routing: Routing,
    dtype: torch.dtype,
    ahead: bool = False,
) -> None:
    """Compile and load every kernel that a batch of up to ``routing.max_tokens`` can need.

    ``ahead``: also those of ``begin_direct``.

    To be called once the layers are made and before anything is captured, with nothing routed: an
    engine that compiles while it serves answers nobody for a second. It leaves nothing routed.
    """
    if not table.records.is_cuda:
        return
    layers = list(layers)
    for tokens, routed in warm_up_batches(routing.max_tokens):
        routing.update(np.zeros(routed, dtype=np.int32))
        for layer in layers:
            x = torch.zeros(tokens, layer.d_in, dtype=dtype, device=table.records.device)
            y = x.new_zeros(tokens, layer.width)
            add_direct(y, x, layer, table, routing)
            if ahead:
                begin_direct(x, layer, table, routing)(y)
    routing.update(np.zeros(0, dtype=np.int32))


def add_direct_triton(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> None:
    """The operation by the Triton kernels, on any device that Triton (or its interpreter) runs on.

    Raises:
        ValueError: as :func:`add_direct`.
        ImportError: Triton is not installed.
    """
    from vllm_vlora.triton_kernels.direct_kernel import launch_direct

    _check(y, x, layer, table, routing)
    launch_direct(y, x, layer, table, routing)


@torch.no_grad()
def add_direct_reference(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> None:
    """The definition of the operation, token by token, with its rounding points, on any device.

    The kernels do not round the numbers of packed private factors where a tile has one token.

    Raises:
        ValueError: as :func:`add_direct`.
    """
    _check(y, x, layer, table, routing)
    v = None if layer.v is None else _rounded(layer.v, x.dtype)
    for token, slot in enumerate(routing.token_slots[: x.shape[0]].tolist()):
        column = basis = 0
        for place, part in enumerate(layer.slices):
            row, task = (
                y[token, column : column + part.width],
                table.part(slot, layer.index + place),
            )
            if task is not None and task.core is not None:
                assert v is not None
                assert part.u is not None
                z = (v[basis : basis + part.k_in] @ x[token].float()).to(x.dtype)
                w = _apply_core(task, z, part.k_in)
                row.copy_(row.float() + w.float() @ _rounded(part.u, x.dtype))
            if task is not None and task.a is not None and task.b is not None:
                stop_in, stop_out = part.start_in + layer.d_in, part.start_out + part.width
                a = _rounded(task.a, x.dtype, part.start_in, stop_in)
                h = (task.scale * (a @ x[token].float())).to(x.dtype)
                b = _rounded(task.b, x.dtype, part.start_out, stop_out)
                row.copy_(row.float() + h.float() @ b)
            column += part.width
            basis += part.k_in


def _apply_core(task: SliceTask, z: torch.Tensor, k_in: int) -> torch.Tensor:
    assert task.core is not None
    core = task.core.float()
    if not task.core_rank:
        return (core @ z.float()).to(z.dtype)
    inner = (core[:, :k_in] @ z.float()).to(z.dtype)
    return (inner.float() @ core[:, k_in:]).to(z.dtype)


def _rounded(
    matrix: PackedMatrix, dtype: torch.dtype, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Dequantised columns as float32 numbers that the dtype can hold."""
    return unpack(matrix, dtype, start, stop).float()


def _check(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> None:
    if x.dim() != 2 or x.shape[1] != layer.d_in:
        raise ValueError(f"direct: x must be [T, {layer.d_in}], got {list(x.shape)}")
    if y.dim() != 2 or tuple(y.shape) != (x.shape[0], layer.width):
        raise ValueError(f"direct: y must be [{x.shape[0]}, {layer.width}], got {list(y.shape)}")
    if x.dtype not in FLOAT_DTYPES.values() or y.dtype != x.dtype:
        raise ValueError(f"direct: x and y must have one float dtype, got {x.dtype} and {y.dtype}")
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("direct: the rows of x and of y must be contiguous")
    if y.device != x.device or table.records.device != x.device or routing.order.device != x.device:
        raise ValueError(f"direct: x is on {x.device}, y, the slots or the routing elsewhere")
    if x.shape[0] > routing.max_tokens:
        raise ValueError(
            f"direct: {x.shape[0]} tokens, the routing has room for {routing.max_tokens}"
        )
    if x.shape[0] < routing.tokens:
        # The kernels would read and write rows that are not there.
        raise ValueError(
            f"direct: x has {x.shape[0]} rows of a batch of {routing.tokens} tokens: the model runs this "
            "layer on a part of the batch"
        )
    if table.slots != routing.slots:
        raise ValueError(f"direct: {table.slots} slots, the routing has {routing.slots}")
