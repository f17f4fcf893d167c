"""When the layers' shared bases are exchanged for those of a newly published state.

A layer holds one basis, which every direct task on it reads, so that tasks of two states cannot run
direct side by side. The new one is put in its place between two steps, on all workers at once, as soon as
no request needs a task whose form that ends. Until then requests for direct tasks of the new state wait,
outside of the scheduler. They do not wait for ever: after a while those tasks are materialized into
slots, and later waiting is tried again. The engine core decides, since only it sees every request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_vlora.plugin.resident import BasesReport
from vllm_vlora.plugin.settings import BASIS_WAIT_VARIABLE

# Seconds between two questions to the workers.
_PERIOD = 0.1
# Seconds without a request for a task of before until the exchange: one may be under way from an API
# server that has since heard of the new state.
_LINGER = 0.5
# Seconds until an API server that says nothing is taken to be gone.
_SILENCE = 10.0
# How many times as long as requests waited in vain the tasks are materialized before they wait again.
_REST = 10.0


class BasisWorkers(Protocol):
    """Every worker of an engine core, asked at once."""

    def bases(self, in_use: Collection[str], awaited: Collection[str]) -> Sequence[BasesReport]:
        """How far each is with the bases of the state that is served."""

    def hold_back(self, held_back: bool) -> Collection[str]:
        """Tell each whether tasks on the bases to come wait for them; those that are there already."""

    def keep_bases(self) -> None:
        """Tell each that they will not come."""

    def exchange_bases(self) -> Collection[str]:
        """Have each put them in place; the tasks that lost theirs for that."""


@dataclass
class Books:
    """What is known of requests and tasks outside of the workers.

    Attributes:
        in_use: paths of tasks of requests that run. awaited: of requests that wait for theirs.
        lost: called with the tasks that the workers gave up.
        look_again: called when tasks that waited for the bases are to be asked for again.
        asleep: whether the device's memory is not to be touched.
    """

    in_use: Callable[[], set[str]]
    awaited: Callable[[], set[str]]
    lost: Callable[[Collection[str]], None]
    look_again: Callable[[], None]
    asleep: Callable[[], bool] = lambda: False


@dataclass
class _Servers:
    """API servers, by what each calls itself: the state that it lists, and when it last said so."""

    told: dict[str, tuple[str, float]] = field(default_factory=dict)

    def all_list(self, state: str, now: float) -> bool:
        self.told = {k: told for k, told in self.told.items() if now - told[1] < _SILENCE}
        return all(listed == state for listed, _ in self.told.values())


class BasisExchange:
    """The exchange that an engine core waits for, if any.

    Args:
        workers: those whose layers hold bases.
        books: what is known of requests.
        patience: seconds that requests wait before their tasks are materialized; None for any time.
        log: takes a line and what it is of.
        clock: seconds that only grow.

    Attributes:
        waiting: tasks that are there, and whose requests must wait nevertheless.
        count: exchanges that there were.
    """

    def __init__(
        self,
        workers: BasisWorkers,
        books: Books,
        patience: float | None,
        log: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers, self._books, self._patience = workers, books, patience
        self._log, self._clock = log, clock
        self._servers = _Servers()
        self._state: str | None = None
        self._held_back, self._ready = True, False
        # Since when tasks wait, or since when they do not; since when nothing was in the way.
        self._since = self._quiet_since = self._asked_at = 0.0
        self.waiting: Collection[str] = ()
        self.count = 0

    @property
    def holds_back(self) -> bool:
        """Whether requests wait for it, so that no other state may be served before."""
        return self._state is not None and self._held_back

    def heard(self, server: str, state: str) -> None:
        """An API server lists this state."""
        if server:
            self._servers.told[server] = state, self._clock()

    def begin(self, state: str) -> None:
        """A state is served from now on; whether it has other bases the workers know."""
        now = self._clock()
        self._state, self._held_back, self._ready = state, True, False
        self.waiting = ()
        self._since = self._quiet_since = now
        self._asked_at = -_PERIOD

    def advance(self) -> None:
        """Exchange the bases if they can be, or see to it that nobody waits too long."""
        now = self._clock()
        if self._state is None or now - self._asked_at < _PERIOD or self._books.asleep():
            return
        self._asked_at = now
        reports = self._workers.bases(self._books.in_use(), self._books.awaited())
        refused = next((report.refused for report in reports if report.refused), "")
        if refused or not any(report.wanted for report in reports):
            self._end(refused)
            return
        known = self._servers.all_list(self._state, now)
        if any(report.busy for report in reports) or not known:
            self._quiet_since = now
        ready = all(report.ready for report in reports)
        if ready and not self._ready:
            # Tasks of which was not known whether they wait for the bases.
            self._ready = True
            self._books.look_again()
        if ready and known and now - self._quiet_since >= _LINGER:
            self._exchange(now)
        elif self._patience is not None:
            self._watch_patience(now, self._patience)

    def _end(self, refused: str) -> None:
        self._state, self.waiting = None, ()
        if refused:
            self._workers.keep_bases()
            self._log(
                "vllm-vlora: the published state has other bases than the layers hold, and they are not "
                "exchanged (%s); its tasks on them are materialized until the server is started again",
                refused,
            )
        self._books.look_again()

    def _exchange(self, now: float) -> None:
        lost = self._workers.exchange_bases()
        self._books.lost(lost)
        self._log(
            "vllm-vlora: the bases of the published state took the place of those before, %.1f s after "
            "it was taken; %d tasks of before are dropped",
            now - self._since,
            len(lost),
        )
        self._state, self.waiting = None, ()
        self.count += 1
        self._books.look_again()

    def _watch_patience(self, now: float, patience: float) -> None:
        if not self._held_back and not patience:
            return
        if now - self._since < patience * (1 if self._held_back else _REST):
            return
        self._held_back, self._since = not self._held_back, now
        self.waiting = self._workers.hold_back(self._held_back)
        if not self._held_back:
            self._log(
                "vllm-vlora: requests on the bases of before run for more than %g s (%s); the published "
                "state's tasks are materialized until they end",
                patience,
                BASIS_WAIT_VARIABLE,
            )
        self._books.look_again()
