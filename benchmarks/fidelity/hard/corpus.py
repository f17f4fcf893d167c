"""Real text that is everywhere: docstrings and functions of Python, of installed packages, READMEs."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

SHORTEST, LONGEST = 120, 420
_LIBRARY = Path(sysconfig.get_path("stdlib"))
# Their versions are pinned; what is written in them is of several kinds.
PACKAGES = ("numpy", "networkx", "matplotlib", "nltk", "huggingface_hub", "peft", "hypothesis",
            "setuptools")  # fmt: skip
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip"}


@dataclass(frozen=True)
class Passage:
    """A piece of text, and what it is from: a module or package."""

    text: str
    source: str

    @property
    def part(self) -> str:
        """What it is used for; the same on every machine, and no text has two uses."""
        number = hashlib.sha256(self.text.encode()).digest()[0]
        return "base" if number < 128 else "train" if number < 218 else "held out"


@cache
def prose() -> tuple[Passage, ...]:
    """Docstrings of Python's library, and paragraphs of the installed packages' READMEs."""
    return _distinct([*_docstrings(), *_readmes()])


@cache
def code() -> tuple[Passage, ...]:
    """Functions of Python's library, without what stands around them."""
    return _distinct(
        Passage(_cut(found), source)
        for source, text, tree in _modules(_LIBRARY, "**/*.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for found in [_function(text, node)]
        if len(found) >= SHORTEST
    )


@cache
def manuals() -> tuple[Passage, ...]:
    """Docstrings of packages that the environment has."""
    folder = Path(sysconfig.get_path("purelib"))
    return _distinct(
        passage for name in PACKAGES for passage in _docstrings(folder, f"{name}/**/*.py")
    )


def _distinct(passages: Iterator[Passage] | list[Passage]) -> tuple[Passage, ...]:
    return tuple({passage.text: passage for passage in passages}.values())


def _cut(text: str) -> str:
    """At the end of a line, so that no passage ends within a word."""
    if len(text) <= LONGEST:
        return text
    kept = text[:LONGEST].rpartition("\n")[0]
    return kept if len(kept) >= SHORTEST else text[:LONGEST]


def _modules(folder: Path, pattern: str) -> Iterator[tuple[str, str, ast.Module]]:
    for path in sorted(folder.glob(pattern)):
        parts = path.relative_to(folder).parts
        if _LEFT_OUT & set(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            yield parts[0].removesuffix(".py"), text, ast.parse(text)
        # Files that are broken on purpose, for tests.
        except (UnicodeDecodeError, SyntaxError):
            continue


def _docstrings(folder: Path = _LIBRARY, pattern: str = "**/*.py") -> Iterator[Passage]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source, _, tree in _modules(folder, pattern):
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) >= SHORTEST:
                yield Passage(_cut(text), source)


def _readmes() -> Iterator[Passage]:
    found = {dist.metadata["Name"].lower(): dist for dist in distributions()}
    for _, dist in sorted(found.items()):
        text = str(dist.metadata.get("Description") or dist.metadata.get_payload() or "")
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph) >= SHORTEST and paragraph.isprintable() is not None:
                yield Passage(_cut(paragraph.strip()), "readme")


def _function(text: str, node: ast.FunctionDef) -> str:
    # Not splitlines: sources hold form feeds.
    lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] if not line[:margin].strip() else line for line in lines)
