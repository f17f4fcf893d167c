"""What our tasks need of vLLM's engine core: where they are, when their requests enter, what is served.

``residency`` and ``arrivals`` decide; here they meet vLLM.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from vllm_vlora.errors import CheckpointError, MemoryBudgetError, ModelStateError, VLoRAError
from vllm_vlora.plugin.admission import kinds_of, pinned_of
from vllm_vlora.plugin.arrivals import SHORTEST_PAUSE, Arrivals, Waiter
from vllm_vlora.plugin.counters import DEVICE, counters_of
from vllm_vlora.plugin.events import logger
from vllm_vlora.plugin.exchange import BasisExchange, Books
from vllm_vlora.plugin.identity import parse_task_path
from vllm_vlora.plugin.refusals import refuse
from vllm_vlora.plugin.residency import Residency
from vllm_vlora.plugin.settings import DEVICE_VARIABLE, LATE_VARIABLE, SLOTS_VARIABLE, read_settings
from vllm_vlora.plugin.workers import Workers

TASKS_METHOD = "vlora_tasks"
"""The name under which an engine core answers with what it serves."""
ALIASES_METHOD = "vlora_aliases"
"""The name under which it answers with other names for that, as ``encode_aliases`` writes them."""
ROUTER_METHOD = "vlora_router"
"""The name under which it says which router picks among that, as ``encode_router`` writes it, or ""."""
FOLLOW_METHOD = "vlora_follow"
"""The name under which it looks for a published state and serves it."""
CHANGED = (
    "VLLM_VLORA_CHECKPOINT was published again while the engine started, and its workers do not hold the "
    "same state of it; start it again"
)
# Where an engine core keeps its own, and its scheduler who waits.
_TASKS, _ARRIVALS = "_vlora_tasks_held", "_vlora_arrivals"


# --- one engine core's own ---------------------------------------------------------------------------


class Tasks:
    """Where an engine core's tasks are, and who waits for one."""

    def __init__(self, core: Any) -> None:
        self.workers = workers = Workers(core.model_executor)
        counters = counters_of(core)
        self.residency = Residency(
            workers,
            lambda: _paths_in_use(core.scheduler),
            counters=counters,
            kinds=kinds_of(core.scheduler),
            slots=pinned_of(core.scheduler),
        )
        # Whether steps are under way, which bring the answers to ``Workers.ask_later``.
        self.steps_go_on = lambda: core.scheduler.has_requests() or bool(core.batch_queue)
        self.arrivals = Arrivals(
            self.residency,
            workers.bring,
            counters,
            steps_go_on=self.steps_go_on,
            alone=workers.count == 1,
        )
        workers.freeze_heaps()
        core.scheduler.__dict__[_ARRIVALS] = self.arrivals
        self._executor = core.model_executor
        settings = read_settings()
        self.exchange = BasisExchange(
            workers,
            Books(
                self.residency.in_use,
                self.arrivals.paths,
                self.residency.lose,
                self.arrivals.look_again,
                lambda: core.model_executor.is_sleeping,
            ),
            # Nothing may be materialized in mode direct.
            None if settings.mode == "direct" else settings.basis_wait,
            logger.info,
        )
        self._ticker = _Ticker(core) if hasattr(core, "input_queue") else None
        # A request that waited enters, which was counted when its task came.
        self.letting_in = False
        # Of tasks from memory (``published``): path by name, and when a path lost its name.
        self.published: dict[str, str] = {}
        self.unpublished: dict[str, float] = {}
        self.looks: threading.Timer | None = None
        # Whether API servers ask for what is served.
        self.followed = False

    def here(self, lora: Any) -> bool:
        """Whether a task is held, so that its request may go on; who does not wait may load it.

        Raises:
            VLoRAError: it cannot be loaded, in an engine core of the caller's process, which waits.
        """
        number = self.residency.number(lora.lora_path, lora.lora_int_id)
        if number != lora.lora_int_id:
            lora.lora_int_id = number
        if self.arrivals.awaits(lora.lora_path):
            return False
        if lora.lora_path in self.exchange.waiting and not self.letting_in:
            return False
        if self.residency.touch(lora.lora_path):
            return True
        if self._ticker is not None:
            return False
        if self._executor.is_sleeping:
            raise ModelStateError(
                f"task {lora.lora_name!r} is not on the device, and the engine sleeps; wake it up first"
            )
        if self.residency.place(lora) is None:
            raise MemoryBudgetError(
                f"no room for task {lora.lora_name!r} beside the tasks that requests in flight use; ask "
                f"again later, or set {LATE_VARIABLE} or {DEVICE_VARIABLE} higher"
            )
        return True

    def wait(self, lora: Any, waiter: Waiter) -> None:
        """Let somebody wait for a task that is not here."""
        self.arrivals.wait(lora, waiter)
        self.advance()

    def advance(self, looks: int = 0) -> None:
        """Let in whose task has come; ``looks`` as of ``Arrivals``."""
        # What the workers have not answered yet they say of the bases that are there now.
        if not self.arrivals.asking:
            self.exchange.advance()
        # Asleep, the device has no memory for them.
        if not self._executor.is_sleeping:
            self.arrivals.advance(looks)
        if self._ticker is not None:
            self._ticker.run(self.arrivals.pause)


