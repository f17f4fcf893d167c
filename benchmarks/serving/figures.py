"""Rates, latencies and ratios from what one run of an engine recorded. Times are in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from vllm_vlora import timing


@dataclass
class Trace:
    """What the driver saw of one job; every list is in the order of its calls.

    Attributes:
        started, ended: of the whole run, on the clock of the times below.
        submitted: when a call was handed to the engine.
        arrivals: when the engine core had each of its tokens; all tokens of one step at one time.
        tokens: the tokens.
        logprobs: for each token the likeliest tokens' logarithms, where they were asked for.
        profile: text, where it was asked for.
    """

    started: float
    ended: float
    submitted: list[float]
    arrivals: list[list[float]]
    tokens: list[list[int]]
    logprobs: list[list[dict[int, float]]] = field(default_factory=list)
    profile: str = ""

    @property
    def seconds(self) -> float:
        """Wall time of the run."""
        return self.ended - self.started

    def first_token_times(self) -> list[float]:
        """Seconds from the submission of each call to its first token."""
        return [times[0] - begin for begin, times in zip(self.submitted, self.arrivals)]

    def gaps(self) -> list[float]:
        """Seconds between the neighbouring tokens of each call, all calls together."""
        return [b - a for times in self.arrivals for a, b in pairwise(times)]

    def decode_rate(self) -> float | None:
        """Tokens a second over the steps that brought no call's first token.

        A step's time is the time since the step before it. None when there was no such step.
        """
        counts = Counter(time for times in self.arrivals for time in times)
        first = {times[0] for times in self.arrivals}
        steps = sorted(counts)
        tokens, seconds = 0, 0.0
        for before, time in pairwise(steps):
            if time not in first:
                tokens += counts[time]
                seconds += time - before
        return tokens / seconds if tokens else None


def spread(values: Sequence[float]) -> dict[str, Any]:
    """p20, p50, p80 and the number of values."""
    return {**timing.spread(values), "count": len(values)}


def spread_of_rounds(values: Sequence[float]) -> dict[str, Any]:
    """``spread`` with the value of every round beside it."""
    return {**spread(values), "rounds": list(values)}


def spread_of_ratios(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Round by round ``value / reference``: what drifts hits both sides of each ratio.

    While a round is under way one side may have it already; it does not count then.
    """
    return spread_of_rounds([a / b for a, b in zip(values, reference)])
