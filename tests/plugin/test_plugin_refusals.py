"""A refusal's way from the engine core to its caller: vLLM's own wire, outputs and handlers."""

from __future__ import annotations

import asyncio
import queue
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_vlora.errors import (
    BlendError,
    CheckpointError,
    CheckpointReplacedError,
    MemoryBudgetError,
    ModelMismatchError,
    TaskBusyError,
    TaskLoadError,
    TaskNotFoundError,
    VLoRAError,
)
from vllm_vlora.plugin.refusals import callers_error, raise_refusals, refusal, refuse

BUSY = TaskBusyError("2 wait already")


def over_the_wire(outputs: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    return MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs))


def test_an_engine_core_answers_the_server_that_asked() -> None:
    core = SimpleNamespace(output_queue=queue.Queue())
    lora = SimpleNamespace(lora_name="sql")
    asked = SimpleNamespace(request_id="a", client_index=3, lora_request=lora)
    refuse(core, asked, CheckpointError("/ck/tasks/sql.safetensors: it is gone"))
    client, outputs = core.output_queue.get_nowait()
    assert (client, outputs.finished_requests) == (3, {"a"})
    (end,) = over_the_wire(outputs).outputs
    assert (end.request_id, end.finished, end.new_token_ids) == ("a", True, [])
    gone = "/ck/tasks/sql.safetensors: it is gone"
    assert end.stop_reason == f"vllm-vlora: CheckpointError: task 'sql': {gone}"
    refuse(core, asked, MemoryBudgetError("no room for task 'sql'"))
    _, outputs = core.output_queue.get_nowait()
    assert outputs.outputs[0].stop_reason == "vllm-vlora: MemoryBudgetError: no room for task 'sql'"


class Frontend:
    """vLLM's own output processor with requests in it, patched."""

    def __init__(self) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        self.processor: Any = OutputProcessor(None, log_stats=False)
        self.process = raise_refusals(OutputProcessor.process_outputs)

    def send(
        self,
        name: str,
        n: int = 1,
        pooling: bool = False,
        resumable: bool = False,
        offline: bool = False,
    ) -> Any:
        from vllm import PoolingParams, SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.output_processor import RequestOutputCollector
        from vllm.v1.engine.parallel_sampling import ParentRequest

        sampling = SamplingParams(n=n, detokenize=False, output_kind=RequestOutputKind.DELTA)
        fields: dict[str, Any] = {
            "prompt_token_ids": [1, 2],
            "mm_features": None,
            "arrival_time": 0.0,
            "lora_request": None,
            "cache_salt": None,
            "data_parallel_rank": None,
        }

        def core_request(name: str, **more: Any) -> Any:
            params: dict[str, Any] = {"sampling_params": None if pooling else sampling}
            params["pooling_params"] = PoolingParams(task="embed") if pooling else None
            made = EngineCoreRequest(request_id=name, **fields, **params, resumable=resumable)
            made.external_req_id = f"external {name}"
            return made

        whole = core_request(name)
        collector = None if offline else RequestOutputCollector(sampling.output_kind, name)
        if n == 1:
            self.processor.add_request(whole, None, None, 0, collector)
            return collector
        parent = ParentRequest(whole)
        for index in range(n):
            child, _ = parent.get_child_info(index)
            self.processor.add_request(core_request(child), None, parent, index, collector)
        return collector

    def refuse(self, name: str, error: VLoRAError = BUSY) -> Any:
        sent = over_the_wire(refusal(name, error))
        return self.process(self.processor, sent.outputs)


@pytest.fixture
def frontend() -> Frontend:
    return Frontend()


@pytest.mark.parametrize("kind", [{}, {"pooling": True}, {"resumable": True}])
def test_a_refusal_is_its_callers_error_and_leaves_nothing_behind(
    frontend: Frontend, kind: dict[str, bool]
) -> None:
    refused, other = frontend.send("a", **kind), frontend.send("b")
    done = frontend.refuse("a")
    with pytest.raises(TaskBusyError, match=r"^2 wait already$"):
        asyncio.run(refused.get())
    assert other.get_nowait() is None
    assert list(frontend.processor.request_states) == ["b"]
    assert set(frontend.processor.external_req_ids) == {"external b"}
    # A session may have sent another piece, which the engine core took for a new request.
    assert done.reqs_to_abort == ["a"]
    # One that was given up meanwhile is nobody's any more.
    assert frontend.refuse("a").reqs_to_abort == []


