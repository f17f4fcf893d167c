"""``/v1/vlora/tasks`` through vLLM's own loader of endpoint plugins and a real FastAPI application."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from entry_points import declare_entry_points
from scrapes import busy_counters

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_vlora.blend_names import task_alone
from vllm_vlora.checkpoint.aliases import Route
from vllm_vlora.plugin import task_routes
from vllm_vlora.plugin.counters import DEVICE, REMOTE, ServingCounters
from vllm_vlora.plugin.metrics import TaskMetrics
from vllm_vlora.plugin.named_requests import TaskRequests

DIGEST = "0123456789abcdef" * 2


def lora(path: str) -> Any:
    return SimpleNamespace(lora_path=path, lora_int_id=1)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> TaskMetrics:
    found = TaskMetrics()
    monkeypatch.setattr(task_routes, "METRICS", found)
    return found


@pytest.fixture
def app(ours: TaskMetrics) -> FastAPI:
    app = FastAPI()
    task_routes.TaskRoutes().attach_router(app)
    names = [*(f"t{i:03}" for i in range(250)), "sql", "french", "ä/ö"]
    requests = {name: lora(f"/c/tasks/{i}.safetensors@{DIGEST}") for i, name in enumerate(names)}
    requests["ordinary"] = lora("/somewhere/else")
    app.state.openai_serving_models = SimpleNamespace(lora_requests=requests)
    return app


def _get(app: FastAPI, **query: Any) -> Any:
    answer = TestClient(app).get(task_routes.ROUTE, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("limit", [1, 7, 253, 1000])
def test_the_pages_together_are_every_task_once(app: FastAPI, limit: int) -> None:
    found: list[str] = []
    after = ""
    for pages in itertools.count(1):
        page = _get(app, limit=limit, after=after)
        assert page["object"] == "list"
        assert len(page["data"]) <= limit
        found += [task["id"] for task in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
        assert after == page["data"][-1]["id"]
        if pages == 2:  # One that is gone when the next page is asked for moves no other.
            del app.state.openai_serving_models.lora_requests[after]
    assert found == sorted(found)
    assert len(found) == len(set(found)) == 253
    assert "ordinary" not in found


def test_a_task_on_a_device_says_how_it_runs_and_why(app: FastAPI, ours: TaskMetrics) -> None:
    counters = ServingCounters(1, 9)
    counters.set_tier(DEVICE, 2, ["sql", "french"])
    counters.set_materialized({"french": "it adapts lm_head"})
    ours.update(0, counters.snapshot())
    # Nothing came or went since: not sent again, and not forgotten.
    ours.update(0, counters.snapshot(ours.seen(0)))
    page = {task["id"]: (task["runs"], task["why"]) for task in _get(app, limit=1000)["data"]}
    assert page["sql"] == ("direct", None)
    assert page["french"] == ("materialized", "it adapts lm_head")
    assert page["t000"] == (None, None)
    counters.set_materialized({})
    ours.update(0, counters.snapshot(ours.seen(0)))
    page = {task["id"]: task["runs"] for task in _get(app, limit=1000)["data"]}
    assert page["french"] == "direct"


def test_a_task_has_its_digest_and_tier(app: FastAPI, ours: TaskMetrics) -> None:
    def first(name: str) -> Any:
        page = _get(app, limit=1000)
        return next(task for task in page["data"] if task["id"] == name)

    assert first("sql") == {
        "id": "sql", "object": "vlora.task", "digest": DIGEST, "tier": None, "runs": None, "why": None
    }  # fmt: skip
    ours.update(0, busy_counters().snapshot())
    assert [first(name)["tier"] for name in ("sql", "french", "t000")] == ["device", "host", "disk"]
    # Some are on no disk: whoever is not named may be one of them.
    far = busy_counters()
    far.set_tier(REMOTE, 3)
    ours.update(0, far.snapshot())
    assert [first(name)["tier"] for name in ("sql", "t000")] == ["device", None]
    ours.update(0, busy_counters().snapshot())
    crowded = ServingCounters(1, 1)
    crowded.set_tier(DEVICE, 2, ["t000", "t001"])
    ours.update(1, crowded.snapshot())
    # More are on a device than are named: whoever is not may be one of them.
    assert [first(name)["tier"] for name in ("t000", "t001")] == ["device", None]


def test_ten_thousand_names_of_every_kind_are_paged(app: FastAPI) -> None:
    """Whatever a name has that means something in a URL: the last of a page is where the next begins."""
    kinds = ["a/b", "../x", "100%", "%2F", "a&after=b", "a=b", "a#b", "a?limit=1", "a+b", "a b"]
    kinds += [
        "ä",
        "日本語",
        "😀",
        "e\u0301",
        "\u00e9",
        "\u202e",
        '"',
        "\\",
        "<b>",
        "sql*0.5+french",
        "~",
    ]
    names = [*kinds, *(f"{kind}{i}" for i in range(476) for kind in kinds)]
    random.Random(0).shuffle(names)
    requests = {name: lora(f"/c/tasks/{i}.safetensors@{DIGEST}") for i, name in enumerate(names)}
    app.state.openai_serving_models.lora_requests = TaskRequests(requests, {})
    client, found, more = TestClient(app), [], True
    while more:
        query = {"limit": 1000, "after": found[-1] if found else ""}
        page = client.get(task_routes.ROUTE, params=query).json()
        found += [task["id"] for task in page["data"]]
        more = page["has_more"]
    assert len(found) > 10_000
    assert found == sorted(names)
    # And each alone, as the one behind the one before it.
    for i in random.Random(1).sample(range(1, len(found)), 50):
        assert [t["id"] for t in _get(app, limit=1, after=found[i - 1])["data"]] == [found[i]]


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "many", "", "1.5", "1e3", "9" * 5000])
def test_a_page_has_its_bounds(app: FastAPI, limit: str) -> None:
    assert TestClient(app).get(task_routes.ROUTE, params={"limit": limit}).status_code == 422


def test_a_server_without_models_lists_none() -> None:
    app = FastAPI()
    task_routes.TaskRoutes().attach_router(app)
    assert _get(app)["data"] == []


def _own(names: list[str]) -> TaskRequests:
    return TaskRequests(
        {name: lora(f"/c/tasks/{name}.safetensors@{DIGEST}") for name in names},
        {
            "alias": (Route(1, task_alone("a")),),
            "canary": (Route(1, task_alone("a")), Route(1, task_alone("b"))),
        },
    )


def test_aliases_are_no_tasks(app: FastAPI) -> None:
    app.state.openai_serving_models.lora_requests = _own(["a", "b"])
    assert [task["id"] for task in _get(app)["data"]] == ["a", "b"]


def test_tasks_that_come_and_go_meanwhile_disturb_no_page(app: FastAPI) -> None:
    requests = _own(["a", "b", *map(str, range(2000))])
    app.state.openai_serving_models.lora_requests = requests
    ended = threading.Event()

    def publish() -> None:
        new = lora(f"/c/tasks/new.safetensors@{DIGEST}")
        while not ended.is_set():
            requests["new"] = new
            del requests["new"]

    publisher = threading.Thread(target=publish)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    publisher.start()
    try:
        for _ in range(20):
            page = task_routes.list_tasks(SimpleNamespace(app=app), limit=1000, after="0")
            assert len(page["data"]) == 1000
    finally:
        sys.setswitchinterval(before)
        ended.set()
        publisher.join()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(declare_entry_points(tmp_path)))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("named", "loaded"), [(None, []), ("vlora", []), ("vlora,vlora_tasks", ["vlora_tasks"])]
)
def test_vllm_loads_it_only_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch, named: str | None, loaded: list[str]
) -> None:
    from vllm.plugins import load_endpoint_plugins
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    found = load_endpoint_plugins(("generate",))
    assert [plugin.name for plugin in found] == loaded
    assert all(isinstance(plugin, EndpointPlugin) for plugin in found)
