"""The real server's ``/metrics``, with one API server and with two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from engine_server import FORKED, Server
from engine_world import ADAPTERS, PROMPTS, World, exact
from scrapes import Scrape

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


@pytest.fixture(scope="module", params=[1, 2], ids=["one API server", "two API servers"])
def server(
    world: World, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    checkpoint = exact(world, "private")
    server = Server(
        world,
        world.root / f"server-{request.param}.log",
        checkpoint,
        FORKED if request.param == 1 else FILES + FORKED,
        options=("--api-server-count", str(request.param)),
        VLLM_VLORA_METRICS_TASKS="2",
        FILES=str(tmp_path_factory.mktemp("files")),
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
