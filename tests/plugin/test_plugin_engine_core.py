"""What takes the place of methods of vLLM's engine core, over one that stands in for it."""

from __future__ import annotations

import queue
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from residency_world import Executor, Workers, lora, path_of

from vllm_vlora.errors import CheckpointError, MemoryBudgetError, ModelStateError
from vllm_vlora.plugin import engine_core, exchange, workers
from vllm_vlora.plugin.admission import pinned_of
from vllm_vlora.plugin.arrivals import Waiter
from vllm_vlora.plugin.counters import counters_of
from vllm_vlora.plugin.engine_core import (
    advance_after_abort,
    ensure_in_process,
    finish_who_waits,
    follow,
    keep_what_is_pinned,
    load_before_add_lora,
    load_before_add_request,
    release_what_is_removed,
    served_tasks,
    tasks_of,
)
from vllm_vlora.plugin.published import (
    adopt,
    leave_devices,
    release_first,
    return_to_devices,
)
from vllm_vlora.plugin.residency import Residency
from vllm_vlora.plugin.resident import BasesReport


class Scheduler:
    """The part of vLLM's scheduler that is patched and read."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.finished: list[str] = []
        self._vlora_kinds = {path_of("b"): True}

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request

    def has_requests(self) -> bool:
        return bool(self.requests)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
        ids = list(self.requests) if request_ids is None else request_ids
        done = [self.requests.pop(name) for name in ids if name in self.requests]
        self.finished += [request.request_id for request in done]
        return done

    finish_requests = finish_who_waits(finish_requests, add_request)  # type: ignore[assignment]


class Core:
    """The part of vLLM's engine core that is patched and read; two workers of one budget."""

    workers_count = 2

    def __init__(self, budget: int = 10, **sizes: int) -> None:
        count = self.workers_count
        self.workers = Workers([budget] * count, {name: [n] * count for name, n in sizes.items()})
        self.added: list[Any] = []
        self.dropped: list[str] = []
        self.exchanged: list[int] = []
        self.wants_bases = self.holds_back = False
        # What was on the first device when it was told to give up its bases.
        self.left_bases: list[set[str]] = []
        # Of what they begin with, by worker.
        self.runs_direct = [True] * count
        self.pinned = {ord("a")}
        self.states: list[list[str]] = [["1", "1"], ["1", "1"]]
        self.tasks = [[("a", path_of("a"))], [("a", path_of("a"))]]
        self.model_executor = Executor(
            [self._manager(number) for number in range(self.workers_count)]
        )
        self.batch_queue = None
        self.scheduler = Scheduler()

    def _manager(self, number: int) -> Any:
        workers = self.workers

        def adopt(digest: str) -> bool:
            state = self.states[number]
            if state[1] == digest:
                state[0] = digest
            return state[0] == digest

        def forget(path: str, wholly: bool) -> None:
            workers.on[number].discard(_name(path))
            self.dropped += [_name(path)] * (wholly and number == 0)

        return SimpleNamespace(
            bring=lambda *args: self._bring(number, *args),
            hold=lambda request, instead_of: workers.hold(request, instead_of)[number],
            forget=forget,
            held_paths=lambda: {
                path_of(name): self.runs_direct[number] for name in workers.on[number]
            },
            # Of a folder that this process does not see as they do.
            state=lambda: (*self.states[number], "/nowhere", (1,)),
            adopt=adopt,
            vlora_store=SimpleNamespace(
                served=lambda: self.tasks[number],
                tidy=lambda: None,
                # Of a task from memory there is nothing to read again.
                discard=lambda path: workers.broken.add(_name(path)),
                bases=lambda in_use, awaited: self.bases(number, in_use, awaited),
                hold_back=self.hold_back,
                leave_bases=lambda: self.left_bases.append(set(workers.on[number])),
            ),
            exchange_bases=lambda: self.exchanged.append(number) or [path_of("a")],
        )

    def _bring(self, number: int, requests: Any, *question: Any) -> list[Any]:
        said: list[Any] = self.workers.bring_to(number, requests, *question)
        wait = self.holds_back and not self.exchanged
        return [
            None if wait and one.lora_name == "b" else told for one, told in zip(requests, said)
        ]

    def hold_back(self, held_back: bool) -> list[str]:
        self.holds_back = held_back
        return [path_of("b")] if held_back and "b" in self.workers.on[0] else []

    def bases(self, number: int, in_use: list[str], awaited: list[str]) -> BasesReport:
        if not self.wants_bases or number in self.exchanged:
            return BasesReport()
        return BasesReport(True, True, busy=path_of("a") in (*in_use, *awaited))

    def add_lora(self, lora_request: Any) -> bool:
        self.added.append(lora_request)
        return True

    def add_request(self, request: Any, request_wave: int = 0) -> None:
        self.added.append(request.request_id)
        self.scheduler.requests[request.request_id] = request

    def abort_requests(self, request_ids: list[str]) -> None:
        self.scheduler.finish_requests(request_ids, "aborted")

    def pin_lora(self, lora_id: int) -> bool:
        return lora_id in self.pinned

    def remove_lora(self, lora_id: int) -> bool:
        return lora_id in self.pinned

    add_lora = load_before_add_lora(add_lora)  # type: ignore[assignment]
    add_request = load_before_add_request(add_request)  # type: ignore[assignment]
    abort_requests = advance_after_abort(abort_requests)  # type: ignore[assignment]
    pin_lora = keep_what_is_pinned(pin_lora)  # type: ignore[assignment]
    remove_lora = release_what_is_removed(remove_lora)  # type: ignore[assignment]


