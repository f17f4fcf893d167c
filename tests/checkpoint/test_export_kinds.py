"""Every kind of adapter, stored in every way and exported: PEFT loads all of it and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint.export import export_all
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.representations.decode import decode

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "linears": {"target_modules": LINEARS},
    "patterns": {
        "target_modules": LINEARS,
        "rank_pattern": {"q_proj": 2, r".*\.mlp\..*": 3, "layers.1.self_attn.v_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 31, "down_proj": 5},
    },
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 6},
    "patterns and rslora": {
        "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
        "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 1},
    },
    "embedding and lm_head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved modules": {
        "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "lm_head", "embed_tokens"],
    },
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "a layer by its list": {
        "target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers",
    },
    "excluded": {"target_modules": LINEARS, "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]},
    "excluded by a pattern": {"target_modules": LINEARS, "exclude_modules": r".*layers\.1.*"},
    "a pattern": {"target_modules": r".*\.layers\.1\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "bias that is not there": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "classifier": {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"},
    "Conv1D": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "Conv1D and embeddings": {"target_modules": ["c_proj", "wte", "wpe"], "fan_in_fan_out": True},
}  # fmt: skip
EXACT = CompressOptions(max_error=0.0)
LOSSY = (
    CompressOptions("private", max_error=0.6, quantize="nf4"),
    CompressOptions("joint", num_components=3, quantize="int8"),
    CompressOptions("flat", num_components=1),
)


def make_base(kind: str) -> Any:
    torch.manual_seed(0)
    if kind.startswith("Conv1D"):
        config = GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4)
        return GPT2LMHeadModel(config).eval()
    wanted = LlamaForSequenceClassification if kind == "classifier" else LlamaForCausalLM
    return wanted(LlamaConfig(**TINY)).eval()


def train(kind: str, folder: Path, seed: int) -> Any:
    """A PEFT model whose every adapter weight has moved, saved."""
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | KINDS[kind]
    # mica freezes B; the file has it all the same.
    model = get_peft_model(make_base(kind), LoraConfig(**options)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def load_strictly(kind: str, folder: Path) -> Any:
    """PEFT's model of the folder; every tensor of the file finds its place, and none is missing."""
    probe = get_peft_model(make_base(kind), PeftConfig.from_pretrained(folder))
    result = set_peft_model_state_dict(probe, load_file(folder / "adapter_model.safetensors"))
    ours = [k for k in result.missing_keys if "lora_" in k or "modules_to_save" in k]
    assert (ours, result.unexpected_keys) == ([], [])
    return PeftModel.from_pretrained(make_base(kind), folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 7]])).logits


def served(kind: str, checkpoint: Checkpoint, task_id: str) -> Any:
    """The base model with decoded updates added to its weights, and the task's own tensors in place."""
    model = make_base(kind)
    task, shared = checkpoint.load_task(task_id), checkpoint.shared_by([task_id])
    # An output layer that PEFT adapts beside its tied embedding is a layer of its own.
    if "lm_head" in task.modules or kind == "Conv1D and embeddings":
        output = model.get_output_embeddings()
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    with torch.no_grad():
        for name, tensor in task.extra.items():
            if not name.endswith("base_layer.weight"):
                model.get_parameter(name.removeprefix("base_model.model.")).copy_(tensor)
        for name, stored in task.modules.items():
            a, b = decode(stored, shared.get((name, stored.representation)))
            module = model.get_submodule(name)
            delta = b.double() @ a.double()
            plain = isinstance(module, torch.nn.Linear)
            module.weight.add_((delta if plain else delta.T).to(module.weight.dtype))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_an_export_is_loaded_whole_and_is_what_is_served(tmp_path: Path, kind: str) -> None:
    """Kept exactly, and in one of the lossy ways; every way has kinds of its own."""
    trained = {name: train(kind, tmp_path / name, seed) for seed, name in enumerate("ab", 1)}
    adapters = {name: open_adapter(tmp_path / name) for name in trained}
    for options in (EXACT, LOSSY[list(KINDS).index(kind) % len(LOSSY)]):
        path = tmp_path / options.representation
        compress(adapters, path, options)
        checkpoint = Checkpoint.open(path)
        folders = export_all(checkpoint, list(trained), path / "out", dtype=torch.float32)
        for name, folder in folders.items():
            found = logits(load_strictly(kind, folder))
            expected = logits(served(kind, checkpoint, name))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if options is EXACT:
                assert torch.equal(found, logits(trained[name]))
                assert open_adapter(folder).config == adapters[name].config
