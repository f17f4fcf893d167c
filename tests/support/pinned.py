"""Checkpoints whose bytes are pinned under ``tests/data``."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_vlora.checkpoint.manifest import CONFIG_FILE


def assert_same_but_for_program(written: Path, pinned: Path) -> None:
    """Two checkpoints are the same byte for byte, but for the version of the program in the manifest."""
    files = sorted(p.relative_to(pinned) for p in pinned.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    for file in files:
        if file.name == CONFIG_FILE:
            old, new = (json.loads((folder / file).read_text()) for folder in (pinned, written))
            assert old.pop("created_by").startswith("vllm-vlora ")
            del new["created_by"]
            assert old == new
        else:
            assert (written / file).read_bytes() == (pinned / file).read_bytes(), file
