"""Find an adapter or a checkpoint: a local folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vllm_vlora.errors import VLoRAError

# The Hub's own rule for a name is checked by huggingface_hub; this only tells an id from a path.
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)


def resolve_snapshot(
    ref: str | Path,
    *,
    what: str,
    error: type[VLoRAError],
    allow_patterns: list[str] | None = None,
) -> Path:
    """Return the local folder that ``ref`` names, downloading it from the Hub where needed.

    An existing folder wins. Otherwise ``org/name`` or ``org/name@revision`` is a Hub id and is
    fetched into huggingface_hub's cache (its environment variables apply: ``HF_HOME``,
    ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``).

    Args:
        what: the thing sought, for messages ("adapter").
        error: the class of error to raise.
        allow_patterns: the files to download, as glob patterns; all when None.

    Raises:
        VLoRAError: of class ``error``, one line: no such folder or repository, no access, offline.
    """
    path = _existing_folder(ref)
    if path is not None:
        return path
    if os.path.isfile(ref):
        raise error(f"{what} {os.fspath(ref)!r} is a file; give the folder that holds it")
    match = _HUB_ID.fullmatch(str(ref))
    if match is None:
        raise error(
            f"{what} {os.fspath(ref)!r}: no such folder, and not a Hub id of the form org/name"
        )
    try:
        folder = huggingface_hub.snapshot_download(
            match["repo"], revision=match["revision"], allow_patterns=allow_patterns
        )
    # The transport's errors differ between versions of huggingface_hub (requests, httpx), and a
    # failed download of any kind is the same to the user.
    except Exception as problem:
        raise error(f"{what} {os.fspath(ref)!r}: no such folder; {_explain(problem)}") from problem
    return Path(folder).absolute()


def ref_name(ref: str | Path) -> str:
    """Return the last part of a folder's path or of a Hub id, without a revision.

    A snapshot's own folder is named by its commit, so the name is taken from what the user wrote.
    """
    folder = _existing_folder(ref)
    match = _HUB_ID.fullmatch(str(ref))
    if folder is None and match is not None:
        return match["repo"].rpartition("/")[2]
    return (folder or Path(ref)).name


def _existing_folder(ref: str | Path) -> Path | None:
    path = os.path.expanduser(ref)
    # os.path.isdir says no to a name the system cannot hold; Path.is_dir would raise.
    if not os.path.isdir(path):
        return None
    # A link keeps the name the user wrote; only ".." needs the links resolved to be right.
    return Path(path).resolve() if ".." in Path(path).parts else Path(path).absolute()


def _explain(problem: Exception) -> str:
    if isinstance(problem, GatedRepoError):
        return "the Hub repository is gated: accept its terms on its page and set HF_TOKEN"
    if isinstance(problem, RepositoryNotFoundError):
        return (
            "the Hub has no such repository, or it is private: check the spelling or set HF_TOKEN"
        )
    if isinstance(problem, RevisionNotFoundError):
        return "the Hub repository has no such revision: check the part after '@'"
    if isinstance(problem, HFValidationError):
        return f"not a valid Hub id: {_first_line(problem)}"
    if isinstance(problem, LocalEntryNotFoundError):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return "not in the local Hub cache either, and HF_HUB_OFFLINE is set: unset it"
        return "not in the local Hub cache, and the Hub cannot be reached: check the network"
    if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
        return "the disk of the Hub cache is full: free space or point HF_HOME elsewhere"
    return f"downloading it from the Hub failed: {_first_line(problem)}"


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__
