"""What an engine core counts while tasks come and go, and what its workers report of them."""

from __future__ import annotations

import itertools
import queue
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_world import CPU, build
from residency_world import Executor, Workers, lora, path_of

from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin import core_metrics
from vllm_vlora.plugin.arrivals import Arrivals, Waiter
from vllm_vlora.plugin.core_metrics import metrics_snapshot
from vllm_vlora.plugin.counters import ServingCounters, counters_of
from vllm_vlora.plugin.engine_core import load_before_add_request, tasks_of
from vllm_vlora.plugin.identity import parse_task_path
from vllm_vlora.plugin.residency import Residency
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.settings import Budget


class World:
    """Workers whose budget holds one of the tasks, and requests that come one after the other."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.counters = ServingCounters(10, 10)
        self.workers = Workers([4], {name: [size] for name, size in sizes.items()})
        self.residency = Residency(
            self.workers, lambda: set(map(path_of, self.workers.used)), counters=self.counters
        )
        self.arrivals = Arrivals(self.residency, self._bring, self.counters)
        self._numbers = itertools.count()

    def _bring(self, requests: Any, hold: int, instead_of: Any, drop: Any, fetch: Any) -> Any:
        promise: Future[Any] = Future()
        promise.set_result([self.workers.bring_to(0, requests, hold, instead_of, fetch)])
        return promise

    def ask(self, *names: str, request: bool = True) -> None:
        for name in names:
            asking = SimpleNamespace(request_id=str(next(self._numbers))) if request else None
            self.arrivals.wait(lora(name), Waiter(lambda: None, lambda error: None, asking))
        self.arrivals.advance()

    @property
    def counted(self) -> dict[str, Any]:
        return self.counters.snapshot()


def test_a_load_is_counted_once_and_every_request_with_where_its_task_was() -> None:
    world = World({"a": 4, "b": 4})
    world.ask("a", "a")
    assert sum(world.counted["requests"].values()) == 0, "not before it is known"
    world.workers.stage("a")
    world.arrivals.advance()
    counted = world.counted
    assert counted["requests"] == {"device": 0, "host": 0, "disk": 2, "remote": 0}
    assert counted["busiest"]["tasks"] == {"a": 2}
    assert sum(counted["load_seconds"]["disk"]["counts"]) == 1
    assert counted["load_seconds"]["disk"]["sum"] > 0
    assert counted["evictions"]["device"] == 0
    # Its image is still on the host when it comes back.
    world.workers.stage("b")
    world.ask("b")
    world.ask("a")
    counted = world.counted
    assert counted["requests"] == {"device": 0, "host": 2, "disk": 2, "remote": 0}
    assert sum(counted["load_seconds"]["host"]["counts"]) == 2
    assert counted["evictions"]["device"] == 2


def test_what_is_fetched_is_counted_as_that_once() -> None:
    world = World({"a": 4})
    world.workers.far = {"a"}
    world.ask("a", "a")
    world.arrivals.advance()
    world.workers.stage("a")
    world.arrivals.advance()
    counted = world.counted
    assert counted["requests"] == {"device": 0, "host": 0, "disk": 0, "remote": 2}
    assert counted["loaded_bytes"] == {"host": 0, "disk": 0, "remote": 4}
    loads = {source: sum(found["counts"]) for source, found in counted["load_seconds"].items()}
    assert loads == {"host": 0, "disk": 0, "remote": 1}


def test_who_is_no_request_is_not_counted_as_one() -> None:
    world = World({"a": 4})
    world.workers.stage("a")
    world.ask("a", request=False)
    assert sum(world.counted["requests"].values()) == 0
    assert sum(world.counted["load_seconds"]["host"]["counts"]) == 1


def test_what_cannot_be_loaded_is_refused_with_its_reason() -> None:
    world = World({"a": 4, "c": 40})
    world.workers.stage("a", "c")
    world.workers.broken.add("a")
    world.ask("a", "a", "c")
    counted = world.counted
    assert {word: n for word, n in counted["refusals"].items() if n} == {
        "checkpoint": 2, "memory": 1
    }  # fmt: skip
    assert sum(counted["requests"].values()) == 3
    assert not any(sum(found["counts"]) for found in counted["load_seconds"].values())


def test_a_request_that_waited_is_counted_once() -> None:
    pytest.importorskip("vllm")
    workers = Workers([4], {"a": [4]})
    manager = SimpleNamespace(held_paths=dict, bring=lambda *args: workers.bring_to(0, *args))
    entered: list[str] = []

    class Core:
        def __init__(self) -> None:
            self.input_queue: Any = queue.Queue()
            self.scheduler = SimpleNamespace(requests={}, has_requests=lambda: False)
            self.batch_queue = None
            self.model_executor = Executor([manager])

        def add_request(self, request: Any, request_wave: int = 0) -> None:
            entered.append(request.request_id)

        add_request = load_before_add_request(add_request)  # type: ignore[assignment]

    core: Any = Core()
    for name in ("1", "2"):
        core.add_request(SimpleNamespace(request_id=name, lora_request=lora("a")))
    assert entered == []
    workers.stage("a")
    tasks_of(core).advance()
    core.add_request(SimpleNamespace(request_id="3", lora_request=lora("a")))
    assert entered == ["1", "2", "3"]
    assert counters_of(core).snapshot()["requests"] == {
        "device": 1,
        "host": 0,
        "disk": 2,
        "remote": 0,
    }


# --- what workers report ----------------------------------------------------------------------------


class Core:
    """An engine core over real stores, one a worker, of which each has a checkpoint's tasks."""

    def __init__(self, folder: Path, device: int) -> None:
        self.checkpoint = build(folder)
        budget = Budget(device=device, late=4096, host=1 << 20)
        self.stores = [
            ResidentStore(CPU, lambda name: name, lambda *_: None, budget=budget) for _ in range(2)
        ]
        for store in self.stores:
            store.preload(folder)
        self.refused = ["checkpoint"]
        self.far: int | None = None
        follower = SimpleNamespace(take_refusals=self._take_refusals)
        self.managers = [
            SimpleNamespace(
                vlora_store=store,
                follower=follower if store is self.stores[0] else None,
                held_paths=lambda: {task.path: False for task in self.stores[0].tasks()},
                far_tasks=lambda: self.far,
                state=lambda: ("1", "1"),
                forget=lambda path, wholly, store=store: store.forget(path),
            )
            for store in self.stores
        ]
        self.model_executor = Executor(self.managers)
        self.steps_go_on = False
        self.scheduler = SimpleNamespace(requests={}, has_requests=lambda: self.steps_go_on)
        self.batch_queue = None

    def _take_refusals(self) -> list[str]:
        taken, self.refused = self.refused, []
        return taken


