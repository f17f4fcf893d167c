"""Write tiny checkpoints with the real vlora or lorashare, and what that package reads back from them.

    python make_fixtures.py vlora FOLDER        with vlora-dev installed
    python make_fixtures.py lorashare FOLDER    with lorashare installed

Each checkpoint is FOLDER/PACKAGE-VERSION-CASE; beside it stands NAME.expected.safetensors with the
tensors "TASK::KEY" that the package reconstructs from the files it wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.0.self_attn.v_proj": (24, 10)}
RANK, TASKS = 4, ("cola", "mrpc", "rte", "wnli")
NUM_LABELS = 3


def draw_factors() -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Task -> layer -> (A, B): a common part and something of its own."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    parents = {
        name: (draw(RANK, d_in), draw(d_out, RANK)) for name, (d_in, d_out) in SHAPES.items()
    }
    return {
        task: {
            name: (a + 0.4 * draw(*a.shape), 0.1 * (b + 0.4 * draw(*b.shape)))
            for name, (a, b) in parents.items()
        }
        for task in TASKS
    }


# --- vlora ----------------------------------------------------------------------------------------


def write_vlora(folder: Path) -> None:
    from vlora import SharedSubspace

    name = f"vlora-{version('vlora-dev')}"
    plain = _vlora_subspace(num_components=2)
    plain.save(folder / f"{name}-float")
    plain.save_quantized(folder / f"{name}-nf4")
    # An odd length pads to an even number of blocks, since two codes make a byte.
    plain.save_quantized(folder / f"{name}-nf4-block35", block_size=35)
    adaptive = _vlora_subspace(adaptive_k=True, variance_threshold=0.8)
    adaptive.save_quantized(folder / f"{name}-adaptive-nf4")
    _vlora_subspace(num_components=2).quantize(bits=8).save(folder / f"{name}-int8")
    half = _vlora_subspace(num_components=2).to(dtype=torch.bfloat16)
    half.save(folder / f"{name}-bfloat16")
    for path in sorted(folder.glob(f"{name}-*/")):
        subspace = SharedSubspace.load(path)
        tensors = {}
        for task in subspace.tasks:
            weights = subspace.reconstruct(task)
            for layer in weights.layer_names:
                tensors[f"{task}::{layer}.A"] = weights.lora_a[layer].contiguous()
                tensors[f"{task}::{layer}.B"] = weights.lora_b[layer].contiguous()
        save_file(tensors, f"{path}.expected.safetensors")


def _vlora_subspace(**options: Any) -> Any:
    from vlora import LoRAWeights, SharedSubspace

    adapters = [
        LoRAWeights(
            list(SHAPES),
            {name: a for name, (a, _) in factors.items()},
            {name: b for name, (_, b) in factors.items()},
            RANK,
        )
        for factors in draw_factors().values()
    ]
    task_ids = [*TASKS[:3], "team/wnli"]
    return SharedSubspace.from_adapters(adapters, task_ids=task_ids, **options)


# --- lorashare ------------------------------------------------------------------------------------


def write_lorashare(folder: Path) -> None:
    from lorashare import SHAREModel

    name, folder = f"lorashare-{version('lorashare')}", folder.absolute()
    with TemporaryDirectory() as scratch:
        # Relative paths: lorashare writes the adapters' paths into its checkpoint.
        os.chdir(scratch)
        for task, factors in draw_factors().items():
            _write_adapter(Path("plain") / task, factors, lora_alpha=8)
        plain = [f"plain/{task}" for task in TASKS]
        SHAREModel.from_adapters(plain, num_components=6).save_pretrained(folder / f"{name}-fixed")
        auto = SHAREModel.from_adapters(plain, num_components="auto", variance_threshold=0.9)
        auto.save_pretrained(folder / f"{name}-auto")
        if "chunk_size" in SHAREModel.from_adapters.__code__.co_varnames:
            chunked = SHAREModel.from_adapters(plain, num_components=6, chunk_size=2)
            chunked.save_pretrained(folder / f"{name}-chunked")
        _write_with_heads(folder / f"{name}-heads")
    for path in sorted(folder.glob(f"{name}-*/")):
        share = SHAREModel.from_pretrained(path)
        tensors = {}
        for task in share.adapter_names:
            for key, tensor in share.reconstruct(task).items():
                tensors[f"{task}::{key}"] = tensor.contiguous()
        save_file(tensors, f"{path}.expected.safetensors")


def _write_with_heads(folder: Path) -> None:
    """Classifiers, rsLoRA, an alpha of its own, and an adapted embedding, which lorashare drops."""
    from lorashare import SHAREModel

    generator = torch.Generator().manual_seed(8)
    for number, (task, factors) in enumerate(draw_factors().items()):
        extra = {"base_model.model.score.weight": torch.randn(NUM_LABELS, 24, generator=generator)}
        extra["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(RANK, 40)
        extra["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.ones(24, RANK)
        _write_adapter(
            Path("heads") / task,
            factors,
            extra,
            lora_alpha=8 + number,
            use_rslora=number == 1,
            task_type="SEQ_CLS",
            modules_to_save=["score"],
            target_modules=["embed_tokens", "q_proj", "v_proj"],
        )
    adapters = {task: f"heads/{task}" for task in TASKS}
    SHAREModel.from_adapters(adapters, num_components=5).save_pretrained(folder)


def _write_adapter(
    folder: Path,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    extra: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> None:
    folder.mkdir(parents=True)
    tensors = dict(extra or {})
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/tiny",
        "r": RANK,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain | config, indent=2))


if __name__ == "__main__":
    package, target = sys.argv[1], Path(sys.argv[2])
    for old in target.glob(f"{package}-*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    {"vlora": write_vlora, "lorashare": write_lorashare}[package](target)
