"""What is measured beside each other: the cells of a run, and all operations of one cell in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import floors
import torch
from clock import Method, capture, l2_nbytes, time_in_turns

from kernelbench.batches import Batch, Cell, make_batch
from kernelbench.forward import (
    Operation,
    base_operation,
    count_copies,
    joint_operation,
    make_factors,
    private_operation,
    punica_operation,
)
from kernelbench.punica import Punica
from kernelbench.report import AIM_PREFILL, AIM_TASKS, Floors, make_row
from kernelbench.verify import check_operation, check_replay

# A graph's replay takes at least this long, so that what it costs to start does not count.
_REPLAY_SECONDS = 1e-3
_REPLAY_CALLS = 64
# Calls of one eager sample; the next sample goes on with the copies that follow.
_EAGER_CALLS = 32


@dataclass(frozen=True)
class Settings:
    """What to measure, on what.

    Attributes:
        models: name -> the model's shape.
        modules: names of the layers, None for all.
        ks, formats: of shared bases, and of private factors.
        decode: (tokens, tasks) of decode batches.
        prefill: (tokens, tasks) of prefill batches.
        slots: slots of tasks at least, 0 for as many as there are tasks.
        rounds, warmup: samples of each method that count, and that do not.
        activation: measure also how a whole task is made ready.
        core_dtype: of the cores that materialize takes.
        every_mode: run materialize also with its planning, and by the torch reference.
    """

    device: torch.device
    dtype: torch.dtype
    models: dict[str, floors.Model]
    rank: int
    ks: tuple[int, ...]
    formats: tuple[str, ...]
    rounds: int
    warmup: int
    modules: tuple[str, ...] | None = None
    decode: tuple[tuple[int, int], ...] = ()
    prefill: tuple[tuple[int, int], ...] = ()
    slots: int = 0
    activation: bool = True
    core_dtype: torch.dtype = torch.float32
    every_mode: bool = False

    def work(self, **values: Any) -> floors.Work:
        """The parameters of a path."""
        slot_rank = floors.slot_rank(self.rank)
        return floors.Work(
            rank=self.rank,
            slot_rank=slot_rank,
            itemsize=self.dtype.itemsize,
            core_itemsize=self.core_dtype.itemsize,
            **values,
        )


def cells(settings: Settings) -> Iterator[Cell]:
    """The cells, batch by batch, so that a run that ends early has whole models of what it has.

    What the aims look at comes first.
    """
    batches = [("decode", *b) for b in settings.decode]
    batches += [("prefill", *b) for b in settings.prefill]
    aims = (("decode", AIM_TASKS, AIM_TASKS), ("prefill", *AIM_PREFILL))
    batches.sort(key=lambda batch: batch not in aims)
    for phase, tokens, tasks in batches:
        for name, model in settings.models.items():
            for layer in model.layers:
                if settings.modules is None or layer.name in settings.modules:
                    yield Cell(name, layer, phase, tokens, tasks)


def run_cell(
    cell: Cell, settings: Settings, punica: Punica | None, limits: Floors
) -> tuple[list[dict[str, Any]], list[str]]:
    """Check every operation, then time them in turns, each as it is and as a graph.

    Returns:
        The rows, and what is wrong with the operations that have none: the others still count.
    """
    torch.manual_seed(cell.tokens + cell.tasks)
    batch = make_batch(cell, settings.dtype, settings.device, settings.slots)
    timed: list[tuple[str, Operation, float, Method]] = []
    wrong = []
    for operation in make_operations(batch, settings, punica):
        try:
            error = check_operation(operation, batch)
            methods = _methods(operation, batch, limits)
        except Exception as problem:  # noqa: BLE001 (the others still count)
            wrong.append(f"{cell}: {operation.label}: {type(problem).__name__}: {problem}"[:1000])
            continue
        timed += [(mode, operation, error, method) for mode, method in methods]
    batch.y.copy_(batch.before)
    times = time_in_turns(
        [method for *_, method in timed], settings.device, settings.rounds, settings.warmup
    )
    if punica is not None:
        punica.forget()
    rows = [
        make_row(
            operation.op,
            operation.work,
            limits.layer_floor(operation.op, cell.layer, operation.work),
            taken,
            model=cell.model,
            module=cell.layer.name,
            phase=cell.phase,
            mode=mode,
            copies=operation.copies,
            error=error,
        )
        for (mode, operation, error, _), taken in zip(timed, times)
    ]
    return rows, wrong


def make_operations(batch: Batch, settings: Settings, punica: Punica | None) -> list[Operation]:
    """Every operation on one batch, all of them with the same tasks where they can have them."""
    cache = l2_nbytes(settings.device)
    work = settings.work(tokens=batch.cell.tokens, tasks=batch.cell.tasks)
    packed = [replace(work, format=format) for format in settings.formats]
    copies = [count_copies("punica", batch.layer, work, cache)]
    copies += [count_copies("direct-private", batch.layer, one, cache) for one in packed]
    factors = make_factors(batch, settings.rank, max(copies))
    operations = [base_operation(batch, work, cache)]
    if punica is not None:
        operations.append(punica_operation(batch, work, factors, punica, cache))
    operations += [joint_operation(batch, replace(work, k=k), cache) for k in settings.ks]
    operations += [private_operation(batch, one, factors, cache) for one in packed]
    return operations


def _methods(operation: Operation, batch: Batch, limits: Floors) -> list[tuple[str, Method]]:
    """The eager calls and, on a GPU, their graph, which has been compared with them."""
    chunk = min(_EAGER_CALLS, operation.copies)
    methods = [("eager", Method(_in_turn(operation, chunk), chunk))]
    if batch.x.is_cuda:
        floor, _ = limits.layer_floor(operation.op, batch.layer, operation.work)
        calls = max(operation.copies, min(_REPLAY_CALLS, math.ceil(_REPLAY_SECONDS / floor)))
        # Nothing may be compiled during the capture, and no table be made.
        _in_turn(operation, operation.copies)()
        replay = capture(_in_turn(operation, calls))
        check_replay(operation, batch, _in_turn(operation, calls), replay)
        methods.insert(0, ("graph", Method(replay, calls, graph=True)))
    return methods


def _in_turn(operation: Operation, calls: int) -> Callable[[], None]:
    """Call the copies one after another, each time from where the last time ended."""
    position = 0

    def run() -> None:
        nonlocal position
        for _ in range(calls):
            operation.run(position % operation.copies)
            position += 1

    return run
