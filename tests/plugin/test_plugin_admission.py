"""Which requests enter when there are fewer slots than adapters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.plugin import admission
from vllm_vlora.plugin.admission import Admission


class Gate:
    """An admission as the scheduler uses it: what enters is alive, and what ends is followed by a
    release."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.alive: dict[str, int] = {}
        self.waiting: dict[str, int] = {}
        self.entered: list[tuple[int, str]] = []
        self.arrived: list[tuple[int, str]] = []
        self.asked = 0
        self.admission: Admission[tuple[int, str]] = Admission(slots, self.alive.__contains__)

    def ask(self, adapter: int) -> None:
        name = f"request {self.asked}"
        self.asked += 1
        self.arrived.append((adapter, name))
        if self.admission.enter(adapter, name, (adapter, name)):
            self._let_in(adapter, name)
        else:
            self.waiting[name] = adapter

    def end(self, names: list[str]) -> None:
        for name in names:
            del self.alive[name]
        for adapter, name in self.admission.release():
            del self.waiting[name]
            self._let_in(adapter, name)

    def withdraw(self, names: list[str] | None) -> None:
        found = self.admission.withdraw(None if names is None else iter(names))
        gone = list(self.waiting) if names is None else [n for n in names if n in self.waiting]
        assert found == [(self.waiting.pop(name), name) for name in gone]
        self.arrived = [pair for pair in self.arrived if pair not in found]

    def _let_in(self, adapter: int, name: str) -> None:
        self.alive[name] = adapter
        self.entered.append((adapter, name))

    def check(self) -> None:
        inside = set(self.alive.values())
        assert len(inside) <= self.slots
        assert len(self.admission) == len(self.waiting)
        for adapter in self.waiting.values():
            assert adapter not in inside
            assert len(inside) == self.slots, "it waits beside a free slot"
        for adapter in {a for a, _ in self.arrived}:
            came = [name for a, name in self.arrived if a == adapter]
            went = [name for a, name in self.entered if a == adapter]
            assert went == came[: len(went)]


gate_operations = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 6)),
    st.tuples(st.just("ask"), st.integers(1, 6)),
    st.tuples(st.just("end"), st.lists(st.integers(0, 30), min_size=1, max_size=4)),
    st.tuples(st.just("withdraw"), st.lists(st.integers(0, 60), max_size=3)),
    st.tuples(st.just("withdraw"), st.none()),
)


@pytest.mark.parametrize("count_again", [1, 3, 1024])
@settings(max_examples=100, deadline=None)
@given(slots=st.integers(1, 4), script=st.lists(gate_operations, max_size=60))
def test_no_more_adapters_are_inside_than_slots(count_again: int, slots: int, script: list) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "_COUNT_AGAIN", count_again)
        gate = Gate(slots)
        for kind, what in script:
            if kind == "ask":
                gate.ask(what)
            elif kind == "end":
                names = list(gate.alive)
                gate.end(sorted({names[i % len(names)] for i in what}) if names else [])
            else:
                gate.withdraw(what and [f"request {number}" for number in dict.fromkeys(what)])
            gate.check()
        for _ in range(len(gate.arrived) + 1):
            gate.end(list(gate.alive))
            gate.check()
        assert not gate.waiting, "some request never entered"
        assert sorted(gate.entered) == sorted(gate.arrived)


def test_requests_of_an_adapter_inside_enter_beside_those_that_wait() -> None:
    gate = Gate(2)
    for adapter in (1, 2, 3, 1, 2, 3, 4):
        gate.ask(adapter)
    assert [a for a, _ in gate.entered] == [1, 2, 1, 2]
    gate.end(["request 0"])
    assert len(gate.admission) == 3, "adapter 1 has another request inside"
    gate.end(["request 3"])
    assert [a for a, _ in gate.entered[4:]] == [3, 3], "all of adapter 3 and nothing of adapter 4"
    gate.end(["request 1", "request 4"])
    assert gate.entered[-1] == (4, "request 6")


def test_ended_requests_are_forgotten_without_anybody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One adapter that is asked for ever: nothing ever waits, and nothing may grow."""
    monkeypatch.setattr(admission, "_COUNT_AGAIN", 8)
    calls = 0
    alive: set[str] = set()

    def is_alive(name: str) -> bool:
        nonlocal calls
        calls += 1
        return name in alive

    gate: Admission[None] = Admission(2, is_alive)
    most = 0
    for number in range(2000):
        name = str(number)
        assert gate.enter(number % 2, name, None)
        alive.add(name)
        alive.discard(str(number - 3))
        most = max(most, sum(len(requests) for requests in gate._inside.values()))
    assert most <= 8 + 3
    assert calls <= 4 * 2000, "looking for the dead costs a few looks a request"


def test_a_request_that_makes_it_look_for_the_dead_stays_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It becomes alive only after it was let in, and may be the only one of its adapter."""
    monkeypatch.setattr(admission, "_COUNT_AGAIN", 1)
    alive: set[str] = set()
    gate: Admission[str] = Admission(1, alive.__contains__)
    for number in range(5):
        assert gate.enter(7, str(number), str(number))
        alive.add(str(number))
        assert not gate.enter(8, f"other {number}", "other")
        alive.clear()
        gate.withdraw(None)


def test_the_pieces_of_a_session_that_waits_keep_their_order() -> None:
    """The input of a streaming session comes as requests of one id."""
    alive = {"first"}
    gate: Admission[str] = Admission(1, alive.__contains__)
    assert gate.enter(1, "first", "first")
    for piece in ("one", "two"):
        assert not gate.enter(2, "session", piece)
    assert not gate.enter(3, "other", "other")
    alive.clear()
    assert not gate.enter(2, "session", "three"), "a piece must not overtake those before it"
    assert gate.waiting() == ["one", "two", "three", "other"]
    assert gate.release() == ["one", "two", "three"]
    alive.add("session")
    assert gate.release() == []
    for piece in ("a", "b"):
        assert not gate.enter(4, "late", piece)
    assert gate.withdraw(["late", "nobody"]) == ["a", "b"]
    assert gate.waiting() == ["other"]


def test_an_adapter_that_is_pinned_keeps_its_slot_while_nobody_asks_for_it() -> None:
    pinned = {1}
    gate = admission.Admission[str](2, lambda name: name not in ended, pinned)
    ended: set[str] = set()
    assert gate.enter(2, "2", "2")
    assert not gate.enter(3, "3", "3"), "adapter 2 would lose its slot within a batch"
    assert gate.enter(1, "1", "1")
    ended |= {"1", "2"}
    assert gate.release() == ["3"]
    assert not gate.enter(2, "again", "again")
    pinned.clear()
    assert gate.release() == ["again"]
