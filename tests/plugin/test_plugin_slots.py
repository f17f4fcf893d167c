"""Slots of direct tasks: who gives way, and where a batch's tokens go."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plugin_world import CPU

from vllm_vlora.plugin.direct_slots import DirectSlots
from vllm_vlora.triton_kernels.direct import DirectTask, Routing, SlotTable, make_task

IDS = 5


def bare_slots(count: int) -> DirectSlots:
    """Slots over a table and a routing of their own."""
    table, routing = SlotTable(count, 1, CPU), Routing(16, count, CPU)
    path = SimpleNamespace(table=table, routing=routing, empty=new_task())
    return DirectSlots(path)  # type: ignore[arg-type]


def new_task() -> DirectTask:
    return make_task({}, 1, CPU)


def held(slots: DirectSlots) -> dict[int, tuple[int, int]]:
    """Id -> its slot and the identity of the task there, as a batch of all ids would be routed."""
    path = slots._path
    direct = slots.route(np.arange(1, IDS + 1))
    found = {}
    for adapter, slot in enumerate(path.routing.token_slots[:IDS].tolist(), 1):
        assert direct[adapter - 1] == (slot != path.table.slots) == (adapter in slots)
        if adapter in slots:
            found[adapter] = (slot, id(path.table.tasks[slot]))
    assert len({slot for slot, _ in found.values()}) == len(found), "two ids in one slot"
    return found


rounds = st.tuples(
    st.just("round"), st.lists(st.integers(1, IDS), min_size=1, max_size=4, unique=True)
)
operations = st.one_of(
    rounds,
    rounds,
    rounds,
    st.tuples(st.just("remove"), st.integers(1, IDS)),
    st.tuples(st.just("replace"), st.integers(1, IDS)),
)


@settings(max_examples=150, deadline=None)
@given(count=st.integers(1, 4), script=st.lists(operations, min_size=5, max_size=20))
@example(count=2, script=[("round", [1, 2]), ("round", [1]), ("round", [3])])
def test_slots_give_way_by_last_use_and_say_when_they_change(count: int, script: list) -> None:
    slots = bare_slots(count)
    tasks = {adapter: new_task() for adapter in range(1, IDS + 1)}
    used: list[int] = []  # The ids inside, the least recently used first.
    for kind, what in script:
        before, version = held(slots), slots.version
        if kind == "remove":
            slots.remove(what)
            used = [adapter for adapter in used if adapter != what]
        elif kind == "replace":
            tasks[what] = new_task()
            if what in slots:
                assert slots.activate(what, tasks[what])
                used = [a for a in used if a != what] + [what]
        elif kind == "round":
            # A batch never has more distinct tasks than there are slots.
            batch = what[:count]
            for place, adapter in enumerate(batch):
                was_inside = adapter in used
                assert slots.activate(adapter, tasks[adapter]) is not was_inside
                if not was_inside and len(used) == count:
                    used.pop(0)
                used = [a for a in used if a != adapter] + [adapter]
                assert all(a in slots for a in batch[: place + 1]), "one of this round gave way"
        after = held(slots)
        assert set(after) == set(used)
        assert {a: task for a, (_, task) in after.items()} == {a: id(tasks[a]) for a in used}
        if kind == "round":
            # Content may change and change back inside a round; the other way round it must be said.
            assert slots.version != version or after == before
        else:
            assert (slots.version != version) == (after != before)


def test_a_task_that_is_there_is_not_written_again() -> None:
    slots = bare_slots(2)
    task, other = new_task(), new_task()
    assert slots.activate(1, task)
    version = slots.version
    assert not slots.activate(1, task)
    assert slots.version == version
    before = held(slots)
    assert slots.activate(1, other), "the id came with another task"
    assert slots.version == version + 1
    assert held(slots)[1] == (before[1][0], id(other))


def test_the_device_is_told_nothing_of_a_task_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an engine sleeps its memory is away: writing to it would be the engine's end."""
    slots = bare_slots(3)
    for adapter in (1, 2):
        slots.activate(adapter, new_task())
    table = slots._path.table
    left, kept = slots._slots[1], slots._slots[2]
    with monkeypatch.context() as asleep:
        asleep.setattr(table, "records", None)
        slots.remove(1)
    assert table.tasks[left] is None
    # A warm-up, which runs every slot, finds nothing of it.
    slots.spread(3)
    assert table.tasks[left] is slots._path.empty
    assert table.tasks[kept] is not slots._path.empty
    task = new_task()
    slots.remove(2)
    slots.activate(3, task)
    slots.spread(3)
    assert any(held is task for held in table.tasks), "its slot had been another's"


def test_tokens_are_routed_by_their_adapters_id() -> None:
    slots = bare_slots(3)
    tasks = {adapter: new_task() for adapter in (1 << 20, 1 << 30, 5)}
    for adapter, task in tasks.items():
        slots.activate(adapter, task)
    tokens = np.array([0, 1 << 30, 5, 0, 1 << 30, 77, 1 << 20])
    direct = slots.route(tokens)
    assert direct.tolist() == [adapter in tasks for adapter in tokens.tolist()]
    path = slots._path
    got = [path.table.tasks[slot] for slot in path.routing.token_slots[:7].tolist()]
    assert got == [tasks.get(adapter) for adapter in tokens.tolist()]
    assert slots.route(np.zeros(0, dtype=np.int64)).tolist() == []
    assert path.routing.runs == []
