"""What an engine core answers when an API server asks what it counted.

What only the workers know they are asked for when something was done to what they hold, and else seldom:
see ``workers`` for what a question costs.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import Any, NamedTuple

from vllm_vlora.plugin.counters import CATALOGUE, DEVICE, HOST, REMOTE, counters_of
from vllm_vlora.plugin.engine_core import Tasks, tasks_of
from vllm_vlora.plugin.workers import manager_of

_SELDOM = 300.0
"""Seconds after which workers are asked again though nothing is known to have been done to them: only
a failed question to the Hub or a URL is told that late. Every 30 s was most of what an idle server took.
"""
# Between two questions in any case: several API servers ask the engine core, each once a second.
_APART = 0.9
# Where an engine core keeps what its workers said.
_REPORTS = "_vlora_reports"


class _Report(NamedTuple):
    """What a worker knows of its tasks: sizes are in bytes.

    Attributes:
        names: of those that are held of the tasks that were asked about, by path.
        host_names: names of tasks in host memory alone, the last used first.
        refused: why published states were not taken since it was asked last.
        far_tasks: on no disk yet; None where all were fetched before they were served.
        materialized: of the tasks that were asked about, why those that need a slot do.
        host_evictions: tasks that gave way to others in host memory since it started.
    """

    names: dict[str, str]
    device_used: int
    device_budget: int
    host_names: list[str]
    host_tasks: int
    host_used: int
    host_budget: int
    catalogue: int
    state: str
    refused: list[str]
    direct_tasks: int
    far_tasks: int | None
    materialized: dict[str, str]
    host_evictions: int


def _report(worker: Any, paths: list[str], listed: int) -> _Report:
    manager = manager_of(worker)
    store = manager.vlora_store
    held = [task for path in paths if (task := store.held(path)) is not None]
    # Of one that was published again the version before may still be there; it was used before that.
    newest = {task.task_id: task for task in reversed(held)}
    host_tasks, host_names = store.host_tasks(listed)
    follower = manager.follower
    return _Report(
        {task.path: task.task_id for task in held},
        store.arena_used,
        store.arena_nbytes,
        host_names,
        host_tasks,
        store.host_nbytes,
        store.host_limit,
        0 if store.state is None else len(store.state.paths),
        "" if store.state is None else store.state.digest,
        [] if follower is None else follower.take_refusals(),
        store.direct_tasks,
        manager.far_tasks(),
        {task.task_id: task.obstacle for task in newest.values() if task.direct is None},
        store.host_evictions,
    )


class _Reports:
    """What the workers said last, and what they are being asked."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        # A promise of it.
        self._asked: Any = None
        self._asked_at, self._changes = -_SELDOM, -1
        self.newest: list[_Report] = []

    def refresh(self, paths: list[str], listed: int) -> bool:
        """Whether ``newest`` is newer than at the last time.

        Args:
            paths: the tasks to ask about. listed: how many of those in host memory are named.
        """
        workers = self._tasks.workers
        if self._asked is None and self._is_due():
            self._asked_at, self._changes = time.monotonic(), workers.changes
            self._asked = workers.ask_later(_report, paths, listed)
        asked = self._asked
        # An answer that steps bring is not waited for, unless there is none yet.
        if asked is None or (self.newest and self._tasks.steps_go_on() and not asked.done()):
            return False
        self._asked = None
        self.newest = [_Report(*answer) for answer in asked.result()]
        return True

    def _is_due(self) -> bool:
        age = time.monotonic() - self._asked_at
        changed = self._tasks.workers.changes != self._changes
        return age > _SELDOM or (changed and age > _APART)


def metrics_snapshot(
    core: Any, seen: int = -1, refused: dict[str, int] | None = None
) -> dict[str, Any]:
    """An engine core's ``ServingCounters.snapshot``, its tiers as they are now; a method of it.

    Args:
        seen: as of ``snapshot``. refused: requests that the caller refused itself since it asked last, by
            reason.
    """
    counters, tasks = counters_of(core), tasks_of(core)
    for reason, requests in (refused or {}).items():
        counters.refused_elsewhere(reason, requests)
    if (reports := core.__dict__.get(_REPORTS)) is None:
        reports = core.__dict__[_REPORTS] = _Reports(tasks)
    paths = list(islice(tasks.residency.paths(), counters.listed))
    if reports.refresh(paths, counters.listed):
        for reason in reports.newest[0].refused:
            counters.state_refused(reason)
    answers = reports.newest
    first = answers[0]
    names = [first.names[path] for path in paths if path in first.names]
    # One that was published again is there twice for a while, and would have one series twice.
    once, host_once = list(dict.fromkeys(names)), list(dict.fromkeys(first.host_names))
    counters.set_tier(
        DEVICE,
        len(tasks.residency) - (len(names) - len(once)),
        once,
        pinned={name for path, name in first.names.items() if tasks.residency.is_pinned(path)},
        nbytes=max(answer.device_used for answer in answers),
        budget=first.device_budget,
    )
    counters.set_tier(
        HOST,
        first.host_tasks - (len(first.host_names) - len(host_once)),
        host_once,
        nbytes=max(answer.host_used for answer in answers),
        budget=first.host_budget,
    )
    if first.catalogue:
        counters.set_tier(CATALOGUE, first.catalogue)
    if first.far_tasks is not None:
        counters.set_tier(REMOTE, first.far_tasks)
    counters.set_state(first.state)
    counters.set_waiting(len(tasks.arrivals))
    counters.set_materialized(first.materialized)
    counters.set_evictions(HOST, max(answer.host_evictions for answer in answers))
    counters.set_direct(first.direct_tasks, tasks.exchange.count)
    return counters.snapshot(seen)
