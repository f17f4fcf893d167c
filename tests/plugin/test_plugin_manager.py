"""vLLM's manager of adapters with direct tasks, without a model."""

from __future__ import annotations

import importlib
import logging
import random
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugin_world import STORED, TASKS, Store, build, make_path
from routers import network

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.editing.aliasing import remove_alias, set_alias
from vllm_vlora.editing.routing import attach_router, remove_router
from vllm_vlora.errors import CheckpointError, ModelMismatchError, ModelStateError, VLoRAError
from vllm_vlora.plugin.direct_slots import DirectSlots
from vllm_vlora.plugin.following import State
from vllm_vlora.plugin.identity import task_path
from vllm_vlora.plugin.settings import Settings

# --- seams: the start ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seams() -> Any:
    return importlib.import_module("vllm_vlora.plugin.seams")


@pytest.fixture(scope="module")
def managing() -> Any:
    return importlib.import_module("vllm_vlora.plugin.manager")


def test_what_direct_tasks_were_not_made_for_is_refused(
    managing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)

    def config(specialize: bool = False, sharded: bool = False, **parts: Any) -> Any:
        lora = SimpleNamespace(specialize_active_lora=specialize, fully_sharded_loras=sharded)
        parallel = {
            "use_ubatching": False,
            "prefill_context_parallel_size": 1,
            "use_sequence_parallel_moe": False,
        }
        cache = SimpleNamespace(kv_sharing_fast_prefill=parts.pop("fast_prefill", False))
        return SimpleNamespace(
            lora_config=lora,
            cache_config=cache,
            parallel_config=SimpleNamespace(**parallel | parts),
        )

    managing._refuse_direct_config(config())
    with pytest.raises(ModelMismatchError, match=r"--specialize-active-lora, which .*=materialize"):
        managing._refuse_direct_config(config(specialize=True))
    with pytest.raises(ModelMismatchError, match=r"--fully-sharded-loras, whose .*=materialize"):
        managing._refuse_direct_config(config(sharded=True))
    for parts, option in (
        ({"fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"use_ubatching": True}, "--enable-dbo"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"use_sequence_parallel_moe": True}, "--enable-expert-parallel with tensor and data"),
    ):
        with pytest.raises(ModelMismatchError, match=f"{option}.*; leave it out"):
            managing._refuse_direct_config(config(**parts))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ModelMismatchError, match=r"VLLM_BATCH_INVARIANT.*=materialize"):
        managing._refuse_direct_config(config())


@pytest.mark.parametrize(
    ("checkpoint", "mode", "slots", "expected"),
    [
        ("ck", "auto", 4, 4),
        ("ck", "direct", 100, 64),
        ("ck", "materialize", 4, 64),
        (None, "auto", 4, 64),
    ],
)
def test_stock_code_sees_few_slots_when_tasks_run_direct(
    managing: Any, checkpoint: str | None, mode: str, slots: int, expected: int
) -> None:
    config = SimpleNamespace(max_loras=64, max_lora_rank=16)
    got = managing._config_of_slots(config, managing.Setup(checkpoint, Settings(mode, slots)))
    assert (got.max_loras, got.max_lora_rank) == (expected, 16)
    assert config.max_loras == 64, "the engine's own configuration counts all tasks"


def test_the_longest_batch_may_be_a_padded_one(managing: Any) -> None:
    for size, expected in ((None, 100), (0, 100), (64, 100), (512, 512)):
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=size)
        )
        assert managing._longest_batch(100, config) == expected
    assert managing._longest_batch(100, SimpleNamespace(compilation_config=object())) == 100


