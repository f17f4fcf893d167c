"""Routers of the engine tests' prompts, which have no word in common."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from engine_server import words

from vllm_vlora.editing.routing import attach_router
from vllm_vlora.model.text_routing import OTHERS, train_text_router

TASKS = ("attention", "everything", "rslora")
NO_TASK = [201, 207, 213, 219, 222, 231, 234, 237]


def text_of(prompt: list[int]) -> str:
    return " ".join(words(prompt))


def attach(checkpoint: Path, prompts: Mapping[str, list[int]]) -> None:
    """A router that takes prompts of these words to be the tasks'."""
    rng = random.Random(0)
    texts = {
        task: [" ".join(words(rng.choices(prompt, k=6))) for _ in range(80)]
        for task, prompt in prompts.items()
    }
    texts[OTHERS] = [" ".join(words(rng.choices(NO_TASK, k=6))) for _ in range(80)]
    found = train_text_router(texts)
    assert found.accuracy is not None
    assert found.accuracy > 0.95
    attach_router(
        checkpoint, found.tasks, found.weights, others=True, temperature=found.temperature
    )
