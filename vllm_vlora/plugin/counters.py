"""What an engine core counts of its tasks, as plain data; ``metrics`` shows it to Prometheus.

Nothing of vLLM or Prometheus is here, and nothing grows with the number of names that were ever asked
for. An engine core counts from its one thread: what ends elsewhere (a load in the background) is counted
when that thread takes note of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from itertools import islice
from typing import Any

from vllm_vlora.errors import (
    CheckpointError,
    MemoryBudgetError,
    ModelMismatchError,
    TaskBusyError,
    TaskLoadError,
    VLoRAError,
)
from vllm_vlora.plugin.events import happened
from vllm_vlora.plugin.settings import read_settings

METRICS_METHOD = "vlora_metrics"
"""The name under which an engine core answers ``ServingCounters.snapshot``."""
ENDING = "Server shutting down"
"""What vLLM answers to every question once it drains, and logs a warning for each."""

DEVICE, HOST, DISK, REMOTE = "device", "host", "disk", "remote"
"""Where tasks are: on the device, in host memory, on disk alone, or on no disk of this machine yet."""
TIERS = DEVICE, HOST, DISK, REMOTE
CATALOGUE = "catalogue"
"""All that may be asked for."""

LOAD_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
"""Upper ends of the buckets of load times, in seconds; one more bucket holds what took longer."""

OTHER = "other"
"""The label of all that has none of its own."""

# Reasons are few and the code's own; a text that somebody else can choose must not become a label each.
_MOST_REASONS = 32
# Tasks of which is remembered how often they are asked for, a task with a count of its own.
_CANDIDATES = 8
# How much more often than the least of them a task must be asked for to take its place.
_CLEARLY = 2
# Requests, a task with a count of its own, after which an earlier request weighs half.
_HALF_LIFE = 256
_REASONS: tuple[tuple[type[VLoRAError], str], ...] = (
    (MemoryBudgetError, "memory"),
    (ModelMismatchError, "model"),
    (CheckpointError, "checkpoint"),
    (TaskLoadError, "load"),
    (TaskBusyError, "busy"),
)


class Histogram:
    """How many observations fell into each bucket of ``LOAD_SECONDS``, and their sum."""

    def __init__(self) -> None:
        self._counts = [0] * (len(LOAD_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one; a bucket's upper end belongs to it."""
        self._counts[bisect_left(LOAD_SECONDS, seconds)] += 1
        self._sum += seconds

    def snapshot(self) -> dict[str, Any]:
        """``counts`` (one more than ``LOAD_SECONDS``, not cumulative) and ``sum`` in seconds."""
        return {"counts": list(self._counts), "sum": self._sum}


