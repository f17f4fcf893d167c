"""Symbolic links in a folder that somebody else made must not lead out of it.

A checkpoint or an adapter that was received may hold a link to any file of the receiver's, and what
copies or uploads the folder would hand that file on.
"""

from __future__ import annotations

import os
from pathlib import Path

from vllm_vlora.errors import VLoRAError


def refuse_link_out(path: Path, folder: Path, error: type[VLoRAError]) -> None:
    """Raise ``error`` if a file of ``folder`` is, or lies behind, a link to something outside of it.

    A snapshot in the Hub's cache consists of links to the ``blobs`` of its repository, which is
    therefore the folder that counts there. A link to nothing is left to whoever opens it.

    Args:
        path: ``folder/...``. folder: may itself be a link, whose target then counts.
    """
    if not os.path.lexists(path):
        return
    target, home = os.path.realpath(path), _home(os.path.realpath(folder))
    if os.path.exists(target) and os.path.commonpath([target, home]) != home:
        raise error(
            f"{path} is a link out of its folder, which could hand on any file of this machine; put "
            "a copy of what it points to in its place, if that belongs there"
        )


def _home(folder: str) -> str:
    """The repository's folder, ``models--org--name``, of a snapshot in the Hub's cache."""
    parts = Path(folder).parts
    for place in range(len(parts) - 2, 0, -1):
        if parts[place].startswith("models--") and parts[place + 1] == "snapshots":
            return str(Path(*parts[: place + 1]))
    return folder