class OwnProcess(Core):
    """One that a raised error would end, and whose loop takes messages."""

    def __init__(self, budget: int = 10, **sizes: int) -> None:
        super().__init__(budget, **sizes)
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue: queue.Queue[Any] = queue.Queue()

    def refused(self) -> list[tuple[int, str, str]]:
        """Of every request that was: its client, its id and why."""
        found = []
        while not self.output_queue.empty():
            client, outputs = self.output_queue.get_nowait()
            found += [(client, end.request_id, end.stop_reason) for end in outputs.outputs]
        return found

    def turn(self) -> None:
        """One message of the loop, as vLLM takes it."""
        _, payload = self.input_queue.get(timeout=10)
        self.abort_requests(payload)


class OneWorker(OwnProcess):
    """One with a single worker."""

    workers_count = 1


def _name(path: str) -> str:
    return path.split("/")[-1][0]


def request(name: str, adapter: Any) -> Any:
    return SimpleNamespace(request_id=name, client_index=3, lora_request=adapter)


def test_in_the_callers_process_a_task_is_loaded_first() -> None:
    core: Any = Core(a=4, b=4, c=40)
    peft = SimpleNamespace(lora_name="peft", lora_path="/peft")
    for number, adapter in enumerate((None, peft, lora("a"))):
        core.add_request(request(str(number), adapter), 1)
    assert core.added == ["0", "1", "2"]
    assert core.workers.told == ["a", "a"]
    assert core.add_lora(peft)
    assert core.add_lora(lora("b"))
    ensure_in_process(SimpleNamespace(engine_core=core), lora("b"))
    ensure_in_process(SimpleNamespace(), lora("b"))
    with pytest.raises(MemoryBudgetError, match="no room for task 'c'"):
        core.add_request(request("3", lora("c")))
    with pytest.raises(MemoryBudgetError, match="no room for task 'c'"):
        ensure_in_process(SimpleNamespace(engine_core=core), lora("c"))
    assert core.added[:3] == ["0", "1", "2"]


def test_in_its_own_process_a_request_waits_and_others_go_on() -> None:
    core: Any = OwnProcess(a=4, b=4)
    core.workers.on[0].add("b")
    core.workers.on[1].add("b")
    core.add_request(request("1", lora("a")), 1)
    core.add_request(request("2", lora("b")), 1)
    core.add_request(request("3", lora("a")), 1)
    assert core.added == ["2"]
    for _ in range(3):
        core.turn()
    assert core.added == ["2"]
    core.workers.stage("a")
    for _ in range(2):  # One worker may have read it before the other.
        core.turn()
    assert core.added == ["2", "1", "3"]
    core.add_request(request("4", lora("a")), 1)
    assert core.added[-1] == "4"
    # Nothing is waited for: the loop may sleep.
    time.sleep(0.05)
    while not core.input_queue.empty():
        core.turn()
    time.sleep(0.05)
    assert core.input_queue.empty()


