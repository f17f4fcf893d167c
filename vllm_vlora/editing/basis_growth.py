"""Bases that grow for new tasks: by which rows, for whom, and at whose cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllm_vlora.adapters.collection import Module, Progress
from vllm_vlora.checkpoint.layout import basis_nbytes
from vllm_vlora.editing.growth_offers import (
    Offer,
    ResidualFit,
    decide_growth,
    grown,
    growth_limits,
    make_offer,
    options_hull,
)
from vllm_vlora.editing.new_tasks import Choices, NewTasks
from vllm_vlora.editing.projection import (
    BlockMeter,
    CoreOption,
    ModuleChoices,
    Rows,
    Target,
    TaskPlan,
    choices_of,
)
from vllm_vlora.fitting.whitening import Metric
from vllm_vlora.planning.joint_curves import rows_nbytes
from vllm_vlora.planning.scratch import FittedBases
from vllm_vlora.representations.spec import BasisSpec, ModuleSpec
from vllm_vlora.representations.stored import Basis

# Tasks for which growing did not pay are taken out and the rest is fitted again, this often.
_GROWTH_ROUNDS = 6
# Growth is decided for these parts of the bytes, and the best one is kept: a price does not know what
# files' headers cost, nor what is left over where one task's budget ends.
_ROOMS = (1.0, 0.7, 0.5)
_LIMITS = (1.0, 2.0, 0.5)


@dataclass
class Growth:
    """The rows by which bases grow, and for whom.

    Attributes:
        bases: keeps the rows, as group 0. rows: module name -> (rows of U, rows of V).
        plans: of the tasks that they were fitted to. charges: what each pays for them, in bytes.
    """

    bases: FittedBases
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    plans: dict[int, TaskPlan] = field(default_factory=dict)
    charges: dict[int, float] = field(default_factory=dict)


class BasisGrowth:
    """Lets the bases of a checkpoint grow by directions of new tasks.

    Args:
        scratch: an existing folder, where the new rows are kept.
    """

    def __init__(self, new: NewTasks, scratch: Path, progress: Progress) -> None:
        self._new = new
        self._scratch = scratch
        self._progress = progress

    def grow(
        self,
        choices: Choices,
        targets: Sequence[Target],
    ) -> Growth | None:
        """Let bases grow for the tasks that keep more by it; None where there are none.

        The new rows are paid for out of these tasks' targets. A task that would keep less than its
        whole target keeps without new rows is left out, and the rest is tried again.
        """
        takers = [task for task, target in enumerate(targets) if target != Target()]
        for attempt in range(_GROWTH_ROUNDS):
            if not takers:
                break
            self._progress("grow", attempt, _GROWTH_ROUNDS)
            growth = Growth(FittedBases(self._scratch / f"growth{attempt}"))
            offers = self._offers(choices, takers, targets, growth)
            best, gains = growth, dict[int, float]()
            for rows in self._decide(choices, offers, takers, targets):
                tried = Growth(growth.bases, rows)
                fresh = {**choices, **self._measure_grown(choices, takers, tried)}
                self._plan_grown(fresh, takers, targets, tried)
                found = {t: self._gain(choices, t, targets[t], tried) for t in takers}
                found = {task: gain for task, gain in found.items() if gain > 0}
                if sum(found.values()) > sum(gains.values()):
                    best, gains = tried, found
            if len(gains) == len(takers):
                return best
            takers = list(gains)
        return None

    def _plan_grown(
        self,
        choices: Choices,
        takers: Sequence[int],
        targets: Sequence[Target],
        growth: Growth,
    ) -> None:
        """Plan the tasks on grown bases, and give back the rows that none of them uses."""
        budget = sum(targets[task].nbytes or 0 for task in takers)
        cost = self.nbytes(growth)
        for task in takers:
            target = targets[task]
            if target.nbytes is not None:
                target = Target(target.nbytes - math.ceil(cost * target.nbytes / budget))
            plan = self._new.planner(choices, task).best(target)
            if plan is not None:
                growth.plans[task] = plan
        users = self._trim(growth)
        for name, tasks in users.items():
            for task in tasks:
                share = self._rows_nbytes(name, growth.rows[name]) / len(tasks)
                growth.charges[task] = growth.charges.get(task, 0.0) + share

    def _trim(self, growth: Growth) -> dict[str, list[int]]:
        """Keep the rows that are used; returns who uses new rows of each module."""
        used: dict[str, tuple[int, int]] = {}
        users: dict[str, list[int]] = {}
        for task, plan in growth.plans.items():
            for name, option in zip(self._new.collection.adapters[task].modules, plan.options):
                spec = self._new.specs[name].basis
                if not isinstance(option, CoreOption) or spec is None:
                    continue
                more = option.rows[1] - spec.k_out, option.rows[3] - spec.k_in
                if max(more) > 0:
                    most = used.get(name, (0, 0))
                    used[name] = max(most[0], more[0]), max(most[1], more[1])
                    users.setdefault(name, []).append(task)
        growth.rows = used
        return users

    def nbytes(self, growth: Growth) -> int:
        """What the basis files grow by, headers included."""
        return basis_nbytes(self.modules(growth)) - basis_nbytes(self.modules(None))

    def modules(self, growth: Growth | None) -> list[ModuleSpec]:
        """The modules as they are to be written."""
        specs = []
        for spec in self._new.specs.values():
            more = (0, 0) if growth is None else growth.rows.get(spec.name, (0, 0))
            basis = spec.basis
            if basis is not None:
                basis = BasisSpec(basis.k_out + more[0], basis.k_in + more[1], basis.format)
            specs.append(ModuleSpec(spec.name, spec.d_in, spec.d_out, spec.kind, basis, spec.flat))
        return specs

    def _rows_nbytes(self, name: str, rows: tuple[int, int]) -> int:
        spec = self._new.specs[name]
        assert spec.basis is not None
        return rows_nbytes(BasisSpec(*rows, spec.basis.format), spec.d_out, spec.d_in)

    def _gain(
        self,
        choices: Choices,
        task: int,
        target: Target,
        growth: Growth,
    ) -> float:
        """What a task loses less (or, within an error, takes less) than without new rows.

        Zero if it has no use for them or does better without.
        """
        plan, charge = growth.plans.get(task), math.ceil(growth.charges.get(task, 0.0))
        if plan is None or not charge:
            return 0.0
        if target.nbytes is not None:
            target = Target(max(target.nbytes, plan.nbytes + charge))
        without = self._new.planner(choices, task).best(target)
        if without is None:
            return math.inf
        if target.nbytes is None:
            return float(without.nbytes - plan.nbytes - charge)
        return without.loss - plan.loss

    def _offers(
        self,
        choices: Choices,
        takers: Sequence[int],
        targets: Sequence[Target],
        growth: Growth,
    ) -> list[Offer]:
        names = [
            name for name, blocks in self._new.blocks.items() if self._last_block(name, blocks)
        ]
        offers = []
        taking = set(takers)
        for module, basis in self._new.walk(names):
            assert basis is not None
            tasks = tuple(task for task in module.tasks if task in taking)
            if tasks:
                offer = self._offer(module, basis, tasks, choices, takers, targets, growth)
                offers += [] if offer is None else [offer]
        return offers

    def _last_block(self, name: str, blocks: Sequence[Rows]) -> Rows | None:
        """The block at the end of a module's basis, behind which it can grow."""
        basis = self._new.specs[name].basis
        if basis is None:
            return None
        return next((r for r in blocks if (r[1], r[3]) == (basis.k_out, basis.k_in)), None)

    def _offer(
        self,
        module: Module,
        basis: Basis,
        tasks: tuple[int, ...],
        choices: Choices,
        takers: Sequence[int],
        targets: Sequence[Target],
        growth: Growth,
    ) -> Offer | None:
        name, spec = module.name, self._new.specs[module.name].basis
        rows = self._last_block(name, self._new.blocks[name])
        assert spec is not None
        assert rows is not None
        most = growth_limits(module, spec, tasks, self._share(module, tasks, takers, targets))
        if max(most) < 1:
            return None
        metric = self._new.surveyor.metric(name)
        fit = ResidualFit(basis, rows, metric, *most)
        factors = self._new.collection.read_module
        for task, (a, b, scale) in zip(tasks, factors(module, tasks)):
            fit.add(a, b, scale, choices[task, name].norm)
        u, v = fit.directions()
        growth.bases.save(module, 0, u, v)
        more = BasisSpec(len(u), len(v), spec.format)
        block = self._grown_block(module, basis, more, growth, metric)
        projections = [block.project(*f) for f in factors(module, tasks)]
        weights = [self._weight(choices, task) for task in tasks]
        mine = [choices[task, name] for task in tasks]
        return make_offer(
            module,
            spec,
            block,
            projections,
            mine,
            tasks,
            weights,
            self._new.cores(self._new.specs[name]),
        )

    def _share(
        self,
        module: Module,
        tasks: Sequence[int],
        takers: Sequence[int],
        targets: Sequence[Target],
    ) -> float:
        """This module's even share of the bytes of the tasks that may grow it."""
        adapters = self._new.collection.adapters
        share = 0.0
        for task in tasks:
            size, nbytes = adapters[task].original_nbytes, targets[task].nbytes
            allowed = size if nbytes is None else nbytes
            share += allowed * 2 * adapters[task].modules[module.name].numel / size
        return share

    def _weight(self, choices: Choices, task: int) -> float:
        names = self._new.collection.adapters[task].modules
        norm = math.fsum(choices[task, name].norm for name in names)
        return 1 / norm if norm > 0 else 0.0

    def _grown_block(
        self, module: Module, basis: Basis, more: BasisSpec, growth: Growth, metric: Metric
    ) -> BlockMeter:
        """The last block with the first rows of those fitted behind it."""
        rows = self._last_block(module.name, self._new.blocks[module.name])
        assert rows is not None
        added = growth.bases.read(module, 0, more)
        larger = (rows[0], rows[1] + more.k_out, rows[2], rows[3] + more.k_in)
        return BlockMeter(grown(basis, added.u, added.v), larger, metric)

    def _decide(
        self,
        choices: Choices,
        offers: Sequence[Offer],
        takers: Sequence[int],
        targets: Sequence[Target],
    ) -> list[dict[str, tuple[int, int]]]:
        """Growths to try: module name -> (rows of U, rows of V)."""
        offered = {(task, offer.module) for offer in offers for task in offer.tasks}
        fixed = [
            (task, options_hull(choices[task, name], self._weight(choices, task)))
            for task in takers
            for name in self._new.collection.adapters[task].modules
            if (task, name) not in offered
        ]
        limit = targets[takers[0]].loss
        if limit is not None:
            found = [decide_growth(offers, fixed, None, part * limit) for part in _LIMITS]
        else:
            room = sum((targets[t].nbytes or 0) - self._header(choices, t) for t in takers)
            found = [decide_growth(offers, fixed, part * room, None) for part in _ROOMS]
        return [rows for place, rows in enumerate(found) if rows and rows not in found[:place]]

    def _header(self, choices: Choices, task: int) -> int:
        """About what the header of a task's file takes: as with the smallest option everywhere."""
        return self._new.planner(choices, task).least_header()

    def _measure_grown(
        self,
        choices: Choices,
        takers: Sequence[int],
        growth: Growth,
    ) -> dict[tuple[int, str], ModuleChoices]:
        """The chains that are other ones on the grown bases."""
        fresh, taking = {}, set(takers)
        for module, basis in self._new.walk(list(growth.rows)):
            spec = self._new.specs[module.name].basis
            assert basis is not None
            assert spec is not None
            metric = self._new.surveyor.metric(module.name)
            more = BasisSpec(*growth.rows[module.name], spec.format)
            block = self._grown_block(module, basis, more, growth, metric)
            tasks = [task for task in module.tasks if task in taking]
            for task, factors in zip(tasks, self._new.collection.read_module(module, tasks)):
                old = choices[task, module.name]
                with self._new.collection.naming(task, module.name):
                    new = choices_of(
                        old.module,
                        factors,
                        old.private,
                        old.norm,
                        [block],
                        self._new.cores(self._new.specs[module.name]),
                    )
                # What the bases carried is said of them as they were.
                cores = [*old.cores, *new.cores]
                fresh[task, module.name] = replace(new, cores=cores, carried=old.carried)
        return fresh
