"""What an engine core answers when an API server asks what it counted."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

from vllm_vlora.plugin.counters import CATALOGUE, DEVICE, HOST, REMOTE, counters_of
from vllm_vlora.plugin.engine_core import manager_of, tasks_of


class _Report(NamedTuple):
    """What a worker knows of its tasks: sizes are in bytes.

    Attributes:
        device_names: names of the tasks that were asked about. pinned_names: of those that never give
            way.
        host_names: names of tasks in host memory alone, the last used first.
        refused: why published states were not taken since it was asked last.
        far_tasks: on no disk yet; None where all were fetched before they were served.
        materialized: of the tasks that were asked about, why those that need a slot do.
    """

    device_names: list[str]
    pinned_names: list[str]
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


def _report(worker: Any, paths: list[str], pinned: list[str], listed: int) -> _Report:
    manager = manager_of(worker)
    store = manager.vlora_store
    held = [task for path in paths if (task := store.held(path)) is not None]
    host_tasks, host_names = store.host_tasks(listed)
    follower = manager.follower
    return _Report(
        [task.task_id for task in held],
        [task.task_id for task in held if task.path in pinned],
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
        {task.task_id: task.obstacle for task in held if task.direct is None},
    )


def metrics_snapshot(core: Any, seen: int = -1) -> dict[str, Any]:
    """An engine core's ``ServingCounters.snapshot``, its tiers as they are now; a method of it."""
    counters, tasks = counters_of(core), tasks_of(core)
    paths = list(islice(tasks.residency.paths(), counters.listed))
    pinned = [path for path in paths if tasks.residency.is_pinned(path)]
    answers = [
        _Report(*answer)
        for answer in core.model_executor.collective_rpc(
            _report, args=(paths, pinned, counters.listed)
        )
    ]
    first = answers[0]
    counters.set_tier(
        DEVICE,
        len(tasks.residency),
        first.device_names,
        pinned=first.pinned_names,
        nbytes=max(answer.device_used for answer in answers),
        budget=first.device_budget,
    )
    counters.set_tier(
        HOST,
        first.host_tasks,
        first.host_names,
        nbytes=max(answer.host_used for answer in answers),
        budget=first.host_budget,
    )
    if first.catalogue:
        counters.set_tier(CATALOGUE, first.catalogue)
    if first.far_tasks is not None:
        counters.set_tier(REMOTE, first.far_tasks)
    for reason in first.refused:
        counters.state_refused(reason)
    counters.set_state(first.state)
    counters.set_waiting(len(tasks.arrivals))
    counters.set_materialized(first.materialized)
    counters.set_direct(first.direct_tasks, tasks.exchange.count)
    return counters.snapshot(seen)
