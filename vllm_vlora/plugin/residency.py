"""Tasks that come after start-up stay within their budget; the engine core decides which are held.

Such a task is loaded by the workers before its first request enters the scheduler, never inside a step,
where what fails ends the engine. It stays while a request asks for it. When the next one would take more
than ``VLLM_VLORA_LATE_MIB`` on any device, the least recently asked for that no request needs give way,
and where that is not enough the load is an error of the request's. An engine core sees every load and
every request, in their order, whatever number of API servers asks; workers and API servers do not.

The bytes are kept out of the KV cache: what vLLM finds available for it is lessened by them.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_vlora.errors import CheckpointError, MemoryBudgetError, VLoRAError
from vllm_vlora.plugin.counters import DEVICE, DISK, ServingCounters, counters_of
from vllm_vlora.plugin.identity import TaskPath, parse_task_path
from vllm_vlora.plugin.settings import LATE_VARIABLE

TASKS_METHOD = "vlora_tasks_at_start"
"""The name under which an engine core answers ``ask_for_tasks``."""
_CHANGED = (
    "VLLM_VLORA_CHECKPOINT was published again while the engine started, and its workers do not hold the "
    "same state of it; start it again"
)


class Held(NamedTuple):
    """What a worker says when it was told to hold a task.

    Attributes:
        late: it was not loaded at start-up.
        over: bytes by which all such tasks are above the budget with it.
        error: why it could not be loaded; the worker then holds nothing of it.
    """

    late: bool
    over: int = 0
    error: VLoRAError | None = None


class Residency:
    """Which tasks the workers of one engine core hold.

    Args:
        hold: tells every worker to hold a request's task.
        forget: tells every worker to let go of a path.
        in_use: the paths that requests in the engine ask for.
        counters: what is loaded, gives way and is refused is counted there.
    """

    def __init__(
        self,
        hold: Callable[[Any], list[Held]],
        forget: Callable[[str], object],
        in_use: Callable[[], set[str]],
        counters: ServingCounters | None = None,
    ) -> None:
        self._hold, self._forget, self._in_use = hold, forget, in_use
        self._counters = counters or ServingCounters(0, 0)
        self._preloaded: set[str] = set()
        # The name of each; by last use, the most recent one last.
        self._late: OrderedDict[str, str] = OrderedDict()

    def late_names(self) -> list[str]:
        """The tasks that came after start-up and are held, last used first."""
        return list(reversed(self._late.values()))

    def holds(self, path: str) -> bool:
        """Whether a task that was asked for before is still held."""
        return path in self._preloaded or path in self._late

    def ensure(self, request: Any) -> None:
        """Have a request's task held by every worker.

        Raises:
            MemoryBudgetError: not even with every task gone that no request needs.
            VLoRAError: it cannot be loaded.
        """
        path = request.lora_path
        if path in self._preloaded:
            return
        if path in self._late:
            self._late.move_to_end(path)
            return
        started = time.perf_counter()
        try:
            late = self._make_room_for(request)
        except BaseException as error:
            self._forget(path)
            self._counters.refused(error)
            raise
        if late:
            self._late[path] = request.lora_name
            self._counters.loaded(DISK, time.perf_counter() - started)
        else:
            self._preloaded.add(path)

    def _make_room_for(self, request: Any) -> bool:
        """Whether the task is a late one; loaded either way."""
        idle: list[str] | None = None
        while True:
            answers = self._hold(request)
            error = next((answer.error for answer in answers if answer.error), None)
            if error is not None:
                raise error
            over = max(answer.over for answer in answers)
            if over <= 0:
                return any(answer.late for answer in answers)
            if idle is None:
                used = self._in_use()
                idle = [path for path in reversed(self._late) if path not in used]
            if not idle:
                raise MemoryBudgetError(
                    f"no room for task {request.lora_name!r} beside the tasks that requests in flight "
                    f"use: tasks loaded after start-up may take {LATE_VARIABLE} on each device; ask "
                    "again later, set that higher, or put the task into the checkpoint that the "
                    "engine starts with"
                )
            victim = idle.pop()
            self._forget(victim)
            del self._late[victim]
            self._counters.evicted()


# --- the engine core -------------------------------------------------------------------------------


def _hold(worker: Any, request: Any) -> Held:
    return worker.model_runner.lora_manager._adapter_manager.hold(request)


def _forget(worker: Any, path: str) -> None:
    worker.model_runner.lora_manager._adapter_manager.forget(path)


def _forget_everywhere(core: Any, path: str) -> None:
    """Have every worker let go of a path, and forget how it runs."""
    core.model_executor.collective_rpc(_forget, args=(path,))
    core.scheduler.__dict__.get("_vlora_kinds", {}).pop(path, None)


def _residency(core: Any) -> Residency:
    """The engine core's own, made on first use."""
    held = core.__dict__.get("_vlora_residency")
    if held is None:
        ask = core.model_executor.collective_rpc
        held = core.__dict__["_vlora_residency"] = Residency(
            lambda request: ask(_hold, args=(request,)),
            lambda path: _forget_everywhere(core, path),
            lambda: _paths_in_use(core.scheduler),
            counters_of(core),
        )
    return held


