"""vLLM's scheduler, patched: requests wait for slots, and direct tasks need none."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from vllm_vlora.plugin.admission import kinds_of
from vllm_vlora.plugin.seam_table import Place
from vllm_vlora.plugin.settings import Settings


@pytest.fixture(scope="module")
def scheduling() -> Any:
    return importlib.import_module("vllm_vlora.plugin.scheduling")


def request(name: str, adapter: int = 0, path: str = "") -> Any:
    """A request of a PEFT adapter, or of the path's; the base model's without an adapter."""
    lora = SimpleNamespace(lora_int_id=adapter, lora_path=path or f"/peft/{adapter}")
    return SimpleNamespace(request_id=name, lora_request=lora if adapter else None)


def our_path(number: int) -> str:
    return f"/ck/tasks/t{number}.safetensors@{number:032x}"


class Core:
    """The scheduler and the engine core of a test, patched as those of vLLM are."""

    def __init__(self, scheduling: Any, slots: int, kinds: dict[str, bool]) -> None:
        class Scheduler:
            def __init__(self, lora: bool = True) -> None:
                self.requests: dict[str, Any] = {}
                self.lora_config = SimpleNamespace(max_loras=64) if lora else None
                self.log: list[str] = []

            def add_request(self, request: Any) -> None:
                self.log.append(f"add {request.request_id}")
                self.requests[request.request_id] = request

            def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
                ids = [request_ids] if isinstance(request_ids, str) else request_ids
                ids = list(self.requests) if ids is None else ids
                self.log += [f"finish {i}" for i in ids if i in self.requests]
                return [self.requests.pop(i) for i in ids if i in self.requests]

            def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
                for name in scheduler_output:
                    del self.requests[name]
                return "outputs"

        class EngineCore:
            def __init__(self) -> None:
                self.scheduler = Scheduler()
                kinds_of(self.scheduler).update(kinds)

            def add_request(self, request: Any, request_wave: int = 0) -> None:
                self.scheduler.add_request(request)

        seams = [
            (Scheduler, "add_request"),
            (Scheduler, "finish_requests"),
            (Scheduler, "update_from_output"),
        ]
        places = {
            f"{owner.__name__}.{name}": Place(owner, name, getattr(owner, name))
            for owner, name in seams
        }
        setup = scheduling.Setup("/ck", Settings("auto", slots))
        for target, name, value in scheduling.schedule_by_kind(setup, places):
            setattr(target, name, value)
        self.scheduler_class = Scheduler
        self.core = EngineCore()
        self.scheduler: Any = self.core.scheduler

    def ask(self, *requests: Any) -> None:
        for one in requests:
            self.core.add_request(one)

    def inside(self) -> list[str]:
        return list(self.scheduler.requests)


@pytest.fixture
def make_core(scheduling: Any) -> Callable[..., Core]:
    def make(slots: int, kinds: Mapping[str, bool] = MappingProxyType({})) -> Core:
        return Core(scheduling, slots, dict(kinds))

    return make


def test_requests_beyond_the_slots_wait_until_a_slot_is_free(
    make_core: Callable[..., Core],
) -> None:
    core = make_core(2)
    core.ask(*(request(name, adapter) for name, adapter in zip("abcdef", (1, 2, 3, 1, 4, 3))))
    core.ask(request("base"))
    assert core.inside() == ["a", "b", "d", "base"]
    scheduler = core.scheduler
    assert scheduler.update_from_output([], None) == "outputs"
    assert core.inside() == ["a", "b", "d", "base"]
    scheduler.update_from_output(["a"], None)
    assert core.inside() == ["b", "d", "base"], "d still needs the slot of adapter 1"
    scheduler.update_from_output(["d"], None)
    assert core.inside() == ["b", "base", "c", "f"]
    scheduler.update_from_output(["b", "c"], None)
    assert core.inside() == ["base", "f", "e"]


def test_direct_tasks_need_no_slot_and_others_of_ours_do(make_core: Callable[..., Core]) -> None:
    core = make_core(1, {our_path(number): number < 6 for number in range(1, 7)})
    core.ask(*(request(f"direct {n}", 1000 + n, our_path(n)) for n in range(1, 6)))
    assert len(core.inside()) == 5
    core.ask(request("slotted", 1006, our_path(6)), request("peft", 1), request("again", 1006,
             our_path(6)), request("more", 1001, our_path(1)))  # fmt: skip
    assert core.inside()[5:] == ["slotted", "again", "more"]
    core.scheduler.update_from_output(["slotted", "again"], None)
    assert core.inside()[-1] == "peft"


def test_a_request_that_waits_is_ended_by_the_scheduler_itself(
    make_core: Callable[..., Core],
) -> None:
    core = make_core(1)
    core.ask(*(request(name, adapter) for name, adapter in zip("abcd", (1, 2, 3, 2))))
    scheduler = core.scheduler
    assert [r.request_id for r in scheduler.finish_requests("b", "aborted")] == ["b"]
    assert scheduler.log == ["add a", "add b", "finish b"], "it must hold what it ends"
    assert core.inside() == ["a"]
    # A generator, as vLLM may pass one; the request inside frees the slot for the next that waits.
    ended = scheduler.finish_requests((name for name in ("a", "c", "unknown")), "aborted")
    assert {r.request_id for r in ended} == {"a", "c"}
    assert core.inside() == ["d"]
    core.ask(request("e", 1), request("f", 3))
    assert {r.request_id for r in scheduler.finish_requests(None, "aborted")} == {"d", "e", "f"}
    assert core.inside() == []
    core.ask(request("g", 9))
    assert core.inside() == ["g"]


def test_what_continues_a_request_inside_is_the_schedulers_own_business(
    make_core: Callable[..., Core],
) -> None:
    core = make_core(1)
    core.ask(request("a", 1), request("a", 1))
    assert core.scheduler.log == ["add a", "add a"]


def test_without_lora_nothing_is_held_back(make_core: Callable[..., Core]) -> None:
    core = make_core(1)
    scheduler: Any = core.scheduler_class(lora=False)
    for name, adapter in (("a", 1), ("b", 2)):
        scheduler.add_request(request(name, adapter))
    assert list(scheduler.requests) == ["a", "b"]
    assert scheduler.update_from_output(["a"], None) == "outputs"
    assert [r.request_id for r in scheduler.finish_requests(["b"], "aborted")] == ["b"]


def test_schedulers_do_not_share_their_slots(make_core: Callable[..., Core]) -> None:
    core = make_core(1)
    core.ask(request("a", 1))
    other: Any = core.scheduler_class()
    other.add_request(request("b", 2))
    assert (core.inside(), list(other.requests)) == (["a"], ["b"])
