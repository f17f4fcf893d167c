"""A clock: operations timed in turns, and the middle and the spread of their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import floor

PERCENTS = (20, 50, 80)


def take_turns(
    clocks: Sequence[Callable[[], float]], rounds: int, warmup: int = 1
) -> list[list[float]]:
    """What each clock says, in ``rounds`` rounds after ``warmup`` that do not count.

    One after the other (A B C A B C ...), so that a drift of the machine hits all alike.
    """
    times: list[list[float]] = [[] for _ in clocks]
    for number in range(warmup + rounds):
        for clock, taken in zip(clocks, times):
            seconds = clock()
            if number >= warmup:
                taken.append(seconds)
    return times


def seconds_of(run: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """Wall time of one run; ``wait`` returns when the device has nothing left to do."""
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def best_seconds(run: Callable[[], object], tries: int = 4) -> float:
    """The shortest of some runs: what a machine can do, other work on it or not."""
    return min(seconds_of(run) for _ in range(tries))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the neighbouring values, as ``numpy.percentile`` has it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = floor(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (place - below))


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """p20, p50 and p80, each times ``scale``."""
    return {f"p{percent}": scale * percentile(values, percent) for percent in PERCENTS}
