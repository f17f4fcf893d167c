"""Regular expressions of foreign configs, matched in bounded time.

PEFT gives the patterns of a config to ``re``, which backtracks: ``(a+)+b`` takes longer than anyone waits
for thirty letters. Here a pattern's own parse tree is followed with the set of all places that it can
have reached, as Thompson did (Communications of the ACM 11(6), 1968), so that no way is tried twice. Only
whether a text matches is answered, and for that greedy and lazy are one; it is ``re``'s answer. Where the
tree says that there are few ways, as in nearly all that are in use, ``re`` is asked itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeAlias

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

_MOST_STEPS = 100_000
"""Places looked at in one text; a pattern of a kind that is in use takes some thousands."""
PLAIN = re.compile(r"[\w.-]+", re.ASCII)
"""A pattern that is a name."""
_MOST_LETTERS = 1 << 18
# The same for all names of an adapter; the 46,000 of a model with 256 experts in 61 layers take a third.
_MOST_WORK = 60_000_000
_STEPS_A_LETTER = 20
# ``re`` itself is let go so many ways, which it does hundreds of in the time of one step here.
_FEW_WAYS = 100_000
_WAYS_A_STEP = 100
_Spans: TypeAlias = tuple[tuple[int, int], ...]
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda c: c.isalnum() or c == "_",
}


class PatternError(ValueError):
    """Why a pattern cannot be matched."""


class Work:
    """What the patterns of one adapter may take for all of its names together."""

    def __init__(self) -> None:
        self._left = _MOST_WORK

    def spend(self, steps: int) -> None:
        """Raise PatternError once that is too much."""
        self._left -= steps
        if self._left < 0:
            raise PatternError("it takes too long on so many names; write it simpler")


def fullmatch(pattern: str, text: str, work: Work | None = None) -> bool:
    """Whether ``re.fullmatch`` finds the pattern to be all of the text.

    Args:
        work: is charged with what it takes.

    Raises:
        PatternError: it is no regular expression, asks for what is not done here (groups that are
            referred to, atomic ones, flags but ``i`` and ``s``), or for too much work.
    """
    found, steps = _matches(pattern, text, True)
    if work is not None:
        work.spend(steps)
    return found


class EndPatterns:
    """Keys of ``rank_pattern`` and the like: PEFT's rule for which of them means a module.

    That is the first which is the module's name, or the end of it, as a regular expression. Exports name
    thousands of modules each by its own key, so plain names are looked up and not tried in turn.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = list(keys)
        self._found: dict[str, str | None] = {}
        self._work = Work()
        # Whether only all of a name will do ("^..."), length -> where letters are, since a dot stands for
        # any character -> letters -> the key's place.
        self._plain: dict[tuple[bool, int], dict[_Spans, dict[str, int]]] = {}
        self._others: list[int] = []
        for place, key in enumerate(self._keys):
            plain = key.removeprefix("^")
            if len(plain) <= _MOST_LETTERS and PLAIN.fullmatch(plain):
                alike = self._plain.setdefault((plain != key, len(plain)), {})
                alike.setdefault(_spans(plain), {}).setdefault(plain.replace(".", ""), place)
            else:
                self._others.append(place)

    def first(self, name: str) -> str | None:
        """The key that means a module; None if none does.

        Raises:
            PatternError: a key is no pattern, as for :func:`fullmatch`; says which.
        """
        if name not in self._found:
            place = min(self._places(name), default=None)
            self._found[name] = None if place is None else self._keys[place]
        return self._found[name]

    def check(self) -> None:
        """Raise PatternError if a key is no pattern."""
        for place in self._others:
            # What compiling takes.
            self._work.spend(_STEPS_A_LETTER * len(self._keys[place]))
            self._means(place, "")

    def _places(self, name: str) -> Iterator[int]:
        """Where keys stand that mean a module, the first among them."""
        first = len(self._keys)
        # Before a line's end ``$`` matches as well, and a dot does not match one.
        for place in self._looked_up(name) if "\n" not in name else ():
            first = min(first, place)
            yield place
        tried = self._others if "\n" not in name else range(len(self._keys))
        for place in tried:
            if place > first:
                return
            if self._means(place, name):
                yield place
                return

    def _looked_up(self, name: str) -> Iterator[int]:
        starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        for whole, start in [(True, 0), *((False, start) for start in starts)]:
            alike = self._plain.get((whole, len(name) - start), {})
            self._work.spend(len(alike) + 1)
            end = name[start:]
            for spans, keys in alike.items():
                place = keys.get("".join([end[a:b] for a, b in spans]))
                if place is not None:
                    yield place

    def _means(self, place: int, name: str) -> bool:
        key = self._keys[place]
        try:
            found, steps = _matches(rf"(.*\.)?({key})$", name, False)
            self._work.spend(steps)
        except PatternError as error:
            raise PatternError(f"{key!r:.200}: {error}") from error
        return found


