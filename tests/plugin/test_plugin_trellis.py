"""Private factors in trellis codes: served direct and from slots, whole and cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plugin_world import (
    CPU,
    MODULES,
    TASKS,
    TOKENS,
    bits_of_rank,
    build,
    layouts,
    make_path,
    run,
)

from vllm_vlora.plugin.identity import task_path
from vllm_vlora.plugin.layouts import Run, SliceLayout
from vllm_vlora.plugin.memory import plan_memory
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.quantize import unpack


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_layers_add_is_what_the_weights_say(tmp_path: Path, ranks: int) -> None:
    """On a second rank a cut begins at a block, and inside of one."""
    checkpoint = build(tmp_path / "ck", private="trellis")
    paths = [make_path(checkpoint, layouts(rank, ranks)) for rank in range(ranks)]
    for path in paths:
        assert {layer.formats for layer in path.layers.values()} == {("trellis",)}
    for answer in run(checkpoint, paths, TOKENS).values():
        assert answer.want.abs().amax() > 0.3
        assert torch.allclose(answer.got.double(), answer.want, atol=1e-4)


def test_bytes_of_a_task(tmp_path: Path) -> None:
    """Every row has room for 4 bits: 32 bytes a block of 64 and 8 more, its width and its scale."""
    checkpoint = build(tmp_path / "ck", private="trellis")
    path = make_path(checkpoint)
    path.make_task(checkpoint.load_task("private"))
    rows = [(3, 2, 4), (1, 2, 1), (5, 2, 2)]
    want = sum(rank * (32 * blocks + 8 + 1 + 4) for rank, *sides in rows for blocks in sides)
    assert path.memory().factors == want
    # On disk a row of 2 bits has half of the bytes.
    stored = checkpoint.load_task("private").modules["o"]
    assert stored.bits == bits_of_rank(5) == (1, 2, 2)
    assert stored.matrices["A"].parts["widths"][:, 0].tolist() == [4, 3, 3, 2, 2]


@pytest.mark.parametrize("mode", ["direct", "materialize"])
def test_the_plan_is_what_a_device_holds(tmp_path: Path, mode: str) -> None:
    checkpoint = build(tmp_path / "ck", private="trellis")
    plan = plan_memory(checkpoint, max_loras=5, dtype="fp32").mode(mode)
    if mode == "direct":
        path = make_path(checkpoint)
        for task in TASKS:
            path.make_task(checkpoint.load_task(task))
        assert path.memory().factors == plan.factors_nbytes
    else:
        store = ResidentStore(CPU, str, lambda *_: None)
        store.preload(checkpoint.path)
        sources = [pair for task in store.tasks() for pair in task.sources.values()]
        private = [s.matrix.nbytes for pair in sources for s in pair if s.left is None]
        assert sum(private) == plan.factors_nbytes


def test_slots_hold_the_stored_values(tmp_path: Path) -> None:
    """Also where an engine shards ranks fully, so that a slot takes some rows of A alone."""
    checkpoint = build(tmp_path / "ck", private="trellis")
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
    store = ResidentStore(CPU, str, lambda *_: None)
    store.preload(checkpoint.path)
    writer.write(1, store.task(task_path(checkpoint, "private")))
    stored = checkpoint.load_task("private").modules["o"]
    a, b = (unpack(stored.matrices[side]) for side in "AB")
    assert torch.equal(slots["o"][0][1][:3], a[2:])
    assert not slots["o"][0][1][3:].any()
    assert torch.equal(slots["o"][1][1][:, :5], 1.5 * b.T)


def test_a_late_task_runs_direct_where_the_kernels_know_it(tmp_path: Path) -> None:
    late = {"late": {"o": ("private", 3)}}
    later = build(tmp_path / "later", late, private="trellis", seed=1)
    assert make_path(build(tmp_path / "ck", private="trellis")).obstacle(later, "late") is None
    other = make_path(build(tmp_path / "nf4", private="nf4"))
    reason = "o is trellis, a format that no task had when the engine started"
    assert other.obstacle(later, "late") == reason


def test_narrow_rows_are_those_of_nf4(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ck", private="trellis")
    assert not checkpoint.has_narrow_rows(TASKS)
    path = make_path(checkpoint, narrow_rows=True)
    assert not path.narrow_rows
    assert {layer.formats for layer in path.layers.values()} == {("trellis",)}
