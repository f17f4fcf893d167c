"""How much an attack of ``tests/attacks`` tries."""

from __future__ import annotations

import os


def scaled(count: int) -> int:
    """That many, times ``VLORA_ATTACK_SCALE`` (a number above 0, by default 1), at least one."""
    return max(1, int(count * float(os.environ.get("VLORA_ATTACK_SCALE", "1"))))
