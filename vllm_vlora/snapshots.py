"""Find an adapter, a checkpoint or a model: a folder, a repository on the Hugging Face Hub, or a URL.

A checkpoint at a URL is found by ``checkpoint.sources``, which knows what its manifest says.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vllm_vlora.connections import why_unreachable
from vllm_vlora.downloads import fetch_folder, means_cache
from vllm_vlora.errors import VLoRAError
from vllm_vlora.regular_files import read_regular
from vllm_vlora.urls import RemoteError, is_remote, local_folder, url_name
from vllm_vlora.wording import first_line, without_secrets

# The Hub's own rule for a name is checked by huggingface_hub; this only tells an id from a path.
_HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<inner>(?:/[\w-][\w.-]*)*)(?:@(?P<revision>[^@\s]+))?",
    re.ASCII,
)
# Seconds in which the Hub answers whether it has a model.
_PATIENCE = 10.0
_COMMIT = re.compile("[0-9a-f]{40}")
# A repository's folder in the Hub's cache, with snapshots/COMMIT below.
_CACHED = re.compile(r"models--(?:.+?--)?(?P<name>.+)")


def resolve_snapshot(
    ref: str | Path,
    *,
    what: str,
    error: type[VLoRAError],
    allow_patterns: list[str] | None = None,
    ignore_patterns: list[str] | None = None,
    required: str | None = None,
) -> Path:
    """Return the local folder that ``ref`` names, downloading it from the Hub or a URL where needed.

    An existing folder wins; of a repository's folder in the Hub's cache its snapshot is meant.
    Otherwise ``org/name``, ``org/name@revision`` or a folder in a repository, ``org/name/folder``, is
    a Hub id and is fetched into huggingface_hub's cache (its environment variables apply:
    ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``). A URL is fetched into a cache of our
    own (``downloads``); ``file://`` names a folder where it lies.

    Args:
        what: the thing sought, for messages ("adapter").
        error: the class of error to raise.
        allow_patterns: the files to download, as glob patterns; all when None. ignore_patterns: of a
            repository those not to; none when None.
        required: the file that a folder at a URL must have to be one; where it has none, what its
            sub-folders have is downloaded. Without it, and over HTTP, there are no sub-folders.

    Raises:
        VLoRAError: of class ``error``, one line: no such folder or repository, no access, offline.
        OutputError: the cache of what is at URLs cannot be written.
    """
    path = _existing_folder(ref)
    if path is not None:
        return cached_snapshot(path) or path
    if os.path.isfile(ref):
        raise error(f"{what} {os.fspath(ref)!r} is a file; give the folder that holds it")
    if is_remote(ref):
        return _fetched(str(ref), what, error, allow_patterns or ["*"], required)
    match = _hub_id(ref)
    if match is None:
        raise error(
            f"{what} {os.fspath(ref)!r}: no such folder, and not a Hub id of the form org/name or "
            "a URL"
        )
    inner = match["inner"].lstrip("/")
    if inner:
        allow_patterns = [f"{inner}/{pattern}" for pattern in allow_patterns or ["*"]]
        ignore_patterns = [f"{inner}/{pattern}" for pattern in ignore_patterns or []] or None
    given: Any = {"ignore_patterns": ignore_patterns} if ignore_patterns else {}
    if means_cache():
        given["local_files_only"] = True
    try:
        folder = huggingface_hub.snapshot_download(
            match["repo"],
            revision=match["revision"],
            allow_patterns=allow_patterns,
            **given,
        )
    # The transport's errors differ between versions of huggingface_hub (requests, httpx), and a
    # failed download of any kind is the same to the user.
    except Exception as problem:
        raise error(f"{what} {os.fspath(ref)!r}: no such folder; {_explain(problem)}") from problem
    found = Path(folder, inner).absolute()
    if not found.is_dir():
        raise error(f"{what} {os.fspath(ref)!r}: the Hub repository has no folder {inner} with one")
    return found


def _fetched(
    url: str, what: str, error: type[VLoRAError], patterns: list[str], required: str | None
) -> Path:
    try:
        return fetch_folder(url, patterns, required)
    except RemoteError as problem:
        raise error(f"{what} {without_secrets(url)!r}: {problem}") from None


def model_place(name: str, *, what: str, error: type[VLoRAError]) -> str:
    """What other libraries load a model by: its folder, or a Hub id that the Hub has now.

    They would ask the Hub five times for every file, with a line in the log each time. Here it is asked
    once; a model that it does not give and that its cache has is the folder there.

    Raises:
        VLoRAError: of class ``error``, one line: no such folder or repository, no access, offline.
    """
    folder = _existing_folder(name)
    if folder is not None:
        return str(cached_snapshot(folder) or folder)
    try:
        huggingface_hub.HfApi().model_info(name, timeout=_PATIENCE)
    except HFValidationError as problem:
        raise error(f"{what} {name!r}: no such folder, and not a Hub id, org/name") from problem
    except Exception as problem:
        cached = local_model(name)
        if cached is not None:
            return str(cached)
        raise error(f"{what} {name!r}: no such folder; {_explain(problem)}") from problem
    return name


def local_model(name: str) -> Path | None:
    """The folder of a model on this machine, also in the Hub's cache; None where it is not here.

    Nothing is downloaded.
    """
    folder = _existing_folder(name)
    if folder is None:
        try:
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        # Not a Hub id, or nothing of it in the cache: the errors differ between versions.
        except (ValueError, OSError):
            return None
    return folder if (folder / "config.json").is_file() and model_weights(folder) else None


def model_weights(folder: Path) -> list[Path]:
    """The files of a model's weights, in one of their forms."""
    return [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]


