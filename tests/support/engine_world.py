"""A tiny Llama in float32, real PEFT adapters of it, checkpoints of them, and stock vLLM's tokens.

Stock vLLM runs in a process of its own with plugins off, one request at a time: on CPU its mixed
batches give base requests the last slot's adapter, so they are no reference. The base model's tokens
come from an engine without LoRA for the same reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
ENGINE_ARGUMENTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 32,
}
# r, alpha, modules, and the rest of LoraConfig: every kind of layer, packed or not, mixed ranks.
ADAPTERS: dict[str, dict] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "everything": {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"down_proj": 5},
    },
    "rslora": {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"], "use_rslora": True},
    "half-packed": {"r": 16, "lora_alpha": 16, "target_modules": ["gate_proj", "k_proj"]},
    "output head/ü": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "lm_head"]},
    "embedding": {"r": 8, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
}
ORDINARY = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(9 + 4 * i)] for i in range(3)]
MAX_TOKENS = 10
PLAIN = "plain"


@dataclass(frozen=True)
class World:
    """Where everything lies, and what stock vLLM answered: name -> a token list per prompt."""

    root: Path
    model: Path
    adapters: dict[str, Path]
    ordinary: Path
    reference: dict[str, list[list[int]]]
    compress: Callable[..., Path]


def make_model(folder: Path, hidden: int = 128, seed: int = 0) -> Path:
    """A two-layer Llama whose greedy tokens differ between adapters, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w1")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, seed: int, **config: object) -> Path:
    """A PEFT folder with random factors large enough to change the tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(model), LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.25)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    _save_plain(adapted, folder / PLAIN)
    return folder


def _save_plain(adapted: Any, folder: Path) -> None:
    """The same adapter with every scale, as PEFT computes it, folded into B: alpha = r throughout.

    vLLM before 0.32 ignores rank_pattern and alpha_pattern, so it needs this form for a reference.
    """
    from peft.tuners.lora import LoraLayer

    for layer in adapted.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name, scale in layer.scaling.items():
            b = layer.lora_B[name].weight if name in layer.lora_B else layer.lora_embedding_B[name]
            b.data *= scale
    adapted.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"lora_alpha": config["r"], "use_rslora": False, "rank_pattern": {}}
    file.write_text(json.dumps(config | {"alpha_pattern": {}}))


def run_script(script: str, *arguments: str, **environment: str) -> Any:
    """Run a snippet in a process of its own; it prints one line, RESULT and JSON."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        env={**os.environ, **ENGINE_ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-20_000:] + done.stderr[-20_000:]
    return json.loads(lines[-1][len("RESULT ") :])


STOCK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

def main():
    job = json.loads(sys.argv[1])
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16} if job["adapters"] else {}
    llm = LLM(job["model"], **lora, **job["arguments"])
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    answers = {}
    for number, (name, path) in enumerate((job["adapters"] or {"base": None}).items(), 1):
        request = LoRARequest(name, number, path) if path else None
        answers[name] = [
            list(llm.generate([{"prompt_token_ids": prompt}], sampling, lora_request=request,
                              use_tqdm=False)[0].outputs[0].token_ids)
            for prompt in job["prompts"]
        ]
    print("RESULT " + json.dumps(answers), flush=True)

if __name__ == "__main__":
    main()
"""


def stock_tokens(
    model: Path, adapters: dict[str, Path], prompts: list[list[int]]
) -> dict[str, list[list[int]]]:
    """Stock vLLM's greedy tokens: of the base model when ``adapters`` is empty."""
    from vllm.lora.peft_helper import PEFTHelper

    plain = "rank_pattern" not in {field.name for field in fields(PEFTHelper)}
    job = {
        "model": str(model),
        "adapters": {
            name: str(path / PLAIN if plain and (path / PLAIN).exists() else path)
            for name, path in adapters.items()
        },
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
        "prompts": prompts,
    }
    # An empty list of plugins is stock vLLM; an empty checkpoint is none.
    return run_script(STOCK, json.dumps(job), VLLM_PLUGINS="", VLLM_VLORA_CHECKPOINT="")


