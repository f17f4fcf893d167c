"""What all attacks share: which of them run, and what is said of them at the end.

The short forms belong to every run. The long ones, marked ``attacks_long``, run where ``-m`` names that
mark, as in ``make attack``. ``attacking.scaled`` says how much they try.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import pytest

LONG = "attacks_long"
Tally: TypeAlias = Callable[[str, int], None]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if LONG in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker(LONG)]
    items[:] = [item for item in items if item not in long]
    if long:
        config.hook.pytest_deselected(items=long)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """``tally(what was attacked, inputs)`` at a test's end, for the report that a long run ends with."""
    began = time.monotonic()

    def note(what: str, inputs: int) -> None:
        if request.node.get_closest_marker(LONG):
            seconds = time.monotonic() - began
            line = f"attacked {what}: {inputs:,} inputs, {seconds:.0f} s"
            request.node.user_properties.append(("shown", line))

    return note
