"""Microseconds of each kernel of a layer, by the device's own profiler, on weights that are cold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import floors
import numpy as np
import torch
from clock import capture, l2_nbytes

from gpucheck.world import make_world, spread_slots

REPEATS = 20


def kernels(
    shape: floors.Layer,
    batches: tuple[tuple[int, int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """A row a kernel, for (tokens, tasks, slots) batches of joint, NF4 and float tasks."""
    flush = torch.empty(2 * l2_nbytes(device) // 4, device=device)
    for tokens, tasks, slots in batches:
        for name, joint, private in (
            ("joint", True, ()),
            ("nf4", False, ("nf4",)),
            ("float", False, ("float",)),
        ):
            world = make_world(
                shape, dtype, device,
                slots=slots, tokens=tokens, tasks=tasks, joint=joint, private=private,
            )  # fmt: skip
            world.routing.update(spread_slots(tokens, tasks, 0))
            x, y = world.batch(tokens)
            for kernel, us in _profile(partial(world.run, y, x), flush).items():
                yield {
                    "check": "profile", "layer": shape.name, "tokens": tokens, "tasks": tasks,
                    "slots": slots, "kind": name, "kernel": kernel, "us": us,
                }  # fmt: skip


def _profile(run: Callable[[], None], flush: torch.Tensor) -> dict[str, float]:
    """Kernel -> microseconds (median of the repeats) of one call, the caches emptied before each."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(REPEATS):
            flush.add_(1)
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if "elementwise" not in event.name and event.device_time > 0:
            found[event.name[:60]].append(event.device_time)
    return {n: sorted(t)[len(t) // 2] * len(t) / REPEATS for n, t in found.items()}


def idle(
    shape: floors.Layer, dtype: torch.dtype, device: torch.device, tokens: int = 64
) -> Iterator[dict[str, Any]]:
    """Graphs of one linear layer: the base product alone, and with direct work that finds no task."""
    weights = [torch.randn(shape.d_out, shape.d_in, device=device).to(dtype) for _ in range(4)]
    for slots in (64, 1024):
        world = make_world(shape, dtype, device, slots=64, tokens=tokens)
        x, y = world.batch(tokens)
        world.routing.update(np.zeros(0, dtype=np.int32))
        for name, add in (("base", None), ("base + idle direct", world.run)):
            run = partial(_layers, weights, x, y, add)
            run()
            yield {
                "check": "idle", "layer": shape.name, "slots": slots, "what": name,
                "us": _time(capture(run)) / len(weights),
            }  # fmt: skip


def _layers(
    weights: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, add: Callable[..., None] | None
) -> None:
    for weight in weights:
        torch.mm(x, weight.t(), out=y)
        if add is not None:
            add(y, x)


def _time(replay: Callable[[], None]) -> float:
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]