def cached_snapshot(folder: Path) -> Path | None:
    """The snapshot in a repository's folder of the Hub's cache, ``models--org--name``.

    That of the main branch, or the only one; None where it is no such folder, or has several others.
    """
    if not _CACHED.fullmatch(folder.name) or not os.path.isdir(folder / "snapshots"):
        return None
    main = folder / "refs" / "main"
    # os.path says no where a folder may not be read; Path would raise.
    if os.path.isfile(main):
        # A commit's name, and never a path that leads elsewhere.
        try:
            commit = read_regular(main, 1 << 10).decode("ascii", "replace").strip()
        except OSError:
            commit = ""
        snapshot = folder / "snapshots" / commit
        # The Hub's cache has links to files, and none to a commit's folder.
        plain = commit not in ("", ".", "..") and "/" not in commit and not os.path.islink(snapshot)
        if plain and os.path.isdir(snapshot):
            return snapshot
    try:
        children = [folder / "snapshots" / name for name in os.listdir(folder / "snapshots")]
    except OSError:
        # As a folder that holds none it is opened, or passed over, by those who say why.
        return None
    snapshots = [c for c in children if os.path.isdir(c) and not os.path.islink(c)]
    return snapshots[0] if len(snapshots) == 1 else None


def fixed_ref(ref: str | Path, snapshot: Path) -> str:
    """The reference that names what ``ref`` was resolved to, whatever its branch becomes.

    Args:
        snapshot: the folder that ``resolve_snapshot`` found. A Hub id gets its commit for a revision, a
            repository's folder in the Hub's cache becomes its snapshot, other folders stay as they are.
    """
    path = _existing_folder(ref)
    if path is not None:
        return str(ref) if path == snapshot else str(snapshot)
    match = _hub_id(ref)
    commit = next((p.name for p in (snapshot, *snapshot.parents) if _is_commit(p)), None)
    if match is None or commit is None:
        return str(ref)
    return f"{match['repo']}{match['inner']}@{commit}"


