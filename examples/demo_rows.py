"""What the examples of training and routing share: the demo's model, adapters and texts as tokens."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vllm_vlora.evaluation.texts import (
    Batch,
    Example,
    Message,
    Row,
    make_batches,
    padding_id,
    tokenize,
)

DEMO = Path(__file__).resolve().parent / "demo"
ADAPTERS = DEMO / "adapters"
MODEL = Path(".cache/smollm2")

Pair = tuple[str, str]
"""What the user says, and what the assistant is to answer."""


def _demo_file(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def demo_pairs() -> dict[str, tuple[list[Pair], list[Pair]]]:
    """Task -> its examples for training and the held-out ones."""
    tasks = _demo_file("tasks").TASKS
    return {task.name: (list(task.train), list(task.held_out)) for task in tasks}


def load_model(folder: Path, **options: Any) -> tuple[Any, Any]:
    """(tokenizer, model) for evaluation; SmolLM2 is written to ``folder`` if nothing is there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        _demo_file("prepare_model").prepare_model(folder)
    options = {"dtype": torch.float32, **options}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return AutoTokenizer.from_pretrained(folder), model.eval()


def adapter_folders(folder: Path) -> dict[str, Path]:
    """Task -> PEFT folder, for each below ``folder``."""
    return {file.parent.name: file.parent for file in sorted(folder.glob("*/adapter_config.json"))}


def to_rows(pairs: Sequence[Pair], tokenizer: Any, max_length: int = 256) -> list[Row]:
    """Chats in tokens; only answers have labels."""
    chats = [
        Example(prompt, messages=(Message("user", prompt), Message("assistant", answer)))
        for prompt, answer in pairs
    ]
    return [tokenize(chat, tokenizer, max_length) for chat in chats]


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as the keyword arguments of a causal language model."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
    }


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Row], tokenizer: Any, batch_size: int = 8) -> float:
    """Nats per token of the answers."""
    total, tokens = 0.0, 0
    for batch in make_batches(rows, batch_size, padding_id(tokenizer)):
        count = sum(rows[index].supervised for index in batch.indices)
        total += float(model(**inputs_of(batch)).loss) * count
        tokens += count
    return total / tokens