@pytest.fixture
def asked_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_metrics, "_SELDOM", -1.0)


@pytest.mark.usefixtures("asked_always")
def test_tiers_are_what_the_workers_have_at_that_moment(tmp_path: Path) -> None:
    core = Core(tmp_path / "c", device=1 << 30)
    taken = metrics_snapshot(core)
    tiers, store = taken["tiers"], core.stores[0]
    assert tiers["device"]["tasks"] == len(core.checkpoint.tasks) == tiers["catalogue"]["tasks"]
    assert tiers["device"]["bytes"] == store.arena_used > 0
    assert tiers["device"]["budget"] == store.arena_nbytes
    assert tiers["host"] == {"tasks": 0, "bytes": 0, "budget": 1 << 20}
    assert {name for name, _ in taken["residents"]["device"]} == set(core.checkpoint.tasks)
    assert not any(pinned for _, pinned in taken["residents"]["device"])
    assert taken["materialized"] == dict.fromkeys(core.checkpoint.tasks, "direct mode is off")
    assert taken["state"] == core.checkpoint.content_digest
    assert taken["reload_refusals"]["checkpoint"] == 1
    assert metrics_snapshot(core)["reload_refusals"]["checkpoint"] == 1, "told once"
    # There is no such tier where all was fetched before it was served.
    assert "remote" not in taken["tiers"]
    core.far = 3
    assert metrics_snapshot(core)["tiers"]["remote"]["tasks"] == 3


