"""What a client would ask in examples of tasks: the text that a router is trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vllm_vlora.evaluation.texts import Example, read_examples


def read_prompts(files: Iterable[str | Path]) -> list[str]:
    """The prompt of every example of some files, in their order.

    Raises:
        DataError: as :func:`read_examples`.
    """
    return [prompt_of(example) for file in files for example in read_examples(file)]


def prompt_of(example: Example) -> str:
    """The user's turns of a chat, a line each; the prompt of a completion; else the text."""
    if example.messages:
        return "\n".join(turn.content for turn in example.messages if turn.role == "user")
    return example.prompt or example.text
