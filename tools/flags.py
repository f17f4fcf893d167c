"""Commands that take many options, as functions of one object."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

Flags = TypeVar("Flags")


def takes(flags: type[Flags]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Turn a function of one ``flags`` into a command with a parameter for each of its fields.

    Args:
        flags: a dataclass whose fields are annotated as typer wants parameters, all with defaults.
    """

    def decorate(command: Callable[[Flags], None]) -> Callable[..., None]:
        hints = get_type_hints(flags, include_extras=True)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(flags(**given))

        parameters = []
        for field in fields(flags):  # type: ignore[arg-type]
            assert field.default is not MISSING, f"{field.name} has no default"
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=hints[field.name],
                )
            )
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate
