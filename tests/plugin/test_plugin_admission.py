"""Which adapters have room in a batch; with vLLM's scheduler: ``test_real_scheduler``."""

from __future__ import annotations

from vllm_vlora.plugin.admission import TURN, Adapter, Room

URGENT, USUAL = (0, 0.0), (1, 0.0)


def slotted(*numbers: int) -> set[Adapter]:
    return {Adapter(number, needs_slot=True) for number in numbers}


def direct(*numbers: int) -> set[Adapter]:
    return {Adapter(number, needs_slot=False) for number in numbers}


def has(room: Room, adapters: set[Adapter], standing: tuple[int, float] = USUAL) -> list[bool]:
    return [room.has(adapter, standing) for adapter in sorted(adapters)]


def test_slots_and_places_are_counted_apart() -> None:
    room = Room(slots=2, adapters=4)
    assert not room.begin(slotted(1)), "nobody has found none"
    assert has(room, slotted(1, 2)) == [True, True]
    room.take(Adapter(2, True))
    assert has(room, slotted(1, 2, 3)) == [True, True, False]
    assert has(room, direct(3)) == [True]
    for adapter in direct(8, 9):
        room.take(adapter)
    assert has(room, direct(8, 9, 10)) == [True, True, False]
    assert has(room, slotted(1, 2)) == [True, True], "nobody comes before those that have a slot"


def test_who_comes_before_one_that_has_a_slot_keeps_it_from_beginning() -> None:
    room = Room(slots=1, adapters=9)
    room.begin(slotted(1))
    assert has(room, slotted(2), URGENT) == [False]
    assert has(room, slotted(1), USUAL) == [False]
    assert has(room, slotted(1), URGENT) == [True]
    assert has(room, direct(3), (9, 0.0)) == [True], "it would hold no slot"
    assert not room.begin(slotted(1)), "and that it runs on changes nothing"
    assert has(room, slotted(1), USUAL) == [False]
    assert room.begin(set())
    assert has(room, slotted(1), USUAL) == [True]
    room.begin(slotted(1))
    room.forget_who_waits()
    assert has(room, slotted(1), USUAL) == [True]


def test_who_found_no_room_asks_again_only_where_that_may_have_changed() -> None:
    room = Room(slots=2, adapters=4)
    room.begin(slotted(1, 2))
    assert has(room, slotted(3)) == [False]
    assert not room.begin(slotted(1, 4)), "one left, and another came"
    assert not room.begin(slotted(1, 4) | direct(7)), "it needs no slot"
    assert room.begin(slotted(1)), "a slot is free"
    assert room.begin(slotted(1, 3)), "it has one"
    room.forget_who_waits()
    assert not room.begin(slotted(1))
    room.begin(direct(5, 6, 7, 8))
    assert has(room, direct(9)) == [False]
    assert not room.begin(direct(5, 6, 7, 10))
    assert room.begin(direct(5, 6, 7))


def test_a_turn_is_served_before_a_slot_changes_hands() -> None:
    room = Room(slots=1, adapters=9)
    room.begin(slotted(1))
    assert has(room, slotted(2), (1, 100.0)) == [False]
    assert has(room, slotted(3), (1, 500.0)) == [False], "the least served is to be next"
    assert has(room, slotted(1), (1, 100.0 + TURN)) == [True]
    assert has(room, slotted(1), (1, 101.0 + TURN)) == [False]
    assert has(room, slotted(1), (0, 101.0 + TURN)) == [True]
    assert has(room, slotted(1), (2, 0.0)) == [False]


def test_pinned_adapters_and_those_that_go_on_unasked_keep_their_slots() -> None:
    pinned = {7}
    room = Room(2, 2, pinned)
    room.begin(set(), ready=slotted(1) | direct(4, 5))
    assert has(room, slotted(1, 2, 7)) == [True, False, True]
    assert has(room, direct(8, 9)) == [True, True], "who only may go on has no place in the batch"
    assert has(room, slotted(2), URGENT) == [False]
    assert has(room, slotted(7), (9, 0.0)) == [True], "another could not have its slot"
    pinned.clear()
    assert room.begin(set(), ready=slotted(1))
    assert has(room, slotted(2)) == [True]


def test_who_only_may_go_on_keeps_no_slot_where_there_is_one_for_each_place() -> None:
    room = Room(2, 2)
    room.begin(set(), ready=slotted(1, 2))
    assert has(room, slotted(3)) == [True]
    fewer = Room(2, 3)
    fewer.begin(set(), ready=slotted(1, 2))
    assert has(fewer, slotted(3)) == [False]