def wake_message() -> tuple[Any, list[str]]:
    """What wakes an engine core's loop.

    An abort of no request is the one message that every vLLM takes at any time and answers with nothing.
    """
    from vllm.v1.engine import EngineCoreRequestType

    return EngineCoreRequestType.ABORT, []


class _Ticker:
    """Wakes an engine core's loop again and again while requests wait for their tasks."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._message = wake_message()
        self._pause: float | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def run(self, pause: float | None) -> None:
        """Wake it after so many seconds, each time, until told otherwise; never for None."""
        with self._changed:
            sooner = pause is not None and (self._pause is None or pause < self._pause)
            self._pause = pause
            if sooner:
                self._changed.notify()
        if self._thread is None and pause is not None:
            self._thread = threading.Thread(target=self._tick, name="vlora-ticker", daemon=True)
            self._thread.start()

    def _tick(self) -> None:
        while True:
            self._wait()
            queue = self._core.input_queue
            if queue.empty():
                queue.put_nowait(self._message)

    def _wait(self) -> None:
        began = time.monotonic()
        with self._changed:
            while self._pause is None or time.monotonic() < began + self._pause:
                if self._pause is None:
                    self._changed.wait()
                    began = time.monotonic()
                else:
                    self._changed.wait(began + self._pause - time.monotonic())


def tasks_of(core: Any) -> Tasks:
    """The engine core's own, made on first use."""
    held = core.__dict__.get(_TASKS)
    if held is None:
        held = core.__dict__[_TASKS] = Tasks(core)
    return held


def tasks_so_far(core: Any) -> Tasks | None:
    """The engine core's own, where any was used yet."""
    return core.__dict__.get(_TASKS)


def requests_inside(scheduler: Any) -> list[Any]:
    """The requests for adapters that the scheduler holds."""
    return [request for request in scheduler.requests.values() if request.lora_request]


def _paths_in_use(scheduler: Any) -> set[str]:
    return {request.lora_request.lora_path for request in requests_inside(scheduler)}


def ensure_in_process(client: Any, lora_request: Any) -> None:
    """Hold a task of ours where the client's engine core is in this process; else nothing."""
    core = getattr(client, "engine_core", None)
    if core is not None and is_ours(lora_request):
        tasks_of(core).here(lora_request)


def is_ours(lora_request: Any) -> bool:
    """Whether an adapter is a task of ours."""
    return parse_task_path(lora_request.lora_path) is not None


# --- in place of vLLM's own ------------------------------------------------------------------------


