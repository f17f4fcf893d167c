"""Blends, negation and interpolation of the tasks of one subspace or checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from synthetic import SHAPES, dense, family, run
from tiny_adapters import SHAPES as TINY
from tiny_adapters import delta_w, tiny_adapters, tiny_weights

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.errors import OptionError, TaskIdError, TaskNotFoundError, VLoRAError
from vllm_vlora.merging.analysis import compute_similarity_matrix
from vllm_vlora.merging.blending import (
    blend_tasks,
    core_similarity,
    interpolate_tasks,
    negate_task,
    read_tasks,
)
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.weights import LoRAWeights

WEIGHTS = {"task0": 0.6, "task2": 0.7, "task1": -0.3}


def joint(count: int = 4, components: int = 8) -> SharedSubspace:
    ranks = (2, 3, 2, 4)
    adapters = [tiny_weights(s, rank=ranks[s], alpha=3 + s) for s in range(count)]
    return SharedSubspace.from_adapters(adapters, num_components=components, representation="joint")


# --- a subspace -----------------------------------------------------------------------------------


def test_a_blend_of_cores_is_the_blend_of_updates() -> None:
    subspace = joint()
    weights = {"task_0": 0.6, "task_3": 0.9, "task_1": -0.5}
    subspace.add_task(blend_tasks(subspace, weights, "mixed"))
    blended = subspace.reconstruct("mixed")
    for layer in TINY:
        parts = [w * delta_w(subspace.reconstruct(t), layer) for t, w in weights.items()]
        assert torch.allclose(delta_w(blended, layer), torch.stack(parts).sum(0), atol=1e-5)
    assert blended.metadata["base_model_name_or_path"] == "org/base"


def test_negation_and_interpolation() -> None:
    subspace = joint()
    cores = {task: subspace.tasks[task].cores for task in subspace.tasks}
    less = negate_task(subspace, "task_1", "less")
    assert torch.equal(less.cores["layers.0.q_proj"], -cores["task_1"]["layers.0.q_proj"])
    for t in (0.0, 0.25, 1.0, 1.5):
        between = interpolate_tasks(subspace, "task_0", "task_2", t)
        for layer in TINY:
            wanted = (1 - t) * cores["task_0"][layer] + t * cores["task_2"][layer]
            assert torch.allclose(between.cores[layer], wanted, atol=1e-6)
    assert (
        interpolate_tasks(subspace, "task_0", "task_2", 0.25).task_id == "0.75*task_0+0.25*task_2"
    )
    assert blend_tasks(subspace, {"task_0": 1, "task_1": -2}).task_id == "1*task_0-2*task_1"


def test_a_task_without_a_layer_adds_nothing_there() -> None:
    few = tiny_weights(1, shapes={"layers.0.q_proj": TINY["layers.0.q_proj"]})
    subspace = SharedSubspace.from_adapters(
        [tiny_weights(0), few], num_components=4, representation="joint", missing="zero"
    )
    mixed = blend_tasks(subspace, {"task_0": 0.5, "task_1": 0.5})
    own = subspace.tasks["task_0"].cores["layers.0.v_proj"]
    assert torch.equal(mixed.cores["layers.0.v_proj"], 0.5 * own)
    assert list(negate_task(subspace, "task_1").cores) == ["layers.0.q_proj"]


def test_cosines_of_cores_are_those_of_updates() -> None:
    subspace = joint()
    tasks = [subspace.reconstruct(task) for task in subspace.tasks]
    wanted = compute_similarity_matrix(tasks)
    assert torch.allclose(core_similarity(subspace), wanted, atol=1e-5)
    assert torch.allclose(
        core_similarity(subspace, ["task_2", "task_0"]), wanted[[2, 0]][:, [2, 0]], atol=1e-5
    )


def test_cosines_on_a_quantised_basis_too() -> None:
    shapes = {"layers.0.q_proj": (128, 96)}
    adapters = tiny_adapters(3, shapes=shapes, spread=0.5)
    subspace = SharedSubspace.from_adapters(adapters, num_components=4, representation="joint")
    subspace.quantize(method="nf4")
    tasks = [subspace.reconstruct(task) for task in subspace.tasks]
    assert torch.allclose(core_similarity(subspace), compute_similarity_matrix(tasks), atol=1e-5)


def test_a_flat_subspace_has_no_exact_blends() -> None:
    subspace = SharedSubspace.from_adapters(tiny_adapters(3), num_components=2)
    calls: list[Callable[[], object]] = [
        lambda: blend_tasks(subspace, {"task_0": 0.5, "task_1": 0.5}),
        lambda: negate_task(subspace, "task_0"),
        lambda: core_similarity(subspace),
    ]
    for call in calls:
        with pytest.raises(OptionError, match="task_arithmetic"):
            call()


def test_heads_of_a_blend() -> None:
    key, head = "base_model.model.score.weight", torch.randn(2, 12)
    plain, other = tiny_adapters(2)
    metadata = {**other.metadata, "modules_to_save": ["score"]}
    headed = LoRAWeights(
        other.layer_names, other.lora_a, other.lora_b, other.rank, metadata, {}, {key: head}
    )
    subspace = SharedSubspace.from_adapters(
        [plain, headed], num_components=4, representation="joint"
    )
    subspace.add_task(blend_tasks(subspace, {"task_0": 0.5, "task_1": 0.5}, "mixed"))
    found = subspace.reconstruct("mixed")
    assert torch.equal(found.extra[key], head)
    assert found.metadata["modules_to_save"] == ["score"]


def test_a_blend_is_saved_and_read(tmp_path: Path) -> None:
    subspace = joint()
    subspace.add_task(blend_tasks(subspace, {"task_0": 0.6, "task_1": 0.4}, "mixed"))
    again = SharedSubspace.load(subspace.save(tmp_path / "saved"))
    assert again.scales_known
    for layer in TINY:
        wanted = delta_w(subspace.reconstruct("mixed"), layer)
        assert torch.allclose(delta_w(again.reconstruct("mixed"), layer), wanted, atol=1e-6)
    assert validate(tmp_path / "saved") == []


# --- a checkpoint ---------------------------------------------------------------------------------


def stored(path: Path, task_id: str) -> dict[str, torch.Tensor]:
    """delta_W of a task as the checkpoint holds it, float64."""
    [weights] = read_tasks(Checkpoint.open(path), [task_id])
    return {name: delta_w(weights, name) for name in weights.layer_names}


def expected(path: Path, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for task_id, weight in weights.items():
        for name, update in stored(path, task_id).items():
            total[name] = total.get(name, torch.zeros_like(update)) + weight * update
    return total


def files_of(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*.safetensors")
    }


def error_between(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    lost = sum(float((found[name] - update).square().sum()) for name, update in wanted.items())
    return (lost / sum(float(update.square().sum()) for update in wanted.values())) ** 0.5


MADE = {
    "joint": {"representation": "joint", "num_components": 8, "quantize": "none"},
    "joint nf4": {"representation": "joint", "num_components": 8, "quantize": "nf4"},
    "private": {"representation": "private", "ratio": 2.0},
    "private nf4": {"representation": "private", "quantize": "nf4", "ratio": 4.0},
    "flat": {"representation": "flat", "num_components": 1, "quantize": "none"},
    "auto": {"ratio": 4.0},
}


@pytest.mark.parametrize("made", list(MADE))
def test_a_blend_is_written_into_a_checkpoint(tmp_path: Path, made: str) -> None:
    path = tmp_path / "checkpoint"
    rank_of_flat = {"flat": 4}.get(made)
    adapters = family(tmp_path / "adapters", 4, related=True)
    if rank_of_flat is not None:
        adapters = {name: a for name, a in adapters.items() if name in ("task0", "task2")}
    run(adapters, path, **MADE[made])
    weights = {name: WEIGHTS[name] for name in WEIGHTS if name in adapters}
    before, wanted = files_of(path), expected(path, weights)
    blended = blend_tasks(path, weights, "mixed")
    assert error_between(stored(path, "mixed"), wanted) < 1e-5
    assert blended.error < 1e-5
    after = files_of(path)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    assert validate(path) == []
    checkpoint = Checkpoint.open(path)
    assert list(checkpoint.tasks) == [*adapters, "mixed"]
    assert blended.nbytes == checkpoint.lora_nbytes("mixed")
    if made != "auto":
        kind = "joint" if made.startswith("joint") else "private"
        assert blended.representation == kind
    # What PEFT and vLLM would load is the same update.
    exported = open_adapter(export_task(checkpoint, "mixed", tmp_path / "out"))
    found = {name: dense(exported, name) for name in exported.modules}
    assert error_between(found, wanted) < 1e-5


def test_blends_of_blocks_of_a_basis(tmp_path: Path) -> None:
    """Tasks of two clusters stand on different rows of a basis; their blend on both blocks."""
    path = tmp_path / "checkpoint"
    adapters: dict[str, Adapter] = {}
    for seed in (1, 2):
        made = family(tmp_path / f"family{seed}", 3, related=True, seed=seed)
        adapters.update({f"{name}-{seed}": adapter for name, adapter in made.items()})
    run(adapters, path, representation="joint", clusters=2, num_components=4, quantize="none")
    checkpoint = Checkpoint.open(path)
    blocks = {s.rows for record in checkpoint.tasks.values() for s in record.segments}
    assert len(blocks) > 1
    weights = {"task0-1": 0.5, "task1-2": 0.5, "task2-1": -1.0}
    wanted = expected(path, weights)
    blended = blend_tasks(path, weights, "mixed")
    assert blended.representation == "joint"
    assert error_between(stored(path, "mixed"), wanted) < 1e-5
    same = blend_tasks(path, {"task0-1": 0.5, "task1-1": 0.5}, "same")
    assert same.representation == "joint"
    rows = {s.rows for s in Checkpoint.open(path).record("same").segments}
    assert rows <= blocks


def test_a_smaller_rank_and_format_say_what_they_lose(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    run(family(tmp_path / "adapters", 4, related=True), path, representation="private", ratio=2.0)
    wanted = expected(path, WEIGHTS)
    exact = blend_tasks(path, WEIGHTS, "exact")
    cut = blend_tasks(path, WEIGHTS, "cut", rank=3)
    assert cut.ranks == (3, 3)
    sigma = {name: torch.linalg.svdvals(update) for name, update in wanted.items()}
    lost = sum(float(values[3:].square().sum()) for values in sigma.values())
    whole = sum(float(values.square().sum()) for values in sigma.values())
    assert cut.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert error_between(stored(path, "cut"), wanted) == pytest.approx(cut.error, rel=1e-3)
    small = blend_tasks(path, WEIGHTS, "small", format="nf4-dq")
    assert small.nbytes < exact.nbytes / 3.5
    assert error_between(stored(path, "small"), wanted) == pytest.approx(small.error, rel=1e-2)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_core_is_not_stored_in_trellis_codes(tmp_path: Path, elsewhere: bool) -> None:
    """Only private factors have them: no reader would open the checkpoint again."""
    path = tmp_path / "checkpoint"
    output = tmp_path / "other" if elsewhere else None
    run(family(tmp_path / "adapters", 3, related=True), path, **MADE["joint"])
    weights = {"task0": 0.5, "task1": 0.5}
    with pytest.raises(OptionError, match="give nf4-dq"):
        blend_tasks(path, weights, "both", format="trellis", output=output)
    assert list(Checkpoint.open(path).tasks) == ["task0", "task1", "task2"]
    assert not (tmp_path / "other").exists()


def test_private_tasks_blend_in_trellis_codes(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    run(family(tmp_path / "adapters", 3, related=True), path, representation="private", ratio=2.0)
    weights = {"task0": 0.5, "task1": 0.5}
    wanted = expected(path, weights)
    both = blend_tasks(path, weights, "both", format="trellis")
    assert validate(path) == []
    assert error_between(stored(path, "both"), wanted) == pytest.approx(both.error, rel=1e-3)


def test_negation_interpolation_and_cancelling_in_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    run(family(tmp_path / "adapters", 3, related=True), path, **MADE["joint"])
    negate_task(path, "task0", "not0")
    assert error_between(stored(path, "not0"), expected(path, {"task0": -1.0})) < 1e-5
    interpolate_tasks(path, "task0", "task1", 0.3, "between")
    wanted = expected(path, {"task0": 0.7, "task1": 0.3})
    assert error_between(stored(path, "between"), wanted) < 1e-5
    nothing = blend_tasks(path, {"task0": 1.0, "not0": 1.0}, "nothing")
    assert nothing.ranks == (1, 1)
    assert nothing.error == 0.0
    assert all(float(update.norm()) == 0 for update in stored(path, "nothing").values())
    # The same directions again: the rank does not grow.
    twice = blend_tasks(path, {"task0": 1.0, "not0": -1.0}, "twice")
    assert twice.ranks == (4, 4)


def test_replacing_and_other_folders(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    run(family(tmp_path / "adapters", 3, related=True), path, **MADE["joint"])
    with pytest.raises(TaskIdError, match="has a task 'task1' already"):
        negate_task(path, "task0", "task1")
    wanted = expected(path, {"task0": -1.0})
    negate_task(path, "task0", "task1", replace=True)
    assert error_between(stored(path, "task1"), wanted) < 1e-5
    assert list(Checkpoint.open(path).tasks) == ["task0", "task1", "task2"]
    before = files_of(path)
    blend_tasks(Checkpoint.open(path), {"task0": 0.5}, "half", output=tmp_path / "other")
    assert files_of(path) == before
    assert "half" in Checkpoint.open(tmp_path / "other").tasks


def test_read_tasks_are_what_was_compressed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    adapters = family(tmp_path / "adapters", 2, related=False)
    run(adapters, path, representation="private", quantize="none", ratio=1.0)
    for weights, adapter in zip(
        read_tasks(Checkpoint.open(path), list(adapters)), adapters.values()
    ):
        assert weights.layer_names == list(SHAPES)
        for name in SHAPES:
            assert torch.allclose(
                delta_w(weights, name), dense(adapter, name), rtol=1e-4, atol=1e-7
            )


CASES: list[tuple[type[VLoRAError], str, Callable[[SharedSubspace], object]]] = [
    (OptionError, "no tasks given", lambda s: blend_tasks(s, {})),
    (OptionError, "does not fit float32", lambda s: blend_tasks(s, {"task_0": float("inf")})),
    (TaskNotFoundError, "no task 'absent'", lambda s: blend_tasks(s, {"absent": 1.0})),
    (TaskNotFoundError, "no task 'absent'", lambda s: core_similarity(s, ["absent"])),
    (TaskIdError, "is empty", lambda s: negate_task(s, "task_0", "")),
    (OptionError, "given twice", lambda s: interpolate_tasks(s, "task_0", "task_0", 0.5)),
    (OptionError, "are for checkpoints", lambda s: blend_tasks(s, {"task_0": 1}, rank=2)),  # type: ignore[call-overload]
    (OptionError, "is for checkpoints", lambda s: negate_task(s, "task_0", replace=True)),  # type: ignore[call-overload]
    (OptionError, "rank 0", lambda s: blend_tasks("absent", {"task_0": 1}, rank=0)),
    (OptionError, "format 'int3'", lambda s: blend_tasks("absent", {"task_0": 1}, format="int3")),
]


@pytest.mark.parametrize(("kind", "words", "call"), CASES, ids=[words for _, words, _ in CASES])
def test_bad_input(
    kind: type[VLoRAError], words: str, call: Callable[[SharedSubspace], object]
) -> None:
    with pytest.raises(kind) as caught:
        call(joint())
    assert words in str(caught.value)
