"""One linear layer with joint and private tasks of every format, and the batches that use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import floors
import numpy as np
import torch
from streams import mixed_rows, random_trellis

from vllm_vlora.quantize import FORMAT_OF_DTYPE, PackedMatrix, pack
from vllm_vlora.triton_kernels.direct import (
    DirectLayer,
    DirectSlice,
    DirectTask,
    Routing,
    SliceTask,
    SlotTable,
    add_direct,
    add_direct_triton,
    make_task,
)

PRIVATE = ("float", "int8", "nf4", "nf4-dq", "trellis")


@dataclass(frozen=True, eq=False)
class World:
    """A layer, its slots, which hold ``tasks`` by turns joint and private, and room for a batch."""

    layer: DirectLayer
    table: SlotTable
    routing: Routing
    tasks: list[DirectTask]
    dtype: torch.dtype
    device: torch.device

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the batch's updates to y by the Triton kernels."""
        add = add_direct if x.is_cuda else add_direct_triton
        add(y, x, self.layer, self.table, self.routing)

    def begin(self, x: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """Enqueue what needs x alone; the result, called with y, adds the rest of ``run``."""
        from vllm_vlora.triton_kernels.direct_kernel import begin_direct

        return begin_direct(x, self.layer, self.table, self.routing, ahead=True)

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random (x, y)."""
        x = torch.randn(tokens, self.layer.d_in, device=self.device).to(self.dtype)
        y = torch.randn(tokens, self.layer.width, device=self.device).to(self.dtype)
        return x, y


def make_world(
    shape: floors.Layer,
    dtype: torch.dtype,
    device: torch.device,
    *,
    slots: int,
    tokens: int,
    tasks: int | None = None,
    rank: int = 16,
    k: int = 64,
    joint: bool = True,
    private: tuple[str, ...] = PRIVATE,
) -> World:
    """``tasks`` (or as many as slots) random tasks, joint and private by turns where both are wanted."""
    count = len(shape.widths)
    v = torch.randn(count * k, shape.d_in, device=device) / shape.d_in**0.5
    slices = tuple(
        DirectSlice(width, 0, 0, _held(torch.randn(k, width, device=device) / k**0.5, dtype), k)
        if joint
        else DirectSlice(width, 0, 0, None, 0)
        for width in shape.widths
    )
    held_v = _held(v, dtype) if joint else None
    layer = DirectLayer(0, shape.d_in, slices, held_v, rank if private else 0, private or PRIVATE)
    table = SlotTable(slots, count, device)
    made = []
    for slot in range(tasks or slots):
        kind = slot % 2 == 0 if private and joint else joint
        parts = {
            place: _joint(k, rank, slot + place, dtype, device)
            if kind
            else _private(
                shape.d_in, width, rank, private[(slot // 2) % len(private)], dtype, device
            )
            for place, width in enumerate(shape.widths)
        }
        made.append(make_task(parts, count, device))
        table.set(slot, made[-1])
    return World(layer, table, Routing(tokens, slots, device), made, dtype, device)


def _joint(k: int, rank: int, number: int, dtype: torch.dtype, device: torch.device) -> SliceTask:
    if number % 2:
        core = torch.randn(rank, 2 * k, device=device) / (k * rank) ** 0.25
        return SliceTask(core=core.to(dtype), core_rank=rank)
    return SliceTask(core=(torch.randn(k, k, device=device) / k**0.5).to(dtype))


def _private(
    d_in: int, width: int, rank: int, format: str, dtype: torch.dtype, device: torch.device
) -> SliceTask:
    a = torch.randn(rank, d_in, device=device) / d_in**0.5
    b = torch.randn(rank, width, device=device) / rank**0.5
    if format == "trellis":
        a, b = (random_trellis(side, mixed_rows(rank)) for side in (a, b))
        return SliceTask(a=a, b=b, scale=0.5)
    name = FORMAT_OF_DTYPE[dtype] if format == "float" else format
    return SliceTask(a=pack(a, name), b=pack(b, name), scale=0.5)


def _held(values: torch.Tensor, dtype: torch.dtype) -> PackedMatrix:
    rows, cols = values.shape
    return PackedMatrix(FORMAT_OF_DTYPE[dtype], rows, cols, {"values": values.to(dtype)})


def spread_slots(tokens: int, tasks: int, seed: int) -> np.ndarray:
    """A slot for each token: every task as often, in random order."""
    slots = np.arange(tokens, dtype=np.int32) % max(tasks, 1)
    np.random.default_rng(seed).shuffle(slots)
    return slots
