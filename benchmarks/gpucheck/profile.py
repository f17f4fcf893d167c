"""Microseconds of each kernel of a layer, by the device's own profiler, on weights that are cold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import floors
import numpy as np
import torch
from clock import Method, capture, l2_nbytes, synchronise, time_in_turns

from gpucheck.world import make_world, spread_slots
from vllm_vlora.timing import percentile


def kernels(
    shape: floors.Layer,
    batches: tuple[tuple[int, int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row a kernel, for (tokens, tasks, slots) batches of joint, NF4 and float tasks.

    Without a GPU these are torch's operations, of Triton's interpreter.
    """
    flush = torch.empty(max(2 * l2_nbytes(device) // 4, 1), device=device)
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
            for kernel, us in _profile(partial(world.run, y, x), flush, repeats).items():
                yield {
                    "check": "profile", "layer": shape.name, "tokens": tokens, "tasks": tasks,
                    "slots": slots, "kind": name, "kernel": kernel, "us": us,
                }  # fmt: skip


def _profile(run: Callable[[], None], flush: torch.Tensor, repeats: int) -> dict[str, float]:
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
    """Graphs of one linear layer: the base product alone, and with direct work that finds no task.

    Without a GPU nothing can be captured; the calls themselves are timed then.
    """
    weights = [torch.randn(shape.d_out, shape.d_in, device=device).to(dtype) for _ in range(4)]
    gpu = device.type == "cuda"
    for slots in (64, 1024):
        world = make_world(shape, dtype, device, slots=slots, tasks=1, tokens=tokens)
        x, y = world.batch(tokens)
        world.routing.update(np.zeros(0, dtype=np.int32))
        methods = {}
        for name, add in (("base", None), ("base + idle direct", world.run)):
            run = partial(_layers, weights, x, y, add)
            run()
            methods[name] = Method(capture(run) if gpu else run, len(weights), graph=gpu)
        times = time_in_turns(list(methods.values()), device, rounds, warmup=1)
        for name, taken in zip(methods, times):
            yield {
                "check": "idle", "layer": shape.name, "slots": slots, "what": name,
                "us": 1e6 * percentile(taken, 50),
            }  # fmt: skip


def _layers(
    weights: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, add: Callable[..., None] | None
) -> None:
    for weight in weights:
        torch.mm(x, weight.t(), out=y)
        if add is not None:
            add(y, x)
