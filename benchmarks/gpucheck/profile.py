"""Microseconds of each kernel, and of a layer with its direct work, on weights that are cold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import floors
import numpy as np
import torch
from clock import Method, capture, l2_nbytes, synchronise, time_in_turns

from gpucheck.world import World, make_world, spread_slots
from vllm_vlora.timing import percentile

Base = Callable[[], object]
Way = Callable[[World, Base, torch.Tensor, torch.Tensor], None]
# (name, joint, private formats) of the tasks of a batch.
KINDS: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("joint", True, ()),
    ("nf4", False, ("nf4",)),
    ("float", False, ("float",)),
)


def kernels(
    shape: floors.Layer,
    batches: tuple[tuple[int, int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row a kernel, for (tokens, tasks, slots) batches of joint, NF4 and float tasks.

    Launched for the batch at hand, and as a graph, which has launches for the worst batch of its size:
    few tasks in many tokens and slots take another way there. Without a GPU there is no graph, and
    these are torch's operations, of Triton's interpreter.
    """
    flush = torch.empty(max(2 * l2_nbytes(device) // 4, 1), device=device)
    for tokens, tasks, slots in batches:
        for name, joint, private in KINDS:
            world = make_world(
                shape, dtype, device,
                slots=slots, tokens=tokens, tasks=tasks, joint=joint, private=private,
            )  # fmt: skip
            x, y = world.batch(tokens)
            run = partial(world.run, y, x)
            ways = {"eager": run}
            if device.type == "cuda":
                # The worst batch's kernels are compiled now, which a capture does not allow.
                world.routing.update(spread_slots(tokens, slots, 0))
                run()
                ways["graph"] = capture(run)
            world.routing.update(spread_slots(tokens, tasks, 0))
            for mode, way in ways.items():
                for kernel, us in profile_kernels(way, flush, repeats).items():
                    yield {
                        "check": "profile", "layer": shape.name, "tokens": tokens, "tasks": tasks,
                        "slots": slots, "kind": name, "mode": mode, "kernel": kernel, "us": us,
                    }  # fmt: skip


def profile_kernels(run: Callable[[], None], flush: torch.Tensor, repeats: int) -> dict[str, float]:
    """Kernel -> microseconds (median of the repeats) of one call, the caches emptied before each."""
    gpu = flush.is_cuda
    run()
    synchronise(flush.device)
    activities = [getattr(torch.profiler.ProfilerActivity, "CUDA" if gpu else "CPU")]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            flush.add_(1)
            run()
        synchronise(flush.device)
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        us = event.device_time if gpu else event.self_cpu_time_total
        if "elementwise" not in event.name and us > 0:
            found[event.name[:60]].append(us)
    return {n: percentile(t, 50) * len(t) / repeats for n, t in found.items()}


def idle(
    shape: floors.Layer, dtype: torch.dtype, device: torch.device, tokens: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """A linear layer in a graph, alone and with direct work that finds no task, for 64 and 1024 slots."""
    for slots in (64, 1024):
        world = make_world(shape, dtype, device, slots=slots, tasks=1, tokens=tokens)
        row = {"check": "idle", "layer": shape.name, "tokens": tokens, "slots": slots}
        yield from _time_layers(row, shape, world, np.zeros(0, dtype=np.int32), rounds)


def beside(
    shape: floors.Layer,
    batches: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """A linear layer in a graph, alone and with the direct work of (tokens, tasks) after or beside it."""
    for tokens, tasks in batches:
        for name, joint, private in KINDS:
            world = make_world(
                shape, dtype, device, slots=tasks, tokens=tokens, joint=joint, private=private
            )
            row = {
                "check": "beside", "layer": shape.name, "tokens": tokens, "tasks": tasks, "kind": name,
            }  # fmt: skip
            yield from _time_layers(row, shape, world, spread_slots(tokens, tasks, 0), rounds)


def _time_layers(
    row: dict[str, Any], shape: floors.Layer, world: World, batch: np.ndarray, rounds: int
) -> Iterator[dict[str, Any]]:
    """The row with "what" and "us" of each way for a batch, in turns, on weights that are cold.

    Without a GPU nothing can be captured; the calls themselves are timed then.
    """
    device, gpu = world.device, world.device.type == "cuda"
    weights = [
        torch.randn(shape.d_out, shape.d_in, device=device).to(world.dtype) for _ in range(4)
    ]
    x, y = world.batch(row["tokens"])
    methods = {}
    for name, way in (("base", _alone), ("then direct", _after), ("direct beside", _beside)):
        run = partial(_layers, way, world, weights, x, y)
        # With tasks, so that everything is launched and so compiled.
        world.routing.update(spread_slots(len(x), len(world.tasks), 0))
        run()
        world.routing.update(batch)
        methods[name] = Method(capture(run) if gpu else run, len(weights), graph=gpu)
    times = time_in_turns(list(methods.values()), device, rounds, warmup=1)
    for name, taken in zip(methods, times):
        yield row | {"what": name, "us": 1e6 * percentile(taken, 50)}


def _layers(
    way: Way, world: World, weights: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> None:
    for weight in weights:
        way(world, partial(torch.mm, x, weight.t(), out=y), x, y)


def _alone(world: World, base: Base, x: torch.Tensor, y: torch.Tensor) -> None:
    base()


def _after(world: World, base: Base, x: torch.Tensor, y: torch.Tensor) -> None:
    base()
    world.run(y, x)


def _beside(world: World, base: Base, x: torch.Tensor, y: torch.Tensor) -> None:
    """As the plugin does in graphs: what needs x alone runs on a stream of its own."""
    if not x.is_cuda:
        rest = world.begin(x)
        base()
        rest(y)
        return
    main = torch.cuda.current_stream(x.device)
    side = _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        rest = world.begin(x)
    base()
    main.wait_stream(side)
    rest(y)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
