"""One vLLM engine in a process of its own, driven call by call.

The process reads its environment before it imports vLLM, since the plugin and vLLM do so once, and a
stock engine's process must never see the plugin. The driver hands calls to ``LLMEngine`` and steps it,
as ``vllm.LLM`` does, and notes when the engine core had each token.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serving.figures import Trace
from serving.loads import Job

# The module is imported by the worker alone: it needs torch.
WORKER_EXTENSION = "serving.worker.BenchExtension"
_LOG_LINES = 25
_SHUTDOWN_SECONDS = 30


class EngineFailedError(Exception):
    """An engine did not start or did not survive; the message ends with its log."""


@dataclass(frozen=True)
class EngineSpec:
    """How to start one engine.

    Attributes:
        arguments: of ``vllm.LLM``. environment: set before vLLM is imported.
        adapters: PEFT folders by task number; with ``checkpoint`` the tasks are taken from there.
        checkpoint: the folder of our checkpoint, or None.
        initialise: whether to set dummy weights.
        log: file for everything that the engine prints.
    """

    name: str
    arguments: dict[str, Any]
    environment: dict[str, str]
    adapters: list[str]
    checkpoint: str | None
    initialise: bool
    log: Path


class Engine:
    """The parent's side: starts the process, sends it jobs and waits for their results."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, spec), daemon=False)
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        self._process.start()
        child.close()
        self._receive()
        self.start_seconds = time.perf_counter() - started

    def run(self, job: Job) -> Trace:
        """Run a job to its end."""
        return self._ask("run", job)

    def call_worker(self, method: str, *args: object) -> Any:
        """Call a method of ``BenchExtension`` in the worker; the first rank's answer."""
        return self._ask("worker", method, args)

    def stop(self) -> None:
        """End the process; harmless when it has ended already."""
        if self._process.is_alive():
            with contextlib.suppress(OSError):  # It may end meanwhile.
                self._connection.send(("stop",))
        self._process.join(_SHUTDOWN_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def compiled_late(self) -> list[str]:
        """Kernels that vLLM's monitor saw compiled after the start, when requests may have waited."""
        return late_kernels(self.spec.log.read_text(errors="replace"))

    def _ask(self, *message: object) -> Any:
        try:
            self._connection.send(message)
        except OSError as error:
            raise EngineFailedError(self._explain("it is gone")) from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError as error:
            raise EngineFailedError(self._explain("its process ended")) from error
        if kind == "error":
            raise EngineFailedError(self._explain(value))
        return value

    def _explain(self, reason: str) -> str:
        lines = self.spec.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join([f"{self.spec.name}: {reason}", *lines])


def late_kernels(log: str) -> list[str]:
    """The kernels that a log says were compiled "during inference", each once."""
    return list(dict.fromkeys(re.findall(r"compilation during inference: ([\w.<>]+\w>?)", log)))


def logarithms(found: Iterable[Any]) -> list[dict[int, float]]:
    """vLLM's ``logprobs`` as plain numbers: for each token the likeliest tokens' logarithms."""
    return [{token: one.logprob for token, one in likeliest.items()} for likeliest in found]


# --- in the engine's process -----------------------------------------------------------------------


def _serve(connection: Connection, spec: EngineSpec) -> None:
    with spec.log.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(spec.environment)
    try:
        driver = _start(spec)
        connection.send(("ready", None))
        _answer(connection, driver)
    except (EOFError, BrokenPipeError):
        pass  # The parent is gone; so are we.
    except Exception as error:  # noqa: BLE001 (it goes to the parent, whatever vLLM raised)
        traceback.print_exc()
        connection.send(("error", f"{type(error).__name__}: {error}"))


def _answer(connection: Connection, driver: _Driver) -> None:
    methods: dict[str, Callable[..., Any]] = {"run": driver.run, "worker": driver.call_worker}
    while True:
        name, *args = connection.recv()
        if name == "stop":
            driver.shutdown()
            return
        connection.send(("done", methods[name](*args)))


def _start(spec: EngineSpec) -> _Driver:
    from vllm import LLM

    driver = _Driver(LLM(**spec.arguments), _lora_requests(spec))
    if spec.initialise:
        driver.call_worker("bench_initialise", ())
    return driver


class _CoreClock:
    """When the engine core had done the step whose outputs were read last, on ``time.monotonic``.

    That clock is one for all processes of a machine. A core in a process of its own, as on a GPU, goes on
    while the driver hands over requests; when its outputs are read says how fast the driver reads.
    """

    def __init__(self, core: Any) -> None:
        self.stamp = 0.0
        self._read = core.get_output
        core.get_output = self._noting

    def _noting(self) -> Any:
        outputs = self._read()
        self.stamp = outputs.timestamp
        return outputs


class _Driver:
    """Hands a job's calls to vLLM's engine and steps it."""

    def __init__(self, llm: Any, requests: list[Any]) -> None:
        self._llm, self._requests = llm, requests
        self._engine = llm.llm_engine
        self._clock = _CoreClock(self._engine.engine_core)
        self._count = 0

    def call_worker(self, method: str, args: tuple[Any, ...]) -> Any:
        return self._llm.collective_rpc(method, args=args)[0]

    def run(self, job: Job) -> Trace:
        run = _Run(self, job)
        run.drive()
        return run.trace

    def shutdown(self) -> None:
        self._engine.engine_core.shutdown()

    def submit(self, prompt: list[int], task: int | None, sampling: Any) -> str:
        """Hand over one request; returns its id."""
        self._count += 1
        lora = None if task is None else self._requests[task]
        prompt_input: Any = {"prompt_token_ids": prompt}
        name = f"bench-{self._count}"
        self._engine.add_request(name, prompt_input, sampling, lora_request=lora)
        return name

    def step(self) -> tuple[list[Any], float]:
        """The outputs of one step of the engine, and when its core had them."""
        outputs = self._engine.step()
        return outputs, self._clock.stamp


def _lora_requests(spec: EngineSpec) -> list[Any]:
    """vLLM's request for every task, by number."""
    if spec.checkpoint is not None:
        from vllm_vlora.plugin.requests import all_requests

        return all_requests(spec.checkpoint)
    from vllm.lora.request import LoRARequest

    return [LoRARequest(f"task-{n}", 1 + n, path) for n, path in enumerate(spec.adapters)]


class _Run:
    """One job under way."""

    def __init__(self, driver: _Driver, job: Job) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        count = len(job.calls)
        self._driver, self._job = driver, job
        self._sampling = SamplingParams(
            temperature=0,
            max_tokens=job.max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=job.logprobs or None,
            output_kind=RequestOutputKind.DELTA,
        )
        self._places: dict[str, int] = {}
        self._inside = self._started = 0
        self.trace = Trace(
            started=0.0,
            ended=0.0,
            submitted=[0.0] * count,
            arrivals=[[] for _ in range(count)],
            tokens=[[] for _ in range(count)],
            logprobs=[[] for _ in range(count)],
        )

    def drive(self) -> None:
        trace, profiling = self.trace, False
        waiting = deque(range(len(self._job.calls)))
        trace.started = time.monotonic()
        while waiting or self._inside:
            while waiting and self._inside < self._job.concurrency:
                self._submit(waiting.popleft())
            outputs, stamp = self._driver.step()
            for output in outputs:
                self._take(output, stamp)
            if self._job.profile and not profiling and self._started == len(self._job.calls):
                profiling = True
                self._driver.call_worker("bench_start_profile", ())
        trace.ended = time.monotonic()
        if profiling:
            trace.profile = self._driver.call_worker("bench_stop_profile", ())

    def _submit(self, place: int) -> None:
        call = self._job.calls[place]
        self.trace.submitted[place] = time.monotonic()
        self._places[self._driver.submit(call.prompt, call.task, self._sampling)] = place
        self._inside += 1

    def _take(self, output: Any, stamp: float) -> None:
        place, new = self._places[output.request_id], output.outputs[0]
        self._started += bool(new.token_ids) and not self.trace.tokens[place]
        self.trace.tokens[place] += new.token_ids
        self.trace.arrivals[place] += [stamp] * len(new.token_ids)
        if new.logprobs:
            self.trace.logprobs[place] += logarithms(new.logprobs)
        self._inside -= output.finished
