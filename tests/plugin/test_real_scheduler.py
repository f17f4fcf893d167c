"""vLLM's own scheduler with the exchanged queue, and no model: what is sampled is made up."""

from __future__ import annotations

import importlib
import queue
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from real_scheduler import BLOCK, ROOM, a_model, a_request, a_scheduler

from vllm_vlora.plugin.admission import TURN, kinds_of, pinned_of
from vllm_vlora.plugin.seam_table import Place, find_seams
from vllm_vlora.plugin.settings import Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return a_model(tmp_path_factory.mktemp("model"))


class Engine:
    """A patched scheduler, and a model whose every token is 5."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.began: list[str] = []
        self.answers: Counter[str] = Counter()
        self.most: Counter[Any] = Counter()
        self.preempted = 0
        self.batch: dict[str, int] = {}
        # Adapters that needed a slot in one step, at most.
        self.slots = 0

    request = staticmethod(a_request)

    def send(self, *requests: Any) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def step(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        self.preempted += len(output.preempted_req_ids or ())
        self.batch = dict(output.num_scheduled_tokens)
        self.slots = max(self.slots, len(self._slotted()))
        names = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        self.began += [name for name in names if name not in self.began]
        self.most |= Counter(
            request.lora_request and request.lora_request.lora_name
            for request in self.scheduler.running
        )
        # In the middle of a prompt nothing is sampled.
        sampled = [
            [5] if request.num_computed_tokens >= request.num_tokens else [] for request in requests
        ]
        done = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: row for row, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        for outputs in done.values():
            for one in outputs.outputs:
                self.answers[one.request_id] += len(one.new_token_ids)

    def _slotted(self) -> set[int]:
        kinds = kinds_of(self.scheduler)
        asked = [self.scheduler.requests[name].lora_request for name in self.batch]
        found = {lora.lora_int_id for lora in asked if lora and not kinds.get(lora.lora_path)}
        return found | pinned_of(self.scheduler)

    def finish(self) -> None:
        for _ in range(5000):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        scheduler = self.scheduler
        assert not scheduler.has_unfinished_requests()
        assert not scheduler.requests
        if hasattr(scheduler, "_vlora_tenants"):
            assert not scheduler._vlora_tenants.waiting
        assert scheduler.get_request_counts() == (0, 0)


@pytest.fixture
def make(model: str) -> Callable[..., Engine]:
    limits = importlib.import_module("vllm_vlora.plugin.limits")

    def make(
        settings: Settings, policy: str = "fcfs", blocks: int = 1000, direct: bool = False
    ) -> Engine:
        from vllm.v1.core.sched.scheduler import Scheduler

        patched = type("Scheduler", (Scheduler,), {})
        places = find_seams(direct=True, limits=True)
        own = {
            name: Place(patched, place.attribute, place.value)
            for name, place in places.items()
            if place.owner is Scheduler
        }
        for owner, name, value in limits.limit_tasks([], settings, places | own, direct):
            if owner is patched:
                setattr(owner, name, value)
        return Engine(a_scheduler(patched, model, policy, blocks))

    return make


Make = Callable[..., Engine]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_burst_keeps_nobody_waiting(make: Make, policy: str) -> None:
    engine = make(Settings(fair=True), policy)
    engine.send(*(engine.request(f"burst {i}", "sql") for i in range(40)))
    engine.step()
    late = [engine.request("late 1", "french"), engine.request("late 2", None)]
    engine.send(*late, engine.request("late 3", "french"))
    assert engine.scheduler.get_request_counts() == (ROOM, 43 - ROOM)
    assert engine.scheduler.make_stats().num_waiting_reqs == 43 - ROOM
    engine.finish()
    assert {"late 1", "late 2", "late 3"} <= set(engine.began[:8])
    assert len(engine.began) == 43
    assert set(engine.answers.values()) == {5}


def test_fairness_takes_no_more_steps(make: Make) -> None:
    """What an engine does in a step is the same; only whose requests are in it differs."""
    steps, few = {}, {}
    for fair in (False, True):
        engine = make(Settings(fair=fair))
        engine.send(*(engine.request(f"burst {i}", "sql", answer=16) for i in range(100)))
        engine.send(*(engine.request(f"few {i}", (None, "a")[i % 2]) for i in range(10)))
        steps[fair] = 0
        while engine.scheduler.has_unfinished_requests():
            engine.step()
            steps[fair] += 1
            if sum(name.startswith("few") for name in engine.answers) < 10:
                few[fair] = steps[fair]
    assert steps[True] <= steps[False] / 0.95
    assert few[True] < few[False] / 10


def test_priorities_come_first(make: Make) -> None:
    engine = make(Settings(fair=True), "priority")
    engine.send(*(engine.request(f"burst {i}", "sql", priority=1) for i in range(10)))
    engine.send(
        engine.request("urgent", "sql", priority=0), engine.request("idle", "a", priority=2)
    )
    engine.finish()
    assert (engine.began[0], engine.began[-1]) == ("urgent", "idle")


def test_a_limit_holds_and_the_order_is_else_that_of_coming(make: Make) -> None:
    engine = make(Settings(task_concurrency=2))
    names = [f"{task} {i}" for i in range(10) for task in ("sql", "base")]
    engine.send(*(engine.request(n, None if n.startswith("base") else "sql") for n in names))
    engine.finish()
    assert (engine.most["sql"], engine.most[None]) == (2, ROOM - 2)
    for task in ("sql", "base"):
        own = [name for name in engine.began if name.startswith(task)]
        assert own == [name for name in names if name.startswith(task)]


def test_a_session_keeps_its_place_among_others(make: Make) -> None:
    engine = make(Settings(fair=True, task_concurrency=1))

    def piece() -> Any:
        return engine.request("session", "sql", resumable=True)

    engine.send(piece(), *(engine.request(f"other {i}", "sql") for i in range(6)))
    for _ in range(3):
        for _ in range(60):
            engine.step()
        engine.send(piece())
    assert engine.answers["session"] in (15, 20)
    assert all(engine.answers[f"other {i}"] == 5 for i in range(6)), "nobody waits for an idle one"
    for _ in range(60):
        engine.step()
    engine.send(engine.request("session", "sql", prompt=1))
    engine.finish()
    assert engine.answers["session"] == 20


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize(
    "settings",
    [
        Settings(fair=True),
        Settings(task_concurrency=2),
        Settings(fair=True, task_concurrency=1),
    ],
)
def test_whatever_comes_all_is_answered_and_nothing_left(
    make: Make, settings: Settings, policy: str, seed: int
) -> None:
    """Bursts, aborts wherever a request is, too little memory, more adapters than fit a batch."""
    chance = random.Random(seed)
    engine = make(settings, policy, blocks=20)
    sent: dict[str, int] = {}
    gone: set[str] = set()
    finish = importlib.import_module("vllm.v1.request").RequestStatus.FINISHED_ABORTED
    for step in range(150):
        for number in range(chance.choice([0, 0, 0, 1, 6])):
            name, answer = f"{step}/{number}", chance.randint(1, 60)
            sent[name] = answer
            task = chance.choice([None, "sql", "sql", "french", "c", "d", "e"])
            prompt, priority = chance.randint(1, 100), chance.randint(0, 2)
            engine.send(engine.request(name, task, prompt, answer, priority=priority))
        if sent and chance.random() < 0.1:
            given_up = chance.sample(list(sent), min(3, len(sent)))
            gone.update(r.request_id for r in engine.scheduler.finish_requests(given_up, finish))
        engine.step()
        assert (
            any(engine.scheduler.running) or not len(engine.scheduler.waiting) or engine.preempted
        )
    engine.finish()
    assert {name: engine.answers[name] for name in sent if name not in gone} == {
        name: answer for name, answer in sent.items() if name not in gone
    }
    if settings.task_concurrency:
        assert all(
            count <= settings.task_concurrency for task, count in engine.most.items() if task
        )
    assert engine.preempted, "there was memory enough"
    tenants = engine.scheduler._vlora_tenants
    assert min(tenants._served.values(), default=0) >= 0


class Loading:
    """A KV connector that has the first block of every prompt, and loads it in the background."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, _computed: int) -> tuple[int, bool]:
        if request.request_id in self.asked:
            return 0, False
        self.asked.add(request.request_id)
        return BLOCK, True

    def take_events(self) -> tuple[()]:
        return ()

    def __getattr__(self, name: str) -> Any:
        def nothing(*_args: Any, **_options: Any) -> Any:
            if name.startswith("request_finished"):
                return False, None
            return frozenset() if name.endswith("group_ids") else None

        return nothing


