"""Tests with several servers at once: asked for, as they keep a small machine busy for minutes."""

from __future__ import annotations

import os

import pytest

SEVERAL_SERVERS = pytest.mark.skipif(
    "VLORA_SEVERAL_SERVERS" not in os.environ, reason="set VLORA_SEVERAL_SERVERS=1"
)
