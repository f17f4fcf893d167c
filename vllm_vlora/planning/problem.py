"""What there is to choose for every module of every task, and the choice under a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vllm_vlora.adapters.collection import Collection, Module
from vllm_vlora.checkpoint.task_entry import MIXED
from vllm_vlora.planning.allocation import (
    Point,
    StepPath,
    build_path,
    cheapest_within,
    fit_to_budget,
    shortest_prefix,
    trim,
)
from vllm_vlora.planning.file_sizes import plan_nbytes
from vllm_vlora.planning.flat_curves import FlatCurve, flat_nbytes, loadings_nbytes
from vllm_vlora.planning.joint_curves import JointCurve, joint_nbytes
from vllm_vlora.planning.plan import Budget, Plan, SharedBasis, SharedFlat
from vllm_vlora.planning.private_curves import Curve, PrivateOption
from vllm_vlora.planning.sharing import Sharing
from vllm_vlora.planning.survey import Group, Survey
from vllm_vlora.representations.spec import BasisSpec

_GATE_ROUNDS = 24


@dataclass(frozen=True)
class PrivateEntry:
    """How one module of one task is stored privately: an option of one of its curves."""

    task: int
    module: Module
    curves: Sequence[Curve]
    weight: float

    def option(self, number: int) -> PrivateOption:
        """The options of all curves, one curve after another."""
        for curve in self.curves:
            if number < curve.count:
                return curve.option(number)
            number -= curve.count
        raise IndexError(number)

    def points(self, favour: Sequence[float] | None = None) -> list[Point]:
        """(bytes, loss) of every option; ``favour`` multiplies the losses of each task."""
        weight = self.weight * (1.0 if favour is None else favour[self.task])
        return [point for curve in self.curves for point in curve.points(weight)]

    def best(self) -> int:
        """The option that loses least; the adapter's own factors where nothing loses less."""
        options = [self.option(number) for number in range(sum(c.count for c in self.curves))]
        return min(range(len(options)), key=lambda i: (options[i].loss, not options[i].original, i))

    def add_losses(self, option: int, losses: list[float]) -> None:
        """Add what an option loses to the task's sum."""
        for curve in self.curves:
            if option < curve.count:
                losses[self.task] += curve.loss(option) * self.weight
                return
            option -= curve.count
        raise IndexError(option)


class _SharedEntry:
    """What several tasks share of one module: an option of a curve.

    ``losses`` are the sharers', relative to each task's whole delta_W: (tasks, options).
    """

    tasks: tuple[int, ...]
    losses: torch.Tensor

    def nbytes(self, option: int) -> int:
        """Bytes of what is shared and of what every sharer has of its own."""
        raise NotImplementedError

    def points(self, favour: Sequence[float] | None = None) -> list[Point]:
        """(bytes, loss) of every option; ``favour`` multiplies the losses of each task."""
        losses = self.losses
        if favour is not None:
            own = [favour[task] for task in self.tasks]
            losses = losses * torch.tensor(own, dtype=torch.float64)[:, None]
        return [(self.nbytes(option), loss) for option, loss in enumerate(losses.sum(0).tolist())]

    def best(self) -> int:
        """The option that loses least."""
        points = self.points()
        return min(range(len(points)), key=lambda i: (points[i][1], points[i][0]))

    def add_losses(self, option: int, losses: list[float]) -> None:
        """Add what an option loses to every sharer's sum."""
        for task, loss in zip(self.tasks, self.losses[:, option].tolist()):
            losses[task] += loss


