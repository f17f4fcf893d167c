"""Adapters of fused experts split into modules, next to what PEFT itself merges into the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from documented_world import write_fused
from moe_world import make_fused_adapter, make_moe_model, merge
from safetensors.torch import load_file, save_file

from vllm_vlora import open_adapter, split_experts
from vllm_vlora.errors import AdapterError

OPTIONS: dict[str, dict[str, Any]] = {
    "experts and attention": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]},
    "ranks of their own": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "rank_pattern": {"experts.down_proj": 2, "q_proj": 3},
        "alpha_pattern": {"experts.gate_up_proj": 1},
    },
    "rsLoRA": {"r": 3, "lora_alpha": 2, "target_modules": [], "use_rslora": True},
    "gate and up alone": {"r": 4, "lora_alpha": 4, "parameters": ("gate_up_proj",)},
    "down alone": {"r": 4, "lora_alpha": 4, "parameters": ("down_proj",)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe_model(tmp_path_factory.mktemp("moe") / "model")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_modules_add_what_peft_adds_to_the_parameters(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, merged = make_fused_adapter(model, tmp_path / "fused", seed=1, **options)
    with pytest.raises(AdapterError, match=r"target_parameters.*split_experts"):
        open_adapter(folder)
    split = split_experts(folder, tmp_path / "split", interleaved=False)
    expected = load_file(merged / "model.safetensors")
    base = load_file(model / "model.safetensors")
    found = load_file(merge(model, split, tmp_path / "merged") / "model.safetensors")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    changed = {name for name in base if not base[name].equal(expected[name])}
    assert {f"{name}.weight" for name in open_adapter(split).modules} == changed


def test_interleaved_rows_are_told_apart(tmp_path: Path) -> None:
    """As gpt-oss has them, whose parameters PEFT knows to be (experts, d_in, d_out)."""
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=32, hidden_size=24, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    experts = "model.layers.0.mlp.experts"
    parameters = ("gate_up_proj", "down_proj")
    targets = [f"mlp.experts.{name}" for name in parameters]
    model = GptOssForCausalLM(config)
    base = {name: model.state_dict()[f"{experts}.{name}"].clone() for name in parameters}
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.25)
    adapted.save_pretrained(tmp_path / "fused")
    merged = adapted.merge_and_unload().state_dict()
    delta = {name: merged[f"{experts}.{name}"] - base[name] for name in parameters}
    split = open_adapter(
        split_experts(
            tmp_path / "fused", tmp_path / "split", interleaved=True, names=("w1", "w3", "w2")
        )
    )
    for expert in range(3):
        for name, expected in {
            "w1": delta["gate_up_proj"][expert, :, ::2].T,
            "w3": delta["gate_up_proj"][expert, :, 1::2].T,
            "w2": delta["down_proj"][expert].T,
        }.items():
            module = split.modules[f"{experts}.{expert}.{name}"]
            a, b = split.factors(module.name)
            torch.testing.assert_close(module.scale * b @ a, expected, rtol=1e-5, atol=1e-5)


BLOCK = "base_model.model.layers.0.mlp.experts"


def change_fused(folder: Path, change: dict[str, torch.Tensor | None], **config: Any) -> Path:
    """Two experts of rank 2, hidden 6 and inner 4, with some tensors changed or left out."""
    write_fused(folder)
    weights, options = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    changed = load_file(weights) | {f"{BLOCK}{name}": tensor for name, tensor in change.items()}
    save_file({name: t for name, t in changed.items() if t is not None}, weights)
    options.write_text(json.dumps(json.loads(options.read_text()) | config))
    return folder


INNER = (".base_layer.lora_A.weight", ".base_layer.lora_B.weight")


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        ({}, {"target_parameters": None}, "target_parameters is not set"),
        (
            {},
            {"target_parameters": ["mlp.gate.weight"]},
            r"target_parameters is \['mlp.gate.weight'\]",
        ),
        ({}, {"target_parameters": ["mlp.down_proj"]}, r"target_parameters is \['mlp.down_proj'\]"),
        ({}, {"use_dora": True}, "use_dora"),
        (dict.fromkeys(INNER), {}, "lacks factors of a parameter"),
        ({}, {"target_parameters": ["mlp.experts.down_proj"]}, "lacks factors of a parameter"),
        (
            {INNER[0]: torch.ones(4, 8), INNER[1]: torch.ones(6, 4)},
            {},
            "gate_up_proj of 8 to 6 .* do not follow each other",
        ),
        ({}, {"r": 3}, "rank 3 does not split into experts"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path, change: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    folder = change_fused(tmp_path / "fused", change, **config)
    with pytest.raises(AdapterError, match=said) as caught:
        split_experts(folder, tmp_path / "split", interleaved=False)
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "split").exists()


def test_an_adapter_without_experts_is_left_as_it_is(tmp_path: Path) -> None:
    module = "base_model.model.layers.0.self_attn.q_proj.lora_"
    nothing = dict.fromkeys((*INNER, ".lora_A.weight", ".lora_B.weight"))
    folder = change_fused(tmp_path / "fused", nothing)
    tensors = {f"{module}A.weight": torch.ones(2, 6), f"{module}B.weight": torch.ones(6, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="adapts no experts"):
        split_experts(folder, tmp_path / "split", interleaved=False)


def test_whole_tensors_stay(tmp_path: Path) -> None:
    folder = change_fused(tmp_path / "fused", {}, modules_to_save=["lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {"base_model.model.lm_head.weight": torch.arange(12.0).view(3, 4)}
    save_file(tensors | head, folder / "adapter_model.safetensors")
    split = open_adapter(split_experts(folder, tmp_path / "split", interleaved=False))
    assert split.extra_tensors()["base_model.model.lm_head.weight"].equal(*head.values())
    assert len(split.modules) == 2 * 3
    assert {module.scale for module in split.modules.values()} == {2.0}
