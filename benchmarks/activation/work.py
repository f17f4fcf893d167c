"""The model, the adapters and the engines that an activation is timed in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Work:
    """Where everything lies, and how an engine is made of it."""

    args: argparse.Namespace
    folder: Path

    @property
    def model(self) -> Path:
        """The model's folder; a generated one has a config and no weights."""
        if self.args.model:
            return Path(self.args.model).absolute()
        folder = self.folder / "model"
        if not folder.exists():
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
        return folder

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``; plain values, so that a child process can take them."""
        return {
            "model": str(self.model),
            "load_format": "auto" if self.args.model else "dummy",
            "skip_tokenizer_init": True,
            "dtype": self.args.dtype,
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "enable_lora": True,
            "max_lora_rank": self.args.rank,
            "max_loras": 1,
            "max_cpu_loras": self.args.tasks + 2,
        }

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (d_in, d_out) of the model's seven linears a layer."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model))
        shapes = {
            name: (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in LINEARS
        }
        if not shapes:
            raise SystemExit(f"{self.model}: no layers named {', '.join(LINEARS)}; use a Llama")
        return shapes

    @property
    def adapter_folder(self) -> Path:
        """Where the PEFT folders lie, named by number."""
        return self.folder / "adapters"

    @property
    def startup_checkpoint(self) -> Path:
        """The checkpoint that engines start with."""
        return self.folder / "startup"

    def make_adapters(self, count: int) -> dict[str, Any]:
        """Write PEFT folders 0 to ``count`` - 1, where they are not there, and open all of them."""
        from vllm_vlora.adapters import open_adapter, write_adapter

        shapes, rank = self.shapes(), self.args.rank
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.model),
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(LINEARS),
        }
        opened = {}
        for number in range(count):
            path = self.adapter_folder / str(number)
            if not path.exists():
                write_adapter(path, config, random_factors(shapes, rank, number))
            opened[f"task-{number}"] = open_adapter(path)
        return opened


def random_factors(
    shapes: dict[str, tuple[int, int]], rank: int, seed: int
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """A and B in bfloat16 for every module, near subspaces that all seeds share."""
    import torch

    own = torch.Generator().manual_seed(1 + seed)
    shared = torch.Generator().manual_seed(0)

    def factor(width: int) -> Any:
        common = torch.randn(64, width, generator=shared) / 8
        mixed = torch.randn(rank, 64, generator=own) @ common
        return (mixed + 0.1 * torch.randn(rank, width, generator=own)).mul(0.02).bfloat16()

    for name, (d_in, d_out) in shapes.items():
        yield name, (factor(d_in), factor(d_out).T.contiguous())


def start_engine(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**arguments)


def worker_manager(llm: Any) -> Any:
    """The worker's LoRA manager; possible because the worker lives in this process."""
    (manager,) = llm.collective_rpc(lambda worker: worker.model_runner.lora_manager)
    manager.remove_all_adapters()
    return manager
