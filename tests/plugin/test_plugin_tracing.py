"""A request's task in its span: vLLM's own tracing, with OpenTelemetry's SDK behind it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_vlora.plugin.tracing import add_task, say_task

DIGEST = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def exported() -> Any:
    pytest.importorskip("vllm")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def _traced(monkeypatch: pytest.MonkeyPatch, exported: Any, lora: Any) -> dict[str, Any]:
    """The attributes of the span that vLLM makes of a finished request."""
    from vllm.v1.engine import output_processor

    monkeypatch.setattr(
        output_processor, "instrument_manual", add_task(output_processor.instrument_manual)
    )
    times = ("arrival_time", "scheduled_ts", "queued_ts", "first_token_ts", "last_token_ts")
    stats = SimpleNamespace(**dict.fromkeys(times, 1.0), first_token_latency=0.1,
                            num_generation_tokens=3)  # fmt: skip
    state = SimpleNamespace(
        stats=stats, prompt_token_ids=[1, 2], prompt_embeds=None, external_req_id="r", top_p=None,
        max_tokens_param=None, temperature=None, n=None, lora_request=lora,
    )  # fmt: skip
    exported.clear()
    say_task(output_processor.OutputProcessor.do_tracing)(
        object(),
        SimpleNamespace(trace_headers=None),
        state,
        SimpleNamespace(iteration_timestamp=2.0),
    )
    (span,) = exported.get_finished_spans()
    return dict(span.attributes)


def test_a_tasks_request_has_its_name_and_its_contents_digest(
    monkeypatch: pytest.MonkeyPatch, exported: Any
) -> None:
    lora = SimpleNamespace(lora_name="sql", lora_path=f"/c/tasks/0.safetensors@{DIGEST}")
    found = _traced(monkeypatch, exported, lora)
    assert found["vllm_vlora.task"] == "sql"
    assert found["vllm_vlora.task_digest"] == DIGEST
    assert found["gen_ai.usage.completion_tokens"] == 3


@pytest.mark.parametrize("lora", [None, SimpleNamespace(lora_name="sql", lora_path="/adapter")])
def test_others_have_what_vllm_gives_them(
    monkeypatch: pytest.MonkeyPatch, exported: Any, lora: Any
) -> None:
    found = _traced(monkeypatch, exported, lora)
    assert not [key for key in found if key.startswith("vllm_vlora")]
    assert found["gen_ai.usage.completion_tokens"] == 3
