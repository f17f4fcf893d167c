"""The plans that are worth considering: private, on bases, and mixtures of them; flat by its name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from vllm_vlora.adapters.collection import Collection, Module, Progress
from vllm_vlora.checkpoint.losses import SHARED_LOSS
from vllm_vlora.checkpoint.task_entry import MIXED
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.errors import OptionError
from vllm_vlora.fitting.clusters import cluster_tasks
from vllm_vlora.planning.executors import Executor
from vllm_vlora.planning.plan import Budget, Plan
from vllm_vlora.planning.problem import (
    Problem,
    flat_problem,
    joint_problems,
    make_plans,
    mixed_problem,
    private_problems,
)
from vllm_vlora.planning.scratch import FittedBases
from vllm_vlora.planning.screening import bases_can_pay, sample
from vllm_vlora.planning.sharing import decide_sharing
from vllm_vlora.planning.survey import (
    Survey,
    SurveyJob,
    SurveySettings,
    directions,
    survey_modules,
)

# Up to this many (task, module) pairs, every number format is also planned by itself for the report.
_ALONE_ENTRIES = 20_000
# Under an error limit: the sizes, of the best plan so far, at which sharing is decided.
_SIZES = (0.9, 0.6, 0.35)
# Sizes at which bases of some modules are tried before all are fitted: of the originals', and of the
# budget. A shared basis' loss counts less than it does in the end, so that little is passed over.
_ALL_PARTS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
_NEAR = (0.5, 1.0, 2.0)
_COUNTED_AT_LEAST = 1.5
# Losses below this are the very numbers, which no basis gives.
_EXACT = 1e-5


class Candidates:
    """Everything that a collection can be stored as, measured once, for as many budgets as wanted.

    Args:
        settings: of the survey: formats, widths, calibration. bases: keeps what is fitted.

    Attributes:
        warnings: what was asked for and not tried, one line each.

    Raises:
        OptionError: nothing can be shared as the options want it.
    """

    def __init__(
        self,
        collection: Collection,
        options: CompressOptions,
        settings: SurveySettings,
        bases: FittedBases,
        executor: Executor,
        progress: Progress,
    ) -> None:
        self._collection = collection
        self._options = options
        self._settings = settings
        self._formats = settings.formats
        self._bases = bases
        self._executor = executor
        self._progress = progress
        self._shareable = _modules_to_share(collection, options)
        self.warnings: list[str] = []

    @cached_property
    def survey(self) -> Survey:
        """What every way of storing each module alone, or on one basis for all, would lose."""
        options, only_shared = self._options, self._options.only_shared
        shared = {module.name for module in self._shareable}
        sketch, flat = self._may_cluster(), options.shares == "flat"
        tried = self._tried
        on_basis = {module.name for module in tried}
        jobs = [
            SurveyJob(
                module.name,
                private=not (only_shared and module.name in shared),
                groups=((0, module.tasks),) if module.name in on_basis and not flat else (),
                flat=flat and module.name in on_basis,
                sketch=sketch and module.name in on_basis,
            )
            for module in self._collection.modules.values()
        ]
        survey = self._run(Survey(self._collection), jobs, "measure")
        if len(tried) < len(self._shareable):
            survey = self._completed(survey)
        if only_shared and options.clusters != "auto" and int(options.clusters) > 1:
            survey = self._clustered(survey) or survey
        return survey

    @cached_property
    def _tried(self) -> list[Module]:
        """Modules whose bases show whether the others' are worth fitting."""
        options = self._options
        if options.shares != "auto" or options.num_components is not None:
            return self._shareable
        return sample(self._shareable)

    def _completed(self, survey: Survey) -> Survey:
        """The survey with bases of all modules, or of none where those tried can never pay."""
        limit = self._settings.byte_limit
        whole = self._collection.original_nbytes
        parts: Sequence[float]
        if limit is None or limit >= whole:
            # Within an error limit no size is known, and the error itself may be what counts.
            parts, counted = _ALL_PARTS, 1.0
        else:
            parts, counted = [part * limit / whole for part in _NEAR], _COUNTED_AT_LEAST
        joint = bases_can_pay(survey, self._formats, self._tried, parts, counted)
        if not joint and survey.affinity is not None:
            joint = len(cluster_tasks(survey.affinity, self._options.clusters)) > 1
        if not joint:
            return replace(survey, joint={})
        tried = {module.name for module in self._tried}
        jobs = [
            SurveyJob(
                module.name,
                private=False,
                groups=((0, module.tasks),),
                sketch=survey.affinity is not None,
            )
            for module in self._shareable
            if module.name not in tried
        ]
        return self._run(survey, jobs, "fit")

    def _may_cluster(self) -> bool:
        clusters = self._options.clusters
        if clusters == "auto":
            return self._options.shares == "auto" and len(self._collection.adapters) >= 6
        return int(clusters) > 1

    def _run(self, survey: Survey, jobs: Sequence[SurveyJob], stage: str) -> Survey:
        return survey_modules(
            survey, jobs, self._settings, self._bases, self._executor, self._progress, stage
        )

    def _clustered(self, survey: Survey) -> Survey | None:
        """The survey with a basis for each cluster in place of one for all; None without any."""
        if survey.affinity is None:
            return None
        clusters = cluster_tasks(survey.affinity, self._options.clusters)
        if len(clusters) < 2:
            return None
        jobs = []
        for module in self._shareable:
            having = set(module.tasks)
            groups = [
                (1 + number, tuple(task for task in cluster if task in having))
                for number, cluster in enumerate(clusters)
            ]
            least = 1 if self._options.shares != "auto" else 2
            kept = tuple((number, tasks) for number, tasks in groups if len(tasks) >= least)
            if len(kept) > min(module.d_in, module.d_out):  # a row for each is more than it has
                kept = ((0, module.tasks),)
            jobs.append(SurveyJob(module.name, False, kept))
        if not any(job.groups for job in jobs):
            if self._options.clusters != "auto":
                self.warnings.append(
                    f"clusters is {self._options.clusters}, which leaves no two tasks on one basis; "
                    "none was tried for each cluster; use fewer"
                )
            return None
        return self._run(replace(survey, joint={}), jobs, "fit clusters")

    def plans(self, budget: Budget) -> tuple[list[Plan], list[float]]:
        """Every plan that meets a budget; if there are none, how near each kind comes."""
        plans, misses = make_plans(self._private_problems(), budget)
        best = min(plans, key=budget.order, default=None)
        if best is not None and budget.is_perfect(best):
            return plans, misses
        problems = itertools.chain(self._joint_problems(), self._flat_problems())
        joint, joint_misses = make_plans(problems, budget)
        plans, misses = plans + joint, misses + joint_misses
        if self._options.shares == "auto" and self.survey.joint:
            plans += self._mixed_plans(budget, min(plans, key=budget.order, default=None))
        return plans, misses

    def _private_problems(self) -> Iterator[Problem]:
        if self._options.only_shared:
            return
        labels = self._formats.private_labels
        problems = list(private_problems(self.survey, labels))
        if len(self.survey.private) > _ALONE_ENTRIES:
            problems = problems[-1:]
        yield from problems

    def _joint_problems(self) -> Iterator[Problem]:
        if self.survey.joint:
            yield from self._problems_on_bases(self.survey)

    def _problems_on_bases(self, survey: Survey) -> Iterator[Problem]:
        """Every task on a basis, for each format of the bases and of the cores."""
        factored = self._options.shares == "factored"
        shares = "factored" if factored else "joint"
        for label in self._formats.labels:
            found = next(iter(survey.joint.values()))
            cores = self._formats.cores(found.curves[label].bases[0].format)
            yield from joint_problems(survey, label, cores, shares, factored)

    def _flat_problems(self) -> Iterator[Problem]:
        if not self.survey.flat:
            return
        held = [
            label
            for label in self._formats.labels
            if all(label in group.curves for group in self.survey.flat.values())
        ]
        if not held:
            raise OptionError(
                "the adapters' factors, times alpha / r, are too large for flat in "
                f"{', '.join(self._formats.labels)}; use dtype float32 or bfloat16, or another "
                "representation"
            )
        for label in held:
            yield flat_problem(self.survey, label)

    def _mixed_plans(self, budget: Budget, best: Plan | None) -> list[Plan]:
        """Plans in which some tasks share a basis, with one for all, and with one a cluster."""
        headers = 0 if best is None else best.nbytes - best.data_nbytes
        sizes: list[int] = []
        if budget.nbytes is not None:
            sizes = [budget.nbytes - headers]
        elif best is not None:
            sizes = [round(best.data_nbytes * part) for part in _SIZES]
        plans = []
        surveys = [self.survey]
        if self._clusters is not None:
            surveys.append(self._clusters)
            plans += make_plans(self._problems_on_bases(self._clusters), budget)[0]
        for survey in surveys:
            for size in sizes:
                plan = self._mixed_plan(survey, size, budget)
                if plan is not None:
                    plans.append(plan)
        return plans

    @cached_property
    def _clusters(self) -> Survey | None:
        return self._clustered(self.survey)

    def _mixed_plan(self, survey: Survey, nbytes: int, budget: Budget) -> Plan | None:
        # Whoever may lose nothing stays private, and must not keep the others from sharing.
        alone = () if budget.limits is None else torch.nonzero(budget.limits < _EXACT).flatten()
        private = frozenset(int(task) for task in alone)
        # Under error limits the error itself is what counts.
        counted = 1.0 if budget.by_size and not budget.of_gain else SHARED_LOSS
        sharing = decide_sharing(survey, self._formats, nbytes, private, counted)
        if not sharing.sharers:
            return None
        return mixed_problem(survey, sharing).solve(budget.of_kind(MIXED))


