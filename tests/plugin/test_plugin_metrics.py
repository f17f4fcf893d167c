"""What engine cores count, as vLLM's own ``/metrics`` shows it: read back by Prometheus's own parser."""

from __future__ import annotations

import asyncio
import math
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scrapes import Scrape, busy_counters, scrape_of

from vllm_vlora.errors import TaskBusyError
from vllm_vlora.plugin import metrics
from vllm_vlora.plugin.counters import DEVICE, ENDING, HOST, METRICS_METHOD, ServingCounters
from vllm_vlora.plugin.metrics import FAMILIES, TaskMetrics


def _shown(*counters: ServingCounters) -> Scrape:
    shown = TaskMetrics()
    shown.model_name, shown.max_loras = "base", 8
    for engine, held in enumerate(counters):
        shown.update(engine, held.snapshot(shown.seen(engine)))
    return scrape_of(shown)


def test_the_names_that_routers_read_have_their_meaning() -> None:
    shown = _shown(busy_counters())
    loaded = shown.samples("vllm:lora_adapter_loaded")
    assert loaded == {
        (("adapter_name", "sql"), ("engine", "0"), ("level", "gpu"), ("model_name", "base"),
         ("pinned", "true")): 1,
        (("adapter_name", 'odd "name"\\é'), ("engine", "0"), ("level", "gpu"),
         ("model_name", "base"), ("pinned", "false")): 1,
        (("adapter_name", "french"), ("engine", "0"), ("level", "cpu"), ("model_name", "base"),
         ("pinned", "false")): 1,
    }  # fmt: skip
    assert shown.value("vllm:num_gpu_loaded_lora_adapters", engine="0") == 2
    assert shown.value("vllm:num_cpu_loaded_lora_adapters", engine="0") == 1
    # 60 bytes are free, and tasks take 20 each.
    assert shown.value("vllm:max_gpu_lora_adapters", engine="0") == 2 + 3
    name = "vllm:lora_adapter_load_seconds"
    assert shown.value(f"{name}_count", transition="load") == 2
    assert shown.value(f"{name}_sum", transition="load") == pytest.approx(0.35)
    assert shown.value(f"{name}_bucket", transition="load", le="0.05") == 1
    assert shown.value(f"{name}_bucket", transition="load", le="+Inf") == 2
    assert shown.value(f"{name}_count", transition="activate") == 1


def test_every_number_that_is_counted_is_shown() -> None:
    shown = _shown(busy_counters())
    for name, value, labels in [
        ("tasks", 2, {"tier": "device"}),
        ("tasks", 100, {"tier": "catalogue"}),
        ("bytes", 40, {"tier": "device"}),
        ("budget_bytes", 100, {"tier": "device"}),
        ("unlisted_tasks", 0, {"tier": "host"}),
        ("requests_waiting_for_load", 3, {}),
        ("direct_tasks", 2, {}),
        ("basis_exchanges_total", 1, {}),
        ("checkpoint_info", 1, {"digest": "0123456789ab"}),
        ("requests_total", 3, {"tier": "device"}),
        ("requests_total", 1, {"tier": "disk"}),
        ("requests_total", 1, {"tier": "remote"}),
        ("task_requests_total", 3, {"task": "sql"}),
        ("task_requests_total", 0, {"task": "other"}),
        ("loaded_bytes_total", 40, {"source": "disk"}),
        ("loaded_bytes_total", 30, {"source": "remote"}),
        ("evictions_total", 1, {"tier": "device"}),
        ("refusals_total", 1, {"reason": "memory"}),
        ("checkpoint_reloads_total", 1, {}),
        ("checkpoint_refusals_total", 1, {"reason": "checkpoint"}),
    ]:
        assert shown.value(f"vllm_vlora:{name}", **labels) == value, (name, labels)
    assert not shown.samples("vllm_vlora:budget_bytes").keys() & {
        (("engine", "0"), ("model_name", "base"), ("tier", "catalogue"))
    }
    ages = shown.samples("vllm_vlora:snapshot_age_seconds").values()
    assert all(0 <= age < 60 for age in ages)


