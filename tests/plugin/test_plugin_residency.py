"""Which late tasks are held: workers of given budgets, and requests that come and go."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vlora.errors import CheckpointError, MemoryBudgetError, VLoRAError
from vllm_vlora.plugin.admission import Admission
from vllm_vlora.plugin.residency import (
    Held,
    Residency,
    ensure_before_add_lora,
    ensure_before_add_request,
    leave_memory,
    tasks_at_start,
)

DIGEST = "0123456789abcdef" * 2


def path_of(name: str) -> str:
    return f"/ck/tasks/{name}.safetensors@{DIGEST}"


def lora(name: str) -> Any:
    return SimpleNamespace(lora_name=name, lora_path=path_of(name))


class Workers:
    """Workers that hold tasks of given sizes, and what they were told; some tasks cannot be read."""

    def __init__(self, budgets: list[int], sizes: dict[str, list[int]]) -> None:
        self.budgets, self.sizes = budgets, sizes
        self.held: list[set[str]] = [set() for _ in budgets]
        self.preloaded = {"start"}
        self.broken: set[str] = set()
        self.told: list[str] = []
        self.used: set[str] = set()
        self.residency = Residency(self._hold, self._forget, lambda: set(map(path_of, self.used)))

    def nbytes(self, worker: int) -> int:
        return sum(self.sizes[name][worker] for name in self.held[worker])

    def _hold(self, request: Any) -> list[Held]:
        name = request.lora_name
        self.told.append(name)
        answers = []
        for worker, budget in enumerate(self.budgets):
            if name in self.preloaded:
                answers.append(Held(late=False))
            elif name in self.broken and worker == len(self.budgets) - 1:
                answers.append(Held(late=True, error=CheckpointError(f"{name} is damaged")))
            else:
                self.held[worker].add(name)
                answers.append(Held(late=True, over=self.nbytes(worker) - budget))
        return answers

    def _forget(self, path: str) -> None:
        (name,) = (name for name in [*self.sizes, "start"] if path_of(name) == path)
        for held in self.held:
            held.discard(name)


NAMES = list("abcdef")
sizes = st.fixed_dictionaries(
    {name: st.lists(st.integers(1, 6), min_size=2, max_size=2) for name in NAMES}
)
steps = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "ask", "done"]), st.sampled_from(NAMES)), max_size=40
)


@given(sizes=sizes, budgets=st.lists(st.integers(0, 14), min_size=2, max_size=2), script=steps)
def test_no_budget_is_passed_and_nothing_in_use_gives_way(
    sizes: dict[str, list[int]], budgets: list[int], script: list[tuple[str, str]]
) -> None:
    workers = Workers(budgets, sizes)
    order: OrderedDict[str, None] = OrderedDict()  # By last use.
    for kind, name in script:
        if kind == "done":
            workers.used.discard(name)
            continue
        before = set(workers.held[0])
        keep = [n for n in before if n in workers.used or n == name] + [name] * (name not in before)
        fits = (
            all(sum(sizes[n][w] for n in keep) <= budget for w, budget in enumerate(budgets))
            or name in before
        )
        if fits:
            workers.residency.ensure(lora(name))
            order[name] = None
            order.move_to_end(name)
            workers.used.add(name)
        else:
            with pytest.raises(MemoryBudgetError, match=f"no room for task '{name}'"):
                workers.residency.ensure(lora(name))
        assert workers.held[0] == workers.held[1]
        assert workers.used <= workers.held[0]
        assert all(workers.nbytes(w) <= budget for w, budget in enumerate(budgets))
        # Of those that no request needs, the ones that stayed were used after the ones that went.
        gone = [n for n in before - workers.held[0] if n not in workers.used]
        stayed = [n for n in before & workers.held[0] if n not in workers.used]
        ranks = list(order)
        assert all(ranks.index(g) < ranks.index(s) for g in gone for s in stayed)


def test_workers_are_asked_once_a_task() -> None:
    workers = Workers([10], {"a": [4], "b": [4]})
    for name in ("start", "a", "b", "a", "start", "b"):
        workers.residency.ensure(lora(name))
    assert workers.told == ["start", "a", "b"]


def test_a_task_that_one_worker_cannot_read_is_held_by_none() -> None:
    workers = Workers([10, 10], {"a": [4, 4]})
    workers.broken.add("a")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="a is damaged"):
            workers.residency.ensure(lora("a"))
        assert workers.held == [set(), set()]
    workers.broken.clear()
    workers.residency.ensure(lora("a"))
    assert workers.held == [{"a"}, {"a"}]


# --- the engine core -------------------------------------------------------------------------------


class Core:
    """The part of vLLM's engine core that is patched and read."""

    def __init__(self, answer: Held) -> None:
        self.answer = answer
        self.forgotten: list[str] = []
        self.added: list[Any] = []
        self.model_executor = SimpleNamespace(collective_rpc=self._rpc)
        self.scheduler = SimpleNamespace(requests={})

    def _rpc(self, method: Any, args: tuple[Any, ...]) -> list[Any]:
        manager = SimpleNamespace(hold=lambda request: self.answer, forget=self.forgotten.append)
        runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
        return [method(SimpleNamespace(model_runner=runner), *args)]

    def add_lora(self, lora_request: Any) -> bool:
        self.added.append(lora_request)
        return True

    def add_request(self, request: Any, request_wave: int = 0) -> None:
        self.added.append(request)


