"""Which requests may enter the scheduler while the slots are few.

When tasks run direct, ``--max-loras`` counts them too, and there are fewer slots than that for the
adapters that need one: ordinary PEFT adapters and materialized tasks. vLLM's scheduler counts distinct
adapters of any kind, so a batch could hold more of those than slots, which would fail inside the step.
So a request whose adapter needs a slot waits outside until the adapters of the requests inside leave
one free. Like a request that the scheduler itself skips for ``max_loras``, it is overtaken meanwhile
by requests that need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any, Generic, TypeVar

RequestT = TypeVar("RequestT")
Alive = Callable[[str], bool]

# Requests let in before those that have ended since are looked for and forgotten.
_COUNT_AGAIN = 1024


def kinds_of(scheduler: Any) -> dict[str, bool]:
    """Paths of our tasks that a scheduler was asked for -> whether they run direct."""
    return scheduler.__dict__.setdefault("_vlora_kinds", {})


def pinned_of(scheduler: Any) -> set[int]:
    """Numbers of the adapters that keep a slot, whether or not any request uses them."""
    return scheduler.__dict__.setdefault("_vlora_pinned", set())


class Admission(Generic[RequestT]):
    """The requests that need slots: those inside, by adapter, and those waiting outside, in order.

    Args:
        slots: distinct adapters whose requests may be inside at once.
        alive: whether the scheduler still holds a request of this id.
        pinned: adapters that keep a slot also while none of their requests is inside.
    """

    def __init__(self, slots: int, alive: Alive, pinned: Set[int] = frozenset()) -> None:
        assert slots > 0
        self._slots, self._pinned = slots, pinned
        self._alive = alive
        self._inside: dict[int, set[str]] = {}
        # Under one id more than one: the input of a streaming session comes as a request a piece.
        self._waiting: dict[str, tuple[int, list[RequestT]]] = {}
        self._entered, self._next_count = 0, _COUNT_AGAIN

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, adapter: int, request_id: str, request: RequestT) -> bool:
        """Let a request in, or keep it waiting; False when it waits."""
        held = self._waiting.get(request_id)
        if held is not None:
            held[1].append(request)
            return False
        if self._admit(adapter, request_id):
            return True
        self._waiting[request_id] = (adapter, [request])
        return False

    def release(self) -> list[RequestT]:
        """Requests that may enter now, in the order of their coming."""
        if not self._waiting:
            return []
        self._forget_the_dead()
        entering = [
            request_id
            for request_id, (adapter, _) in self._waiting.items()
            if self._admit(adapter, request_id, forget=False)
        ]
        return self.withdraw(entering)

    def waiting(self) -> list[RequestT]:
        """The requests that wait, in the order of their coming."""
        return [request for _, requests in self._waiting.values() for request in requests]

    def withdraw(self, request_ids: Iterable[str] | None) -> list[RequestT]:
        """Take these requests, or all, out of the waiting ones."""
        chosen = list(self._waiting) if request_ids is None else request_ids
        found = [self._waiting.pop(name, (0, [])) for name in chosen]
        return [request for _, requests in found for request in requests]

    def _admit(self, adapter: int, request_id: str, forget: bool = True) -> bool:
        if not self._has_slot(adapter):
            if forget:
                self._forget_the_dead()
            if not self._has_slot(adapter):
                return False
        self._inside.setdefault(adapter, set()).add(request_id)
        self._entered += 1
        if forget and self._entered >= self._next_count:
            self._forget_the_dead()
            self._inside.setdefault(adapter, set()).add(request_id)
            self._entered = sum(len(requests) for requests in self._inside.values())
            self._next_count = max(_COUNT_AGAIN, 2 * self._entered)
        return True

    def _has_slot(self, adapter: int) -> bool:
        taken = self._inside.keys() | self._pinned
        return adapter in taken or len(taken) < self._slots

    def _forget_the_dead(self) -> None:
        for adapter, requests in list(self._inside.items()):
            requests -= {name for name in requests if not self._alive(name)}
            if not requests:
                del self._inside[adapter]
