"""The gauge of running adapters, which has a label for each combination of names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from vllm_vlora.plugin import combinations
from vllm_vlora.plugin.combinations import NewestCombinations, keep_newest

NAMES = "max_lora", "waiting_lora_adapters", "running_lora_adapters"


class Logger:
    """Sets the gauge as vLLM's does."""

    _kind: Any = Gauge

    def __init__(self, registry: CollectorRegistry) -> None:
        self.labelname_max_lora, self.labelname_waiting_lora_adapters, running = NAMES
        self.labelname_running_lora_adapters = running
        self.gauge_lora_info: Any = self._kind(
            "lora_requests_info", "Running.", NAMES, registry=registry
        )

    __init__ = keep_newest(__init__)  # type: ignore[assignment]

    def record(self, running: str) -> None:
        labels = dict(zip(reversed(NAMES), (running, "", 4)))
        self.gauge_lora_info.labels(**labels).set_to_current_time()


def series(registry: CollectorRegistry) -> list[str]:
    """The names that run, by the time when they were seen last."""
    samples = [s for metric in registry.collect() for s in metric.samples]
    return [s.labels[NAMES[2]] for s in sorted(samples, key=lambda sample: sample.value)]


def test_the_newest_combinations_stay_and_no_others() -> None:
    registry = CollectorRegistry()
    logger = Logger(registry)
    for number in range(1000):
        logger.record(f"task-{number}")
        logger.record("always")
    kept = series(registry)
    assert len(kept) == combinations._KEPT
    assert kept[-2:] == ["task-999", "always"]
    # One that comes back is there again.
    logger.record("task-3")
    assert series(registry)[-1] == "task-3"
    assert len(series(registry)) == combinations._KEPT
    assert b'waiting_lora_adapters=""' in generate_latest(registry)


def test_of_files_that_processes_share_nothing_is_removed_and_they_stay_small() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("lora_requests_info", "Running.", NAMES, registry=registry)
    shown = NewestCombinations(gauge, NAMES, shared=True)
    for number in range(1000):
        shown.labels(**dict(zip(NAMES, (4, "", f"task-{number}")))).set_to_current_time()
    names = series(registry)
    assert len(names) == combinations._MOST_SHARED + 1
    assert names[-1] == "other"
    shown.labels(**dict(zip(NAMES, (4, "", "task-7")))).set_to_current_time()
    assert series(registry)[-1] == "task-7"


def test_another_kind_of_gauge_and_none_are_left_as_they_are() -> None:
    class Other(Logger):
        _kind = staticmethod(lambda *_args, **_options: SimpleNamespace(kind="Ray's"))

    class Without(Logger):
        _kind = staticmethod(lambda *_args, **_options: None)

    assert Other(CollectorRegistry()).gauge_lora_info.kind == "Ray's"
    assert Without(CollectorRegistry()).gauge_lora_info is None


def test_vllm_s_own_logger_has_what_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that the wrapper reads off it, and how it sets its gauge."""
    import inspect

    from vllm.v1.metrics.loggers import PrometheusStatLogger

    source = inspect.getsource(PrometheusStatLogger)
    for name in ("gauge_lora_info", *(f"labelname_{n}" for n in ("max_lora", *NAMES[1:]))):
        assert f"self.{name}" in source
    assert "self.gauge_lora_info.labels(**lora_info_labels).set_to_current_time()" in source
