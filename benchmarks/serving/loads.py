"""Loads: which tasks are asked for, how often, and with what prompts. Seeded, so that every
configuration gets the same requests in the same round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

POPULARITIES = ("uniform", "zipf")
ZIPF_EXPONENT = 1.0
# Smaller ids are the model's special tokens.
_FIRST_TOKEN = 3


@dataclass(frozen=True)
class Load:
    """``tasks`` distinct tasks, asked for equally often or by Zipf's law."""

    tasks: int
    popularity: str

    def __str__(self) -> str:
        noun = "task" if self.tasks == 1 else "tasks"
        return f"{self.tasks} {noun}, {self.popularity}"


@dataclass(frozen=True)
class Call:
    """One request: the number of its task, or None for the base model, and its prompt's tokens."""

    task: int | None
    prompt: list[int]


@dataclass(frozen=True)
class Job:
    """Calls for one engine, at most ``concurrency`` of them at a time, in order.

    Attributes:
        max_tokens: new tokens of every call; no call ends earlier.
        logprobs: how many of the likeliest tokens to record with their logarithms; 0 for none.
        profile: record where the worker's time goes, from the step on in which every call decodes.
    """

    calls: list[Call]
    max_tokens: int
    concurrency: int
    logprobs: int = 0
    profile: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(call.prompt) for call in self.calls)


def zipf_probabilities(tasks: int, exponent: float = ZIPF_EXPONENT) -> np.ndarray:
    """p_i = i^-exponent / sum_j j^-exponent for ranks i = 1 .. tasks."""
    weights = np.arange(1, tasks + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def choose_tasks(load: Load, count: int, generator: np.random.Generator) -> list[int]:
    """The tasks of ``count`` requests in order of arrival.

    Uniform deals every task out once before any comes again, so that as many distinct tasks as the
    load names are really in a batch; Zipf draws each request's task independently.
    """
    if load.popularity == "zipf":
        return generator.choice(load.tasks, count, p=zipf_probabilities(load.tasks)).tolist()
    whole, rest = divmod(count, load.tasks)
    deals = [generator.permutation(load.tasks) for _ in range(whole)]
    deals.append(generator.permutation(load.tasks)[:rest])
    return np.concatenate(deals).tolist()


def make_calls(
    tasks: list[int], prompt_len: int, vocabulary: int, generator: np.random.Generator
) -> list[Call]:
    """A call with a random prompt of its own for each task in the list."""
    prompts = generator.integers(_FIRST_TOKEN, vocabulary, (len(tasks), prompt_len))
    return [Call(task, prompt) for task, prompt in zip(tasks, prompts.tolist())]


def generator_for(seed: int, *places: int) -> np.random.Generator:
    """A random generator for one place of the run: a round, a load, a kind of run."""
    return np.random.default_rng([seed, *places])