class BusiestTasks:
    """Requests of the busiest tasks, each under its own name, and of all others together.

    A task's count begins when it gets one: its requests before that stay with the others, and when it
    loses its place its count ends. So no count ever falls, as Prometheus asks of a counter. A place
    changes hands only for a task that is asked for at least twice as often of late, so that a long tail
    of names does not become a long tail of series.

    Args:
        most: tasks that have a count at once; 0 counts all as others.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._own: dict[str, int] = {}
        self._other = 0
        # How often of late: every number is halved now and then, and what is none is gone.
        self._lately: dict[str, int] = {}
        self._since_halved = 0
        self._bar = 0

    def count(self, task: str) -> None:
        """Count a request for a task."""
        if self._most == 0 or task == OTHER:
            self._other += 1
            return
        lately = self._remember(task)
        if task not in self._own and not self._take_place(task, lately):
            self._other += 1
            return
        self._own[task] += 1

    def snapshot(self) -> dict[str, Any]:
        """``tasks``: requests by task; ``other``: those of all tasks that have no count now."""
        return {"tasks": dict(self._own), "other": self._other}

    def _remember(self, task: str) -> int:
        self._since_halved += 1
        if self._since_halved >= _HALF_LIFE * self._most:
            self._halve()
        while task not in self._lately and len(self._lately) >= _CANDIDATES * self._most:
            self._halve()
        self._lately[task] = found = self._lately.get(task, 0) + 1
        return found

    def _halve(self) -> None:
        self._lately = {name: n // 2 for name, n in self._lately.items() if n > 1}
        self._since_halved = self._bar = 0

    def _take_place(self, task: str, lately: int) -> bool:
        if len(self._own) >= self._most:
            if lately <= self._bar:
                return False
            least = min(self._own, key=lambda name: self._lately.get(name, 0))
            self._bar = _CLEARLY * max(self._lately.get(least, 0), 1)
            if lately <= self._bar:
                return False
            del self._own[least]
        self._own[task] = 0
        return True


class ServingCounters:
    """What one engine core counts.

    Args:
        tasks: tasks whose requests are counted under their own name.
        listed: tasks of the device and of host memory that are named as being there.
    """

    def __init__(self, tasks: int, listed: int) -> None:
        self.listed = listed
        # What is counted from 0 on: Prometheus sees no rise where a series begins with 1.
        self._requests: Counter[str] = Counter(dict.fromkeys(TIERS, 0))
        self._busiest = BusiestTasks(tasks)
        self._load_seconds = {source: Histogram() for source in TIERS[1:]}
        self._loaded_bytes: Counter[str] = Counter(dict.fromkeys(TIERS[1:], 0))
        self._evictions: Counter[str] = Counter({DEVICE: 0, HOST: 0})
        words = (*(word for _, word in _REASONS), OTHER)
        self._refusals: Counter[str] = Counter(dict.fromkeys(words, 0))
        self._reloads = 0
        self._reload_refusals: Counter[str] = Counter(dict.fromkeys(words, 0))
        self._state = ""
        self._waiting = 0
        self._direct_tasks = self._basis_exchanges = 0
        self._tiers: dict[str, dict[str, int | None]] = {}
        self._residents: dict[str, list[tuple[str, bool]]] = {}
        self._materialized: dict[str, str] = {}
        self._version = 0

    # --- what happens ---

    def requested(self, task: str, tier: str) -> None:
        """A request for a task came, which then lay in a tier."""
        self._requests[tier] += 1
        self._busiest.count(task)

    def loaded(self, source: str, seconds: float, nbytes: int = 0, task: str = "") -> None:
        """A task was brought to the device from where it lay, or into host memory from ``DISK``.

        Args:
            seconds: all the way, of one from ``REMOTE`` to the disk too.

        Raises:
            KeyError: another source.
        """
        self._load_seconds[source].observe(seconds)
        self._loaded_bytes[source] += nbytes
        happened("load", task=task, source=source, seconds=round(seconds, 6), bytes=nbytes)

    def evicted(self, tier: str = DEVICE, task: str = "") -> None:
        """A task gave way there to another one."""
        self._evictions[tier] += 1
        happened("eviction", task=task, tier=tier)

    def refused(self, reason: BaseException | type[BaseException] | str, task: str = "") -> None:
        """A request was refused for its task: the error, its class, or a word of the code's own."""
        word = _count_reason(self._refusals, reason)
        why = str(reason) if isinstance(reason, BaseException) else word
        happened("refusal", task=task, reason=word, why=why)

    def refused_elsewhere(self, reason: str, requests: int) -> None:
        """An API server refused requests for their tasks, and said so where it did."""
        _count_reason(self._refusals, reason, requests)

    def adopted(self, state: str) -> None:
        """The engine serves another published state of the checkpoint, whose digest this is."""
        self._reloads += 1
        self._state = state

    def state_refused(self, reason: BaseException | type[BaseException] | str) -> None:
        """A published state was not taken, and the one before serves on."""
        _count_reason(self._reload_refusals, reason)

    # --- how things are ---

    def set_tier(
        self,
        tier: str,
        tasks: int,
        names: Iterable[str] = (),
        pinned: Container[str] = (),
        nbytes: int | None = None,
        budget: int | None = None,
    ) -> None:
        """How full a tier is.

        Args:
            tier: ``DEVICE``, ``HOST``, ``REMOTE`` or ``CATALOGUE``.
            tasks: how many are there.
            names: theirs, last used first; only the first that are listed are looked at. A task that
                is on the device too belongs there alone.
            pinned: names of tasks that never give way.
            nbytes: bytes that they take; None where it is not known.
            budget: bytes that they may take; None where nothing limits them.
        """
        self._tiers[tier] = {"tasks": tasks, "bytes": nbytes, "budget": budget}
        found = [(name, name in pinned) for name in islice(names, self.listed)]
        if self._residents.get(tier, []) != found:
            self._residents[tier] = found
            self._version += 1

    def set_state(self, state: str) -> None:
        """The digest of the state that is served from the start on."""
        self._state = state

    def set_waiting(self, requests: int) -> None:
        """Requests that wait for their task to be loaded."""
        self._waiting = requests

    def set_evictions(self, tier: str, tasks: int) -> None:
        """Tasks that gave way to others there since the start, where others count them."""
        self._evictions[tier] = tasks

    def set_materialized(self, why: Mapping[str, str]) -> None:
        """Tasks named as being on the device that need a slot there, and why they do not run direct."""
        if self._materialized != why:
            self._materialized = dict(why)
            self._version += 1

    def set_direct(self, tasks: int, exchanges: int) -> None:
        """Tasks on the device that run direct, and how often the layers' bases were exchanged."""
        self._direct_tasks, self._basis_exchanges = tasks, exchanges

    def snapshot(self, seen: int = -1) -> dict[str, Any]:
        """All of it, of numbers, strings, lists and dictionaries.

        Args:
            seen: ``version`` of the snapshot that the caller has; where no other tasks are there since,
                ``residents`` and ``materialized`` are None and not sent again.
        """
        return {
            "version": self._version,
            "residents": None if seen == self._version else self._named(),
            "materialized": None if seen == self._version else dict(self._materialized),
            "tiers": {tier: dict(values) for tier, values in self._tiers.items()},
            "requests": dict(self._requests),
            "busiest": self._busiest.snapshot(),
            "load_seconds": {
                source: found.snapshot() for source, found in self._load_seconds.items()
            },
            "loaded_bytes": dict(self._loaded_bytes),
            "evictions": dict(self._evictions),
            "refusals": dict(self._refusals),
            "state": self._state,
            "reloads": self._reloads,
            "reload_refusals": dict(self._reload_refusals),
            "waiting": self._waiting,
            "direct_tasks": self._direct_tasks,
            "basis_exchanges": self._basis_exchanges,
        }

    def _named(self) -> dict[str, list[list[Any]]]:
        return {tier: [list(name) for name in names] for tier, names in self._residents.items()}


def _count_reason(
    counts: Counter[str], reason: BaseException | type[BaseException] | str, times: int = 1
) -> str:
    """Count a reason under its word, which is returned."""
    word = reason if isinstance(reason, str) else reason_of(reason)
    if word not in counts and len(counts) >= _MOST_REASONS:
        word = OTHER
    counts[word] += times
    return word


def reason_of(error: BaseException | type[BaseException]) -> str:
    """The word under which an error, or a class of errors, is counted."""
    kind = error if isinstance(error, type) else type(error)
    return next((word for known, word in _REASONS if issubclass(kind, known)), OTHER)


def counters_of(core: Any) -> ServingCounters:
    """An engine core's own counters, made on first use as the settings say."""
    held = core.__dict__.get("_vlora_counters")
    if held is None:
        settings = read_settings()
        held = core.__dict__["_vlora_counters"] = ServingCounters(
            settings.metrics_tasks, settings.metrics_listed
        )
    return held
