"""Which tasks share a module's basis, and which store it privately: decided by a price per byte.

At a price p per byte, a task stores a module privately in the option that minimises loss + p bytes,
or as a core on a shared basis, whichever is cheaper; a basis is worth having when its sharers save
more than its own bytes cost. For a given price the decision is exact, module by module; bisection
finds the price at which the bytes meet the budget (Lagrangian relaxation, as in Shoham and Gersho,
1988). What is decided here is only *who shares*: ranks, widths and bits follow from ``problem``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from vllm_vlora.adapters.collection import Module
from vllm_vlora.checkpoint.losses import SHARED_LOSS
from vllm_vlora.planning.allocation import Point, bisect_price, lower_hull
from vllm_vlora.planning.joint_curves import JointCurve, core_nbytes, rows_nbytes
from vllm_vlora.planning.number_formats import Formats
from vllm_vlora.planning.survey import Group, Survey
from vllm_vlora.representations.spec import BasisSpec

# A decision is taken with a grid of widths; the plan chooses among all of them.
_WIDTHS = 24


@dataclass(frozen=True)
class Sharing:
    """Who shares: group -> (format label of the basis, core format, tasks)."""

    sharers: dict[Group, tuple[str, str, tuple[int, ...]]]


def decide_sharing(
    survey: Survey,
    formats: Formats,
    nbytes: int,
    private: Set[int] = frozenset(),
    shared_loss: float = SHARED_LOSS,
    names: Sequence[str] | None = None,
) -> Sharing:
    """The sharers at the price at which everything together takes about ``nbytes`` bytes.

    Args:
        private: numbers of tasks that share nothing.
        shared_loss: how much a loss of a shared basis counts.
        names: of the modules that there are; None for all.
    """
    modules = [
        _PricedModule(survey, name, formats, private, shared_loss)
        for name in (survey.collection.modules if names is None else names)
    ]

    def enough(price: float) -> bool:
        return sum(module.nbytes(price) for module in modules) <= nbytes

    _, high = bisect_price(enough)
    sharers: dict[Group, tuple[str, str, tuple[int, ...]]] = {}
    for module in modules:
        sharers.update(module.sharers(high))
    return Sharing(sharers)


class _PricedModule:
    """The options of one module, of all tasks, as arrays of bytes and weighted losses."""

    def __init__(
        self,
        survey: Survey,
        name: str,
        formats: Formats,
        private: Set[int],
        shared_loss: float,
    ) -> None:
        self._module = survey.collection.modules[name]
        row_of = {task: row for row, task in enumerate(self._module.tasks)}
        sizes: list[int] = []
        losses: list[float] = []
        starts: list[int] = []
        tasks = self._module.tasks

        def options(place: int) -> list[Point]:
            curves, weight = (
                survey.private[tasks[place], name].values(),
                survey.weights[tasks[place]],
            )
            return [point for curve in curves for point in curve.points(weight)]

        for points in map(options, range(len(tasks))):
            hull = lower_hull(points)
            starts.append(len(sizes))
            sizes += [points[i][0] for i in hull]
            losses += [points[i][1] for i in hull]
        self._sizes, self._losses = np.array(sizes, dtype=float), np.array(losses)
        self._starts = np.array(starts)
        self._counts = np.diff(self._starts, append=len(sizes))
        self._groups = {
            group: [
                _PricedBasis(
                    survey,
                    self._module,
                    row_of,
                    found.tasks,
                    label,
                    curve,
                    core,
                    private,
                    shared_loss,
                )
                for label, curve in found.curves.items()
                for core in formats.cores(curve.bases[0].format)
            ]
            for group, found in survey.joint.items()
            if group[0] == name
        }
        self._at: dict[float, tuple[float, dict[Group, tuple[str, str, tuple[int, ...]]]]] = {}

    def nbytes(self, price: float) -> float:
        """Bytes of what is best at this price."""
        return self._decide(price)[0]

    def sharers(self, price: float) -> dict[Group, tuple[str, str, tuple[int, ...]]]:
        """Who shares at this price, in groups of two and more."""
        return self._decide(price)[1]

    def _decide(self, price: float) -> tuple[float, dict[Group, tuple[str, str, tuple[int, ...]]]]:
        if price in self._at:
            return self._at[price]
        costs = self._losses + price * self._sizes
        least = np.minimum.reduceat(costs, self._starts)
        # The first of each task's that costs no more.
        best = np.flatnonzero(~(costs > np.repeat(least, self._counts)))
        sizes = self._sizes[best[np.searchsorted(best, self._starts)]]
        chosen: dict[Group, tuple[str, str, tuple[int, ...]]] = {}
        # All groups of a module stand in one stored basis, so they have one format.
        offered = {
            group: [basis.offer(price, least) for basis in bases]
            for group, bases in self._groups.items()
        }
        label = _best_label(offered.values())
        for group, offers in offered.items():
            offer = min((o for o in offers if o.label == label), key=lambda o: o.cost, default=None)
            if offer is not None and offer.cost < 0 and len(offer.rows) > 1:
                tasks = tuple(self._module.tasks[row] for row in offer.rows.tolist())
                chosen[group] = (offer.label, offer.core, tasks)
                sizes[offer.rows] = offer.core_sizes
                sizes = np.append(sizes, offer.basis_size)
        found = float(sizes.sum()), chosen
        self._at = {price: found}
        return found


def _best_label(offered: Iterable[Sequence[_Offer]]) -> str | None:
    saved: dict[str, float] = {}
    for offers in offered:
        by_label: dict[str, float] = {}
        for offer in offers:
            by_label[offer.label] = min(by_label.get(offer.label, 0.0), offer.cost)
        for label, cost in by_label.items():
            saved[label] = saved.get(label, 0.0) + cost
    return min(saved, key=saved.__getitem__, default=None)


@dataclass(frozen=True)
class _Offer:
    """What a basis costs at a price, less what its sharers would cost privately.

    ``rows`` are the sharers' among the module's tasks, ``core_sizes`` the bytes of their cores.
    """

    cost: float
    label: str
    core: str
    rows: np.ndarray
    core_sizes: np.ndarray
    basis_size: float


class _PricedBasis:
    """The widths of one basis in one format with one format of cores."""

    def __init__(
        self,
        survey: Survey,
        module: Module,
        row_of: Mapping[int, int],
        tasks: tuple[int, ...],
        label: str,
        curve: JointCurve,
        core: str,
        private: Set[int],
        shared_loss: float,
    ) -> None:
        self._label, self._core = label, core
        self._rows = np.array([row_of[task] for task in tasks])
        by_task = dict(zip(module.tasks, module.ranks))
        ranks = [by_task[task] for task in tasks]
        step = -(-len(curve.bases) // _WIDTHS)
        columns = list(range(len(curve.bases) - 1, -1, -step))
        widths = [curve.bases[column] for column in columns]
        scale = torch.tensor([survey.weights[task] for task in tasks], dtype=torch.float64)
        losses = curve.losses(core, ranks, False)[:, columns] * scale[:, None] * shared_loss
        losses[[place for place, task in enumerate(tasks) if task in private]] = torch.inf
        self._losses = losses.numpy()
        self._basis_sizes = np.array(
            [rows_nbytes(basis, module.d_out, module.d_in) for basis in widths], dtype=float
        )
        self._core_sizes = _core_sizes(widths, ranks, core)

    def offer(self, price: float, least: np.ndarray) -> _Offer:
        """The best width, for the tasks that gain by it."""
        gains = self._losses + price * self._core_sizes - least[self._rows][:, None]
        costs = np.minimum(gains, 0).sum(axis=0) + price * self._basis_sizes
        width = int(np.argmin(costs))
        places = np.flatnonzero(gains[:, width] < 0)
        return _Offer(
            float(costs[width]),
            self._label,
            self._core,
            self._rows[places],
            self._core_sizes[places, width],
            float(self._basis_sizes[width]),
        )


def _core_sizes(widths: Sequence[BasisSpec], ranks: Sequence[int], core: str) -> np.ndarray:
    distinct, places = np.unique(ranks, return_inverse=True)
    sizes = [[core_nbytes(basis, rank, core) for basis in widths] for rank in distinct.tolist()]
    return np.array(sizes, dtype=float)[places]
