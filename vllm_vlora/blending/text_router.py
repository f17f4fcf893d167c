"""Which tasks of a checkpoint a prompt is for: its router, asked for one text at a time.

The numbers are those of ``model.router.TaskRouter`` on ``prompt_features``; only the columns of the first
layer that a text has are touched, so an API server asks it between two requests.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from vllm_vlora.blend_names import MAX_TERMS, Blend, Term, task_alone
from vllm_vlora.blending.prompt_features import features
from vllm_vlora.checkpoint.router_files import Weights

AUTO = "auto"
"""What requests name in place of a task to have one picked."""
# A task that is less likely than this is no part of a blend: of text of no task every one is a little so.
_LEAST = 0.2
# Weights of picked blends are in steps of this, so that like prompts have one blend, which is kept.
_STEPS = 10


@dataclass(frozen=True)
class RoutePolicy:
    """How a pick is made of weights.

    Attributes:
        terms: 1 for the likeliest task alone, else a blend of at most so many.
        threshold: the weights of what is picked add up to so much at least, or the base model answers.
    """

    terms: int = 1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        assert 1 <= self.terms <= MAX_TERMS
        assert 0 <= self.threshold <= 1


class Pick(NamedTuple):
    """What a router says of a prompt.

    Attributes:
        blend: what is to answer; None for the base model.
        confidence: the weights of what was likeliest, added up, from 0 to 1.
    """

    blend: Blend | None
    confidence: float


class TextRouter:
    """A router that is ready to be asked.

    Args:
        tasks: what the outputs mean; one more is that of no task.
        temperature: the logits are divided by it.
        weights: of the network, checked (``read_router_weights``).
    """

    def __init__(self, tasks: Sequence[str], temperature: float, weights: Weights) -> None:
        self.tasks, self._temperature = list(tasks), temperature
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        self._idf = arrays["idf"]
        # A text's columns as rows, each in one piece of memory.
        self._columns = np.ascontiguousarray(arrays["net.0.weight"].T)
        self._first_bias = arrays["net.0.bias"]
        self._last, self._last_bias = arrays["net.2.weight"], arrays["net.2.bias"]

    def logits(self, text: str) -> np.ndarray:
        """(outputs) float64, before the temperature."""
        places, values = features(text, self._idf)
        hidden = np.maximum(values @ self._columns[places] + self._first_bias, 0)
        return (self._last @ hidden + self._last_bias).astype(np.float64)

    def weights(self, text: str) -> np.ndarray:
        """(outputs) float64, whose sum is 1."""
        logits = self.logits(text) / self._temperature
        exponents = np.exp(logits - logits.max())
        return exponents / exponents.sum()

    def pick(self, text: str, tasks: Container[str], policy: RoutePolicy) -> Pick:
        """What is to answer a prompt.

        Text without any run of bytes to go by, or that is likeliest of no task, or of one that is gone,
        is the base model's.

        Args:
            tasks: those that are there.
        """
        if not text.strip():
            return Pick(None, 0.0)
        weights = self.weights(text)
        order = np.argsort(-weights, kind="stable")[: policy.terms]
        first = self._task(int(order[0]))
        if first is None or first not in tasks:
            return Pick(None, float(weights[order[0]]))
        chosen = [(first, float(weights[order[0]]))]
        for place in order[1:]:
            task = self._task(int(place))
            if weights[place] >= _LEAST and task is not None and task in tasks:
                chosen.append((task, float(weights[place])))
        confidence = sum(weight for _, weight in chosen)
        if confidence < policy.threshold:
            return Pick(None, confidence)
        return Pick(_blend(chosen), confidence)

    def _task(self, output: int) -> str | None:
        """The task of an output; None for that of no task."""
        return self.tasks[output] if output < len(self.tasks) else None


def _blend(chosen: list[tuple[str, float]]) -> Blend:
    """Weights that add up to 1 in whole steps, the likeliest first; what is left without one goes."""
    total = sum(weight for _, weight in chosen)
    shares = [weight / total * _STEPS for _, weight in chosen]
    steps = [int(share) for share in shares]
    # The largest remainders get what rounding down has left.
    by_rest = sorted(range(len(steps)), key=lambda n: (steps[n] - shares[n], n))
    for place in by_rest[: _STEPS - sum(steps)]:
        steps[place] += 1
    kept = [(task, step) for (task, _), step in zip(chosen, steps) if step]
    if len(kept) == 1:
        return task_alone(kept[0][0])
    return tuple(Term(task, Decimal(step) / _STEPS) for task, step in kept)
