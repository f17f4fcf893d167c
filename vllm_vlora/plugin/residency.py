"""Which tasks the workers of one engine core hold on their devices: the engine core decides.

What a checkpoint has beyond the devices' budget, and what comes after start-up, is brought there when a
request asks for it, never inside a step, where what fails ends the engine. It stays while a request asks
for it. When the next one would take more than the budget on any device, the least recently asked for
that no request needs give way. An engine core sees every load and every request, in their order,
whatever number of API servers asks; workers and API servers do not.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from vllm_vlora.errors import MemoryBudgetError, VLoRAError
from vllm_vlora.plugin.counters import ServingCounters
from vllm_vlora.plugin.settings import LATE_VARIABLE

# Seconds that a task which was published again, or removed, is still held: an API server may not have
# heard of it yet, and asks for it.
GRACE = 10.0
# Numbers for adapters whose own one is another's in this engine core; below 2**31, as all are.
_FIRST_SPARE = (1 << 31) - 2


class Held(NamedTuple):
    """What a worker says when it was told to hold a task.

    Attributes:
        over: bytes by which its tasks would be above the budget with it; above 0 it does not hold it.
        error: why it could not be loaded; the worker then holds nothing of it.
        nbytes: that were copied to its device. direct: whether the task runs direct.
        gave_way: how many of the tasks that might give way it took off its device, the first first.
    """

    over: int = 0
    error: VLoRAError | None = None
    nbytes: int = 0
    direct: bool = False
    gave_way: int = 0


class Workers(Protocol):
    """Every worker of an engine core, asked at once."""

    def held(self) -> Mapping[str, bool]:
        """Paths that all of them hold, in the order in which they may give way -> who runs direct."""

    def hold(self, request: Any, instead_of: Sequence[str]) -> list[Held]:
        """Tell each to have a request's task on its device, for which these may give way."""

    def forget(self, path: str, wholly: bool = False) -> None:
        """Tell each to take a path off its device; ``wholly``: and to keep nothing of it elsewhere."""

    def tidy(self) -> None:
        """Tell each to keep nothing of tasks that are not served any more."""


