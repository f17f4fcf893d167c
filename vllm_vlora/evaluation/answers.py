"""What tasks answer, judged against right answers and against what their adapters answer.

This is how compressed adapters are reported in the field (Brüel Gabrielsson et al., *Compress then
Serve*, arXiv 2407.00066): a metric of the task's answers on held-out text, relative to the metric of the
uncompressed adapter, and how often both answer alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_vlora.errors import DataError, OptionError
from vllm_vlora.evaluation.texts import IGNORED, Example, Row, read_examples, tokenize

ROUGE, EXACT, LOSS = METRICS = ("rouge-l", "exact-match", "loss")
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Question:
    """What is given, in tokens, and the answers that are right; ``row`` is both, for a loss."""

    given: tuple[int, ...]
    right: tuple[str, ...]
    row: Row


@dataclass(frozen=True)
class TaskAnswers:
    """How well a task answers.

    Attributes:
        examples: how many were asked; ``left_out`` leave no room for an answer.
        base, adapter, compressed: the metric, a mean over the examples: Rouge-L's F, or the share of
            exact matches, from 0 to 1, or nats per token of the right answer. ``adapter`` is None
            without an original.
        relative: compressed / adapter, or of losses adapter / compressed: 1 says as good as the
            adapter, less says worse. None without an original, or where there is nothing to divide by.
        agreement: share of the examples that task and adapter answer with the same text; None without an
            original, and for a loss.
    """

    task: str
    examples: int
    left_out: int
    base: float
    adapter: float | None
    compressed: float
    relative: float | None
    agreement: float | None


@dataclass(frozen=True)
class AnswersReport:
    """All tasks by one metric; means are over the tasks that have the figure."""

    metric: str
    checkpoint: str
    base_model: str
    ratio: float | None
    tasks: tuple[TaskAnswers, ...]
    not_evaluated: tuple[str, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, figure: str) -> float | None:
        """The mean of one figure of the tasks; None where none has it."""
        values = [getattr(task, figure) for task in self.tasks]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        figures = ("base", "adapter", "compressed", "relative", "agreement")
        worst = min((t for t in self.tasks if t.relative is not None), key=_relative, default=None)
        return {
            "metric": self.metric,
            "checkpoint": self.checkpoint,
            "base_model": self.base_model,
            "ratio": self.ratio,
            "mean": {figure: self.mean(figure) for figure in figures},
            "worst": worst and {"task": worst.task, "relative": worst.relative},
            "tasks": [asdict(task) for task in self.tasks],
            "not_evaluated": list(self.not_evaluated),
            "setting": dict(self.setting),
        }


def _relative(task: TaskAnswers) -> float:
    assert task.relative is not None
    return task.relative


# --- questions ------------------------------------------------------------------------------------


def read_questions(
    files: Sequence[Path], tokenizer: Any, metric: str, longest: int, most: int | None = None
) -> tuple[list[Question], int]:
    """The questions of a task's data files, and how many have more tokens than an engine takes.

    Args:
        longest: tokens that may be given. most: examples taken of each file.

    Raises:
        OptionError: ``most`` is below 1.
        DataError: a file cannot be read, has no right answers, or no question that fits.
    """
    if most is not None and most < 1:
        raise OptionError(f"max_examples must be at least 1, got {most}")
    examples = [one for path in files for one in read_examples(path)[:most]]
    questions = [_question(one, tokenizer, metric) for one in examples]
    fitting = [
        q for q in questions if len(q.row.input_ids if metric == LOSS else q.given) <= longest
    ]
    if not fitting:
        raise DataError(
            f"{files[0]}: no example has at most {longest} tokens; give a greater --max-length"
        )
    return fitting, len(questions) - len(fitting)


def _question(example: Example, tokenizer: Any, metric: str) -> Question:
    row = tokenize(example, tokenizer, _UNCUT)
    if metric == LOSS:
        return Question((), (), row)
    if example.messages:
        turns = [message.role for message in example.messages]
        last = len(turns) - 1 - turns[::-1].index("assistant")
        right: tuple[str, ...] = (example.messages[last].content,)
    elif example.prompt is None:
        raise DataError(
            f"{example.place}: a plain text has no right answer; give prompt and completion, or use "
            "--metric loss"
        )
    else:
        right = (example.text, *example.references)
    # What is given is all before the last stretch that is scored.
    start = len(row.labels)
    while start and row.labels[start - 1] != IGNORED:
        start -= 1
    return Question(tuple(row.input_ids[:start]), right, row)


_UNCUT = 1 << 30


# --- judging --------------------------------------------------------------------------------------


def scorer(metric: str) -> Callable[[str, Sequence[str]], float]:
    """(answer, right answers) -> 0 to 1, by the right answer that is nearest.

    Raises:
        OptionError: an unknown metric, or Rouge-L without the package that computes it.
    """
    if metric == EXACT:
        return lambda answer, right: float(_plain(answer) in {_plain(one) for one in right})
    if metric != ROUGE:
        raise OptionError(f"metric {metric!r} is unknown; give {', '.join(METRICS)}")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise OptionError(
            f"--metric rouge-l needs rouge-score ({error}); pip install 'vllm-vlora[metrics]'"
        ) from error
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda answer, right: max(rouge.score(one, answer)["rougeL"].fmeasure for one in right)


def _plain(text: str) -> str:
    return _SPACES.sub(" ", text).strip()


def judge_texts(
    task: str,
    questions: Sequence[Question],
    left_out: int,
    score: Callable[[str, Sequence[str]], float],
    base: Sequence[str],
    adapter: Sequence[str] | None,
    compressed: Sequence[str],
) -> TaskAnswers:
    """A task by what was answered to its questions."""

    def mean(texts: Sequence[str]) -> float:
        return fmean(score(text, q.right) for text, q in zip(texts, questions, strict=True))

    ours, theirs = mean(compressed), None if adapter is None else mean(adapter)
    alike = None
    if adapter is not None:
        pairs = zip(adapter, compressed, strict=True)
        alike = fmean(float(_plain(a) == _plain(b)) for a, b in pairs)
    relative = ours / theirs if theirs else None
    return TaskAnswers(task, len(questions), left_out, mean(base), theirs, ours, relative, alike)


def judge_losses(
    task: str,
    questions: Sequence[Question],
    left_out: int,
    base: Sequence[Sequence[float]],
    adapter: Sequence[Sequence[float]] | None,
    compressed: Sequence[Sequence[float]],
) -> TaskAnswers:
    """A task by the log-probabilities of its examples' tokens."""

    def loss(found: Sequence[Sequence[float]]) -> float:
        scored = [
            value
            for question, values in zip(questions, found, strict=True)
            for label, value in zip(question.row.labels[1:], values[1:], strict=True)
            if label != IGNORED
        ]
        if not scored:
            raise DataError(f"task {task!r}: no token of its data is an answer")
        return -fmean(scored)

    ours, theirs = loss(compressed), None if adapter is None else loss(adapter)
    relative = None if theirs is None or not ours else theirs / ours
    return TaskAnswers(task, len(questions), left_out, loss(base), theirs, ours, relative, None)
