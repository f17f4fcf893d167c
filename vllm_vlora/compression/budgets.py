"""What a compression may take and lose, and what is said where nothing can meet it."""

from __future__ import annotations

import math

import torch

from vllm_vlora.adapters.collection import Collection
from vllm_vlora.compression.options import DEFAULT_LOSS, CompressOptions
from vllm_vlora.planning.plan import Budget

# Planned errors equal measured ones up to float64 rounding; the margin keeps a promise exact.
MARGIN = 1e-6


def gate_of(options: CompressOptions, collection: Collection) -> torch.Tensor | None:
    """The largest loss of each task beside a number of bytes."""
    return None if options.gate is None else _limits(options.gate, collection)


def budget_of(options: CompressOptions, collection: Collection) -> Budget:
    """What the options ask for."""
    if not options.has_budget:
        return _default(options, collection)
    if options.max_error is not None:
        return Budget(limits=_limits(options.max_error, collection))
    gate = gate_of(options, collection)
    if options.max_bytes is not None:
        return Budget(options.max_bytes, gate)
    if options.ratio is None or options.ratio <= 1:
        return Budget(None, None)
    return Budget(math.floor(collection.original_nbytes / options.ratio), gate)


def _default(options: CompressOptions, collection: Collection) -> Budget:
    """What may be lost when nothing is said of it: nothing that matters; unquantised, nothing."""
    if options.quantize == "none":
        return Budget()
    limits = _limits(math.sqrt(DEFAULT_LOSS), collection)
    return Budget(limits=limits, of_gain=True)


def _limits(error: float, collection: Collection) -> torch.Tensor:
    limit = (error * (1 - MARGIN)) ** 2
    return torch.full((len(collection.adapters),), limit, dtype=torch.float64)


def default_unreachable(options: CompressOptions) -> str:
    """What is said where the least that can be lost is still more than is lost by default."""
    return (
        f"no {options.shares} plan with quantize {options.quantize} keeps every task within a predicted "
        f"loss of {DEFAULT_LOSS:.0%} of its gain; this is the one that loses the least"
    )


def out_of_reach(
    options: CompressOptions, collection: Collection, budget: Budget, nearest: float
) -> str:
    """The line that says how near one can get: to the error, or to the bytes."""
    kind = f"{options.shares} plan"
    if budget.by_size:
        return (
            f"no {kind} with quantize {options.quantize} keeps every task within a relative error of "
            f"{options.max_error}; the least reachable for the worst task is {nearest:.3g}; "
            f"{_less_lost(options, 'allow a larger error')}"
        )
    advice = _more_bytes(options)
    if not math.isfinite(nearest):
        return f"no {kind} keeps every task within the gate; {advice}"
    reached = math.floor(collection.original_nbytes / nearest * 100) / 100
    asked = (
        f"{options.max_bytes} bytes" if options.ratio is None else f"a ratio of {options.ratio:g}"
    )
    return (
        f"{asked} is out of reach for {kind}s with quantize {options.quantize}: the smallest reaches "
        f"{reached:g} ({int(nearest)} bytes); {advice}"
    )


def quality_out_of_reach(options: CompressOptions, task: str, kept: float, least: float) -> str:
    """The line that says what a task keeps where it loses the least."""
    return (
        f"{task!r} keeps at most {kept:.4f} with quantize {options.quantize}, and {least:g} is wanted; "
        f"{_less_lost(options, 'ask for less')}"
    )


def _less_lost(options: CompressOptions, advice: str) -> str:
    if options.quantize not in ("auto", "none"):
        return f"{advice}, or quantize none or auto"
    return f"{advice}, or use representation auto or private" if options.only_shared else advice


def _more_bytes(options: CompressOptions) -> str:
    advice = "ask for a smaller ratio" if options.max_bytes is None else "allow more bytes"
    if options.gate is not None:
        advice += f", or a gate above {options.gate:g}"
    if options.quantize not in ("auto", "nf4"):
        advice += ", or quantize auto or nf4"
    return f"{advice}, or use representation auto" if options.only_shared else advice
