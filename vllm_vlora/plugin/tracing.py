"""The task of a request in its OpenTelemetry span, where vLLM is started with ``--otlp-traces-endpoint``.

vLLM gathers a request's attributes and hands them to its tracing in one function, which sees all of the
request but has no place for more; what it calls has the place and not the request. So the one says which
task it is, and the other adds it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm_vlora.plugin.identity import parse_task_path

TASK_ATTRIBUTE = "vllm_vlora.task"
DIGEST_ATTRIBUTE = "vllm_vlora.task_digest"
"""The digest of the task's content: it tells two states of one task apart."""

_attributes: ContextVar[dict[str, str]] = ContextVar("vlora_span_attributes")


def say_task(original: Callable[..., Any]) -> Callable[..., Any]:
    """``OutputProcessor.do_tracing`` that says which task its request is of."""

    @functools.wraps(original)
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> Any:
        said = _attributes.set(_of(req_state.lora_request))
        try:
            return original(self, engine_core_output, req_state, iteration_stats)
        finally:
            _attributes.reset(said)

    return do_tracing


def add_task(original: Callable[..., Any]) -> Callable[..., Any]:
    """``instrument_manual`` whose span has what ``say_task`` said."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def instrument(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments.get("attributes") or {}
        bound.arguments["attributes"] = {**given, **_attributes.get({})}
        return original(*bound.args, **bound.kwargs)

    return instrument


def _of(lora_request: Any) -> dict[str, str]:
    path = None if lora_request is None else parse_task_path(lora_request.lora_path)
    if path is None:
        return {}
    return {TASK_ATTRIBUTE: lora_request.lora_name, DIGEST_ATTRIBUTE: path.digest}
