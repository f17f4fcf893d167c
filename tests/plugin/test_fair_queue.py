"""Whose request is next: the queue beside plain models of what it promises."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.plugin.admission import Adapter, Room
from vllm_vlora.plugin.fair_queue import TenantQueue, Tenants


class Request:
    """A request of a tenant; its price is what it takes when it begins."""

    def __init__(
        self, tenant: str | None, price: float | None = 1.0, priority: int = 0, arrival: float = 0.0
    ) -> None:
        self.tenant, self.price = tenant, price
        self.priority, self.arrival_time = priority, arrival

    def __repr__(self) -> str:
        return f"{self.tenant}:{self.price}"


def make(
    fair: bool = True, limit: int = 0, by_priority: bool = False, **weights: float
) -> Tenants[Request]:
    return Tenants(
        fair=fair,
        limit=limit,
        by_priority=by_priority,
        tenant_of=lambda request: request.tenant,
        price=lambda request: request.price,
        weight=lambda tenant: weights.get(str(tenant), 1.0),
    )


def fill(queue: TenantQueue[Request], tenants: Sequence[str | None], price: float = 1.0) -> None:
    for tenant in tenants:
        queue.add_request(Request(tenant, price))


def take(queue: TenantQueue[Request], most: int = 1000) -> str:
    """Tenants of the next requests, in order; the base model is '-'."""
    taken = ""
    while queue and len(taken) < most:
        first = queue.peek_request()
        assert queue.pop_request() is first
        taken += first.tenant or "-"
    return taken


# --- one thing at a time --------------------------------------------------------------------------


def test_a_burst_takes_turns_with_what_comes_behind_it() -> None:
    queue = make().queue()
    fill(queue, [*("a" * 6), *"bb", None])
    assert take(queue) == "ab-abaaaa"
    assert (len(queue), bool(queue), list(queue)) == (0, False, [])
    with pytest.raises(IndexError):
        queue.peek_request()
    with pytest.raises(IndexError):
        queue.pop_request()


def test_without_fairness_the_order_is_that_of_coming() -> None:
    queue = make(fair=False, limit=9).queue()
    fill(queue, "aabcab")
    assert take(queue) == "aabcab"


def test_answers_count_too_and_weights_divide() -> None:
    tenants = make(a=2.0)
    queue = tenants.queue()
    fill(queue, "aaaaaabbb")
    assert take(queue, 6) == "abaaba"
    tenants.charge("a", 4)
    assert take(queue) == "baa"
    assert tenants.served("a") == (6 + 4) / 2


def test_who_comes_back_has_saved_nothing_up() -> None:
    tenants = make()
    queue = tenants.queue()
    fill(queue, ["new"])
    take(queue)
    fill(queue, "b" * 100)
    take(queue)
    fill(queue, "bbb")
    fill(queue, ["new"] * 3)
    assert take(queue) == "bnewbnewbnew"


def test_who_was_served_before_anyone_else_came_does_not_pay_for_it() -> None:
    tenants = make()
    queue = tenants.queue()
    for _ in range(50):
        fill(queue, "a")
        take(queue)
    fill(queue, "aabb")
    assert take(queue) == "abab"


def test_what_was_found_in_the_prefix_cache_is_given_back_once() -> None:
    tenants = make()
    queue = tenants.queue()
    long = Request("a", 10)
    tenants.begin_step([])
    queue.add_request(long)
    queue.pop_request()
    tenants.give_back(long, 7)
    assert tenants.served("a") == 3
    short = Request("c", 2)
    queue.add_request(short)
    queue.pop_request()
    started = tenants.served("c")
    tenants.give_back(short, 7)
    assert tenants.served("c") == started - 2
    other = Request("a", 2)
    tenants.give_back(other, 7)
    tenants.begin_step([*map(Request, ["a"])])
    tenants.give_back(long, 7)
    assert tenants.served("a") == 3


def test_a_tenant_at_its_limit_is_passed_over_and_the_base_model_is_not() -> None:
    tenants = make(fair=False, limit=2)
    queue = tenants.queue()
    fill(queue, ["a", "a", "a", None, None, None, "b"])
    tenants.begin_step([])
    assert take(queue) == "aa---b"
    assert (len(queue), bool(queue)) == (1, False)
    tenants.begin_step([*map(Request, ["a", "a", "b"])])
    assert not queue
    fill(queue, "ab")
    assert take(queue) == "b"
    tenants.begin_step([*map(Request, ["a", "b", "b"])])
    assert take(queue) == "a"
    tenants.begin_step([])
    assert take(queue) == "a"
    tenants.begin_step([])
    assert (len(queue), queue._passed_over) == (0, set())


def test_what_is_put_back_is_first_again_and_costs_nothing() -> None:
    tenants = make(limit=1)
    queue = tenants.queue()
    tenants.begin_step([])
    fill(queue, "aab")
    first = queue.pop_request()
    assert take(queue) == "b"
    queue.prepend_requests([first])
    assert (tenants.served("a"), tenants.waiting["a"]) == (0, 2)
    assert queue.pop_request() is first
    tenants.begin_step([*map(Request, ["a", "b"])])
    assert not queue
    # Preempted: its prompt was computed, and counts; it goes before the other of its tenant.
    queue.prepend_request(first)
    assert tenants.served("a") == 1
    assert queue.pop_request() is first
    assert not queue


def test_what_cannot_begin_is_looked_at_without_a_price_or_a_place() -> None:
    tenants = make(limit=1)
    queue = tenants.queue()
    tenants.begin_step([])
    compiling = Request("a", None)
    queue.add_request(compiling)
    fill(queue, "a")
    assert queue.pop_request() is compiling
    assert tenants.served("a") == 0
    assert take(queue) == "a"
    queue.prepend_request(compiling)
    assert (len(queue), tenants.waiting["a"], tenants.served("a")) == (1, 1, 1)
    assert not queue, "the other runs"


def test_priority_comes_before_fairness_and_time_of_arrival_before_order() -> None:
    queue = make(by_priority=True).queue()
    requests = [
        Request("a", 1, priority=1, arrival=3.0),
        Request("a", 1, priority=1, arrival=1.0),
        Request("b", 1, priority=1, arrival=4.0),
        Request("a", 1, priority=0, arrival=9.0),
    ]
    for request in requests:
        queue.add_request(request)
    assert list(queue) == [requests[i] for i in (3, 1, 0, 2)]
    order = [queue.pop_request() for _ in range(4)]
    assert order == [requests[i] for i in (3, 2, 1, 0)]


def test_two_queues_share_counters_and_name_the_one_that_is_next() -> None:
    tenants = make()
    waiting, skipped = tenants.queue(), tenants.queue()
    assert tenants.next_queue() is None
    fill(waiting, "a" * 3)
    fill(skipped, "b")
    order = ""
    while (queue := tenants.next_queue()) is not None:
        order += take(queue, 1)
    assert order == "abaa"
    assert not tenants.waiting


def test_what_is_given_back_counts_in_both_queues_at_once() -> None:
    tenants = make()
    waiting, skipped = tenants.queue(), tenants.queue()
    tenants.begin_step([])
    long = Request("a", 10)
    waiting.add_request(long)
    fill(waiting, "aa")
    fill(skipped, "bb", price=4)
    waiting.pop_request()
    assert tenants.next_queue() is skipped
    assert waiting.first_key() == (0, 10, 0, 1), "it has moved back"
    skipped.pop_request()
    tenants.give_back(long, 9)
    assert tenants.next_queue() is waiting


def test_an_idle_session_does_not_hold_down_what_newcomers_start_from() -> None:
    tenants = make()
    queue = tenants.queue()
    session = Request("idle", None)
    queue.add_request(session)
    fill(queue, "a" * 60)
    for _ in range(50):
        tenants.begin_step([])
        assert queue.pop_request() is session
        queue.pop_request()
        queue.prepend_request(session)
    fill(queue, "n" * 20)
    tenants.begin_step([])
    assert queue.pop_request() is session
    assert take(queue, 8) == "nananana"


def test_requests_are_taken_out_wherever_they_are() -> None:
    tenants = make()
    queue, other = tenants.queue(), tenants.queue()
    requests = [Request(tenant) for tenant in "aabbc"]
    for request in requests:
        queue.add_request(request)
    queue.remove_requests([requests[0], requests[3], Request("a"), Request("z")])
    other.remove_requests(requests)
    queue.remove_request(requests[4])
    assert list(queue) == [requests[1], requests[2]]
    assert tenants.waiting == {"a": 1, "b": 1}
    assert take(queue) == "ab"


def test_names_that_come_and_go_leave_nothing_behind() -> None:
    tenants = make()
    queue = tenants.queue()
    for number in range(20_000):
        tenants.begin_step([])
        fill(queue, [f"blend {number}"])
        queue.pop_request()
    assert len(tenants._served) <= 2048
    assert len(queue._heap) <= 64 + 2
    assert (len(tenants.waiting), len(tenants._running), len(tenants._taken)) == (0, 0, 1)


def test_one_that_is_skipped_for_ever_leaves_nothing_behind() -> None:
    tenants = make()
    queue = tenants.queue()
    fill(queue, "ab")
    for _ in range(1000):
        tenants.begin_step([])
        skipped = [queue.pop_request(), queue.pop_request()]
        assert {request.tenant for request in skipped} == {"a", "b"}
        queue.prepend_requests(reversed(skipped))
    assert len(queue._heap) < 100
    assert (tenants.served("a"), tenants.served("b")) == (0, 0)


# --- anything that may happen ---------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "d", None])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), NAMES, st.integers(1, 50), st.integers(0, 2)),
        st.tuples(st.just("blocked"), NAMES, st.just(0), st.integers(0, 2)),
        st.tuples(st.just("step"), st.integers(0, 4), st.booleans(), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("end"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("preempt"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=60,
)


class World:
    """A scheduler with two queues, as vLLM's older ones have, and what is true of it beside."""

    def __init__(self, fair: bool, limit: int, by_priority: bool) -> None:
        self.tenants = make(fair, limit, by_priority)
        self.limit = limit
        self.waiting, self.skipped = self.tenants.queue(), self.tenants.queue()
        self.outside: list[Request] = []
        self.running: list[Request] = []

    def come(self, request: Request) -> None:
        (self.skipped if request.price is None else self.waiting).add_request(request)
        self.outside.append(request)

    def step(self, places: int, skip_first: bool) -> None:
        self.tenants.begin_step(self.running)
        skipped = []
        while len(self.running) < places + 4 and (queue := self.tenants.next_queue()) is not None:
            assert queue
            request = queue.peek_request()
            assert queue.pop_request() is request
            if request.price is None or (skip_first and not skipped):
                skipped.append(request)
            else:
                self.running.append(request)
                self.outside.remove(request)
                self.tenants.charge(request.tenant, 2)
        else:
            if len(self.running) < places + 4:
                self.nobody_could_begin(skipped)
        self.skipped.prepend_requests(reversed(skipped))

    def nobody_could_begin(self, skipped: list[Request]) -> None:
        run = Counter(request.tenant for request in self.running)
        run.update(request.tenant for request in skipped if request.price is not None)
        for request in self.outside:
            full = self.limit and request.tenant and run[request.tenant] >= self.limit
            assert full or request in skipped, f"{request} waits, and there is room"

    def check(self) -> None:
        held = [*self.waiting, *self.skipped]
        assert Counter(map(id, held)) == Counter(map(id, self.outside))
        assert len(self.waiting) + len(self.skipped) == len(self.outside)
        assert self.tenants.waiting == Counter(request.tenant for request in self.outside)
        assert min(self.tenants._served.values(), default=0) >= 0
        if self.limit:
            run = Counter(request.tenant for request in self.running)
            assert all(count <= self.limit for name, count in run.items() if name)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.booleans(), st.integers(0, 3), st.booleans())
