"""One task of a whole model made ready by the device alone: materialize, host copies, direct records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import floors
import torch
from clock import Method, capture, l2_nbytes, synchronise, time_in_turns
from harness import WrongResultError
from kernelbench.cells import Settings
from kernelbench.forward import CACHE_MARGIN
from kernelbench.report import Floors, make_row
from kernelbench.verify import check_equal

from vllm_vlora.quantize import PackedMatrix, pack, unpack
from vllm_vlora.triton_kernels.direct import SliceTask, SlotTable, make_task
from vllm_vlora.triton_kernels.materialize import (
    MaterializeJob,
    materialize,
    materialize_reference,
    plan_materialize,
)

DIRECT_SLOTS = 64
_SCALE = 0.5


@dataclass(frozen=True, eq=False)
class Way:
    """One way to make a task ready.

    Attributes:
        op, work: as in ``floors``; "copy-pinned" is one copy of all of an adapter's bytes.
        turns: how many tasks take turns, so that none is read from the cache.
        run: make a task ready, by its number.
        check: ``check(task, run)`` runs something, which should make that task ready, and raises
            WrongResultError when it did not.
        graph: whether the work can be captured.
        others: mode -> another way to run the same work, by a task's number.
    """

    op: str
    work: floors.Work
    turns: int
    run: Callable[[int], object]
    check: Callable[[int, Callable[[], object]], None]
    graph: bool = False
    others: dict[str, Callable[[int], object]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Slot:
    """vLLM's slot of one task: A ``[rank, d_in]`` and B ``[d_out, rank]`` of every slice."""

    sides: list[torch.Tensor]

    @property
    def outs(self) -> list[torch.Tensor]:
        """The same with B transposed, as materialize takes it."""
        return [side.t() if place % 2 else side for place, side in enumerate(self.sides)]

    def poison(self) -> None:
        """Fill it with NaN."""
        for side in self.sides:
            side.fill_(torch.nan)


def run_activation(
    name: str, model: floors.Model, settings: Settings, limits: Floors
) -> list[dict[str, Any]]:
    """Check every way on a model, then time them in turns.

    Raises:
        WrongResultError: a way does not do what it should; none is timed then.
    """
    torch.manual_seed(0)
    ways = list(make_ways(model, settings))
    for way in ways:
        for run in (way.run, *way.others.values()):
            for task in range(way.turns):
                way.check(task, partial(run, task))
    timed = [(mode, way, method) for way in ways for mode, method in _methods(way, settings.device)]
    methods = [method for *_, method in timed]
    times = time_in_turns(methods, settings.device, settings.rounds, settings.warmup)
    return [
        make_row(
            way.op,
            way.work,
            limits.floor(cost_of(way, model)),
            taken,
            model=name,
            module="all",
            phase="activation",
            mode=mode,
            copies=way.turns,
            error=None,
        )
        for (mode, way, _), taken in zip(timed, times)
    ]


def cost_of(way: Way, model: floors.Model) -> floors.Cost:
    """What a way must move."""
    if way.op != "copy-pinned":
        return floors.model_cost(way.op, model, way.work)
    stock = floors.model_cost("activate-stock", model, way.work)
    return floors.Cost(bytes=stock.host_bytes, host_bytes=stock.host_bytes)


def make_ways(model: floors.Model, settings: Settings) -> Iterator[Way]:
    """Every way to make a task of the model ready."""
    slot = make_slot(model, settings)
    work = settings.work()
    yield stock_way(slot, settings, work)
    yield pinned_way(slot, settings, work)
    for format in settings.formats:
        packed = replace(work, format=format)
        yield private_way(slot, settings, packed)
        for k in settings.ks:
            yield joint_way(slot, settings, replace(packed, k=k))
    for k in settings.ks:
        yield direct_way(model, settings, replace(work, k=k))


def make_slot(model: floors.Model, settings: Settings) -> Slot:
    """A slot in the dtype of the forward pass."""
    sides = []
    for layer in model.layers * model.repeats:
        for width in layer.widths:
            for shape in ((settings.rank, layer.d_in), (width, settings.rank)):
                sides.append(torch.empty(shape, dtype=settings.dtype, device=settings.device))
    return Slot(sides)


def _methods(way: Way, device: torch.device) -> Iterator[tuple[str, Method]]:
    if device.type == "cuda" and way.graph:

        def all_tasks() -> None:
            for task in range(way.turns):
                way.run(task)

        replay = capture(all_tasks)
        way.check(way.turns - 1, replay)
        yield "graph", Method(replay, way.turns, graph=True)
    for mode, run in {"eager": way.run, **way.others}.items():
        yield mode, Method(_next_task(run, way.turns))


def _next_task(run: Callable[[int], object], turns: int) -> Callable[[], object]:
    """Make the tasks ready one after another, a call each."""
    tasks = cycle(range(turns))
    return lambda: run(next(tasks))


def _turns(nbytes: int, device: torch.device) -> int:
    """Tasks of so many bytes that do not fit the cache together; at least 2."""
    return max(2, math.ceil(CACHE_MARGIN * l2_nbytes(device) / nbytes))


# --- into slots -----------------------------------------------------------------------------------


def private_way(slot: Slot, settings: Settings, work: floors.Work) -> Way:
    """Packed factors into the slot, arranged once a task as the plugin does."""

    def task() -> list[MaterializeJob]:
        return [
            _job(out, _random(settings.rank, out.shape[1], work.format, settings.device), None)
            for out in slot.outs
        ]

    first = task()
    count = _turns(sum(job.matrix.nbytes for job in first), settings.device)
    tasks = [first, *(task() for _ in range(count - 1))]
    return _materialize_way("materialize-private", slot, settings, work, tasks)


