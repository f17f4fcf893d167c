"""Tiny models of transformers, tied and untied, and adapters of them with embeddings and heads saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 40
EMBEDDING = {"llama": "embed_tokens", "gemma": "embed_tokens", "gpt2": "wte"}
PROJECTION = {"llama": "q_proj", "gemma": "q_proj", "gpt2": "c_attn"}


def cases(arch: str) -> dict[str, dict[str, Any]]:
    """Name -> options of ``LoraConfig``; "more_tokens" is added to the vocabulary before training."""
    embedding, projection = EMBEDDING[arch], PROJECTION[arch]
    both, targets = [embedding, "lm_head"], [projection, embedding]
    return {
        "plain": {},
        "saved_embedding": {"modules_to_save": [embedding]},
        "saved_head": {"modules_to_save": ["lm_head"]},
        "saved_both": {"modules_to_save": both},
        "saved_embedding_tied": {"modules_to_save": [embedding], "ensure_weight_tying": True},
        "saved_head_tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        "lora_embedding": {"target_modules": targets},
        "lora_head": {"target_modules": [projection, "lm_head"]},
        "lora_both": {"target_modules": [projection, *both]},
        "lora_embedding_tied": {"target_modules": targets, "ensure_weight_tying": True},
        "lora_head_saved_embedding": {
            "target_modules": [projection, "lm_head"],
            "modules_to_save": [embedding],
        },
        "more_tokens": {"more_tokens": 3},
        "more_tokens_saved": {"more_tokens": 5, "modules_to_save": both},
        "more_tokens_saved_embedding": {"more_tokens": 3, "modules_to_save": [embedding]},
    }


def write_model(folder: Path, arch: str, *, tied: bool) -> Path:
    """One layer of width 16 with random weights."""
    import transformers

    common = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "bos_token_id": 1}
    common |= {"eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if arch == "gpt2":
        model: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **common)
        )
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        sizes |= {"max_position_embeddings": 64}
        kinds = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
        }
        config, kind = kinds[arch]
        model = kind(config(**sizes, **common))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


def load_model(folder: Path, more_tokens: int = 0) -> Any:
    """The model, its vocabulary grown as one grows it before training."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if more_tokens:
        torch.manual_seed(1)
        model.resize_token_embeddings(VOCABULARY + more_tokens)
    return model


def write_saved_adapter(
    model: Path, arch: str, folder: Path, options: Mapping[str, Any], seed: int = 0
) -> Path:
    """An adapter with everything that it trains moved at random, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    options = dict(options)
    base = load_model(model, options.pop("more_tokens", 0))
    options.setdefault("target_modules", [PROJECTION[arch]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            base, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "original_module" not in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder)
    return folder


def peft_logits(model: Path, folder: Path, ids: torch.Tensor, more_tokens: int = 0) -> torch.Tensor:
    """What PEFT computes with the adapter on the model."""
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(load_model(model, more_tokens), str(folder)).eval()
        return adapted(input_ids=ids).logits  # type: ignore[no-any-return]
