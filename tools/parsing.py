"""How a command is called: its help, and what is said of a call that cannot be parsed.

Help is plain text, as click formats it: typer's tables give an option's name, its short form, its type
and its description a column each, and cut what then does not fit into 80 columns, options' names too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

SETTINGS = {"help_option_names": ["-h", "--help"]}
# The lines of a paragraph that starts with this mark stay as they are, to be copied.
_AS_IT_IS = "\b\n"


class _Explained:
    """What a command and a group of commands have in common."""

    help: str | None

    def __init__(self, *args: Any, help: str | None = None, **more: Any) -> None:
        text = re.sub(r"^(?=Examples?:$)", _AS_IT_IS, help or "", flags=re.MULTILINE)
        super().__init__(*args, help=text, **more)  # type: ignore[call-arg]

    def get_short_help_str(self, limit: int = 0) -> str:
        """What a list of commands says of it: the first paragraph, however long."""
        return " ".join((self.help or "").partition("\n\n")[0].split())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _in_our_words():
            return super().parse_args(ctx, args)  # type: ignore[misc]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Lists arguments, without Python's names of their types, and options."""
        for kind in ("argument", "option"):
            params = [p for p in self.get_params(ctx) if p.param_type_name == kind]  # type: ignore[attr-defined]
            rows = [row for row in (param.get_help_record(ctx) for param in params) if row]
            if kind == "argument":
                rows = [(re.sub(r" <[^>]*>$", "", name), said) for name, said in rows]
            if rows:
                with formatter.section(f"{kind}s".capitalize()):
                    formatter.write_dl(rows)


class Command(_Explained, TyperCommand):
    """A command whose examples can be copied out of its help."""


class Group(_Explained, TyperGroup):
    """Commands, listed under the titles that they were registered with."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        titles: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            rows = titles.setdefault(command.rich_help_panel or "Commands", [])
            rows.append((name, command.get_short_help_str()))
        for title, rows in titles.items():
            with formatter.section(title):
                formatter.write_dl(rows)


@contextmanager
def _in_our_words() -> Iterator[None]:
    """Newer versions of typer have values checked by pydantic, whose words are of Python's types."""
    try:
        yield
    except typer.BadParameter as error:
        problems = getattr(error.__cause__, "errors", None)
        wanted = getattr(error.param, "type_descriptor", None)
        if problems is None or wanted is None:
            raise
        said = f"{problems()[0]['input']!r} is not {_allowed(wanted)}"
        raise typer.BadParameter(said, ctx=error.ctx, param=error.param) from error


def _allowed(wanted: Any) -> str:
    """What an option of typer's ``TypeDescriptor`` takes."""
    if wanted.choices:
        return "one of " + ", ".join(str(choice.value) for choice in wanted.choices)
    if wanted.annotation is bool:
        return "one of 1, 0, true, false"
    kind = "a whole number" if wanted.annotation is int else "a number"
    low, high = wanted.parameter_info.min, wanted.parameter_info.max
    if low is None:
        return kind if high is None else f"{kind} of at most {high:g}"
    return f"{kind} of at least {low:g}" if high is None else f"{kind} from {low:g} to {high:g}"