def load_before_add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.add_lora`` that makes an adapter of a task of ours once it is held."""

    @functools.wraps(original)
    def add_lora(self: Any, lora_request: Any) -> Any:
        if not is_ours(lora_request):
            return original(self, lora_request)
        tasks = tasks_of(self)
        if tasks.here(lora_request):
            return original(self, lora_request)
        # vLLM sends what a future holds when it is done.
        answer: Future[Any] = Future()

        def ready() -> None:
            try:
                answer.set_result(original(self, lora_request))
            except Exception as error:  # noqa: BLE001 - it is the caller's, whom the future tells
                answer.set_exception(error)

        tasks.wait(lora_request, Waiter(ready, answer.set_exception))
        return answer

    return add_lora


def load_before_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.add_request`` that lets a request in once its task is held."""

    @functools.wraps(original)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> Any:
        lora = request.lora_request
        if not lora or not is_ours(lora):
            return original(self, request, request_wave)
        tasks = tasks_of(self)
        if tasks.here(lora):
            if not tasks.letting_in:
                counters_of(self).requested(lora.lora_name, DEVICE)
            return original(self, request, request_wave)

        def enter() -> None:
            tasks.letting_in = True
            try:
                # Whole, as it came: a data-parallel core, which overrides it, counts waves there.
                self.add_request(request, request_wave)
            finally:
                tasks.letting_in = False

        failed = functools.partial(refuse_request, self, request)
        tasks.wait(lora, Waiter(enter, failed, request))
        _step_with_peers(self, request_wave)
        return None

    return add_request


def _step_with_peers(core: Any, request_wave: int) -> None:
    """Have a data-parallel engine core whose request waits take part in the steps of this wave.

    Its peers were told to begin them because of this request, and each step waits for all engine cores.
    Of a wave that is over ``DPEngineCoreProc.add_request`` tells them itself, then and when the request
    enters.
    """
    if not hasattr(core, "current_wave") or request_wave < core.current_wave:
        return
    paused = getattr(core.scheduler, "pause_state", None)
    if (paused is None or paused.name == "UNPAUSED") and not getattr(
        core, "ignore_start_dp_wave", False
    ):
        core.engines_running = True


def refuse_request(core: Any, request: Any, error: VLoRAError) -> None:
    """End a request with an error, which must not be the engine core's end."""
    logger.error("vllm-vlora: request %s is refused: %s", request.request_id, error)
    refuse(core, request, error)