def test_a_session_that_is_refused_sends_no_more(frontend: Frontend) -> None:
    async def session() -> None:
        collector = frontend.send("a", resumable=True)
        collector._input_stream_task = task = asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0)
        frontend.refuse("a")
        await asyncio.sleep(0)
        assert task.cancelled() or task.cancelling()

    asyncio.run(session())


def test_of_several_answers_to_one_request_all_end(frontend: Frontend) -> None:
    collector = frontend.send("a", n=3)
    children = list(frontend.processor.request_states)
    assert len(children) == 3
    done = frontend.refuse(children[1])
    assert set(done.reqs_to_abort) >= {children[0], children[2]}
    assert not frontend.processor.request_states
    with pytest.raises(TaskBusyError):
        collector.get_nowait()


def test_other_ends_are_vllms_own(frontend: Frontend) -> None:
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    collector = frontend.send("a")
    end = EngineCoreOutput("a", [], finish_reason=FinishReason.STOP, stop_reason="vllm-vlora: x")
    frontend.process(frontend.processor, [end])
    assert collector.get_nowait().finished


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("/ck: a: b is damaged: make it again"),
        TaskNotFoundError("no such task"),
        MemoryBudgetError("no room"),
    ],
)
def test_its_caller_gets_the_error_that_the_engine_core_had(
    frontend: Frontend, error: VLoRAError, pooling: bool
) -> None:
    refused, other = frontend.send("a", pooling=pooling), frontend.send("b", pooling=pooling)
    frontend.refuse("a", error)
    with pytest.raises(type(error)) as caught:
        refused.get_nowait()
    assert str(caught.value) == str(error)
    assert other.get_nowait() is None


def test_an_error_of_a_class_that_is_not_known_by_name_is_its_nearest_one(
    frontend: Frontend,
) -> None:
    class Own(CheckpointReplacedError):
        """Some class made on the way."""

    refused = frontend.send("a")
    frontend.refuse("a", Own("replaced"))
    with pytest.raises(CheckpointReplacedError, match="replaced"):
        refused.get_nowait()


def test_the_offline_engine_tells_its_caller_too(frontend: Frontend) -> None:
    """An end that is an error would fail an assertion in vLLM where it is no text's."""
    frontend.send("a", offline=True, pooling=True)
    frontend.send("b", offline=True)
    frontend.send("c", offline=True)
    with pytest.raises(CheckpointError, match="damaged"):
        frontend.refuse("a", CheckpointError("damaged"))
    (ended,) = frontend.refuse("b", CheckpointError("damaged")).request_outputs
    (answer,) = ended.outputs
    assert (ended.finished, answer.finish_reason) == (True, "error")
    assert answer.stop_reason == "vllm-vlora: CheckpointError: damaged"
    assert list(frontend.processor.request_states) == ["c"]


# --- statuses -------------------------------------------------------------------------------------

STATUSES = {
    TaskBusyError: (429, "Too Many Requests"),
    CheckpointError: (503, "Service Unavailable"),
    CheckpointReplacedError: (503, "Service Unavailable"),
    TaskLoadError: (503, "Service Unavailable"),
    MemoryBudgetError: (400, "Bad Request"),
    ModelMismatchError: (400, "Bad Request"),
    BlendError: (400, "Bad Request"),
}


@pytest.mark.parametrize("kind", STATUSES)
def test_every_reason_has_its_status_wherever_vllm_answers_it(kind: type[VLoRAError]) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.exceptions import VLLMError

    error = callers_error(kind, "2 requests of 'sql' wait already")
    assert isinstance(error, kind)
    assert isinstance(error, VLLMError), "vLLM passes those on as they are"
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    init_exception_handler(app)

    @app.get("/")
    async def answer() -> None:
        raise error

    answered = TestClient(app).get("/")
    status, phrase = STATUSES[kind]
    assert answered.status_code == status
    found = answered.json()["error"]
    assert (found["code"], found["message"]) == (status, "2 requests of 'sql' wait already")
    assert found["type"] == phrase


@pytest.mark.parametrize("kind", STATUSES)
def test_before_vllm_has_such_errors_its_web_framework_answers(
    kind: type[VLoRAError], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.exceptions
    from fastapi import HTTPException

    monkeypatch.delattr(vllm.exceptions, "GracefulHTTPError", raising=False)
    error = callers_error(kind, "why")
    assert isinstance(error, (kind, vllm.exceptions.VLLMClientError))
    assert isinstance(error, HTTPException)
    assert (error.status_code, error.detail, str(error)) == (STATUSES[kind][0], "why", "why")
