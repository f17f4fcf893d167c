"""``VLLM_VLORA_ROWS=narrow``: private rows of 3 and 2 bits take no more on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plugin_world import (
    CPU,
    LAYERS,
    MODULES,
    TASKS,
    activate_all,
    bits_of_rank,
    build,
    layouts,
    make_path,
)

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.narrow_rows import NarrowMatrix
from vllm_vlora.plugin.identity import task_path
from vllm_vlora.plugin.layouts import Run, SliceLayout
from vllm_vlora.plugin.memory import plan_memory
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.representations.private import encode_narrow
from vllm_vlora.triton_kernels.direct import add_direct

TOKENS = np.array([1, 0, 2, 2, 3, 3, 3, 0, 4, 1, 99, 2, *[3] * 12, 4, 2])


def added(checkpoint: Checkpoint, rank: int, ranks: int, narrow: bool) -> list[torch.Tensor]:
    """What each layer adds to a batch of all tasks."""
    path = make_path(checkpoint, layouts(rank, ranks), narrow_rows=narrow)
    assert path.narrow_rows == narrow
    activate_all(path, checkpoint, list(checkpoint.tasks)).route(TOKENS)
    found = []
    for name in LAYERS:
        layer = path.layers[name]
        x = torch.randn(len(TOKENS), layer.d_in, generator=torch.Generator().manual_seed(3))
        y = torch.zeros(len(TOKENS), layer.width)
        add_direct(y, x, layer, path.table, path.routing)
        found.append(y)
    return found


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_tasks_answer_with_the_same_bits(tmp_path: Path, rank: int, ranks: int) -> None:
    """On a second rank a cut begins inside of a block, at a block, and inside of a group of scales."""
    checkpoint = build(tmp_path / "ck", private="narrow")
    wide, narrow = (added(checkpoint, rank, ranks, held) for held in (False, True))
    for one, other in zip(wide, narrow, strict=True):
        assert one.abs().amax() > 0.3
        assert torch.equal(one, other)


def test_bytes_of_a_task(tmp_path: Path) -> None:
    """Task "private": q (80 to 256) with rows of 4, 3 and 2 bits, v (80 to 40) with one row of 4 bits,
    o (96 to 80) with one, two and two."""
    checkpoint = build(tmp_path / "ck", private="narrow")
    assert [bits_of_rank(rank) for rank in (3, 1, 5)] == [(1, 1, 1), (1, 0, 0), (1, 2, 2)]
    # A block of 64 has 32, 24 or 16 bytes of codes and one of scale; a row has 8 of its scales' range.
    scales = 3 * ((2 + 8) + (4 + 8)) + ((2 + 8) + (1 + 8)) + 5 * ((2 + 8) + (2 + 8))
    codes = {
        True: (2 + 4) * (32 + 24 + 16) + (2 + 1) * 32 + (2 + 2) * (32 + 2 * 24 + 2 * 16),
        False: 32 * (3 * (2 + 4) + (2 + 1) + 5 * (2 + 2)),
    }
    for narrow in (True, False):
        path = make_path(checkpoint, narrow_rows=narrow)
        task = checkpoint.load_task("private", narrow=narrow)
        path.make_task(task)
        assert path.memory().factors == codes[narrow] + scales
    assert (codes[True], codes[False], scales) == (976, 1312, 185)


def test_a_kernel_has_one_body_for_all_that_is_nf4_dq(tmp_path: Path) -> None:
    """A row of 4 bits in another module is held likewise, and a checkpoint without narrow rows is not
    held otherwise: its kernels would do more for nothing."""
    checkpoint = build(tmp_path / "ck", private="narrow")
    path = make_path(checkpoint, narrow_rows=True)
    assert {layer.formats for layer in path.layers.values()} == {("nf4-narrow",)}
    task = path.make_task(checkpoint.load_task("private", narrow=True))
    assert all(isinstance(part.a, NarrowMatrix) for part in task.slices.values())
    for private, formats in (("nf4-dq", ("nf4", "nf4-dq")), ("int8", ("int8",))):
        other = build(tmp_path / private, private=private)
        path = make_path(other, narrow_rows=True)
        assert not path.narrow_rows
        assert {layer.formats for layer in path.layers.values()} == {formats}


def test_a_late_task_runs_direct_where_the_kernels_know_it(tmp_path: Path) -> None:
    first = build(tmp_path / "ck", private="narrow")
    later = build(tmp_path / "later", {"late": {"o": ("private", 3)}}, private="narrow", seed=1)
    plain = build(tmp_path / "plain", {"late": {"o": ("private", 3)}}, private="nf4-dq")
    other = build(tmp_path / "other", {"late": {"o": ("private", 3)}}, private="nf4")
    for narrow in (True, False):
        path = make_path(first, narrow_rows=narrow)
        assert [path.obstacle(checkpoint, "late") for checkpoint in (later, plain)] == [None, None]
        reason = path.obstacle(other, "late")
        # A rank's cut makes nf4 of nf4-dq, and so kernels know it.
        wanted = "o is nf4, a format that no task had when the engine started" if narrow else None
        assert reason == wanted
    # Of a checkpoint without narrow rows the kernels know four bits alone, and later rows get these.
    path = make_path(build(tmp_path / "before", private="nf4-dq"), narrow_rows=True)
    assert path.obstacle(later, "late") is None
    made = path.make_task(later.load_task("late", narrow=path.narrow_rows))
    assert [part.a.format for part in made.slices.values() if part.a] == ["nf4-dq"]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("mode", ["direct", "materialize"])
def test_the_plan_is_what_a_device_holds(tmp_path: Path, mode: str, narrow: bool) -> None:
    checkpoint = build(tmp_path / "ck", private="narrow")
    plan = plan_memory(checkpoint, max_loras=5, dtype="fp32", narrow_rows=narrow).mode(mode)
    if mode == "direct":
        path = make_path(checkpoint, narrow_rows=narrow)
        for task in TASKS:
            path.make_task(checkpoint.load_task(task, narrow=path.narrow_rows))
        assert path.memory().factors == plan.factors_nbytes
    else:
        store = ResidentStore(CPU, str, lambda *_: None, narrow_rows=narrow)
        store.preload(checkpoint.path)
        sources = [pair for task in store.tasks() for pair in task.sources.values()]
        private = [s.matrix.nbytes for pair in sources for s in pair if s.left is None]
        assert sum(private) == plan.factors_nbytes
        if narrow:
            # Nothing is kept beside; codes of an odd number of 8 bytes are followed by 8 of nothing.
            extra = store.materialized_nbytes - plan.bases_nbytes - plan.tasks_nbytes
            assert 0 <= extra <= 8 * len(private)


def test_the_plan_of_a_tensor_parallel_rank(tmp_path: Path) -> None:
    """Literally: rank 0 of 2 has half of o's columns in (48 of 96) and of q's out (128 of 256)."""
    names = {"q": "m.q_proj", "o": "m.o_proj"}
    folder = tmp_path / "ck"
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    stored = {}
    for name, module in names.items():
        d_in, d_out, _ = MODULES[name]
        writer.add_module(module, d_in, d_out)
        a, b = torch.randn(3, d_in), torch.randn(d_out, 3)
        stored[module] = encode_narrow(a, b, 1.0, (1, 1, 1))
    writer.add_task("t", stored, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    checkpoint = Checkpoint.open(folder)
    block = 32 + 24 + 16
    for tp, blocks in ((1, (2 + 4) + (2 + 2)), (2, (2 + 2) + (1 + 2))):
        found = plan_memory(checkpoint, max_loras=1, tp=tp, narrow_rows=True).mode("direct")
        assert found.factors_nbytes == blocks * (block + 3) + 4 * 3 * 8


def test_slots_hold_the_same_bits(tmp_path: Path) -> None:
    """Also where an engine shards ranks fully, so that a slot takes some rows of A alone."""
    checkpoint = build(tmp_path / "ck", private="narrow")
    found = []
    for narrow in (False, True):
        slots = {n: (torch.full((2, 4, m[0]), torch.nan), torch.full((2, m[1], 8), torch.nan))
                 for n, m in MODULES.items()}  # fmt: skip
        described = [
            SliceLayout(
                name,
                lambda s, a=a: a[s],
                lambda s, b=b: b[s].T,
                *MODULES[name][:2],
                (Run(0, 0, MODULES[name][0]),),
                (Run(0, 0, MODULES[name][1]),),
                first_row=2,
            )
            for name, (a, b) in slots.items()
        ]
        writer = SlotWriter(described, 8)
        store = ResidentStore(CPU, str, lambda *_: None, narrow_rows=narrow)
        store.preload(checkpoint.path)
        task = store.task(task_path(checkpoint, "private"))
        matrices = [source.matrix for pair in task.sources.values() for source in pair]
        assert {isinstance(matrix, NarrowMatrix) for matrix in matrices} == {narrow}
        writer.write(1, task)
        found.append([side[1].clone() for pair in slots.values() for side in pair])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert any(side.any() for side in found[0])


def test_another_pipeline_rank_s_rows_are_left_out(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck", private="narrow")
    held = []
    for elsewhere in ((), ("q",)):
        store = ResidentStore(CPU, str, lambda *_: None, elsewhere=elsewhere, narrow_rows=True)
        store.preload(checkpoint.path)
        task = store.task(task_path(checkpoint, "private"))
        held.append(task.sources["o"][0].matrix)
        assert ("q" in task.sources) == ("q" not in elsewhere)
    one, other = held
    assert isinstance(one, NarrowMatrix)
    assert isinstance(other, NarrowMatrix)
    assert one.bits == other.bits
    assert all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)
