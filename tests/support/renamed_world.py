"""Models whose layers have two names, adapters under either, and what PEFT computes with them.

Every adapter is one of the model as transformers has it today. Those of the other name are the same with
that name in their keys, so that PEFT's numbers of the former are right for the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_world import make_model
from safetensors.torch import load_file, save_file

from vllm_vlora import CompressOptions, compress, open_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.representations.spec import ModuleSpec

PROMPT = [(7 * i) % 250 + 1 for i in range(17)]
TASKS = {
    "new-joint": ["q_proj", "v_proj", "down_proj"],
    "old-joint": ["q_proj", "v_proj", "down_proj"],
    "new-private": ["k_proj", "o_proj", "gate_proj"],
    "old-private": ["q_proj", "o_proj", "up_proj"],
}


@dataclass(frozen=True)
class Names:
    """The prefix of a model's layers in transformers today, and another one that vLLM takes."""

    new: str
    old: str


GENERATION = Names("model.layers.", "model.language_model.layers.")
BACKBONE = Names("layers.", "model.layers.")


@dataclass(frozen=True)
class World:
    """A model, its adapters by task, each under the name it is given in, and PEFT's numbers."""

    root: Path
    model: Path
    names: Names
    adapters: Mapping[str, Path]
    reference: Mapping[str, torch.Tensor]


def generation_world(root: Path) -> World:
    """A Llama, with adapters of it and of a multimodal model whose text it could be.

    Numbers are the log-probabilities of every token after the prompt.
    """
    from transformers import LlamaForCausalLM

    model = make_model(root / "model")

    def measure(adapted: Any) -> torch.Tensor:
        logits = adapted(input_ids=torch.tensor([PROMPT])).logits[0, -1]
        return logits.log_softmax(-1)

    return _world(root, model, GENERATION, LlamaForCausalLM, measure)


def backbone_world(root: Path) -> World:
    """A bare Llama served as a pooling model; numbers are the normalised last hidden state."""
    from transformers import LlamaModel

    model = make_model(root / "model")

    def measure(adapted: Any) -> torch.Tensor:
        hidden = adapted(input_ids=torch.tensor([PROMPT])).last_hidden_state
        return torch.nn.functional.normalize(hidden[0, -1], dim=0)

    return _world(root, model, BACKBONE, LlamaModel, measure)


def _world(root: Path, model: Path, names: Names, kind: Any, measure: Any) -> World:
    from peft import LoraConfig, get_peft_model

    adapters, reference = {}, {}
    for seed, (task, targets) in enumerate(TASKS.items()):
        torch.manual_seed(100 + seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        adapted = get_peft_model(kind.from_pretrained(model), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1)
        with torch.no_grad():
            reference[task] = measure(adapted)
        adapters[task] = root / "adapters" / task
        adapted.save_pretrained(adapters[task])
        if task.startswith("old"):
            rename(adapters[task], names)
    return World(root, model, names, adapters, reference)


def rename(adapter: Path, names: Names) -> None:
    """Give an adapter's layers their other name."""
    file = adapter / "adapter_model.safetensors"
    prefix = "base_model.model."
    tensors = {
        prefix + names.old + key.removeprefix(prefix + names.new): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def exact(world: World, *tasks: str) -> Path:
    """A checkpoint of these tasks, joint or private by their names, that loses float32 rounding alone."""
    made = {}
    for kind in ("joint", "private"):
        chosen = {t: open_adapter(world.adapters[t]) for t in tasks if t.endswith(kind)}
        if chosen:
            options: dict[str, Any] = {"ratio": 0.1}
            if kind == "joint":
                options = {"num_components": 4 * len(chosen)}
            folder = world.root / f"{kind} of {' '.join(tasks)}"
            compress(
                chosen, folder, CompressOptions(representation=kind, quantize="none", **options)
            )
            made[kind] = folder
    return combine(world.root / f"exact {' '.join(tasks)}", *made.values())


def combine(folder: Path, *parts: Path) -> Path:
    """One checkpoint of the tasks of several; a module may have a basis in one of them."""
    opened = [Checkpoint.open(part) for part in parts]
    modules: dict[str, ModuleSpec] = {}
    bases = {}
    for checkpoint in opened:
        bases.update(checkpoint.bases())
        modules.update((module.name, module) for module in checkpoint.modules)
    folder.mkdir()
    writer = CheckpointWriter(folder, opened[0].base_model)
    for name, module in modules.items():
        writer.add_module(name, module.d_in, module.d_out, module.kind, bases.get(name))
    for checkpoint in opened:
        for task_id, record in checkpoint.tasks.items():
            writer.add_task(
                task_id,
                checkpoint.load_task(task_id).modules,
                original_nbytes=record.original_nbytes,
                error=record.error,
                adapter_config=record.adapter_config,
                renamed=record.renamed,
            )
    writer.finish("card")
    return folder
