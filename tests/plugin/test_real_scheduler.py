"""vLLM's own scheduler with the exchanged queue, and no model: what is sampled is made up."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from real_scheduler import ROOM, a_model, a_request, a_scheduler

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

    request = staticmethod(a_request)

    def send(self, *requests: Any) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def step(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        self.preempted += len(output.preempted_req_ids or ())
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

    def finish(self) -> None:
        for _ in range(5000):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        scheduler = self.scheduler
        assert not scheduler.has_unfinished_requests()
        assert not scheduler.requests
        assert not scheduler._vlora_tenants.waiting
        assert scheduler.get_request_counts() == (0, 0)


@pytest.fixture
def make(model: str) -> Callable[..., Engine]:
    limits = importlib.import_module("vllm_vlora.plugin.limits")

    def make(settings: Settings, policy: str = "fcfs", blocks: int = 1000) -> Engine:
        from vllm.v1.core.sched.scheduler import Scheduler

        patched = type("Scheduler", (Scheduler,), {})
        places = find_seams(direct=True, limits=True)
        own = {
            name: Place(patched, place.attribute, place.value)
            for name, place in places.items()
            if place.owner is Scheduler
        }
        for owner, name, value in limits.limit_tasks([], settings, places | own):
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
