"""How messages and tables put what they say into words."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(names: Iterable[object], most: int = 5) -> str:
    """``a, b, c and 7 more``: the first names of many; ``none`` of none."""
    listed = [str(name) for name in names]
    left = len(listed) - most
    return (", ".join(listed[:most]) or "none") + (f" and {left} more" if left > 0 else "")


def count_of(count: int, what: str) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