def test_compiled_graphs_of_another_mode_are_not_taken(seams: Any) -> None:
    def name(layers: list[str] | None, config: Any, overlap: bool = False) -> Any:
        path = None if layers is None else SimpleNamespace(layers=dict.fromkeys(layers))
        vllm_config = SimpleNamespace(additional_config=config)
        manager = SimpleNamespace(
            vlora_store=SimpleNamespace(direct=path),
            setup=SimpleNamespace(settings=SimpleNamespace(overlap=overlap)),
        )
        seams._name_graphs(vllm_config, manager)
        return vllm_config.additional_config

    assert name(None, {"user": 1}) == {"user": 1}
    first, second = name(["a", "b"], {"user": 1}), name(["a"], {})
    assert first["user"] == 1
    assert first["vllm_vlora"] != second["vllm_vlora"]
    assert first["vllm_vlora"] == name(["b", "a"], {})["vllm_vlora"]
    assert first["vllm_vlora"] != name(["a", "b"], {}, overlap=True)["vllm_vlora"]


@pytest.mark.parametrize("checkpoint", ["folder", None])
def test_a_sleep_that_would_lose_the_tasks_is_refused_before_anything_else(
    seams: Any, managing: Any, checkpoint: str | None
) -> None:
    from vllm.v1.engine.core import EngineCore

    setup = managing.Setup(checkpoint, Settings("materialize"))
    patches = {(owner, name): value for owner, name, value in seams._patches(setup, list)}
    sleep = patches.get((EngineCore, "sleep"), EngineCore.sleep)
    slept: list[Any] = []
    held = ["a", "b"]
    core = SimpleNamespace(
        pause_scheduler=lambda **kwargs: slept.append("paused"),
        model_executor=SimpleNamespace(sleep=slept.append, wake_up=None),
        _vlora_tasks_held=SimpleNamespace(
            residency=SimpleNamespace(paths=lambda: held, forget=held.remove),
            arrivals=SimpleNamespace(unask=list),
            workers=SimpleNamespace(tell=lambda order: None),
        ),
    )
    sleep(core)
    sleep(core, 1, mode="wait")
    assert slept == ["paused", 1] * 2
    for call in (lambda: sleep(core, 2), lambda: sleep(core, level=2, mode="wait")):
        if checkpoint is None:
            call()
            assert slept[-2:] == ["paused", 2]
            # They come again from where they were brought from.
            assert held == []
        else:
            with pytest.raises(ModelStateError, match=r"level 2 would lose.*use level 1"):
                call()
            assert slept == ["paused", 1] * 2
            assert held == ["a", "b"]


def test_tasks_leave_the_devices_when_their_memory_is_lost_and_not_before(
    seams: Any, managing: Any
) -> None:
    """Requests in flight are waited for, and read them until then."""
    from vllm.v1.engine.core import EngineCore

    setup = managing.Setup(None, Settings("materialize"))
    patches = {(owner, name): value for owner, name, value in seams._patches(setup, list)}
    paused, events, held = Future[None](), list[Any](), ["a", "b"]
    core = SimpleNamespace(
        pause_scheduler=lambda **kwargs: paused,
        model_executor=SimpleNamespace(
            sleep=lambda level: events.append((level, list(held))), wake_up=None
        ),
        _vlora_tasks_held=SimpleNamespace(
            residency=SimpleNamespace(paths=lambda: held, forget=held.remove),
            arrivals=SimpleNamespace(unask=lambda: events.append("unasked") or ["c"]),
            workers=SimpleNamespace(tell=lambda order: events.append(("bases", list(held)))),
        ),
    )
    slept = patches[EngineCore, "sleep"](core, level=2, mode="wait")
    assert held == ["a", "b"]
    assert events == []
    held.append("c")  # Came to the device while they went on, and no engine core has heard of it.
    paused.set_result(None)
    slept.result(10)
    assert events == ["unasked", ("bases", []), (2, [])]


