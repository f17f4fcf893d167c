"""Compress to a quality instead of a size: every task keeps a part of what its adapter changed.

How much of a task survives an error of its delta_W differs from task to task and is only known by
running the model. So each task has an error limit of its own, searched for by bisection: all tasks
are compressed to their limits, judged, and the limits moved. Tasks that fail at every limit are
kept as they were.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from vllm_vlora.adapters.collection import Collection, Progress
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.report import CompressReport
from vllm_vlora.compression.budgets import MARGIN, quality_out_of_reach
from vllm_vlora.compression.options import DEFAULT_LOSS, CompressOptions
from vllm_vlora.compression.pipeline import Compression
from vllm_vlora.compression.publishing import BY_ERROR, BY_SEEN_ERROR, Chosen, publish_checkpoint
from vllm_vlora.errors import BudgetError, OptionError
from vllm_vlora.planning.plan import Budget
from vllm_vlora.wording import some_of

Judge = Callable[[Path], Mapping[str, float | None]]
"""KL kept of every task of a checkpoint folder; None where it is undefined."""


class Jury(Protocol):
    """Judges several forms of one collection, if that is worth its time."""

    @property
    def how(self) -> str:
        """What a choice went by, for the report; known once there was a judgement."""

    def declines(self, forms: int, seconds: float) -> str | None:
        """Why judging so many forms is not worth it, when measuring took so long; None where it is."""

    def __call__(self, folders: Sequence[Path]) -> Sequence[Mapping[str, float | None]]:
        """KL kept of the tasks, for every checkpoint folder; tasks may be left out in all of them."""


@dataclass(frozen=True)
class OneByOne:
    """A jury of one judge, who is always asked."""

    judge: Judge
    how: str = "KL kept on held-out text"

    def declines(self, forms: int, seconds: float) -> str | None:
        """Never."""
        return None

    def __call__(self, folders: Sequence[Path]) -> Sequence[Mapping[str, float | None]]:
        """As :class:`Jury`."""
        return [self.judge(folder) for folder in folders]


# Private; a basis for all or for each cluster, of all tasks or of some: at most.
_FORMS = 5
_FIRST_LIMIT = 0.3
_LARGEST_LIMIT = 0.95
# A task that fails even here is kept as it was.
_SMALLEST_LIMIT = 0.01
_ROUNDS = 6
_CLOSE = 1.15
# Forms whose mean KL kept differs by less are alike.
_ALIKE = 0.002
# Standard errors over tasks by which a form is to be ahead of the one that the error prefers.
_SURELY = 1.0


@dataclass
class _Search:
    """Bisection of one task's error limit: the largest that passed, the smallest that failed."""

    limit: float = _FIRST_LIMIT
    passed: float = 0.0
    failed: float = math.inf

    def note(self, passes: bool) -> None:
        """Move the limit after a judgement at it."""
        if passes:
            self.passed = max(self.passed, self.limit)
            higher = math.sqrt(self.passed * self.failed)
            self.limit = min(higher if math.isfinite(higher) else 1.8 * self.passed, _LARGEST_LIMIT)
        else:
            self.failed = min(self.failed, self.limit)
            self.passed = min(self.passed, self.failed / _CLOSE)
            lower = math.sqrt(self.passed * self.failed) if self.passed else self.failed / 2.5
            self.limit = lower if lower >= _SMALLEST_LIMIT else 0.0

    @property
    def settled(self) -> bool:
        """Whether another round could not change much."""
        return (
            self.limit == 0 or self.failed <= _CLOSE * self.passed or self.passed >= _LARGEST_LIMIT
        )


