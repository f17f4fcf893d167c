"""The fair comparator on CPU: vLLM's slots, one matrix product a run of equal adapters.

vLLM's punica for CPU copies A and B of a token's slot once a token before it multiplies, which is most
of its time in a prefill. Here neighbouring tokens with one adapter are one product with the matrices
where they lie:

    y[s:e, columns of slice i] += scale * (x[s:e] A_i^T) B_i^T      for every run s:e with a slot

Tokens without an adapter (slot -1) are in no run.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Run = tuple[int, int, int]

_SWITCHED = ("add_lora_linear", "add_lora_logits", "add_lora_embedding")
_STOCK = {name: getattr(PunicaWrapperCPU, name) for name in _SWITCHED}
_STOCK_UPDATE = PunicaWrapperCPU.update_metadata


def use_punica_runs(use: bool) -> None:
    """Switch every CPU punica of this process to runs, or back to stock."""
    # Stays once it is there: while stock code runs, too, new metadata must drop the old runs.
    PunicaWrapperCPU.update_metadata = _update_metadata  # type: ignore[method-assign]
    ours = {
        "add_lora_linear": _add_lora_linear,
        "add_lora_logits": _add_lora_logits,
        "add_lora_embedding": _add_lora_embedding,
    }
    for name, function in (ours if use else _STOCK).items():
        setattr(PunicaWrapperCPU, name, function)


def runs_of(indices: torch.Tensor) -> list[Run]:
    """(first row, end, slot) of neighbouring rows that share a slot; rows of slot -1 left out."""
    slots, counts = torch.unique_consecutive(indices, return_counts=True)
    ends = counts.cumsum(0)
    bounds = zip((ends - counts).tolist(), ends.tolist(), slots.tolist())
    return [(start, end, slot) for start, end, slot in bounds if slot >= 0]


def _update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
    _STOCK_UPDATE(self, *args, **kwargs)
    self._bench_runs = {}


def _runs(wrapper: Any, rows: str) -> list[Run]:
    """The runs of the batch's tokens or of its sampled rows, found once a batch."""
    held = wrapper.__dict__.setdefault("_bench_runs", {})
    if rows not in held:
        held[rows] = runs_of(getattr(wrapper, rows))
    return held[rows]


def _add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
) -> None:
    runs = _runs(self, "token_lora_indices")
    column = 0
    for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices):
        for start, end, slot in runs:
            h = x[start:end] @ a[slot, 0].T
            y[start:end, column : column + width].addmm_(h, b[slot, 0].T, alpha=scale)
        column += width


def _add_lora_logits(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    scale: float,
) -> None:
    for start, end, slot in _runs(self, "sampler_indices"):
        h = x[start:end] @ lora_a_stacked[slot, 0].T
        b = lora_b_stacked[slot, 0].T
        y[start:end, : b.shape[1]].addmm_(h, b, alpha=scale)


def _add_lora_embedding(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    *,
    add_input: bool = True,  # As vLLM's layer spells it.
) -> None:
    assert add_input
    for start, end, slot in _runs(self, "token_lora_indices"):
        y[start:end].addmm_(x[start:end], lora_b_stacked[slot, 0].T)