def test_a_version_that_was_waited_for_is_not_let_go_while_its_requests_enter() -> None:
    class Published(OneWorker):
        add_request = release_first(OneWorker.add_request)  # As seams put it.
        abort_requests = release_first(OneWorker.abort_requests)

    core: Any = Published(a=4, b=4)
    adopt(core, "t", path_of("a"))
    for number in "12":
        core.add_request(request(number, lora("a")))
    adopt(core, "t", path_of("b"))
    core.workers.stage("a")
    for _ in range(2):
        core.turn()
    assert (core.added, core.refused()) == (["1", "2"], [])
    assert core.workers.on == [{"a"}]


@pytest.fixture
def data_parallel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own of several engine cores that step together, over the one that stands in."""
    vllm_core = pytest.importorskip("vllm.v1.engine.core")
    interface = pytest.importorskip("vllm.v1.core.sched.interface")
    monkeypatch.setattr(vllm_core.EngineCore, "add_request", OneWorker.add_request)
    core = vllm_core.DPEngineCoreProc.__new__(vllm_core.DPEngineCoreProc)
    core.__dict__ |= OneWorker(a=4).__dict__
    core.has_coordinator, core.current_wave, core.engines_running = True, 4, False
    core.ignore_start_dp_wave = False
    core.scheduler.pause_state = interface.PauseState.UNPAUSED
    return core


@pytest.mark.parametrize(
    ("wave", "running", "told"),
    [
        # Peers were told of this wave.
        (4, True, []),
        # And of a later one, which this one has not heard of.
        (5, True, []),
        # Of one that is over they have to be told.
        (3, True, [4]),
    ],
)
def test_a_data_parallel_core_whose_request_waits_steps_with_its_peers(
    data_parallel: Any, wave: int, running: bool, told: list[int]
) -> None:
    core = data_parallel
    core.add_request(request("1", lora("a")), wave)
    assert core.added == []
    assert core.engines_running is running
    outputs = [core.output_queue.get_nowait()[1] for _ in range(core.output_queue.qsize())]
    assert [output.start_wave for output in outputs] == told


@pytest.mark.parametrize("ignores", [False, True])
def test_a_paused_data_parallel_core_steps_with_nobody(data_parallel: Any, ignores: bool) -> None:
    core = data_parallel
    core.ignore_start_dp_wave = ignores
    if not ignores:
        core.scheduler.pause_state = type(core.scheduler.pause_state).PAUSED_ALL
    core.add_request(request("1", lora("a")), 4)
    assert core.engines_running is False


def test_a_task_that_cannot_be_loaded_ends_its_requests_alone() -> None:
    core: Any = OwnProcess(a=4, b=4)
    core.workers.broken.add("a")
    core.workers.stage("a", "b")
    core.add_request(request("1", lora("a")))
    core.add_request(request("2", lora("b")))
    core.turn()
    assert core.refused() == [(3, "1", "vllm-vlora: CheckpointError: task 'a': a is damaged")]
    assert core.added == ["2"]
    answer = core.add_lora(lora("a"))
    core.turn()
    with pytest.raises(CheckpointError, match="a is damaged"):
        answer.result(0)
    answer = core.add_lora(lora("b"))
    assert answer is True


def test_an_adapter_is_made_when_its_task_has_come() -> None:
    core: Any = OwnProcess(a=4)
    wanted = lora("a")
    answer = core.add_lora(wanted)
    assert not answer.done()
    core.turn()
    core.workers.stage("a")
    for _ in range(2):
        core.turn()
    assert answer.result(0) is True
    assert core.added == [wanted]


def test_aborted_requests_that_wait_never_enter() -> None:
    core: Any = OwnProcess(a=4)
    core.add_request(request("1", lora("a")))
    core.add_request(request("2", lora("a")))
    core.abort_requests(["1"])
    assert core.scheduler.finished == ["1"], "as any other, with what others keep for it"
    core.workers.stage("a")
    for _ in range(2):
        core.turn()
    assert core.added == ["2"]
    # What nobody waits for is told with the next question, and the loop may sleep.
    core.add_request(request("3", lora("b")))
    assert core.scheduler.finish_requests(None, "aborted")
    assert core.scheduler.finished == ["1", "2", "3"]
    core.turn()
    assert core.dropped == ["b"]
    time.sleep(0.05)
    while not core.input_queue.empty():
        core.turn()
    time.sleep(0.05)
    assert core.input_queue.empty()


def test_a_loop_that_would_be_woken_late_is_woken_when_there_is_something_new() -> None:
    ticker = engine_core._Ticker(core := OwnProcess())
    ticker.run(3600.0)
    ticker.run(0.002)
    assert core.input_queue.get(timeout=10)[1] == []
    ticker.run(None)
    ticker.run(3600.0)
    while not core.input_queue.empty():
        core.input_queue.get_nowait()
    ticker.run(0.0)
    assert core.input_queue.get(timeout=10)[1] == []
    ticker.run(None)


def test_questions_that_a_task_costs() -> None:
    """Each waits for the step that the workers are at, in an executor with processes of its own."""
    core: Any = OwnProcess(a=4)
    alone, ray = cast("list[Any]", [OneWorker(a=4), OneWorker(a=4)])
    ray.model_executor.uses_ray = True
    for one, questions in ((core, 2), (alone, 1), (ray, 1)):
        one.workers.stage("a")
        one.add_request(request("1", lora("a")))
        asked = ["_held", "_freeze_heap"] + ["_bring"] * questions
        for _ in range(questions - 1):
            one.turn()
        assert one.added == ["1"]
        assert one.model_executor.asked == asked
        one.add_request(request("2", lora("a")))
        assert one.model_executor.asked == asked, "what is there costs none"


def test_asleep_nothing_is_brought() -> None:
    core: Any = OneWorker(a=4)
    core.workers.stage("a")
    core.model_executor.is_sleeping = True
    core.add_request(request("1", lora("a")))
    core.turn()
    assert core.model_executor.asked == ["_held", "_freeze_heap"]
    core.model_executor.is_sleeping = False
    core.turn()
    assert core.added == ["1"]
    offline: Any = Core(a=4)
    offline.model_executor.is_sleeping = True
    with pytest.raises(ModelStateError, match="'a' is not on the device, and the engine sleeps"):
        offline.add_request(request("1", lora("a")))


def _sleep_and_wake(core: Any) -> None:
    """Level 2, which loses the devices' memory, while requests stay in the scheduler."""
    core.model_executor.is_sleeping = True
    leave_devices(core)
    assert core.workers.on == [set()] * core.workers_count
    core.model_executor.is_sleeping = False
    return_to_devices(core)


