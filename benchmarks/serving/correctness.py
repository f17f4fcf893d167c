"""Every configuration's tokens against stock vLLM's, in one run with the figures.

Stock vLLM serves the adapters themselves, and each checkpoint's tasks exported as PEFT folders, one
request at a time. Every configuration must give the same greedy tokens for the weights that it serves,
with all requests in one batch. Where arithmetic rounds differently (16 bits, a GPU), tokens may part
where the model hardly prefers one to the other, and only there; and what it says of the reference's
tokens is held too: with random weights near ties are many, and an update that was added twice parted at
those alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness import WrongResultError

from serving.figures import Trace
from serving.loads import Call, Job, generator_for, make_calls
from serving.world import CHECKED_TASKS

PROMPTS = 2
PROMPT_LEN = 12
MAX_TOKENS = 16
LOGPROBS = 5
# A place of its own among the run's random generators.
_PLACE = 1 << 20
# How much less likely, in nats, a token may be that another arithmetic picks. In bfloat16 stock vLLM
# itself, asked twice in other batches on an H100, agreed with itself in a fifth of 64 answers of 32
# tokens only (random weights); another task's token is less likely by several nats.
NEAR_TIE, BFLOAT16_TIE = 0.1, 0.5


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and for each of them the likeliest tokens' logarithms."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def check_calls(seed: int, vocabulary: int) -> list[Call]:
    """The same ``PROMPTS`` prompts to each of the first tasks; no figure is taken with them."""
    prompts = make_calls([0] * PROMPTS, PROMPT_LEN, vocabulary, generator_for(seed, _PLACE))
    return [Call(task, call.prompt) for task in range(CHECKED_TASKS) for call in prompts]


def reference_job(calls: Sequence[Call], shift: int | None) -> Job:
    """The calls one at a time, tasks counted on by ``shift``, or to the base model when it is None."""
    shifted = [
        Call(None if shift is None or call.task is None else call.task + shift, call.prompt)
        for call in calls
    ]
    return Job(shifted, MAX_TOKENS, concurrency=1, logprobs=LOGPROBS)


def check_job(calls: Sequence[Call]) -> Job:
    """The calls in one batch."""
    return Job(list(calls), MAX_TOKENS, concurrency=len(calls), logprobs=LOGPROBS)


def check_reference(name: str, reference: Trace, base: Trace) -> None:
    """Refuse a reference that could not tell two tasks, or a task and the base model, apart.

    Raises:
        WrongResultError: two of them answer a prompt with the same tokens.
    """
    for prompt in range(PROMPTS):
        answers = [base.tokens[prompt], *reference.tokens[prompt::PROMPTS]]
        if len({tuple(tokens) for tokens in answers}) < len(answers):
            raise WrongResultError(
                f"{name}: two of the tasks and the base model answer alike, so that the check could "
                "not see whether the right task is applied"
            )


def compare(
    name: str, found: Trace, reference: Trace, exact: bool, tie: float = NEAR_TIE
) -> dict[str, Any]:
    """Hold one configuration's tokens against the reference's.

    Args:
        exact: whether the first difference is an error already; otherwise it must be a near tie.
        tie: how near, in nats.

    Returns:
        How many tokens were compared, up to each answer's first difference, how many answers part at a
        near tie, and the largest difference in nats of what both say of a token of the reference.

    Raises:
        WrongResultError: a token differs that may not, or is another's by more than a tie.
    """
    compared = parted = 0
    largest = 0.0
    for place, (ours, theirs) in enumerate(zip(_answers(found), _answers(reference), strict=True)):
        where = f"{name}: task {place // PROMPTS}, prompt {place % PROMPTS}"
        held, apart = compare_answers(where, ours, theirs, exact, tie)
        compared += held
        parted += ours.tokens != theirs.tokens
        largest = max(largest, apart)
    return {
        "tokens_compared": compared,
        "answers": len(found.tokens),
        "parted_at_near_ties": parted,
        "largest_difference_nats": round(largest, 4),
    }


def _answers(trace: Trace) -> list[Answer]:
    return [Answer(*each) for each in zip(trace.tokens, trace.logprobs, strict=True)]


def compare_answers(
    where: str, found: Answer, reference: Answer, exact: bool, tie: float
) -> tuple[int, float]:
    """Hold one answer against stock vLLM's to the same prompt.

    Returns:
        How many tokens were compared, up to the first difference, and the largest difference in nats.

    Raises:
        WrongResultError: as ``compare`` does.
    """
    tokens, wanted = found.tokens, reference.tokens
    if len(tokens) != len(wanted):
        raise WrongResultError(f"{where}: {len(tokens)} tokens instead of {len(wanted)}")
    first = next((i for i, pair in enumerate(zip(tokens, wanted)) if pair[0] != pair[1]), None)
    held = len(wanted) if first is None else first + 1
    if first is not None:
        likeliest = reference.logprobs[first]
        _check_parting(
            where, first, tokens[first], wanted[first], likeliest, None if exact else tie
        )
    said = zip(wanted[:held], found.logprobs[:held], reference.logprobs[:held], strict=True)
    largest = max(
        _apart(f"{where}: token {number}", token, ours, theirs, tie)
        for number, (token, ours, theirs) in enumerate(said)
    )
    return held, largest


def _check_parting(
    where: str, number: int, token: int, wanted: int, likeliest: dict[int, float], tie: float | None
) -> None:
    """Refuse a token that the reference finds less likely than its own by more than a tie; None: any."""
    behind = likeliest[wanted] - likeliest.get(token, -float("inf"))
    if tie is None or behind > tie:
        raise WrongResultError(
            f"{where}: token {number} is {token}, stock vLLM gives {wanted}, which is likelier by "
            f"{behind:.3g} nats"
        )


def _apart(
    where: str, token: int, found: dict[int, float], reference: dict[int, float], tie: float
) -> float:
    """How far apart in nats both find a token of the reference; more than a tie is refused."""
    ours, theirs = found.get(token, -float("inf")), reference[token]
    if abs(ours - theirs) > tie:
        raise WrongResultError(
            f"{where}, {token}, has logarithm {ours:.3g}, with stock vLLM {theirs:.3g}"
        )
    return abs(ours - theirs)
