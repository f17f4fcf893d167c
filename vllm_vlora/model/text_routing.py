"""Training a router on texts of tasks, and how often it is right on texts that it has not seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from vllm_vlora.blending.prompt_features import BUCKETS, TextRows, inverse_frequencies
from vllm_vlora.blending.text_router import RoutePolicy, TextRouter
from vllm_vlora.checkpoint.router_files import MAX_HIDDEN, MAX_OUTPUTS, Measured, Weights
from vllm_vlora.errors import DataError, OptionError
from vllm_vlora.model.router import TaskRouter
from vllm_vlora.wording import count_of

OTHERS = ""
"""The label of text that is of no task."""
MAX_SEED = (1 << 63) - 1
# Softmax weights of a network that knows its training text by heart are too sure of themselves. They are
# made less so as held-out text asks for (Guo et al. 2017, arXiv:1706.04599), and never more.
_TEMPERATURES = tuple(1.1**step for step in range(40))


@dataclass(frozen=True)
class RouterOptions:
    """How a router is trained.

    Attributes:
        held_out: part of each task's texts that is not trained on, from 0 up to below 1.
        hidden: width of the network, up to ``MAX_HIDDEN``.
        epochs: passes over the texts.
        seed: draws what is held out, the first weights and the order of the texts.

    Raises:
        OptionError: one is out of range.
    """

    held_out: float = 0.2
    hidden: int = 64
    epochs: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise OptionError(f"held_out must be from 0 to below 1, got {self.held_out}")
        if not 1 <= self.hidden <= MAX_HIDDEN or self.epochs < 1:
            raise OptionError(
                f"hidden must be from 1 to {MAX_HIDDEN} and epochs at least 1, got {self.hidden} and "
                f"{self.epochs}"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise OptionError(f"seed must be from 0 to {MAX_SEED}, got {self.seed}")


@dataclass(frozen=True)
class TrainedRouter:
    """A router and what was found of it.

    Attributes:
        tasks: what its outputs mean; one more stands for no task where ``others`` is set.
        weights: what a checkpoint keeps of it.
        measured: label -> how many texts, and how many of those that were held out were routed right.
        confusion: right label -> label that it was taken for -> held-out texts.
        confidence: label -> mean weight of the likeliest label on its held-out texts.
        routed, routed_right: held-out texts with a weight of ``threshold`` at least, and right ones of
            them.
        threshold: where nothing else is set, the base model answers below it.
    """

    tasks: list[str]
    others: bool
    temperature: float
    weights: Weights
    measured: dict[str, Measured]
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)
    confidence: dict[str, float] = field(default_factory=dict)
    routed: int = 0
    routed_right: int = 0

    threshold: ClassVar[float] = RoutePolicy().threshold

    @property
    def accuracy(self) -> float | None:
        """Right ones of all held-out texts; None where none was held out."""
        held_out = sum(found.held_out for found in self.measured.values())
        return sum(f.right for f in self.measured.values()) / held_out if held_out else None


Advance = Callable[[str, int, int], None]


def train_text_router(
    texts: Mapping[str, Sequence[str]],
    options: RouterOptions | None = None,
    advance: Advance = lambda *_: None,
) -> TrainedRouter:
    """Train a router that tells tasks apart by their prompts.

    A text that stands twice under a label counts once, so that none that is held out was trained on.

    Args:
        texts: task id -> prompts; under ``OTHERS`` those of no task, which the base model is to answer.
        options: by default ``RouterOptions()``.
        advance: called with (what is done, steps done, all steps).

    Raises:
        DataError: a label has fewer than two texts. OptionError: fewer than two labels, or too many.

    Examples:
        >>> sql = [f"select {n} from t" for n in range(10)]
        >>> french = [f"je vends {n} pommes" for n in range(10)]
        >>> train_text_router({"sql": sql, "french": french}).accuracy
        1.0
    """
    options = options or RouterOptions()
    # That of no task comes last.
    labels = sorted(texts, key=lambda label: label == OTHERS)
    if not 2 <= len(labels) <= MAX_OUTPUTS:
        raise OptionError(
            f"a router tells 2 to {MAX_OUTPUTS} tasks apart, got texts of {len(labels)}; give those of "
            "more tasks, or some of no task"
        )
    train, held = _split({label: texts[label] for label in labels}, options)
    idf = inverse_frequencies((text for text, _ in train), BUCKETS)
    with torch.random.fork_rng(devices=[]):
        # Of the CPU alone, which is restored: torch.manual_seed seeds all devices.
        torch.default_generator.manual_seed(options.seed)
        router = TaskRouter(BUCKETS, len(labels), options.hidden, labels)
    router.fit(
        TextRows([text for text, _ in train], idf),
        [label for _, label in train],
        epochs=options.epochs,
        lr=5e-3,
        weight_decay=1e-2,
        # Of many texts larger batches, so that the number of steps stays bounded.
        batch_size=max(8, len(train) // 100),
        seed=options.seed,
        advance=lambda done, total: advance("train", done, total),
    )
    weights = {"idf": torch.from_numpy(idf), **router.state_dict()}
    tasks = [label for label in labels if label != OTHERS]
    # What is measured is what servers run.
    asked = TextRouter(tasks, 1.0, weights)
    logits = torch.tensor(np.array([asked.logits(text) for text, _ in held]))
    temperature = _temperature(logits, [labels.index(label) for _, label in held])
    found = _found(labels, train, held, F.softmax(logits / temperature, dim=-1))
    return TrainedRouter(tasks, OTHERS in texts, temperature, weights, **found)


_Labelled = list[tuple[str, str]]
"""Texts and their labels."""


def _split(
    texts: Mapping[str, Sequence[str]], options: RouterOptions
) -> tuple[_Labelled, _Labelled]:
    train: _Labelled = []
    held: _Labelled = []
    for label, given in texts.items():
        own = list(dict.fromkeys(text for text in given if text.strip()))
        if len(own) < 2:
            name = f"task {label!r}" if label else "text of no task"
            raise DataError(
                f"{name}: {count_of(len(own), 'different prompt')}; a router needs two at least, and "
                "better fifty"
            )
        random.Random(options.seed).shuffle(own)
        count = min(len(own) - 1, max(1, round(options.held_out * len(own))))
        count = count if options.held_out else 0
        held += [(text, label) for text in own[:count]]
        train += [(text, label) for text in own[count:]]
    return train, held


def _temperature(logits: torch.Tensor, right: list[int]) -> float:
    """The one of those allowed under which the right labels are likeliest; 1 without any text."""
    if not right:
        return 1.0
    wanted = torch.tensor(right)
    return min(_TEMPERATURES, key=lambda t: float(F.cross_entropy(logits / t, wanted)))


def _found(
    labels: list[str], train: _Labelled, held: _Labelled, weights: torch.Tensor
) -> dict[str, Any]:
    """What a ``TrainedRouter`` says of its held-out texts."""
    measured = {label: Measured(0, 0, 0) for label in labels}
    for _, label in train:
        measured[label].trained += 1
    routed: list[bool] = []
    confusion: dict[str, dict[str, int]] = {label: {} for label in labels}
    sure: dict[str, list[float]] = {label: [] for label in labels}
    for (_, label), row in zip(held, weights):
        taken = labels[int(row.argmax())]
        measured[label].held_out += 1
        measured[label].right += taken == label
        confusion[label][taken] = confusion[label].get(taken, 0) + 1
        sure[label].append(float(row.max()))
        if float(row.max()) >= TrainedRouter.threshold:
            routed.append(taken == label)
    confidence = {label: sum(found) / len(found) for label, found in sure.items() if found}
    return {
        "measured": measured,
        "confusion": confusion,
        "confidence": confidence,
        "routed": len(routed),
        "routed_right": sum(routed),
    }