def _spans(key: str) -> _Spans:
    """Where the letters between the dots of a name are."""
    found, start = [], 0
    for part in key.split("."):
        if part:
            found.append((start, start + len(part)))
        start += len(part) + 1
    return tuple(found)


@lru_cache(maxsize=1 << 16)
def _matches(pattern: str, text: str, whole: bool) -> tuple[bool, int]:
    """Whether a pattern matches all of a text, or its beginning, and the steps that took."""
    try:
        tree, compiled = _parsed(pattern)
        ways = _ways_of(pattern, len(text))
        if ways <= _FEW_WAYS:
            match = compiled.fullmatch if whole else compiled.match
            return match(text) is not None, 1 + ways // _WAYS_A_STEP
        walk = _Walk(text)
        ends = walk.ends(tree, {0})
        return len(text) in ends if whole else bool(ends), walk.steps
    except RecursionError as error:
        raise PatternError("it is nested too deep") from error


@lru_cache(maxsize=8192)
def _parsed(pattern: str) -> tuple[Any, re.Pattern[str]]:
    if len(pattern) > _MOST_LETTERS:
        raise PatternError(f"it has {len(pattern)} letters")
    try:
        # Compiled as well, since the parser alone lets lookbehinds of no fixed width pass.
        return parser.parse(pattern), re.compile(pattern)
    except RecursionError as error:
        raise PatternError("it is nested too deep") from error
    except (re.error, OverflowError, ValueError) as error:
        raise PatternError(f"it is no regular expression: {error}") from error


@lru_cache(maxsize=1 << 16)
def _ways_of(pattern: str, size: int) -> int:
    """As :func:`_ways`, of a pattern."""
    tree = _parsed(pattern)[0]
    return _ways(tree, size) if not tree.state.flags & ~re.UNICODE else _FEW_WAYS + 1


def _ways(tree: Any, size: int) -> int:
    """At most so many ways ``re`` tries on a text of this length; more than few if not known."""
    ways = 1
    for op, argument in tree:
        name = str(op)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            continue
        if name == "BRANCH":
            ways *= sum(_ways(inner, size) for inner in argument[1])
        elif name == "SUBPATTERN" and not argument[1] and not argument[2]:
            ways *= _ways(argument[3], size)
        elif name in ("ASSERT", "ASSERT_NOT"):
            ways *= _ways(argument[1], size)
        elif name in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] == 1:
            ways *= 1 + _ways(argument[2], size)
        elif (
            name in ("MAX_REPEAT", "MIN_REPEAT")
            and len(argument[2]) == 1
            and _is_single(argument[2][0])
        ):
            ways *= size + 1
        else:
            return _FEW_WAYS + 1
        if ways > _FEW_WAYS:
            return ways
    return ways


def _is_single(item: Any) -> bool:
    return str(item[0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN")


class _Walk:
    """Where parts of a pattern can end in one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.steps = 0

    def ends(self, tree: Any, starts: set[int], flags: int | None = None) -> set[int]:
        """The places where a match of the tree can end that begins at one of ``starts``."""
        flags = tree.state.flags if flags is None else flags
        for op, argument in tree:
            if not starts:
                break
            self.steps += len(starts) + 1
            if self.steps > _MOST_STEPS:
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
