"""Choose one option of each of many chains under a budget: bytes against loss.

Pure numbers. Each thing to choose is a *chain* of options (bytes, loss). On the lower convex hull
of a chain every step has a smaller gain per byte than the one before it, so taking steps of all
chains by falling gain per byte is optimal at every budget that it meets exactly (Shoham and Gersho,
*Efficient bit allocation for an arbitrary set of quantizers*, 1988).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

_BUDGET_ROUNDS = 12
_PRICE_ROUNDS = 40
# Chains that get a second look where the budget or the error limit cuts the path: only the bytes of
# about one step are at stake there, however many chains there are.
_FILLED_CHAINS = 256
_TRIMMED_CHAINS = 16
Point = tuple[int, float]
"""(bytes, loss) of an option."""


def lower_hull(points: Sequence[Point]) -> list[int]:
    """Indices of the lower convex hull, from the fewest bytes to the least loss, both strict."""
    return _corners(points, _smaller_loss(points))


def _corners(points: Sequence[Point], front: Sequence[int]) -> list[int]:
    """Those of the hull among ``_smaller_loss``.

    Andrew's monotone chain: a corner stays where it lies below the line between its neighbours.
    """
    hull: list[int] = []
    for place in front:
        nbytes, loss = points[place]
        while len(hull) > 1:
            (n0, l0), (n1, l1) = points[hull[-2]], points[hull[-1]]
            if (l0 - l1) * (nbytes - n0) > (l0 - loss) * (n1 - n0):
                break
            hull.pop()
        hull.append(place)
    return hull


def _smaller_loss(points: Sequence[Point]) -> list[int]:
    """Indices by rising bytes, of the options that lose less than all before them."""
    found, least = list[int](), math.inf
    for place in sorted(range(len(points)), key=points.__getitem__):
        loss = points[place][1]
        if not found or loss < least:
            found.append(place)
            least = loss
    return found


def pareto_front(points: Sequence[Point], most: int) -> list[int]:
    """Indices of the options that nothing smaller beats, by rising bytes; the hull, and others.

    Args:
        most: how many to keep where there are more; the hull is always kept.
    """
    front = _smaller_loss(points)
    if len(front) <= most:
        return front
    kept = set(_corners(points, front))
    others = [place for place in front if place not in kept]
    room = max(most - len(kept), 0)
    kept.update(others[number * len(others) // room] for number in range(room))
    return [place for place in front if place in kept]


@dataclass(frozen=True)
class StepPath:
    """Where every chain starts (fewest bytes), and all steps by falling gain per byte.

    A step moves one chain on to its next option on the hull. ``points`` gives the options of a chain
    again; they are not kept, being many.

    Attributes:
        chains, options, sizes: of every step the chain, the option it moves on to, and its bytes.
    """

    points: Callable[[int], Sequence[Point]]
    start: list[int]
    start_nbytes: int
    chains: list[int]
    options: list[int]
    sizes: list[int]

    @cached_property
    def totals(self) -> np.ndarray:
        """Bytes of the first 1, 2, ... steps together, (steps,) int64."""
        return np.cumsum(np.array(self.sizes, dtype=np.int64))

    @cached_property
    def least_step(self) -> int:
        """Bytes of the smallest step."""
        return min(self.sizes, default=0)

    def prefix(self, count: int) -> list[int]:
        """The option of every chain after ``count`` steps."""
        chosen = list(self.start)
        for chain, option in zip(self.chains[:count], self.options):
            chosen[chain] = option
        return chosen


def build_path(count: int, points: Callable[[int], Sequence[Point]]) -> StepPath:
    """Hull of each of ``count`` chains, and their steps merged."""
    start, start_nbytes = list[int](), 0
    # Of plain numbers: there are too many steps for an object each.
    rates, chains, reached, sizes = list[float](), list[int](), list[int](), list[int]()
    for number in range(count):
        options = points(number)
        hull = lower_hull(options)
        start.append(hull[0])
        nbytes, loss = options[hull[0]]
        start_nbytes += nbytes
        least = math.inf
        for option in itertools.islice(hull, 1, None):
            more, less = options[option]
            # Gains per byte fall along a hull, but for rounding.
            least = min(least, (loss - less) / (more - nbytes))
            rates.append(least)
            chains.append(number)
            reached.append(option)
            sizes.append(more - nbytes)
            nbytes, loss = more, less
    # The sort is stable, so that the steps of a chain stay in order.
    order = sorted(range(len(rates)), key=rates.__getitem__, reverse=True)
    merged = ([of[place] for place in order] for of in (chains, reached, sizes))
    return StepPath(points, start, start_nbytes, *merged)


def allocate(path: StepPath, budget: int) -> list[int] | None:
    """The option of every chain that loses least in ``budget`` bytes; None if nothing fits."""
    room = budget - path.start_nbytes
    if room < 0:
        return None
    taken = int(np.searchsorted(path.totals, room, side="right"))
    chosen = path.prefix(taken)
    room -= int(path.totals[taken - 1]) if taken else 0
    blocked: dict[int, None] = {}
    for place in range(taken, len(path.sizes)):
        chain, nbytes = path.chains[place], path.sizes[place]
        if chain in blocked:
            continue
        if nbytes <= room:
            chosen[chain] = path.options[place]
            room -= nbytes
            continue
        blocked[chain] = None
        if room < path.least_step and len(blocked) >= _FILLED_CHAINS:
            break
    # The step that did not fit may span options which do: those above the hull between its ends.
    for chain in itertools.islice(blocked, _FILLED_CHAINS):
        points = path.points(chain)
        nbytes, loss = points[chosen[chain]]
        fitting = [i for i, point in enumerate(points) if point[0] <= nbytes + room]
        best = min(fitting, key=lambda i: (points[i][1], points[i][0]))
        if points[best][1] < loss:
            room -= points[best][0] - nbytes
            chosen[chain] = best
    return chosen


def fit_to_budget(
    path: StepPath, sizes: Callable[[list[int]], tuple[int, int]], limit: int
) -> list[int] | None:
    """Allocate so that the files, headers included, take at most ``limit`` bytes; None if not.

    Headers depend a little on what is chosen, so the allocation is repeated with the overhead that
    the last one had until it fits with the overhead it assumed.

    Args:
        path: the steps of all chains.
        sizes: (bytes of the tensors, bytes of the files) of chosen options.
        limit: bytes that the files may take.
    """

    @cache
    def sized(chosen: tuple[int, ...]) -> tuple[int, int]:
        # Where headers depend much on what is chosen, the same choices come up again and again.
        return sizes(list(chosen))

    data, files = sized(tuple(path.start))
    best = list(path.start) if files <= limit else None
    overhead, best_data = files - data, 0
    # Where the files do not fit with the overhead assumed, and where it turns out to be too much.
    least, most = 0, limit
    for _ in range(_BUDGET_ROUNDS):
        chosen = allocate(path, limit - overhead)
        if chosen is None:
            most = overhead
        else:
            data, files = sized(tuple(chosen))
            if files <= limit:
                most = overhead
                if data > best_data:
                    best, best_data = chosen, data
                if files - data >= overhead or least >= most:
                    break
                overhead = max(files - data, least)
                continue
            least = max(least, overhead + 1)
            overhead = max(files - data, overhead + files - limit)
        if overhead >= most:
            overhead = (least + most) // 2
        if least >= most:
            break
    return best


def cheapest_within(chains: Sequence[Sequence[Point]], limit: float) -> list[int] | None:
    """The options with the fewest bytes whose losses sum to at most ``limit``; None if none do."""
    path = build_path(len(chains), chains.__getitem__)

    def total(chosen: list[int]) -> float:
        return math.fsum(points[option][1] for points, option in zip(chains, chosen))

    count = shortest_prefix(path, lambda chosen: total(chosen) <= limit)
    if count is None:
        return None
    chosen = path.prefix(count)

    def good(chain: int, option: int) -> bool:
        return total([*chosen[:chain], option, *chosen[chain + 1 :]]) <= limit

    trim(path, count, chosen, good)
    return chosen


def shortest_prefix(path: StepPath, good: Callable[[list[int]], bool]) -> int | None:
    """The least number of steps after which ``good`` holds, which must be monotone; None if never.

    Losses fall along the path for every task, so bisection finds it.
    """
    low, high = 0, len(path.sizes)
    if not good(path.prefix(high)):
        return None
    while low < high:
        middle = (low + high) // 2
        if good(path.prefix(middle)):
            high = middle
        else:
            low = middle + 1
    return low


def trim(path: StepPath, count: int, chosen: list[int], good: Callable[[int, int], bool]) -> None:
    """Give each of the chains that the last steps moved the fewest bytes that still are ``good``.

    The last step overshoots what was asked for, by as much as the span of one step.

    Args:
        path, count: ``chosen`` are the options after that many steps of the path; changed in place.
        good: whether (chain, option) may replace what is chosen.
    """
    last = dict.fromkeys(reversed(path.chains[:count]))
    for chain in itertools.islice(last, _TRIMMED_CHAINS):
        points = path.points(chain)
        nbytes, _ = points[chosen[chain]]
        smaller = [i for i, point in enumerate(points) if point[0] < nbytes]
        # Most of the options that save much lose too much; a look at all of them is still cheap.
        for option in sorted(smaller, key=points.__getitem__):
            if good(chain, option):
                chosen[chain] = option
                break


def bisect_price(enough: Callable[[float], bool]) -> tuple[float, float]:
    """(low, high) prices per byte, within 2 %, between which ``enough`` turns from false to true.

    Where the lowest price is enough already, both are that one.
    """
    low, high = 1e-18, 1.0
    if enough(low):
        return low, low
    for _ in range(_PRICE_ROUNDS):
        middle = math.sqrt(low * high)
        if enough(middle):
            high = middle
        else:
            low = middle
        if high / low < 1.02:
            break
    return low, high