def test_tasks_that_are_pinned_are_marked(tmp_path: Path) -> None:
    core = Core(tmp_path / "c", device=1 << 30)
    first, *_ = core.stores[0].tasks()
    residency = tasks_of(core).residency
    residency.pin(residency.number(first.path, 7))
    pinned = [name for name, marked in metrics_snapshot(core)["residents"]["device"] if marked]
    assert pinned == [first.task_id]


@pytest.mark.usefixtures("asked_always")
def test_tasks_in_host_memory_alone_are_named_there(tmp_path: Path) -> None:
    core = Core(tmp_path / "c", device=1 << 30)
    first, *_ = core.stores[0].tasks()
    metrics_snapshot(core)
    path = parse_task_path(first.path)
    assert path is not None
    for store in core.stores:
        store.forget(first.path)
        store.place(path)  # It is read again, and its image stays.
        assert store.host_tasks(10) == (0, [])
        store.forget(first.path)
    taken = metrics_snapshot(core)
    assert taken["tiers"]["host"]["tasks"] == 1
    assert taken["tiers"]["host"]["bytes"] == core.stores[0].host_nbytes > 0
    assert taken["residents"]["host"] == [[first.task_id, False]]
    assert core.stores[0].host_tasks(0) == (1, [])


def asked(core: Core) -> int:
    """How often its workers were asked what they hold."""
    return core.model_executor.asked.count("_report")


def test_workers_are_asked_when_something_was_done_to_them_and_else_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(tmp_path / "c", device=1 << 30)
    tasks, first = tasks_of(core), next(iter(core.stores[0].tasks()))
    monkeypatch.setattr(core_metrics, "_APART", -1.0)
    for _ in range(5):
        held = metrics_snapshot(core)["residents"]["device"]
    assert asked(core) == 1
    # By its own books, in which it is the first that was used; nobody need be asked for that.
    tasks.residency.touch(first.path)
    residents = metrics_snapshot(core)["residents"]["device"]
    assert residents[0] == [first.task_id, False]
    assert sorted(residents) == sorted(held)
    assert asked(core) == 1
    tasks.residency.forget(first.path)
    residents = metrics_snapshot(core)["residents"]["device"]
    assert asked(core) == 2
    assert first.task_id not in {name for name, _ in residents}
    # And when they say something new of the folder, as that they refuse what is there.
    tasks.workers.states()
    metrics_snapshot(core)
    assert asked(core) == 3
    # However many API servers ask.
    monkeypatch.setattr(core_metrics, "_APART", 60.0)
    for _ in range(3):
        tasks.workers.changes += 1
        metrics_snapshot(core)
    assert asked(core) == 3
    monkeypatch.setattr(core_metrics, "_SELDOM", -1.0)
    metrics_snapshot(core)
    assert asked(core) == 4