def make_world(root: Path) -> World:
    """Model, adapters and references under ``root``; takes about a minute."""
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.compression.options import CompressOptions
    from vllm_vlora.compression.pipeline import compress

    model = make_model(root / "model")
    adapters = {
        name: make_adapter(model, root / "adapters" / str(i), 100 + i, **config)
        for i, (name, config) in enumerate(ADAPTERS.items())
    }
    ordinary = make_adapter(model, root / "ordinary", 900, **ORDINARY)
    reference = stock_tokens(model, {}, PROMPTS)
    reference |= stock_tokens(model, {**adapters, "ordinary": ordinary}, PROMPTS)
    assert len({tuple(t) for answers in reference.values() for t in answers}) == 3 * 8

    def make(name: str, tasks: dict[str, Path], force: bool = False, **options: object) -> Path:
        opened = {task: open_adapter(path) for task, path in tasks.items()}
        compress(opened, root / name, CompressOptions(**options), force=force)
        return root / name

    return World(root, model, adapters, ordinary, reference, make)


def _all_directions(world: World) -> int:
    """Components of a basis that loses nothing of any module."""
    from vllm_vlora.adapters.collection import Collection
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.planning.survey import directions

    opened = {task: open_adapter(path) for task, path in world.adapters.items()}
    modules = Collection(opened).modules.values()
    return max(directions(module) for module in modules if module.kind == "linear")


def exact(world: World, representation: str) -> Path:
    """A checkpoint of all adapters that loses nothing but float32 rounding; made once."""
    name = f"exact-{representation}"
    if (world.root / name).exists():
        return world.root / name
    if representation == "joint":
        options: dict = {"num_components": _all_directions(world)}
    else:
        options = {"ratio": 0.1}
    return world.compress(
        name,
        world.adapters,
        representation=representation,
        quantize="none",
        **options,
    )


def mixed(world: World) -> Path:
    """The exact tasks in one checkpoint: joint, private, or both over their modules; made once.

    Every basis is stored twice, as two clusters of tasks have theirs beside each other, and joint cores
    name the rows of one of the two.
    """
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.writer import CheckpointWriter
    from vllm_vlora.quantize import stack_rows
    from vllm_vlora.representations.stored import Basis

    folder = world.root / "exact-mixed"
    if folder.exists():
        return folder
    joint = Checkpoint.open(exact(world, "joint"))
    private = Checkpoint.open(exact(world, "private"))
    folder.mkdir()
    writer = CheckpointWriter(folder, joint.base_model)
    bases = dict(joint.bases())
    for module in joint.modules:
        basis = bases.get(module.name)
        if basis is not None:
            basis = Basis(stack_rows([basis.u] * 2), stack_rows([basis.v] * 2))
        writer.add_module(module.name, module.d_in, module.d_out, module.kind, basis)
    for number, task in enumerate(ADAPTERS):
        first, second = (joint, private) if number % 3 else (private, joint)
        modules = dict(first.load_task(task).modules)
        if number % 3 != 1:
            others = second.load_task(task).modules
            modules = {n: (others[n] if i % 2 else m) for i, (n, m) in enumerate(modules.items())}
        for name, stored in modules.items():
            if stored.representation == "joint":
                basis = bases[name]
                u, v = number % 2 * basis.u.rows, number % 2 * basis.v.rows
                rows = (u, u + basis.u.rows, v, v + basis.v.rows)
                modules[name] = replace(stored, rows=rows)
        writer.add_task(task, modules, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return folder


def family(world: World, count: int) -> Path:
    """``count`` tasks of different weights: interpolations, in core space, of two exact ones."""
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.writer import CheckpointWriter
    from vllm_vlora.quantize import pack
    from vllm_vlora.representations.decode import decode
    from vllm_vlora.representations.stored import StoredModule

    joint = Checkpoint.open(exact(world, "joint"))
    folder = world.root / f"family-{count}"
    folder.mkdir()
    writer = CheckpointWriter(folder, joint.base_model)
    bases = dict(joint.bases())
    names = [n for n in joint.load_task("attention").modules if n.endswith(("q_proj", "v_proj"))]
    for module in joint.modules:
        if module.name in names:
            writer.add_module(module.name, module.d_in, module.d_out, basis=bases[module.name])
    ends = [joint.load_task(task).modules for task in ("attention", "everything")]
    cores = {}
    for name in names:
        basis = bases[name]
        u, v = basis.u.parts["values"], basis.v.parts["values"]
        factors = [decode(end[name], basis) for end in ends]
        cores[name] = [(u @ b) @ (a @ v.T) for a, b in factors]
    for number in range(count):
        weight = number / count
        modules: dict[str, StoredModule] = {}
        for name in names:
            core = (1 - weight) * cores[name][0] + weight * cores[name][1]
            modules[name] = StoredModule(
                "joint", "float32", 12, {"C": pack(core, "float32")}, core="dense"
            )
        writer.add_task(f"task-{number}", modules, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return folder
