"""The tokens of a batch: what they are, and which task each of them has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import floors
import numpy as np
import torch

# Updates are about this large, so that adding thousands of them to y overflows nothing.
SCALE = 0.125


@dataclass(frozen=True)
class Cell:
    """One linear layer and one batch: what is measured beside each other.

    Attributes:
        phase: "decode", where a sequence has one token, or "prefill", where it has many.
    """

    model: str
    layer: floors.Layer
    phase: str
    tokens: int
    tasks: int

    def __str__(self) -> str:
        tasks = "1 task" if self.tasks == 1 else f"{self.tasks} tasks"
        return f"{self.model} {self.layer.name}, {self.phase}, {self.tokens} tokens of {tasks}"


@dataclass(frozen=True, eq=False)
class Batch:
    """A cell's tensors.

    Attributes:
        x: ``[tokens, d_in]``, of about unit variance; every copy of the layer reads it.
        y: ``[tokens, d_out]``; every copy of the layer writes it.
        before: what y holds before a check.
        token_tasks: int32 ``[tokens]``, in the range of ``cell.tasks``; each task has a token.
        slots: slots of tasks, at least as many as tasks.
    """

    cell: Cell
    x: torch.Tensor
    y: torch.Tensor
    before: torch.Tensor
    token_tasks: np.ndarray
    slots: int

    @property
    def layer(self) -> floors.Layer:
        """The cell's layer."""
        return self.cell.layer

    @cached_property
    def rows(self) -> list[torch.Tensor]:
        """The tokens of each task."""
        return [
            torch.from_numpy(np.flatnonzero(self.token_tasks == task)).to(self.x.device)
            for task in range(self.cell.tasks)
        ]


def make_batch(cell: Cell, dtype: torch.dtype, device: torch.device, slots: int) -> Batch:
    """Random tokens. Prefill: as many for each task, one after another; decode: in any order."""
    token_tasks = np.arange(cell.tokens, dtype=np.int32) * cell.tasks // cell.tokens
    if cell.phase == "decode":
        np.random.default_rng(cell.tokens + cell.tasks).shuffle(token_tasks)
    x = torch.randn(cell.tokens, cell.layer.d_in, device=device).to(dtype)
    before = (SCALE * torch.randn(cell.tokens, cell.layer.d_out, device=device)).to(dtype)
    return Batch(cell, x, torch.empty_like(before), before, token_tasks, max(slots, cell.tasks))
