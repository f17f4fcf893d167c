"""Direct tasks in the plugin, without an engine: path, slots, store, settings, admission, seams."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import ModelMismatchError, SettingError
from vllm_vlora.plugin import admission
from vllm_vlora.plugin.admission import Admission
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.direct_slots import DirectSlots
from vllm_vlora.plugin.identity import task_path
from vllm_vlora.plugin.layouts import LayerLayout, Run, SliceLayout
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.settings import Settings, read_settings
from vllm_vlora.quantize import PackedMatrix, pack, unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.stored import Basis
from vllm_vlora.triton_kernels.direct import (
    DirectTask,
    Routing,
    SlotTable,
    add_direct,
    make_task,
)

CPU = torch.device("cpu")
# d_in, d_out, and (k_out, k_in) of the basis, if there is one.
MODULES: dict[str, tuple[int, int, tuple[int, int] | None]] = {
    "q": (80, 256, (6, 5)),
    "k": (80, 40, (3, 4)),
    "v": (80, 40, None),
    "o": (96, 80, (7, 7)),
    "merged": (80, 96, None),
    "lm_head": (80, 100, None),
}
# Task -> module -> "joint" or "private", and the rank. On these bases the cores of rank 1 are kept as
# factors and the others dense.
TASKS: dict[str, dict[str, tuple[str, int]]] = {
    "joint": {"q": ("joint", 1), "k": ("joint", 9), "o": ("joint", 3)},
    "private": {"q": ("private", 3), "v": ("private", 1), "o": ("private", 5)},
    "mixed": {"q": ("joint", 4), "k": ("private", 2), "v": ("private", 6), "o": ("joint", 1)},
    "one": {"o": ("private", 2)},
}
LAYERS = {"qkv": ("q", "k", "v"), "o_proj": ("o",)}


def build(
    folder: Path,
    tasks: dict[str, dict[str, tuple[str, int]]] = TASKS,
    *,
    basis: str = "float32",
    private: str = "nf4",
    seed: int = 0,
    extra: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Checkpoint:
    """A checkpoint of these tasks with random weights, of which x of order 1 makes y of order 1."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    bases: dict[str, Basis] = {}
    for name, (d_in, d_out, k) in MODULES.items():
        if k is not None:
            u, v = (
                torch.linalg.qr(torch.randn(d, rows, generator=generator))[0].T.contiguous()
                for d, rows in ((d_out, k[0]), (d_in, k[1]))
            )
            bases[name] = Basis(pack(u, basis), pack(v, basis))
        writer.add_module(name, d_in, d_out, basis=bases.get(name))
    for task, parts in tasks.items():
        stored = {}
        for name, (kind, rank) in parts.items():
            d_in, d_out, _ = MODULES[name]
            a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            b = torch.randn(d_out, rank, generator=generator)
            if kind == "joint":
                u, v = unpack(bases[name].u), unpack(bases[name].v)
                stored[name] = replace(encode_joint(8 * a, b, 2.0, u, v, "float32"), scale=-0.5)
            else:
                stored[name] = encode_private(a, b, 1.5, private)
        writer.add_task(
            task, stored, original_nbytes=1, error=0.0, adapter_config={},
            extra=(extra or {}).get(task),
        )  # fmt: skip
    writer.finish("card")
    return Checkpoint.open(folder)


def nothing(slot: int) -> torch.Tensor:
    raise AssertionError("a direct task looked at a slot")


def layout(name: str, runs_a: tuple[Run, ...], runs_b: tuple[Run, ...]) -> SliceLayout:
    d_in, d_out, _ = MODULES[name]
    return SliceLayout(name, nothing, nothing, d_in, d_out, runs_a, runs_b)


