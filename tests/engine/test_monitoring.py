"""The real server's ``/metrics``, with one API server and with two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from dashboards import problems, queries
from engine_routers import TASKS, attach
from engine_server import FORKED, Server
from engine_world import ADAPTERS, PROMPTS, World, exact
from entry_points import declare_entry_points
from places import ROOT
from scrapes import Scrape
from spans import SpanCollector

from vllm_vlora.checkpoint.manifest import CONFIG_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.plugin.metrics import FAMILIES

pytestmark = pytest.mark.engine

FIRST, SECOND, *_ = ADAPTERS
# Forks of one process have imported prometheus_client before vLLM tells it to write files.
FILES = """
import os
from prometheus_client import values
os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.environ["FILES"]
values.ValueClass = values.get_value_class()
"""
# And an environment that was installed earlier may not know of all entry points.
DECLARED = "import os, sys; sys.path.append(os.environ['DECLARED'])\n"


def _scrape(server: Server) -> Scrape:
    answer = httpx.get(f"{server.url}/metrics", timeout=30)
    assert answer.status_code == 200
    return Scrape(answer.text)


def _until(server: Server, seen: Callable[[Scrape], bool], seconds: float = 20) -> Scrape:
    """The first scrape that shows it; the API servers ask about once a second."""
    deadline = time.monotonic() + seconds
    while not seen(shown := _scrape(server)):
        assert time.monotonic() < deadline, sorted(shown.names)
        time.sleep(0.2)
    return shown


@pytest.fixture(scope="module")
def spans() -> Iterator[SpanCollector]:
    collector = SpanCollector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def checkpoint(world: World) -> Path:
    """With a router, whose metrics are there then."""
    folder = Path(shutil.copytree(exact(world, "private"), world.root / "monitored"))
    attach(folder, dict(zip(TASKS, PROMPTS)))
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["one API server", "two API servers"])
def server(
    world: World,
    checkpoint: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    spans: SpanCollector,
) -> Iterator[Server]:
    server = Server(
        world,
        world.root / f"server-{request.param}.log",
        checkpoint,
        DECLARED + (FORKED if request.param == 1 else FILES + FORKED),
        options=(
            *("--api-server-count", str(request.param)),
            *("--otlp-traces-endpoint", spans.endpoint),
        ),
        **spans.environment,
        VLLM_VLORA_METRICS_TASKS="2",
        VLLM_PLUGINS="vlora,vlora_tasks",
        FILES=str(tmp_path_factory.mktemp("files")),
        DECLARED=str(declare_entry_points(tmp_path_factory.mktemp("declared"))),
    )
    assert server.wait(), server.log.read_text()[-4000:]
    yield server
    server.stop()


def test_every_task_is_on_the_device_before_any_request(server: Server) -> None:
    shown = _scrape(server)
    loaded = shown.samples("vllm:lora_adapter_loaded")
    assert {dict(labels)["adapter_name"] for labels in loaded} == set(ADAPTERS)
    assert {dict(labels)["level"] for labels in loaded} == {"gpu"}
    assert shown.value("vllm:num_gpu_loaded_lora_adapters", engine="0", model_name="base") == 6
    for family in FAMILIES:
        name = family.name + ("_total" if family.counts else "")
        assert family.name in shown.families or name in shown.families, name
    # vLLM's own are beside them.
    assert {"vllm:num_requests_running", "vllm:lora_requests_info"} & shown.families
    assert "vllm:lora_adapter_load_seconds" in shown.families


def test_requests_are_counted_by_task_on_every_api_server(server: Server) -> None:
    before = sum(_scrape(server).samples("vllm_vlora:requests_total").values())
    for name in [FIRST] * 3 + [SECOND] * 2 + ["base", "ordinary"]:
        assert server.text(name, PROMPTS[0])

    def counted(shown: Scrape) -> bool:
        found = shown.samples("vllm_vlora:requests_total").values()
        return sum(found) == before + 5

    _until(server, counted)
    # Whichever API server answers.
    time.sleep(2.5)
    for _ in range(12):
        shown = _scrape(server)
        assert counted(shown)
        assert shown.value("vllm_vlora:task_requests_total", task=FIRST) == 3
        assert shown.value("vllm_vlora:task_requests_total", task=SECOND) == 2
        assert shown.value("vllm_vlora:snapshot_age_seconds", engine="0") < 5


def test_every_query_of_the_dashboard_names_what_the_server_has(server: Server) -> None:
    for task, prompt in zip(TASKS, PROMPTS):
        assert server.text("auto", prompt) == server.text(task, prompt)
    shown = _until(server, lambda s: "vllm:time_to_first_token_seconds_bucket" in s.names)
    routed = shown.samples("vllm_vlora:routed_task_requests_total")
    assert sum(routed.values()) == len(TASKS)
    missing = {where: problems(query, shown) for where, query in queries()}
    assert not {where: found for where, found in missing.items() if found}


def test_the_tasks_page_by_page(server: Server, checkpoint: Path) -> None:
    route, found = f"{server.url}/v1/vlora/tasks", []
    after = ""
    while True:
        page = httpx.get(route, params={"limit": 2, "after": after}, timeout=30).json()
        found += page["data"]
        if not page["has_more"]:
            break
        after = page["last_id"]
    opened = Checkpoint.open(checkpoint)
    assert {task["id"]: task["digest"] for task in found} == {
        name: opened.digest(name) for name in ADAPTERS
    }
    assert [task["id"] for task in found] == sorted(ADAPTERS)
    assert {task["tier"] for task in found} == {"device"}


def test_top_reads_the_server(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vllm_vlora.tools", "top", server.url, "--json"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "base"
    (engine,) = found["engines"]
    assert engine["tasks"] == {"device": 6, "host": 0, "catalogue": 6}
    assert 0 < engine["bytes"]["device"] <= engine["budget_bytes"]["device"]
    assert engine["age_seconds"] < 5


def test_combinations_of_what_ran_do_not_stay_for_good(
    server: Server, request: pytest.FixtureRequest
) -> None:
    """In files that API servers share they stay, up to a bound."""
    for number in range(1, 25):
        assert server.text(f"{FIRST}*0.{number:02}+{SECOND}", PROMPTS[0])
    found = _scrape(server).samples("vllm:lora_requests_info")
    assert found
    if request.node.callspec.params["server"] == 1:
        assert len(found) == 16
    else:
        assert 24 <= len(found) < 60


def test_a_requests_span_names_its_task(server: Server, spans: SpanCollector, world: World) -> None:
    spans.clear()
    prompt = [*PROMPTS[0], 3, 4]  # As long as no other test's.
    for name in (FIRST, "base", "ordinary"):
        assert server.text(name, prompt)
    found = spans.wait_for(3, len(prompt))
    digest = Checkpoint.open(exact(world, "private")).digest(FIRST)
    ours = ("vllm_vlora.task", "vllm_vlora.task_digest")
    said = [tuple(span[key] for key in ours if key in span) for span in found]
    assert sorted(said) == [(), (), (FIRST, digest)]
    assert all("gen_ai.usage.completion_tokens" in span for span in found)


COPIES = [f"copy-{i}" for i in range(8)]


def _publish(world: World, tasks: list[str]) -> Path:
    """A checkpoint of copies of one adapter, of some 120 KB each, in place of the one before."""
    adapters = dict.fromkeys(tasks, world.adapters["everything"])
    return world.compress(
        "crowded", adapters, force=True, ratio=0.1, representation="private", quantize="none"
    )


@pytest.fixture(scope="module")
def crowded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose device holds some of its tasks."""
    server = Server(
        world,
        tmp_path_factory.mktemp("crowded") / "log",
        _publish(world, COPIES),
        VLLM_VLORA_DEVICE_BYTES="400000",
        VLLM_VLORA_LATE_MIB="0",
    )
    assert server.wait(), server.log.read_text()[-4000:]
    yield server
    server.stop()