def joint_way(slot: Slot, settings: Settings, work: floors.Work) -> Way:
    """Packed bases times a task's cores into the slot; all tasks share the bases."""
    bases = [_random(work.k, out.shape[1], work.format, settings.device) for out in slot.outs]

    def task() -> list[MaterializeJob]:
        return [_job(out, basis, _core(settings, work)) for out, basis in zip(slot.outs, bases)]

    # A model's bases alone are larger than a cache.
    return _materialize_way("materialize-joint", slot, settings, work, [task(), task()])


def _core(settings: Settings, work: floors.Work) -> torch.Tensor:
    core = torch.randn(settings.rank, work.k, device=settings.device)
    return core.to(settings.core_dtype)


def _materialize_way(
    op: str,
    slot: Slot,
    settings: Settings,
    work: floors.Work,
    tasks: Sequence[Sequence[MaterializeJob]],
) -> Way:
    plans = [plan_materialize(jobs) for jobs in tasks]

    def run(task: int) -> None:
        plans[task].run()

    others: dict[str, Callable[[int], object]] = {}
    if settings.every_mode:
        others = {
            "plan+run": lambda task: materialize(tasks[task]),
            "reference": lambda task: materialize_reference(tasks[task]),
        }

    def check(task: int, run: Callable[[], object]) -> None:
        slot.poison()
        run()
        name = f"{op} {work.format}"
        for place, job in enumerate(tasks[task]):
            _check_job(job, f"{name}, task {task}, factor {place}")

    return Way(op, work, len(tasks), run, check, graph=True, others=others)


def _job(out: torch.Tensor, matrix: PackedMatrix, left: torch.Tensor | None) -> MaterializeJob:
    return MaterializeJob(out, matrix, left, _SCALE, 0, out.shape[1])


def _random(rows: int, cols: int, format: str, device: torch.device) -> PackedMatrix:
    return pack(torch.randn(rows, cols, device=device), format)


def _check_job(job: MaterializeJob, name: str) -> None:
    """Element by element: float32 sums in any order, then one rounding to 16 bits."""
    matrix = unpack(job.matrix).double()
    left = torch.eye(job.rank, device=matrix.device) if job.left is None else job.left
    wanted = job.scale * (left.double() @ matrix)
    magnitude = job.scale * (left.double().abs() @ matrix.abs())
    rounding = torch.finfo(job.out.dtype).eps / 2
    # The last term: below their normal range 16-bit floats have a fixed step.
    bound = (job.matrix.rows + 2) * 2.0**-24 * magnitude + 1.001 * rounding * wanted.abs()
    bound += torch.finfo(job.out.dtype).smallest_normal * rounding
    error = (job.out.double() - wanted).abs()
    if not bool((error <= bound).all()):
        raise WrongResultError(f"{name}: error up to {error.nan_to_num(torch.inf).max():.2g}")


def stock_way(slot: Slot, settings: Settings, work: floors.Work) -> Way:
    """What stock vLLM does: every A and B of the slot zeroed, then copied from pinned memory."""
    count = _turns(sum(side.nbytes for side in slot.sides), settings.device)
    tasks = [
        [_pinned(torch.randn(side.shape), settings) for side in slot.sides] for _ in range(count)
    ]

    def run(task: int) -> None:
        for side, held in zip(slot.sides, tasks[task]):
            side.zero_()
            side.copy_(held, non_blocking=True)

    def check(task: int, run: Callable[[], object]) -> None:
        slot.poison()
        run()
        synchronise(settings.device)
        wanted = [held.to(settings.device) for held in tasks[task]]
        check_equal("activate-stock", slot.sides, wanted)

    return Way("activate-stock", work, count, run, check)


def pinned_way(slot: Slot, settings: Settings, work: floors.Work) -> Way:
    """All of an adapter in one copy from pinned memory: the best that any swapping could do."""
    size = sum(side.numel() for side in slot.sides)
    tasks = [_pinned(torch.randn(size), settings) for _ in range(2)]
    target = torch.empty(size, dtype=settings.dtype, device=settings.device)

    def run(task: int) -> None:
        target.copy_(tasks[task], non_blocking=True)

    def check(task: int, run: Callable[[], object]) -> None:
        target.fill_(torch.nan)
        run()
        synchronise(settings.device)
        check_equal("copy-pinned", [target], [tasks[task].to(settings.device)])

    return Way("copy-pinned", work, len(tasks), run, check)


def _pinned(values: torch.Tensor, settings: Settings) -> torch.Tensor:
    values = values.to(settings.dtype)
    return values.pin_memory() if settings.device.type == "cuda" else values


# --- direct ---------------------------------------------------------------------------------------


def direct_way(model: floors.Model, settings: Settings, work: floors.Work) -> Way:
    """A resident task's records into the slot table."""
    count = model.repeats * sum(len(layer.widths) for layer in model.layers)
    cores = torch.randn(count, work.k, work.k, device=settings.device).to(settings.dtype)
    tasks = [
        make_task(
            {number: SliceTask(core=cores[(number + shift) % count]) for number in range(count)},
            count,
            settings.device,
        )
        for shift in range(2)
    ]
    table = SlotTable(DIRECT_SLOTS, count, settings.device)

    def run(task: int) -> None:
        table.set(DIRECT_SLOTS // 2, tasks[task])

    def check(task: int, run: Callable[[], object]) -> None:
        table.records[: table.slots].fill_(-1)
        wanted = table.records.clone()
        wanted[DIRECT_SLOTS // 2] = tasks[task].records
        run()
        check_equal("activate-direct", [table.records], [wanted])

    return Way("activate-direct", work, len(tasks), run, check)
