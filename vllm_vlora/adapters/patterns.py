"""Regular expressions of foreign configs, matched in bounded time.

PEFT gives the patterns of a config to ``re``, which backtracks: ``(a+)+b`` takes longer than anyone waits
for thirty letters. Here a pattern's own parse tree is followed with the set of all places that it can
have reached, as Thompson did (Communications of the ACM 11(6), 1968), so that no way is tried twice. Only
whether a text matches is answered, and for that greedy and lazy are one; it is ``re``'s answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

_MOST_STEPS = 100_000
"""Places looked at in one text; a pattern of a kind that is in use takes some thousands."""
PLAIN = re.compile(r"[\w.-]+", re.ASCII)
"""A pattern that is a name."""
_MOST_LETTERS = 1 << 18
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda c: c.isalnum() or c == "_",
}


class PatternError(ValueError):
    """Why a pattern cannot be matched."""


@lru_cache(maxsize=1 << 16)
def fullmatch(pattern: str, text: str) -> bool:
    """Whether ``re.fullmatch`` finds the pattern to be all of the text.

    Raises:
        PatternError: it is no regular expression, asks for what is not done here (groups that are
            referred to, atomic ones, flags but ``i`` and ``s``), or for too much work.
    """
    return len(text) in _ends(pattern, text)


@lru_cache(maxsize=1 << 16)
def match_end(pattern: str, text: str) -> bool:
    """Whether PEFT takes a key of a pattern to mean a module: as its name, or the end of it.

    Raises:
        PatternError: as :func:`fullmatch`.
    """
    whole = rf"(.*\.)?({pattern})$"
    # Without a repetition or a choice there is one way through it, and of these there may be thousands.
    if len(pattern) <= _MOST_LETTERS and PLAIN.fullmatch(pattern):
        return _compiled(whole).match(text) is not None
    return bool(_ends(whole, text))


def _ends(pattern: str, text: str) -> set[int]:
    try:
        return _Walk(text).ends(_parsed(pattern), {0})
    except RecursionError as error:
        raise PatternError("it is nested too deep") from error


@lru_cache(maxsize=8192)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@lru_cache(maxsize=8192)
def _parsed(pattern: str) -> Any:
    if len(pattern) > _MOST_LETTERS:
        raise PatternError(f"it has {len(pattern)} letters")
    try:
        # Compiled as well, since the parser alone lets lookbehinds of no fixed width pass.
        re.compile(pattern)
        return parser.parse(pattern)
    except RecursionError as error:
        raise PatternError("it is nested too deep") from error
    except (re.error, OverflowError, ValueError) as error:
        raise PatternError(f"it is no regular expression: {error}") from error


class _Walk:
    """Where parts of a pattern can end in one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._steps = 0

    def ends(self, tree: Any, starts: set[int], flags: int | None = None) -> set[int]:
        """The places where a match of the tree can end that begins at one of ``starts``."""
        flags = tree.state.flags if flags is None else flags
        for op, argument in tree:
            if not starts:
                break
            self._steps += len(starts) + 1
            if self._steps > _MOST_STEPS:
                raise PatternError("it takes too long on a name of this length; write it simpler")
            starts = self._step(str(op), argument, starts, flags)
        return starts

    def _step(self, op: str, argument: Any, starts: set[int], flags: int) -> set[int]:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            fits = _single(op, argument, flags)
            size = len(self._text)
            return {place + 1 for place in starts if place < size and fits(self._text[place])}
        if op == "BRANCH":
            return set().union(*(self.ends(tree, starts, flags) for tree in argument[1]))
        if op == "SUBPATTERN":
            _, added, taken, tree = argument
            return self.ends(tree, starts, _known(flags | added) & ~taken)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, tree = argument
            return self._repeated(int(least), int(most), tree, starts, flags)
        if op == "AT":
            return {place for place in starts if self._at(str(argument), place)}
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, tree = argument
            there = {p for p in starts if self._asserted(direction, tree, p, flags)}
            return there if op == "ASSERT" else starts - there
        raise PatternError(f"it has {op.lower()}, which is not supported here")

    def _repeated(self, least: int, most: int, tree: Any, starts: set[int], flags: int) -> set[int]:
        for _ in range(least):
            further = self.ends(tree, starts, flags)
            # Places only grow, so that after at most a text's length nothing changes any more.
            if further == starts:
                break
            starts = further
        reached = new = starts
        for _ in range(most - least):
            new = self.ends(tree, new, flags) - reached
            if not new:
                break
            reached = reached | new
        return reached

    def _asserted(self, direction: int, tree: Any, place: int, flags: int) -> bool:
        if direction > 0:
            return bool(self.ends(tree, {place}, flags))
        return any(place in self.ends(tree, {begin}, flags) for begin in range(place + 1))

    def _at(self, what: str, place: int) -> bool:
        size = len(self._text)
        if what in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return place == 0
        if what == "AT_END_STRING":
            return place == size
        if what == "AT_END":
            return place == size or (place == size - 1 and self._text[place] == "\n")
        if not size:
            # Since Python 3.14 nothing is no boundary.
            return what == "AT_NON_BOUNDARY" and re.match(r"\B", "") is not None
        word = _CATEGORIES["WORD"]
        before = place > 0 and word(self._text[place - 1])
        after = place < size and word(self._text[place])
        return (before != after) == (what == "AT_BOUNDARY")


def _known(flags: int) -> int:
    if flags & ~(re.UNICODE | re.IGNORECASE | re.DOTALL):
        raise PatternError("it has flags other than i and s, which are not supported here")
    return flags


def _single(op: str, argument: Any, flags: int) -> Callable[[str], bool]:
    """Whether one character fits."""
    _known(flags)
    if op == "ANY":
        return lambda c: bool(flags & re.DOTALL) or c != "\n"
    if op == "IN":
        items = [(str(kind), value) for kind, value in argument]
    else:
        items = [("LITERAL", argument)]
    negated = op == "NOT_LITERAL" or items[0][0] == "NEGATE"

    def fits(character: str) -> bool:
        forms = {character}
        if flags & re.IGNORECASE:
            forms |= {character.lower(), character.upper()}
        return any(_among(items, form) for form in forms) != negated

    return fits


def _among(items: Iterable[tuple[str, Any]], character: str) -> bool:
    for kind, value in items:
        if kind == "LITERAL" and len(character) == 1 and ord(character) == value:
            return True
        if kind == "RANGE" and len(character) == 1 and value[0] <= ord(character) <= value[1]:
            return True
        if kind == "CATEGORY":
            name = str(value).removeprefix("CATEGORY_")
            if _CATEGORIES[name.removeprefix("NOT_")](character) != name.startswith("NOT_"):
                return True
    return False
