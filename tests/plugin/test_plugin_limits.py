"""Limits put into vLLM: its own scheduler's requests, output processor and errors, without an engine."""

from __future__ import annotations

import importlib
import queue
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_vlora.errors import TaskBusyError
from vllm_vlora.plugin.fair_queue import Line, TenantQueue, Tenants
from vllm_vlora.plugin.seam_table import Place, find_seams
from vllm_vlora.plugin.settings import Settings


@pytest.fixture(scope="module")
def limits() -> Any:
    return importlib.import_module("vllm_vlora.plugin.limits")


def request(name: str, task: str | None = "sql") -> Any:
    lora = SimpleNamespace(lora_name=task, lora_int_id=1, lora_path=f"/{task}") if task else None
    return SimpleNamespace(request_id=name, lora_request=lora, client_index=3)


# --- what is patched ------------------------------------------------------------------------------


def test_nothing_is_patched_unless_it_is_asked_for(limits: Any) -> None:
    others = [(object, "name", 1)]
    assert limits.limit_tasks(others, Settings(), {}) == others


def test_slots_are_kept_to_without_a_setting_where_tasks_run_direct(limits: Any) -> None:
    places = find_seams(direct=False, limits=True)
    patches = limits.limit_tasks([], Settings(), places, direct=True)
    assert [name for _, name, _ in patches] == ["__init__", "schedule"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (Settings(task_concurrency=1), {"Scheduler.__init__", "schedule"}),
        (
            Settings(task_queue=1),
            {
                "Scheduler.__init__",
                "LLMEngine.__init__",
                "schedule",
                "add_request",
                "_maybe_get_adapters",
            },
        ),
        (Settings(fair=True), {"Scheduler.__init__", "schedule", "update_from_output"}),
    ],
)
def test_what_is_patched_is_what_is_asked_for(
    limits: Any, settings: Settings, names: set[str]
) -> None:
    places = find_seams(direct=False, limits=True)
    patches = limits.limit_tasks([], settings, places)
    found = {
        f"{owner.__name__}.{name}" if name == "__init__" else name for owner, name, _ in patches
    }
    assert found == names
    assert len(patches) == len(names)


def test_what_others_put_there_is_wrapped_and_not_lost(limits: Any) -> None:
    class Core:
        def add_request(self, request: Any, request_wave: int = 0) -> str:
            raise AssertionError("it was replaced")

    asked: list[Any] = []
    other = (Core, "add_request", lambda self, request, request_wave=0: asked.append(request))
    places = find_seams(direct=True, limits=True) | {
        "EngineCore.add_request": Place(Core, "add_request", Core.add_request)
    }
    *_, (owner, name, add) = [
        patch
        for patch in limits.limit_tasks([other], Settings(task_queue=1), places)
        if patch[0] is Core
    ]
    assert (owner, name) == (Core, "add_request")
    tenants = tenants_of(0, {})
    core = SimpleNamespace(scheduler=SimpleNamespace(_vlora_tenants=tenants, requests={}))
    add(core, request("a"), 2)
    assert [r.request_id for r in asked] == ["a"]


# --- the engine core ------------------------------------------------------------------------------


class Waiting(SimpleNamespace):
    """A request that is itself alone, as vLLM's are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def waiting(name: str, task: str | None, tokens: int = 10, status: str = "WAITING") -> Any:
    from vllm.v1.request import RequestStatus

    one = Waiting(**vars(request(name, task)))
    one.priority, one.arrival_time, one.status = 0, 0.0, RequestStatus[status]
    one.num_tokens, one.num_computed_tokens = tokens, 0
    return one


def tenants_of(limit: int, waiting: dict[Any, int]) -> Tenants[Any]:
    """Whose so many requests wait."""
    found: Tenants[Any] = Tenants(
        fair=False,
        limit=limit,
        by_priority=False,
        tenant_of=lambda r: r.lora_request.lora_name,
        price=lambda r: 0.0,
    )
    for tenant, count in waiting.items():
        for _ in range(count):
            found.come(Line(tenant, None))
    return found


class Scheduler:
    """The part of vLLM's that is patched: takes one request a step and has it answered at once."""

    skipped = False

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.policy = vllm_config, SimpleNamespace(value="fcfs")
        self.waiting: Any = []
        if self.skipped:
            self.skipped_waiting: Any = []
        self.running: list[Any] = []
        self.lora_config = None
        self.requests: dict[str, Any] = {}

    def schedule(self, throttle_prefills: bool = False) -> Any:
        queue = self.waiting
        if self.skipped:
            queue = self._select_waiting_queue_for_scheduling()
        taken = queue.pop_request()
        self.running.append(taken)
        new = SimpleNamespace(req_id=taken.request_id, num_computed_tokens=self.cached)
        return SimpleNamespace(scheduled_new_reqs=[new])

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None:
        self.running.clear()

    cached = 0

    def _select_waiting_queue_for_scheduling(self) -> Any:
        raise AssertionError("the order is the tenants' business")