def advance_after_abort(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.abort_requests`` that is the ticker's hand."""

    @functools.wraps(original)
    def abort_requests(self: Any, request_ids: list[str]) -> Any:
        done = original(self, request_ids)
        tasks = self.__dict__.get(_TASKS)
        if tasks is not None and tasks.arrivals.busy:
            tasks.advance(looks=not request_ids)
        return done

    return abort_requests


def finish_who_waits(
    original: Callable[..., Any], add: Callable[[Any, Any], Any]
) -> Callable[..., Any]:
    """``Scheduler.finish_requests`` that ends requests whose task is on its way as it ends others.

    Args:
        add: ``Scheduler.add_request``: only what the scheduler holds is ended properly, with what
            others keep for it.
    """

    @functools.wraps(original)
    def finish_requests(self: Any, request_ids: Any, finished_status: Any) -> Any:
        arrivals = self.__dict__.get(_ARRIVALS)
        if arrivals is not None and len(arrivals):
            request_ids = [request_ids] if isinstance(request_ids, str) else request_ids
            request_ids = None if request_ids is None else list(request_ids)
            for request in arrivals.withdraw(request_ids):
                add(self, request)
        return original(self, request_ids, finished_status)

    return finish_requests


def work_while_some_wait(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCoreProc.has_work``: an engine core that is told to end first serves who waits."""

    @functools.wraps(original)
    def has_work(self: Any) -> bool:
        if original(self):
            return True
        tasks = self.__dict__.get(_TASKS)
        if self.is_running() or tasks is None or not len(tasks.arrivals):
            return False
        # Its loop no longer sleeps, and would keep the threads that read from working.
        time.sleep(SHORTEST_PAUSE)
        return True

    return has_work


def keep_what_is_pinned(original: Callable[..., Any], slots: int = 0) -> Callable[..., Any]:
    """``EngineCore.pin_lora`` whose task never gives way.

    Args:
        slots: those of adapters that do not run direct, where tasks may; one of them is left to others,
            whose requests would wait for ever.
    """

    @functools.wraps(original)
    def pin_lora(self: Any, lora_id: int) -> Any:
        needs_slot = bool(slots) and not tasks_of(self).workers.are_direct(lora_id)
        if needs_slot:
            _check_slot_left(self, lora_id, slots)
        done = original(self, lora_id)
        if done:
            tasks_of(self).residency.pin(lora_id)
            kept = pinned_of(self.scheduler)
            # A number may have been another's, which needed one.
            (kept.add if needs_slot else kept.discard)(lora_id)
        return done

    return pin_lora


def _check_slot_left(core: Any, lora_id: int, slots: int) -> None:
    """Raise ModelStateError where an adapter that is pinned would leave no slot to others."""
    kept = pinned_of(core.scheduler) | {lora_id}
    if len(kept) >= min(slots, core.scheduler.lora_config.max_loras):
        raise ModelStateError(
            f"adapter {lora_id} is not pinned: it would take the last slot that is not pinned, and "
            f"requests for others would wait for ever; pin fewer, or set {SLOTS_VARIABLE} and "
            "--max-loras higher"
        )


def release_what_is_removed(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.remove_lora`` whose task may give way, though it was pinned."""

    @functools.wraps(original)
    def remove_lora(self: Any, lora_id: int) -> Any:
        done = original(self, lora_id)
        if done:
            tasks_of(self).residency.unpin(lora_id)
            pinned_of(self.scheduler).discard(lora_id)
        return done

    return remove_lora


# --- what is served ---------------------------------------------------------------------------------


def served_tasks(core: Any) -> list[tuple[str, str]]:
    """(task id, path) of what an engine core's workers serve; becomes a method of it.

    A task from memory stands in place of the checkpoint's of its name.

    Raises:
        CheckpointError: one of them read another state of the checkpoint than the others.
    """
    return list(
        {**dict(_agreed(tasks_of(core).workers.served())), **tasks_of(core).published}.items()
    )


def served_aliases(core: Any) -> str:
    """Aliases of what an engine core's workers serve, as JSON; becomes a method of it.

    Raises:
        CheckpointError: as :func:`served_tasks`.
    """
    return _agreed(tasks_of(core).workers.aliases())


def served_router(core: Any) -> str:
    """The router of what an engine core's workers serve, as JSON, empty for none; becomes a method of it.

    Raises:
        CheckpointError: as :func:`served_tasks`.
    """
    return _agreed(tasks_of(core).workers.routers())


def _agreed(answers: Iterable[Any]) -> Any:
    """What every worker answered."""
    first, *others = answers
    if any(other != first for other in others):
        raise CheckpointError(CHANGED)
    return first


def follow(core: Any, server: str = "", listed: str = "") -> str:
    """What names the state that an engine core serves, after it took what all its workers offer.

    Becomes a method of it.

    Args:
        server: what the API server that asks calls itself. listed: what named the state that it lists.
    """
    tasks = tasks_of(core)
    tasks.followed = True
    tasks.residency.release(tasks.arrivals.paths())
    tasks.exchange.heard(server, listed.partition("\n")[0])
    tasks.advance()
    served, offered = tasks.workers.states()
    # Those that wait for the bases of one state must not find them exchanged for another's.
    if len(offered) == 1 and offered != served and not tasks.exchange.holds_back:
        (digest,) = offered
        # Offers may have changed meanwhile; who lags behind is told again at the next look.
        if tasks.workers.adopt(digest):
            tasks.residency.retire(path for _, path in served_tasks(core))
            served = offered
            counters_of(core).adopted(digest)
            tasks.exchange.begin(digest)
    # Another one where tasks from memory change.
    return "\n".join([*served, *sorted(tasks.published.values())]) if len(served) == 1 else ""
