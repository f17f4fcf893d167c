"""vLLM's own loop of an engine core that is told to end while requests wait for their tasks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from real_scheduler import a_model, a_request, a_scheduler
from residency_world import Executor, Workers, path_of
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequestType, FinishReason
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.outputs import ModelRunnerOutput

from vllm_vlora.plugin.engine_core import (
    advance_after_abort,
    finish_who_waits,
    load_before_add_request,
    work_while_some_wait,
)


class Model(Executor):
    """Workers whose every token is 5."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        names = list(scheduler_output.num_scheduled_tokens)
        done: Future[Any] = Future()
        done.set_result(
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: row for row, name in enumerate(names)},
                sampled_token_ids=[[5]] * len(names),
            )
        )
        return done


class Core(EngineCoreProc):
    """vLLM's own, with what the plugin puts there; nothing of it is made but what its loop needs."""

    add_request = load_before_add_request(EngineCoreProc.add_request)
    abort_requests = advance_after_abort(EngineCoreProc.abort_requests)
    has_work = work_while_some_wait(EngineCoreProc.has_work)

    def __init__(self, scheduler: Any) -> None:
        self.workers = Workers([10], {"a": [4], "b": [4]})
        manager = SimpleNamespace(
            held_paths=dict,
            bring=lambda *args: self.workers.bring_to(0, *args),
            forget=lambda path, wholly: self.workers.forget(path, wholly),
        )
        self.scheduler, self.model_executor = scheduler, Model([manager])
        self.vllm_config = scheduler.vllm_config
        self.input_queue, self.output_queue = queue.Queue(), queue.Queue()
        self.aborts_queue = queue.Queue()
        self.shutdown_state = EngineShutdownState.RUNNING
        self._idle_state_callbacks: list[Any] = []
        self.process_input_queue_block = True
        self.engines_running = self.publish_dp_lb_stats = self.enable_fault_tolerance = False
        self.batch_queue = None
        self.step_fn = self.step
        self.use_spec_decode = self.async_scheduling = self.is_mm_encoder_only = False
        self.check_for_draft_tokens = self.log_stats = False
        self.prefill_schedule_interval, self._weight_version = 1, None

    def ends(self) -> dict[str, tuple[int, Any]]:
        """Request -> tokens and why it ended."""
        found: dict[str, tuple[int, Any]] = {}
        while not self.output_queue.empty():
            _, outputs = self.output_queue.get_nowait()
            for one in outputs.outputs:
                tokens, _ = found.get(one.request_id, (0, None))
                found[one.request_id] = tokens + len(one.new_token_ids), one.finish_reason
        return found


REQUESTS = {"1": "a", "2": "b", "3": "a", "4": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return a_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def core(model: str) -> Core:
    """One to which requests have been sent, of which all but one wait for their task."""

    class Patched(Scheduler):
        finish_requests = finish_who_waits(Scheduler.finish_requests, Scheduler.add_request)

    core = Core(a_scheduler(Patched, model))
    for name, task in REQUESTS.items():
        request = a_request(name, task, answer=3, path=path_of(task) if task else "")
        core.input_queue.put((EngineCoreRequestType.ADD, (request, 0)))
    return core


def _run(core: Core, then: Callable[[], None] = lambda: None) -> None:
    """The loop, until it has ended; once the request that does not wait is answered, ``then``."""

    def told() -> None:
        while core.output_queue.qsize() < 3:
            time.sleep(0.01)
        then()
        core.shutdown_state = EngineShutdownState.REQUESTED
        core.input_queue.put((EngineCoreRequestType.WAKEUP, None))

    thread = threading.Thread(target=told, daemon=True)
    thread.start()
    with pytest.raises(SystemExit):
        core.run_busy_loop()
    thread.join()


def test_who_waits_is_served_before_the_end(core: Core) -> None:
    core.vllm_config.shutdown_timeout = 10
    later = threading.Timer(0.3, core.workers.stage, ["a", "b"])
    _run(core, later.start)
    assert core.ends() == dict.fromkeys(REQUESTS, (3, FinishReason.LENGTH))
    assert core.shutdown_state == EngineShutdownState.SHUTTING_DOWN


def test_a_task_that_cannot_be_loaded_does_not_keep_it_from_ending(core: Core) -> None:
    core.vllm_config.shutdown_timeout = 10
    core.workers.broken.add("a")
    later = threading.Timer(0.3, core.workers.stage, ["a", "b"])
    _run(core, later.start)
    ends = core.ends()
    assert ends["2"] == ends["4"] == (3, FinishReason.LENGTH)
    assert ends["1"] == ends["3"] == (0, FinishReason.ERROR)


def test_without_time_to_end_who_waits_is_told(core: Core) -> None:
    _run(core)
    assert core.ends() == {
        "4": (3, FinishReason.LENGTH),
        **dict.fromkeys(["1", "2", "3"], (0, FinishReason.ABORT)),
    }
    assert core.workers.on == [set()]


def test_a_pause_that_aborts_ends_who_waits_too(core: Core) -> None:
    def pause() -> None:
        call = (3, 1, "pause_scheduler", ["abort", False])
        core.input_queue.put((EngineCoreRequestType.UTILITY, call))
        core.workers.stage("a", "b")

    _run(core, pause)
    assert {name for name, (_, why) in core.ends().items() if why == FinishReason.ABORT} == {
        "1", "2", "3"
    }  # fmt: skip


def test_a_client_that_hangs_up_is_sent_nothing(core: Core) -> None:
    def hang_up() -> None:
        core.input_queue.put((EngineCoreRequestType.ABORT, ["1"]))
        core.workers.stage("a", "b")

    core.vllm_config.shutdown_timeout = 10
    _run(core, hang_up)
    assert core.ends() == dict.fromkeys(["2", "3", "4"], (3, FinishReason.LENGTH))
