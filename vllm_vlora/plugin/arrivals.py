"""Requests whose task is on its way to the devices: they wait here, and nobody waits for them.

The workers read a task in threads of their own (*staging*), while steps go on; what is left to do
between two steps is a copy to the device. Who waits is let in as soon as all workers have the task.

The workers are asked by a message that they answer between two steps. While steps go on nobody waits for
that answer, which comes with the step's: an engine core that waits for it keeps the device waiting.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

from vllm_vlora.errors import VLoRAError
from vllm_vlora.plugin.counters import DEVICE, DISK, HOST, REMOTE, ServingCounters
from vllm_vlora.plugin.residency import Held, Residency

# Tasks that are staged at once. More would hold more host memory, and the first not sooner.
_STAGED_AT_ONCE = 8
# And beside them of those that are fetched first: who waits for the network holds up nobody else.
_FETCHED_AT_ONCE = 8
# Looks for an answer, while steps go on, before it is waited for: not every executor brings it with a
# step's.
_LOOKS = 8
# Seconds between two looks at what is on its way: such a part of the time since anything came of one,
# within these. Each costs the engine core's loop 0.2 ms and every worker a message.
_PART, SHORTEST_PAUSE, LONGEST_PAUSE = 0.02, 0.002, 0.05

Brought = Held | bool | str | None
"""What a worker says of a task: whether it has read it, or what came of holding it once it had.

None where the task waits for more, and is asked for again after ``Arrivals.look_again``; ``FAR`` where it
is to be fetched."""
FAR = "far"


class Answer(Protocol):
    """An executor's promise of what every worker says: for each of them a list, of the tasks in order."""

    def done(self) -> bool:
        """Whether it is here."""

    def result(self) -> list[list[Brought]]:
        """It, which is waited for."""


class Bring(Protocol):
    """Every worker of an engine core, asked at once."""

    def __call__(
        self,
        requests: Sequence[Any],
        hold: int,
        instead_of: Sequence[str],
        drop: Sequence[str],
        fetch: Sequence[int],
    ) -> Answer:
        """Read the tasks of these requests, unless that is under way, and hold them once they are read.

        Args:
            hold: how many of them, the first, may be held.
            instead_of: tasks that may give way to them, the first first.
            drop: what nobody waits for any more; nothing is kept of it.
            fetch: which of them may be fetched; of others it is said that they are ``FAR``.
        """


@dataclass(eq=False)
class Waiter:
    """Someone who waits for a task: what to call once it is there, or with why it will not be.

    ``request`` is None for who is none and cannot be withdrawn.
    """

    ready: Callable[[], None]
    failed: Callable[[VLoRAError], None]
    request: Any = None


@dataclass(eq=False)
class _Arrival:
    request: Any
    since: float
    # In the order of their coming, as the keys.
    waiters: dict[Waiter, None] = field(default_factory=dict)
    # Where it was when the workers were first asked for it; on the device one that was to give way.
    source: str = ""
    # All of them have read it.
    staged: bool = False
    # They wait for bases first.
    held_back: bool = False
    # On some worker's machine it has to be fetched, or had to be.
    far: bool = False


@dataclass
class _Question:
    arrivals: list[_Arrival]
    answer: Answer
    looks: int = 0