def test_a_fresh_engine_shows_every_family_and_counts_from_nothing() -> None:
    """A dashboard finds the names before anything happened, and Prometheus sees the first rise."""
    counters = ServingCounters(100, 100)
    counters.set_tier(DEVICE, 0, nbytes=0, budget=100)
    counters.set_state("5" * 64)
    shown = _shown(counters)
    names = {family.name + ("_total" if family.counts else "") for family in FAMILIES}
    assert names - {"vllm:lora_adapter_loaded"} <= shown.names
    assert shown.value("vllm:max_gpu_lora_adapters") == 8
    counted = [shown.samples(name) for name in shown.names if name.endswith("_total")]
    assert all(value == 0 for series in counted for value in series.values())


def test_each_engine_core_has_its_own_series() -> None:
    shown = _shown(busy_counters(), ServingCounters(1, 1))
    name = "vllm:num_gpu_loaded_lora_adapters"
    assert [shown.value(name, engine=engine) for engine in "01"] == [2, 0]


def test_residents_that_are_not_sent_again_stay_and_those_that_left_are_gone() -> None:
    counters, shown = busy_counters(), TaskMetrics()
    for _ in range(2):
        shown.update(0, counters.snapshot(shown.seen(0)))
    assert shown.tier_of() == {"sql": DEVICE, 'odd "name"\\é': DEVICE, "french": HOST}
    assert shown.all_listed()
    counters.set_tier(DEVICE, 5, ["french"])
    counters.set_tier(HOST, 0)
    shown.update(0, counters.snapshot(shown.seen(0)))
    assert shown.tier_of() == {"french": DEVICE}
    assert not shown.all_listed()
    assert scrape_of(shown).value("vllm_vlora:unlisted_tasks", tier="device") == 4
    shown.keep([1])
    assert scrape_of(shown).families == set()


@pytest.mark.parametrize(
    ("held", "fit"),
    [
        (None, 8),
        ({"tasks": 0, "nbytes": 0, "budget": 100}, 8),
        ({"tasks": 3}, 8),
        ({"tasks": 30}, 30),
        ({"tasks": 3, "nbytes": 90, "budget": 100}, 3),
        ({"tasks": 3, "nbytes": 110, "budget": 100}, 3),
        ({"tasks": 3, "nbytes": 30, "budget": 100}, 10),
    ],
)
def test_the_devices_capacity_in_tasks(held: dict[str, int] | None, fit: int) -> None:
    counters = ServingCounters(1, 1)
    if held is not None:
        counters.set_tier(DEVICE, **held)
    assert _shown(counters).value("vllm:max_gpu_lora_adapters") == fit


# --- asking ---


class Client:
    """Engine cores as vLLM's client of them has them: some answer, some fail, some never do."""

    def __init__(self, *answers: Any) -> None:
        self.core_engines = [rank.to_bytes(2, "little") for rank in range(len(answers))]
        self.answers = answers
        self.asked: list[int] = []
        self.refused: list[dict[str, int]] = []

    async def _call_utility_async(
        self, method: str, seen: int, refused: dict[str, int], *, engine: bytes
    ) -> Any:
        assert method == METRICS_METHOD
        self.refused.append(refused)
        rank = int.from_bytes(engine, "little")
        self.asked.append(rank)
        answer = self.answers[rank]
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await asyncio.sleep(3600)
        return answer.snapshot(seen)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> TaskMetrics:
    found = TaskMetrics()
    monkeypatch.setattr(metrics, "METRICS", found)
    monkeypatch.setattr(metrics, "_PATIENCE", 0.05)
    return found


def _engine_client(client: Client) -> Any:
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name="base"),
        lora_config=SimpleNamespace(max_loras=8),
    )
    return SimpleNamespace(engine_core=client, vllm_config=config)


def test_one_that_fails_and_one_that_is_silent_do_not_hold_up_the_others(
    ours: TaskMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *a: warnings.append(text % a))
    monkeypatch.setattr(metrics, "logger", logger)
    client = Client(RuntimeError("dead"), busy_counters(), None)
    engine_client = _engine_client(client)

    async def run() -> None:
        for _ in range(3):
            await metrics.refresh(engine_client)

    asyncio.run(run())
    shown = scrape_of(ours)
    assert shown.value("vllm:num_gpu_loaded_lora_adapters", engine="1") == 2
    assert len(shown.samples("vllm:num_gpu_loaded_lora_adapters")) == 1
    # Who is silent is not asked anew, and who fails is named once.
    assert sorted(client.asked) == [0, 0, 0, 1, 1, 1, 2]
    assert len(warnings) == 1
    assert "engine core 0" in warnings[0]
    assert "dead" in warnings[0]


