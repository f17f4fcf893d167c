"""vLLM's own scheduler without an engine, and requests for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOM, BLOCK = 4, 16


def a_model(folder: Path) -> str:
    """A folder that says which model it would be."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def a_scheduler(kind: Any, model: str, policy: str = "fcfs", blocks: int = 1000) -> Any:
    """One of a class that is vLLM's own or made of it, with room for few requests at once."""
    import torch
    from vllm.config import CacheConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = VllmConfig(
        model_config=ModelConfig(
            model=model, dtype="float32", max_model_len=256, skip_tokenizer_init=True
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=False),
        scheduler_config=SchedulerConfig(
            max_num_seqs=ROOM, max_num_batched_tokens=64, max_model_len=256, policy=policy,
            enable_chunked_prefill=True, is_encoder_decoder=False,
        ),
        lora_config=LoRAConfig(max_loras=3, max_lora_rank=16),
    )  # fmt: skip
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)]
    )
    return kind(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


def a_request(
    name: str, task: str | None, prompt: int = 20, answer: int = 5, path: str = "", **more: Any
) -> Any:
    """A request for a task, whose path is by default its name."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    number = sum(map(ord, task or "")) + 1
    return Request(
        request_id=name,
        prompt_token_ids=[7] * prompt,
        sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
        pooling_params=None,
        lora_request=LoRARequest(task, number, path or f"/{task}") if task else None,
        **more,
    )