@pytest.fixture(params=[False, True], ids=["one queue", "two queues"])
def make_scheduler(limits: Any, request: pytest.FixtureRequest) -> Any:
    def make(settings: Settings) -> Any:
        class Patched(Scheduler):
            skipped = request.param

        owners = {"Scheduler": Patched}
        places = {
            f"{owner}.{name}": Place(kind, name, getattr(kind, name))
            for owner, kind in owners.items()
            for name in ("__init__", "schedule", "update_from_output")
        }
        for owner, name, value in limits.limit_tasks([], settings, places):
            setattr(owner, name, value)
        model = SimpleNamespace(served_model_name="llama")
        return Patched(SimpleNamespace(model_config=model))

    return make


def add(scheduler: Any, *requests: Any) -> None:
    for one in requests:
        scheduler.requests[one.request_id] = one
        scheduler.waiting.add_request(one)


def serve(scheduler: Any, answer: int = 1) -> str:
    """One step; whose request it was, after an answer of so many tokens."""
    (new,) = scheduler.schedule().scheduled_new_reqs
    sampled = [[7], [3] * answer]
    scheduler.update_from_output(
        None,
        SimpleNamespace(sampled_token_ids=sampled, req_id_to_index={"gone": 0, new.req_id: 1}),
    )
    return new.req_id


def test_prompts_and_answers_are_counted_as_they_were_served(make_scheduler: Any) -> None:
    scheduler = make_scheduler(Settings(fair=True, weights={"sql": 2.0, "llama": 4.0}))
    add(scheduler, waiting("a", "sql"), waiting("b", None), waiting("c", "french"))
    tenants = scheduler._vlora_tenants
    scheduler.cached = 4
    assert [serve(scheduler, answer=5) for _ in range(3)] == ["a", "b", "c"]
    each = 10 - 4 + 2 * 5
    assert [tenants.served(name) for name in ("sql", None, "french")] == [each / 2, each / 4, each]
    # Nothing is sampled for a pooling model, and in the middle of a prompt.
    empty = SimpleNamespace(sampled_token_ids=[], req_id_to_index={"a": 0})
    scheduler.update_from_output(None, empty)
    assert tenants.served("sql") == each / 2


def test_what_waits_for_something_else_and_what_was_preempted_cost_nothing(
    make_scheduler: Any,
) -> None:
    scheduler = make_scheduler(Settings(fair=True))
    blocked = waiting("a", "sql", status="WAITING_FOR_STREAMING_REQ")
    preempted = waiting("b", "french", status="PREEMPTED")
    add(scheduler, blocked, preempted)
    assert [serve(scheduler, answer=0), serve(scheduler, answer=0)] == ["a", "b"]
    assert not any(scheduler._vlora_tenants._served.values())


def test_only_as_many_run_as_may(make_scheduler: Any) -> None:
    scheduler = make_scheduler(Settings(task_concurrency=1))
    add(scheduler, waiting("a", "sql"), waiting("b", "sql"), waiting("c", "french"))
    order = [scheduler.schedule().scheduled_new_reqs[0].req_id for _ in range(2)]
    assert order == ["a", "c"]
    assert (len(scheduler.waiting), bool(scheduler.waiting)) == (1, False)
    scheduler.update_from_output(None, None)
    assert scheduler.schedule().scheduled_new_reqs[0].req_id == "b"


