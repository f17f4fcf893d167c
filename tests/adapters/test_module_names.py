"""Which names are taken for one layer, and which never."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_vlora import CompressOptions, compress, open_adapter
from vllm_vlora.adapters.collection import Collection
from vllm_vlora.adapters.module_names import find_name, other_names, renamed, shared_prefixes
from vllm_vlora.adapters.peft_folder import write_adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.merging.blending import blend_tasks

Q = "0.self_attn.q_proj"
# What vLLM's and transformers' own classes call one layer.
ALIKE = [
    (f"layers.{Q}", f"model.layers.{Q}"),
    (f"model.layers.{Q}", f"model.language_model.layers.{Q}"),
    (f"language_model.model.layers.{Q}", f"model.language_model.layers.{Q}"),
    (f"language_model.layers.{Q}", f"model.language_model.layers.{Q}"),
    ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
    (f"vision_tower.vision_model.encoder.layers.{Q}", f"model.vision_tower.encoder.layers.{Q}"),
    ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
    ("lm_head", "language_model.lm_head"),
    ("embed_tokens", "language_model.model.embed_tokens"),
    ("encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query"),
    (f"decoder.layers.{Q}", f"model.decoder.layers.{Q}"),
    ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
]
APART = [
    (f"model.layers.{Q}", f"model.model.layers.{Q}"),
    (f"layers.{Q}", f"model.visual.layers.{Q}"),
    (f"model.layers.{Q}", f"visual.layers.{Q}"),
    (f"model.layers.{Q}", f"model.vision_tower.encoder.layers.{Q}"),
    (f"model.layers.{Q}", f"model.audio_tower.layers.{Q}"),
    (f"model.encoder.layers.{Q}", f"model.decoder.layers.{Q}"),
    (f"encoder.layers.{Q}", f"model.decoder.layers.{Q}"),
    (f"model.layers.{Q}", f"thinker.model.layers.{Q}"),
    (f"talker.model.layers.{Q}", f"thinker.model.layers.{Q}"),
    ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.no_proj"),
    (f"model.layers.1{Q}", f"model.layers.{Q}"),
    ("embed_tokens", "model.embed_tokens_per_layer"),
    ("lm_head", "model.lm_head_2"),
    ("lm_head", "embed_tokens"),
]


def _shared(*names: str) -> list[str]:
    """One adapter a name, of one shape: their names afterwards."""
    adapters = [{name: (4, 4, "linear")} for name in names]
    return [
        renamed(name, {own: new for new, own in prefixes.items()})
        for name, prefixes in zip(names, shared_prefixes(adapters))
    ]


@pytest.mark.parametrize("pair", ALIKE)
def test_names_of_one_layer_become_one(pair: tuple[str, str]) -> None:
    first, second = _shared(*pair)
    assert first == second
    assert first in pair
    assert pair[1] in other_names(pair[0])
    assert find_name(pair[0], {pair[1]: 1}.get) == 1


@pytest.mark.parametrize("pair", APART)
def test_names_of_different_layers_stay_apart(pair: tuple[str, str]) -> None:
    assert _shared(*pair) == list(pair)
    assert find_name(pair[0], {pair[1]: 1}.get) is None


def test_no_name_stands_for_two_layers_of_the_table() -> None:
    """Every name turns into the others of its row and into none of another row."""
    rows = [{name, *other_names(name)} for name, _ in ALIKE]
    for first, second in itertools.combinations(rows, 2):
        assert first == second or first.isdisjoint(second)
    for row in rows:
        assert all({name, *other_names(name)} == row for name in row)


def test_what_most_adapters_say_wins_and_the_longest_of_equals() -> None:
    bare, model, multimodal = f"layers.{Q}", f"model.layers.{Q}", f"model.language_model.layers.{Q}"
    assert _shared(bare, model, bare) == [bare] * 3
    assert _shared(bare, model) == [model] * 2
    assert _shared(bare, model, multimodal) == [multimodal] * 3


def test_an_adapter_that_has_both_names_says_that_they_are_two_layers() -> None:
    one, both = {"layers.0.q": 1}, {"layers.0.q": 1, "model.layers.0.q": 1}
    assert shared_prefixes([one, both, {"model.layers.0.q": 1}]) == [{}, {}, {}]
    assert shared_prefixes([{"model.layers.0.q": 1}], both) == [{}]


def test_another_shape_says_that_they_are_two_layers() -> None:
    assert shared_prefixes([{"layers.0.q": 1}, {"model.layers.0.q": 2}]) == [{}, {}]


def test_only_whole_names_and_prefixes_with_a_dot_are_replaced() -> None:
    prefixes = {"model.embed_tokens": "embed_tokens", "model.layers.": "layers.", "lm_head": "x"}
    for name, want in (
        ("model.embed_tokens", "embed_tokens"),
        ("model.embed_tokens_per_layer", "model.embed_tokens_per_layer"),
        ("model.layers.0.q", "layers.0.q"),
        ("lm_head", "x"),
        ("lm_head_2", "lm_head_2"),
    ):
        assert renamed(name, prefixes) == want
    assert renamed("a.b.c", {"a.": "x.", "a.b.": "y."}) == "y.c"


def test_the_names_of_a_checkpoint_stay() -> None:
    adapters = [{"model.layers.0.q": 1}, {"model.layers.1.q": 1, "lm_head": 2}]
    assert shared_prefixes(adapters, {"layers.5.v": 3}) == [{"layers.": "model.layers."}] * 2


def test_a_layer_that_fits_two_of_the_models_is_none() -> None:
    known = {f"model.layers.{Q}": 1, f"language_model.model.layers.{Q}": 2}
    assert find_name(f"layers.{Q}", known.get) is None
    assert find_name(f"model.layers.{Q}", known.get) == 1


# --- adapters ---------------------------------------------------------------------------------------


def _adapter(folder: Path, prefix: str, seed: int) -> Path:
    """Two layers of 12 -> 8; the second has another rank, by a pattern under its full name."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer, rank in ((0, 3), (1, 2)):
        a = torch.randn(rank, 12, generator=generator)
        factors[f"{prefix}{layer}.q_proj"] = a, torch.randn(8, rank, generator=generator)
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"],
        "rank_pattern": {f"{prefix}1.q_proj": 2}, "alpha_pattern": {f"{prefix}1.q_proj": 5},
    }  # fmt: skip
    return write_adapter(folder, config, factors)


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    prefixes = {"bare": "layers.", "head": "model.layers.", "more": "model.layers."}
    return {
        task: _adapter(tmp_path / task, prefix, seed)
        for seed, (task, prefix) in enumerate(prefixes.items())
    }


