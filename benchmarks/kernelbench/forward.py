"""The forward pass of one linear layer: the base product, punica's update and the direct ones.

Every operation has several copies of its weights. In a model the weights of a layer have left the cache
when its turn comes again; here the copies take turns, and are so many that the same holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import floors
import torch
from streams import mixed_rows, random_trellis

from kernelbench.batches import SCALE, Batch
from kernelbench.punica import Punica
from vllm_vlora.narrow_rows import NARROW_FORMAT, narrow_matrix
from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, pack, pack_narrow, stack_rows, unpack
from vllm_vlora.triton_kernels.direct import (
    DirectLayer,
    DirectSlice,
    Routing,
    SliceTask,
    SlotTable,
    add_direct,
    add_direct_triton,
    make_task,
)

# Copies' bytes over those of the cache: with 1 a part of them would still be found there.
CACHE_MARGIN = 2
# Where the weights are tiny: more would take longer to make than to measure.
MOST_COPIES = 1024


@dataclass(frozen=True, eq=False)
class Operation:
    """One way to run a layer, or to add its tasks' updates.

    Attributes:
        op: a key of ``floors.FORWARD``.
        work: its parameters, for the floor.
        copies: of its weights.
        run: run a copy on the batch.
        expected: the float64 result of a copy, without what y held before.
        adds: whether it adds to y, or overwrites it.
    """

    op: str
    work: floors.Work
    copies: int
    run: Callable[[int], None]
    expected: Callable[[int], torch.Tensor]
    adds: bool = True

    @property
    def label(self) -> str:
        """Its name with what tells it from others of its kind."""
        details = {"direct-joint": f" k={self.work.k}", "direct-private": f" {self.work.format}"}
        return self.op + details.get(self.op, "")


def count_copies(op: str, layer: floors.Layer, work: floors.Work, cache: int) -> int:
    """How many copies of an operation's weights do not fit a cache of so many bytes; at least 2."""
    wanted = math.ceil(CACHE_MARGIN * cache / weight_nbytes(op, layer, work))
    return min(max(wanted, 2), MOST_COPIES)


def weight_nbytes(op: str, layer: floors.Layer, work: floors.Work) -> int:
    """The bytes of an operation's cost that do not grow with the tokens."""
    path = floors.FORWARD[op]
    here, next_ = path(layer, work), path(layer, replace(work, tokens=work.tokens + 1))
    return here.bytes - work.tokens * (next_.bytes - here.bytes)


# --- the base layer -------------------------------------------------------------------------------


def base_operation(batch: Batch, work: floors.Work, cache: int) -> Operation:
    """y = x W^T, as torch computes it."""
    layer, x, y = batch.layer, batch.x, batch.y
    copies = count_copies("base", layer, work, cache)
    weights = _random(x, copies, layer.d_out, layer.d_in, over=layer.d_in)

    def run(copy: int) -> None:
        torch.mm(x, weights[copy].t(), out=y)

    def expected(copy: int) -> torch.Tensor:
        return x.double() @ weights[copy].double().t()

    return Operation("base", work, copies, run, expected, adds=False)


# --- private factors ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factors:
    """LoRA factors in the dtype of x, of every copy, task and slice.

    Attributes:
        a: for each slice ``[copies, tasks, rank, d_in]``.
        b: for each slice ``[copies, tasks, rank, width]``, to be multiplied by ``SCALE``.
    """

    a: list[torch.Tensor]
    b: list[torch.Tensor]


def make_factors(batch: Batch, rank: int, copies: int) -> Factors:
    """Random factors whose updates are about ``SCALE`` large."""
    layer, tasks = batch.layer, batch.cell.tasks
    return Factors(
        [_random(batch.x, copies, tasks, rank, layer.d_in, over=layer.d_in) for _ in layer.widths],
        [_random(batch.x, copies, tasks, rank, width, over=rank) for width in layer.widths],
    )


