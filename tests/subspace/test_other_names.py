"""Adapters that name layers as another model class does: subspaces, merges, comparisons, additions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import SHAPES, delta_w, save_tiny_adapters, tiny_weights
from torch import nn

from vllm_vlora import (
    AddOptions,
    Checkpoint,
    CompressOptions,
    SharedSubspace,
    SHAREModel,
    add_adapters,
    compress,
    export_task,
    load_adapter,
    open_adapter,
)
from vllm_vlora.merging.analysis import adapter_diff, inner_products, subspace_coverage
from vllm_vlora.merging.blending import blend_tasks, read_tasks
from vllm_vlora.merging.merging import task_arithmetic
from vllm_vlora.model.attaching import find_layers
from vllm_vlora.model.updates import AdaptedShape
from vllm_vlora.subspace.weights import LoRAWeights

BARE = SHAPES
HEAD = {f"model.{name}": shape for name, shape in SHAPES.items()}
# Their patterns name layers in full.
PATTERNS = [{"alpha_pattern": {f"{prefix}layers.0.v_proj": 7}} for prefix in ("", "model.", "")]


@pytest.fixture
def adapters() -> list[LoRAWeights]:
    return [
        tiny_weights(seed, shapes=shapes, **options)
        for seed, (shapes, options) in enumerate(zip((BARE, HEAD, BARE), PATTERNS))
    ]


def _updates(weights: LoRAWeights) -> list[torch.Tensor]:
    return [delta_w(weights, name) for name in sorted(weights.layer_names)]


def _close(found: LoRAWeights, wanted: LoRAWeights) -> None:
    assert sorted(found.layer_names) == sorted(wanted.layer_names)
    for got, want in zip(_updates(found), _updates(wanted), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("representation", ["joint", "flat"])
def test_a_subspace_has_each_layer_once_and_gives_tasks_their_names(
    tmp_path: Path, adapters: list[LoRAWeights], representation: str
) -> None:
    adapters = [*adapters[:2], tiny_weights(2, shapes=HEAD)]
    subspace = SharedSubspace.from_adapters(
        adapters,
        num_components=6 if representation == "joint" else 2,
        representation=representation,
    )
    assert sorted(subspace.layers) == sorted(HEAD)
    loaded = SharedSubspace.load(subspace.save(tmp_path / "saved"))
    for found in (subspace, loaded):
        for number, task in enumerate(found.tasks):
            _close(found.reconstruct(task), adapters[number])


def test_what_is_projected_or_absorbed_keeps_its_names(adapters: list[LoRAWeights]) -> None:
    subspace = SharedSubspace.from_adapters(
        [tiny_weights(7, shapes=HEAD), adapters[1]], num_components=4, representation="joint"
    )
    subspace.absorb(adapters[0], "bare", num_components=6)
    assert sorted(subspace.layers) == sorted(HEAD)
    _close(subspace.reconstruct("bare"), adapters[0])
    _close(subspace.reconstruct("task_1"), adapters[1])
    subspace.absorb_incremental(adapters[2], "again", num_components=8)
    _close(subspace.reconstruct("again"), adapters[2])
    subspace.add_task(subspace.project(adapters[0], "projected"))
    _close(subspace.reconstruct("projected"), adapters[0])
    coverage = subspace_coverage(subspace, adapters[0])
    assert min(found["coverage"] for found in coverage.values()) > 0.999


def test_sums_and_differences_are_of_layers_and_not_of_names(
    tmp_path: Path, adapters: list[LoRAWeights]
) -> None:
    twin = adapters[0].under_names({"model.layers.": "layers."})
    for found in adapter_diff(adapters[0], twin).values():
        assert found["l2_distance"] < 1e-5
    folders = save_tiny_adapters(tmp_path, adapters)
    products = inner_products([open_adapter(folder) for folder in folders])
    wanted = [
        [sum(float((a * b).sum()) for a, b in zip(_updates(x), _updates(y))) for y in adapters]
        for x in adapters
    ]
    torch.testing.assert_close(products, torch.tensor(wanted).double(), atol=1e-4, rtol=1e-4)
    merged = task_arithmetic(adapters, [0.5, 0.25, -1.0])
    assert len(merged.layer_names) == len(SHAPES)
    parts = list(zip(*map(_updates, adapters)))
    for got, (a, b, c) in zip(_updates(merged), parts, strict=True):
        torch.testing.assert_close(got, 0.5 * a + 0.25 * b - c, atol=1e-5, rtol=1e-4)


@pytest.fixture
def checkpoint(tmp_path: Path, adapters: list[LoRAWeights]) -> Path:
    folders = save_tiny_adapters(tmp_path / "adapters", adapters[:2])
    opened = {f"task_{i}": open_adapter(folder) for i, folder in enumerate(folders)}
    options = CompressOptions(representation="joint", num_components=4, quantize="none")
    compress(opened, tmp_path / "checkpoint", options)
    return tmp_path / "checkpoint"


def test_tasks_of_a_checkpoint_are_read_and_blended_under_their_names(
    checkpoint: Path, adapters: list[LoRAWeights], tmp_path: Path
) -> None:
    for found, wanted in zip(
        read_tasks(Checkpoint.open(checkpoint), ["task_0", "task_1"]), adapters
    ):
        _close(found, wanted)
    blend_tasks(checkpoint, {"task_0": 2.0, "task_1": -1.0}, "sum", output=tmp_path / "out")
    blended = load_adapter(export_task(Checkpoint.open(tmp_path / "out"), "sum", tmp_path / "sum"))
    assert sorted(blended.layer_names) == sorted(adapters[0].layer_names)
    for got, a, b in zip(_updates(blended), *map(_updates, adapters[:2]), strict=True):
        torch.testing.assert_close(got, 2 * a - b, atol=1e-4, rtol=1e-4)


def test_an_added_task_finds_the_basis_of_its_layers(
    checkpoint: Path, adapters: list[LoRAWeights], tmp_path: Path
) -> None:
    before = [module.name for module in Checkpoint.open(checkpoint).modules]
    # In the span of the bases, so that they hold it.
    near = task_arithmetic(adapters[:2]).under_names({"layers.": "model.layers."})
    assert (sorted(near.layer_names), before) == (sorted(BARE), sorted(HEAD))
    [folder] = save_tiny_adapters(tmp_path / "near", [near])
    add_adapters(checkpoint, {"near": open_adapter(folder)}, AddOptions(max_error=1e-3))
    opened = Checkpoint.open(checkpoint)
    assert [module.name for module in opened.modules] == before
    assert {segment.representation for segment in opened.record("near").segments} == {"joint"}
    _close(load_adapter(export_task(opened, "near", tmp_path / "out")), near)


def test_a_share_model_gives_tensors_their_adapters_names(
    tmp_path: Path, adapters: list[LoRAWeights]
) -> None:
    folders = save_tiny_adapters(tmp_path, adapters)
    share = SHAREModel.from_adapters(folders[:2], num_components=4)
    for task, folder in zip(share.adapter_names, folders):
        assert share.reconstruction_error(task, original_path=folder)["max"] < 1e-3
    share.add_adapter(folders[2])
    for task, folder in zip(share.adapter_names, folders):
        wanted = load_file(Path(folder) / "adapter_model.safetensors")
        assert share.reconstruct(task).keys() == wanted.keys()


# --- a PyTorch model --------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)})])


def _multimodal() -> nn.Module:
    """Language layers and a tower's, alike in all but their place."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.language_model, model.model.vision_tower = _Block(), nn.Module()
    model.model.vision_tower.encoder = _Block()
    return model


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("language_model.model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        ("model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        (
            "vision_tower.vision_model.encoder.layers.0.q_proj",
            "model.vision_tower.encoder.layers.0.q_proj",
        ),
    ],
)
def test_a_model_of_another_class_has_the_layer(name: str, found: str) -> None:
    model = _multimodal()
    [layer] = find_layers(model, {name: AdaptedShape(4, 4, "linear")})
    assert (layer.name, layer.module) == (name, model.get_submodule(found))


def test_layers_of_the_language_model_and_of_a_tower_are_found_together() -> None:
    model = _multimodal()
    shapes = {
        "language_model.model.layers.0.q_proj": AdaptedShape(4, 4, "linear"),
        "vision_tower.vision_model.encoder.layers.0.q_proj": AdaptedShape(4, 4, "linear"),
    }
    first, second = find_layers(model, shapes)
    assert first.module is model.get_submodule("model.language_model.layers.0.q_proj")
    assert second.module is model.get_submodule("model.vision_tower.encoder.layers.0.q_proj")
