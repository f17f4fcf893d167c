"""Factors in memory mean what PEFT computes with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.adapters.state_dicts import read_state_dict
from vllm_vlora.errors import AdapterError

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.*.up_proj": 5},
    },
    "rsLoRA": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
    "embedding": {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"]},
}  # fmt: skip


def trained(options: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    model = get_peft_model(base, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_each_module_adds_what_peft_adds(name: str, tmp_path: Any) -> None:
    model = trained(CONFIGS[name])
    config = model.peft_config["default"]
    found = read_state_dict(get_peft_model_state_dict(model), config, None, "here")
    model.save_pretrained(tmp_path)
    opened = open_adapter(tmp_path)
    assert [module for module, _ in found] == list(opened.modules.values())
    layers = dict(model.base_model.model.named_modules())
    for module, (a, b) in found:
        want = layers[module.name].get_delta_weight("default").detach()
        delta = module.scale * (b.double() @ a.double())
        delta = delta.T if module.kind == "embedding" and want.shape != delta.shape else delta
        torch.testing.assert_close(delta.float(), want, rtol=1e-5, atol=1e-5)


def test_one_alpha_is_divided_by_each_modules_rank() -> None:
    factors = {
        "a.q_proj": (torch.ones(2, 8), torch.ones(8, 2)),
        "base_model.model.b.q_proj": [torch.ones(4, 8), torch.ones(8, 4)],
    }
    found = {m.name: (m.rank, m.scale) for m, _ in read_state_dict(factors, None, 6, "here")}
    assert found == {"a.q_proj": (2, 3.0), "b.q_proj": (4, 1.5)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"r": 5}, "rank 4, but adapter_config.json says rank 5"),
        ({"target_modules": ["k_proj"]}, "do not select"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ],
)
def test_what_a_folder_is_refused_for_is_refused(options: dict[str, Any], message: str) -> None:
    model = trained(CONFIGS["plain"])
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options
    with pytest.raises(AdapterError, match=message):
        read_state_dict(get_peft_model_state_dict(model), config, None, "task 'x'")


def test_other_types_are_refused() -> None:
    factors = {"q": (torch.ones(2, 8, dtype=torch.float64), torch.ones(8, 2))}
    with pytest.raises(AdapterError, match=r"dtype torch.float64; LoRA weights must be"):
        read_state_dict(factors, None, 1.0, "here")


@pytest.mark.parametrize(
    "alpha", [float("nan"), float("inf"), 1e300, 10**400, -(10**400), True, "16"]
)
def test_an_alpha_that_is_none_is_refused(alpha: Any) -> None:
    factors = {"q": (torch.ones(2, 8), torch.ones(8, 2))}
    with pytest.raises(AdapterError, match=r"here: alpha is .*; give a number"):
        read_state_dict(factors, None, alpha, "here")


@pytest.mark.parametrize("tensors", [None, [torch.ones(2, 8)], "q", torch.ones(2)])
def test_tensors_without_names_are_refused(tensors: Any) -> None:
    with pytest.raises(AdapterError, match=r"here: the tensors are .*; give a mapping"):
        read_state_dict(tensors, None, 1.0, "here")


def test_what_has_no_values_here_is_refused() -> None:
    factors = {"q": (torch.ones(2, 8, device="meta"), torch.ones(8, 2))}
    with pytest.raises(AdapterError, match=r"'q' is a part of a sharded tensor.*gather it"):
        read_state_dict(factors, None, 1.0, "here")


def test_an_adapter_that_comes_again_is_read_by_its_config_of_now() -> None:
    """Of names and shapes that were read before only the values are new."""
    tensors = {"q_proj.lora_A.weight": torch.ones(4, 8), "q_proj.lora_B.weight": torch.ones(8, 4)}
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "alpha_pattern": {}}
    ((module, factors),) = read_state_dict(tensors, config, None, "here")
    assert module.scale == 2.0
    tensors = {key: 3 * tensor for key, tensor in tensors.items()}
    ((again, factors),) = read_state_dict(tensors, dict(config), None, "here")
    assert again == module
    assert bool((factors[0] == 3).all())
    assert bool((factors[1] == 3).all())
    # The caller's own mapping, changed in place.
    config["alpha_pattern"]["q_proj"] = 16
    ((module, _),) = read_state_dict(tensors, config, None, "here")
    assert module.scale == 4.0
    ((module, _),) = read_state_dict(tensors, None, 2.0, "here")
    assert module.scale == 0.5
    tensors["q_proj.lora_A.weight"] = torch.ones(4, 6, dtype=torch.bfloat16)
    ((module, _),) = read_state_dict(tensors, None, 2.0, "here")
    assert (module.d_in, module.dtype) == (6, torch.float32)
    tensors["q_proj.lora_A.weight"] = torch.ones(3, 6)
    for _ in range(2):
        with pytest.raises(AdapterError, match="ranks differ"):
            read_state_dict(tensors, None, 2.0, "here")


@pytest.mark.parametrize("changed", ["given anew", "in place"])
def test_of_patterns_in_another_order_another_one_counts(changed: str) -> None:
    """PEFT takes the first key that matches (``get_pattern_key``); mappings are equal in any order."""
    tensors = {"q_proj.lora_A.weight": torch.ones(2, 8), "q_proj.lora_B.weight": torch.ones(8, 2)}
    first = {"q_proj": 8, "q_.*": 64, "v_proj": 1}
    other = {"q_.*": 64, "q_proj": 8, "v_proj": 1}
    config: dict[str, Any] = {"r": 2, "lora_alpha": 2, "alpha_pattern": first}
    ((module, _),) = read_state_dict(tensors, config, None, "here")
    assert module.scale == 4.0
    if changed == "in place":
        first.clear()
        first |= other
    else:
        config = {**config, "alpha_pattern": other}
    ((module, _),) = read_state_dict(tensors, config, None, "here")
    assert module.scale == 32.0
    # The other way round the second reading is refused.
    ranks = {"q_.*": 2, "q_proj": 4}
    read_state_dict(tensors, {**config, "rank_pattern": ranks}, None, "here")
    ranks = {"q_proj": 4, "q_.*": 2}
    with pytest.raises(AdapterError, match="says rank 4"):
        read_state_dict(tensors, {**config, "rank_pattern": ranks}, None, "here")
