"""What is compared: our representations with options, and the seed libraries."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_vlora import CompressOptions
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.errors import OptionError

SEEDS = {
    "vlora-dev": {"library": "vlora-dev", "nf4": False},
    "vlora-dev-nf4": {"library": "vlora-dev", "nf4": True},
    "lorashare": {"library": "lorashare", "nf4": False},
}
EXPAND = "expand"
"""An option of adding, not of compressing: bases may grow for the new tasks."""
CALIBRATION = "@calibration"
"""Stands in an option for a calibration on the collection's own text."""


@dataclass(frozen=True)
class Method:
    """A line of the plot.

    Attributes:
        label: as it was asked for: ``joint``, ``joint:quantize=nf4``, ``lorashare``.
        representation: of ours, or the name of a seed.
        options: further fields of ``CompressOptions``; empty for a seed.
        expand: whether bases grow when tasks are added.
    """

    label: str
    representation: str
    options: tuple[tuple[str, Any], ...] = ()
    expand: bool = False

    @property
    def is_seed(self) -> bool:
        """Whether a seed library does it."""
        return self.representation in SEEDS

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs a calibration."""
        return any(value == CALIBRATION for _, value in self.options)

    def compress_options(self, ratio: float, calibration: Path | None) -> CompressOptions:
        """Options of ``compress`` for a ratio; ``calibration`` is the folder, where one is needed."""
        return CompressOptions(
            representation=self.representation, ratio=ratio, **self._resolved(calibration)
        )

    def add_options(self, ratio: float, calibration: Path | None) -> AddOptions:
        """Options of ``add`` for a ratio: a new task may take what the others took."""
        known = {field.name for field in fields(AddOptions)}
        options = self._resolved(calibration)
        return AddOptions(ratio=ratio, **{name: options[name] for name in known & options.keys()})

    def _resolved(self, calibration: Path | None) -> dict[str, Any]:
        return {
            name: str(calibration) if value == CALIBRATION else value
            for name, value in self.options
        }


def parse_method(text: str) -> Method:
    """``NAME`` or ``NAME:option=value,option=value``.

    Raises:
        OptionError: no such representation, seed or option.
    """
    name, _, rest = text.partition(":")
    options = tuple(_parse_option(text, part) for part in rest.split(",") if part)
    if name in SEEDS:
        if options:
            raise OptionError(f"{text}: a seed library takes no options here; leave them out")
        return Method(text, name)
    expand = dict(options).get(EXPAND, False)
    method = Method(text, name, tuple(pair for pair in options if pair[0] != EXPAND), expand)
    # Built once for its checks: a run of an hour should not end at a typing error.
    method.compress_options(4.0, Path("calibration"))
    return method


def _parse_option(text: str, part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    known = {field.name for field in fields(CompressOptions)} - {"representation", "ratio"} | {
        EXPAND
    }
    if not equals or name not in known:
        raise OptionError(f"{text}: unknown option {part!r}; use NAME=VALUE with {sorted(known)}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