@dataclass(frozen=True)
class JointEntry(_SharedEntry):
    """The widths of one group's basis, each with all cores on it."""

    group: Group
    module: Module
    tasks: tuple[int, ...]
    bases: Sequence[BasisSpec]
    core_format: str
    factored: bool
    losses: torch.Tensor

    def nbytes(self, option: int) -> int:
        """Bytes of the basis and of all its cores."""
        return self._sizes[option]

    @cached_property
    def _sizes(self) -> list[int]:
        module = self.module
        by_task = dict(zip(module.tasks, module.ranks))
        ranks = [by_task[task] for task in self.tasks]
        core, factored = self.core_format, self.factored
        return [
            joint_nbytes(basis, module.d_out, module.d_in, ranks, core, factored)
            for basis in self.bases
        ]

    def shared(self, option: int) -> SharedBasis:
        """The basis that an option stands for."""
        return SharedBasis(self.bases[option], self.core_format, self.tasks, self.factored)


@dataclass(frozen=True)
class FlatEntry(_SharedEntry):
    """The width of one module's flat basis, each with all loadings on it."""

    module: Module
    tasks: tuple[int, ...]
    curve: FlatCurve
    losses: torch.Tensor

    def nbytes(self, option: int) -> int:
        """Bytes of the basis and of all loadings."""
        spec = self.curve.specs[option]
        own = loadings_nbytes(spec, self.curve.loadings_format)
        return flat_nbytes(spec, self.module.d_out, self.module.d_in) + len(self.tasks) * own

    def shared(self, option: int) -> SharedFlat:
        """The basis that an option stands for."""
        return SharedFlat(self.curve.specs[option], self.curve.loadings_format, self.tasks)


Entry = PrivateEntry | JointEntry | FlatEntry


def private_problems(survey: Survey, labels: Sequence[str]) -> Iterator[Problem]:
    """Everything private: in each format alone, and in whichever suits a module best."""
    choices = [(label, [label]) for label in labels]
    if len(labels) > 1:
        choices.append((MIXED, list(labels)))
    for format, allowed in choices:
        entries: list[Entry] = [
            _private_entry(survey, task, name, [curves[label] for label in allowed])
            for (task, name), curves in survey.private.items()
        ]
        yield Problem("private", format, entries, survey.collection)


def joint_problems(
    survey: Survey, label: str, cores: Sequence[str], representation: str, factored: bool
) -> Iterator[Problem]:
    """All tasks of a fitted group on its basis, in one format, with each of these core formats.

    Beside them, factors may take whichever format suits them best.
    """
    for core in cores:
        sharers = {g: (label, core, found.tasks) for g, found in survey.joint.items()}
        yield _shared_problem(survey, sharers, representation, label, factored)


def mixed_problem(survey: Survey, sharing: Sharing) -> Problem:
    """Some modules of some tasks on bases, and the rest private."""
    return _shared_problem(survey, sharing.sharers, MIXED, MIXED)


def flat_problem(survey: Survey, label: str) -> Problem:
    """All tasks of the modules that have a flat basis on it; the other modules private."""
    entries: list[Entry] = []
    for name, group in survey.flat.items():
        weights = torch.tensor([survey.weights[t] for t in group.tasks], dtype=torch.float64)
        curve = group.curves[label]
        losses = curve.losses * weights[:, None]
        entries.append(FlatEntry(survey.collection.modules[name], group.tasks, curve, losses))
    entries += [
        _private_entry(survey, task, name, list(curves.values()))
        for (task, name), curves in survey.private.items()
        if name not in survey.flat
    ]
    return Problem("flat", label, entries, survey.collection)


def _shared_problem(
    survey: Survey,
    sharers: Mapping[Group, tuple[str, str, tuple[int, ...]]],
    representation: str,
    format: str,
    factored: bool = False,
) -> Problem:
    entries: list[Entry] = []
    shared: set[tuple[int, str]] = set()
    for group, (label, core, tasks) in sharers.items():
        curve = survey.joint[group].curves[label]
        entries.append(_joint_entry(survey, group, curve, core, tasks, factored))
        shared.update((task, group[0]) for task in tasks)
    entries += [
        _private_entry(survey, task, name, list(curves.values()))
        for (task, name), curves in survey.private.items()
        if (task, name) not in shared
    ]
    return Problem(representation, format, entries, survey.collection)


