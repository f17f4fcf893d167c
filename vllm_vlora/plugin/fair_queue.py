"""Whose request is next, where tasks are limited or share the engine fairly.

vLLM's scheduler takes waiting requests in the order of their coming, so that a burst of one task
is served before whatever comes behind it. A ``TenantQueue`` takes the place of the scheduler's own queue,
with the same methods; everything that waits stays inside the scheduler, so that aborts, pauses, streaming
sessions, metrics and data-parallel waves are what they were. It differs in one thing: which request it
names as the next.

- A tenant (a task, an ordinary adapter, or the base model, which is None) that runs as many requests as
  it may is passed over, and one whose adapter has no room in the batch; see ``admission``.
- Where sharing is fair, the tenant that was served least comes first: a virtual token counter for each,
  after the idea of Sheng et al., Fairness in Serving Large Language Models, OSDI 2024. A tenant's counter
  grows by what it is served, divided by its weight: its prompt when a request begins, its answer as it is
  sampled. One that had nothing waiting is lifted to the least counter of those that wait, so that nobody
  saves up.

Between two tenants that have requests waiting all the time, weighted service differs by no more than the
largest cost of a request of either. Within a tenant, and where sharing is not fair, the order is vLLM's
own: of coming, or of priority, which comes before fairness where vLLM is told to keep it.

A tenant has a line of requests for each adapter: a task that was published again has one for its old
state, which may wait for a slot, and one for its new, which need not. Counters and limits are common to
both.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

from vllm_vlora.plugin.admission import Adapter, Room

Tenant = str | None
# Priority, time of arrival where priorities count, place in the order of coming.
Rank = tuple[int, float, int]
# Priority, tokens served where sharing is fair, and the rest of the rank of the line's first request.
Key = tuple[int, float, float, int]

# Tenants with a counter before those that need none are looked for and forgotten.
_FORGET_FROM = 1024
# Steps after which all who found no room are asked again though nobody left it: a task may have become
# direct, for which no slot is needed.
_LOOK_AGAIN = 32


class Waiting(Protocol):
    """What a queue asks of a request."""

    priority: int
    arrival_time: float


RequestT = TypeVar("RequestT", bound=Waiting)


class Line(NamedTuple):
    """Requests of a tenant that find room together or not at all."""

    tenant: Tenant
    adapter: Hashable


class Tenants(Generic[RequestT]):
    """What every tenant was served, how many of its requests run, and how many wait; shared by queues.

    Args:
        fair: whether who was served least comes first.
        limit: requests of a named tenant that may run at once; 0 for any number.
        by_priority: whether vLLM keeps priorities.
        tenant_of: whose request it is.
        price: tokens that a request takes when it begins; None where it cannot begin yet, so that who
            takes it out of the queue will put it back.
        weight: the share of a tenant beside that of the others.
        room: what the adapters of a batch may take; None where nothing limits them.
        adapter_of: the adapter of a request, None for the base model's.
        line_of: what tells requests of a tenant apart that are for different adapters, and never changes.
        idle: whether a request that began, and may go on without asking, has nothing to do now.
    """

    def __init__(
        self,
        *,
        fair: bool,
        limit: int,
        by_priority: bool,
        tenant_of: Callable[[RequestT], Tenant],
        price: Callable[[RequestT], float | None],
        weight: Callable[[Tenant], float] = lambda _: 1.0,
        room: Room | None = None,
        adapter_of: Callable[[RequestT], Adapter | None] = lambda _: None,
        line_of: Callable[[RequestT], Hashable] = lambda _: None,
        idle: Callable[[RequestT], bool] = lambda _: False,
    ) -> None:
        self.fair, self.limit, self.by_priority = fair, limit, by_priority
        self.tenant_of, self._price, self._weight = tenant_of, price, weight
        self._room, self._adapter_of, self._line_of = room, adapter_of, line_of
        self._idle = idle
        self._steps = 0
        self.waiting: Counter[Tenant] = Counter()
        # Of these, since the last step began.
        self._came: Counter[Line] = Counter()
        self._served: dict[Tenant, float] = {}
        self._running: Counter[Tenant] = Counter()
        # What was taken in this step, with its price: it may come back before the step ends.
        self._taken: dict[RequestT, float | None] = {}
        # Who began last, and the most that one had been served of those who began.
        self._last: Tenant = None
        self._level = 0.0
        self._forget_from = _FORGET_FROM
        self._queues: list[TenantQueue[RequestT]] = []
        self.order_of_coming = itertools.count()
        self.order_of_return = itertools.count(-1, -1)

    def queue(self) -> TenantQueue[RequestT]:
        """A new queue of theirs."""
        made = TenantQueue(self)
        self._queues.append(made)
        return made

    def begin_step(self, running: Collection[RequestT], ready: Collection[RequestT] = ()) -> None:
        """Before requests are taken: which run now, and which others may go on without asking."""
        self._taken.clear()
        self._came.clear()
        before = self._running
        if self.limit:
            self._running = self._count_running(running, ready)
        if not self.waiting:
            return
        self._steps += 1
        if self._refresh_room(running, ready):
            for queue in self._queues:
                queue.look_again()
        for tenant, count in before.items():
            if count >= self.limit > self._running[tenant]:
                self._came_forward(tenant)

    def _count_running(
        self, running: Iterable[RequestT], ready: Iterable[RequestT]
    ) -> Counter[Tenant]:
        """Requests of each tenant that count against its limit."""
        busy = itertools.filterfalse(self._idle, ready)
        return Counter(map(self.tenant_of, itertools.chain(running, busy)))

    def _refresh_room(self, running: Iterable[RequestT], ready: Iterable[RequestT]) -> bool:
        """Take note of who has room now; whether who found none may find some."""
        if self._room is None:
            return False
        changed = self._room.begin(self._adapters_of(running), self._adapters_of(ready))
        if not changed and self._steps < _LOOK_AGAIN:
            return False
        self._room.forget_who_waits()
        self._steps = 0
        return True

    def _adapters_of(self, requests: Iterable[RequestT]) -> set[Adapter]:
        return {found for one in requests if (found := self._adapter_of(one)) is not None}

    def kept_waiting(
        self,
        tenant: Tenant,
        running: Collection[RequestT],
        places: int,
        ready: Collection[RequestT] = (),
    ) -> int:
        """How many of a tenant's requests wait, but for those for which the next step has room.

        What came since the last step had no step to begin with yet.

        Args:
            running: the requests that run. places: how many may.
            ready: others that may go on without asking.
        """
        waiting = self.waiting[tenant]
        room = places - len(running) - (self.waiting.total() - waiting)
        if self.limit:
            room = min(room, self.limit - self._count_running(running, ready)[tenant])
        came = sum(self._came[line] for line in self._lines_with_room(tenant, running, ready))
        return waiting - max(min(room, came), 0)

    def _lines_with_room(
        self, tenant: Tenant, running: Iterable[RequestT], ready: Iterable[RequestT]
    ) -> set[Line]:
        """A tenant's lines whose adapter would have room if a step began now."""
        if self._refresh_room(running, ready):
            # All who found none are asked in the step that begins.
            self.look_soon()
        return {
            line
            for queue in self._queues
            for line, request, key in queue.first_of(tenant)
            if self._has_room(request, key)
        }

    def may_run(self, tenant: Tenant, request: RequestT, key: Key) -> bool:
        """Whether a tenant's first request may run; the base model is not limited."""
        if self.limit and tenant is not None and self._running[tenant] >= self.limit:
            return False
        return self._has_room(request, key)

    def _has_room(self, request: RequestT, key: Key) -> bool:
        adapter = None if self._room is None else self._adapter_of(request)
        return adapter is None or self._room is None or self._room.has(adapter, key[:2])

    def served(self, tenant: Tenant) -> float:
        """Tokens that a tenant was served, divided by its weight; 0 for all where sharing is not fair."""
        return self._served.get(tenant, 0.0)

    def charge(self, tenant: Tenant, tokens: float) -> None:
        """Count tokens that a tenant was served; fewer than 0 are given back."""
        if self.fair and tokens:
            self._served[tenant] = self.served(tenant) + tokens / self._weight(tenant)
            if tokens < 0:
                self._came_forward(tenant)

    def give_back(self, request: RequestT, tokens: float) -> None:
        """Of what a request that began in this step was charged, tokens that it did not take."""
        price = self._taken.get(request)
        if price:
            self.charge(self.tenant_of(request), -min(tokens, price))

    def next_queue(self) -> TenantQueue[RequestT] | None:
        """The queue that has the next request of all; None where no request may run."""
        found = [(key, queue) for queue in self._queues if (key := queue.first_key()) is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    # What follows is for their queues.

    def line_of(self, request: RequestT) -> Line:
        """The line in which a request waits."""
        return Line(self.tenant_of(request), self._line_of(request))

    def come(self, line: Line) -> None:
        """A request begins to wait."""
        if self.fair and not self.waiting[line.tenant]:
            self._lift(line.tenant)
        self.waiting[line.tenant] += 1
        self._came[line] += 1

    def leave(self, tenant: Tenant, requests: int = 1) -> None:
        """Requests wait no longer."""
        self.waiting[tenant] -= requests
        if not self.waiting[tenant]:
            del self.waiting[tenant]

    def look_soon(self) -> None:
        """Requests are gone: those that found no room may have been kept from it by one of them."""
        self._steps = _LOOK_AGAIN

    def take(self, tenant: Tenant, request: RequestT) -> None:
        """A request was taken to run, or to be put back."""
        self.leave(tenant)
        price = self._taken[request] = self._price(request)
        if price is not None:
            self._take_room(request)
            self._last = tenant
            self._level = max(self._level, self.served(tenant))
            self._count(tenant, 1)
            self.charge(tenant, price)

    def _take_room(self, request: RequestT) -> None:
        if self._room is not None and (adapter := self._adapter_of(request)) is not None:
            self._room.take(adapter)

    def put_back(self, tenant: Tenant, request: RequestT) -> None:
        """A request that was taken in this step, or ran and was preempted, waits again."""
        self.waiting[tenant] += 1
        # What was preempted was served, and is not charged again.
        price = self._taken.pop(request, 0.0)
        if price is not None:
            self._count(tenant, -1)
            self.charge(tenant, -price)
            self._came_forward(tenant)

    def _came_forward(self, tenant: Tenant) -> None:
        for queue in self._queues:
            queue.offer_all_of(tenant)

    def _count(self, tenant: Tenant, more: int) -> None:
        if self.limit:
            self._running[tenant] += more

    def _lift(self, tenant: Tenant) -> None:
        first = [self.served(line.tenant) for queue in self._queues for line in queue.first_line()]
        # The first may be one that cannot begin, and has not for long.
        least = max(self._level, min(first) if first else self.served(self._last))
        self._served[tenant] = max(self.served(tenant), least)
        if len(self._served) >= self._forget_from:
            # Below the least a tenant would be lifted to it anyway.
            self._served = {
                t: n for t, n in self._served.items() if n > least or self.waiting[t] or t == tenant
            }
            self._forget_from = max(_FORGET_FROM, 2 * len(self._served))


class TenantQueue(Generic[RequestT]):
    """Requests that wait; has the methods of vLLM's ``RequestQueue``.

    It is false where it holds requests and none of them may run, and its length counts all.
    """

    def __init__(self, tenants: Tenants[RequestT]) -> None:
        self._tenants = tenants
        self._lines: dict[Line, list[tuple[Rank, RequestT]]] = {}
        self._lines_of: dict[Tenant, set[Line]] = {}
        # A heap of lines. An entry counts while it is the key under which the line was last offered;
        # keys that grew since are found out when they come up.
        self._heap: list[tuple[Key, Line]] = []
        self._offered: dict[Line, Key] = {}
        self._passed_over: set[Line] = set()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __bool__(self) -> bool:
        return bool(self.first_line())

    def __iter__(self) -> Iterator[RequestT]:
        for _, request in sorted(
            itertools.chain.from_iterable(self._lines.values()), key=lambda entry: entry[0]
        ):
            yield request

    def add_request(self, request: RequestT) -> None:
        """Have a request wait behind those of its tenant."""
        line = self._tenants.line_of(request)
        self._tenants.come(line)
        self._put(line, request, next(self._tenants.order_of_coming))

    def prepend_request(self, request: RequestT) -> None:
        """Have one wait that was taken or has run, before the others of its tenant."""
        line = self._tenants.line_of(request)
        self._put(line, request, next(self._tenants.order_of_return))
        self._tenants.put_back(line.tenant, request)

    def prepend_requests(self, requests: Iterable[RequestT]) -> None:
        """The same for several; the last of them is then the first."""
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> RequestT:
        """The next request; raises IndexError where none may run."""
        return self._lines[self._first()][0][1]

    def pop_request(self) -> RequestT:
        """Take it."""
        line = self._first()
        entries = self._lines[line]
        _, request = heapq.heappop(entries)
        self._replace(line, entries)
        self._size -= 1
        self._tenants.take(line.tenant, request)
        return request

    def remove_request(self, request: RequestT) -> None:
        """Take out one request."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[RequestT]) -> None:
        """Take these requests out, as far as they are here."""
        gone = set(requests)
        for line in set(map(self._tenants.line_of, gone)) & self._lines.keys():
            entries = self._lines[line]
            kept = [entry for entry in entries if entry[1] not in gone]
            removed = len(entries) - len(kept)
            if not removed:
                continue
            heapq.heapify(kept)
            self._replace(line, kept)
            self._size -= removed
            self._tenants.leave(line.tenant, removed)
            self._tenants.look_soon()

    # What follows is for ``Tenants``.

    def first_line(self) -> list[Line]:
        """The line of the next request; none where none may run."""
        while self._heap:
            key, line = self._heap[0]
            current = self._key(line)
            if self._offered.get(line) != key:
                heapq.heappop(self._heap)
            elif current is None or not self._may_run(line, current):
                heapq.heappop(self._heap)
                del self._offered[line]
                if current is not None:
                    self._passed_over.add(line)
            elif current > key:
                heapq.heapreplace(self._heap, (current, line))
                self._offered[line] = current
            else:
                return [line]
        return []

    def first_key(self) -> Key | None:
        """Where the next request stands; None where none may run."""
        found = self.first_line()
        return self._offered[found[0]] if found else None

    def look_again(self) -> None:
        """Requests have ended: who was passed over may be next."""
        for line in list(self._passed_over):
            self._offer(line)

    def offer_all_of(self, tenant: Tenant) -> None:
        """A tenant stands before where it stood."""
        for line in self._lines_of.get(tenant, ()):
            self._offer(line)

    def first_of(self, tenant: Tenant) -> Iterator[tuple[Line, RequestT, Key]]:
        """The first request of each of a tenant's lines, and where it stands."""
        for line in self._lines_of.get(tenant, ()):
            if (key := self._key(line)) is not None:
                yield line, self._lines[line][0][1], key

    def _offer(self, line: Line) -> None:
        key = self._key(line)
        if key is None:
            return
        if self._may_run(line, key):
            self._passed_over.discard(line)
            known = self._offered.get(line)
            if known is None or key < known:
                self._offered[line] = key
                heapq.heappush(self._heap, (key, line))
                if len(self._heap) > 2 * len(self._lines) + 64:
                    self._offered = {t: k for t, k in self._offered.items() if t in self._lines}
                    self._heap = [(k, t) for t, k in self._offered.items()]
                    heapq.heapify(self._heap)
        elif line not in self._offered:
            self._passed_over.add(line)

    def _may_run(self, line: Line, key: Key) -> bool:
        return self._tenants.may_run(line.tenant, self._lines[line][0][1], key)

    def _first(self) -> Line:
        found = self.first_line()
        if not found:
            raise IndexError("no request may run")
        return found[0]

    def _put(self, line: Line, request: RequestT, place: int) -> None:
        rank: Rank = (0, 0.0, place)
        if self._tenants.by_priority:
            rank = (request.priority, request.arrival_time, place)
        heapq.heappush(self._lines.setdefault(line, []), (rank, request))
        self._lines_of.setdefault(line.tenant, set()).add(line)
        self._size += 1
        self._offer(line)

    def _replace(self, line: Line, entries: list[tuple[Rank, RequestT]]) -> None:
        """A line has fewer requests than before; one that has none is forgotten."""
        if entries:
            self._lines[line] = entries
            return
        del self._lines[line]
        self._passed_over.discard(line)
        others = self._lines_of[line.tenant]
        others.remove(line)
        if not others:
            del self._lines_of[line.tenant]

    def _key(self, line: Line) -> Key | None:
        entries = self._lines.get(line)
        if entries is None:
            return None
        priority, arrival, place = entries[0][0]
        return priority, self._tenants.served(line.tenant), arrival, place
