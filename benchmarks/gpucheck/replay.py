"""A graph captured with nothing routed, replayed with other tasks, slots, counts and with none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import floors
import numpy as np
import torch
from clock import capture

from gpucheck.smoke import TOLERANCE
from gpucheck.world import World, make_world, spread_slots
from vllm_vlora.triton_kernels.direct import TILE_SIZES, add_direct_reference

SLOTS = 40


def check(
    shape: floors.Layer, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, object]]:
    """A row a captured size and batch: right, and equal to the bit to a run that was not captured.

    Not to the bit where that run cuts its tokens into larger tiles than a graph of its size has: 272
    tokens of one task sum in another order.

    Without a GPU nothing can be captured; the launches are made anew then, on the same buffers.
    """
    for padded in sizes:
        torch.manual_seed(padded)
        world = make_world(shape, dtype, device, slots=SLOTS, tokens=padded)
        x, y = world.batch(padded)
        # What is not needed is not launched, so that nothing would be compiled with nothing routed.
        world.routing.update(spread_slots(padded, SLOTS, 0))
        world.run(y, x)
        world.routing.update(np.zeros(0, dtype=np.int32))
        replay = capture(partial(world.run, y, x)) if device.type == "cuda" else None
        for name, slots in _batches(padded):
            yield {
                "check": "replay", "layer": shape.name, "padded": padded, "batch": name,
                **_compare(world, x, y, slots, replay),
            }  # fmt: skip
            _swap_tasks(world)


def _batches(padded: int) -> list[tuple[str, np.ndarray]]:
    none = np.full(padded, SLOTS, dtype=np.int32)
    half = spread_slots(padded // 2, SLOTS, 1)
    return [
        ("every task", spread_slots(padded, SLOTS, 0)),
        ("half full", half),
        ("one task", np.full(padded, 3, dtype=np.int32)),
        ("one token", np.array([5], dtype=np.int32)),
        ("none", none),
        ("empty", none[:0]),
        ("some without", np.where(np.arange(padded) % 3 == 0, SLOTS, spread_slots(padded, 7, 2))),
    ]


def _compare(
    world: World, x: torch.Tensor, y: torch.Tensor, slots: np.ndarray, replay: Callable | None
) -> dict[str, object]:
    # Triton is imported when its interpreter has been chosen.
    from vllm_vlora.triton_kernels.device import choose_tiles

    world.routing.update(slots.astype(np.int32))
    x.normal_()
    y.normal_()
    before = y.clone()
    (replay or (lambda: world.run(y, x)))()
    again = before.clone()
    world.run(again, x)
    same = torch.equal(y.view(torch.int16), again.view(torch.int16))
    alike = choose_tiles(x, world.routing)[0] == TILE_SIZES[0]
    places = torch.arange(0, len(slots), max(len(slots) // 20, 1))
    few = before[places]
    world.routing.update(slots[places.numpy()].astype(np.int32))
    add_direct_reference(few, x[places], world.layer, world.table, world.routing)
    added = (few.float() - before[places].float()).norm(dim=1)
    error = (y[places].float() - few.float()).norm(dim=1) / added.clamp_min(1e-20)
    worst = float(error.max()) if len(places) else 0.0
    idle = torch.ones(len(y), dtype=torch.bool)
    idle[: len(slots)] = torch.from_numpy(slots == world.table.slots)
    idle = idle.to(y.device)
    kept = torch.equal(y[idle].view(torch.int16), before[idle].view(torch.int16))
    right = (same or not alike) and kept and worst <= TOLERANCE
    return {"bits_equal": same, "idle_kept": kept, "error": worst, "right": right}


def _swap_tasks(world: World) -> None:
    """Other tasks in the slots, as an engine puts them there between two steps."""
    world.tasks.append(world.tasks.pop(0))
    world.tasks.append(world.tasks.pop(0))
    for slot, task in enumerate(world.tasks):
        world.table.set(slot, task)