def test_nothing_is_lost_nobody_is_above_a_limit_and_no_room_is_left(
    events: list[Any], fair: bool, limit: int, by_priority: bool
) -> None:
    world = World(fair, limit, by_priority)
    for what, first, second, third in events:
        if what in ("come", "blocked"):
            price = float(second) if what == "come" else None
            world.come(Request(first, price, priority=third))
        elif what == "step":
            world.step(first, second)
        elif what == "abort" and world.outside:
            gone = world.outside.pop(first % len(world.outside))
            world.waiting.remove_requests([gone])
            world.skipped.remove_requests([gone])
        elif what == "end" and world.running:
            world.running.pop(first % len(world.running))
        elif what == "preempt" and world.running:
            back = world.running.pop()
            world.waiting.prepend_request(back)
            world.outside.append(back)
        world.check()
    # Everyone gets in when those that run end.
    for request in world.outside:
        request.price = request.price or 1.0
    for _ in range(len(world.outside) + 1):
        world.running.clear()
        world.step(0, False)
        world.check()
    assert not world.outside


PRICES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), PRICES, min_size=2), st.data())
def test_tenants_that_always_wait_are_served_alike(
    prices: dict[str, list[int]], data: st.DataObject
) -> None:
    """Theorem 4.4 of the paper, with weights: the difference is bounded by what one request may cost."""
    weights = {name: data.draw(st.sampled_from([0.5, 1.0, 3.0]), name) for name in prices}
    tenants = make(**weights)
    queue = tenants.queue()
    for name, costs in prices.items():
        for cost in costs:
            queue.add_request(Request(name, cost))
    bound = {name: max(costs) / weights[name] for name, costs in prices.items()}
    got: dict[str, float] = defaultdict(float)
    left = {name: len(costs) for name, costs in prices.items()}
    while all(left.values()):
        request = queue.pop_request()
        assert request.tenant is not None
        assert request.price is not None
        got[request.tenant] += request.price / weights[request.tenant]
        left[request.tenant] -= 1
        for one in prices:
            for other in prices:
                assert abs(got[one] - got[other]) <= max(bound[one], bound[other]) + 1e-9


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 40))
def test_nobody_waits_longer_than_a_bound_however_many_the_others_send(
    others: int, prices: list[int], own: int
) -> None:
    """A newcomer's request begins before any other tenant got more than two requests' worth."""
    queue = make().queue()
    number = 0

    def send(tenant: str) -> None:
        nonlocal number
        queue.add_request(Request(tenant, prices[number % len(prices)]))
        number += 1

    names = [f"other {i}" for i in range(others)]
    for name in names * 50:
        send(name)
    for _ in range(30):
        send(str(queue.pop_request().tenant))
    mine = Request("newcomer", own)
    queue.add_request(mine)
    got: Counter[str] = Counter()
    while (request := queue.pop_request()) is not mine:
        assert request.price is not None
        got[str(request.tenant)] += int(request.price)
        send(str(request.tenant))
    assert all(count <= 2 * max(prices) for count in got.values())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, 2), st.integers(0, 5)), max_size=40), st.booleans())