def load_in_the_background(engine: Engine) -> None:
    engine.scheduler.connector = Loading()
    engine.scheduler.connector_prefix_cache_stats = None


def arrive(engine: Engine) -> None:
    """Whatever loads is there."""
    waiting = importlib.import_module("vllm.v1.request").RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.scheduler.finished_recving_kv_req_ids.update(
        name for name, request in engine.scheduler.requests.items() if request.status == waiting
    )


@pytest.mark.parametrize("slow", [1, 3])
def test_a_limit_holds_where_requests_load_the_cache_in_the_background(
    make: Make, slow: int
) -> None:
    engine = make(Settings(task_concurrency=1))
    load_in_the_background(engine)
    engine.send(*(engine.request(f"sql {i}", "sql", prompt=40) for i in range(4)))
    engine.send(*(engine.request(f"base {i}", None, prompt=40) for i in range(2)))
    for step in range(200):
        engine.step()
        if step % slow == 0:
            arrive(engine)
    assert (engine.most["sql"], engine.most[None]) == (1, 2)
    assert set(engine.answers.values()) == {5}
    engine.finish()


def test_what_loads_the_cache_is_charged_for_the_rest_of_its_prompt(make: Make) -> None:
    engine = make(Settings(fair=True))
    load_in_the_background(engine)
    engine.send(engine.request("loads", "sql", prompt=40, answer=5))
    engine.step()
    arrive(engine)
    engine.finish()
    # Known to be wrong up to vLLM 0.30: what was loaded is taken off twice, in the price and after it.
    taken_off = 1 if hasattr(engine.scheduler, "kv_holding_waiting") else 2
    assert engine.scheduler._vlora_tenants.served("sql") == 40 - taken_off * BLOCK + 2 * 5


