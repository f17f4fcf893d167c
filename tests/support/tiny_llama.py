"""A tiny Llama with a byte tokenizer, as a folder that transformers loads; random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from byte_tokenizer import make_byte_tokenizer


def write_tiny_llama(folder: Path, seed: int = 0, head_dim: int = 8) -> Path:
    """Two layers of four heads; complete in the eyes of the demo's ``prepare_model``.

    vLLM on a CPU attends with heads of 32 and more.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=4 * head_dim,
            intermediate_size=8 * head_dim,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            **ids,
        )
    )
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