def layouts(rank: int = 0, ranks: int = 1) -> list[LayerLayout]:
    """qkv column-parallel and o_proj row-parallel, as tensor-parallel rank ``rank`` has them.

    With two ranks q is cut at 128, a multiple of NF4's blocks, k and v at 20 and o at 48.
    """

    def share(width: int) -> tuple[Run, ...]:
        return (Run(width // ranks * rank, 0, width // ranks),)

    found = []
    for layer, names in LAYERS.items():
        slices = []
        for name in names:
            d_in, d_out, _ = MODULES[name]
            if layer == "o_proj":
                slices.append(layout(name, share(d_in), (Run(0, 0, d_out),)))
            else:
                slices.append(layout(name, (Run(0, 0, d_in),), share(d_out)))
        found.append(LayerLayout(layer, tuple(slices)))
    return found


def make_path(
    checkpoint: Checkpoint, described: list[LayerLayout] | None = None, **options: Any
) -> DirectPath:
    arguments: dict[str, Any] = {
        "slots": 5,
        "max_tokens": 64,
        "device": CPU,
        "dtype": torch.float32,
    }
    return DirectPath(
        checkpoint, layouts() if described is None else described, str, **(arguments | options)
    )


def activate_all(path: DirectPath, checkpoint: Checkpoint, tasks: list[str]) -> DirectSlots:
    """Slots with these tasks in them, whose ids count from 1."""
    slots = DirectSlots(path)
    for number, task in enumerate(tasks, 1):
        slots.activate(number, path.make_task(checkpoint.load_task(task)))
    return slots


# --- the path: results -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A layer's update of a batch by the direct operation, and in float64 from the decoded weights."""

    got: torch.Tensor
    want: torch.Tensor


def answers(
    checkpoint: Checkpoint, ranks: int, tokens: np.ndarray, **options: Any
) -> dict[str, Answer]:
    """Run a batch through every layer on every rank, and put the ranks' results together."""
    tasks = list(checkpoint.tasks)
    paths = [make_path(checkpoint, layouts(rank, ranks), **options) for rank in range(ranks)]
    for path in paths:
        activate_all(path, checkpoint, tasks).route(tokens)
    bases = dict(checkpoint.bases())
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, modules in LAYERS.items():
        x = torch.randn(len(tokens), MODULES[modules[0]][0], generator=generator)
        pieces = []
        for rank, path in enumerate(paths):
            layer = path.layers[name]
            columns = slice(rank * layer.d_in, (rank + 1) * layer.d_in)
            part = x if name == "qkv" else x[:, columns].contiguous()
            y = torch.zeros(len(tokens), layer.width)
            add_direct(y, part, layer, path.table, path.routing)
            pieces.append(y.split([s.width for s in layer.slices], dim=1))
        joined = [
            torch.cat(parts, dim=1) if name == "qkv" else sum(parts) for parts in zip(*pieces)
        ]
        want = []
        for module in modules:
            wide = torch.zeros(len(tokens), MODULES[module][1], dtype=torch.float64)
            for number, task in enumerate(tasks, 1):
                stored = checkpoint.load_task(task).modules.get(module)
                if stored is not None:
                    a, b = decode(stored, bases.get(module))
                    rows = torch.from_numpy(tokens == number)
                    wide[rows] += x[rows].double() @ a.double().T @ b.double().T
            want.append(wide)
        found[name] = Answer(torch.cat(joined, dim=1), torch.cat(want, dim=1))
    return found


TOKENS = np.array([1, 0, 2, 2, 3, 3, 3, 0, 4, 1, 99, 2, *[3] * 12, *[1] * 9, 4, 2])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("basis", "private"),
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("int8", "int8"),
        ("nf4", "nf4"),
        ("nf4-dq", "nf4-dq"),
        ("float16", "nf4"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_adds_what_its_tasks_decode_to(
    tmp_path: Path, ranks: int, basis: str, private: str, packed: bool
) -> None:
    """Both are sums of float32 products of order 1, which the decoded core splits by an SVD."""
    checkpoint = build(tmp_path / "ck", basis=basis, private=private)
    found = answers(checkpoint, ranks, TOKENS, packed_basis=packed)
    for name, answer in found.items():
        assert answer.got[~np.isin(TOKENS, [1, 2, 3, 4])].count_nonzero() == 0
        for number in (1, 2, 3, 4):
            largest = answer.want[number == TOKENS].abs().amax()
            # Task 4 adapts o alone.
            assert largest > 0.3 or (name, number) == ("qkv", 4)
        torch.testing.assert_close(answer.got.double(), answer.want, rtol=1e-5, atol=2e-5)


def test_two_bytes_round_what_four_bytes_compute(tmp_path: Path) -> None:
    """bfloat16 rounds the basis, cores, z, w, h and y: six steps of 2**-8 of sums of order 4."""
    checkpoint = build(tmp_path / "ck")
    path = make_path(checkpoint, dtype=torch.bfloat16)
    activate_all(path, checkpoint, list(TASKS)).route(TOKENS)
    exact = make_path(checkpoint)
    activate_all(exact, checkpoint, list(TASKS)).route(TOKENS)
    for name, layer in path.layers.items():
        x = torch.randn(len(TOKENS), layer.d_in, generator=torch.Generator().manual_seed(3))
        x = x.bfloat16()
        y = torch.zeros(len(TOKENS), layer.width, dtype=torch.bfloat16)
        want = torch.zeros(len(TOKENS), layer.width)
        add_direct(y, x, layer, path.table, path.routing)
        add_direct(want, x.float(), exact.layers[name], exact.table, exact.routing)
        error, scale = (y.float() - want).abs().amax(), want.abs().amax()
        assert error <= 6 * 2**-8 * scale
        assert error > 0


@pytest.mark.parametrize("basis", ["int8", "nf4", "nf4-dq"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_packed_basis_gives_the_dense_ones_results_from_fewer_bytes(
    tmp_path: Path, basis: str, ranks: int
) -> None:
    checkpoint = build(tmp_path / "ck", basis=basis)
    dense, packed = (
        answers(checkpoint, ranks, TOKENS, packed_basis=packed) for packed in (False, True)
    )
    for name in LAYERS:
        torch.testing.assert_close(packed[name].got, dense[name].got, rtol=1e-6, atol=1e-6)
    for rank in range(ranks):
        paths = [
            make_path(checkpoint, layouts(rank, ranks), packed_basis=packed)
            for packed in (False, True)
        ]
        assert paths[1].memory().bases < paths[0].memory().bases
        layer = paths[1].layers["qkv"]
        assert layer.v is not None
        formats = [layer.v.format, *(s.u.format for s in layer.slices if s.u is not None)]
        cut = "nf4" if ranks == 2 and basis == "nf4-dq" else basis
        # k is cut at 20 on the second rank, which no packed matrix can begin with.
        assert formats == [basis, cut, "float32" if rank else cut]


# --- the path: which tasks, and what it holds ------------------------------------------------------


def test_what_stands_in_the_way_of_a_direct_task(tmp_path: Path) -> None:
    tasks = {
        **TASKS,
        "head": {"q": ("joint", 1), "lm_head": ("private", 2)},
        "score": {"q": ("private", 1)},
        "ignored": {"q": ("private", 1)},
        "merged": {"merged": ("private", 4)},
        "lost": {"merged": ("private", 4), "o": ("private", 1)},
    }
    extra = {
        "score": {"score.weight": torch.ones(2, 80)},
        "ignored": {"model.embed_tokens.weight": torch.ones(2, 80)},
    }
    checkpoint = build(tmp_path / "ck", tasks, extra=extra)

    def ignored(name: str) -> bool:
        return "embed_tokens" in name

    path = make_path(checkpoint, ignored_extra=ignored)
    lost = "merged is a layer without a direct form"
    assert {task: path.obstacle(checkpoint, task) for task in tasks} == {
        **dict.fromkeys(TASKS),
        "head": "module lm_head is the output head",
        "score": "it carries score.weight, which stands in a slot",
        "ignored": None,
        "merged": lost,
        "lost": lost,
    }
    two_runs = layout("merged", (Run(0, 0, 80),), (Run(0, 0, 24), Run(48, 24, 24)))
    path = make_path(checkpoint, [*layouts(), LayerLayout("gate_up", (two_runs,))])
    pieces = "merged is cut into several pieces on a tensor-parallel rank"
    assert path.obstacle(checkpoint, "merged") == path.obstacle(checkpoint, "lost") == pieces


def test_an_embedding_is_no_layer_of_direct_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    writer.add_module("embed", 50, 80, kind="embedding")
    stored = encode_private(torch.ones(1, 50), torch.ones(80, 1), 1.0, "float32")
    writer.add_task("t", {"embed": stored}, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    checkpoint = Checkpoint.open(folder)
    path = make_path(checkpoint)
    assert path.obstacle(checkpoint, "t") == "module embed is of kind embedding"
    assert path.layers == {}, "nothing runs direct, so no layer is slowed down"


def test_a_layer_cut_into_pieces_takes_a_batch_with_direct_tasks(tmp_path: Path) -> None:
    """No task runs direct in it, but where private tasks exist every layer looks for one."""
    checkpoint = build(tmp_path / "ck", {"one": {"o": ("private", 2)}})
    half = layout("merged", (Run(0, 0, 40), Run(40, 40, 10)), (Run(0, 0, 24), Run(48, 24, 24)))
    path = make_path(checkpoint, [*layouts(), LayerLayout("gate_up", (half,))])
    activate_all(path, checkpoint, ["one"]).route(np.ones(3, dtype=np.int64))
    y, x = torch.randn(3, 48), torch.randn(3, 50)
    before = y.clone()
    add_direct(y, x, path.layers["gate_up"], path.table, path.routing)
    assert torch.equal(y, before)


def test_layers_look_only_for_what_there_may_be(tmp_path: Path) -> None:
    joint = make_path(build(tmp_path / "joint", {"joint": TASKS["joint"]}))
    assert {name: (layer.private, layer.max_rank) for name, layer in joint.layers.items()} == {
        "qkv": (False, 0), "o_proj": (False, 0)
    }  # fmt: skip
    only_o = {"one": {"o": ("private", 2)}, "two": {"o": ("private", 6)}}
    private = make_path(build(tmp_path / "private", only_o))
    assert {name: (layer.private, layer.max_rank) for name, layer in private.layers.items()} == {
        "qkv": (True, 6), "o_proj": (True, 6)
    }  # fmt: skip
    assert all(layer.v is None for layer in private.layers.values())
    # A basis that no direct task uses is not held: the only joint task of q needs a slot.
    slotted = {"head": {"q": ("joint", 1), "lm_head": ("private", 1)}, "o": {"o": ("joint", 2)}}
    path = make_path(build(tmp_path / "slotted", slotted))
    assert set(path.layers) == {"o_proj"}


def test_a_task_that_comes_later_runs_direct_if_the_layers_are_ready_for_it(tmp_path: Path) -> None:
    first = build(tmp_path / "first", {"joint": TASKS["joint"], "one": TASKS["one"]})
    path = make_path(first)
    same = build(tmp_path / "same", {
        "joint": {"q": ("joint", 3), "o": ("joint", 7)},
        "fits": {"v": ("private", 2), "k": ("private", 1)},
        "wide": {"v": ("private", 3)},
    })  # fmt: skip
    assert same.basis_digest == first.basis_digest
    assert path.obstacle(same, "joint") is None
    assert path.obstacle(same, "fits") is None
    assert path.obstacle(same, "wide") == (
        "v has rank 3, more than the private tasks that the engine started with"
    )
    other = build(tmp_path / "other", TASKS, seed=1)
    assert path.obstacle(other, "one") is None, "private factors need no basis"
    assert path.obstacle(other, "joint") == "q has another basis than the engine started with"
    only_joint = make_path(build(tmp_path / "only", {"joint": {"q": ("joint", 3)}}))
    assert only_joint.obstacle(first, "one") == (
        "o has rank 2, more than the private tasks that the engine started with"
    )
    # k's basis is in the checkpoint, but the engine started without a task that uses it.
    assert only_joint.obstacle(same, "joint") == "o has another basis than the engine started with"


def storage_nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind these tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def packed_tensors(matrices: Iterable[PackedMatrix | None]) -> list[torch.Tensor]:
    return [part for matrix in matrices if matrix for part in matrix.parts.values()]


@pytest.mark.parametrize("private", ["float32", "bfloat16", "int8", "nf4", "nf4-dq"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_what_the_tensors_take(
    tmp_path: Path, private: str, ranks: int, packed: bool
) -> None:
    checkpoint = build(tmp_path / "ck", basis="nf4", private=private)
    path = make_path(checkpoint, layouts(ranks - 1, ranks), packed_basis=packed)
    assert (path.memory().cores, path.memory().factors) == (0, 0)
    tasks = [path.make_task(checkpoint.load_task(task)) for task in TASKS]
    parts = [part for task in tasks for part in task.slices.values()]
    bases = packed_tensors(
        matrix
        for layer in path.layers.values()
        for matrix in (layer.v, *(part.u for part in layer.slices))
    )
    memory = path.memory()
    assert memory.bases == storage_nbytes(bases) > 0
    assert memory.cores == storage_nbytes(p.core for p in parts if p.core is not None) > 0
    factors = packed_tensors(matrix for part in parts for matrix in (part.a, part.b))
    assert memory.factors == sum(tensor.nbytes for tensor in factors) > 0
    # What was moved to a multiple of 16 bytes stands in its file's flat tensor too.
    moved = sum(t.nbytes for t in factors if t.nbytes == t.untyped_storage().nbytes())
    assert 0 <= storage_nbytes(factors) - memory.factors <= (moved if ranks == 1 else 0)
    table = [path.table.records, path.table.codebook, path.routing.order, path.empty.records]
    assert memory.table == storage_nbytes([*table, *(task.records for task in tasks)])


@pytest.mark.parametrize("private", ["float32", "bfloat16", "int8", "nf4", "nf4-dq"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_factors_lie_where_16_byte_loads_may_begin(
    tmp_path: Path, private: str, ranks: int
) -> None:
    """In a task's file one matrix follows another, with whatever bytes its rows have."""
    checkpoint = build(tmp_path / "ck", private=private)
    path = make_path(checkpoint, layouts(ranks - 1, ranks), dtype=torch.bfloat16)
    for task in TASKS:
        for part in path.make_task(checkpoint.load_task(task)).slices.values():
            for tensor in packed_tensors((part.a, part.b)):
                assert tensor.is_contiguous()
                assert tensor.data_ptr() % 16 == 0


def test_cores_lie_where_16_byte_loads_may_begin(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck")
    path = make_path(checkpoint, dtype=torch.bfloat16)
    task = path.make_task(checkpoint.load_task("joint"))
    cores = [part.core for part in task.slices.values() if part.core is not None]
    assert len(cores) == 3
    for core in cores:
        assert core.is_contiguous()
        assert (core.data_ptr() - cores[0].data_ptr()) % 16 == 0


# --- slots -----------------------------------------------------------------------------------------

IDS = 5


def bare_slots(count: int) -> DirectSlots:
    """Slots over a table and a routing of their own."""
    path = SimpleNamespace(table=SlotTable(count, 1, CPU), routing=Routing(16, count, CPU))
    return DirectSlots(path)  # type: ignore[arg-type]


def new_task() -> DirectTask:
    return make_task({}, 1, CPU)


def held(slots: DirectSlots) -> dict[int, tuple[int, int]]:
    """Id -> its slot and the identity of the task there, as a batch of all ids would be routed."""
    path = slots._path
    direct = slots.route(np.arange(1, IDS + 1))
    found = {}
    for adapter, slot in enumerate(path.routing.token_slots[:IDS].tolist(), 1):
        assert direct[adapter - 1] == (slot != path.table.slots) == (adapter in slots)
        if adapter in slots:
            found[adapter] = (slot, id(path.table.tasks[slot]))
    assert len({slot for slot, _ in found.values()}) == len(found), "two ids in one slot"
    return found


rounds = st.tuples(
    st.just("round"), st.lists(st.integers(1, IDS), min_size=1, max_size=4, unique=True)
)
operations = st.one_of(
    rounds,
    rounds,
    rounds,
    st.tuples(st.just("pin"), st.integers(1, IDS)),
    st.tuples(st.just("remove"), st.integers(1, IDS)),
    st.tuples(st.just("replace"), st.integers(1, IDS)),
)


@settings(max_examples=150, deadline=None)
@given(count=st.integers(1, 4), script=st.lists(operations, min_size=5, max_size=20))
@example(count=2, script=[("round", [1, 2]), ("round", [1]), ("round", [3])])
def test_slots_give_way_by_last_use_and_say_when_they_change(count: int, script: list) -> None:
    slots = bare_slots(count)
    tasks = {adapter: new_task() for adapter in range(1, IDS + 1)}
    used: list[int] = []  # The ids inside, the least recently used first.
    pinned: set[int] = set()
    for kind, what in script:
        before, version = held(slots), slots.version
        if kind == "remove":
            slots.remove(what)
            used = [adapter for adapter in used if adapter != what]
            pinned.discard(what)
        elif kind == "pin" and what in slots:
            slots.pin(what)
            pinned.add(what)
        elif kind == "replace":
            tasks[what] = new_task()
            if what in slots:
                assert slots.activate(what, tasks[what])
                used = [a for a in used if a != what] + [what]
        elif kind == "round":
            # A batch never has more distinct tasks than there are slots beside the pinned ones.
            room = count - len(pinned)
            batch = [a for a in what if a in pinned] + [a for a in what if a not in pinned][:room]
            for place, adapter in enumerate(batch):
                was_inside = adapter in used
                assert slots.activate(adapter, tasks[adapter]) is not was_inside
                if not was_inside and len(used) == count:
                    used.remove(next(a for a in used if a not in pinned))
                used = [a for a in used if a != adapter] + [adapter]
                assert all(a in slots for a in batch[: place + 1]), "one of this round gave way"
        after = held(slots)
        assert set(after) == set(used)
        assert {a: task for a, (_, task) in after.items()} == {a: id(tasks[a]) for a in used}
        if kind == "round":
            # Content may change and change back inside a round; the other way round it must be said.
            assert slots.version != version or after == before
        else:
            assert (slots.version != version) == (after != before)


def test_a_task_that_is_there_is_not_written_again() -> None:
    slots = bare_slots(2)
    task, other = new_task(), new_task()
    assert slots.activate(1, task)
    version = slots.version
    assert not slots.activate(1, task)
    assert slots.version == version
    before = held(slots)
    assert slots.activate(1, other), "the id came with another task"
    assert slots.version == version + 1
    assert held(slots)[1] == (before[1][0], id(other))


def test_pinned_slots_never_give_way() -> None:
    slots = bare_slots(2)
    slots.activate(1, new_task())
    slots.pin(1)
    for adapter in (2, 3, 4):
        slots.activate(adapter, new_task())
        assert set(held(slots)) == {1, adapter}
    slots.pin(4)
    version = slots.version
    with pytest.raises(ValueError, match="all 2 slots of direct tasks are pinned"):
        slots.activate(5, new_task())
    assert (set(held(slots)), slots.version) == ({1, 4}, version)
    slots.remove(1)
    with pytest.raises(AssertionError):
        slots.pin(1)
    for adapter in (1, 5, 2):
        slots.activate(adapter, new_task())
        assert set(held(slots)) == {4, adapter}, "an id that was removed is pinned no more"


def test_tokens_are_routed_by_their_adapters_id() -> None:
    slots = bare_slots(3)
    tasks = {adapter: new_task() for adapter in (1 << 20, 1 << 30, 5)}
    for adapter, task in tasks.items():
        slots.activate(adapter, task)
    tokens = np.array([0, 1 << 30, 5, 0, 1 << 30, 77, 1 << 20])
    direct = slots.route(tokens)
    assert direct.tolist() == [adapter in tasks for adapter in tokens.tolist()]
    path = slots._path
    got = [path.table.tasks[slot] for slot in path.routing.token_slots[:7].tolist()]
    assert got == [tasks.get(adapter) for adapter in tokens.tolist()]
    assert slots.route(np.zeros(0, dtype=np.int64)).tolist() == []
    assert path.routing.runs == []


# --- the resident store ----------------------------------------------------------------------------

STORED = {
    **TASKS,
    "head": {"q": ("joint", 2), "lm_head": ("private", 2)},
    "plain head": {"lm_head": ("private", 1)},
}


class Store:
    """A store over a checkpoint, and what its check was asked."""

    def __init__(self, only_direct: bool = False) -> None:
        self.checked: list[tuple[list[str], bool]] = []
        self.store = ResidentStore(CPU, str, self._check, only_direct)

    def _check(self, checkpoint: Checkpoint, task_ids: Iterable[str], direct: bool) -> None:
        self.checked.append((list(task_ids), direct))


def test_a_task_is_held_in_one_form(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck", STORED, basis="nf4")
    made = Store()
    store = made.store
    store.preload(checkpoint.path, make_path)
    assert made.checked == [(list(TASKS), True), (["head", "plain head"], False)]
    assert [task.task_id for task in store.tasks()] == list(STORED)
    assert len(store) == len(STORED)
    for task in store.tasks():
        if task.task_id in TASKS:
            assert task.direct is not None
            assert (task.sources, task.extra, task.obstacle) == ({}, {}, "")
        else:
            assert task.direct is None
            assert set(task.sources) == set(STORED[task.task_id])
            assert task.obstacle == "module lm_head is the output head"
    # q alone: the direct tasks read the layers' own copies of theirs.
    bases = dict(checkpoint.bases())
    q = bases["q"]
    cores, factors = 4 * 2 * (6 + 5), (2 + 1) * ((64 + 8) + (64 + 8))
    assert store.materialized_nbytes == q.u.nbytes + q.v.nbytes + cores + factors
    assert store.direct is not None
    memory = store.direct.memory()
    assert store.nbytes == store.materialized_nbytes + (
        memory.bases + memory.cores + memory.factors + memory.table
    )


def test_without_a_path_every_task_is_materialized(tmp_path: Path) -> None:
    made = Store()
    made.store.preload(build(tmp_path / "ck", STORED).path)
    assert made.checked == [([], True), (list(STORED), False)]
    assert {task.obstacle for task in made.store.tasks()} == {"direct mode is off"}
    assert all(task.direct is None and task.sources for task in made.store.tasks())
    assert made.store.nbytes == made.store.materialized_nbytes > 0


def test_direct_tasks_alone_need_no_packed_basis(tmp_path: Path) -> None:
    made = Store(only_direct=True)
    made.store.preload(build(tmp_path / "ck").path, make_path)
    assert made.checked == [(list(TASKS), True), ([], False)]
    assert made.store.materialized_nbytes == 0


def test_direct_mode_refuses_what_auto_materializes(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck", STORED)
    made = Store(only_direct=True)
    with pytest.raises(ModelMismatchError) as caught:
        made.store.preload(checkpoint.path, make_path)
    assert str(caught.value) == (
        f"{checkpoint.path}: task 'head' cannot run direct: module lm_head is the output head; use "
        "VLLM_VLORA_MODE=auto, which materializes such tasks"
    )
    assert made.checked == []
    assert len(made.store) == 0


def test_a_late_task_on_another_basis_is_materialized_from_it(tmp_path: Path) -> None:
    made = Store()
    store = made.store
    store.preload(build(tmp_path / "ck").path, make_path)
    assert store.direct is not None
    memory, before = store.direct.memory(), store.nbytes
    later = build(tmp_path / "later", seed=1)
    task = store.task(task_path(later, "joint"))
    assert task.direct is None
    assert task.obstacle == "q has another basis than the engine started with"
    assert made.checked[-2:] == [([], True), (["joint"], False)]
    bases = dict(later.bases())
    for name in TASKS["joint"]:
        stored = later.load_task("joint").modules[name]
        a, b = decode(stored, bases[name])
        source_a, source_b = task.sources[name]
        torch.testing.assert_close(source_b.to_dense().T @ source_a.to_dense(), b @ a)
    assert store.direct.memory() == memory
    assert store.nbytes == before + store.materialized_nbytes
    # A private one runs direct, whatever the basis.
    private = store.task(task_path(later, "private"))
    assert private.direct is not None
    assert store.direct.memory().factors > memory.factors
    assert store.task(task_path(later, "private")) is private


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Settings("auto", 8, packed_basis=False)),
        ({"VLLM_VLORA_MODE": "", "VLLM_VLORA_SLOTS": "", "VLLM_VLORA_BASIS": ""}, Settings()),
        ({"VLLM_VLORA_MODE": "direct", "VLLM_VLORA_SLOTS": "1"}, Settings("direct", 1)),
        ({"VLLM_VLORA_MODE": "materialize"}, Settings("materialize")),
        ({"VLLM_VLORA_SLOTS": "064"}, Settings(slots=64)),
        ({"VLLM_VLORA_BASIS": "packed"}, Settings(packed_basis=True)),
        ({"VLLM_VLORA_BASIS": "dense", "VLLM_VLORA_MODE": "auto"}, Settings()),
    ],
)
def test_settings_are_read_from_the_environment(
    environment: dict[str, str], expected: Settings
) -> None:
    assert read_settings(environment) == expected
    assert expected.direct == (expected.mode != "materialize")


def test_settings_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_VLORA_SLOTS", "3")
    monkeypatch.setenv("VLLM_VLORA_MODE", "direct")
    monkeypatch.delenv("VLLM_VLORA_BASIS", raising=False)
    assert read_settings() == Settings("direct", 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODE", "fast", "'fast': use one of auto, direct, materialize"),
        ("MODE", "Direct", "'Direct': use one of"),
        ("MODE", " auto", "' auto': use one of"),
        ("BASIS", "nf4", "'nf4': use one of dense, packed"),
        *(("SLOTS", bad, f"{bad!r}: use a whole number from 1 on")
          for bad in ("0", "-1", "+3", "2.0", "eight", " 8", "٣", "²", "1e3", "00")),
    ],
)  # fmt: skip
def test_a_setting_that_means_nothing_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({f"VLLM_VLORA_{name}": value})
    assert str(caught.value).startswith(f"VLLM_VLORA_{name}={message}")


# --- admission -------------------------------------------------------------------------------------


class Gate:
    """An admission as the scheduler uses it: what enters is alive, and what ends is followed by a
    release."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.alive: dict[str, int] = {}
        self.waiting: dict[str, int] = {}
        self.entered: list[tuple[int, str]] = []
        self.arrived: list[tuple[int, str]] = []
        self.asked = 0
        self.admission: Admission[tuple[int, str]] = Admission(slots, self.alive.__contains__)

    def ask(self, adapter: int) -> None:
        name = f"request {self.asked}"
        self.asked += 1
        self.arrived.append((adapter, name))
        if self.admission.enter(adapter, name, (adapter, name)):
            self._let_in(adapter, name)
        else:
            self.waiting[name] = adapter

    def end(self, names: list[str]) -> None:
        for name in names:
            del self.alive[name]
        for adapter, name in self.admission.release():
            del self.waiting[name]
            self._let_in(adapter, name)

    def withdraw(self, names: list[str] | None) -> None:
        found = self.admission.withdraw(None if names is None else iter(names))
        gone = list(self.waiting) if names is None else [n for n in names if n in self.waiting]
        assert found == [(self.waiting.pop(name), name) for name in gone]
        self.arrived = [pair for pair in self.arrived if pair not in found]

    def _let_in(self, adapter: int, name: str) -> None:
        self.alive[name] = adapter
        self.entered.append((adapter, name))

    def check(self) -> None:
        inside = set(self.alive.values())
        assert len(inside) <= self.slots
        assert len(self.admission) == len(self.waiting)
        for adapter in self.waiting.values():
            assert adapter not in inside
            assert len(inside) == self.slots, "it waits beside a free slot"
        for adapter in {a for a, _ in self.arrived}:
            came = [name for a, name in self.arrived if a == adapter]
            went = [name for a, name in self.entered if a == adapter]
            assert went == came[: len(went)]


gate_operations = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 6)),
    st.tuples(st.just("ask"), st.integers(1, 6)),
    st.tuples(st.just("end"), st.lists(st.integers(0, 30), min_size=1, max_size=4)),
    st.tuples(st.just("withdraw"), st.lists(st.integers(0, 60), max_size=3)),
    st.tuples(st.just("withdraw"), st.none()),
)


@pytest.mark.parametrize("count_again", [1, 3, 1024])
@settings(max_examples=100, deadline=None)
@given(slots=st.integers(1, 4), script=st.lists(gate_operations, max_size=60))
def test_no_more_adapters_are_inside_than_slots(count_again: int, slots: int, script: list) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "_COUNT_AGAIN", count_again)
        gate = Gate(slots)
        for kind, what in script:
            if kind == "ask":
                gate.ask(what)
            elif kind == "end":
                names = list(gate.alive)
                gate.end(sorted({names[i % len(names)] for i in what}) if names else [])
            else:
                gate.withdraw(what and [f"request {number}" for number in dict.fromkeys(what)])
            gate.check()
        for _ in range(len(gate.arrived) + 1):
            gate.end(list(gate.alive))
            gate.check()
        assert not gate.waiting, "some request never entered"
        assert sorted(gate.entered) == sorted(gate.arrived)


def test_requests_of_an_adapter_inside_enter_beside_those_that_wait() -> None:
    gate = Gate(2)
    for adapter in (1, 2, 3, 1, 2, 3, 4):
        gate.ask(adapter)
    assert [a for a, _ in gate.entered] == [1, 2, 1, 2]
    gate.end(["request 0"])
    assert len(gate.admission) == 3, "adapter 1 has another request inside"
    gate.end(["request 3"])
    assert [a for a, _ in gate.entered[4:]] == [3, 3], "all of adapter 3 and nothing of adapter 4"
    gate.end(["request 1", "request 4"])
    assert gate.entered[-1] == (4, "request 6")


def test_ended_requests_are_forgotten_without_anybody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One adapter that is asked for ever: nothing ever waits, and nothing may grow."""
    monkeypatch.setattr(admission, "_COUNT_AGAIN", 8)
    calls = 0
    alive: set[str] = set()

    def is_alive(name: str) -> bool:
        nonlocal calls
        calls += 1
        return name in alive

    gate: Admission[None] = Admission(2, is_alive)
    most = 0
    for number in range(2000):
        name = str(number)
        assert gate.enter(number % 2, name, None)
        alive.add(name)
        alive.discard(str(number - 3))
        most = max(most, sum(len(requests) for requests in gate._inside.values()))
    assert most <= 8 + 3
    assert calls <= 4 * 2000, "looking for the dead costs a few looks a request"


def test_a_request_that_makes_it_look_for_the_dead_stays_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It becomes alive only after it was let in, and may be the only one of its adapter."""
    monkeypatch.setattr(admission, "_COUNT_AGAIN", 1)
    alive: set[str] = set()
    gate: Admission[str] = Admission(1, alive.__contains__)
    for number in range(5):
        assert gate.enter(7, str(number), str(number))
        alive.add(str(number))
        assert not gate.enter(8, f"other {number}", "other")
        alive.clear()
        gate.withdraw(None)


# --- seams: the start ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seams() -> Any:
    return importlib.import_module("vllm_vlora.plugin.seams")


@pytest.fixture(scope="module")
def managing() -> Any:
    return importlib.import_module("vllm_vlora.plugin.manager")


@pytest.fixture(scope="module")
def scheduling() -> Any:
    return importlib.import_module("vllm_vlora.plugin.scheduling")


@pytest.fixture(scope="module")
def layer_calls() -> Any:
    return importlib.import_module("vllm_vlora.plugin.layer_calls")


def test_what_direct_tasks_were_not_made_for_is_refused(
    managing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LORA_ENABLE_DUAL_STREAM", raising=False)

    def config(specialize: bool) -> Any:
        return SimpleNamespace(lora_config=SimpleNamespace(specialize_active_lora=specialize))

    managing._refuse_direct_config(config(False))
    with pytest.raises(ModelMismatchError, match=r"--specialize-active-lora; .*=materialize"):
        managing._refuse_direct_config(config(True))
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(ModelMismatchError, match=r"VLLM_LORA_ENABLE_DUAL_STREAM; .*=materialize"):
        managing._refuse_direct_config(config(False))


@pytest.mark.parametrize(
    ("checkpoint", "mode", "slots", "expected"),
    [
        ("ck", "auto", 4, 4),
        ("ck", "direct", 100, 64),
        ("ck", "materialize", 4, 64),
        (None, "auto", 4, 64),
    ],
)
def test_stock_code_sees_few_slots_when_tasks_run_direct(
    managing: Any, checkpoint: str | None, mode: str, slots: int, expected: int
) -> None:
    config = SimpleNamespace(max_loras=64, max_lora_rank=16)
    got = managing._config_of_slots(config, managing.Setup(checkpoint, Settings(mode, slots)))
    assert (got.max_loras, got.max_lora_rank) == (expected, 16)
    assert config.max_loras == 64, "the engine's own configuration counts all tasks"


def test_the_longest_batch_may_be_a_padded_one(managing: Any) -> None:
    for size, expected in ((None, 100), (0, 100), (64, 100), (512, 512)):
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=size)
        )
        assert managing._longest_batch(100, config) == expected
    assert managing._longest_batch(100, SimpleNamespace(compilation_config=object())) == 100


def test_compiled_graphs_of_another_mode_are_not_taken(seams: Any) -> None:
    def name(layers: list[str] | None, config: Any) -> Any:
        path = None if layers is None else SimpleNamespace(layers=dict.fromkeys(layers))
        vllm_config = SimpleNamespace(additional_config=config)
        manager = SimpleNamespace(vlora_store=SimpleNamespace(direct=path))
        seams._name_graphs(vllm_config, manager)
        return vllm_config.additional_config

    assert name(None, {"user": 1}) == {"user": 1}
    first, second = name(["a", "b"], {"user": 1}), name(["a"], {})
    assert first["user"] == 1
    assert first["vllm_vlora"] != second["vllm_vlora"]
    assert first["vllm_vlora"] == name(["b", "a"], {})["vllm_vlora"]


# --- seams: the scheduler --------------------------------------------------------------------------


def request(name: str, adapter: int = 0, path: str = "") -> Any:
    """A request of a PEFT adapter, or of the path's; the base model's without an adapter."""
    lora = SimpleNamespace(lora_int_id=adapter, lora_path=path or f"/peft/{adapter}")
    return SimpleNamespace(request_id=name, lora_request=lora if adapter else None)


def our_path(number: int) -> str:
    return f"/ck/tasks/t{number}.safetensors@{number:032x}"


class Core:
    """The scheduler and the engine core of a test, patched as those of vLLM are."""

    def __init__(
        self, scheduling: Any, patch: pytest.MonkeyPatch, slots: int, direct: set[str]
    ) -> None:
        class Scheduler:
            def __init__(self, lora: bool = True) -> None:
                self.requests: dict[str, Any] = {}
                self.lora_config = SimpleNamespace(max_loras=64) if lora else None
                self.log: list[str] = []

            def add_request(self, request: Any) -> None:
                self.log.append(f"add {request.request_id}")
                self.requests[request.request_id] = request

            def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
                ids = [request_ids] if isinstance(request_ids, str) else request_ids
                ids = list(self.requests) if ids is None else ids
                self.log += [f"finish {i}" for i in ids if i in self.requests]
                return [self.requests.pop(i) for i in ids if i in self.requests]

            def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
                for name in scheduler_output:
                    del self.requests[name]
                return "outputs"

        class EngineCore:
            def __init__(self) -> None:
                self.scheduler = Scheduler()
                self.questions = 0
                self.model_executor = SimpleNamespace(collective_rpc=self._answer)

            def _answer(self, function: Callable[[Any], set[str]]) -> list[set[str]]:
                self.questions += 1
                manager = SimpleNamespace(direct_paths=lambda: direct)
                lora = SimpleNamespace(_adapter_manager=manager)
                return [function(SimpleNamespace(model_runner=SimpleNamespace(lora_manager=lora)))]

            def add_request(self, request: Any, request_wave: int = 0) -> None:
                self.scheduler.add_request(request)

        patch.setattr(scheduling, "Scheduler", Scheduler)
        patch.setattr(scheduling, "EngineCore", EngineCore)
        setup = scheduling.Setup("/ck", Settings("auto", slots))
        for target, name, value in scheduling.schedule_by_kind(setup):
            setattr(target, name, value)
        self.scheduler_class = Scheduler
        self.core = EngineCore()
        self.scheduler: Any = self.core.scheduler

    def ask(self, *requests: Any) -> None:
        for one in requests:
            self.core.add_request(one)

    def inside(self) -> list[str]:
        return list(self.scheduler.requests)


@pytest.fixture
def make_core(scheduling: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Core]:
    def make(slots: int, direct: Iterable[str] = ()) -> Core:
        return Core(scheduling, monkeypatch, slots, set(direct))

    return make


def test_requests_beyond_the_slots_wait_until_a_slot_is_free(
    make_core: Callable[..., Core],
) -> None:
    core = make_core(2)
    core.ask(*(request(name, adapter) for name, adapter in zip("abcdef", (1, 2, 3, 1, 4, 3))))
    core.ask(request("base"))
    assert core.inside() == ["a", "b", "d", "base"]
    scheduler = core.scheduler
    assert scheduler.update_from_output([], None) == "outputs"
    assert core.inside() == ["a", "b", "d", "base"]
    scheduler.update_from_output(["a"], None)
    assert core.inside() == ["b", "d", "base"], "d still needs the slot of adapter 1"
    scheduler.update_from_output(["d"], None)
    assert core.inside() == ["b", "base", "c", "f"]
    scheduler.update_from_output(["b", "c"], None)
    assert core.inside() == ["base", "f", "e"]
    assert core.core.questions == 0, "ordinary adapters are no question"


def test_direct_tasks_need_no_slot_and_others_of_ours_do(make_core: Callable[..., Core]) -> None:
    direct = [our_path(number) for number in range(1, 6)]
    core = make_core(1, direct)
    core.ask(*(request(f"direct {n}", 1000 + n, our_path(n)) for n in range(1, 6)))
    assert len(core.inside()) == 5
    assert core.core.questions == 1, "the workers name all direct tasks at once"
    core.ask(request("slotted", 1006, our_path(6)), request("peft", 1), request("again", 1006,
             our_path(6)), request("more", 1001, our_path(1)))  # fmt: skip
    assert core.inside()[5:] == ["slotted", "again", "more"]
    assert core.core.questions == 2, "asked once a path"
    core.scheduler.update_from_output(["slotted", "again"], None)
    assert core.inside()[-1] == "peft"


def test_a_request_that_waits_is_ended_by_the_scheduler_itself(
    make_core: Callable[..., Core],
) -> None:
    core = make_core(1)
    core.ask(*(request(name, adapter) for name, adapter in zip("abcd", (1, 2, 3, 2))))
    scheduler = core.scheduler
    assert [r.request_id for r in scheduler.finish_requests("b", "aborted")] == ["b"]
    assert scheduler.log == ["add a", "add b", "finish b"], "it must hold what it ends"
    assert core.inside() == ["a"]
    # A generator, as vLLM may pass one; the request inside frees the slot for the next that waits.
    ended = scheduler.finish_requests((name for name in ("a", "c", "unknown")), "aborted")
    assert {r.request_id for r in ended} == {"a", "c"}
    assert core.inside() == ["d"]
    core.ask(request("e", 1), request("f", 3))
    assert {r.request_id for r in scheduler.finish_requests(None, "aborted")} == {"d", "e", "f"}
    assert core.inside() == []
    core.ask(request("g", 9))
    assert core.inside() == ["g"]


def test_what_continues_a_request_inside_is_the_schedulers_own_business(
    make_core: Callable[..., Core],
) -> None:
    core = make_core(1)
    core.ask(request("a", 1), request("a", 1))
    assert core.scheduler.log == ["add a", "add a"]


def test_without_lora_nothing_is_held_back(make_core: Callable[..., Core]) -> None:
    core = make_core(1)
    scheduler: Any = core.scheduler_class(lora=False)
    for name, adapter in (("a", 1), ("b", 2)):
        scheduler.add_request(request(name, adapter))
    assert list(scheduler.requests) == ["a", "b"]
    assert scheduler.update_from_output(["a"], None) == "outputs"
    assert [r.request_id for r in scheduler.finish_requests(["b"], "aborted")] == ["b"]


def test_schedulers_do_not_share_their_slots(make_core: Callable[..., Core]) -> None:
    core = make_core(1)
    core.ask(request("a", 1))
    other: Any = core.scheduler_class()
    other.add_request(request("b", 2))
    assert (core.inside(), list(other.requests)) == (["a"], ["b"])


# --- seams: the manager ----------------------------------------------------------------------------


@dataclass
class Worker:
    """A manager without a model, over a store; ``stock`` has the mappings that punica was given."""

    manager: Any
    checkpoint: Checkpoint
    stock: list[Any]

    def request(self, task: str, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(task, number, str(task_path(self.checkpoint, task)))


class Cache(dict[int, Any]):
    """vLLM's cache of adapters, as far as it is read here."""

    @property
    def cache(self) -> dict[int, Any]:
        return self


@pytest.fixture
def worker(managing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    from vllm.lora.model_manager import LoRAModelManager

    checkpoint = build(tmp_path / "ck", STORED)
    store = Store().store
    store.preload(checkpoint.path, lambda opened: make_path(opened, slots=2))
    assert store.direct is not None
    manager = object.__new__(managing.TaskLoRAManager)
    manager.vlora_store = store
    manager.lora_config = SimpleNamespace(max_loras=2, max_cpu_loras=4)
    manager._direct_models, manager._direct_slots = {}, DirectSlots(store.direct)
    manager._routed_version, manager._stock_free = -1, None
    manager.stock_in_batch, manager.direct_in_batch = True, False
    manager._last_mapping = manager._last_slot_layout = None
    manager.lora_index_to_id = [None, None]
    manager._registered_adapters, manager._active_adapters = Cache(), Cache()
    stock: list[Any] = []
    monkeypatch.setattr(
        LoRAModelManager, "_set_adapter_mapping", lambda self, mapping: stock.append(mapping)
    )
    return Worker(manager, checkpoint, stock)


def test_a_direct_task_is_an_adapter_of_the_managers(worker: Worker) -> None:
    from vllm.lora.request import LoRARequest

    manager = worker.manager
    assert manager.add_direct(worker.request("joint", 11))
    assert manager.add_direct(worker.request("private", 12))
    assert set(manager.list_adapters()) == {11, 12}
    assert manager.get_adapter(11).task.task_id == "joint"
    assert not manager.add_direct(worker.request("head", 13)), "it needs a slot"
    assert not manager.add_direct(LoRARequest("ordinary", 14, "/peft/14"))
    assert not manager.add_direct(LoRARequest("ordinary", 11, "/peft/11"))
    assert manager.pin_adapter(11)
    assert manager.add_direct(worker.request("one", 15))
    assert set(held_ids(manager)) == {11, 15}
    assert set(manager.list_adapters()) == {11, 12, 15}, "12 gave its slot up and stays known"
    assert manager.activate_adapter(12)
    assert set(held_ids(manager)) == {11, 12}
    assert manager.remove_adapter(11)
    assert not manager.remove_adapter(11)
    assert set(manager.list_adapters()) == {12, 15}
    manager.add_direct(worker.request("mixed", 12))
    assert manager.get_adapter(12).task.task_id == "mixed"
    manager.remove_all_adapters()
    assert manager.list_adapters() == {}
    assert held_ids(manager) == []
    paths = {str(task_path(worker.checkpoint, task)) for task in TASKS}
    assert manager.direct_paths() == paths


def held_ids(manager: Any) -> list[int]:
    return [adapter for adapter in range(1, 100) if adapter in manager._direct_slots]


def test_punica_sees_direct_tokens_as_the_base_models(worker: Worker) -> None:
    from vllm.lora.layers import LoRAMapping

    manager = worker.manager
    for task, number in (("joint", 11), ("private", 12)):
        manager.add_direct(worker.request(task, number))
    mapping = LoRAMapping((11, 11, 0, 7, 12), (11, 0, 7, 12), is_prefill=True)
    manager.set_adapter_mapping(mapping)
    assert worker.stock == [LoRAMapping((0, 0, 0, 7, 0), (0, 0, 7, 0), is_prefill=True)]
    assert mapping.index_mapping == (11, 11, 0, 7, 12)
    path = manager.vlora_store.direct
    got = [path.table.tasks[slot] for slot in path.routing.token_slots[:5].tolist()]
    models = manager._direct_models
    joint, private = models[11].task.direct, models[12].task.direct
    assert got == [joint, joint, None, None, private]
    assert (manager.stock_in_batch, manager.direct_in_batch) == (True, True)
    for tokens, flags in (
        ((0, 0), (False, False)),
        ((12, 0), (False, True)),
        ((7, 0), (True, False)),
    ):
        manager.set_adapter_mapping(LoRAMapping(tokens, tokens))
        assert (manager.stock_in_batch, manager.direct_in_batch) == flags


def test_the_same_mapping_is_routed_again_when_a_slot_holds_another_task(worker: Worker) -> None:
    from vllm.lora.layers import LoRAMapping

    manager = worker.manager
    routed: list[int] = []
    route = manager._direct_slots.route
    manager._direct_slots.route = lambda tokens: routed.append(len(tokens)) or route(tokens)
    manager.add_direct(worker.request("joint", 11))
    for _ in range(3):
        manager.set_adapter_mapping(LoRAMapping((11, 0), (11, 0)))
    assert routed == [2]
    manager.add_direct(worker.request("joint", 11))
    manager.set_adapter_mapping(LoRAMapping((11, 0), (11, 0)))
    assert routed == [2], "nothing changed"
    for task, number in (("private", 12), ("one", 13), ("joint", 11)):
        manager.add_direct(worker.request(task, number))
    manager.set_adapter_mapping(LoRAMapping((11, 0), (11, 0)))
    assert routed == [2, 2], "11 was out and came back, to another slot perhaps"
    path = manager.vlora_store.direct
    slot = path.routing.token_slots[0].item()
    assert path.table.tasks[slot] is manager._direct_models[11].task.direct


def test_batches_without_stock_adapters_trouble_punica_once_a_shape(worker: Worker) -> None:
    from vllm.lora.layers import LoRAMapping

    manager = worker.manager
    for task, number in (("joint", 11), ("private", 12)):
        manager.add_direct(worker.request(task, number))

    def calls(*tokens: int, is_prefill: bool = False) -> int:
        before = len(worker.stock)
        manager.set_adapter_mapping(LoRAMapping(tokens, tokens, is_prefill=is_prefill))
        return len(worker.stock) - before

    assert calls(11, 12) == 1
    assert calls(12, 11) == calls(0, 11) == calls(0, 0) == 0
    assert worker.stock[-1] == LoRAMapping((0, 0), (0, 0))
    assert calls(0, 11, 12) == 1
    assert calls(0, 11, 12, is_prefill=True) == 1
    assert calls(0, 7, 12, is_prefill=True) == 1
    assert worker.stock[-1].index_mapping == (0, 7, 0)
    assert calls(0, 8, 12, is_prefill=True) == 1
    assert calls(0, 11, 12, is_prefill=True) == 1, "punica still holds an adapter"
    assert calls(12, 11, 12, is_prefill=True) == 0


def test_other_towers_mappings_are_stock(worker: Worker) -> None:
    from vllm.lora.layers import LoRAMapping, LoRAMappingType

    manager = worker.manager
    manager.add_direct(worker.request("joint", 11))
    manager.set_adapter_mapping(LoRAMapping((11, 0), (11, 0)))
    runs = list(manager.vlora_store.direct.routing.runs)
    tower = LoRAMapping((11, 11, 11), (11,), type=LoRAMappingType.TOWER)
    manager.set_adapter_mapping(tower)
    assert worker.stock[-1] is tower
    assert manager.vlora_store.direct.routing.runs == runs


class StockWorker:
    """The part of vLLM's worker manager that the seams wrap."""

    def __init__(self, manager: Any) -> None:
        self._adapter_manager = manager
        self.calls: list[Any] = []

    def apply(self, lora_requests: set[Any]) -> None:
        self.calls.append({r.lora_int_id for r in lora_requests})

    def add_adapter(self, lora_request: Any) -> bool:
        self.calls.append(lora_request.lora_int_id)
        return True

    def add_dummy(self, lora_request: Any, rank: int) -> bool:
        self.calls.append((lora_request.lora_int_id, rank))
        return True

    def remove_adapter(self, adapter: int) -> bool:
        return self._adapter_manager.remove_adapter(adapter)


def test_a_batchs_direct_tasks_are_not_counted_against_the_slots(
    seams: Any, worker: Worker
) -> None:
    from vllm.lora.request import LoRARequest

    stock = StockWorker(worker.manager)
    batch = {worker.request("joint", 11), worker.request("private", 12), worker.request("head", 13),
             LoRARequest("ordinary", 5, "/peft/5"), None}  # fmt: skip
    seams._apply_adapters(StockWorker.apply)(stock, batch)
    assert stock.calls == [{13, 5}]
    assert set(held_ids(worker.manager)) == {11, 12}


def test_an_id_that_comes_with_another_path_is_loaded_anew(seams: Any, worker: Worker) -> None:
    from vllm.lora.request import LoRARequest

    add = seams._add_adapter(StockWorker.add_adapter)
    stock, manager = StockWorker(worker.manager), worker.manager
    assert add(stock, worker.request("joint", 11))
    assert add(stock, worker.request("joint", 11))
    assert stock.calls == []
    assert add(stock, worker.request("private", 11))
    assert manager.get_adapter(11).task.task_id == "private"
    assert add(stock, LoRARequest("ordinary", 11, "/peft/11"))
    assert stock.calls == [11]
    assert held_ids(manager) == [], "the direct task of this id is gone"
    assert manager.get_adapter(11) is None


def test_warm_up_adapters_beyond_the_slots_stand_for_direct_tasks(
    seams: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    add = seams._add_dummy_lora(StockWorker.add_dummy)
    stock, manager = StockWorker(worker.manager), worker.manager
    for number in (1, 2, 3, 4):
        assert add(stock, LoRARequest(f"dummy {number}", number, "/not/a/real/path"), 8)
    assert stock.calls == [(1, 8), (2, 8)]
    assert set(manager.list_adapters()) == {3, 4}
    # They are activated by id and path like any other, and add nothing.
    assert manager.add_direct(LoRARequest("dummy 3", 3, "/not/a/real/path"))
    empty = manager.vlora_store.direct.empty
    assert manager._direct_models[3].task.direct is empty
    assert not empty.records.any()
    monkeypatch.setattr(manager.vlora_store, "direct", None)
    assert add(stock, LoRARequest("dummy 5", 5, "/not/a/real/path"), 8)
    assert stock.calls[-1] == (5, 8)


# --- seams: the layers -----------------------------------------------------------------------------


class Punica:
    """Adds 1 to y and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *rest: Any) -> None:
        self.calls.append("linear")
        assert rest == ("a", "b", 1.0, "slices")
        y += 1

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append("logits")
        return "logits"

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append("embedding")
        return "embedding"

    def anything_else(self) -> str:
        return "forwarded"


@dataclass
class Layer:
    """One layer's punica, a batch of three tokens of which two are a direct task's, and its update."""

    wrapper: Any
    punica: Punica
    manager: Any
    x: torch.Tensor
    update: torch.Tensor

    def add(self) -> torch.Tensor:
        y = torch.zeros(3, 80)
        self.wrapper.add_lora_linear(y, self.x, (), (), 1.0, (80,))
        return y


def make_punica(module: Any, checkpoint: Checkpoint, on_cpu: bool, direct: bool = True) -> Layer:
    path = make_path(checkpoint)
    activate_all(path, checkpoint, ["one"]).route(np.array([1, 0, 1]))
    manager = SimpleNamespace(
        vlora_store=SimpleNamespace(direct=path), stock_in_batch=False, direct_in_batch=True
    )
    inner = Punica()
    linear = SimpleNamespace(
        punica_wrapper=inner, lora_a_stacked="a", lora_b_stacked="b", output_slices="slices"
    )
    layer = path.layers["o_proj"]
    wrapper = module.LayerPunica(manager, linear, layer if direct else None)
    wrapper._on_cpu = on_cpu
    x, update = torch.randn(3, 96), torch.zeros(3, 80)
    add_direct(update, x, layer, path.table, path.routing)
    assert update.abs().amax() > 0.1
    return Layer(wrapper, inner, manager, x, update)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_a_layer_adds_stock_and_direct_updates(
    layer_calls: Any, tmp_path: Path, on_cpu: bool, stock: bool, direct: bool
) -> None:
    """A CPU leaves out what the batch lacks; a GPU's launches are captured whatever it holds."""
    layer = make_punica(layer_calls, build(tmp_path / "ck"), on_cpu)
    layer.manager.stock_in_batch, layer.manager.direct_in_batch = stock, direct
    runs_stock, runs_direct = stock or not on_cpu, direct or not on_cpu
    want = float(runs_stock) + layer.update * runs_direct
    torch.testing.assert_close(layer.add(), want)
    assert layer.punica.calls == ["linear"] * runs_stock
    for name in ("logits", "embedding"):
        got = getattr(layer.wrapper, f"add_lora_{name}")(1, two=2)
        assert got == (name if runs_stock else None)
    assert layer.wrapper.anything_else() == "forwarded"
    with pytest.raises(AssertionError):
        layer.wrapper.add_lora_linear(torch.zeros(3, 80), layer.x, (), (), 2.0, (80,))


def test_a_layer_without_direct_tasks_stays_stock(layer_calls: Any, tmp_path: Path) -> None:
    layer = make_punica(layer_calls, build(tmp_path / "ck"), on_cpu=True, direct=False)
    assert not layer.add().any()
    layer.manager.stock_in_batch = True
    assert (layer.add() == 1).all()


@pytest.fixture
def own_calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of the module whose custom operator is the registered one, whoever imported it before."""
    monkeypatch.delitem(sys.modules, "vllm_vlora.plugin.layer_calls", raising=False)
    return importlib.import_module("vllm_vlora.plugin.layer_calls")


def test_a_compiled_layer_looks_at_each_batch_anew(own_calls: Any, tmp_path: Path) -> None:
    layer = make_punica(own_calls, build(tmp_path / "ck"), on_cpu=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(3, 80)
        layer.wrapper.add_lora_linear(y, x, (), (), 1.0, (80,))
        return y * 2

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    layer.manager.direct_in_batch = False  # As in the run that the graph is traced in.
    assert not compiled(layer.x).any()
    layer.manager.direct_in_batch = True
    torch.testing.assert_close(compiled(layer.x), layer.update * 2)
    layer.manager.stock_in_batch = True
    torch.testing.assert_close(compiled(layer.x), (layer.update + 1) * 2)


def test_a_layer_that_nobody_holds_is_not_kept_by_its_number(
    layer_calls: Any, tmp_path: Path
) -> None:
    layer = make_punica(layer_calls, build(tmp_path / "ck"), on_cpu=True)
    handle = layer.wrapper._handle
    assert layer_calls._LAYERS[handle] is layer.wrapper
    del layer
    assert handle not in layer_calls._LAYERS