# --- adapters that need a slot --------------------------------------------------------------------


def is_direct(engine: Engine, *tasks: str) -> None:
    kinds_of(engine.scheduler).update({f"/{task}": True for task in tasks})


def test_what_needs_no_slot_is_scheduled_as_stock_vllm_does(make: Make) -> None:
    """Step by step, with too little memory, aborts, and more adapters than a batch may have.

    Before vLLM 0.31 what found no place goes into a queue of its own, which comes before what was
    preempted: ours has one order. There a batch may have all adapters.
    """
    finish = importlib.import_module("vllm.v1.request").RequestStatus.FINISHED_ABORTED
    for seed in range(3):
        ours, stock = make(Settings(slots=1), blocks=20, direct=True), make(Settings(), blocks=20)
        assert hasattr(ours.scheduler, "_vlora_tenants")
        assert not hasattr(stock.scheduler, "_vlora_tenants")
        places = stock.scheduler.lora_config.max_loras
        tasks = "abcde"[: places if hasattr(stock.scheduler, "skipped_waiting") else None]
        is_direct(ours, *tasks)
        chance = random.Random(seed)
        for step in range(150):
            sent = [
                (f"{step}/{number}", chance.choice([None, *tasks]), chance.randint(1, 100))
                for number in range(chance.choice([0, 0, 0, 1, 6]))
            ]
            answer = chance.randint(1, 60)
            gone = [name for name in stock.scheduler.requests if chance.random() < 0.01]
            for engine in (ours, stock):
                engine.send(*(engine.request(*one, answer) for one in sent))
                engine.scheduler.finish_requests(gone, finish)
                engine.step()
            assert list(ours.batch.items()) == list(stock.batch.items())
        assert stock.preempted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize(
    "settings", [Settings(slots=2), Settings(slots=1, fair=True), Settings(slots=2, task_queue=9)]
)
def test_adapters_that_need_a_slot_stay_within_the_slots(
    make: Make, settings: Settings, policy: str, seed: int
) -> None:
    chance = random.Random(seed)
    engine = make(settings, policy, blocks=20, direct=True)
    is_direct(engine, "d", "e")
    finish = importlib.import_module("vllm.v1.request").RequestStatus.FINISHED_ABORTED
    sent: dict[str, int] = {}
    gone: set[str] = set()
    for step in range(150):
        for number in range(chance.choice([0, 0, 0, 1, 6])):
            name, answer = f"{step}/{number}", chance.randint(1, 60)
            sent[name] = answer
            task, prompt = chance.choice([None, *"abcde"]), chance.randint(1, 100)
            priority = chance.randint(0, 2)
            engine.send(engine.request(name, task, prompt, answer, priority=priority))
        if sent and chance.random() < 0.1:
            given_up = chance.sample(list(sent), min(3, len(sent)))
            gone.update(r.request_id for r in engine.scheduler.finish_requests(given_up, finish))
        engine.step()
    engine.finish()
    assert engine.slots == settings.slots
    assert {name: engine.answers[name] for name in sent if name not in gone} == {
        name: answer for name, answer in sent.items() if name not in gone
    }


def test_what_waits_for_a_slot_is_counted_by_vllm_itself(make: Make) -> None:
    engine = make(Settings(slots=1), direct=True)
    engine.send(engine.request("first", "a", answer=50))
    engine.step()
    engine.send(*(engine.request(f"late {i}", "b") for i in range(20)))
    engine.step()
    assert engine.scheduler.get_request_counts() == (1, 20)
    assert engine.scheduler.make_stats().num_waiting_reqs == 20
    engine.finish()


