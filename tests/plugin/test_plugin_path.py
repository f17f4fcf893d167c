"""The direct path: what its layers add, which tasks run in it, and what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plugin_world import (
    LAYERS,
    TASKS,
    TOKENS,
    Answer,
    activate_all,
    build,
    layout,
    layouts,
    make_path,
    run,
)

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.plugin.layouts import LayerLayout, Run
from vllm_vlora.quantize import PackedMatrix
from vllm_vlora.representations.private import encode_private
from vllm_vlora.triton_kernels.direct import add_direct

# --- the path: results -----------------------------------------------------------------------------


def answers(
    checkpoint: Checkpoint, ranks: int, tokens: np.ndarray, **options: Any
) -> dict[str, Answer]:
    """A batch through every layer on every rank, and the ranks' results together."""
    paths = [make_path(checkpoint, layouts(rank, ranks), **options) for rank in range(ranks)]
    return run(checkpoint, paths, tokens)


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
        "ignored": {"base_model.model.transformer.wte.base_layer.weight": torch.ones(2, 80)},
    }
    checkpoint = build(tmp_path / "ck", tasks, extra=extra)
    path = make_path(checkpoint)
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
    assert path.obstacle(other, "joint") == "q has another basis than the layers hold"
    only_joint = make_path(build(tmp_path / "only", {"joint": {"q": ("joint", 3)}}))
    assert only_joint.obstacle(first, "one") == (
        "o has rank 2, more than the private tasks that the engine started with"
    )
    # k's basis is in the checkpoint, but the engine started without a task that uses it.
    assert only_joint.obstacle(same, "joint") == "o has another basis than the layers hold"


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


@pytest.mark.parametrize("rank", [0, 1])
def test_every_pipeline_rank_decides_alike_and_holds_its_own(tmp_path: Path, rank: int) -> None:
    """Two ranks with a layer each, which know of each other's modules, against one with both."""
    first, later = build(tmp_path / "ck"), build(tmp_path / "later", seed=1)
    tall = build(tmp_path / "tall", {"one": {"o": ("private", 6)}, "two": {"q": ("private", 6)}})
    whole = make_path(first)
    mine, other = layouts()[rank], layouts()[1 - rank]
    elsewhere = {part.name: True for part in other.slices}
    path = make_path(first, [mine], elsewhere=elsewhere)
    for checkpoint in (first, later, tall):
        for task in checkpoint.tasks:
            assert path.obstacle(checkpoint, task) == whole.obstacle(checkpoint, task)
    assert set(path.layers) == {mine.name} & set(whole.layers)
    names = {part.name for part in mine.slices}
    for task in TASKS:
        made = path.make_task(first.load_task(task))
        assert len(made.slices) == len(names & set(TASKS[task]))
    both = [path.memory(), make_path(first, [other], elsewhere=dict.fromkeys(names, True)).memory()]
    assert sum(memory.bases for memory in both) == whole.memory().bases
    # A layer that has no direct form there has none for any rank.
    path = make_path(first, [mine], elsewhere=dict.fromkeys(elsewhere, False))
    for task in TASKS:
        refused = next((n for n in TASKS[task] if n in elsewhere), None)
        reason = refused and f"{refused} is a layer without a direct form"
        assert path.obstacle(first, task) == reason
