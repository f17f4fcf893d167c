"""A tiny mixture of experts in vLLM's files, and PEFT adapters of it as PEFT wrote them per expert.

transformers 5 holds a block's experts as one parameter; adapters of the models that people serve were
trained with a linear layer for each expert, which this module's skeleton has under the same names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from engine_world import PLAIN, make_model, save_plain

LAYERS, EXPERTS, HIDDEN, INNER = 2, 4, 64, 48
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# The rest of LoraConfig: other ranks and scales for some projections, rsLoRA, experts alone.
ADAPTERS: dict[str, dict[str, Any]] = {
    "everything": {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": [*ATTENTION, *PROJECTIONS],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"up_proj": 5},
    },
    "experts": {"r": 4, "lora_alpha": 3, "target_modules": [*PROJECTIONS], "use_rslora": True},
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
}


class _Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = torch.nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = torch.nn.Linear(INNER, HIDDEN, bias=False)


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ATTENTION:
            self.add_module(name, torch.nn.Linear(HIDDEN, HIDDEN, bias=False))


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = _Attention()
        self.mlp = torch.nn.Module()
        self.mlp.experts = torch.nn.ModuleList(_Expert() for _ in range(EXPERTS))


class _Skeleton(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(_Block() for _ in range(LAYERS))


def make_moe_model(folder: Path) -> Path:
    """A two-layer Qwen3-MoE of four experts, two of them for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    make_model(folder)  # for its tokenizer
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HIDDEN // 2,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    model.save_pretrained(folder)
    return folder


def make_gpt_oss(folder: Path) -> Path:
    """A gpt-oss of one layer and four experts, whose gate and up take turns in one parameter."""
    from transformers import GptOssConfig, GptOssForCausalLM

    make_model(folder)  # for its tokenizer
    config = GptOssConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HIDDEN // 2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(folder)
    return folder


def make_moe_adapter(folder: Path, seed: int, **config: Any) -> Path:
    """A PEFT folder, by PEFT, with random factors in bfloat16 and large enough to change the tokens."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(_Skeleton(), LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.normal_(0, 0.25).bfloat16()
    adapted.save_pretrained(folder)
    save_plain(adapted, folder / PLAIN)
    return folder


def make_moe_adapters(root: Path) -> dict[str, Path]:
    """Every one of ``ADAPTERS`` by its name."""
    return {
        name: make_moe_adapter(root / name, 50 + number, **config)
        for number, (name, config) in enumerate(ADAPTERS.items())
    }


def merge(model: Path, adapter: Path, folder: Path) -> Path:
    """The model with an adapter merged into its weights, by PEFT, in float32."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    skeleton = _Skeleton()
    adapted = {name: weights[name] for name in skeleton.state_dict()}
    skeleton.load_state_dict(adapted)
    merged = PeftModel.from_pretrained(skeleton, adapter).merge_and_unload().state_dict()
    assert merged.keys() == adapted.keys()
    shutil.copytree(model, folder)
    save_file(weights | merged, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def greedy(model: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What transformers answers, in float32."""
    from transformers import Qwen3MoeForCausalLM

    loaded = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(count):
                following = loaded(tokens).logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, following], dim=1)
        answers.append(tokens[0, len(prompt) :].tolist())
    return answers


def make_fused_adapter(
    model: Path,
    folder: Path,
    seed: int,
    parameters: tuple[str, ...] = ("gate_up_proj", "down_proj"),
    **config: Any,
) -> tuple[Path, Path]:
    """An adapter of the experts as parameters, and the model that PEFT merged it into."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = [f"mlp.experts.{name}" for name in parameters]
    options = {"target_modules": [], "target_parameters": targets} | config
    adapted = get_peft_model(loaded, LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.normal_(0, 0.25).bfloat16().float()
    adapted.save_pretrained(folder)
    merged = folder.with_name(f"{folder.name}-merged")
    adapted.merge_and_unload().save_pretrained(merged)
    return folder, merged
