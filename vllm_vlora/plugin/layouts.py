"""The slices of a served model's LoRA layers, as plain descriptions that ``layers`` makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

View = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """``width`` consecutive columns: the module's from ``source`` on go to the slot's from ``target``."""

    source: int
    target: int
    width: int


@dataclass(frozen=True)
class SliceLayout:
    """One slice of one LoRA layer on this tensor-parallel rank.

    Attributes:
        name: the engine's name of the adapted module that fills it.
        a, b: slot index -> view of the slot, (max rank, d_in) and (max rank, d_out) of this rank; b is
            the transposed slot.
        d_in, d_out: the module's shape over all ranks, which the checkpoint must have.
        runs_a, runs_b: which of the module's columns this rank holds; none of an expert of another rank,
            whose views must not be taken.
        at_most: the checkpoint's d_in and d_out may be smaller (vocabularies are padded).
        first_row: where in a task's A the rows begin that this rank holds, as many as ``a`` has; all but
            zero come of ``--fully-sharded-loras``.
    """

    name: str
    a: View
    b: View
    d_in: int
    d_out: int
    runs_a: tuple[Run, ...]
    runs_b: tuple[Run, ...]
    at_most: bool = False
    first_row: int = 0

    @property
    def is_whole_run(self) -> bool:
        """Whether this rank holds one run of columns of either side, as the direct kernels need."""
        return len(self.runs_a) == 1 and len(self.runs_b) == 1


def index_runs(indices: torch.Tensor) -> tuple[Run, ...]:
    """Consecutive runs of a 1-D tensor of column indices, in the order in which a rank holds them."""
    values = indices.tolist()
    runs, start = [], 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[stop - 1] + 1:
            runs.append(Run(values[start], start, stop - start))
            start = stop
    return tuple(runs)


@dataclass(frozen=True)
class LayerLayout:
    """A linear layer that may run direct, and its slices in the order of its output's columns."""

    name: str
    slices: tuple[SliceLayout, ...]