def punica_operation(
    batch: Batch, work: floors.Work, factors: Factors, punica: Punica, cache: int
) -> Operation:
    """y += B A x by vLLM's kernels, as ``PunicaWrapperGPU.add_lora_linear`` calls them.

    The scale stands in B, where vLLM puts it when it loads an adapter.
    """
    layer, x, y = batch.layer, batch.x, batch.y
    copies = count_copies("punica", layer, work, cache)
    slots_a = [[a[copy].unsqueeze(1) for a in factors.a] for copy in range(copies)]
    b_slots = [(SCALE * b[:copies]).transpose(2, 3).contiguous() for b in factors.b]
    slots_b = [[b[copy].unsqueeze(1) for b in b_slots] for copy in range(copies)]
    meta = punica.meta.make(batch.slots, len(x), x.device)
    meta.prepare_tensors(torch.from_numpy(batch.token_tasks).to(x.device))
    arguments = meta.meta_args(len(x), False)

    def run(copy: int) -> None:
        shape = (len(layer.widths), len(x), work.slot_rank)
        between = torch.empty(shape, dtype=torch.float32, device=x.device)
        punica.shrink(x, slots_a[copy], between, *arguments, 1.0)
        punica.expand(between, slots_b[copy], y, *arguments, offset_start=0, add_inputs=True)

    def expected(copy: int) -> torch.Tensor:
        def factor(task: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
            return slots_a[copy][place][task, 0], slots_b[copy][place][task, 0].t()

        return _low_rank(batch, factor)

    return Operation("punica", work, copies, run, expected)


def private_operation(batch: Batch, work: floors.Work, factors: Factors, cache: int) -> Operation:
    """y += B A x by the direct path, from packed factors."""
    copies = count_copies("direct-private", batch.layer, work, cache)
    packed = [
        [_pack_factors(side[:copies].flatten(0, 1), work.format) for side in sides]
        for sides in (factors.a, factors.b)
    ]
    tasks = batch.cell.tasks

    def part(copy: int, task: int, place: int) -> SliceTask:
        a, b = (sides[place][copy * tasks + task] for sides in packed)
        return SliceTask(a=a, b=b, scale=SCALE)

    def expected(copy: int) -> torch.Tensor:
        def factor(task: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
            held = part(copy, task, place)
            assert held.a is not None
            assert held.b is not None
            return unpack(held.a, batch.x.dtype), SCALE * unpack(held.b, batch.x.dtype)

        return _low_rank(batch, factor)

    count = len(batch.layer.widths)
    slices = tuple(DirectSlice(width, 0, 0, None, 0) for width in batch.layer.widths)
    # As in an engine whose checkpoint has one format: no kernel has bodies that it does not need.
    formats = ("float" if work.format in FLOAT_DTYPES else work.format,)
    layers = [
        DirectLayer(copy * count, batch.layer.d_in, slices, None, work.rank, formats)
        for copy in range(copies)
    ]
    run = _direct_run(batch, layers, part)
    return Operation("direct-private", work, copies, run, expected)


def _pack_factors(factors: torch.Tensor, format: str) -> list[PackedMatrix]:
    """Each of the factors ``[n, rank, cols]``, its rows views of one large packed matrix; narrow ones lie
    by themselves. Of narrow and trellis rows so many have 4, 3 and 2 bits as ``mixed_rows`` says."""
    count, rank, _ = factors.shape
    bits = mixed_rows(rank)
    if format != NARROW_FORMAT:
        flat = factors.flatten(0, 1)
        whole = random_trellis(flat, bits) if format == "trellis" else pack(flat, format)
        return [whole.row_slice(n * rank, (n + 1) * rank) for n in range(count)]
    four, three, two = (rows.flatten(0, 1) for rows in factors.split(list(bits), dim=1))
    groups = (pack(four, "nf4-dq"), pack_narrow(three, 3), pack_narrow(two, 2))
    return [
        narrow_matrix(
            stack_rows([g.row_slice(n * b, (n + 1) * b) for g, b in zip(groups, bits)]), bits
        )
        for n in range(count)
    ]


def _low_rank(
    batch: Batch, factor: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """sum of B A x in float64; ``factor(task, place)`` is (A, B transposed)."""
    x = batch.x.double()
    out = x.new_empty(len(x), batch.layer.d_out)
    for task, rows in enumerate(batch.rows):
        parts = []
        for place in range(len(batch.layer.widths)):
            a, b = factor(task, place)
            parts.append((x[rows] @ a.double().t()) @ b.double())
        out[rows] = torch.cat(parts, dim=1)
    return out


# --- shared bases ---------------------------------------------------------------------------------


def joint_operation(batch: Batch, work: floors.Work, cache: int) -> Operation:
    """y += U C V x by the direct path; a core is dense or a factor pair, whichever is smaller."""
    layer, x, k, tasks = batch.layer, batch.x, work.k, batch.cell.tasks
    copies, count = count_copies("direct-joint", layer, work, cache), len(layer.widths)
    core_rank = 0 if k * k <= 2 * work.rank * k else work.rank
    core_shape = (k, k) if core_rank == 0 else (core_rank, 2 * k)
    v = _random(x, copies, count * k, layer.d_in, over=layer.d_in)
    u = [_random(x, copies, k, width, over=k / SCALE**2) for width in layer.widths]
    # The factors' own variance makes up for the sum over the core's rank.
    over = k if core_rank == 0 else math.sqrt(k * core_rank)
    cores = _random(x, copies, tasks, count, *core_shape, over=over)

    def part(copy: int, task: int, place: int) -> SliceTask:
        return SliceTask(core=cores[copy, task, place], core_rank=core_rank)

    def expected(copy: int) -> torch.Tensor:
        z = x.double() @ v[copy].double().t()
        out = z.new_empty(len(x), layer.d_out)
        for task, rows in enumerate(batch.rows):
            parts = []
            for place in range(count):
                core = cores[copy, task, place].double()
                if core_rank:
                    core = core[:, k:].t() @ core[:, :k]
                w = z[rows, place * k : (place + 1) * k] @ core.t()
                parts.append(w @ u[place][copy].double())
            out[rows] = torch.cat(parts, dim=1)
        return out

    layers = [
        DirectLayer(
            copy * count,
            layer.d_in,
            tuple(
                DirectSlice(width, 0, 0, _as_packed(side[copy]), k)
                for width, side in zip(layer.widths, u)
            ),
            _as_packed(v[copy]),
            0,
        )
        for copy in range(copies)
    ]
    run = _direct_run(batch, layers, part)
    return Operation("direct-joint", work, copies, run, expected)


def _direct_run(
    batch: Batch,
    layers: Sequence[DirectLayer],
    part: Callable[[int, int, int], SliceTask],
) -> Callable[[int], None]:
    """Run a layer by its number; ``part(copy, task, place)`` is what its slot holds."""
    x, y, device = batch.x, batch.y, batch.x.device
    count = len(batch.layer.widths)
    table = SlotTable(batch.slots, len(layers) * count, device)
    for task in range(batch.cell.tasks):
        slices = {
            copy * count + place: part(copy, task, place)
            for copy in range(len(layers))
            for place in range(count)
        }
        table.set(task, make_task(slices, len(layers) * count, device))
    routing = Routing(len(x), batch.slots, device)
    routing.update(batch.token_tasks)
    # Off a GPU the dispatch would take torch in the kernels' place.
    add = add_direct if x.is_cuda else add_direct_triton

    def run(copy: int) -> None:
        add(y, x, layers[copy], table, routing)

    return run


def _as_packed(values: torch.Tensor) -> PackedMatrix:
    rows, cols = values.shape
    return PackedMatrix(format_name(values.dtype), rows, cols, {"values": values})


def format_name(dtype: torch.dtype) -> str:
    """The packed format that holds a dtype's values as they are."""
    return next(name for name, held in FLOAT_DTYPES.items() if held == dtype)


def _random(like: torch.Tensor, *shape: int, over: float) -> torch.Tensor:
    """Normal numbers of variance 1 / ``over``."""
    values = torch.empty(shape, dtype=like.dtype, device=like.device)
    return values.normal_(std=over**-0.5)
