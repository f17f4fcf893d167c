"""A request that the engine core refuses becomes its caller's error, with the reason and an HTTP status.

The engine core alone knows why, and must live on. A refusal travels as other ends of requests do, to the
API server that sent the request, which raises it there for its caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import vllm.exceptions
from vllm.exceptions import VLLMClientError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from vllm_vlora import errors
from vllm_vlora.errors import CheckpointError, TaskBusyError, TaskLoadError, VLoRAError

_REFUSED = "vllm-vlora: "
# What the server may get over, as far as its caller can tell; every other reason stays one.
_STATUSES: tuple[tuple[type[VLoRAError], HTTPStatus], ...] = (
    (TaskBusyError, HTTPStatus.TOO_MANY_REQUESTS),
    (CheckpointError, HTTPStatus.SERVICE_UNAVAILABLE),
    (TaskLoadError, HTTPStatus.SERVICE_UNAVAILABLE),
)


# --- the engine core ------------------------------------------------------------------------------


def refuse(core: Any, request: Any, error: VLoRAError) -> None:
    """End a request for a task with an error, in an engine core with a process of its own."""
    task = repr(request.lora_request.lora_name)
    if task not in str(error):
        # vLLM takes paths out of what it answers, and with them the task.
        error = _kind_of(error)(f"task {task}: {error}")
    core.output_queue.put_nowait((request.client_index, refusal(request.request_id, error)))


def refusal(request_id: str, error: VLoRAError) -> EngineCoreOutputs:
    """What an engine core sends for a request that is refused, alone."""
    end = EngineCoreOutput(
        request_id=request_id,
        new_token_ids=[],
        finish_reason=FinishReason.ERROR,
        stop_reason=f"{_REFUSED}{_kind_of(error).__name__}: {error}",
    )
    return EngineCoreOutputs(outputs=[end], finished_requests={request_id})


def _kind_of(error: VLoRAError) -> type[VLoRAError]:
    """The class of ours that an error is, which its receiver knows by name."""
    kinds = type(error).__mro__
    return next(kind for kind in kinds if getattr(errors, kind.__name__, None) is kind)


# --- the API server -------------------------------------------------------------------------------


def raise_refusals(original: Callable[..., Any]) -> Callable[..., Any]:
    """``OutputProcessor.process_outputs`` that hands a refusal to its caller as an error."""

    @functools.wraps(original)
    def process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        # A refusal comes alone.
        if len(engine_core_outputs) != 1 or not is_refusal(engine_core_outputs[0]):
            return original(self, engine_core_outputs, *args, **kwargs)
        (refused,) = engine_core_outputs
        state = self.request_states.get(refused.request_id)
        # The offline engine's callers have no queue each; they read why a text ended in its output.
        offline = state is not None and state.queue is None
        if state is None or (offline and state.detokenizer is not None):
            return original(self, engine_core_outputs, *args, **kwargs)
        # What came with it under one request, and pieces of a session that were sent meanwhile.
        whole = state.parent_req.request_id if state.parent_req else refused.request_id
        error = _error_of(refused)
        if offline:
            self.abort_requests([whole], internal=True)
            raise error
        state.queue.close()
        others = self.abort_requests([whole], internal=True)
        state.queue.put(error)
        done = original(self, [], *args, **kwargs)
        done.reqs_to_abort.extend(others)
        return done

    return process_outputs


def is_refusal(output: Any) -> bool:
    """Whether the end of a request is a refusal."""
    return (
        output.finish_reason == FinishReason.ERROR
        and isinstance(output.stop_reason, str)
        and output.stop_reason.startswith(_REFUSED)
    )


def _error_of(output: Any) -> Exception:
    name, _, message = output.stop_reason.removeprefix(_REFUSED).partition(": ")
    return callers_error(getattr(errors, name), message)


def callers_error(kind: type[VLoRAError], message: str) -> Exception:
    """An error of a class of ours that vLLM passes on as it is and answers with a status.

    429 where too many wait, 503 where a task cannot be read, and 400 for what asking again will not
    mend: a task that is too large or does not fit the model, a blend that cannot be made.
    """
    status = next((found for of, found in _STATUSES if issubclass(kind, of)), None)
    status = status or HTTPStatus.BAD_REQUEST
    # Some classes of ours are built-in errors too, which make themselves otherwise.
    graceful = getattr(vllm.exceptions, "GracefulHTTPError", None)
    if graceful is not None:
        made = type(kind.__name__, (kind, graceful), {"__init__": graceful.__init__})
        return made(message, status)
    # vLLM before 0.30 has no such error, but its web framework.
    from fastapi import HTTPException

    bases = (kind, HTTPException, VLLMClientError)
    error: Exception = type(kind.__name__, bases, {"__init__": HTTPException.__init__})(
        status.value, message
    )
    error.args = (message,)
    return error
