"""Which tasks are held: workers of given budgets, and requests that come and go."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from residency_world import Workers, lora, name_of, path_of

from vllm_vlora.errors import CheckpointError, MemoryBudgetError, VLoRAError
from vllm_vlora.plugin.arrivals import Arrivals, Brought, Waiter
from vllm_vlora.plugin.counters import ServingCounters
from vllm_vlora.plugin.residency import GRACE, Residency

NAMES = list("abcdef")
sizes = st.fixed_dictionaries(
    {name: st.lists(st.integers(1, 6), min_size=2, max_size=2) for name in NAMES}
)
steps = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "ask", "done"]), st.sampled_from(NAMES)), max_size=40
)


@given(sizes=sizes, budgets=st.lists(st.integers(0, 14), min_size=2, max_size=2), script=steps)
def test_no_budget_is_passed_and_nothing_in_use_gives_way(
    sizes: dict[str, list[int]], budgets: list[int], script: list[tuple[str, str]]
) -> None:
    workers = Workers(budgets, sizes)
    order: OrderedDict[str, None] = OrderedDict()  # By last use.
    for kind, name in script:
        if kind == "done":
            workers.used.discard(name)
            continue
        before = set(workers.on[0])
        keep = [n for n in before if n in workers.used or n == name] + [name] * (name not in before)
        fits = (
            all(sum(sizes[n][w] for n in keep) <= budget for w, budget in enumerate(budgets))
            or name in before
        )
        alone = all(sizes[name][w] <= budget for w, budget in enumerate(budgets))
        if not alone and not keep[:-1]:
            with pytest.raises(MemoryBudgetError, match=f"no room for task '{name}'"):
                workers.residency.place(lora(name))
        else:
            assert (workers.residency.place(lora(name)) is not None) == fits
        if fits:
            order[name] = None
            order.move_to_end(name)
            workers.used.add(name)
        assert workers.on[0] == workers.on[1]
        assert workers.used <= workers.on[0]
        assert all(workers.nbytes(w) <= budget for w, budget in enumerate(budgets))
        # Of those that no request needs, the ones that stayed were used after the ones that went.
        gone = [n for n in before - workers.on[0] if n not in workers.used]
        stayed = [n for n in before & workers.on[0] if n not in workers.used]
        ranks = list(order)
        assert all(ranks.index(g) < ranks.index(s) for g in gone for s in stayed)


def test_workers_are_asked_once_a_task_and_never_for_what_they_began_with() -> None:
    workers = Workers([12], {"a": [4], "b": [4], "s": [4]}, start=("s",))
    for name in ("s", "a", "b", "a", "s", "b"):
        assert workers.residency.place(lora(name)) is not None
    assert workers.told == ["a", "b"]
    workers.sizes["c"] = [8]
    assert workers.residency.place(lora("c")) == 8
    assert workers.on == [{"b", "c"}], "what they began with gives way like the others"


def test_a_task_that_one_worker_cannot_read_is_held_by_none() -> None:
    workers = Workers([10, 10], {"a": [4, 4]})
    workers.broken.add("a")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="a is damaged"):
            workers.residency.place(lora("a"))
        assert workers.on == [set(), set()]
    assert workers.dropped == ["a", "a"]
    workers.broken.clear()
    assert workers.residency.place(lora("a")) == 4
    assert workers.on == [{"a"}, {"a"}]


def test_retired_tasks_go_when_nobody_has_needed_them_for_a_while() -> None:
    workers = Workers([20], {name: [2] for name in "abcd"}, start=tuple("abcd"))
    workers.used = {"b"}
    workers.residency.retire([path_of("a")])
    workers.now = GRACE - 1
    workers.residency.release()
    assert workers.on == [set("abcd")], "an API server may not have heard of it"
    # d is served again before its time was up.
    workers.residency.retire(map(path_of, "ad"))
    workers.now = GRACE
    workers.residency.release()
    assert workers.on == [set("abd")]
    assert (workers.dropped, workers.tidied) == (["c"], 0)
    workers.used = set()
    workers.now += GRACE - 1.5
    workers.residency.release()
    assert workers.on == [set("abd")], "counted from its last request"
    workers.now += 2
    workers.residency.release()
    assert workers.on == [set("ad")]
    assert workers.tidied == 1
    workers.residency.release()
    assert workers.tidied == 1


def test_two_tasks_in_use_never_have_one_number() -> None:
    workers = Workers([20], {name: [2] for name in "abc"})
    number = workers.residency.number
    assert number(path_of("a"), 7) == 7
    workers.used = {"a"}
    other = number(path_of("b"), 7)
    third = number(path_of("c"), 7)
    assert len({7, other, third}) == 3
    assert max(other, third) < 2**31
    workers.used = {"a", "b", "c"}
    assert [number(path_of(name), 7) for name in "abc"] == [7, other, third]
    workers.residency.forget(path_of("b"))
    workers.used = {"c"}
    assert number(path_of("b"), 7) == 7, "nobody uses a's any more"


def test_nothing_is_remembered_of_what_came_and_went() -> None:
    """Clients can make up any number of blends, each a task of its own."""
    names = [chr(0x4E00 + i) for i in range(300)]
    workers = Workers([4], {name: [4] for name in names})
    workers.broken = set(names[::3])
    residency = workers.residency
    for number, name in enumerate(names, 1):
        residency.number(path_of(name), number)
        with contextlib.suppress(CheckpointError):
            residency.place(lora(name))
    sizes = {k: len(v) for k, v in vars(residency).items() if isinstance(v, (dict, set, list))}
    assert max(sizes.values()) <= 7, sizes


# --- who waits --------------------------------------------------------------------------------------


class Asked:
    """A question to the workers, answered when ``answer`` is called, or when it is waited for."""

    def __init__(self, answer: Callable[[], list[list[Brought]]]) -> None:
        self._answer = answer
        self._found: list[list[Brought]] = []
        self.waited = False

    def done(self) -> bool:
        return bool(self._found)

    def answer(self) -> None:
        self._found = self._answer()

    def result(self) -> list[list[Brought]]:
        if not self._found:
            self.waited = True
            self.answer()
        return self._found


class World:
    """Workers, what has been staged, and who was let in or turned away."""

    def __init__(self, budget: int, sizes: dict[str, int], workers: int = 1) -> None:
        self.workers = Workers(
            [budget] * workers, {n: [size] * workers for n, size in sizes.items()}
        )
        self.questions: list[Asked] = []
        self._forget = self.workers.forget
        self.workers.forget = self._forget_later  # type: ignore[method-assign]
        self.asked: list[str] = []
        self.entered: list[str] = []
        self.failed: list[tuple[str, VLoRAError]] = []
        self.steps_go_on = False
        self.counters = ServingCounters(9, 9)
        self.arrivals = Arrivals(
            self.workers.residency,
            self._bring,
            self.counters,
            steps_go_on=lambda: self.steps_go_on,
            alone=workers == 1,
            clock=lambda: self.workers.now,
        )

    def _bring(self, requests: Any, hold: int, instead_of: Any, drop: Any, fetch: Any) -> Any:
        self.asked.append("".join(request.lora_name for request in requests))

        def answer() -> list[list[Brought]]:
            for path in drop:
                self._forget(path, wholly=True)
            return [
                self.workers.bring_to(worker, requests, hold, instead_of, fetch)
                for worker in range(len(self.workers.staged))
            ]

        self.questions.append(Asked(answer))
        return self.questions[-1]

    def _forget_later(self, path: str, wholly: bool = False) -> None:
        """Workers do what they are told in that order: first they answer."""
        self.answer()
        self._forget(path, wholly)

    def answer(self) -> None:
        """Let the workers answer what they were asked."""
        if self.questions and not self.questions[-1].done():
            self.questions[-1].answer()

    def wait(self, request_id: str) -> None:
        """A request for the task of its first letter."""
        name = request_id[0]

        def ready() -> None:
            self.entered.append(request_id)
            self.workers.used.add(name)

        waiter = Waiter(
            ready,
            lambda error: self.failed.append((request_id, error)),
            SimpleNamespace(request_id=request_id),
        )
        self.arrivals.wait(lora(name), waiter)


def test_who_waits_is_let_in_when_the_task_has_come_and_nobody_else_is_kept() -> None:
    world = World(10, {"a": 4, "b": 4})
    for request_id in ("a1", "b1", "a2"):
        world.wait(request_id)
    world.arrivals.advance()
    assert (world.entered, world.asked) == ([], ["ab"])
    world.workers.stage("b")
    world.arrivals.advance()
    assert world.entered == ["b1"]
    assert world.arrivals.awaits(path_of("a"))
    assert not world.arrivals.awaits(path_of("b"))
    world.workers.stage("a")
    world.arrivals.advance()
    assert world.entered == ["b1", "a1", "a2"]
    assert len(world.arrivals) == 0


def test_what_fails_is_told_to_all_who_wait_for_it_and_to_no_other() -> None:
    world = World(10, {"a": 4, "b": 4, "c": 40})
    world.workers.broken.add("a")
    world.workers.stage("a", "b", "c")
    for request_id in ("a1", "b1", "a2"):
        world.wait(request_id)
    world.arrivals.advance()
    assert [request_id for request_id, _ in world.failed] == ["a1", "a2"]
    assert world.entered == ["b1"]
    world.workers.used.clear()
    world.wait("c1")
    world.arrivals.advance()
    ((request_id, error),) = world.failed[2:]
    assert request_id == "c1"
    assert isinstance(error, MemoryBudgetError)


def test_what_one_who_is_let_in_raises_keeps_out_no_other() -> None:
    world = World(10, {"a": 4, "b": 4})
    world.workers.stage("a")

    def refuse(*_: Any) -> None:
        raise RuntimeError("no such pooling task")

    world.wait("a1")
    world.arrivals.wait(lora("a"), Waiter(refuse, refuse))
    world.wait("a2")
    with pytest.raises(RuntimeError, match="no such pooling task"):
        world.arrivals.advance()
    assert world.entered == ["a1", "a2"]
    world.workers.broken.add("b")
    world.workers.stage("b")
    world.wait("b1")
    world.arrivals.wait(lora("b"), Waiter(refuse, refuse))
    world.wait("b2")
    with pytest.raises(RuntimeError, match="no such pooling task"):
        world.arrivals.advance()
    assert [request_id for request_id, _ in world.failed] == ["b1", "b2"]
    assert len(world.arrivals) == 0


def test_without_room_they_wait_for_others_to_end_and_workers_are_not_asked_in_vain() -> None:
    world = World(4, {"a": 4, "b": 4})
    world.workers.stage("a", "b")
    for request_id in ("a1", "b1"):
        world.wait(request_id)
        world.arrivals.advance()
    for _ in range(5):
        world.arrivals.advance()
    assert world.entered == ["a1"]
    assert world.asked == ["a", "b"]
    world.workers.used.clear()
    world.arrivals.advance()
    assert world.entered == ["a1", "b1"]
    assert world.failed == []


def test_who_hangs_up_is_not_let_in_and_nothing_is_kept_for_nobody() -> None:
    world = World(10, {"a": 4, "b": 4})
    for request_id in ("a1", "a2", "b1"):
        world.wait(request_id)
    gone = world.arrivals.withdraw({"a1", "b1", "unknown"})
    assert sorted(request.request_id for request in gone) == ["a1", "b1"]
    world.workers.stage("a", "b")
    world.arrivals.advance()
    assert world.workers.dropped == ["b"]
    assert world.entered == ["a2"]
    assert world.workers.on == [{"a"}]


def test_each_hang_up_costs_alike_however_many_wait() -> None:
    """They come one by one, and while they do the engine core runs no step."""
    looks = 0

    class Request:
        lora_name = "a"

        def __init__(self, name: str) -> None:
            self._name = name

        @property
        def request_id(self) -> str:
            nonlocal looks
            looks += 1
            return self._name

    world = World(10, {"a": 4})
    names = [f"a{number}" for number in range(500)]
    for name in names:
        waiter = Waiter(lambda: None, lambda error: None, Request(name))
        world.arrivals.wait(lora("a"), waiter)
    world.wait("a500")
    looks = 0
    for name in names[:250]:
        assert len(world.arrivals.withdraw([name])) == 1
    assert len(world.arrivals.withdraw({*names, "unknown"})) == 250
    assert looks <= 2 * len(names)
    assert len(world.arrivals) == 1
    world.workers.stage("a")
    for _ in range(3):
        world.arrivals.advance()
    assert world.entered == ["a500"]
    assert world.arrivals.withdraw(None) == []


def test_the_pieces_of_a_session_that_hangs_up_go_together() -> None:
    world = World(10, {"a": 4, "b": 4})
    pieces = [SimpleNamespace(request_id="one", lora_name=name) for name in "aab"]
    for piece in pieces:
        world.arrivals.wait(lora(piece.lora_name), Waiter(lambda: None, lambda error: None, piece))
    assert world.arrivals.withdraw(["one"]) == pieces
    assert len(world.arrivals) == 0


def test_few_are_staged_at_once() -> None:
    letters = "abcdefghijklmnop"
    world = World(100, dict.fromkeys(letters, 4))
    for name in letters:
        world.wait(name)
    world.arrivals.advance()
    assert world.asked == ["abcdefgh"]
    world.workers.stage(*letters)
    world.arrivals.advance()
    world.arrivals.advance()
    assert world.entered == list(letters)


def test_those_that_are_fetched_hold_up_none_that_are_here() -> None:
    far, near = "abcdefghijkl", "mnopqrstuvwx"
    world = World(200, dict.fromkeys(far + near, 4))
    world.workers.far = set(far)
    for name in far + near:
        world.wait(name)
    for _ in range(3):
        world.arrivals.advance()
    # So many of each, and none of those that are fetched before it is known that they are.
    assert world.workers.fetched == list("abcdefgh")
    assert world.asked == ["abcdefgh", "ijklmnopabcdefgh", "mnopqrstabcdefgh"]
    world.workers.stage(*near)
    for _ in range(2):
        world.arrivals.advance()
    assert world.entered == list(near)
    assert world.workers.fetched == list("abcdefgh")
    # They are let in as they come, and the next ones begin.
    world.workers.stage("h")
    for _ in range(2):
        world.arrivals.advance()
    assert world.entered == [*near, "h"]
    assert world.workers.fetched == list("abcdefghi")
    world.workers.stage(*far)
    for _ in range(3):
        world.arrivals.advance()
    assert world.entered == [*near, "h", *far.replace("h", "")]
    assert not world.arrivals.busy


def test_the_longer_nothing_comes_the_seldomer_it_is_asked() -> None:
    world = World(4, dict.fromkeys("abc", 4))
    assert world.arrivals.pause is None
    world.workers.far = {"a"}
    world.wait("a1")
    turns = 0
    while world.workers.now < 10:
        world.arrivals.advance()
        pause = world.arrivals.pause
        assert pause is not None
        assert pause <= max(0.002, world.workers.now / 50 + 1e-9)
        world.workers.now += pause
        turns += 1
    assert turns < 500, "and every 2 ms it were 5000"
    # What comes meanwhile is seen as soon as if nothing else were on its way.
    world.wait("b1")
    assert world.arrivals.pause == 0.002
    world.arrivals.advance()
    world.workers.stage("b")
    world.arrivals.advance()
    assert world.entered == ["b1"]
    assert world.arrivals.pause == 0.002
    # Who waits for room waits for a request's end.
    world.workers.stage("a")
    for _ in range(3):
        world.arrivals.advance()
    assert world.entered == ["b1"]
    world.workers.now += 10
    assert world.arrivals.pause == 0.05
    world.workers.used.clear()
    for _ in range(2):
        world.arrivals.advance()
    assert world.entered == ["b1", "a1"]
    assert world.arrivals.pause is None


def test_what_was_asked_is_asked_again_where_the_devices_lost_it_meanwhile() -> None:
    world = World(8, {"a": 4, "b": 4, "c": 4})
    world.workers.stage("a", "b", "c")
    for name in "ab":
        world.wait(f"{name}1")
        world.arrivals.advance()
    world.workers.used.clear()
    world.steps_go_on = True
    world.wait("c1")
    world.arrivals.advance()
    world.questions[-1].answer()
    assert world.arrivals.unask() == [path_of("c")]
    assert world.arrivals.unask() == []
    assert world.workers.on == [{"b", "c"}]
    assert list(world.workers.residency.paths()) == [path_of("b")], "a gave way"
    world.workers.forget(path_of("c"))
    world.arrivals.advance()
    world.questions[-1].answer()
    world.arrivals.advance()
    assert world.entered == ["a1", "b1", "c1"]
    assert world.workers.on == [{"b", "c"}]


def test_an_answer_that_steps_bring_is_looked_for_soon() -> None:
    world = World(4, {"a": 4})
    world.steps_go_on = True
    world.wait("a1")
    world.workers.now = 10.0
    world.arrivals.advance()
    assert world.arrivals.asking
    assert world.arrivals.pause == 0.002
    world.questions[0].answer()
    world.arrivals.advance()
    assert not world.arrivals.asking
    assert world.arrivals.pause == 0.05


def test_of_several_workers_one_that_has_to_fetch_it_is_waited_for() -> None:
    world = World(8, dict.fromkeys("ab", 4), workers=2)
    bring_to = world.workers.bring_to
    world.workers.staged[0] |= {"a", "b"}

    def one_has_it(worker: int, *question: Any) -> list[Brought]:
        world.workers.far = {"a"} if worker else set()
        return bring_to(worker, *question)

    world.workers.bring_to = one_has_it  # type: ignore[method-assign]
    world.wait("a1")
    for _ in range(3):
        world.arrivals.advance()
    assert world.entered == []
    assert world.workers.fetched == ["a"]
    world.workers.bring_to = bring_to  # type: ignore[method-assign]
    world.workers.far = set()
    world.workers.stage("a")
    world.arrivals.advance()
    world.arrivals.advance()
    assert world.entered == ["a1"]
    assert world.workers.on == [{"a"}] * 2


def test_nobody_waits_for_an_answer_while_steps_go_on() -> None:
    world = World(10, {"a": 4})
    world.workers.stage("a")
    world.steps_go_on = True
    world.wait("a1")
    for _ in range(3):
        world.arrivals.advance(1)
    assert (world.entered, len(world.questions)) == ([], 1)
    world.questions[0].answer()
    world.arrivals.advance(1)
    assert world.entered == ["a1"]
    assert not world.questions[0].waited
    assert not world.arrivals.busy


def test_an_executor_that_brings_no_answers_is_waited_for_in_the_end() -> None:
    world = World(10, {"a": 4})
    world.workers.stage("a")
    world.steps_go_on = True
    world.wait("a1")
    for _ in range(50):
        world.arrivals.advance()
    assert world.entered == [], "no step went on meanwhile"
    for _ in range(50):
        world.arrivals.advance(1)
    assert world.entered == ["a1"]
    assert world.questions[0].waited


def test_a_task_that_has_been_read_comes_with_one_question() -> None:
    world = World(8, dict.fromkeys("abcd", 4))
    world.workers.stage(*"abcd")
    for name in "abcd":
        world.wait(f"{name}1")
        world.arrivals.advance()
        world.workers.used.clear()
    assert world.asked == list("abcd")
    assert world.entered == ["a1", "b1", "c1", "d1"]
    assert world.workers.on == [{"c", "d"}]


def test_of_several_workers_none_holds_what_another_has_not_read() -> None:
    world = World(8, dict.fromkeys("abc", 4), workers=2)
    for name in "ab":
        world.workers.residency.place(lora(name))
    world.workers.staged[0].add("c")
    world.wait("c1")
    for _ in range(3):
        world.arrivals.advance()
    assert world.workers.on == [{"a", "b"}] * 2
    world.workers.staged[1].add("c")
    world.arrivals.advance()
    world.arrivals.advance()
    assert world.entered == ["c1"]
    assert world.workers.on == [{"b", "c"}] * 2


def where_a_may_give_way(names: str) -> World:
    """Full with a and b, with a question under way that offers a for c; steps go on."""
    world = World(8, dict.fromkeys(names, 4))
    for name in "ab":
        world.workers.residency.place(lora(name))
    world.steps_go_on = True
    world.wait("c1")
    world.arrivals.advance()
    return world


def test_who_may_give_way_is_counted_on_by_nobody_until_it_has_stayed() -> None:
    world = where_a_may_give_way("abc")
    assert not world.workers.residency.touch(path_of("a"))
    assert world.workers.residency.touch(path_of("b"))
    # A request for it waits too, and hangs up.
    world.wait("a1")
    world.arrivals.withdraw({"a1"})
    world.questions[0].answer()
    world.arrivals.advance(1)
    assert world.workers.residency.touch(path_of("a")), "c was not read yet"
    world.steps_go_on = False
    world.workers.stage("c")
    world.arrivals.advance()
    assert world.entered == ["c1"]
    assert world.workers.on == [{"a", "c"}], "a was used last"
    assert world.workers.dropped == []


def test_who_waits_for_a_task_that_might_have_given_way_finds_it_there() -> None:
    """It stands in the question that follows, with others that take its place."""
    world = where_a_may_give_way("abcd")
    assert not world.workers.residency.touch(path_of("a"))
    world.wait("a1")
    world.wait("d1")
    world.arrivals.withdraw({"c1"})
    world.questions[-1].answer()
    world.workers.stage("a", "d")
    world.arrivals.advance(1)
    world.steps_go_on = False
    world.arrivals.advance()
    assert world.entered == ["a1", "d1"]
    assert world.workers.on == [{"a", "d"}]


@pytest.mark.parametrize("stays", [True, False])
def test_what_might_have_given_way_is_counted_where_it_was(stays: bool) -> None:
    world = where_a_may_give_way("abc")
    world.wait("a1")
    if not stays:
        world.workers.stage("c")
    world.questions[-1].answer()
    world.arrivals.advance(1)
    world.steps_go_on = False
    world.workers.stage("a", "c")
    world.workers.used.clear()
    for _ in range(4):
        world.arrivals.advance()
    assert sorted(world.entered) == ["a1", "c1"]
    counted = world.counters.snapshot()
    requests = {tier: n for tier, n in counted["requests"].items() if n}
    loads = sum(sum(found["counts"]) for found in counted["load_seconds"].values())
    assert (requests.get("device", 0), loads) == ((1, 1) if stays else (0, 2))
    assert sum(requests.values()) == 2


def test_who_waits_for_a_task_that_is_there_needs_no_room() -> None:
    world = World(8, dict.fromkeys("abcd", 4))
    for name in "ab":
        world.workers.residency.place(lora(name))
    world.workers.used = {"b"}
    world.workers.stage("a", "d")
    world.steps_go_on = True
    world.wait("c1")
    world.arrivals.advance()
    world.wait("d1")
    world.wait("a1")
    world.arrivals.withdraw({"c1"})
    world.questions[-1].answer()
    world.arrivals.advance(1)
    world.steps_go_on = False
    for _ in range(4):
        world.arrivals.advance()
    assert world.entered == ["a1"], "and d waits for one of the two to end"
    assert world.workers.on == [{"a", "b"}]
    world.workers.used = {"b"}
    for _ in range(4):
        world.arrivals.advance()
    assert world.entered == ["a1", "d1"]


def test_who_waits_for_room_gets_that_of_a_task_that_is_pinned_no_more() -> None:
    world = World(8, dict.fromkeys("apc", 4))
    residency = world.workers.residency
    for name in "ap":
        residency.place(lora(name))
    residency.number(path_of("p"), 7)
    residency.pin(7)
    world.workers.used = {"a"}
    world.workers.stage("c")
    world.wait("c1")
    for _ in range(4):
        world.arrivals.advance()
    assert world.entered == []
    residency.unpin(7)
    for _ in range(4):
        world.arrivals.advance()
    assert (world.entered, world.workers.on) == (["c1"], [{"a", "c"}])


def test_of_requests_that_never_entered_no_number_is_kept() -> None:
    world = World(8, dict.fromkeys("ab", 4))
    residency = world.workers.residency
    residency.place(lora("b"))
    for name, number in (("a", 3), ("b", 4)):
        assert residency.number(path_of(name), number) == number
        world.wait(f"{name}1")
        world.arrivals.withdraw({f"{name}1"})
    world.workers.used = {"a", "b"}
    assert residency.number(path_of("x"), 3) == 3, "of a nothing is left"
    assert residency.number(path_of("y"), 4) != 4, "b is held, and goes by it"


def test_a_pinned_task_that_the_workers_gave_up_keeps_no_slot() -> None:
    """As where its bases were exchanged; its number is another's to have."""
    slots = {7, 8}
    residency = Residency(Workers([8], {"a": [4]}), set, slots=slots)
    residency.place(lora("a"))
    residency.number(path_of("a"), 7)
    residency.lose([path_of("a")])
    assert slots == {8}


