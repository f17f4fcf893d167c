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
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from vllm_vlora.plugin.admission import Adapter, Room

Tenant = str | None
# Priority, time of arrival where priorities count, place in the order of coming.
Rank = tuple[int, float, int]
# Priority, tokens served where sharing is fair, and the rest of the rank of the tenant's first request.
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
        goes_on_elsewhere: whether what was taken and could not begin yet may go on without coming back.
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
        goes_on_elsewhere: bool = False,
    ) -> None:
        self.fair, self.limit, self.by_priority = fair, limit, by_priority
        self.tenant_of, self._price, self._weight = tenant_of, price, weight
        self._room, self._adapter_of = room, adapter_of
        self._goes_on_elsewhere = goes_on_elsewhere
        self._steps = 0
        self.waiting: Counter[Tenant] = Counter()
        # Of these, since the last step began.
        self._came: Counter[Tenant] = Counter()
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

    def begin_step(self, running: Collection[RequestT], ready: Iterable[RequestT] = ()) -> None:
        """Before requests are taken: which run now, and which others may go on without asking."""
        self._taken.clear()
        self._came.clear()
        again = bool(self.limit)
        if self.limit:
            self._running = Counter(map(self.tenant_of, running))
        if self.waiting:
            self._steps += 1
            again = self._refresh_room(running, ready) or again
        for queue in self._queues if again else ():
            queue.look_again()

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
        ready: Iterable[RequestT] = (),
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
            room = min(room, self.limit - sum(self.tenant_of(one) == tenant for one in running))
        if self._room is not None and not self._finds_room(tenant, running, ready):
            room = 0
        return waiting - max(min(room, self._came[tenant]), 0)

    def _finds_room(
        self, tenant: Tenant, running: Iterable[RequestT], ready: Iterable[RequestT]
    ) -> bool:
        """Whether a tenant's adapter would have room if a step began now."""
        if self._refresh_room(running, ready):
            # All who found none are asked in the step that begins.
            self.look_soon()
        first = [one for queue in self._queues if (one := queue.first_of(tenant)) is not None]
        return any(self._has_room(*one) for one in first)

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

    def come(self, tenant: Tenant) -> None:
        """A request begins to wait."""
        if self.fair and not self.waiting[tenant]:
            self._lift(tenant)
        self.waiting[tenant] += 1
        self._came[tenant] += 1

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
        if price is not None or self._goes_on_elsewhere:
            self._take_room(request)
        if price is not None:
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
            queue.offer(tenant)

    def _count(self, tenant: Tenant, more: int) -> None:
        if self.limit:
            self._running[tenant] += more

    def _lift(self, tenant: Tenant) -> None:
        first = [self.served(t) for queue in self._queues for t in queue.first_tenant()]
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
        self._lines: dict[Tenant, list[tuple[Rank, RequestT]]] = {}
        # A heap of tenants. An entry counts while it is the key under which the tenant was last offered;
        # keys that grew since are found out when they come up.
        self._heap: list[tuple[Key, Tenant]] = []
        self._offered: dict[Tenant, Key] = {}
        self._passed_over: set[Tenant] = set()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __bool__(self) -> bool:
        return bool(self.first_tenant())

    def __iter__(self) -> Iterator[RequestT]:
        for _, request in sorted(
            itertools.chain.from_iterable(self._lines.values()), key=lambda entry: entry[0]
        ):
            yield request

    def add_request(self, request: RequestT) -> None:
        """Have a request wait behind those of its tenant."""
        tenant = self._tenants.tenant_of(request)
        self._tenants.come(tenant)
        self._put(tenant, request, next(self._tenants.order_of_coming))

    def prepend_request(self, request: RequestT) -> None:
        """Have one wait that was taken or has run, before the others of its tenant."""
        tenant = self._tenants.tenant_of(request)
        self._put(tenant, request, next(self._tenants.order_of_return))
        self._tenants.put_back(tenant, request)

    def prepend_requests(self, requests: Iterable[RequestT]) -> None:
        """The same for several; the last of them is then the first."""
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> RequestT:
        """The next request; raises IndexError where none may run."""
        return self._lines[self._first()][0][1]

    def pop_request(self) -> RequestT:
        """Take it."""
        tenant = self._first()
        line = self._lines[tenant]
        _, request = heapq.heappop(line)
        if not line:
            del self._lines[tenant]
        self._size -= 1
        self._tenants.take(tenant, request)
        return request

    def remove_request(self, request: RequestT) -> None:
        """Take out one request."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[RequestT]) -> None:
        """Take these requests out, as far as they are here."""
        gone = set(requests)
        for tenant in {self._tenants.tenant_of(request) for request in gone} & self._lines.keys():
            line = self._lines[tenant]
            kept = [entry for entry in line if entry[1] not in gone]
            removed = len(line) - len(kept)
            if not removed:
                continue
            heapq.heapify(kept)
            if kept:
                self._lines[tenant] = kept
            else:
                del self._lines[tenant]
            self._size -= removed
            self._tenants.leave(tenant, removed)
            self._tenants.look_soon()

    # What follows is for ``Tenants``.

    def first_tenant(self) -> list[Tenant]:
        """Whose request is next; nobody's where none may run."""
        while self._heap:
            key, tenant = self._heap[0]
            current = self._key(tenant)
            if self._offered.get(tenant) != key:
                heapq.heappop(self._heap)
            elif current is None or not self._may_run(tenant, current):
                heapq.heappop(self._heap)
                del self._offered[tenant]
                if current is not None:
                    self._passed_over.add(tenant)
            elif current > key:
                heapq.heapreplace(self._heap, (current, tenant))
                self._offered[tenant] = current
            else:
                return [tenant]
        return []

    def first_key(self) -> Key | None:
        """Where the next request stands; None where none may run."""
        found = self.first_tenant()
        return self._offered[found[0]] if found else None

    def look_again(self) -> None:
        """Requests have ended: who was passed over may be next."""
        for tenant in list(self._passed_over):
            self.offer(tenant)

    def offer(self, tenant: Tenant) -> None:
        """A tenant stands before where it stood."""
        key = self._key(tenant)
        if key is None:
            self._passed_over.discard(tenant)
        elif self._may_run(tenant, key):
            self._passed_over.discard(tenant)
            known = self._offered.get(tenant)
            if known is None or key < known:
                self._offered[tenant] = key
                heapq.heappush(self._heap, (key, tenant))
                if len(self._heap) > 2 * len(self._lines) + 64:
                    self._offered = {t: k for t, k in self._offered.items() if t in self._lines}
                    self._heap = [(k, t) for t, k in self._offered.items()]
                    heapq.heapify(self._heap)
        elif tenant not in self._offered:
            self._passed_over.add(tenant)

    def first_of(self, tenant: Tenant) -> tuple[RequestT, Key] | None:
        """The first request of a tenant, and where it stands; None where none waits here."""
        key = self._key(tenant)
        return None if key is None else (self._lines[tenant][0][1], key)

    def _may_run(self, tenant: Tenant, key: Key) -> bool:
        return self._tenants.may_run(tenant, self._lines[tenant][0][1], key)

    def _first(self) -> Tenant:
        found = self.first_tenant()
        if not found:
            raise IndexError("no request may run")
        return found[0]

    def _put(self, tenant: Tenant, request: RequestT, place: int) -> None:
        rank: Rank = (0, 0.0, place)
        if self._tenants.by_priority:
            rank = (request.priority, request.arrival_time, place)
        heapq.heappush(self._lines.setdefault(tenant, []), (rank, request))
        self._size += 1
        self.offer(tenant)

    def _key(self, tenant: Tenant) -> Key | None:
        line = self._lines.get(tenant)
        if line is None:
            return None
        priority, arrival, place = line[0][0]
        return priority, self._tenants.served(tenant), arrival, place