def compress_to_quality(
    adapters: Mapping[str, Adapter],
    output: str | Path,
    least: float,
    judge: Judge,
    options: CompressOptions | None = None,
    *,
    force: bool = False,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress so that every task keeps at least ``least``, in as few bytes as that takes.

    The adapters are measured once; each round plans, encodes and judges a checkpoint.

    Args:
        least: of KL kept, 1 - KL(adapter || task) / KL(adapter || base), between 0 and 1.
        judge: measures it on a checkpoint that is never published. Tasks without a figure, since their
            adapters change nothing clear, are kept to the default loss, and named in ``warnings``.
        options: as of ``compress``, without a budget of their own.

    Returns:
        The report, with the fractions measured on what was written in ``kl_kept`` and the tasks that
        failed at every limit, which are stored as they were, in ``kept``.

    Raises:
        As :func:`vllm_vlora.compress`; OptionError for a budget in the options. BudgetError where a task
            keeps less than ``least`` at the least loss that the options can reach.

    Examples:
        >>> tasks = {f"task_{i}": open_adapter(path) for i, path in enumerate(adapter_dirs)}
        >>> def judge(path):
        ...     records = Checkpoint.open(path).tasks
        ...     return {task: 1 - record.error**2 for task, record in records.items()}
        >>> report = compress_to_quality(tasks, folder / "checkpoint", 0.9, judge)
        >>> min(report.kl_kept.values()) >= 0.9
        True
    """
    options = options or CompressOptions()
    if not 0 < least <= 1:
        raise OptionError(f"min_kept must be above 0 and at most 1, got {least}")
    if options.has_budget:
        raise OptionError(
            "min_kept finds the size by itself; leave out ratio, max_bytes, max_error, gate "
            "and num_components"
        )

    def make(folder: Path, scratch: Path) -> CompressReport:
        collection = Collection(adapters)
        with Compression(collection, options, scratch, progress, bounded=False) as compression:
            found = _QualitySearch(compression, scratch, judge, least, options).run()
            limits = found.limits.tolist()
            return compression.write(
                folder,
                found.chosen,
                base_model,
                kl_kept=found.judged,
                chosen_by=OneByOne(judge).how,
                kept=[task for task, limit in zip(collection.task_ids, limits) if limit == 0],
            )

    return publish_checkpoint(output, force, make, adapters, options)


def compress_judged(
    adapters: Mapping[str, Adapter],
    output: str | Path,
    jury: Jury,
    options: CompressOptions | None = None,
    *,
    force: bool = False,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress to a budget; the representation is chosen by what the tasks keep, not by error.

    The best plan of every representation, by error, is written and judged. The one with the highest mean
    is chosen where it is more than a standard error over tasks ahead of the one that the error prefers,
    which is chosen otherwise. The error alone can be wrong: a basis that a family shares keeps what its
    members have in common, and loses what sets them apart. Without a budget each is as small as its
    predicted loss allows, and the smallest of those that keep as much as the best is chosen.

    Args:
        jury: measures KL kept on checkpoints that are never published.

    Raises:
        As :func:`vllm_vlora.compress`; OptionError for ``max_error``, under which the smallest is wanted.
    """
    options = options or CompressOptions()
    if options.max_error is not None:
        raise OptionError(
            "under max_error the smallest is chosen, and no model is asked; leave it out, or use compress"
        )

    def make(folder: Path, scratch: Path) -> CompressReport:
        collection = Collection(adapters)
        with Compression(collection, options, scratch, progress) as compression:
            started = time.monotonic()
            _ = compression.candidates.survey
            reason = jury.declines(_FORMS, time.monotonic() - started)
            if reason is not None:
                calibrated = options.calibration is not None
                how = f"{BY_SEEN_ERROR if calibrated else BY_ERROR}; {reason}"
                return compression.write(folder, compression.choose(), base_model, chosen_by=how)
            best, kl_kept = _judged(compression, scratch, jury, options.by_size)
            return compression.write(folder, best, base_model, kl_kept=kl_kept, chosen_by=jury.how)

    return publish_checkpoint(output, force, make, adapters, options)


def _judged(
    compression: Compression, scratch: Path, jury: Jury, by_size: bool
) -> tuple[Chosen, Mapping[str, float | None]]:
    """What keeps most, and what it keeps of each task that was judged."""
    forms = compression.best_of_each()
    trials = []
    for number, chosen in enumerate(forms):
        trials.append(scratch / f"trial{number}")
        trials[-1].mkdir()
        compression.write(trials[-1], chosen, trial=True)
    found = jury(trials)
    for trial in trials:
        shutil.rmtree(trial)
    judged = list(zip(forms, found, strict=True))
    likely = min(judged, key=lambda pair: pair[0].plan.likely_error)
    best, kl_kept = max(judged, key=lambda pair: (_mean(pair[1]), -pair[0].plan.likely_error))
    if not by_size and not _is_surely_ahead(kl_kept, likely[1]):
        best, kl_kept = likely
    if by_size:
        alike = [pair for pair in judged if _mean(pair[1]) >= _mean(kl_kept) - _ALIKE]
        best, kl_kept = min(alike, key=lambda pair: pair[0].plan.nbytes)
    candidates = [
        chosen.candidates[0]._replace(kl_kept=_mean(kept) if kept else None)
        for chosen, kept in judged
    ]
    return replace(best, candidates=candidates), kl_kept


def _is_surely_ahead(kept: Mapping[str, float | None], other: Mapping[str, float | None]) -> bool:
    """Whether a form is ahead by more than chance makes of some tasks; of one task nobody knows."""
    pairs = [(kept[task], other.get(task)) for task in kept]
    gaps = [first - second for first, second in pairs if first is not None and second is not None]
    if len(gaps) < 2:
        return True
    return statistics.fmean(gaps) > _SURELY * statistics.stdev(gaps) / math.sqrt(len(gaps))


def _mean(kl_kept: Mapping[str, float | None]) -> float:
    """Of the fractions that are defined; zero where none is, so that the error decides."""
    values = [value for value in kl_kept.values() if value is not None]
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class _Trial:
    """What was written to be judged.

    Attributes:
        limits: of the losses, those asked for or, where nothing reaches these, the least that can be had.
    """

    chosen: Chosen
    limits: torch.Tensor
    nbytes: int
    judged: Mapping[str, float | None]


class _QualitySearch:
    def __init__(
        self,
        compression: Compression,
        scratch: Path,
        judge: Judge,
        least: float,
        options: CompressOptions,
    ) -> None:
        self.compression = compression
        self._scratch, self._judge, self._least = scratch, judge, least
        self._options = options
        self._tasks = compression.collection.task_ids
        # Of tasks that nobody can judge: what is predicted to be lost of a gain.
        self._unjudged_loss = min(DEFAULT_LOSS, 1 - least)

    def run(self) -> _Trial:
        """The smallest found in which every judged task passes.

        Raises:
            BudgetError: a task keeps too little at the least loss that the options can reach.
        """
        best = self._search()
        unjudged = [task for task in self._tasks if best.judged.get(task) is None]
        if unjudged:
            self.compression.warnings.append(
                f"no KL kept is known of {some_of(unjudged)}; each has a relative error of at "
                f"most {math.sqrt(self._unjudged_loss):.2g}, or the least that can be had"
            )
        return best

    def _search(self) -> _Trial:
        searches = [_Search() for _ in self._tasks]
        best: _Trial | None = None
        # Tasks share bases, so a task may fail at a limit that it passed beside others: after the
        # bisection the limits only shrink, until all pass; at zero they pass by being unchanged.
        for number in range(3 * _ROUNDS):
            limits = self._limits(searches, final=number >= _ROUNDS)
            trial = self._try(limits, number)
            failing = self._failing(trial, limits)
            if not failing and (best is None or trial.nbytes < best.nbytes):
                best = trial
            if number >= _ROUNDS and not failing:
                break
            for task, search in enumerate(searches):
                if number < _ROUNDS:
                    if not search.settled:
                        search.note(task not in failing)
                elif task in failing:
                    search.passed /= 1.6
            if number < _ROUNDS and all(search.settled for search in searches) and best:
                break
        return best or self._try(torch.zeros(len(self._tasks), dtype=torch.float64), 3 * _ROUNDS)

    def _limits(self, searches: list[_Search], final: bool) -> torch.Tensor:
        values = [s.passed if final or s.settled else s.limit for s in searches]
        chosen = [value if value >= _SMALLEST_LIMIT else 0.0 for value in values]
        return torch.tensor(chosen, dtype=torch.float64).square()

    def _try(self, limits: torch.Tensor, number: int) -> _Trial:
        folder = self._scratch / f"trial{number}"
        folder.mkdir()
        chosen, limits = self._within(limits)
        report = self.compression.write(folder, chosen, trial=True)
        judged = self._judge(folder)
        shutil.rmtree(folder)
        return _Trial(chosen, limits, report.nbytes, judged)

    def _within(self, limits: torch.Tensor) -> tuple[Chosen, torch.Tensor]:
        """The smallest plan within the limits, and these, raised where nothing reaches them."""
        try:
            return self.compression.choose(Budget(limits=limits)), limits
        except BudgetError:
            least = self._most_exact
        limits = limits.maximum(least.plan.losses * (1 + MARGIN))
        try:
            return self.compression.choose(Budget(limits=limits)), limits
        except BudgetError:
            # Of cores the least loss is measured, and planned only nearly.
            return least, limits

    @cached_property
    def _most_exact(self) -> Chosen:
        """What loses the least; unless the numbers are the adapters' own, that is more than nothing."""
        return self.compression.choose(Budget())

    def _failing(self, trial: _Trial, asked: torch.Tensor) -> set[int]:
        """The numbers of the tasks that are to lose less; BudgetError for one that cannot."""
        failing = set()
        for number, task in enumerate(self._tasks):
            value = trial.judged.get(task)
            if value is None:
                if asked[number] > self._unjudged_loss:
                    failing.add(number)
            elif value < self._least:
                if trial.limits[number] > asked[number]:
                    raise BudgetError(quality_out_of_reach(self._options, task, value, self._least))
                failing.add(number)
        return failing
