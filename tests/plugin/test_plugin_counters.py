"""What an engine core counts: bounded in names and in memory, and never falling."""

from __future__ import annotations

import random
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vlora.errors import CheckpointError, MemoryBudgetError, ModelMismatchError
from vllm_vlora.plugin.counters import (
    DEVICE,
    DISK,
    HOST,
    LOAD_SECONDS,
    REMOTE,
    BusiestTasks,
    Histogram,
    ServingCounters,
    counters_of,
)


def test_a_snapshot_is_plain_data_that_msgpack_carries_whole() -> None:
    counters = ServingCounters(tasks=2, listed=2)
    counters.requested("sql", DEVICE)
    counters.loaded(DISK, 0.3, 1000)
    counters.loaded(HOST, 0.0004, 1000)
    counters.evicted()
    counters.refused(MemoryBudgetError("full"))
    counters.adopted("new")
    counters.state_refused(CheckpointError("torn"))
    counters.set_tier(DEVICE, 3, ["c", "b", "a"], pinned={"b"}, nbytes=30, budget=40)
    counters.set_waiting(2)
    taken = counters.snapshot()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(taken)) == taken
    assert taken["residents"] == {DEVICE: [["c", False], ["b", True]]}
    assert taken["tiers"] == {DEVICE: {"tasks": 3, "bytes": 30, "budget": 40}}
    assert taken["requests"] == {DEVICE: 1, HOST: 0, DISK: 0, REMOTE: 0}
    assert taken["loaded_bytes"] == {DISK: 1000, HOST: 1000, REMOTE: 0}
    assert taken["load_seconds"][DISK]["sum"] == 0.3
    zeros = dict.fromkeys(["memory", "model", "checkpoint", "load", "busy", "other"], 0)
    assert taken["refusals"] == {**zeros, "memory": 1}
    assert taken["reload_refusals"] == {**zeros, "checkpoint": 1}
    assert (taken["state"], taken["reloads"], taken["waiting"]) == ("new", 1, 2)


def test_who_is_there_is_sent_again_only_when_it_changed() -> None:
    counters = ServingCounters(tasks=2, listed=2)
    first = counters.snapshot()
    assert first["residents"] == {}
    assert counters.snapshot(first["version"])["residents"] is None
    counters.set_tier(HOST, 1, ["a"])
    second = counters.snapshot(first["version"])
    assert second["residents"] == {HOST: [["a", False]]}
    counters.set_tier(HOST, 9, ["a"])
    third = counters.snapshot(second["version"])
    assert third["residents"] is None
    assert third["tiers"][HOST]["tasks"] == 9
    # Who else is asked by another server has its own.
    assert counters.snapshot(first["version"])["residents"] == {HOST: [["a", False]]}


def test_only_what_is_listed_is_looked_at() -> None:
    counters = ServingCounters(tasks=2, listed=3)
    names = (f"t{i}" if i < 3 else pytest.fail("looked at") for i in range(100_000))
    counters.set_tier(HOST, 100_000, names)
    assert [name for name, _ in counters.snapshot()["residents"][HOST]] == ["t0", "t1", "t2"]


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_counts_each_observation_in_the_first_bucket_that_holds_it(
    seconds: list[float],
) -> None:
    histogram = Histogram()
    expected = Counter[int]()
    for value in seconds:
        histogram.observe(value)
        expected[sum(end < value for end in LOAD_SECONDS)] += 1
    found = histogram.snapshot()
    assert found["counts"] == [expected[place] for place in range(len(LOAD_SECONDS) + 1)]
    assert found["sum"] == pytest.approx(sum(seconds))


def test_reasons_are_words_and_few() -> None:
    counters = ServingCounters(0, 0)
    for error in (MemoryBudgetError("x"), ModelMismatchError("x"), OSError("x")):
        counters.refused(error)
    for number in range(1000):
        counters.refused(f"reason {number}")
    refusals = counters.snapshot()["refusals"]
    assert len(refusals) <= 33
    assert sum(refusals.values()) == 1003
    assert refusals["memory"] == refusals["model"] == 1