def test_tasks_that_come_and_go_are_counted(crowded: Server) -> None:
    before = _scrape(crowded)
    held = before.value("vllm_vlora:tasks", tier="device")
    assert 0 < held < len(COPIES)
    assert before.value("vllm_vlora:tasks", tier="catalogue") == len(COPIES)
    for _ in range(2):
        for name in COPIES:
            assert crowded.text(name, PROMPTS[0])
    asked = 2 * len(COPIES)

    def has_caught_up(s: Scrape) -> bool:
        # What the workers hold is asked for once a second, and counted here at once.
        levels = Counter(dict(labels)["level"] for labels in s.samples("vllm:lora_adapter_loaded"))
        tasks = {tier: s.value("vllm_vlora:tasks", tier=tier) for tier in ("device", "host")}
        counted = sum(s.samples("vllm_vlora:requests_total").values()) == asked
        return counted and tasks == {"device": levels["gpu"], "host": levels["cpu"]}

    shown = _until(crowded, has_caught_up)
    tiers = {tier: shown.value("vllm_vlora:requests_total", tier=tier)
             for tier in ("device", "host", "disk")}  # fmt: skip
    # In order, so that each gives way before it is asked for again; from host memory they come back.
    assert tiers["disk"] >= len(COPIES) - held
    assert tiers["host"] > 0
    loads = "vllm:lora_adapter_load_seconds_count"
    assert shown.value(loads, transition="load") == tiers["disk"]
    assert shown.value(loads, transition="activate") == tiers["host"]
    evicted = shown.value("vllm_vlora:evictions_total", tier="device")
    assert evicted == tiers["disk"] + tiers["host"] + held - shown.value(
        "vllm_vlora:tasks", tier="device"
    )
    assert shown.value("vllm_vlora:tasks", tier="host") > 0
    used = shown.value("vllm_vlora:bytes", tier="device")
    assert 0 < used <= shown.value("vllm_vlora:budget_bytes", tier="device") <= 401_000
    there = shown.value("vllm_vlora:tasks", tier="device")
    assert shown.value("vllm:max_gpu_lora_adapters") == there, "it is full"


def test_publications_are_counted_and_those_that_are_wrong(crowded: Server, world: World) -> None:
    first = _scrape(crowded).samples("vllm_vlora:checkpoint_info")
    path = _publish(world, COPIES[:4])
    shown = _until(crowded, lambda s: s.value("vllm_vlora:checkpoint_reloads_total") == 1)
    shown = _until(crowded, lambda s: s.value("vllm_vlora:tasks", tier="catalogue") == 4)
    (labels,) = shown.samples("vllm_vlora:checkpoint_info")
    assert dict(labels)["digest"] == Checkpoint.open(path).content_digest[:12]
    assert first.keys() != {labels}
    (path / CONFIG_FILE).write_text("{")
    name = "vllm_vlora:checkpoint_refusals_total"
    shown = _until(crowded, lambda s: s.value(name, reason="checkpoint") == 1)
    assert shown.samples("vllm_vlora:checkpoint_info").keys() == {labels}
    assert crowded.text(COPIES[0], PROMPTS[0])