def _modules_to_share(collection: Collection, options: CompressOptions) -> list[Module]:
    """Linear modules that two tasks adapt: of one task a basis is a detour over its factors.

    Whoever asks for joint, or for a number of components, gets bases all the same.
    """
    if options.shares == "private":
        return []
    linear = [module for module in collection.modules.values() if module.kind == "linear"]
    shared = [module for module in linear if len(module.tasks) > 1]
    if options.shares == "auto":
        return shared
    if options.shares == "flat":
        if not shared:
            raise OptionError("flat needs a linear module that two tasks adapt; use private")
        return shared
    chosen = linear if options.num_components is not None or not shared else shared
    if not chosen:
        raise OptionError("joint needs a linear module, and these adapters have none; use private")
    return chosen


def too_many_components(collection: Collection, options: CompressOptions) -> str | None:
    """What is said where more components are asked for than any module has: all of them are kept."""
    wanted, modules = options.num_components, _modules_to_share(collection, options)
    if wanted is None or not modules:
        return None
    if options.shares == "flat":
        most, what = max(len(m.tasks) for m in modules) - 1, "components beside the adapters' mean"
    else:
        most, what = max(map(directions, modules)), "directions in any module"
    if wanted <= most:
        return None
    return f"num_components is {wanted}, but there are only {most} {what}; all of them are kept"
