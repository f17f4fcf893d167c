"""Limits for each task, fair sharing among them, and room for adapters, put into vLLM's scheduler.

See ``fair_queue`` and ``admission``. Nothing of it is in place unless a setting asks for it or there are
fewer slots than adapters. What waits, waits in the scheduler's own queue, which is exchanged for one that
knows tenants. A request of a task of which too many wait already is
refused by the engine core, which alone sees those of every API server: HTTP status 429; see ``refusals``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_vlora.errors import TaskBusyError
from vllm_vlora.plugin.admission import Adapter, Room, kinds_of, pinned_of
from vllm_vlora.plugin.counters import counters_of
from vllm_vlora.plugin.fair_queue import Tenant, Tenants
from vllm_vlora.plugin.metrics import METRICS
from vllm_vlora.plugin.refusals import callers_error, refuse
from vllm_vlora.plugin.seam_table import Place
from vllm_vlora.plugin.settings import QUEUE_VARIABLE, Settings
from vllm_vlora.wording import count_of

Patch = tuple[Any, str, Any]

# What tokens of the prompt and of the answer count, as in the paper of ``fair_queue``.
PROMPT_TOKEN, ANSWER_TOKEN = 1, 2

_TENANTS = "_vlora_tenants"
_ONE_CALLER = "_vlora_one_caller"
# vLLM's own queue of requests that hold memory of the cache and wait, from 0.31 or 0.32 on.
_READY = "kv_holding_waiting"
# From the same on: whether a step left requests waiting that had no room in it, and those that could not
# begin for another reason.
_BOUND, _DEFERRED = "prefill_capacity_bound", "deferred_waiting"


def limit_tasks(
    patches: list[Patch], settings: Settings, places: Mapping[str, Place], direct: bool = False
) -> list[Patch]:
    """The plugin's patches with those that limit tasks and share fairly, where that is asked for.

    Args:
        patches: the others, which are put before these.
        places: the seams by name, as ``find_seams`` finds them.
        direct: whether tasks may run direct, so that there are fewer slots than adapters.
    """
    wrappers: dict[str, Callable[[Any], Any]] = {}
    if settings.limited or direct:
        wrappers["Scheduler.__init__"] = lambda f: _exchange_queues(f, settings, direct)
        wrappers["Scheduler.schedule"] = _count_prompts
    if settings.fair:
        wrappers["Scheduler.update_from_output"] = _count_answers
    if settings.task_queue:
        wrappers["EngineCore.add_request"] = lambda f: _refuse_above(f, settings.task_queue)
        wrappers["LLMEngine.__init__"] = _say_that_it_has_one_caller
        wrappers["BaseServing._maybe_get_adapters"] = lambda f: _refuse_streams(f, settings)
    before = {(owner, name): value for owner, name, value in patches}
    added = []
    for seam, wrap in wrappers.items():
        place = places[seam]
        value = before.get((place.owner, place.attribute), place.value)
        added.append((place.owner, place.attribute, wrap(value)))
    return [*patches, *added]


# --- the engine core ------------------------------------------------------------------------------


def tenant_of(request: Any) -> Tenant:
    """Whose request it is: its task or adapter, or the base model, which is None."""
    return request.lora_request.lora_name if request.lora_request else None


def _adapter_id(request: Any) -> tuple[int, str] | None:
    """Tells a task's states apart: a number may be another adapter's later, a path read anew."""
    lora = request.lora_request
    return lora and (lora.lora_int_id, lora.lora_path)


def _prices(goes_on_elsewhere: bool) -> Callable[[Any], float | None]:
    """What a request takes when it begins: tokens of its prompt that are to be computed, if it begins.

    Args:
        goes_on_elsewhere: whether a request that loads blocks of the cache goes on from a queue of vLLM's
            own when they are there, so that it begins with the load. Else it is put back.
    """
    begins = {RequestStatus.WAITING}
    if goes_on_elsewhere:
        begins.add(RequestStatus.WAITING_FOR_REMOTE_KVS)

    def price(request: Any) -> float | None:
        if request.status in begins:
            return PROMPT_TOKEN * (request.num_tokens - request.num_computed_tokens)
        return 0.0 if request.status == RequestStatus.PREEMPTED else None

    return price


def _idle(request: Any) -> bool:
    """Whether it is a session that waits for its next piece."""
    return request.status == RequestStatus.WAITING_FOR_STREAMING_REQ


def _exchange_queues(
    original: Callable[..., Any], settings: Settings, direct: bool
) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        most = self.lora_config.max_loras if self.lora_config else 0
        slots = min(settings.slots, most) if direct else most
        if slots == most and not settings.limited:
            return
        kinds = kinds_of(self)

        def adapter_of(request: Any) -> Adapter | None:
            lora = request.lora_request
            return lora and Adapter(lora.lora_int_id, not kinds.get(lora.lora_path))

        base = self.vllm_config.model_config.served_model_name
        tenants: Tenants[Any] = Tenants(
            fair=settings.fair,
            limit=settings.task_concurrency,
            by_priority=self.policy.value == "priority",
            tenant_of=tenant_of,
            price=_prices(hasattr(self, _READY)),
            weight=lambda tenant: settings.weights.get(base if tenant is None else tenant, 1.0),
            room=Room(slots, most, pinned_of(self)) if most else None,
            adapter_of=adapter_of,
            line_of=_adapter_id,
            idle=_idle,
        )
        self.waiting = tenants.queue()
        if hasattr(self, "skipped_waiting"):
            self.skipped_waiting = tenants.queue()
            self._select_waiting_queue_for_scheduling = tenants.next_queue
        setattr(self, _TENANTS, tenants)

    return init


def _count_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        tenants: Tenants[Any] | None = self.__dict__.get(_TENANTS)
        if tenants is None:
            return original(self, *args, **kwargs)
        tenants.begin_step(self.running, _ready(self))
        output = original(self, *args, **kwargs)
        _note_who_could_begin(self)
        for new in output.scheduled_new_reqs:
            found = PROMPT_TOKEN * new.num_computed_tokens
            if found:
                tenants.give_back(self.requests[new.req_id], found)
        return output

    return schedule


def _note_who_could_begin(scheduler: Any) -> None:
    """Correct what vLLM takes for a full step: it has not seen whom our queue passed over.

    Data-parallel ranks compute prompts in the same steps, but for a rank with a full step behind it.
    """
    deferred = getattr(scheduler, _DEFERRED, None)
    if deferred is None or not getattr(scheduler, _BOUND, False):
        return
    could = bool(scheduler.waiting) or any(one not in deferred for one in _ready(scheduler))
    setattr(scheduler, _BOUND, could)


def _ready(scheduler: Any) -> Collection[Any]:
    """Requests that began, wait in a queue that is not exchanged, and may go on at any step."""
    return getattr(scheduler, _READY, ())


def _count_answers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        tenants: Tenants[Any] = getattr(self, _TENANTS)
        sampled = model_runner_output.sampled_token_ids
        tokens: dict[Tenant, int] = {}
        for request_id, row in model_runner_output.req_id_to_index.items() if sampled else ():
            request = self.requests.get(request_id)
            if request is not None:
                tenant = tenant_of(request)
                tokens[tenant] = tokens.get(tenant, 0) + len(sampled[row])
        for tenant, count in tokens.items():
            tenants.charge(tenant, ANSWER_TOKEN * count)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output


def _refuse_above(original: Callable[..., Any], bound: int) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> Any:
        tenant = tenant_of(request)
        # A request of a known id is a piece of a session.
        if (
            tenant is not None
            and _must_wait(self.scheduler, tenant, bound)
            and request.request_id not in self.scheduler.requests
            and not getattr(self.vllm_config, _ONE_CALLER, False)
        ):
            counters_of(self).refused(TaskBusyError, tenant)
            return refuse(self, request, TaskBusyError(_too_many(tenant, bound)))
        return original(self, request, request_wave)

    return add_request


def _must_wait(scheduler: Any, tenant: str, bound: int) -> bool:
    """Whether a tenant's requests wait, so many that one more is to be refused."""
    tenants: Tenants[Any] = getattr(scheduler, _TENANTS)
    # What runs is looked through where it may matter.
    if tenants.waiting[tenant] < bound:
        return False
    places = scheduler.max_num_running_reqs
    return tenants.kept_waiting(tenant, scheduler.running, places, _ready(scheduler)) >= bound


