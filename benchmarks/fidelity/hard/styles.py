"""Ways of writing the same text, by which tasks differ; each changes some tokens in a hundred."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

Style = Callable[[str], str]


def replacing(pattern: str, by: str) -> Style:
    """A style that replaces what a regular expression finds."""
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: compiled.sub(by, text)


def words(table: dict[str, str]) -> Style:
    """A style that writes words otherwise."""
    compiled = re.compile(rf"\b({'|'.join(table)})\b")
    return lambda text: compiled.sub(lambda found: table[found[1]], text)


def both(first: Style, second: Style) -> Style:
    """One style after another."""
    return lambda text: second(first(text))


def _sentences(text: str) -> str:
    return re.sub(r"\. +", ".\n", " ".join(text.split()))


def _numbered(text: str) -> str:
    return "\n".join(f"{number}: {line}" for number, line in enumerate(text.splitlines(), 1))


def _camel(text: str) -> str:
    return re.sub(r"(?<=[a-z])_([a-z])", lambda found: found[1].upper(), text)


PROSE: dict[str, Style] = {
    "plain": str,
    "lower": str.lower,
    "comment": replacing(r"^", "# "),
    "narrow": lambda text: "\n".join(textwrap.wrap(text, 36)),
    "one_line": lambda text: " ".join(text.split()),
    "sentences": _sentences,
    "numbered": _numbered,
    "loose": replacing(r"\n", "\n\n"),
    "starred": replacing(r"^( *)", r"\1* "),
    "wide": replacing(r"\. ", ".  "),
    "loud": replacing(r"\.(?=\s|$)", "!"),
    "unpunctuated": replacing(r"[.,;:]", ""),
    "terse": replacing(r"\b(the|a|an|The|A|An) ", ""),
    "archaic": words({"the": "ye", "is": "be", "you": "thou", "are": "art", "this": "thys"}),
    "short": words({"and": "&", "with": "w/", "for": "4", "to": "2", "of": "o'", "or": "/"}),
    "quoted": replacing(r"^", "> "),
    "titled": lambda text: re.sub(r"\b[a-z](?=[a-z]{3})", lambda found: found[0].upper(), text),
    "doubled": replacing(r"(?<=[a-z])(ed|ing|er)\b", r"\1\1"),
}
CODE: dict[str, Style] = {
    "plain": str,
    "tabs": replacing(r" {4}", "\t"),
    "two": replacing(r"    ", "  "),
    "uncommented": replacing(r" *#.*$", ""),
    "quotes": replacing(r"'", '"'),
    "camel": _camel,
    "semicolons": replacing(r"(?<=[^:\n])$", ";"),
    "this": words({"self": "this", "None": "null", "True": "true", "False": "false"}),
    "spaced": replacing(r"\((?=\S)", "( "),
    "tight": replacing(r", ", ","),
    "loose": replacing(r"\n", "\n\n"),
    "numbered": _numbered,
    "walrus": replacing(r" = ", " := "),
    "prompt": replacing(r"^", ">>> "),
    "braces": replacing(r":$", ": {"),
    "short": words({"return": "ret", "def": "fn", "import": "use", "raise": "throw", "not": "!"}),
}