def test_without_fairness_the_order_is_vllms_own(
    requests: list[tuple[str | None, int, int]], by_priority: bool
) -> None:
    queue = make(fair=False, by_priority=by_priority).queue()
    made = [Request(name, 1, priority, float(arrival)) for name, priority, arrival in requests]
    for request in made:
        queue.add_request(request)
    expected = sorted(made, key=lambda r: (r.priority, r.arrival_time)) if by_priority else made
    assert [queue.pop_request() for _ in made] == expected


# --- room for adapters ----------------------------------------------------------------------------


def make_with_room(slots: int) -> Tenants[Request]:
    """Of tenants that are adapters, and need a slot each."""
    return Tenants(
        fair=False,
        limit=0,
        by_priority=False,
        tenant_of=lambda request: request.tenant,
        price=lambda request: request.price,
        room=Room(slots, 9),
        adapter_of=lambda r: Adapter(ord(r.tenant), True) if r.tenant else None,
    )


def test_a_tenant_without_room_is_passed_over_until_there_is_some() -> None:
    tenants = make_with_room(2)
    queue = tenants.queue()
    fill(queue, ["a", "b", "c", "a", None, "c"])
    tenants.begin_step([])
    assert take(queue) == "aba-"
    assert (len(queue), bool(queue)) == (2, False)
    fill(queue, "cb")
    tenants.begin_step([*map(Request, "ab")])
    assert take(queue) == "b"
    tenants.begin_step([*map(Request, "b")])
    assert take(queue) == "ccc"
    assert not tenants.waiting