class Residency:
    """The tasks that every worker of an engine core holds, the least recently used first.

    Args:
        workers: those that hold them.
        in_use: the paths that requests in the engine ask for.
        clock: seconds that only grow.
        counters: where it is counted that a task gave way.
        kinds: path -> whether the task runs direct, kept for those that are held.
        slots: numbers of adapters that are pinned to a slot, from which those of tasks that go are taken.
    """

    def __init__(
        self,
        workers: Workers,
        in_use: Callable[[], set[str]],
        clock: Callable[[], float] = time.monotonic,
        counters: ServingCounters | None = None,
        kinds: dict[str, bool] | None = None,
        slots: set[int] | None = None,
    ) -> None:
        self._workers, self._clock = workers, clock
        self._counters = counters or ServingCounters(0, 0)
        self._kinds = {} if kinds is None else kinds
        self._slots = set() if slots is None else slots
        self.in_use = in_use
        held = workers.held()
        self._held: OrderedDict[str, None] = OrderedDict.fromkeys(held)
        self._kinds.update(held)
        # What may give way to tasks that the workers were asked for and have not answered.
        self._offered: list[str] = []
        self._pinned: set[str] = set()
        self._retired: dict[str, float] = {}
        # When what is kept beside the devices is to be looked through; None for never.
        self._tidy_at: float | None = None
        self._numbers: dict[int, str] = {}
        self._given: dict[str, set[int]] = {}
        self._renumbered: dict[str, int] = {}

    def paths(self) -> Iterable[str]:
        """The tasks that are held, the last used first."""
        return reversed(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, path: str) -> bool:
        return path in self._held

    def touch(self, path: str) -> bool:
        """Whether a task is held and stays; it then is the most recently used."""
        if path not in self._held or path in self._offered:
            return False
        self._held.move_to_end(path)
        return True

    # --- who comes and who gives way -----------------------------------------------------------------

    def place(self, request: Any) -> int | None:
        """Have a request's task held by every worker; None where tasks in use leave no room now.

        Returns:
            Bytes that were copied to a device, the most of any.

        Raises:
            MemoryBudgetError: there is no room for it, whatever gives way.
            VLoRAError: it cannot be loaded.
        """
        if self.touch(request.lora_path):
            return 0
        most = 1
        while True:
            answers = self._workers.hold(request, self.offer(most))
            self.settle([answer.gave_way for answer in answers])
            nbytes = self.took(request, answers)
            if nbytes is not None or not self.can_offer():
                return nbytes
            most *= 2

    def offer(self, most: int, asked: Collection[str] = ()) -> list[str]:
        """Tasks that may give way, the first first. Until ``settle`` no request counts on them.

        Args:
            asked: what they may give way to. None of these is among them: one that had been found held
                would go for the next, and those who wait for it would be let in nevertheless.
        """
        self._offered = list(islice((path for path in self._idle() if path not in asked), most))
        return self._offered

    def can_offer(self) -> bool:
        """Whether any task may give way."""
        return next(iter(self._idle()), None) is not None

    def _idle(self) -> Iterable[str]:
        kept = self.in_use() | self._pinned
        return (path for path in self._held if path not in kept)

    def settle(self, gave_way: Sequence[int]) -> None:
        """Of what was offered so many gave way, by worker. What one gave up, none keeps."""
        offered, self._offered = self._offered, []
        for path in offered[min(gave_way) : max(gave_way)]:
            self._workers.forget(path)
        for path in offered[: max(gave_way)]:
            self._let_go(path)
            self._counters.evicted(task=path)

    def took(self, request: Any, answers: Sequence[Held]) -> int | None:
        """Take note of what every worker said of a request's task: as ``place``, after ``settle``.

        Where there is no room and yet something that may give way, it is to be asked for again.
        """
        path = request.lora_path
        error = next((answer.error for answer in answers if answer.error), None)
        if error is not None:
            self.forget(path, wholly=True)
            raise error
        if max(answer.over for answer in answers) <= 0:
            self._held[path] = None
            self._kinds[path] = all(answer.direct for answer in answers)
            return max(answer.nbytes for answer in answers)
        if min(answer.over for answer in answers) <= 0:
            self._workers.forget(path)
        if not self.can_offer() and self.in_use().isdisjoint(self._held):
            self.forget(path, wholly=True)
            raise MemoryBudgetError(
                f"no room for task {request.lora_name!r}: it is larger than all that tasks may take on a "
                f"device{self._beside_pinned()}; set {LATE_VARIABLE} higher"
            )
        return None

    def _beside_pinned(self) -> str:
        return f" beside {len(self._pinned)} that are pinned" if self._pinned else ""

    def pin(self, number: int) -> None:
        """Never have the task that goes by a number give way."""
        if number in self._numbers:
            self._pinned.add(self._numbers[number])

    def unpin(self, number: int) -> None:
        """Have the task that goes by a number give way like others."""
        self._pinned.discard(self._numbers.get(number, ""))

    def is_pinned(self, path: str) -> bool:
        """Whether a task never gives way."""
        return path in self._pinned

    def forget(self, path: str, wholly: bool = False) -> None:
        """Take a task off the devices; ``wholly``: and keep nothing of it elsewhere."""
        self._workers.forget(path, wholly)
        self._let_go(path)

    def lose(self, paths: Iterable[str]) -> None:
        """Take paths out of the books that the workers hold no more, or never will."""
        for path in paths:
            self._let_go(path)

    def _let_go(self, path: str) -> None:
        """Take a path out of the books; that the workers are told is the caller's business."""
        self._held.pop(path, None)
        self._kinds.pop(path, None)
        self._retired.pop(path, None)
        self._pinned.discard(path)
        self._renumbered.pop(path, None)
        for number in self._given.pop(path, ()):
            if self._numbers.get(number) == path:
                del self._numbers[number]
                self._slots.discard(number)

    # --- what is no longer in the checkpoint -------------------------------------------------------

    def retire(self, served: Iterable[str]) -> None:
        """Take these paths as all that is served; the others go when nobody has asked for a while."""
        gone = self._held.keys() - set(served)
        now = self._clock()
        self._retired = {path: self._retired.get(path, now) for path in gone}
        self._tidy_at = now + GRACE

    def release(self, awaited: Collection[str] = ()) -> None:
        """Let go of retired tasks that no request has needed for ``GRACE`` seconds.

        Args:
            awaited: paths that requests wait for, which the workers may have said to hold already.
        """
        if self._tidy_at is None:
            return
        now, used = self._clock(), self.in_use().union(self._pinned, awaited)
        for path, since in list(self._retired.items()):
            if path in used:
                self._retired[path] = now
            elif now - since >= GRACE:
                self.forget(path, wholly=True)
        if now >= self._tidy_at and not self._retired:
            self._tidy_at = None
            self._workers.tidy()

    # --- numbers -----------------------------------------------------------------------------------

    def number(self, path: str, asked: int) -> int:
        """The number of a path's adapter: the one asked for, unless it is another's that is in use.

        Numbers come from digests, so that two states of a checkpoint may give one number to two tasks.
        """
        if path in self._renumbered:
            return self._renumbered[path]
        other = self._numbers.get(asked)
        if other not in (None, path) and other in self.in_use():
            asked = next(n for n in range(_FIRST_SPARE, 0, -1) if n not in self._numbers)
            self._renumbered[path] = asked
        self._numbers[asked] = path
        self._given.setdefault(path, set()).add(asked)
        return asked