# --- the busiest tasks ---


def test_few_tasks_are_all_counted_by_name() -> None:
    busiest = BusiestTasks(3)
    for task in ["a", "b", "a", "c", "a"]:
        busiest.count(task)
    assert busiest.snapshot() == {"tasks": {"a": 3, "b": 1, "c": 1}, "other": 0}


def test_without_names_all_are_others_and_a_task_of_that_name_is_one_of_them() -> None:
    none, some = BusiestTasks(0), BusiestTasks(2)
    for task in ["a", "other", "b"]:
        none.count(task)
        some.count(task)
    assert none.snapshot() == {"tasks": {}, "other": 3}
    assert some.snapshot() == {"tasks": {"a": 1, "b": 1}, "other": 1}


@given(st.integers(0, 4), st.lists(st.sampled_from("abcdefghij"), max_size=300))
def test_every_request_is_counted_once_and_no_count_falls(most: int, asked: list[str]) -> None:
    busiest = BusiestTasks(most)
    before: dict[str, Any] = busiest.snapshot()
    for task in asked:
        busiest.count(task)
        now = busiest.snapshot()
        assert len(now["tasks"]) <= most
        # One series rose by one, and those that are there in both did not fall.
        kept = now["tasks"].keys() & before["tasks"].keys()
        rises = [now["other"] - before["other"]]
        rises += [now["tasks"][name] - before["tasks"][name] for name in kept]
        rises += [now["tasks"][name] for name in now["tasks"].keys() - kept]
        assert sorted(rises) == [0] * (len(rises) - 1) + [1]
        before = now


def test_the_busy_ones_get_names_from_a_long_tail_and_memory_stays() -> None:
    busiest, chance = BusiestTasks(10), random.Random(0)
    busy = [f"busy-{i}" for i in range(10)]
    for name in (f"first-{i}" for i in range(10)):
        busiest.count(name)
    series = set()
    for number in range(40_000):
        busiest.count(chance.choice(busy) if number % 2 else f"tail-{number}")
        series |= busiest.snapshot()["tasks"].keys() if number % 50 == 0 else set()
    assert busiest.snapshot()["tasks"].keys() == set(busy)
    # Names that come once do not each become a series for a while.
    assert len(series) < 60
    assert len(busiest._lately) <= 80


def test_when_others_become_busy_they_take_the_places() -> None:
    busiest = BusiestTasks(3)
    for phase in "abc":
        for _ in range(2000):
            for number in range(3):
                busiest.count(f"{phase}{number}")
        assert busiest.snapshot()["tasks"].keys() == {f"{phase}{i}" for i in range(3)}, phase


def test_counting_takes_microseconds() -> None:
    import time

    busiest, names = BusiestTasks(100), [f"t{i % 5000}" for i in range(50_000)]
    started = time.process_time()
    for name in names:
        busiest.count(name)
    assert (time.process_time() - started) / len(names) < 50e-6


def test_an_engine_core_has_one_set_of_counters_as_its_settings_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_VLORA_METRICS_TASKS", "1")
    monkeypatch.setenv("VLLM_VLORA_METRICS_LISTED", "0")
    core = SimpleNamespace()
    counters = counters_of(core)
    assert counters_of(core) is counters
    for task in "ab":
        counters.requested(task, DEVICE)
    counters.set_tier(DEVICE, 1, ["a"])
    taken = counters.snapshot()
    assert taken["busiest"] == {"tasks": {"a": 1}, "other": 1}
    assert taken["residents"].get(DEVICE, []) == []


def test_counting_needs_neither_vllm_nor_prometheus() -> None:
    import subprocess

    code = (
        "import sys, vllm_vlora.plugin.counters; "
        "print([m for m in ('vllm', 'prometheus_client', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