def test_what_waits_for_a_slot_does_not_end_the_balance_of_data_parallel_ranks(make: Make) -> None:
    """As what waits for a place among max-loras in stock vLLM does not, which is the first of these."""
    for settings, direct, tasks in ((Settings(), False, "abc"), (Settings(slots=1), True, "a")):
        engine = make(settings, direct=direct)
        scheduler = engine.scheduler
        if not hasattr(scheduler, "prefill_capacity_bound"):
            pytest.skip("this vLLM balances nothing")
        engine.send(*(engine.request(f"holds {task}", task, answer=100) for task in tasks))
        for _ in range(3):
            engine.step()
        engine.send(engine.request("waits", "z"))
        engine.step()
        assert not scheduler.prefill_capacity_bound
        engine.send(engine.request("next", None))
        assert "next" not in scheduler.schedule(True).num_scheduled_tokens
        # A step without room for all who could begin.
        engine.send(*(engine.request(f"more {number}", None) for number in range(ROOM)))
        scheduler.schedule()
        assert scheduler.prefill_capacity_bound


def test_what_waits_for_a_slot_counts_against_the_bound_of_its_task(make: Make) -> None:
    limits = importlib.import_module("vllm_vlora.plugin.limits")
    bound = 5
    for holder, accepted in (("a", bound), (None, ROOM - 1 + bound), ("b", ROOM - 1 + bound)):
        engine = make(Settings(slots=1, task_queue=bound), direct=True)
        engine.send(engine.request("holder", holder, answer=50))
        engine.step()
        add = limits._refuse_above(
            lambda core, request, wave: core.scheduler.add_request(request), bound
        )
        core = SimpleNamespace(
            scheduler=engine.scheduler, output_queue=queue.Queue(), vllm_config=SimpleNamespace()
        )
        for number in range(50):
            add(core, engine.request(str(number), "b"))
        assert len(engine.scheduler.waiting) == accepted
        assert core.output_queue.qsize() == 50 - accepted
        # The slot got free, though no step has begun since.
        if holder == "a":
            abort = importlib.import_module("vllm.v1.request").RequestStatus.FINISHED_ABORTED
            engine.scheduler.finish_requests("holder", abort)
            engine.scheduler.finish_requests([str(number) for number in range(50)], abort)
            for number in range(50):
                add(core, engine.request(str(number), "b"))
            assert len(engine.scheduler.waiting) == ROOM + bound
        engine.finish()


def steady(engine: Engine, tasks: str, steps: int, until: str = "", **more: Any) -> int:
    """The steps until a request begins, while each of some tasks always has one waiting."""
    for step in range(steps):
        for task in tasks:
            held = [
                r for r in engine.scheduler.requests.values() if r.lora_request.lora_name == task
            ]
            for number in range(ROOM - len(held)):
                engine.send(engine.request(f"{task} {step}/{number}", task, **more))
        engine.step()
        if until in engine.began:
            return step
    return steps


def test_priorities_come_first_to_a_slot_too(make: Make) -> None:
    engine = make(Settings(slots=1), "priority", direct=True)
    steady(engine, "a", 5, priority=5)
    engine.send(*(engine.request(f"idle {i}", "b", priority=9) for i in range(3)))
    engine.send(engine.request("urgent", "c", priority=0))
    assert steady(engine, "a", 500, "urgent", priority=5) <= 10, (
        "those that ran end, and no more begin"
    )
    assert not any(name.startswith("idle") for name in engine.began)
    engine.finish()