def test_what_requests_need_that_stayed_inside_is_back_before_others_take_its_room() -> None:
    core: Any = OneWorker(budget=6, a=4, b=4, o=2)
    core.workers.on[0] |= {"a", "o"}
    core.workers.stage("a", "b")
    core.add_request(request("1", lora("a")))
    core.add_request(request("2", lora("a")))
    _sleep_and_wake(core)
    assert core.workers.on == [{"a"}], "and what no request needs when it is asked for"
    core.add_request(request("3", lora("b")))
    for _ in range(2):
        core.turn()
    assert core.added == ["1", "2"]
    assert core.workers.on == [{"a"}]
    assert list(tasks_of(core).residency.paths()) == [path_of("a")]
    core.scheduler.requests.clear()
    core.turn()
    assert core.added == ["1", "2", "3"]


def test_requests_inside_whose_task_does_not_come_back_end_alone() -> None:
    core: Any = OneWorker(budget=8, a=4, c=4)
    core.workers.on[0] |= {"a", "c"}
    for name, task in (("1", "a"), ("2", "c"), ("3", "a")):
        core.add_request(request(name, lora(task)))
    core.add_request(request("4", None))
    core.workers.broken.add("a")
    _sleep_and_wake(core)
    why = "vllm-vlora: CheckpointError: task 'a': a is damaged"
    assert core.refused() == [(3, "1", why), (3, "3", why)]
    assert counters_of(core).snapshot()["refusals"]["checkpoint"] == 2
    assert list(core.scheduler.requests) == ["2", "4"]
    assert core.scheduler.finished == ["1", "3"]
    assert core.workers.on == [{"c"}]


