"""What lies beside a checkpoint's weights and stays when a new one takes its place."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from vllm_vlora.checkpoint.aliases import keep_aliases
from vllm_vlora.checkpoint.router_files import keep_router


def keep_beside(old: Path, new: Path, tasks: Container[str]) -> None:
    """Write the aliases and the router of a checkpoint, if ``old`` is one, into the folder that takes its
    place.

    Raises:
        OutputError: an alias does not fit the new one's tasks. CheckpointError: one of them is damaged.
    """
    keep_aliases(old, new, tasks)
    keep_router(old, new)
