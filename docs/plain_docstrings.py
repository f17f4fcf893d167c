"""Griffe extension: docstrings as this package writes them, turned into what Markdown shows well.

* Roles such as ``:class:`Checkpoint``` become code.
* Examples under ``Example:``, or under nothing, get the heading that makes them code.
* ``As :func:`compress`.`` among the errors of ``Raises:`` gets a name, and instead of ``Args:`` becomes a
  sentence; entries of ``Args:`` that stand for several (``output, force: ...``) become one for each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([^`]+)`")
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields|Examples?):$")
_SEVERAL_NAMES = re.compile(r"^ {4}(\*{0,2}\w+(?:, \w+)+): (.*)$")
# Two on one line: "rank: of the result. space: as above."
_NEXT_ARGUMENT = re.compile(r"(?<=[.;]) (?=\w+: )")
_NEXT_ERROR = re.compile(r"(?<=[.;]) (?=\w+Error: )")


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring once, before it is parsed."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:
        """Called for every object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value, _parameters(obj))


def _parameters(obj: griffe.Object) -> set[str]:
    """Names that an entry of ``Args:`` or ``Attributes:`` may have."""
    if isinstance(obj, griffe.Class):
        init = obj.members.get("__init__")
        own = _parameters(init) if isinstance(init, griffe.Function) else set()
        return own | set(obj.members)
    return {p.name for p in obj.parameters} if isinstance(obj, griffe.Function) else set()


def rewrite(text: str, parameters: set[str]) -> str:
    """One docstring, without its indentation."""
    lines: list[str] = []
    section = ""
    for line in _ROLE.sub(r"`\1`", text).splitlines():
        before, section = section, _section_of(line, section)
        if section == "Bare":
            if before != "Bare":
                lines += ["", "Examples:"]
            lines.append(f"    {line}")
        elif line == "Example:":
            lines.append("Examples:")
        elif section == "Args" and line.startswith("    As "):
            lines[-1] = f"Arguments as {line[7:]}"
        elif section in ("Args", "Attributes"):
            lines += _split(_SEVERAL_NAMES, _NEXT_ARGUMENT, line, parameters)
        elif section == "Raises":
            line = re.sub("^    As ", "    VLoRAError: as ", line)
            lines += _split(None, _NEXT_ERROR, line, parameters)
        else:
            lines.append(line)
    return "\n".join(lines)


def _section_of(line: str, section: str) -> str:
    """The section that a line stands in; "Bare" for a doctest under no heading, "" for plain text."""
    heading = _SECTION.match(line)
    if heading:
        return heading[1]
    if section == "Bare":
        return section if line else ""
    if line.startswith(">>>"):
        return "Bare"
    return "" if line and not line.startswith(" ") else section


def _split(
    several: re.Pattern[str] | None, following: re.Pattern[str], line: str, parameters: set[str]
) -> list[str]:
    """An entry of a section as one line for each name that it describes."""
    named = several.match(line) if several else None
    if named:
        return [f"    {name}: {named[2]}" for name in named[1].split(", ")]
    for cut in following.finditer(line):
        name = line[cut.end() :].split(":", 1)[0]
        if name in parameters or name.endswith("Error"):
            rest = _split(several, following, f"    {line[cut.end() :]}", parameters)
            return [line[: cut.start()], *rest]
    return [line]
