"""A tiny Llama with a byte tokenizer, as a folder that transformers loads; random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from byte_tokenizer import make_byte_tokenizer


def write_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Two layers of width 32; complete in the eyes of the demo's ``prepare_model``."""
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
            hidden_size=32,
            intermediate_size=64,
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
