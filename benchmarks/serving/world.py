"""The model, its adapters, their checkpoints and exports: written once into a folder, reused after.

The adapters are random, of one rank on all seven linears of a layer, bfloat16, and lie near a common
subspace of ``SHARED_DIMENSIONS`` dimensions, so that a joint checkpoint is not mere error. Beyond
``distinct`` of them the weights repeat under other names, adapter folders as hard links: an engine
cannot tell, its slots hold every task for itself, and a thousand adapters of a large model need
neither their disk space nor their hours of compression.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARED_DIMENSIONS = 32
CHECKED_TASKS = 4
_OWN_PART = 0.03

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
    },
    # A small vocabulary, so that the output head does not hide the layers that LoRA runs in.
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 4096,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
MODELS["8b"] = MODELS["7b"] | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# Half the layers, so that four engines fit into 80 GB. The 8B's keys and values take a quarter of the
# 7B's, which leaves room for a thousand requests at once in each; half its vocabulary, so that the
# output head keeps its share of a step.
MODELS["7b-16"] = MODELS["7b"] | {"num_hidden_layers": 16}
MODELS["8b-16"] = MODELS["8b"] | {"num_hidden_layers": 16, "vocab_size": 64128}
# Models whose weights are not written: vLLM makes them up, ``worker.bench_initialise`` sets them.
DUMMY_MODELS = ("7b", "7b-16", "8b", "8b-16")

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "k32": {"num_components": 32, "quantize": "none"},
    "k64": {"num_components": 64, "quantize": "none"},
    # A ratio this low sets no limit, so that no rank is cut.
    "bf16": {"representation": "private", "ratio": 0.1, "quantize": "none"},
    "int8": {"representation": "private", "ratio": 0.1, "quantize": "int8"},
    "nf4": {"representation": "private", "ratio": 0.1, "quantize": "nf4"},
}
JOINT_CHECKPOINTS = tuple(name for name in CHECKPOINTS if "num_components" in CHECKPOINTS[name])


@dataclass(frozen=True)
class WorldPlan:
    """What a folder is to hold.

    Attributes:
        model: a name of ``MODELS``, or a model's folder.
        tasks: number of tasks. distinct: how many of them have weights of their own.
        rank: of every adapter.
    """

    model: str
    tasks: int
    distinct: int
    rank: int


class World:
    """Paths of everything under one folder; ``make`` writes what is not there."""

    def __init__(self, root: Path, plan: WorldPlan) -> None:
        name = plan.model if plan.model in MODELS else Path(plan.model).name
        self.root = root / f"{name}-{plan.tasks}-{plan.distinct}-r{plan.rank}"
        self.plan = plan

    @property
    def model(self) -> Path:
        """The model's folder."""
        if self.plan.model in MODELS:
            return self.root / "model"
        return Path(self.plan.model).absolute()

    @property
    def load_format(self) -> str:
        """vLLM's ``load_format``: ``dummy`` where no weights were written."""
        return "dummy" if self.plan.model in DUMMY_MODELS else "auto"

    @property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        return json.loads((self.model / "config.json").read_text())

    @property
    def task_ids(self) -> list[str]:
        """The names of the tasks, by number."""
        return [task_id(number) for number in range(self.plan.tasks)]

    def adapter(self, number: int) -> Path:
        """A task's PEFT folder."""
        return self.root / "adapters" / task_id(number)

    def checkpoint(self, name: str) -> Path:
        """The checkpoint of all tasks in one of ``CHECKPOINTS``."""
        return self.root / "checkpoints" / name

    def exports(self, name: str) -> list[Path]:
        """A checkpoint's first tasks, decoded into PEFT folders for stock vLLM."""
        return [self.root / "exports" / name / task_id(n) for n in range(CHECKED_TASKS)]

    def lora_weights(self) -> int:
        """LoRA weights of one adapter over all modules: sum of r (d_in + d_out)."""
        from vllm_vlora import open_adapter

        return sum(module.numel for module in open_adapter(self.adapter(0)).modules.values())

    def model_weights(self) -> int:
        """Weights of the model."""
        return sum(parameter.numel() for parameter in self._meta_model().parameters())

    # --- writing ---

    def make(self, checkpoints: list[str]) -> None:
        """Write what is missing; ``checkpoints`` are names of ``CHECKPOINTS``."""
        self._reset_if_other()
        if self.plan.model in MODELS and not self.model.exists():
            _write_model(self.model, self.plan.model)
        self._write_adapters()
        for name in checkpoints:
            if not self.checkpoint(name).exists():
                self._compress(name)
            self._export(name)

    def _reset_if_other(self) -> None:
        """Drop what another version of this file or another plan left under the same name."""
        stamp, wanted = self.root / "plan.json", self._identity()
        if self.root.exists() and (not stamp.exists() or stamp.read_text() != wanted):
            shutil.rmtree(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        stamp.write_text(wanted)

    def _identity(self) -> str:
        source = Path(__file__).read_text()
        return json.dumps({**asdict(self.plan), "written_by": source})

    def _write_adapters(self) -> None:
        from vllm_vlora.adapters import write_adapter

        factory = _FactorFactory(self._shapes(), self.plan.rank)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.model),
            "r": self.plan.rank,
            "lora_alpha": 2 * self.plan.rank,
            "target_modules": list(LINEARS),
        }
        for number in range(self.plan.tasks):
            folder = self.adapter(number)
            if folder.exists():
                continue
            if number < self.plan.distinct:
                write_adapter(folder, config, factory.make(number))
            else:
                shutil.copytree(
                    self.adapter(number % self.plan.distinct), folder, copy_function=os.link
                )

    def _meta_model(self) -> Any:
        """The model without its weights."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model))

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (d_in, d_out) of the model's seven linears a layer."""
        import torch

        model = self._meta_model()
        shapes = {
            name: (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in LINEARS
        }
        if not shapes:
            raise SystemExit(f"{self.model}: no layers named {', '.join(LINEARS)}; use a Llama")
        return shapes

    def _compress(self, name: str) -> None:
        from vllm_vlora import CompressOptions, compress, open_adapter

        distinct = self.checkpoint(name)
        if self.plan.distinct < self.plan.tasks:
            distinct = distinct.with_name(f"{name}-distinct")
        adapters = {
            task_id(n): open_adapter(self.adapter(n))
            for n in range(min(self.plan.distinct, self.plan.tasks))
        }
        compress(adapters, distinct, CompressOptions(**CHECKPOINTS[name]), force=True)
        if distinct != self.checkpoint(name):
            _repeat_tasks(distinct, self.checkpoint(name), self.task_ids)
            shutil.rmtree(distinct)

    def _export(self, name: str) -> None:
        import torch

        from vllm_vlora import Checkpoint, export_task

        checkpoint = Checkpoint.open(self.checkpoint(name))
        for number, folder in enumerate(self.exports(name)):
            if not folder.exists():
                export_task(checkpoint, task_id(number), folder, dtype=torch.float32)


def task_id(number: int) -> str:
    """The name of a task."""
    return f"task-{number:04d}"


def _write_model(folder: Path, name: str) -> None:
    """A random Llama with the usual initial weights, float32; only its config for a dummy one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **MODELS[name],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    if name in DUMMY_MODELS:
        config.save_pretrained(folder)
        return
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


class _FactorFactory:
    """Makes adapters' factors near subspaces that all of them share."""

    def __init__(self, shapes: dict[str, tuple[int, int]], rank: int) -> None:
        import torch

        self._rank = rank
        shared = torch.Generator().manual_seed(0)
        size = SHARED_DIMENSIONS**-0.5
        self._common = {
            name: [torch.randn(SHARED_DIMENSIONS, d, generator=shared) * size for d in dimensions]
            for name, dimensions in shapes.items()
        }

    def make(self, number: int) -> Iterator[tuple[str, tuple[Any, Any]]]:
        """A and B in bfloat16 for every module: entries of about 0.02, as in trained adapters."""
        import torch

        own = torch.Generator().manual_seed(1 + number)

        def factor(common: torch.Tensor) -> torch.Tensor:
            mixed = torch.randn(self._rank, SHARED_DIMENSIONS, generator=own) @ common
            rest = torch.randn(mixed.shape, generator=own)
            return (mixed + _OWN_PART * rest).mul(0.02).bfloat16()

        for name, (common_in, common_out) in self._common.items():
            yield name, (factor(common_in), factor(common_out).T.contiguous())


def _repeat_tasks(source: Path, target: Path, task_ids: list[str]) -> None:
    """A checkpoint of ``task_ids`` whose tasks are those of ``source``, again and again."""
    from vllm_vlora import Checkpoint
    from vllm_vlora.atomic import publish_folder
    from vllm_vlora.checkpoint.own_files import checkpoint_files
    from vllm_vlora.checkpoint.writer import CheckpointWriter

    checkpoint = Checkpoint.open(source)
    bases = dict(checkpoint.bases())
    with publish_folder(target, force=True, owned=checkpoint_files) as folder:
        writer = CheckpointWriter(folder, checkpoint.base_model)
        for module in checkpoint.modules:
            writer.add_module(
                module.name, module.d_in, module.d_out, module.kind, bases.get(module.name)
            )
        originals = list(checkpoint.tasks)
        for number, name in enumerate(task_ids):
            original = originals[number % len(originals)]
            record = checkpoint.record(original)
            writer.add_task(
                name,
                checkpoint.load_task(original).modules,
                original_nbytes=record.original_nbytes,
                error=record.error,
                adapter_config=record.adapter_config,
            )
        writer.finish("Tasks of a benchmark, whose weights repeat.\n")