def test_what_cannot_begin_takes_no_room() -> None:
    """It comes back to be asked in each step."""
    tenants = make_with_room(1)
    queue = tenants.queue()
    session = Request("a", None)
    queue.add_request(session)
    fill(queue, "b")
    tenants.begin_step([])
    assert queue.pop_request() is session
    assert take(queue) == "b"


def test_who_goes_on_unasked_counts_against_its_limit_unless_it_is_idle() -> None:
    tenants = make(limit=2)
    tenants._idle = lambda request: request.price is None
    queue = tenants.queue()
    fill(queue, "aaa")
    ready = [Request("a"), Request("a", None)]
    assert tenants.kept_waiting("a", [], 9, ready) == 2
    tenants.begin_step([], ready)
    assert take(queue) == "a"
    assert tenants.kept_waiting("a", [Request("a")], 9, ready) == 2
    tenants.begin_step([], [])
    assert take(queue) == "aa"


def test_lines_of_a_tenant_share_its_counter_its_limit_and_its_order() -> None:
    """Two states of a task, told apart by what a request costs; one of them has no room."""
    tenants: Tenants[Request] = Tenants(
        fair=True,
        limit=3,
        by_priority=False,
        tenant_of=lambda request: request.tenant,
        price=lambda request: request.price,
        room=Room(1, 9),
        adapter_of=lambda r: (
            Adapter(int(r.price or 0), needs_slot=r.price != 2) if r.tenant else None
        ),
        line_of=lambda request: request.price,
    )
    queue = tenants.queue()
    other, *own = [Request("b", 3), *(Request("a", price) for price in (1, 2, 2, 1, 2))]
    for request in own:
        queue.add_request(request)
    tenants.begin_step([other])
    assert [queue.pop_request() for _ in range(3)] == [own[1], own[2], own[4]]
    assert (tenants.served("a"), tenants.waiting["a"], len(queue)) == (6, 2, 2)
    tenants.begin_step(own[1:3])
    assert queue.pop_request() is own[0], "its slot is free, and one more may run"
    assert not queue
    queue.remove_requests(own)
    assert (len(queue), queue._lines, queue._lines_of, queue._passed_over) == (0, {}, {}, set())