def _say_that_it_has_one_caller(original: Callable[..., Any]) -> Callable[..., Any]:
    """The offline engine's core, wherever it runs: what waits there is its one caller's."""

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        setattr(vllm_config, _ONE_CALLER, True)  # It travels to the core with the rest.
        original(self, vllm_config, *args, **kwargs)

    return init


def _too_many(tenant: str, bound: int) -> str:
    wait = "waits" if bound == 1 else "wait"
    waiting = f"{count_of(bound, 'request')} of {tenant!r} {wait} already"
    return f"{waiting} ({QUEUE_VARIABLE}); ask again later"


# --- the API server -------------------------------------------------------------------------------


def _refuse_streams(original: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """Before a stream is answered, with a status: where this server's own requests are too many already.

    The engine core may count more, of other servers, or see fewer run than could; it then refuses.
    """

    @functools.wraps(original)
    def adapters(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        lora = original(self, request, *args, **kwargs)
        if lora is not None and getattr(request, "stream", False):
            engine = self.models.engine_client
            config = engine.vllm_config
            places = config.scheduler_config.max_num_seqs
            places = min(places, settings.task_concurrency or places)
            most = (places + settings.task_queue) * config.parallel_config.data_parallel_size
            states = engine.output_processor.request_states
            # They are counted where all of them together would be too many.
            if len(states) >= most and most <= sum(
                state.lora_name == lora.lora_name for state in states.values()
            ):
                METRICS.refused(TaskBusyError, lora.lora_name)
                raise callers_error(TaskBusyError, _too_many(lora.lora_name, settings.task_queue))
        return lora

    return adapters