def test_one_that_ends_is_asked_no_more(ours: TaskMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would log a warning a second until the last request is answered."""
    monkeypatch.setattr(metrics, "INTERVAL", 0.0)
    warnings: list[str] = []
    monkeypatch.setattr(metrics.logger, "warning", lambda *a: warnings.append(str(a)))
    client = Client(busy_counters(), RuntimeError(ENDING))
    engine_client = _engine_client(client)

    async def run() -> None:
        await asyncio.wait_for(metrics._keep_refreshing(engine_client), 10)

    asyncio.run(run())
    assert (client.asked, warnings) == ([0, 1], [])
    assert len(scrape_of(ours).samples("vllm:num_gpu_loaded_lora_adapters")) == 1


def test_what_vllm_answers_while_it_drains() -> None:
    from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

    core: Any = object.__new__(EngineCoreProc)
    core.shutdown_state, core.output_queue = EngineShutdownState.REQUESTED, queue.Queue()
    assert core._reject_utility_in_shutdown(0, 1, METRICS_METHOD)
    _, outputs = core.output_queue.get_nowait()
    assert ENDING in outputs.utility_output.failure_message


def test_an_engine_core_that_left_is_gone_from_the_metrics(ours: TaskMetrics) -> None:
    client = Client(busy_counters(), busy_counters())
    engine_client = _engine_client(client)

    async def run() -> None:
        await metrics.refresh(engine_client)
        del client.core_engines[1]
        await metrics.refresh(engine_client)

    asyncio.run(run())
    assert len(scrape_of(ours).samples("vllm:num_gpu_loaded_lora_adapters")) == 1


# --- vLLM's own route ---


@pytest.fixture
def app(ours: TaskMetrics) -> Iterator[Any]:
    pytest.importorskip("vllm")
    import prometheus_client
    from fastapi import FastAPI

    ours.update(0, busy_counters().snapshot())
    yield FastAPI()
    for collector in (ours,):
        if collector in prometheus_client.REGISTRY._collector_to_names:
            prometheus_client.REGISTRY.unregister(collector)


def _scrape(app: Any) -> Scrape:
    from fastapi.testclient import TestClient

    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return Scrape(answer.text)


def _attach(app: Any) -> None:
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    metrics.show_in_metrics(attach_router)(app)


def test_one_api_server_shows_ours_beside_its_own(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    _attach(app)
    shown = _scrape(app)
    assert shown.value("vllm:num_gpu_loaded_lora_adapters") == 2
    assert "python_gc_objects_collected" in shown.families


def test_several_api_servers_show_ours_once_beside_the_sum_of_theirs(
    app: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM's metrics of all API servers lie in files, which a scrape of any of them adds up."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    code = (
        "from prometheus_client import Counter; "
        "Counter('vllm:tried', 'text', ['engine']).labels('0').inc(2)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True)
    _attach(app)
    for _ in range(2):
        shown = _scrape(app)
        assert shown.value("vllm:tried_total", engine="0") == 4
        assert shown.value("vllm:num_gpu_loaded_lora_adapters") == 2
        assert shown.value("vllm_vlora:requests_total", tier="device") == 3


def test_no_number_is_one_that_prometheus_cannot_read() -> None:
    assert all(math.isfinite(number) for number in _shown(busy_counters()).numbers())


def test_what_an_api_server_refuses_is_told_to_one_engine_core_once(ours: TaskMetrics) -> None:
    client = Client(busy_counters(), busy_counters())

    async def run() -> None:
        for _ in range(3):
            ours.refused(TaskBusyError, "sql")
        for _ in range(2):
            await metrics.refresh(_engine_client(client))

    asyncio.run(run())
    assert sorted(client.refused, key=len) == [{}, {}, {}, {"busy": 3}]
