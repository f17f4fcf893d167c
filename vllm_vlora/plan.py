"""Plans: a rank, width and number format for every module of every task, under a budget.

Bytes are those of the files, headers included, and known exactly. Losses come from a ``Survey``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_vlora.allocation import (
    Point,
    build_path,
    cheapest_within,
    fit_to_budget,
    shortest_prefix,
    trim,
)
from vllm_vlora.collection import Collection, Module
from vllm_vlora.manifest import (
    BASIS_SHARD_BYTES,
    EXTRA_PREFIX,
    BasisSpec,
    ModuleSpec,
    Segment,
    basis_nbytes,
    safetensors_nbytes,
    task_tensor_sizes,
)
from vllm_vlora.measure import JointCurve, PrivateCurve, PrivateOption, joint_nbytes
from vllm_vlora.representations import core_shape
from vllm_vlora.survey import Survey

MIXED = "mixed"
"""In place of a format's or a representation's name where several are in use."""

_CLEARLY = 0.98


@dataclass(frozen=True, eq=False)
class Plan:
    """A choice for every module of every task.

    Attributes:
        private: (task number, module name) -> option. joint: module name -> (basis, core format).
        losses: of each task, ||delta_W' - delta_W||_F^2 / ||delta_W||_F^2.
        data_nbytes: of the tensors. nbytes: of the files, headers included.
    """

    representation: str
    format: str
    private: dict[tuple[int, str], PrivateOption]
    joint: dict[str, tuple[BasisSpec, str]]
    losses: torch.Tensor
    data_nbytes: int
    nbytes: int

    @property
    def rms_error(self) -> float:
        """Root mean square of the tasks' relative errors."""
        return math.sqrt(float(self.losses.mean()))

    @property
    def mean_error(self) -> float:
        """Mean of the tasks' relative errors."""
        return float(self.losses.sqrt().mean())

    @property
    def worst_error(self) -> float:
        """The greatest relative error of a task."""
        return math.sqrt(float(self.losses.max()))


@dataclass(frozen=True)
class Budget:
    """What a plan may take, or what it may lose; at most one of the two is set.

    Attributes:
        nbytes: of all files.
        loss: ||delta_W' - delta_W||_F^2 / ||delta_W||_F^2 of the worst task.
    """

    nbytes: int | None = None
    loss: float | None = None

    def order(self, plan: Plan) -> tuple[float, float]:
        """Sorts plans that meet the budget, the best one first."""
        if self.loss is not None:
            return plan.nbytes, plan.rms_error
        return plan.rms_error, plan.nbytes

    def clearly_prefers(self, plan: Plan, other: Plan) -> bool:
        """Whether measuring the other plan's errors could not make it the better one."""
        if self.loss is not None:
            return plan.nbytes < other.nbytes
        return plan.rms_error < other.rms_error * _CLEARLY

    def is_perfect(self, plan: Plan) -> bool:
        """Whether no plan can be better."""
        return self.loss is None and plan.worst_error == 0


# --- what there is to choose ---------------------------------------------------------------------


@dataclass(frozen=True)
class PrivateEntry:
    """How one module of one task is stored privately: an option of one of its curves."""

    task: int
    module: Module
    curves: Sequence[PrivateCurve]
    weight: float

    def option(self, number: int) -> PrivateOption:
        """The options of all curves, one curve after another."""
        for curve in self.curves:
            if number < curve.count:
                return curve.option(number)
            number -= curve.count
        raise IndexError(number)

    def points(self) -> list[Point]:
        """(bytes, loss) of every option."""
        return [point for curve in self.curves for point in curve.points(self.weight)]

    def best(self) -> int:
        """The option that loses least; the adapter's own factors where nothing loses less."""
        options = [self.option(number) for number in range(sum(c.count for c in self.curves))]
        return min(range(len(options)), key=lambda i: (options[i].loss, not options[i].original, i))

    def add_losses(self, option: int, losses: list[float]) -> None:
        """Add what an option loses to the task's sum."""
        losses[self.task] += self.option(option).loss * self.weight


@dataclass(frozen=True)
class JointEntry:
    """The width of one module's basis: an option of a curve.

    ``losses`` are the curve's, relative to each task's whole delta_W.
    """

    module: Module
    curve: JointCurve
    losses: torch.Tensor

    def nbytes(self, option: int) -> int:
        """Bytes of the basis and of all its cores."""
        module, curve = self.module, self.curve
        return joint_nbytes(
            curve.bases[option], module.d_out, module.d_in, module.ranks, curve.core_format
        )

    def points(self) -> list[Point]:
        """(bytes, loss) of every option."""
        losses = self.losses.sum(dim=0).tolist()
        return [(self.nbytes(option), loss) for option, loss in enumerate(losses)]

    def best(self) -> int:
        """The option that loses least."""
        points = self.points()
        return min(range(len(points)), key=lambda i: (points[i][1], points[i][0]))

    def add_losses(self, option: int, losses: list[float]) -> None:
        """Add what an option loses to every task's sum."""
        for task, loss in zip(self.module.tasks, self.losses[:, option].tolist()):
            losses[task] += loss


Entry = PrivateEntry | JointEntry


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


def joint_problem(survey: Survey, label: str) -> Problem:
    """Bases in one format; beside them, factors may take whichever format suits them best."""
    entries: list[Entry] = []
    for name, joint_curves in survey.joint.items():
        module, curve = survey.collection.modules[name], joint_curves[label]
        weights = [survey.weights[task] for task in module.tasks]
        scale = torch.tensor(weights, dtype=torch.float64)
        entries.append(JointEntry(module, curve, curve.losses * scale[:, None]))
    entries += [
        _private_entry(survey, task, name, list(curves.values()))
        for (task, name), curves in survey.private.items()
        if name not in survey.joint
    ]
    return Problem("joint", label, entries, survey.collection)


