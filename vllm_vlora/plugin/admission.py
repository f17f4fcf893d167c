"""Room for adapters in a batch: places in it, and slots, which are fewer.

When tasks run direct, ``--max-loras`` counts them too, and there are fewer slots than that for the
adapters that need one: ordinary PEFT adapters and materialized tasks. vLLM's scheduler counts distinct
adapters of any kind, so a batch could hold more of those than slots, which would fail inside the step.
So a request begins only where its adapter has room; until then it waits in the scheduler's own queue (see
``fair_queue``), which passes it over.

Others may begin meanwhile whose adapter has its place already, as by stock code when ``--max-loras`` is
reached. But who comes after it in priority, or was served more by a whole ``TURN``, does not: the place
then gets free as soon as the requests that run have ended.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

TURN = 8192.0
"""Tokens, as fair sharing counts them, that an adapter may be served more than one that waits for room.
With none every request would change who has the slots, and each change has a batch run empty first."""

# How urgent a request is: its priority, and tokens served to its tenant; the least first.
Standing = tuple[int, float]


class Adapter(NamedTuple):
    """Of a request: its adapter's number, and whether it needs a slot."""

    number: int
    needs_slot: bool


def kinds_of(scheduler: Any) -> dict[str, bool]:
    """Paths of our tasks that a scheduler was asked for -> whether they run direct."""
    return scheduler.__dict__.setdefault("_vlora_kinds", {})


def pinned_of(scheduler: Any) -> set[int]:
    """Numbers of the adapters that keep a slot, whether or not any request uses them."""
    return scheduler.__dict__.setdefault("_vlora_pinned", set())


class _Places:
    """So many adapters at once.

    Args:
        pinned: those that keep a place also while none of their requests runs.
    """

    def __init__(self, places: int, pinned: Set[int] = frozenset()) -> None:
        assert places > 0
        self._places, self._pinned = places, pinned
        self._taken: set[int] = set()
        # Who found none, and the most urgent of them.
        self._without: set[int] = set()
        self._first: Standing | None = None

    def begin(self, running: set[int]) -> bool:
        """A step begins in which these run; whether who found no place may find one."""
        self._taken = running | self._pinned
        if not self._without:
            return False
        return len(self._taken) < self._places or not self._taken.isdisjoint(self._without)

    @property
    def unpinned(self) -> int:
        """Places that no pinned adapter keeps."""
        return self._places - len(self._pinned)

    def forget_who_waits(self) -> None:
        """All who found no place ask again."""
        self._without.clear()
        self._first = None

    def has(self, number: int, standing: Standing) -> bool:
        """Whether an adapter may have a place, or use the one that it has."""
        if len(self._taken) < self._places or number in self._pinned:
            return True
        if number in self._taken:
            return self._first is None or not _gives_way(standing, self._first)
        self._without.add(number)
        self._first = standing if self._first is None else min(self._first, standing)
        return False

    def take(self, number: int) -> None:
        """An adapter's request begins in this step."""
        self._taken.add(number)


class Room:
    """What the requests of a batch may need: a place for each adapter, a slot for some.

    Args:
        slots: distinct adapters that need a slot which may run at once.
        adapters: distinct adapters of any kind.
        pinned: adapters that keep a slot also while none of their requests runs.
    """

    def __init__(self, slots: int, adapters: int, pinned: Set[int] = frozenset()) -> None:
        self._slots, self._adapters = _Places(slots, pinned), _Places(adapters)

    def begin(self, running: Set[Adapter], ready: Set[Adapter] = frozenset()) -> bool:
        """A step begins; whether who found no room before may find some now.

        Args:
            running: adapters of requests that run. ready: of requests that may go on without asking.
        """
        # Where slots cannot run out before places, vLLM itself holds back who would go on: kept for those
        # that are idle, slots would be lost to all others for nothing.
        kept = ready if self._slots.unpinned < self._adapters.unpinned else frozenset()
        slotted = {adapter.number for adapter in running | kept if adapter.needs_slot}
        changed = self._slots.begin(slotted)
        return self._adapters.begin({adapter.number for adapter in running}) or changed

    def forget_who_waits(self) -> None:
        """All who found no room ask again."""
        self._slots.forget_who_waits()
        self._adapters.forget_who_waits()

    def has(self, adapter: Adapter, standing: Standing) -> bool:
        """Whether a request may begin; who may not is remembered, and those behind it hold back."""
        if adapter.needs_slot and not self._slots.has(adapter.number, standing):
            return False
        return self._adapters.has(adapter.number, standing)

    def take(self, adapter: Adapter) -> None:
        """A request begins in this step."""
        if adapter.needs_slot:
            self._slots.take(adapter.number)
        self._adapters.take(adapter.number)


def _gives_way(standing: Standing, first: Standing) -> bool:
    priority, served = first
    return standing > (priority, served + TURN)
