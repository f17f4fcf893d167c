"""The slot writer: what it writes, what it zeroes, and what it leaves alone because it is zero."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vllm_vlora.plugin.layouts import Run, SliceLayout
from vllm_vlora.plugin.resident import ResidentTask
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.quantize import pack
from vllm_vlora.representations.stored import SideSource

D_IN, D_OUT, MAX_RANK, SLOTS = 48, 64, 8, 2
MODULES = ("one", "two", "three")


class Model:
    """Slots of three linears, the last of them split into two runs as a merged layer's are."""

    def __init__(self) -> None:
        self.a = {name: torch.full((SLOTS, 1, MAX_RANK, D_IN), torch.nan) for name in MODULES}
        self.b = {name: torch.full((SLOTS, 1, D_OUT, MAX_RANK), torch.nan) for name in MODULES}
        layouts = [self._layout(name, (Run(0, 0, D_OUT),)) for name in MODULES[:2]]
        layouts.append(self._layout("three", (Run(32, 0, 32), Run(0, 32, 32))))
        self.writer = SlotWriter(layouts, MAX_RANK)

    def _layout(self, name: str, runs_b: tuple[Run, ...]) -> SliceLayout:
        a, b = self.a[name], self.b[name]
        return SliceLayout(
            name, lambda s: a[s, 0], lambda s: b[s, 0].T, D_IN, D_OUT, (Run(0, 0, D_IN),), runs_b
        )

    def assert_holds(self, slot: int, task: ResidentTask) -> None:
        for name in MODULES:
            a, b = torch.zeros(MAX_RANK, D_IN), torch.zeros(D_OUT, MAX_RANK)
            if name in task.sources:
                source_a, source_b = task.sources[name]
                a[: source_a.rank] = source_a.to_dense()
                b[:, : source_b.rank] = source_b.to_dense().T
            if name == "three":
                b = torch.cat([b[32:], b[:32]])
            torch.testing.assert_close(self.a[name][slot, 0], a)
            torch.testing.assert_close(self.b[name][slot, 0], b)


def make_task(number: int, ranks: dict[str, int], format: str = "nf4") -> ResidentTask:
    """A private task; module ``two`` is joint."""
    generator = torch.Generator().manual_seed(number)

    def source(rank: int, width: int, joint: bool) -> SideSource:
        left = torch.randn(rank, 12, generator=generator) if joint else None
        matrix = torch.randn(12 if joint else rank, width, generator=generator)
        return SideSource(pack(matrix, format), left, 2.0)

    sources = {
        name: (source(rank, D_IN, name == "two"), source(rank, D_OUT, name == "two"))
        for name, rank in ranks.items()
    }
    return ResidentTask(f"task{number}", f"path{number}", max(ranks.values()), sources, {})


TASKS = [
    make_task(0, {"one": 8, "two": 3, "three": 5}),
    make_task(1, {"one": 2, "three": 8}, "bfloat16"),
    make_task(2, {"two": 6}, "int8"),
    make_task(3, {"one": 4, "two": 1, "three": 1}, "nf4-dq"),
]


def test_every_slot_holds_its_last_task_and_nothing_of_those_before() -> None:
    model = Model()
    order = torch.randint(len(TASKS), (24,), generator=torch.Generator().manual_seed(0)).tolist()
    held: dict[int, ResidentTask] = {}
    for step, number in enumerate(order):
        slot = step % SLOTS
        model.writer.write(slot, TASKS[number])
        held[slot] = TASKS[number]
        for written, task in held.items():
            model.assert_holds(written, task)


def test_preparing_a_task_compiles_its_writes_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_vlora.triton_kernels.materialize_torch import TorchPlan

    model, compiled = Model(), []
    monkeypatch.setattr(TorchPlan, "warm_up", lambda plan: compiled.append(plan))
    model.writer.prepare(TASKS[0])
    assert compiled == [model.writer._plans[TASKS[0].path].plan]
    assert all(slots.isnan().all() for slots in (*model.a.values(), *model.b.values()))
    model.writer.write(1, TASKS[0])
    model.assert_holds(1, TASKS[0])


def test_what_is_known_to_be_zero_is_not_written_until_it_is_forgotten() -> None:
    model = Model()
    model.writer.write(0, TASKS[2])
    model.a["one"][0] = 7.0  # Behind the writer's back.
    model.writer.write(0, TASKS[2])
    assert (model.a["one"][0] == 7.0).all()
    model.writer.forget(0)
    model.writer.write(0, TASKS[2])
    model.assert_holds(0, TASKS[2])


def test_a_write_that_fails_leaves_the_slot_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.writer.write(0, TASKS[2])
    model.writer.prepare(TASKS[0])
    plan = model.writer._plans[TASKS[0].path].plan

    def fail(outs: object) -> None:
        model.a["one"][0] = 7.0
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(plan, "run", fail)
        with pytest.raises(RuntimeError):
            model.writer.write(0, TASKS[0])
    model.writer.write(0, TASKS[2])
    model.assert_holds(0, TASKS[2])


def test_slots_whose_content_was_lost_are_written_whole() -> None:
    """vLLM removes all adapters when it has loaded its weights again, after a sleep of level 2."""
    from vllm_vlora.plugin.manager import TaskLoRAManager

    model = Model()
    manager = object.__new__(TaskLoRAManager)
    manager.lora_config = SimpleNamespace(max_loras=SLOTS)
    manager._direct_models, manager._writer = {}, model.writer
    manager._registered_adapters, manager._active_adapters = {}, {}  # type: ignore[assignment]
    for task in TASKS[:2]:
        model.writer.write(1, task)
    for stack in (*model.a.values(), *model.b.values()):
        stack.fill_(torch.nan)
    manager.remove_all_adapters()
    model.writer.write(1, TASKS[2])
    model.assert_holds(1, TASKS[2])


@pytest.mark.parametrize("first", [0, 4])
def test_a_rank_of_fully_sharded_slots_holds_its_rows_of_a(first: int) -> None:
    """Two ranks share A's rows; of a task of few the second has some, or none."""
    held = MAX_RANK // 2
    a = torch.full((SLOTS, 1, held, D_IN), torch.nan)
    b = torch.full((SLOTS, 1, D_OUT, MAX_RANK), torch.nan)
    whole = (Run(0, 0, D_IN),), (Run(0, 0, D_OUT),)
    views = (lambda s: a[s, 0]), (lambda s: b[s, 0].T)
    layout = SliceLayout("two", *views, D_IN, D_OUT, *whole, first_row=first)
    writer = SlotWriter([layout], MAX_RANK)
    ranks = [8, 6, 4, 3, 8]
    for joint in (True, False):
        for number, rank in enumerate(ranks):
            task = make_task(number, {"two" if joint else "one": rank})
            sources = {"two": next(iter(task.sources.values()))}
            task = replace(task, path=f"{joint} {number}", sources=sources)
            writer.write(0, task)
            source_a, source_b = sources["two"]
            whole_a, whole_b = torch.zeros(MAX_RANK, D_IN), torch.zeros(D_OUT, MAX_RANK)
            whole_a[:rank], whole_b[:, :rank] = source_a.to_dense(), source_b.to_dense().T
            torch.testing.assert_close(a[0, 0], whole_a[first : first + held])
            torch.testing.assert_close(b[0, 0], whole_b)