LETTERS = "abcdefgh"


class History:
    """Requests, answers, ends, hang-ups and publications in any order."""

    def __init__(self, seed: int, workers: int) -> None:
        self.random, self.asked = Random(seed), 0
        sizes = {name: self.random.choice([2, 3, 4]) for name in LETTERS}
        self.world = World(8, sizes, workers)
        self.residency, self.used = self.world.workers.residency, self.world.workers.used

    def come(self) -> None:
        self.asked += 1
        name = self.random.choice(LETTERS)
        here = not self.world.arrivals.awaits(path_of(name)) and self.residency.touch(path_of(name))
        if here:
            self.used.add(name)
        else:
            self.world.wait(f"{name}{self.asked}")

    def go(self) -> None:
        if self.used:
            self.used.remove(self.random.choice(sorted(self.used)))

    def hang_up(self) -> None:
        number = self.random.randint(1, self.asked + 1)
        self.world.arrivals.withdraw({f"{name}{number}" for name in LETTERS})

    def publish(self) -> None:
        self.residency.retire(map(path_of, self.random.sample(LETTERS, 4)))
        self.world.workers.now += GRACE

    def release(self) -> None:
        self.residency.release(self.world.arrivals.paths())

    def stage(self) -> None:
        self.random.choice(self.world.workers.staged).add(self.random.choice(LETTERS))

    def advance(self) -> None:
        self.world.steps_go_on = self.random.random() < 0.8
        self.world.arrivals.advance(self.random.randint(0, 1))

    def go_on(self) -> None:
        often = [self.come] * 2 + [self.advance] * 3
        seldom = [self.go, self.hang_up, self.publish, self.release, self.stage, self.world.answer]
        self.random.choice([*often, *seldom])()

    def end(self) -> None:
        """All tasks are read, and requests end one by one."""
        self.world.workers.stage(*LETTERS)
        self.world.steps_go_on = False
        for _ in range(60):
            self.go()
            self.world.arrivals.advance()


