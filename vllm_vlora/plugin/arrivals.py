"""Requests whose task is on its way to the devices: they wait here, and nobody waits for them.

The workers read a task in threads of their own (*staging*), while steps go on; what is left to do
between two steps is a copy to the device. Who waits is let in as soon as all workers have the task.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from vllm_vlora.errors import VLoRAError
from vllm_vlora.plugin.counters import DISK, HOST, ServingCounters
from vllm_vlora.plugin.residency import Residency

# Tasks that are staged at once. More would hold more host memory, and the first not sooner.
_STAGED_AT_ONCE = 8


class Stage(Protocol):
    """Every worker of an engine core, asked at once."""

    def __call__(self, requests: Collection[Any]) -> Iterable[bool | None]:
        """Read the tasks of these requests unless that is under way; for each whether it is done.

        None for one that waits for more than that, and is asked for again after ``Arrivals.look_again``.
        """


@dataclass
class Waiter:
    """Someone who waits for a task: what to call once it is there, or with why it will not be.

    ``request_id`` is None for who is no request and cannot be withdrawn.
    """

    ready: Callable[[], None]
    failed: Callable[[VLoRAError], None]
    request_id: str | None = None


@dataclass
class _Arrival:
    request: Any
    waiters: list[Waiter] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    # Where it was when the workers were first asked for it.
    source: str = ""
    held_back: bool = False


class Arrivals:
    """The tasks that are awaited, in the order in which they were asked for."""

    def __init__(
        self, residency: Residency, stage: Stage, counters: ServingCounters | None = None
    ) -> None:
        self._residency, self._stage = residency, stage
        self._counters = counters or ServingCounters(0, 0)
        self._awaited: OrderedDict[str, _Arrival] = OrderedDict()
        # The tasks in use when there was no room; until others are, asking again is in vain.
        self._full_of: set[str] | None = None

    def __len__(self) -> int:
        return sum(len(arrival.waiters) for arrival in self._awaited.values())

    def wait(self, lora: Any, waiter: Waiter) -> None:
        """Wait for the task of an adapter request."""
        arrival = self._awaited.setdefault(lora.lora_path, _Arrival(lora))
        arrival.waiters.append(waiter)

    def awaits(self, path: str) -> bool:
        """Whether somebody waits for a task; who comes later must not overtake them."""
        return path in self._awaited

    def paths(self) -> set[str]:
        """The tasks that are awaited."""
        return set(self._awaited)

    def look_again(self) -> None:
        """Ask anew for the tasks that waited for more than to be read."""
        for arrival in self._awaited.values():
            arrival.held_back = False

    def advance(self) -> None:
        """Let in who waits for what has come, and begin what is next."""
        next_ones = (a.request for a in self._awaited.values() if not a.held_back)
        first = list(islice(next_ones, _STAGED_AT_ONCE))
        if not first:
            return
        answers = list(zip(first, self._stage(first)))
        for request, staged in answers:
            arrival = self._awaited[request.lora_path]
            arrival.source = arrival.source or (HOST if staged else DISK)
            arrival.held_back = staged is None
        for request, staged in answers:
            if self._full_of is not None and self._full_of == self._residency.in_use():
                return
            self._full_of = None
            if staged:
                self._let_in(request)

    def _let_in(self, request: Any) -> None:
        try:
            nbytes = self._residency.place(request)
        except VLoRAError as error:
            self._counters.refused(error, request.lora_name)
            for waiter in self._arrived(request).waiters:
                waiter.failed(error)
            return
        if nbytes is None:
            self._full_of = self._residency.in_use()
            return
        arrival = self._arrived(request)
        seconds = time.monotonic() - arrival.since
        self._counters.loaded(arrival.source, seconds, nbytes, request.lora_name)
        for waiter in arrival.waiters:
            waiter.ready()

    def _arrived(self, request: Any) -> _Arrival:
        """Whoever waited for a task, counted and no longer waiting."""
        arrival = self._awaited.pop(request.lora_path)
        for waiter in arrival.waiters:
            if waiter.request_id is not None:
                self._counters.requested(request.lora_name, arrival.source)
        return arrival

    def withdraw(self, request_ids: Collection[str]) -> None:
        """Take these requests out of the waiting ones."""
        for path, arrival in list(self._awaited.items()):
            arrival.waiters = [w for w in arrival.waiters if w.request_id not in request_ids]
            if not arrival.waiters:
                del self._awaited[path]
                # What waits for its bases may be there in another form, which requests use.
                if path not in self._residency:
                    self._residency.forget(path, wholly=True)