@pytest.mark.parametrize(
    ("limit", "running", "others", "entered"),
    [
        (0, [], 0, 8 + 2),  # All places of the engine, and so many wait.
        (3, [], 0, 3 + 2),
        (3, ["sql", "sql", "french"], 0, 1 + 2),
        (3, ["sql"] * 4, 0, 2),
        (0, ["french"] * 6, 0, 2 + 2),
        (0, ["french"] * 6, 1, 1 + 2),
        (0, ["french"] * 8, 3, 2),
    ],
)
def test_what_the_next_step_has_room_for_does_not_wait(
    limits: Any, limit: int, running: list[str], others: int, entered: int
) -> None:
    """So that an engine with nothing to do takes `n` answers, whatever the bound is."""
    tenants = tenants_of(limit, {"other": others})
    scheduler = SimpleNamespace(
        _vlora_tenants=tenants,
        requests={},
        running=[request("x", task) for task in running],
        max_num_running_reqs=8,
    )
    core = SimpleNamespace(
        output_queue=queue.Queue(),
        scheduler=scheduler,
        vllm_config=SimpleNamespace(),
    )
    taken: list[str] = []
    waiting: TenantQueue[Any] = tenants.queue()

    def take(self: Any, one: Any, wave: int) -> None:
        taken.append(one.request_id)
        waiting.add_request(one)

    add = limits._refuse_above(take, 2)
    for number in range(20):
        add(core, request(str(number)))
    assert taken == [str(number) for number in range(entered)]
    # In a later step what is left of them waits, whatever room there seems to be.
    tenants.begin_step([])
    add(core, request("late"))
    assert len(taken) == entered


def test_too_many_that_wait_are_refused_and_pieces_of_sessions_and_the_base_model_are_not(
    limits: Any,
) -> None:
    entered: list[str] = []
    add = limits._refuse_above(lambda self, request, wave: entered.append(request.request_id), 2)
    tenants = tenants_of(2, {"sql": 2, "free": 1, None: 900})
    tenants.begin_step([])
    scheduler = SimpleNamespace(
        _vlora_tenants=tenants, requests={"session": object()}, running=[], max_num_running_reqs=8
    )
    core = SimpleNamespace(
        output_queue=queue.Queue(), scheduler=scheduler, vllm_config=SimpleNamespace()
    )
    for one in (request("a"), request("b", "free"), request("base", None), request("session")):
        add(core, one)
    assert entered == ["b", "base", "session"]
    client, outputs = core.output_queue.get_nowait()
    assert (client, outputs.finished_requests, core.output_queue.empty()) == (3, {"a"}, True)
    (refusal,) = outputs.outputs
    assert (refusal.request_id, refusal.finished, refusal.new_token_ids) == ("a", True, [])
    assert "2 requests of 'sql' wait already (VLLM_VLORA_TASK_QUEUE)" in refusal.stop_reason
    # The offline engine's core, which says so in its configuration.
    limits._say_that_it_has_one_caller(lambda self, vllm_config: None)(None, core.vllm_config)
    add(core, request("a"))
    assert (entered[-1], core.output_queue.empty()) == ("a", True)


# --- the API server -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("concurrency", "replicas", "most"), [(0, 1, 8 + 3), (2, 1, 2 + 3), (20, 1, 8 + 3), (2, 2, 10)]
)
def test_a_stream_is_refused_at_once_where_its_servers_own_are_surely_too_many(
    limits: Any,
    concurrency: int,
    replicas: int,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused: list[Any] = []
    monkeypatch.setattr(limits.METRICS, "refused", lambda *what: refused.append(what))
    lora = SimpleNamespace(lora_name="sql")
    answers = limits._refuse_streams(
        lambda self, request, **kwargs: lora if request.model == "sql" else None,
        Settings(task_queue=3, task_concurrency=concurrency),
    )
    states = {str(i): SimpleNamespace(lora_name="sql") for i in range(most - 1)}
    states |= {f"other {i}": SimpleNamespace(lora_name="other") for i in range(20)}
    engine = SimpleNamespace(
        output_processor=SimpleNamespace(request_states=states),
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            parallel_config=SimpleNamespace(data_parallel_size=replicas),
        ),
    )
    serving = SimpleNamespace(models=SimpleNamespace(engine_client=engine))

    def ask(model: str, **kind: bool) -> Any:
        return answers(serving, SimpleNamespace(model=model, **kind))

    assert ask("sql", stream=True) is lora
    states["one more"] = SimpleNamespace(lora_name="sql")
    assert refused == []
    with pytest.raises(TaskBusyError, match="3 requests of 'sql' wait already"):
        ask("sql", stream=True)
    assert refused == [(TaskBusyError, "sql")]
    # The engine core judges the others; a question for tokens is no request at all.
    assert ask("sql", stream=False) is lora
    assert ask("sql") is lora
    assert ask("base", stream=True) is None