def test_in_the_callers_process_it_hears_what_does_not_come_back() -> None:
    core: Any = Core(budget=8, a=4, c=4)
    for name in "ac":
        core.add_request(request(name, lora(name)))
    core.workers.broken.add("a")
    with pytest.raises(CheckpointError, match="a is damaged"):
        _sleep_and_wake(core)
    assert core.workers.on == [{"c"}] * 2
    assert list(core.scheduler.requests) == ["a", "c"], "the caller's, to be aborted"


def test_who_leaves_the_devices_leaves_no_bases_there() -> None:
    core: Any = OneWorker(a=4, b=4)
    leave_devices(core)
    assert not core.left_bases, "no task has come yet"
    core.workers.stage("a")
    core.add_request(request("1", lora("a")))
    assert core.workers.on == [{"a"}]
    leave_devices(core)
    assert core.left_bases == [set()]


def test_a_pinned_task_stays_until_it_is_removed() -> None:
    core: Any = Core(budget=4, a=4, b=4)
    core.add_lora(lora("a"))
    assert core.pin_lora(ord("a"))
    assert not core.pin_lora(ord("b"))
    with pytest.raises(MemoryBudgetError, match="beside 1 that are pinned"):
        core.add_lora(lora("b"))
    assert core.remove_lora(ord("a"))
    assert core.add_lora(lora("b"))


@pytest.mark.parametrize("max_loras", [3, 64])
def test_the_last_slot_is_not_pinned(max_loras: int) -> None:
    """Who needs one of the few slots would wait for ever; direct tasks need none."""

    class Pinning:
        pin_lora = keep_what_is_pinned(lambda self, lora_id: True, slots=3)
        remove_lora = release_what_is_removed(lambda self, lora_id: True)

        def __init__(self) -> None:
            manager = SimpleNamespace(is_direct=lambda lora_id: lora_id > 9)
            self._vlora_tasks_held = SimpleNamespace(
                residency=Residency(Workers([1], {}), set),
                workers=workers.Workers(Executor([manager])),
            )
            self.scheduler = SimpleNamespace(lora_config=SimpleNamespace(max_loras=max_loras))

    core: Any = Pinning()
    for number in (1, 1, 2, 10, 11, 12):
        assert core.pin_lora(number)
    with pytest.raises(ModelStateError, match=r"adapter 3 is not pinned.*VLLM_VLORA_SLOTS"):
        core.pin_lora(3)
    assert core.remove_lora(1)
    assert core.pin_lora(3)
    assert pinned_of(core.scheduler) == {2, 3}


def test_what_gave_way_is_asked_anew_how_it_runs() -> None:
    core: Any = Core(budget=4, b=4, c=4)
    core.add_lora(lora("b"))
    core.add_lora(lora("c"))
    assert core.scheduler._vlora_kinds == {path_of("c"): False}, "as the workers said of it"


@pytest.mark.parametrize("direct", [[True, True], [True, False]])
def test_how_tasks_run_that_were_there_from_the_start_is_known_without_a_question(
    direct: list[bool],
) -> None:
    core: Any = Core()
    core.runs_direct = direct
    for held in core.workers.on:
        held.update("at")
    core.workers.on[1].add("only here")
    core.scheduler._vlora_kinds.clear()
    core.add_lora(lora("t"))
    assert core.scheduler._vlora_kinds == dict.fromkeys(map(path_of, "at"), all(direct))
    assert core.model_executor.asked == ["_held", "_freeze_heap"]


def test_an_engine_core_says_what_all_its_workers_serve() -> None:
    core: Any = Core()
    core.tasks = [[("b", path_of("b")), ("a", path_of("a"))]] * 2
    assert served_tasks(core) == core.tasks[0]
    core.tasks = [core.tasks[0], core.tasks[0][:1]]
    with pytest.raises(CheckpointError, match="published again while the engine started"):
        served_tasks(core)


def test_a_published_state_is_served_once_all_workers_offer_it() -> None:
    core: Any = Core()
    assert follow(core) == "1"
    core.states[0][1] = "2"
    assert follow(core) == "1"
    assert core.states == [["1", "2"], ["1", "1"]]
    core.states[1][1] = "3"
    assert follow(core) == "1"
    core.states[0][1] = "3"
    assert follow(core) == "3"
    assert core.states == [["3", "3"], ["3", "3"]]


