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
from collections.abc import Callable, Iterable, Sequence
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
    """

    over: int = 0
    error: VLoRAError | None = None
    nbytes: int = 0
    direct: bool = False


class Workers(Protocol):
    """Every worker of an engine core, asked at once."""

    def held(self) -> Iterable[str]:
        """The paths that all of them hold, in the order in which they may give way."""

    def hold(self, request: Any, instead_of: Sequence[str] = ()) -> list[Held]:
        """Tell each to have a request's task on its device, after it took these paths off it."""

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
    """

    def __init__(
        self,
        workers: Workers,
        in_use: Callable[[], set[str]],
        clock: Callable[[], float] = time.monotonic,
        counters: ServingCounters | None = None,
    ) -> None:
        self._workers, self._clock = workers, clock
        self._counters = counters or ServingCounters(0, 0)
        self.in_use = in_use
        self._held: OrderedDict[str, None] = OrderedDict.fromkeys(workers.held())
        self._retired: dict[str, float] = {}
        # When what is kept beside the devices is to be looked through; None for never.
        self._tidy_at: float | None = None
        self._numbers: dict[int, str] = {}
        self._renumbered: dict[str, int] = {}

    def paths(self) -> Iterable[str]:
        """The tasks that are held, the last used first."""
        return reversed(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, path: str) -> bool:
        return path in self._held

    def touch(self, path: str) -> bool:
        """Whether a task is held; it then is the most recently used."""
        if path not in self._held:
            return False
        self._held.move_to_end(path)
        return True

    def place(self, request: Any) -> int | None:
        """Have a request's task held by every worker; None where tasks in use leave no room now.

        Returns:
            Bytes that were copied to a device, the most of any.

        Raises:
            MemoryBudgetError: there is no room for it, whatever gives way.
            VLoRAError: it cannot be loaded.
        """
        path = request.lora_path
        if self.touch(path):
            return 0
        try:
            answers = self._make_room_for(request)
        except BaseException:
            self._workers.forget(path, wholly=True)
            raise
        if not answers:
            # Some of the workers may have had room.
            self._workers.forget(path)
            return None
        self._held[path] = None
        return max(answer.nbytes for answer in answers)

    def _make_room_for(self, request: Any) -> list[Held]:
        """What the workers said when all of them held the task; nothing where there is no room now."""
        idle: list[str] | None = None
        instead_of: list[str] = []
        while True:
            answers = self._workers.hold(request, instead_of)
            error = next((answer.error for answer in answers if answer.error), None)
            if error is not None:
                raise error
            if max(answer.over for answer in answers) <= 0:
                return answers
            if idle is None:
                used = self.in_use()
                idle = [path for path in reversed(self._held) if path not in used]
            if not idle and self._held:
                return []
            if not idle:
                raise MemoryBudgetError(
                    f"no room for task {request.lora_name!r}: it is larger than all that tasks may take "
                    f"on a device; set {LATE_VARIABLE} higher"
                )
            instead_of = [idle.pop()]
            self._let_go(instead_of[0])
            self._counters.evicted(task=instead_of[0])

    def forget(self, path: str, wholly: bool = False) -> None:
        """Take a task off the devices; ``wholly``: and keep nothing of it elsewhere."""
        self._workers.forget(path, wholly)
        self._let_go(path)

    def lose(self, paths: Iterable[str]) -> None:
        """Take paths out of the books that the workers gave up by themselves."""
        for path in paths:
            self._let_go(path)

    def _let_go(self, path: str) -> None:
        """Take a path out of the books; that the workers are told is the caller's business."""
        self._held.pop(path, None)
        self._retired.pop(path, None)
        self._numbers.pop(self._renumbered.pop(path, 0), None)

    # --- what is no longer in the checkpoint -------------------------------------------------------

    def retire(self, served: Iterable[str]) -> None:
        """Take these paths as all that is served; the others go when nobody has asked for a while."""
        gone = self._held.keys() - set(served)
        now = self._clock()
        self._retired = {path: self._retired.get(path, now) for path in gone}
        self._tidy_at = now + GRACE

    def release(self) -> None:
        """Let go of retired tasks that no request has needed for ``GRACE`` seconds."""
        if self._tidy_at is None:
            return
        now, used = self._clock(), self.in_use()
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
        return asked