def test_steps_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is not here yet is taken at the next question, or when no step will bring it."""
    core = Core(tmp_path / "c", device=1 << 30)
    metrics_snapshot(core)
    promised: list[Future[Any]] = []

    def later(question: Any, *args: Any) -> Future[Any]:
        promised.append(Future())
        return promised[-1]

    tasks = tasks_of(core)
    monkeypatch.setattr(tasks.workers, "ask_later", later)
    monkeypatch.setattr(core_metrics, "_SELDOM", -1.0)
    answers = core._vlora_reports.newest  # type: ignore[attr-defined]
    core.steps_go_on = True
    for _ in range(3):
        metrics_snapshot(core)
    assert len(promised) == 1
    promised[0].set_result([answer._replace(far_tasks=5) for answer in answers])
    assert metrics_snapshot(core)["tiers"]["remote"]["tasks"] == 5
    metrics_snapshot(core)
    assert len(promised) == 2
    promised[1].set_exception(RuntimeError("a worker died"))
    with pytest.raises(RuntimeError):
        metrics_snapshot(core)
    metrics_snapshot(core)
    assert len(promised) == 3, "it is asked again"


def test_a_follower_tells_once_why_it_refused(tmp_path: Path) -> None:
    import logging

    from vllm_vlora.checkpoint.manifest import CONFIG_FILE
    from vllm_vlora.plugin.following import Follower, State

    checkpoint = build(tmp_path / "c")
    follower = Follower(
        tmp_path / "c", State(checkpoint), lambda *_: None, logging.getLogger("test")
    )
    follower.look()
    assert follower.take_refusals() == []
    (tmp_path / "c" / CONFIG_FILE).write_text("{")
    for _ in range(3):
        follower.look()
    assert follower.take_refusals() == ["checkpoint"]
    assert follower.take_refusals() == []
    with pytest.raises(CheckpointError):
        type(checkpoint).open(tmp_path / "c")


def test_a_task_that_was_published_again_has_one_series(tmp_path: Path) -> None:
    """The version before stays on the device for a while; Prometheus refuses a scrape with one twice."""
    old, new, other = (f"/ck/tasks/{name}@{'0' * 32}" for name in ("old", "new", "other"))
    names = {old: "policy", new: "policy", other: "other"}
    report = core_metrics._Report(
        names, 2, 10, ["far", "far"], 2, 0, 0, 1, "", [], 1, None, {}, 7
    )  # fmt: skip
    promise: Future[Any] = Future()
    promise.set_result([tuple(report)])

    class Held(list[str]):
        def paths(self) -> list[str]:
            return self

        def is_pinned(self, path: str) -> bool:
            return path == new

    core: Any = SimpleNamespace(
        _vlora_counters=ServingCounters(10, 10),
        _vlora_tasks_held=SimpleNamespace(
            residency=Held([other, new, old]),
            arrivals=[],
            exchange=SimpleNamespace(count=0),
            steps_go_on=lambda: False,
            workers=SimpleNamespace(changes=0, ask_later=lambda *args: promise),
        ),
    )
    found = metrics_snapshot(core)
    assert found["residents"] == {
        "device": [["other", False], ["policy", True]], "host": [["far", False]]
    }  # fmt: skip
    assert (found["tiers"]["device"]["tasks"], found["tiers"]["host"]["tasks"]) == (2, 1)
    assert found["evictions"] == {"device": 0, "host": 7}


@pytest.mark.usefixtures("asked_always")
def test_images_that_give_way_on_the_host_are_counted(tmp_path: Path) -> None:
    core = Core(tmp_path / "c", device=1 << 30)
    assert metrics_snapshot(core)["evictions"]["host"] == 0
    first, second = list(core.stores[0].tasks())[:2]

    def keep_both_with(limit: int) -> None:
        for store in core.stores:
            store._images.limit = limit
        for task in (first, second):
            path = parse_task_path(task.path)
            assert path is not None
            for store in core.stores:
                store.forget(task.path)
                store.place(path)
                store._images.limit = store.host_nbytes or limit

    keep_both_with(1)
    assert metrics_snapshot(core)["evictions"]["host"] == 0, "nothing was kept"
    keep_both_with(1 << 20)
    assert metrics_snapshot(core)["evictions"]["host"] == 1, "as each worker says"


def test_what_an_api_server_refused_is_counted_with_the_rest(tmp_path: Path) -> None:
    core = Core(tmp_path / "c", device=1 << 30)
    counters_of(core).refused("busy")
    assert metrics_snapshot(core, -1, {"busy": 4, "load": 1})["refusals"]["busy"] == 5
    assert metrics_snapshot(core, -1, {})["refusals"]["load"] == 1