@pytest.mark.parametrize("workers", [1, 2])
def test_who_is_let_in_finds_his_task_until_he_ends_whatever_comes(workers: int) -> None:
    for seed in range(400):
        history = History(seed, workers)
        for _ in range(150):
            history.go_on()
            assert all(on >= history.used for on in history.world.workers.on), seed
        history.end()
        assert not history.world.arrivals.busy, seed
        held = set(map(name_of, history.residency.paths()))
        assert all(on == held for on in history.world.workers.on), seed


def test_a_large_task_takes_the_place_of_many_small_ones() -> None:
    letters = "abcdefghij"
    world = World(10, dict.fromkeys(letters, 1) | {"z": 7})
    for name in letters:
        world.workers.residency.place(lora(name))
    world.workers.used = {"a"}
    world.workers.stage("z")
    world.wait("z1")
    for _ in range(4):
        world.arrivals.advance()
    assert world.entered == ["z1"]
    assert world.workers.on == [{"a", "i", "j", "z"}]


def test_what_nobody_waits_for_is_dropped_even_if_it_came_meanwhile() -> None:
    world = World(10, {"a": 4})
    world.steps_go_on = True
    world.workers.stage("a")
    world.wait("a1")
    world.arrivals.advance()
    assert len(world.arrivals.withdraw(None)) == 1
    world.questions[0].answer()
    assert world.workers.on == [{"a"}]
    world.arrivals.advance(1)
    assert world.arrivals.busy
    world.steps_go_on = False
    world.arrivals.advance()
    assert (world.workers.on, world.entered) == ([set()], [])
    assert not world.arrivals.busy
    # Asked for again before that was told, it is not dropped.
    world.wait("a2")
    world.arrivals.withdraw(None)
    world.wait("a3")
    world.arrivals.advance()
    assert world.entered == ["a3"]
    assert world.workers.on == [{"a"}]


def test_pinned_tasks_never_give_way() -> None:
    workers = Workers([8], {name: [4] for name in "abcd"} | {"l": [8]})
    residency = workers.residency
    for number, name in enumerate("ab", 1):
        assert residency.number(path_of(name), number) == number
        residency.place(lora(name))
    residency.pin(1)
    for name in "cdbc":
        assert residency.place(lora(name)) is not None
        assert "a" in workers.on[0]
    with pytest.raises(MemoryBudgetError, match="on a device beside 1 that are pinned"):
        residency.place(lora("l"))
    residency.retire([])
    workers.now = 3 * GRACE
    residency.release()
    assert workers.on == [{"a"}], "nor when another state is served"
    residency.unpin(1)
    assert residency.place(lora("l")) == 8
    residency.pin(77)