def _joint_entry(
    survey: Survey,
    group: Group,
    curve: JointCurve,
    core: str,
    tasks: tuple[int, ...],
    factored: bool,
) -> JointEntry:
    module, found = survey.collection.modules[group[0]], survey.joint[group]
    ranks = dict(zip(module.tasks, module.ranks))
    place_of = {task: place for place, task in enumerate(found.tasks)}
    places = [place_of[task] for task in tasks]
    losses = curve.losses(core, [ranks[task] for task in found.tasks], factored)[places]
    weights = torch.tensor([survey.weights[task] for task in tasks], dtype=torch.float64)
    losses = losses * weights[:, None]
    return JointEntry(group, module, tasks, curve.bases, core, factored, losses)


def _private_entry(survey: Survey, task: int, name: str, curves: Sequence[Curve]) -> PrivateEntry:
    return PrivateEntry(task, survey.collection.modules[name], curves, survey.weights[task])


@dataclass(frozen=True)
class Problem:
    """Entries of which each needs an option."""

    representation: str
    format: str
    entries: list[Entry]
    collection: Collection

    def solve(self, budget: Budget) -> Plan | None:
        """The plan that loses least in the budget's bytes, or takes least within its limits."""
        if budget.by_size:
            assert budget.limits is not None
            return self.cheapest(budget.limits)
        if budget.nbytes is None:
            return self._plan(self._best())
        favour = [1.0] * len(self.collection.adapters)
        for _ in range(_GATE_ROUNDS):
            plan = self._within(budget.nbytes, favour)
            if plan is None or budget.allows(plan.losses):
                raised = tuple(task for task, value in enumerate(favour) if value > 1)
                return plan and replace(plan, raised=raised)
            assert budget.limits is not None
            for task in torch.nonzero(plan.losses > budget.limits).flatten().tolist():
                favour[task] *= 2
        return None

    def nearest(self, budget: Budget) -> float:
        """The least bytes, or the least error of the worst task, that can be had at all."""
        if budget.by_size:
            return self._plan(self._best()).worst_error
        if budget.limits is not None:
            plan = self.cheapest(budget.limits)
            return math.inf if plan is None else plan.nbytes
        return self._plan(self._path().start).nbytes

    def cheapest(self, limits: torch.Tensor) -> Plan | None:
        """The fewest bytes with every task's loss within its limit."""
        if any(not isinstance(entry, PrivateEntry) for entry in self.entries):
            chosen = self._cheapest_together(limits)
        else:
            chosen = self._cheapest_private([0] * len(self.entries), limits.tolist())
        return None if chosen is None else self._plan(chosen)

    def _within(self, nbytes: int, favour: Sequence[float]) -> Plan | None:
        fitting: dict[tuple[int, ...], Plan] = {}

        def sizes(options: list[int]) -> tuple[int, int]:
            plan = self._sized(options)
            if plan.nbytes <= nbytes:
                fitting[tuple(options)] = plan
            return plan.data_nbytes, plan.nbytes

        chosen = fit_to_budget(self._path(favour), sizes, nbytes)
        return None if chosen is None else self._measured(fitting[tuple(chosen)], chosen)

    def _path(self, favour: Sequence[float] | None = None) -> StepPath:
        return build_path(len(self.entries), lambda number: self.entries[number].points(favour))

    def _cheapest_private(self, chosen: list[int], rooms: Sequence[float]) -> list[int] | None:
        """Private modules share nothing, so each task is a problem of its own.

        Args:
            chosen: options, of which those of private entries are replaced.
            rooms: what the private modules of each task may lose together.
        """
        by_task: dict[int, list[int]] = {}
        for number, entry in enumerate(self.entries):
            if isinstance(entry, PrivateEntry):
                by_task.setdefault(entry.task, []).append(number)
        chosen = list(chosen)
        for task, numbers in by_task.items():
            found = cheapest_within([self.entries[n].points() for n in numbers], rooms[task])
            if found is None:
                return None
            for number, option in zip(numbers, found):
                chosen[number] = option
        return chosen

    def _cheapest_together(self, limits: torch.Tensor) -> list[int] | None:
        path = self._path([1 / max(limit, 1e-30) for limit in limits.tolist()])

        def within(options: list[int]) -> bool:
            return bool((self._losses(options) <= limits).all())

        count = shortest_prefix(path, within)
        if count is None:
            return None
        chosen = path.prefix(count)
        rest: dict[int, list[float]] = {}

        def good(chain: int, option: int) -> bool:
            # What the other chains lose does not change while one of them is tried.
            if chain not in rest:
                rest.clear()
                rest[chain] = self._sums(chosen, leave_out=chain)
            losses = list(rest[chain])
            self.entries[chain].add_losses(option, losses)
            return bool((torch.tensor(losses, dtype=torch.float64) <= limits).all())

        trim(path, count, chosen, good)
        # The worst task decided how far the path went; the private modules of the others may lose
        # what their own limits leave.
        losses = [0.0] * len(self.collection.adapters)
        for entry, option in zip(self.entries, chosen):
            if not isinstance(entry, PrivateEntry):
                entry.add_losses(option, losses)
        rooms = [limit - loss for limit, loss in zip(limits.tolist(), losses)]
        return self._cheapest_private(chosen, rooms) or chosen

    def _best(self) -> list[int]:
        return [entry.best() for entry in self.entries]

    def _losses(self, chosen: list[int]) -> torch.Tensor:
        return torch.tensor(self._sums(chosen), dtype=torch.float64)

    def _private_losses(self, chosen: list[int]) -> torch.Tensor:
        losses = [0.0] * len(self.collection.adapters)
        for entry, option in zip(self.entries, chosen):
            if isinstance(entry, PrivateEntry):
                entry.add_losses(option, losses)
        return torch.tensor(losses, dtype=torch.float64)

    def _sums(self, chosen: list[int], leave_out: int = -1) -> list[float]:
        losses = [0.0] * len(self.collection.adapters)
        for chain, (entry, option) in enumerate(zip(self.entries, chosen)):
            if chain != leave_out:
                entry.add_losses(option, losses)
        return losses

    def _plan(self, chosen: list[int]) -> Plan:
        return self._measured(self._sized(chosen), chosen)

    def _measured(self, sized: Plan, chosen: list[int]) -> Plan:
        return replace(
            sized,
            losses=self._losses(chosen),
            private_losses=self._private_losses(chosen),
        )

    def _sized(self, chosen: list[int]) -> Plan:
        """A plan whose bytes are known, without its losses."""
        private: dict[tuple[int, str], PrivateOption] = {}
        joint: dict[Group, SharedBasis] = {}
        flat: dict[str, SharedFlat] = {}
        data_nbytes = 0
        for entry, number in zip(self.entries, chosen):
            if isinstance(entry, PrivateEntry):
                option = private[entry.task, entry.module.name] = entry.option(number)
                data_nbytes += option.nbytes
                continue
            data_nbytes += entry.nbytes(number)
            if isinstance(entry, FlatEntry):
                flat[entry.module.name] = entry.shared(number)
            else:
                joint[entry.group] = entry.shared(number)
        none = torch.empty(0, dtype=torch.float64)
        plan = Plan(
            self.representation, self.format, private, joint, flat, none, data_nbytes, 0, none
        )
        return replace(plan, nbytes=plan_nbytes(self.collection, plan))


def make_plans(problems: Iterable[Problem], budget: Budget) -> tuple[list[Plan], list[float]]:
    """The plans that meet the budget; if there are none, how near each problem comes."""
    plans: list[Plan] = []
    misses: list[float] = []
    for problem in problems:
        own = budget.of_kind(problem.representation)
        plan = problem.solve(own)
        if plan is not None:
            plans.append(plan)
        elif not plans:
            misses.append(problem.nearest(own))
    return plans, [] if plans else misses