@pytest.mark.parametrize("states", [1, 2, 3])
def test_the_order_is_the_same_with_lines_for_each_adapter(states: int) -> None:
    """Where all have room, of fairness and of coming."""
    for fair in (False, True):
        tenants = make(fair=fair)
        tenants._line_of = lambda request: int(request.price or 0) % states
        plain = make(fair=fair)
        queue, alone = tenants.queue(), plain.queue()
        requests = [Request("abc"[i % 3 if i % 5 else 0], 1 + i * 7 % 4) for i in range(60)]
        for request in requests:
            queue.add_request(request)
            alone.add_request(request)
        assert [queue.pop_request() for _ in requests] == [alone.pop_request() for _ in requests]


def count_asked(tenants: Tenants[Request]) -> list[str | None]:
    """Who is asked from now on whether a request may run."""
    asked: list[str | None] = []
    original = tenants.may_run

    def may_run(tenant: str | None, request: Request, key: Any) -> bool:
        asked.append(tenant)
        return original(tenant, request, key)

    tenants.may_run = may_run  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize("others", [0, 1], ids=["the same run", "others that need no slot"])
def test_a_step_costs_nothing_for_those_that_find_no_room(others: int) -> None:
    """10,000 requests of 500 adapters, while all slots are taken."""
    tenants = make_with_room(8)
    queue = tenants.queue()
    slotted = tenants._adapter_of
    tenants._adapter_of = lambda r: (
        Adapter(ord(r.tenant), False) if r.tenant and ord(r.tenant) >= 1000 else slotted(r)
    )
    tenants._room = Room(8, 1000)
    running = [Request(chr(number)) for number in range(8)]
    tenants.begin_step(running)
    fill(queue, [chr(100 + number % 500) for number in range(10_000)])
    tenants.begin_step(running)
    assert not queue
    asked = count_asked(tenants)
    for step in range(320):
        tenants.begin_step([*running, Request(chr(1000 + step % 7 * others))])
        assert not queue
    assert len(asked) <= 320 // 32 * 500 * 2


def test_a_step_costs_nothing_for_those_that_are_at_their_limit() -> None:
    tenants = make(limit=1)
    queue = tenants.queue()
    names = [str(number) for number in range(500)]
    fill(queue, names * 2)
    tenants.begin_step([])
    assert take(queue, 10_000) == "".join(names)
    assert not queue
    running = [Request(name) for name in names]
    asked = count_asked(tenants)
    for _ in range(10):
        tenants.begin_step(running)
        assert not queue
    assert asked == []
    tenants.begin_step(running[1:])
    assert take(queue) == "0"
    assert set(asked) == {"0"}