def _paths_in_use(scheduler: Any) -> set[str]:
    """The adapters' paths of the requests that the scheduler holds and of those that wait outside."""
    outside = scheduler.__dict__.get("_vlora_admission")
    requests = [*scheduler.requests.values(), *(outside.waiting() if outside else ())]
    return {request.lora_request.lora_path for request in requests if request.lora_request}


def _tasks(worker: Any) -> list[tuple[str, str]]:
    return worker.model_runner.lora_manager._adapter_manager.vlora_store.preloaded()


def tasks_at_start(core: Any) -> list[tuple[str, str]]:
    """(task id, path) of what an engine core's workers loaded at start-up; becomes a method of it.

    Raises:
        CheckpointError: one of them read another state of the checkpoint than the others.
    """
    first, *others = core.model_executor.collective_rpc(_tasks)
    if any(other != first for other in others):
        raise CheckpointError(_CHANGED)
    core.__dict__["_vlora_at_start"] = [task for task, _ in first]
    return first


def metrics_snapshot(core: Any, seen: int = -1) -> dict[str, Any]:
    """What an engine core counted of its tasks (``ServingCounters.snapshot``); becomes a method of it."""
    started: list[str] = core.__dict__.get("_vlora_at_start", [])
    late = _residency(core).late_names()
    counters = counters_of(core)
    counters.set_tier(DEVICE, len(started) + len(late), [*late, *started], pinned=set(started))
    return counters.snapshot(seen)


def ensure_in_process(client: Any, lora_request: Any) -> None:
    """Hold a task of ours where the client's engine core is in this process; else nothing."""
    core = getattr(client, "engine_core", None)
    if core is not None and parse_task_path(lora_request.lora_path) is not None:
        _residency(core).ensure(lora_request)


def ensure_before_add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.add_lora`` that holds a task of ours before it makes an adapter of it."""

    @functools.wraps(original)
    def add_lora(self: Any, lora_request: Any) -> Any:
        if parse_task_path(lora_request.lora_path) is not None:
            _residency(self).ensure(lora_request)
        return original(self, lora_request)

    return add_lora


def ensure_before_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.add_request`` that holds a request's task, which may have given way."""

    @functools.wraps(original)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> Any:
        lora = request.lora_request
        if lora and parse_task_path(lora.lora_path) is not None:
            tier = DEVICE if _residency(self).holds(lora.lora_path) else DISK
            counters_of(self).requested(lora.lora_name, tier)
            try:
                _residency(self).ensure(lora)
            except VLoRAError:
                # An engine core of its own process ends with what is raised here.
                refuse = getattr(self, "_send_error_outputs_to_client", None)
                if refuse is None:
                    raise
                _logger().exception("vllm-vlora: request %s is refused", request.request_id)
                return refuse([request.request_id], request.client_index)
        return original(self, request, request_wave)

    return add_request


# --- the API server --------------------------------------------------------------------------------


async def ask_for_tasks(engine_client: Any) -> dict[str, TaskPath]:
    """What every engine core behind a client loaded at start-up: task id -> path, in that order.

    Raises:
        CheckpointError: they do not hold the same.
    """
    client = engine_client.engine_core
    answers = [
        await client._call_utility_async(TASKS_METHOD, engine=engine)
        for engine in client.core_engines
    ]
    if any(other != answers[0] for other in answers):
        raise CheckpointError(_CHANGED)
    found = {task: parse_task_path(path) for task, path in answers[0]}
    # The workers made these paths.
    return {task: path for task, path in found.items() if path is not None}


def leave_memory(original: Callable[..., Any], late_mib: int) -> Callable[..., Any]:
    """``Executor.determine_available_memory`` less what later tasks may take.

    Not where the user set the KV cache's size (``--kv-cache-memory-bytes``): vLLM then measures nothing.
    """

    @functools.wraps(original)
    def determine_available_memory(self: Any) -> list[int]:
        found = original(self)
        if self.lora_config is None or self.cache_config.kv_cache_memory_bytes is not None:
            return found
        _logger().info(
            "vllm-vlora: %d MiB of each device are kept out of the KV cache for tasks that are loaded "
            "after start-up (%s)",
            late_mib,
            LATE_VARIABLE,
        )
        if late_mib and min(found) <= late_mib * 2**20:
            raise MemoryBudgetError(
                f"{min(found) / 2**20:.0f} MiB are left for the KV cache, and {LATE_VARIABLE} keeps "
                f"{late_mib} MiB for tasks that are loaded after start-up; set it lower, 0 refuses such "
                "tasks, or give vLLM more memory"
            )
        return [nbytes - late_mib * 2**20 for nbytes in found]

    return determine_available_memory


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.vlora")