def test_tasks_come_back_with_the_last_of_the_memory_and_before_steps_go_on(
    seams: Any, managing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.core import EngineCore

    events = list[str]()
    for name in ("leave_devices", "return_to_devices"):
        monkeypatch.setattr(seams, name, lambda core, name=name: events.append(name))
    setup = managing.Setup(None, Settings("materialize"))
    patches = {(owner, name): value for owner, name, value in seams._patches(setup, list)}

    class Executor:
        is_sleeping = False

        def sleep(self, level: int) -> None:
            self.is_sleeping = True

        def wake_up(self, tags: list[str] | None) -> None:
            self.is_sleeping = tags == ["weights"]

    core = SimpleNamespace(
        model_executor=Executor(),
        pause_scheduler=lambda **kwargs: None,
        resume_scheduler=lambda: events.append("resume"),
    )
    sleep = patches[EngineCore, "sleep"]
    for _ in range(2):
        sleep(core, level=2, mode="keep")
        EngineCore.wake_up(core, ["weights"])
        assert events == ["leave_devices"]
        EngineCore.wake_up(core)
        assert events == ["leave_devices", "return_to_devices", "resume"]
        events.clear()
        sleep(core, level=1, mode="keep")
        EngineCore.wake_up(core)
        assert events == ["resume"], "level 1 keeps them"
        events.clear()


# --- seams: the manager ----------------------------------------------------------------------------


@dataclass
class Worker:
    """A manager without a model, over a store; ``stock`` has the mappings that punica was given."""

    manager: Any
    checkpoint: Checkpoint
    stock: list[Any]

    def request(self, task: str, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(task, number, str(task_path(self.checkpoint, task)))


class Cache(dict[int, Any]):
    """vLLM's cache of adapters, as far as it is read here."""

    @property
    def cache(self) -> dict[int, Any]:
        return self


@pytest.fixture
def worker(managing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    from vllm.lora.model_manager import LoRAModelManager

    checkpoint = build(tmp_path / "ck", STORED)
    store = Store().store
    store.preload(checkpoint.path, lambda opened: make_path(opened, slots=2))
    assert store.direct is not None
    manager = object.__new__(managing.TaskLoRAManager)
    manager._pooling_task = manager._classification_head = None
    manager.vlora_store = store
    manager.lora_config = SimpleNamespace(max_loras=2, max_cpu_loras=4)
    manager._direct_models, manager._direct_slots = {}, DirectSlots(store.direct)
    manager._routed_version = manager._ready_version = -1
    manager._ready = set()
    manager.in_batch, manager.in_graph = (True, False), (True, True)
    manager._warm_up, manager.direct_apart, manager._writer = None, False, None
    manager._last_mapping = manager._last_slot_layout = None
    manager.lora_index_to_id = [None, None]
    manager._registered_adapters, manager._active_adapters = Cache(), Cache()
    manager._writer = None
    stock: list[Any] = []
    monkeypatch.setattr(
        LoRAModelManager, "_set_adapter_mapping", lambda self, mapping: stock.append(mapping)
    )
    return Worker(manager, checkpoint, stock)


def test_a_direct_task_is_an_adapter_of_the_managers(worker: Worker) -> None:
    from vllm.lora.request import LoRARequest

    manager = worker.manager
    assert manager.add_direct(worker.request("joint", 11))
    assert manager.add_direct(worker.request("private", 12))
    assert set(manager.list_adapters()) == {11, 12}
    assert manager.get_adapter(11).task.task_id == "joint"
    assert not manager.add_direct(worker.request("head", 13)), "it needs a slot"
    assert not manager.add_direct(LoRARequest("ordinary", 14, "/peft/14"))
    assert not manager.add_direct(LoRARequest("ordinary", 11, "/peft/11"))
    assert manager.add_direct(worker.request("joint", 11))
    assert manager.add_direct(worker.request("one", 15))
    assert set(held_ids(manager)) == {11, 15}
    assert set(manager.list_adapters()) == {11, 12, 15}, "12 gave its slot up and stays known"
    assert manager.activate_adapter(12)
    assert set(held_ids(manager)) == {12, 15}
    assert manager.remove_adapter(11)
    assert not manager.remove_adapter(11)
    assert set(manager.list_adapters()) == {12, 15}
    manager.add_direct(worker.request("mixed", 12))
    assert manager.get_adapter(12).task.task_id == "mixed"
    manager.remove_all_adapters()
    assert manager.list_adapters() == {}
    assert held_ids(manager) == []
    paths = {str(task_path(worker.checkpoint, task)) for task in TASKS}
    assert {path for path, direct in manager.held_paths().items() if direct} == paths


def held_ids(manager: Any) -> list[int]:
    return [adapter for adapter in range(1, 100) if adapter in manager._direct_slots]


@pytest.mark.parametrize("pinned", [(11,), (11, 12)])
def test_a_pinned_direct_task_takes_no_slot_from_a_batch_of_others(
    worker: Worker, pinned: tuple[int, ...]
) -> None:
    """vLLM's scheduler lets in as many distinct adapters as ``--max-loras``, whatever is pinned."""
    from vllm.lora.layers import LoRAMapping

    manager, slots = worker.manager, 2
    for task, number in (("joint", 11), ("private", 12)):
        assert manager.add_direct(worker.request(task, number))
    for number in pinned:
        assert manager.pin_adapter(number)
    path = manager.vlora_store.direct
    batches = ((("one", 13), ("mixed", 14)), (("joint", 11), ("one", 13)), (("mixed", 14),))
    for batch in batches:
        for task, number in batch:
            assert manager.add_direct(worker.request(task, number))
        tokens = tuple(number for _, number in batch)
        manager.set_adapter_mapping(LoRAMapping(tokens, tokens))
        rows = path.routing.token_slots[: len(tokens)].tolist()
        assert all(row < slots for row in rows), "a token ran as the base model's"
        got = [path.table.tasks[row] for row in rows]
        assert got == [manager._direct_models[number].task.direct for number in tokens]
    assert set(manager.list_adapters()) == {11, 12, 13, 14}, "what is pinned stays known"


def test_every_direct_task_of_a_batch_has_a_slot_and_is_asked_for_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    manager, draw = worker.manager, random.Random(0)
    asked: list[int] = []
    add = manager.add_direct
    monkeypatch.setattr(
        manager, "add_direct", lambda request: asked.append(request.lora_int_id) or add(request)
    )

    def batch(*numbers: int) -> int:
        """How many were asked for, of a batch of tasks and ordinary adapters (from 20 on)."""
        asked.clear()
        requests = [
            LoRARequest("x", n, f"/peft/{n}") if n >= 20 else worker.request(NUMBERED[n], n)
            for n in numbers
        ]
        rest = manager.in_slots([None, *requests])
        assert {r.lora_int_id for r in rest} == {n for n in numbers if n >= 20}
        tasks = manager._direct_slots._path.table.tasks
        for request in set(requests) - rest:
            slot = manager._direct_slots._slots[request.lora_int_id]
            assert tasks[slot] is manager.get_adapter(request.lora_int_id).task.direct
        assert manager.all_direct(list(requests)) == (not rest)
        return len(asked)

    assert batch(11, 12) == 2
    assert batch(11, 12) == batch(12) == batch() == 0
    assert batch(11, 20) == 1, "the ordinary one alone"
    assert batch(13, 11) in (1, 3), "it may take the other one's slot, which is given another"
    assert batch(13, 11) == 0
    manager.remove_adapter(13)
    assert batch(13, 11) == 2
    for _ in range(100):
        batch(*draw.sample([11, 12, 13, 14], k=draw.randint(0, 2)), *draw.sample([20, 21], k=1))
    # The number of a task is given to another one.
    assert batch(11) <= 1
    manager.add_direct(worker.request("private", 11))
    assert batch(11) == 1
    assert manager.get_adapter(11).task.task_id == NUMBERED[11]


NUMBERED = {11: "joint", 12: "private", 13: "one", 14: "mixed"}


def test_punica_sees_direct_tokens_as_the_base_models(worker: Worker) -> None:
    from vllm.lora.layers import LoRAMapping

    manager = worker.manager
    for task, number in (("joint", 11), ("private", 12)):
        manager.add_direct(worker.request(task, number))
    mapping = LoRAMapping((11, 11, 0, 7, 12), (11, 0, 7, 12), is_prefill=True)
    manager.set_adapter_mapping(mapping)
    assert worker.stock == [LoRAMapping((0, 0, 0, 7, 0), (0, 0, 7, 0), is_prefill=True)]
    assert mapping.index_mapping == (11, 11, 0, 7, 12)
    path = manager.vlora_store.direct
    got = [path.table.tasks[slot] for slot in path.routing.token_slots[:5].tolist()]
    models = manager._direct_models
    joint, private = models[11].task.direct, models[12].task.direct
    assert got == [joint, joint, None, None, private]
    assert manager.in_batch == (True, True)
    for tokens, flags in (
        ((0, 0), (False, False)),
        ((12, 0), (False, True)),
        ((7, 0), (True, False)),
    ):
        manager.set_adapter_mapping(LoRAMapping(tokens, tokens))
        assert manager.in_batch == flags
        assert manager.in_graph == (True, True), "a graph of a real batch would serve any"


def test_the_same_mapping_is_routed_again_when_a_slot_holds_another_task(worker: Worker) -> None:
    from vllm.lora.layers import LoRAMapping

    manager = worker.manager
    routed: list[int] = []
    route = manager._direct_slots.route
    manager._direct_slots.route = lambda tokens: routed.append(len(tokens)) or route(tokens)
    manager.add_direct(worker.request("joint", 11))
    for _ in range(3):
        manager.set_adapter_mapping(LoRAMapping((11, 0), (11, 0)))
    assert routed == [2]
    manager.add_direct(worker.request("joint", 11))
    manager.set_adapter_mapping(LoRAMapping((11, 0), (11, 0)))
    assert routed == [2], "nothing changed"
    for task, number in (("private", 12), ("one", 13), ("joint", 11)):
        manager.add_direct(worker.request(task, number))
    manager.set_adapter_mapping(LoRAMapping((11, 0), (11, 0)))
    assert routed == [2, 2], "11 was out and came back, to another slot perhaps"
    path = manager.vlora_store.direct
    slot = path.routing.token_slots[0].item()
    assert path.table.tasks[slot] is manager._direct_models[11].task.direct


def test_towers_see_direct_tokens_as_the_base_models(worker: Worker) -> None:
    from vllm.lora.layers import LoRAMapping, LoRAMappingType

    manager = worker.manager
    manager.add_direct(worker.request("joint", 11))
    manager.set_adapter_mapping(LoRAMapping((11, 0), (11, 0)))
    runs = list(manager.vlora_store.direct.routing.runs)
    tower = LoRAMapping((11, 11, 7), (11, 7), is_prefill=True, type=LoRAMappingType.TOWER)
    manager.set_adapter_mapping(tower)
    # Punica would not find a direct task, and none adapts a tower.
    expected = LoRAMapping((0, 0, 7), (0, 7), is_prefill=True, type=LoRAMappingType.TOWER)
    assert worker.stock[-1] == expected
    assert manager.vlora_store.direct.routing.runs == runs


def test_a_late_task_is_held_and_forgotten_with_its_adapters_and_slot(
    managing: Any, worker: Worker, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    manager, store = worker.manager, worker.manager.vlora_store
    before = store.nbytes
    assert manager.hold(worker.request("joint", 11)) == managing.Held(direct=True)
    later = build(tmp_path / "later", seed=1)
    late = LoRARequest("one", 21, str(task_path(later, "one")))
    while manager.bring([late], 0) != [True]:
        time.sleep(0.001)
    assert store.nbytes == before
    assert manager.hold(late).nbytes > 0
    assert manager.hold(late) == managing.Held(direct=True)
    assert late.lora_path in manager.held_paths()
    assert store.nbytes > before
    for number in (21, 22):
        manager.add_direct(LoRARequest("one", number, late.lora_path))
    task = manager._direct_models[21].task.direct
    assert task in store.direct.table.tasks
    manager.forget(late.lora_path)
    assert held_ids(manager) == []
    assert manager.list_adapters() == {}
    assert task not in store.direct.table.tasks, "its tensors would live on"
    assert store.nbytes == before


def test_tasks_that_come_take_no_more_places_than_they_need_and_keep_their_order(
    managing: Any, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task takes one of so many places; who may give way does so one after the other."""
    from vllm.lora.request import LoRARequest

    manager, store = worker.manager, worker.manager.vlora_store
    tasks = [build(tmp_path / name, seed=seed) for seed, name in enumerate("abcd", 1)]
    late = [LoRARequest("one", 30 + i, str(task_path(one, "one"))) for i, one in enumerate(tasks)]
    held = list(manager.held_paths())
    place, places = store.place, len(held) + 1
    monkeypatch.setattr(
        store,
        "place",
        lambda path: place(path) if len(store) < places or store.held(str(path)) else 7,
    )
    while manager.bring(late, 0) != [True] * 4:
        time.sleep(0.001)
    first, second, third, fourth = manager.bring(late, 4, held[:1])
    assert (first.over, first.gave_way, first.nbytes > 0) == (0, 0, True)
    assert (second.over, second.gave_way) == (0, 1)
    assert (third.over, third.gave_way) == (7, 0)
    assert fourth is True, "it must not take the place of one that came before it"
    assert [*manager.held_paths()] == [*held[1:], late[0].lora_path, late[1].lora_path]


def test_what_fails_in_a_worker_is_its_answer(
    managing: Any, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from vllm.lora.request import LoRARequest

    manager, store = worker.manager, worker.manager.vlora_store
    later = build(tmp_path / "later", seed=1)
    late = LoRARequest("one", 21, str(task_path(later, "one")))
    for error, message in (
        (CheckpointError("damaged"), "damaged"),
        (OSError("no disk"), f"{late.lora_path}: no disk"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(store, "place", lambda path, error=error: (_ for _ in ()).throw(error))
            held = manager.hold(late)
            assert isinstance(held.error, VLoRAError)
            assert str(held.error) == message
    with monkeypatch.context() as patch:
        full = torch.OutOfMemoryError("full")
        patch.setattr(store, "place", lambda path: (_ for _ in ()).throw(full))
        held = manager.hold(late)
        assert held.error is None
        assert held.over > 2**40, "whatever gives way may help"


class StockWorker:
    """The part of vLLM's worker manager that the seams wrap."""

    def __init__(self, manager: Any) -> None:
        self._adapter_manager = manager
        self.calls: list[Any] = []

    def apply(self, lora_requests: set[Any]) -> None:
        self.calls.append({r.lora_int_id for r in lora_requests})

    def add_adapter(self, lora_request: Any) -> bool:
        self.calls.append(lora_request.lora_int_id)
        return True

    def add_dummy(self, lora_request: Any, rank: int) -> bool:
        self.calls.append((lora_request.lora_int_id, rank))
        return True

    def remove_adapter(self, adapter: int) -> bool:
        return self._adapter_manager.remove_adapter(adapter)


def test_a_batchs_direct_tasks_are_not_counted_against_the_slots(
    seams: Any, worker: Worker
) -> None:
    from vllm.lora.request import LoRARequest

    stock = StockWorker(worker.manager)
    batch = {worker.request("joint", 11), worker.request("private", 12), worker.request("head", 13),
             LoRARequest("ordinary", 5, "/peft/5"), None}  # fmt: skip
    seams._apply_adapters(StockWorker.apply)(stock, batch)
    assert stock.calls == [{13, 5}]
    assert set(held_ids(worker.manager)) == {11, 12}


def test_an_id_that_comes_with_another_path_is_loaded_anew(seams: Any, worker: Worker) -> None:
    from vllm.lora.request import LoRARequest

    add = seams._add_adapter(StockWorker.add_adapter)
    stock, manager = StockWorker(worker.manager), worker.manager
    assert add(stock, worker.request("joint", 11))
    assert add(stock, worker.request("joint", 11))
    assert stock.calls == []
    assert add(stock, worker.request("private", 11))
    assert manager.get_adapter(11).task.task_id == "private"
    assert add(stock, LoRARequest("ordinary", 11, "/peft/11"))
    assert stock.calls == [11]
    assert held_ids(manager) == [], "the direct task of this id is gone"
    assert manager.get_adapter(11) is None


def test_warm_up_adapters_beyond_the_slots_stand_for_direct_tasks(
    seams: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    add = seams._add_dummy_lora(StockWorker.add_dummy)
    stock, manager = StockWorker(worker.manager), worker.manager
    for number in (1, 2, 3, 4):
        assert add(stock, LoRARequest(f"dummy {number}", number, "/not/a/real/path"), 8)
    assert stock.calls == [(1, 8), (2, 8)]
    assert set(manager.list_adapters()) == {3, 4}
    # They are activated by id and path like any other, and add nothing.
    assert manager.add_direct(LoRARequest("dummy 3", 3, "/not/a/real/path"))
    empty = manager.vlora_store.direct.empty
    assert manager._direct_models[3].task.direct is empty
    assert not empty.records.any()
    monkeypatch.setattr(manager.vlora_store, "direct", None)
    assert add(stock, LoRARequest("dummy 5", 5, "/not/a/real/path"), 8)
    assert stock.calls[-1] == (5, 8)


# --- classification heads -------------------------------------------------------------------------

# The checks of a head that vLLM's manager has, by release.
HEAD_CHECKS = {
    "0.30": (),
    "0.32": ("_validate_modules_to_save", "_validate_token_classification_lora"),
    "0.33": ("_validate_classification_head_lora",),
}


@pytest.mark.parametrize("release", list(HEAD_CHECKS))
def test_heads_go_through_every_check_that_vllm_has(
    managing: Any, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    from vllm.lora.model_manager import LoRAModelManager

    shown: list[tuple[str, list[str], list[str]]] = []
    for name in managing._HEAD_CHECKS:
        monkeypatch.delattr(LoRAModelManager, name, raising=False)
    for name in HEAD_CHECKS[release]:

        def check(self: Any, model: Any, name: str = name) -> None:
            shown.append((name, list(model.loras), list(model.modules_to_save)))
            if "refused" in model.modules_to_save:
                raise ValueError("is refused")

        monkeypatch.setattr(LoRAModelManager, name, check, raising=False)
    manager = object.__new__(managing.TaskLoRAManager)

    def make(head: str | None) -> Any:
        extra = {f"base_model.model.{head}.weight": torch.ones(1, 2)} if head else {}
        task = managing.ResidentTask("t", "ck", 4, {"score": ("a", "b")}, extra)
        return manager._make_model(7, task)

    assert make(None).id == 7
    assert shown == [(name, ["score"], []) for name in HEAD_CHECKS[release]]
    if not HEAD_CHECKS[release]:
        with pytest.raises(ModelMismatchError, match=r"task 't': .* heads in a way"):
            make("classifier")
        return
    shown.clear()
    assert list(make("classifier").modules_to_save) == ["classifier"]
    assert shown == [(name, ["score"], ["classifier"]) for name in HEAD_CHECKS[release]]
    with pytest.raises(ModelMismatchError, match="ck: task 't': is refused"):
        make("refused")


def test_the_line_of_a_new_state_names_what_changed_beside_the_tasks(
    managing: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path / "ck").path
    states = [State(Checkpoint.open(folder))]
    changes = (
        lambda: set_alias(folder, "prod", "one"),
        lambda: attach_router(folder, ["one", "private"], network(2)),
        lambda: (set_alias(folder, "prod", "private"), set_alias(folder, "next", "one")),
        lambda: (remove_alias(folder, "prod"), remove_router(folder)),
    )
    caplog.set_level(logging.INFO, logger=managing.logger.name)
    for change in changes:
        change()
        states.append(State(Checkpoint.open(folder)))
        managing._log_change(*states[-2:])
    managing._log_change(states[-1], states[-1])
    ends = [line.partition("; 0 gone")[2] for line in caplog.messages]
    assert ends == [
        "; 1 of the aliases changed (prod)",
        "; the router was trained",
        "; 2 of the aliases changed (next, prod)",
        "; 1 of the aliases changed (prod); the router was taken away",
        "",
    ]