def _updates(folder: Path) -> dict[str, torch.Tensor]:
    """Module name in the file -> delta_W, by PEFT's rule."""
    adapter = open_adapter(folder)
    return {
        name: adapter.modules[name].scale * b.double() @ a.double()
        for name, (a, b) in adapter.iter_factors()
    }


def test_tasks_share_their_module(adapters: dict[str, Path]) -> None:
    modules = Collection({task: open_adapter(path) for task, path in adapters.items()}).modules
    assert list(modules) == ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    assert [module.tasks for module in modules.values()] == [(0, 1, 2)] * 2
    assert [module.ranks for module in modules.values()] == [(3, 3, 3), (2, 2, 2)]


@pytest.mark.parametrize("representation", ["joint", "private"])
def test_an_export_has_the_names_of_its_original(
    tmp_path: Path, adapters: dict[str, Path], representation: str
) -> None:
    options = {"num_components": 9} if representation == "joint" else {"ratio": 0.1}
    compress(
        {task: open_adapter(path) for task, path in adapters.items()},
        tmp_path / "checkpoint",
        CompressOptions(representation=representation, quantize="none", **options),
    )
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert checkpoint.config.format_version == 3
    assert [module.name for module in checkpoint.modules] == [
        "model.layers.0.q_proj", "model.layers.1.q_proj",
    ]  # fmt: skip
    for task, path in adapters.items():
        exported = export_task(checkpoint, task, tmp_path / "out" / task)
        want, got = _updates(path), _updates(exported)
        assert list(got) == list(want)
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-4)
    if representation == "private":
        file = "adapter_model.safetensors"
        assert all(
            torch.equal(tensor, load_file(tmp_path / "out" / "bare" / file)[key])
            for key, tensor in load_file(adapters["bare"] / file).items()
        )


def test_a_blend_keeps_apart_what_one_of_its_tasks_has_twice(
    tmp_path: Path, adapters: dict[str, Path]
) -> None:
    """By the names of the first task the two layers of the second one would be called alike."""
    path = tmp_path / "checkpoint"
    options = CompressOptions(representation="private", quantize="none", ratio=0.1)
    compress({task: open_adapter(folder) for task, folder in adapters.items()}, path, options)
    generator = torch.Generator().manual_seed(9)
    factors = {
        f"{prefix}0.q_proj": (
            torch.randn(3, 12, generator=generator),
            torch.randn(8, 3, generator=generator),
        )
        for prefix in ("layers.", "model.layers.")
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q_proj"]}
    both = write_adapter(tmp_path / "both", config, factors)
    add_adapters(path, {"both": open_adapter(both)}, AddOptions(max_error=0.0, quantize="none"))
    blend_tasks(path, {"bare": 0.5, "both": 0.5}, "blend")
    found = _updates(export_task(Checkpoint.open(path), "blend", tmp_path / "out"))
    bare, two = _updates(adapters["bare"]), _updates(both)
    assert len(found) == 3
    for name in ("layers.0.q_proj", "model.layers.0.q_proj", "model.layers.1.q_proj"):
        want = torch.zeros(8, 12, dtype=torch.float64)
        if name.startswith("model."):
            want += bare[name.removeprefix("model.")] / 2
        if name in two:
            want += two[name] / 2
        torch.testing.assert_close(found[name], want, atol=0.03, rtol=0)


def test_one_name_is_written_as_ever(tmp_path: Path, adapters: dict[str, Path]) -> None:
    chosen = {task: open_adapter(adapters[task]) for task in ("head", "more")}
    options = CompressOptions(representation="private", quantize="none", ratio=0.1)
    compress(chosen, tmp_path / "checkpoint", options)
    assert Checkpoint.open(tmp_path / "checkpoint").config.format_version == 1