def test_who_was_served_least_gets_a_slot(make: Make) -> None:
    """Two tasks hold both slots all the time; a request of either is served 20 + 2 * 5 tokens."""
    engine = make(Settings(slots=2, fair=True), direct=True)
    steady(engine, "ab", 5)
    engine.send(*(engine.request(f"new {i}", "c") for i in range(3)))
    before = len(engine.began)
    assert steady(engine, "ab", 5000, "new 0") < 5000
    assert len(engine.began) - before <= 2 * (TURN // 30 + 2 * ROOM)
    engine.finish()


def test_others_keep_their_slots_where_nobody_is_before_them(make: Make) -> None:
    """As by stock code when ``--max-loras`` is reached."""
    engine = make(Settings(slots=1), direct=True)
    engine.send(engine.request("a 1", "a"))
    engine.step()
    engine.send(engine.request("b", "b"), engine.request("a 2", "a"), engine.request("base", None))
    engine.step()
    assert engine.began == ["a 1", "a 2", "base"]
    engine.finish()
    assert engine.began[-1] == "b"


def test_a_request_that_waits_for_a_slot_is_ended_and_keeps_nobody_waiting(make: Make) -> None:
    engine = make(Settings(slots=1), "priority", direct=True)
    engine.send(engine.request("a 1", "a", answer=200, priority=5))
    engine.step()
    engine.send(engine.request("urgent", "c", priority=0), engine.request("a 2", "a", priority=5))
    engine.step()
    assert engine.began == ["a 1"]
    finish = importlib.import_module("vllm.v1.request").RequestStatus.FINISHED_ABORTED
    assert [r.request_id for r in engine.scheduler.finish_requests("urgent", finish)] == ["urgent"]
    engine.step()
    assert engine.began == ["a 1", "a 2"]
    engine.finish()


def test_a_task_that_becomes_direct_waits_for_a_slot_no_longer(make: Make) -> None:
    engine = make(Settings(slots=1), direct=True)
    engine.send(engine.request("a", "a", answer=200))
    engine.step()
    engine.send(engine.request("b", "b"))
    engine.step()
    is_direct(engine, "b")
    for _ in range(40):
        engine.step()
    assert engine.answers["b"] == 5
    engine.finish()


def test_a_new_state_of_a_task_does_not_wait_for_the_slot_of_the_old(make: Make) -> None:
    """What runs direct needs none, and goes in the order of stock vLLM."""
    engine = make(Settings(slots=1), direct=True)
    kinds_of(engine.scheduler)["/sql@new"] = True
    engine.send(engine.request("holder", "x", answer=100))
    engine.step()
    engine.send(engine.request("old", "sql", path="/sql@old"))
    names = [f"new {i}" for i in range(6)]
    engine.send(*(engine.request(name, "sql", path="/sql@new") for name in names))
    for _ in range(20):
        engine.step()
    assert engine.began == ["holder", *names]
    assert (engine.answers["old"], engine.answers["new 5"]) == (0, 5)
    finish = importlib.import_module("vllm.v1.request").RequestStatus.FINISHED_ABORTED
    engine.scheduler.finish_requests("holder", finish)
    engine.finish()
    assert engine.answers["old"] == 5


def test_a_pinned_adapter_keeps_its_slot_while_nobody_asks_for_it(make: Make) -> None:
    engine = make(Settings(slots=2), direct=True)
    pinned_of(engine.scheduler).add(engine.request("", "p").lora_request.lora_int_id)
    engine.send(engine.request("a", "a"), engine.request("b", "b"), engine.request("p", "p"))
    engine.step()
    assert engine.began == ["a", "p"]
    engine.finish()
    assert engine.slots == 2


def test_an_idle_session_keeps_the_slot_that_it_goes_on_with(make: Make) -> None:
    engine = make(Settings(slots=1), direct=True)

    def piece() -> Any:
        return engine.request("session", "a", resumable=True)

    engine.send(piece())
    for _ in range(10):
        engine.step()
    engine.send(engine.request("b", "b", answer=30))
    for _ in range(3):
        engine.step()
    engine.send(piece())
    for _ in range(60):
        engine.step()
    assert engine.slots == 1
    assert engine.answers["session"] == 10
    engine.send(engine.request("session", "a", prompt=1))
    engine.finish()
    assert engine.answers["b"] == 30


@pytest.mark.parametrize(
    ("settings", "direct"),
    [(Settings(), False), (Settings(fair=True), False), (Settings(fair=True, slots=8), True)],
)
def test_idle_sessions_keep_no_slot_where_there_are_slots_for_all(
    make: Make, settings: Settings, direct: bool
) -> None:
    """As by stock code, which is the first of these: it holds their next pieces back itself."""
    engine = make(settings, direct=direct)
    tasks = "abc"
    assert len(tasks) == engine.scheduler.lora_config.max_loras
    engine.send(*(engine.request(f"session {t}", t, resumable=True) for t in tasks))
    for _ in range(10):
        engine.step()
    engine.send(engine.request("d", "d"))
    for _ in range(20):
        engine.step()
    assert engine.answers["d"] == 5
    engine.send(*(engine.request(f"session {t}", t, prompt=1) for t in tasks))
    engine.finish()


def test_a_scheduler_is_stock_where_there_are_slots_for_all(make: Make) -> None:
    engine = make(Settings(slots=8), direct=True)
    assert not hasattr(engine.scheduler, "_vlora_tenants")
    engine.send(engine.request("a", "a"))
    engine.finish()
    assert engine.answers["a"] == 5
