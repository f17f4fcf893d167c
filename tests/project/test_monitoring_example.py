"""``examples/monitoring`` asks for what a server has: names and labels of the collector's own output."""

from __future__ import annotations

import itertools
import re

import pytest
import yaml
from dashboards import FOLDER, names_in, panels, problems, queries
from scrapes import Scrape, busy_counters, scrape_of

from vllm_vlora.blend_names import task_alone
from vllm_vlora.blending.text_router import Pick
from vllm_vlora.plugin.metrics import FAMILIES, TaskMetrics
from vllm_vlora.plugin.prompt_routing import RoutingMetrics

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry

QUERIES = list(queries())
# vLLM's own, which tests/engine/test_monitoring.py looks up in the real server.
OF_VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
}


@pytest.fixture(scope="module")
def scrape() -> Scrape:
    shown = TaskMetrics()
    shown.model_name = "base"
    shown.update(0, busy_counters().snapshot())
    routed = CollectorRegistry()
    RoutingMetrics(routed).count("task", Pick(task_alone("sql"), 0.9))
    return scrape_of(shown, routed)


@pytest.mark.parametrize(("where", "query"), QUERIES)
def test_every_query_names_what_is_there(where: str, query: str, scrape: Scrape) -> None:
    if not names_in(query) <= OF_VLLM:
        missing = [
            p for p in problems(query, scrape) if p.removeprefix("no metric ") not in OF_VLLM
        ]
        assert not missing, where


@pytest.mark.parametrize(
    "query",
    [
        "sum(vllm_vlora:nothing)",
        'sum(vllm_vlora:tasks{teir="device"})',
        "sum by (task) (vllm_vlora:tasks)",
        "sum(vllm_vlora:tasks{tier=~device})",
        "sum(vllm_vlora:tasks",
        "rate(vllm_vlora:requests[5m])",
    ],
)
def test_a_query_that_would_show_nothing_is_found(query: str, scrape: Scrape) -> None:
    assert problems(query, scrape)


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    asked = {name for _, query in QUERIES for name in names_in(query)}
    for family in FAMILIES:
        assert family.name + ("_total" if family.counts else "") in asked
    routing = {"routed_requests_total", "routed_task_requests_total", "route_confidence_bucket"}
    assert {"vllm:lora_adapter_load_seconds_bucket", *(f"vllm_vlora:{n}" for n in routing)} <= asked


def test_the_dashboard_can_be_loaded_anywhere() -> None:
    shown = panels()
    assert len({panel["id"] for panel in shown}) == len(shown)
    for panel in shown:
        if panel["type"] != "row":
            sources = [panel["datasource"], *(t["datasource"] for t in panel["targets"])]
            assert {source["uid"] for source in sources} == {"${datasource}"}
            assert panel["targets"]
    for one, other in itertools.combinations((panel["gridPos"] for panel in shown), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_prometheus_reads_the_route_and_the_alerts() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"] == ["localhost:8000"]
    for name in config["rule_files"]:
        assert yaml.safe_load((FOLDER / name).read_text())["groups"]


def test_states_are_counted_within_a_job_and_model() -> None:
    """Groups of servers of other checkpoints, or of other models, serve different states by design."""
    asking = {where: query for where, query in QUERIES if "checkpoint_info" in query}
    assert set(asking) == {"ServersOfDifferentStates", "States of the checkpoint"}
    for where, query in asking.items():
        grouped = [set(inside.split(", ")) for inside in re.findall(r"by \(([^)]*)\)", query)]
        assert grouped == [{"job", "model_name"}, {"job", "model_name", "digest"}], where