def test_a_worker_that_lags_behind_is_told_again() -> None:
    core: Any = Core()
    core.states = [["2", "2"], ["1", "2"]]
    assert follow(core) == "2"
    assert core.states == [["2", "2"]] * 2
    core.states = [["2", "2"], ["1", "1"]]
    assert follow(core) == "", "nothing is listed that not all of them serve"


def test_a_task_that_is_published_no_more_stays_for_those_who_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_vlora.plugin.residency.GRACE", 0.0)
    core: Any = Core(a=4)
    tasks, entered = tasks_of(core), list[str]()
    tasks.residency.place(lora("a"))
    tasks.residency.retire([])
    # The workers say that they hold it before they are told to forget it.
    tasks.arrivals.wait(lora("a"), Waiter(lambda: entered.append("a"), pytest.fail))
    follow(core)
    assert (entered, core.dropped) == (["a"], [])
    assert core.workers.on == [{"a"}, {"a"}]
    follow(core)
    assert core.dropped == ["a"]


def test_requests_on_new_bases_wait_for_those_on_the_old_ones_and_others_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "_LINGER", 0.01)
    monkeypatch.setattr(exchange, "_PERIOD", 0.0)
    core: Any = OwnProcess(a=2, b=2, **dict.fromkeys("cdefghij", 0))
    core.workers.stage(*"abcdefghij")
    core.add_request(request("old", lora("a")))
    core.turn()
    assert core.added == ["old"]
    core.wants_bases = core.holds_back = True
    core.states = [["1", "2"], ["1", "2"]]
    assert follow(core, "server", "1") == "2"
    for number in range(9):
        core.add_request(request(f"new {number}", lora("b")))
    for name in "cdefghij":
        core.add_request(request(name, lora(name)))
    for _ in range(12):
        core.turn()
    assert core.added == ["old", *"cdefghij"], "who waits for bases is in nobody's way"
    core.states = [["2", "3"], ["2", "3"]]
    assert follow(core, "server", "2") == "2", "no other state meanwhile"
    time.sleep(0.02)
    core.turn()
    assert core.exchanged == []
    del core.scheduler.requests["old"]
    follow(core, "server", "1")
    time.sleep(0.02)
    core.turn()
    assert core.exchanged == [], "an API server still lists what was before"
    follow(core, "server", "2")
    time.sleep(0.02)
    core.turn()
    assert core.exchanged == [0, 1]
    while len(core.added) < 18:
        core.turn()
    assert core.added[9:] == [f"new {number}" for number in range(9)]
    assert path_of("a") not in core.scheduler._vlora_kinds
    assert follow(core, "server", "2") == "3"


def test_a_task_that_was_materialized_meanwhile_keeps_its_requests_and_takes_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, seconds in (("_LINGER", 0.01), ("_PERIOD", 0.0), ("_REST", 1.0)):
        monkeypatch.setattr(exchange, name, seconds)
    monkeypatch.setenv("VLLM_VLORA_BASIS_WAIT", "1")
    core: Any = OwnProcess(a=2, b=2)
    core.workers.stage("a", "b")
    core.add_request(request("old", lora("a")))
    core.turn()
    core.wants_bases = core.holds_back = True
    core.states = [["1", "2"], ["1", "2"]]
    follow(core)
    core.add_request(request("waits", lora("b")))
    assert core.added == ["old"]

    def turn_until(holds: Any) -> None:
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline
            follow(core)
            time.sleep(0.01)

    tasks = core._vlora_tasks_held
    turn_until(lambda: not tasks.exchange.holds_back)
    turn_until(lambda: "waits" in core.added)
    turn_until(lambda: tasks.exchange.holds_back)
    core.add_request(request("later", lora("b")))
    core.add_request(request("gone", lora("b")))
    follow(core)
    assert core.added == ["old", "waits"], "it is there, and to be exchanged"
    core.abort_requests(["gone"])
    assert core.workers.on == [{"a", "b"}] * 2, "a request that runs has it"
    core.abort_requests(["later"])
    assert core.workers.on == [{"a", "b"}] * 2
    core.add_request(request("last", lora("b")))
    core.scheduler.requests.clear()
    turn_until(lambda: "last" in core.added)
    assert core.exchanged == [0, 1]