def _private_entry(
    survey: Survey, task: int, name: str, curves: Sequence[PrivateCurve]
) -> PrivateEntry:
    return PrivateEntry(task, survey.collection.modules[name], curves, survey.weights[task])


# --- choosing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Entries of which each needs an option."""

    representation: str
    format: str
    entries: list[Entry]
    collection: Collection

    def solve(self, budget: Budget) -> Plan | None:
        """The plan that loses least in the budget's bytes, or takes least within its loss."""
        if budget.loss is not None:
            return self.cheapest(budget.loss)
        if budget.nbytes is None:
            return self._plan(self._best())
        path = build_path(len(self.entries), self._points)

        def sizes(options: list[int]) -> tuple[int, int]:
            plan = self._plan(options)
            return plan.data_nbytes, plan.nbytes

        chosen = fit_to_budget(path, sizes, budget.nbytes)
        return None if chosen is None else self._plan(chosen)

    def nearest(self, budget: Budget) -> float:
        """The least bytes, or the least error of the worst task, that can be had at all."""
        if budget.loss is not None:
            return self._plan(self._best()).worst_error
        return self._plan(build_path(len(self.entries), self._points).start).nbytes

    def cheapest(self, limit: float) -> Plan | None:
        """The fewest bytes with every task's loss within the limit."""
        chosen = (
            self._cheapest_by_task(limit)
            if self.representation == "private"
            else self._cheapest_together(limit)
        )
        return None if chosen is None else self._plan(chosen)

    def _cheapest_by_task(self, limit: float) -> list[int] | None:
        """Private tasks share nothing, so each is a problem of its own."""
        by_task: dict[int, list[int]] = {}
        for number, entry in enumerate(self.entries):
            assert isinstance(entry, PrivateEntry)
            by_task.setdefault(entry.task, []).append(number)
        chosen = [0] * len(self.entries)
        for numbers in by_task.values():
            found = cheapest_within([self._points(number) for number in numbers], limit)
            if found is None:
                return None
            for number, option in zip(numbers, found):
                chosen[number] = option
        return chosen

    def _cheapest_together(self, limit: float) -> list[int] | None:
        path = build_path(len(self.entries), self._points)

        def within(options: list[int]) -> bool:
            return float(self._losses(options).max()) <= limit

        count = shortest_prefix(path, within)
        if count is None:
            return None
        chosen = path.prefix(count)

        def good(chain: int, option: int) -> bool:
            return within([*chosen[:chain], option, *chosen[chain + 1 :]])

        trim(path, count, chosen, good)
        return chosen

    def _points(self, number: int) -> list[Point]:
        return self.entries[number].points()

    def _best(self) -> list[int]:
        return [entry.best() for entry in self.entries]

    def _losses(self, chosen: list[int]) -> torch.Tensor:
        losses = [0.0] * len(self.collection.adapters)
        for entry, option in zip(self.entries, chosen):
            entry.add_losses(option, losses)
        return torch.tensor(losses, dtype=torch.float64)

    def _plan(self, chosen: list[int]) -> Plan:
        private: dict[tuple[int, str], PrivateOption] = {}
        joint: dict[str, tuple[BasisSpec, str]] = {}
        data_nbytes = 0
        for entry, number in zip(self.entries, chosen):
            if isinstance(entry, PrivateEntry):
                option = private[entry.task, entry.module.name] = entry.option(number)
                data_nbytes += option.nbytes
            else:
                joint[entry.module.name] = entry.curve.bases[number], entry.curve.core_format
                data_nbytes += entry.nbytes(number)
        return Plan(
            self.representation,
            self.format,
            private,
            joint,
            self._losses(chosen),
            data_nbytes,
            _file_nbytes(self.collection, private, joint),
        )


def make_plans(problems: Iterable[Problem], budget: Budget) -> tuple[list[Plan], list[float]]:
    """The plans that meet the budget; if there are none, how near each problem comes."""
    plans: list[Plan] = []
    misses: list[float] = []
    for problem in problems:
        plan = problem.solve(budget)
        if plan is not None:
            plans.append(plan)
        elif not plans:
            misses.append(problem.nearest(budget))
    return plans, [] if plans else misses


# --- sizes ---------------------------------------------------------------------------------------


def _file_nbytes(
    collection: Collection,
    private: dict[tuple[int, str], PrivateOption],
    joint: dict[str, tuple[BasisSpec, str]],
) -> int:
    """Bytes of every safetensors file that a plan makes, extra tensors' data left out."""
    specs = [
        ModuleSpec(
            module.name,
            module.d_in,
            module.d_out,
            module.kind,
            joint[module.name][0] if module.name in joint else None,
        )
        for module in collection.modules.values()
    ]
    basis = basis_nbytes(specs)
    # Each further shard has a header of its own: a length word, padding and two braces.
    total = basis + 64 * (basis // BASIS_SHARD_BYTES)
    for task, adapter in enumerate(collection.adapters):
        segments = []
        for name, module in adapter.modules.items():
            index = collection.modules[name].index
            if name in joint:
                spec, core_format = joint[name]
                core, rank, _ = core_shape(module.rank, spec.k_out, spec.k_in)
                segments.append(Segment(index, "joint", core_format, rank, core=core))
            else:
                option = private[task, name]
                segments.append(Segment(index, "private", option.format, option.rank))
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (dtype, (count,))
            for name, (dtype, count) in task_tensor_sizes(segments, specs).items()
        }
        extra = {EXTRA_PREFIX + name: spec for name, spec in adapter.extra.items()}
        total += safetensors_nbytes(tensors | extra)
        total -= sum(math.prod(shape) * dtype.itemsize for dtype, shape in extra.values())
    return total
