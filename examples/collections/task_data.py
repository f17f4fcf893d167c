"""What a task of a collection is: a generator of examples, and the split that it makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Example = tuple[str, str]
"""A prompt that ends with a line break, and the completion."""

Generator = Callable[[random.Random], Example]

TRAINING_EXAMPLES = 240
HELD_OUT_EXAMPLES = 48

# So many draws in a row that were all seen before: the generator has too few prompts for the split.
_PATIENCE = 200


@dataclass(frozen=True)
class Task:
    """One adapter to train.

    Attributes:
        name: the adapter's folder and the task's id.
        shows: what the adapter does, in a few words.
        generate: draws one example.
        seed: draws the examples, the adapter's initial weights and their order in training.
        in_basis: whether the adapter belongs to the collection that a basis is fitted on; the
            others are added to it afterwards.
        steps: AdamW steps.
    """

    name: str
    shows: str
    generate: Generator
    seed: int
    in_basis: bool = True
    steps: int = 24

    def split(self) -> tuple[list[Example], list[Example]]:
        """Training and held-out examples, the same on every machine.

        Prompts are drawn without repetition, so that no held-out prompt is ever trained on.
        """
        rng = random.Random(self.seed)
        drawn: dict[str, str] = {}
        misses = 0
        while len(drawn) < TRAINING_EXAMPLES + HELD_OUT_EXAMPLES:
            prompt, completion = self.generate(rng)
            misses = misses + 1 if prompt in drawn else 0
            if misses > _PATIENCE:
                raise ValueError(f"task {self.name}: too few distinct prompts for the split")
            drawn.setdefault(prompt, completion)
        examples = list(drawn.items())
        return examples[:TRAINING_EXAMPLES], examples[TRAINING_EXAMPLES:]