def repository_of(ref: str | Path, snapshot: Path) -> tuple[Path, str] | None:
    """What the Hub's cache has of the repository that ``ref`` is of, and its id; None for a folder.

    Args:
        snapshot: the folder that ``resolve_snapshot`` found.
    """
    match = None if _existing_folder(ref) is not None else _hub_id(ref)
    commit = next((p for p in (snapshot, *snapshot.parents) if _is_commit(p)), None)
    if match is None or commit is None:
        return None
    return commit.parent.parent.resolve(), match["repo"]


def fetch_file(repository: str, place: Path, name: str, error: type[VLoRAError]) -> None:
    """Fetch a file that a snapshot lacks, into it.

    Args:
        place: of the folder that is to have it, in the repository's folder in the cache: ``snapshots``,
            a commit, and folders in the repository. name: of the file in that folder.

    Raises:
        VLoRAError: of class ``error``, one line, as of ``resolve_snapshot``.
    """
    _, commit, *inner = place.parts
    try:
        huggingface_hub.hf_hub_download(repository, "/".join([*inner, name]), revision=commit)
    except Exception as problem:
        raise error(f"{name} of {repository!r}: {_explain(problem)}") from problem


def names_branch(ref: str | Path) -> bool:
    """Whether a reference is a Hub id of what may become another: no folder, and no commit."""
    match = _hub_id(ref)
    if match is None or _existing_folder(ref) is not None:
        return False
    return _COMMIT.fullmatch(match["revision"] or "") is None


def newest_ref(ref: str, *, what: str, error: type[VLoRAError]) -> str:
    """The reference of the commit that a Hub id means now; asked of the Hub, and never of its cache.

    Raises:
        VLoRAError: of class ``error``, one line, as of ``resolve_snapshot``.
    """
    match = _hub_id(ref)
    if match is None:
        raise error(f"{what} {ref!r} is no Hub id of the form org/name")
    try:
        found = huggingface_hub.HfApi().repo_info(match["repo"], revision=match["revision"])
    except Exception as problem:
        raise error(f"{what} {ref!r}: {_explain(problem)}") from problem
    return f"{match['repo']}{match['inner']}@{found.sha}"


def _is_commit(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) is not None


def _hub_id(ref: str | Path) -> re.Match[str] | None:
    """The parts of a Hub id. A path below a folder that is there is a path, however it goes on."""
    match = _HUB_ID.fullmatch(str(ref))
    if match and match["inner"] and os.path.isdir(match["repo"].partition("/")[0]):
        return None
    return match


def ref_name(ref: str | Path) -> str:
    """Return the last part of a folder's path or of a Hub id, without a revision.

    A snapshot's own folder is named by its commit, so the name is taken from what the user wrote, or
    from the repository's folder in the Hub's cache.
    """
    folder = _existing_folder(ref)
    if is_remote(ref):
        return url_name(str(ref))
    match = _hub_id(ref)
    if folder is None and match is not None:
        return (match["repo"] + match["inner"]).rpartition("/")[2]
    path = folder or Path(ref)
    cache = path.parent.parent if path.parent.name == "snapshots" else path
    cached = _CACHED.fullmatch(cache.name)
    return cached["name"] if cached else path.name


def _existing_folder(ref: str | Path) -> Path | None:
    path = os.fspath(local_folder(ref) or os.path.expanduser(ref))
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
        return f"not a valid Hub id: {first_line(problem)}"
    missing = isinstance(problem, LocalEntryNotFoundError)
    if huggingface_hub.constants.HF_HUB_OFFLINE and (
        missing or isinstance(problem, OfflineModeIsEnabled)
    ):
        return "not in the local Hub cache either, and HF_HUB_OFFLINE is set: unset it"
    if missing and means_cache():
        return "not in the local Hub cache, and the Hub is not asked"
    why = why_unreachable(problem)
    if why is not None or missing:
        said = f" ({why})" if why else ""
        return f"not in the local Hub cache, and the Hub cannot be reached{said}: check the network"
    if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
        return "the disk of the Hub cache is full: free space or point HF_HOME elsewhere"
    return f"downloading it from the Hub failed: {type(problem).__name__}: {first_line(problem)}"
