"""What a blend of tasks is called: ``sql*0.7+french*0.3``, ``sql-french``.

    blend  = ["-"] term {("+" | "-") term}        term = task ["*" weight]

A task id may hold every character of that itself, so a text is read against the ids that there are: a
text that is an id is that task; otherwise each term takes the longest id with which the whole text can be
read. A weight is a plain number of at most three digits and six decimals, above 0 and up to 100; there
are no blanks around operators. Whoever sends requests may write such names, so the work for one is
bounded, whether it can be read or not.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from decimal import Decimal
from typing import NamedTuple, TypeAlias

from vllm_vlora.errors import BlendError
from vllm_vlora.task_ids import MAX_TASK_ID_LENGTH

MAX_TERMS = 8
MAX_WEIGHT = 100
MAX_LENGTH = 1024
"""Characters of a blend's name."""
# Characters of it that could be operators: the tries grow with their square.
_MAX_OPERATORS = 64
_OPERATORS = frozenset("+-*")
_WEIGHT = re.compile(r"\*([0-9]{1,3}(?:\.[0-9]{1,6})?|\.[0-9]{1,6})(?=[+-]|\Z)")


class Term(NamedTuple):
    """One task of a blend and its weight, which is exact and not 0."""

    task: str
    weight: Decimal


Blend: TypeAlias = tuple[Term, ...]
"""A weighted sum of different tasks. One term of weight 1 is the task itself."""


def task_alone(task: str) -> Blend:
    """The blend that is one task."""
    return (Term(task, Decimal(1)),)


def is_alone(blend: Blend) -> bool:
    """Whether a blend is a task itself."""
    return len(blend) == 1 and blend[0].weight == 1


def parse_blend(text: str, known: Container[str]) -> Blend:
    """Read a blend's name against the ids that there are.

    Raises:
        BlendError: the text is no id and no blend of some, names a task twice, or is above a bound.

    Examples:
        >>> parse_blend("sql*0.70-a-b", {"sql", "a", "a-b"})
        (Term(task='sql', weight=Decimal('0.7')), Term(task='a-b', weight=Decimal('-1')))
    """
    if text in known:
        return task_alone(text)
    if len(text) > MAX_LENGTH or sum(map(text.count, _OPERATORS)) > _MAX_OPERATORS:
        raise BlendError(
            f"a blend's name has at most {MAX_LENGTH} characters and {_MAX_OPERATORS} of + - *; name the "
            "blend in the checkpoint with `vllm-vlora alias`"
        )
    return checked_blend(_Reader(text, known).read())


def checked_blend(terms: Iterable[Term]) -> Blend:
    """Terms as a blend.

    Raises:
        BlendError: too many, a task twice, or a weight that is 0 or above the bound.
    """
    blend = tuple(terms)
    if not 1 <= len(blend) <= MAX_TERMS:
        raise BlendError(f"a blend has 1 to {MAX_TERMS} tasks, got {len(blend)}")
    seen: set[str] = set()
    for task, weight in blend:
        if task in seen:
            raise BlendError(f"a blend names task {task!r} twice; add its weights up")
        seen.add(task)
        if not weight or abs(weight) > MAX_WEIGHT:
            raise BlendError(
                f"weight {weight_text(weight)} of task {task!r} is not above 0 and up to {MAX_WEIGHT}; "
                "leave the task out, or write - before it to take it away"
            )
    return blend


def weight_text(weight: Decimal) -> str:
    """The one way to write a weight: ``0.3`` of ``.30``."""
    plain = f"{weight:f}"
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def blend_text(blend: Blend) -> str:
    """A blend's name, the same whatever the order of its terms: those to be added come first.

    Examples:
        >>> blend_text(parse_blend("french*.30+sql*0.7", {"sql", "french"}))
        'french*0.3+sql*0.7'
    """
    ordered = sorted(blend, key=lambda term: (term.weight < 0, term.task))
    text = "".join(f"{'+' if t.weight > 0 else '-'}{t.task}{_factor(t.weight)}" for t in ordered)
    return text.removeprefix("+")


def _factor(weight: Decimal) -> str:
    return "" if abs(weight) == 1 else f"*{weight_text(abs(weight))}"


class _Reader:
    """Tries the longest ids first, and a shorter one where nothing can be made of the rest."""

    def __init__(self, text: str, known: Container[str]) -> None:
        self._text, self._known = text, known
        places = (place for place, character in enumerate(text) if character in _OPERATORS)
        self._ends = [*places, len(text)][::-1]
        self._ids: dict[int, list[int]] = {}
        self._hopeless: set[tuple[int, int]] = set()
        # Where the text could be read up to, and whether the number of terms was what was in the way.
        self._furthest, self._too_many = 0, False

    def read(self) -> list[Term]:
        for sign, start in ((1, 0), (-1, 1)):
            if sign > 0 or self._text.startswith("-"):
                terms = self._terms(start, sign, MAX_TERMS)
                if terms is not None:
                    return terms
        if self._too_many:
            raise BlendError(f"a blend has at most {MAX_TERMS} tasks")
        rest = self._text[self._furthest :]
        raise BlendError(
            f"no task is called {_short(self._text)}"
            if not self._furthest
            else f"{_short(self._text)} is no blend of tasks: {_short(rest)} is none; write "
            "TASK*WEIGHT+TASK*WEIGHT with weights such as 0.7"
        )

    def _terms(self, start: int, sign: int, most: int) -> list[Term] | None:
        """The terms from a place on; None where it cannot be read as at most so many."""
        if not most:
            self._too_many = True
            return None
        if (start, most) in self._hopeless:
            return None
        for end in self._ends_of_ids(start):
            found = _WEIGHT.match(self._text, end)
            after = found.end() if found else end
            if after < len(self._text) and self._text[after] not in "+-":
                # What follows the * is no weight.
                self._furthest = max(self._furthest, after)
                continue
            self._furthest = max(self._furthest, after)
            weight = Decimal(found[1]).normalize() if found else Decimal(1)
            term = Term(self._text[start:end], sign * weight)
            if after == len(self._text):
                return [term]
            others = self._terms(after + 1, 1 if self._text[after] == "+" else -1, most - 1)
            if others is not None:
                return [term, *others]
        self._hopeless.add((start, most))
        return None

    def _ends_of_ids(self, start: int) -> list[int]:
        """Where the ids end that begin at a place, the longest first."""
        if start not in self._ids:
            self._ids[start] = [
                end
                for end in self._ends
                if start < end <= start + MAX_TASK_ID_LENGTH
                and self._text[start:end] in self._known
            ]
        return self._ids[start]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