class Arrivals:
    """The tasks that are awaited, in the order in which they were asked for.

    Args:
        steps_go_on: whether steps of the engine are under way, which bring answers with theirs.
        alone: there is one worker, which need not hear whether others have read a task too.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        residency: Residency,
        bring: Bring,
        counters: ServingCounters | None = None,
        steps_go_on: Callable[[], bool] = lambda: False,
        alone: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residency, self._bring, self._alone = residency, bring, alone
        self._clock, self._stirred = clock, clock()
        self._steps_go_on = steps_go_on
        self._counters = counters or ServingCounters(0, 0)
        self._awaited: OrderedDict[str, _Arrival] = OrderedDict()
        # By request who waits for which task: several where a session's input comes in pieces.
        self._waiting: dict[str, list[tuple[str, Waiter]]] = {}
        self._question: _Question | None = None
        self._dropped: dict[str, None] = {}
        # Tasks that may give way to one; more where those that did were too small.
        self._offer = 1
        # The tasks in use when there was no room; until others are, asking again is in vain.
        self._full_of: set[str] | None = None

    def __len__(self) -> int:
        return sum(len(arrival.waiters) for arrival in self._awaited.values())

    @property
    def asking(self) -> bool:
        """Whether the workers have not answered yet."""
        return self._question is not None

    @property
    def busy(self) -> bool:
        """Whether ``advance`` has anything to do."""
        return bool(self._awaited or self._question or self._dropped)

    @property
    def pause(self) -> float | None:
        """Seconds until ``advance`` may have something to do; None where it has nothing.

        The longer nothing has come of one the longer, so that a download of seconds is seldom asked for
        and seen a fiftieth of its time late at most.
        """
        if not self.busy:
            return None
        if self._question is not None:
            return SHORTEST_PAUSE
        idle = self._clock() - self._stirred
        return min(max(SHORTEST_PAUSE, _PART * idle), LONGEST_PAUSE)

    def _stir(self) -> None:
        """Take note that looking again soon may find more."""
        self._stirred = self._clock()

    def wait(self, lora: Any, waiter: Waiter) -> None:
        """Wait for the task of an adapter request."""
        self._dropped.pop(lora.lora_path, None)
        source = DEVICE if lora.lora_path in self._residency else ""
        arrival = self._awaited.setdefault(
            lora.lora_path, _Arrival(lora, self._clock(), source=source)
        )
        arrival.waiters[waiter] = None
        if waiter.request is not None:
            entry = lora.lora_path, waiter
            self._waiting.setdefault(waiter.request.request_id, []).append(entry)
        self._stir()

    def awaits(self, path: str) -> bool:
        """Whether somebody waits for a task; who comes later must not overtake them."""
        return path in self._awaited

    def paths(self) -> set[str]:
        """The tasks that are awaited."""
        return set(self._awaited)

    def unask(self) -> list[str]:
        """Take back what the workers were asked; paths of tasks that they may hold nevertheless."""
        question, self._question = self._question, None
        if question is None:
            return []
        self._residency.settle([_gave_way(told) for told in question.answer.result()])
        return [arrival.request.lora_path for arrival in question.arrivals]

    def look_again(self) -> None:
        """Ask anew for the tasks that waited for more than to be read."""
        for arrival in self._awaited.values():
            arrival.held_back = False
        self._stir()

    def advance(self, looks: int = 0) -> None:
        """Let in who waits for what has come, and begin what is next.

        Args:
            looks: 1 where steps may have gone on since the last time.
        """
        if self._question is None:
            self._ask()
        question = self._question
        if question is None:
            return
        question.looks += looks
        if question.answer.done() or question.looks > _LOOKS or not self._steps_go_on():
            self._question = None
            self._hear(question)

    def _ask(self) -> None:
        if self._full_of is not None and (
            self._full_of != self._residency.in_use()
            # One is pinned no more, or came that nobody needs.
            or self._residency.can_offer()
        ):
            self._full_of = None
            self._stir()
        full = self._full_of is not None
        next_ones = [one for one in self._awaited.values() if not one.held_back]
        near = islice((one for one in next_ones if not one.far), _STAGED_AT_ONCE)
        far = islice((one for one in next_ones if one.far), _FETCHED_AT_ONCE)
        asked = [*near, *far]
        for one in asked:
            if one.source == DEVICE and not self._is_held(one):
                one.source = ""  # It did give way.
        if full:
            asked = [one for one in asked if not one.staged]
        if not asked and not self._dropped:
            return
        # Who waits because his task was to give way, and it stayed, needs no room. Behind those come the
        # ones that all workers have read, and all keep their order.
        asked.sort(key=lambda one: (not self._is_held(one), not one.staged))
        coming = [one for one in asked if not self._is_held(one)]
        ready = 0 if full else sum(one.staged or self._alone for one in coming)
        # What was not read when it was asked for last is seldom read by now.
        likely = sum(one.staged or not one.source for one in coming[:ready])
        most = self._offer * max(likely, min(ready, 1))
        offered = self._residency.offer(most, {one.request.lora_path for one in asked})
        ready += len(asked) - len(coming)
        fetch = [number for number, one in enumerate(asked) if one.far]
        requests = [one.request for one in asked]
        answer = self._bring(requests, ready, offered, list(self._dropped), fetch)
        self._question = _Question(asked, answer)
        self._dropped.clear()

    def _is_held(self, arrival: _Arrival) -> bool:
        return arrival.request.lora_path in self._residency

    def _hear(self, question: _Question) -> None:
        answers = question.answer.result()
        self._residency.settle([_gave_way(told) for told in answers])
        for arrival, told in zip(question.arrivals, zip(*answers)):
            # Who waited may have gone, and others may have come for it since.
            if self._awaited.get(arrival.request.lora_path) is not arrival:
                continue
            held = [said for said in told if isinstance(said, Held)]
            before = arrival.far, arrival.staged, arrival.held_back
            arrival.far = arrival.far or FAR in told
            arrival.staged, arrival.held_back = all(told) and FAR not in told, None in told
            arrival.source = arrival.source or _source(arrival)
            if before != (arrival.far, arrival.staged, arrival.held_back) or held:
                self._stir()
            if len(held) == len(told):
                self._let_in(arrival, held)

    def _let_in(self, arrival: _Arrival, held: list[Held]) -> None:
        try:
            nbytes = self._residency.took(arrival.request, held)
        except VLoRAError as error:
            for _ in arrival.waiters:
                self._counters.refused(error, arrival.request.lora_name)
            self._arrived(arrival)
            _call_all(partial(waiter.failed, error) for waiter in arrival.waiters)
            return
        if nbytes is None:
            if self._residency.can_offer():
                self._offer *= 2
            else:
                self._full_of = self._residency.in_use()
            return
        self._offer = 1
        self._arrived(arrival)
        if arrival.source != DEVICE:
            seconds = self._clock() - arrival.since
            self._counters.loaded(arrival.source, seconds, nbytes, arrival.request.lora_name)
        _call_all(waiter.ready for waiter in arrival.waiters)

    def _arrived(self, arrival: _Arrival) -> None:
        """Take note that nobody waits for a task any more."""
        path = arrival.request.lora_path
        del self._awaited[path]
        for waiter in arrival.waiters:
            if waiter.request is not None:
                self._forget(path, waiter)
                self._counters.requested(arrival.request.lora_name, arrival.source)

    def _forget(self, path: str, waiter: Waiter) -> None:
        name = waiter.request.request_id
        self._waiting[name].remove((path, waiter))
        if not self._waiting[name]:
            del self._waiting[name]

    def withdraw(self, request_ids: Iterable[str] | None) -> list[Any]:
        """Take these requests, or all, out of the waiting ones."""
        chosen = list(self._waiting if request_ids is None else request_ids)
        gone = [entry for name in chosen for entry in self._waiting.pop(name, ())]
        for path, waiter in gone:
            waiters = self._awaited[path].waiters
            del waiters[waiter]
            if not waiters:
                del self._awaited[path]
                # One that was to give way may have stayed, and what waits for its bases may be there in
                # another form, which requests use.
                if path not in self._residency:
                    self._dropped[path] = None
                    self._residency.lose([path])
        return [waiter.request for _, waiter in gone]


def _call_all(calls: Iterable[Callable[[], None]]) -> None:
    """In their order; what one raises keeps none behind it from being called."""
    with ExitStack() as stack:
        # What was pushed last is called first.
        for call in reversed(list(calls)):
            stack.callback(call)


def _source(arrival: _Arrival) -> str:
    if arrival.far:
        return REMOTE
    return HOST if arrival.staged else DISK


def _gave_way(told: Sequence[Brought]) -> int:
    """How many tasks a worker took off its device for those that it was asked for."""
    return sum(said.gave_way for said in told if isinstance(said, Held))