class OwnProcess(Core):
    """One that a raised error would end."""

    def __init__(self, answer: Held) -> None:
        super().__init__(answer)
        self.refused: list[Any] = []

    def _send_error_outputs_to_client(self, req_ids: list[str], client_index: int) -> None:
        self.refused.append((req_ids, client_index))


def request(name: str, adapter: Any) -> Any:
    return SimpleNamespace(request_id=name, client_index=3, lora_request=adapter)


def test_a_request_is_added_after_its_task_and_others_are_not_looked_at() -> None:
    add = ensure_before_add_request(Core.add_request)
    core: Any = Core(Held(late=True))
    peft = SimpleNamespace(lora_name="peft", lora_path="/peft")
    for number, adapter in enumerate((None, peft, lora("a"))):
        add(core, request(str(number), adapter), 1)
    assert [r.request_id for r in core.added] == ["0", "1", "2"]
    assert ensure_before_add_lora(Core.add_lora)(core, peft)
    assert ensure_before_add_lora(Core.add_lora)(core, lora("a"))
    assert core.forgotten == []


@pytest.mark.parametrize("kind", [Core, OwnProcess])
def test_a_request_whose_task_cannot_be_held_is_not_added(kind: type[Core]) -> None:
    core: Any = kind(Held(late=True, over=1))
    add = ensure_before_add_request(Core.add_request)
    if kind is Core:
        with pytest.raises(MemoryBudgetError):
            add(core, request("r", lora("a")))
    else:
        add(core, request("r", lora("a")))
        assert core.refused == [(["r"], 3)]
    with pytest.raises(VLoRAError):
        ensure_before_add_lora(Core.add_lora)(core, lora("a"))
    assert core.added == []
    assert core.forgotten == [path_of("a")] * 2


def test_requests_that_wait_for_a_slot_keep_their_tasks() -> None:
    core: Any = Core(Held(late=True))
    add = ensure_before_add_lora(Core.add_lora)
    for name in ("inside", "waiting", "idle"):
        add(core, lora(name))
    core.scheduler.requests["1"] = request("1", lora("inside"))
    core.scheduler._vlora_admission = Admission[Any](1, lambda name: True)
    for name in ("inside", "waiting"):
        core.scheduler._vlora_admission.enter(ord(name[0]), name, request(name, lora(name)))
    core.answer = Held(late=True, over=1)
    with pytest.raises(MemoryBudgetError):
        add(core, lora("more"))
    assert core.forgotten == [path_of("idle"), path_of("more")]


def test_an_engine_core_says_what_all_its_workers_loaded_at_the_start() -> None:
    def worker(*tasks: str) -> Any:
        held = [(task, path_of(task)) for task in tasks]
        manager = SimpleNamespace(vlora_store=SimpleNamespace(preloaded=lambda: held))
        runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
        return SimpleNamespace(model_runner=runner)

    def core(*workers: Any) -> Any:
        ask = SimpleNamespace(collective_rpc=lambda method: [method(one) for one in workers])
        return SimpleNamespace(model_executor=ask)

    same = [("b", path_of("b")), ("a", path_of("a"))]
    assert tasks_at_start(core(worker("b", "a"), worker("b", "a"))) == same
    with pytest.raises(CheckpointError, match="published again while the engine started"):
        tasks_at_start(core(worker("b", "a"), worker("b")))


@pytest.mark.parametrize(
    ("lora_config", "kv_bytes", "expected"),
    [
        (object(), None, [3 << 20, 1 << 20]),
        (None, None, [5 << 20, 3 << 20]),
        (object(), 1, [5 << 20, 3 << 20]),
    ],
)
def test_memory_is_left_where_vllm_measures_it(
    lora_config: object, kv_bytes: int | None, expected: list[int]
) -> None:
    executor = SimpleNamespace(
        lora_config=lora_config, cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_bytes)
    )
    assert leave_memory(lambda self: [5 << 20, 3 << 20], 2)(executor) == expected
    if expected[0] < 5 << 20:
        with pytest.raises(
            MemoryBudgetError, match=r"3 MiB are left .* VLLM_VLORA_LATE_MIB keeps 3 MiB"
        ):
            leave_memory(lambda self: [5 << 20, 3 << 20], 3)(executor)
    assert leave_memory(lambda self: [-1], 0)(executor) == [-1]
