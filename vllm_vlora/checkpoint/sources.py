"""Where a checkpoint is: a folder, a repository on the Hub, or a URL, whose state is fetched.

Of a URL the manifest is asked for each time, and what it names is fetched where the cache does not have
it (``downloads``). A state in the cache is named by its ``content_digest``. It is fetched whole, or, by
servers that are told so, without its tasks, each of which is fetched when it is first read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from vllm_vlora.checkpoint.aliases import ALIASES_FILE, read_aliases
from vllm_vlora.checkpoint.attachments import ATTACHMENTS_FILE, read_attachments
from vllm_vlora.checkpoint.components import COMPONENTS_FILE
from vllm_vlora.checkpoint.manifest import (
    BASIS_INDEX_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    RECORDS_FILE,
    TASKS_FOLDER,
    FileRef,
    read_config,
)
from vllm_vlora.checkpoint.pinning import check_content, content_digest, pinned
from vllm_vlora.checkpoint.router_files import ROUTER_FILE, read_router
from vllm_vlora.checkpoint.task_entry import task_files
from vllm_vlora.checkpoint.task_index import open_tasks, records_of
from vllm_vlora.downloads import (
    OFFLINE_VARIABLE,
    Cached,
    ChangedError,
    Parts,
    asked,
    is_offline,
    newest_or_asked,
)
from vllm_vlora.errors import CheckpointError, CheckpointReplacedError
from vllm_vlora.regular_files import JSON_BYTES
from vllm_vlora.snapshots import (
    fetch_file,
    fixed_ref,
    newest_ref,
    repository_of,
    resolve_snapshot,
)
from vllm_vlora.urls import RemoteError, RemoteFile, RemoteFolder, is_remote
from vllm_vlora.wording import without_secrets

logger = logging.getLogger(__name__)

# Where the tasks come from that were not fetched with their checkpoint: what the cache has of a URL
# without them, or of a Hub repository -> that, as it was given, since a URL may hold a signature. It is
# the process's, whose engines, one after another or side by side, mean the same by a folder.
_LATER: dict[Path, str] = {}
# What no manifest knows of and the digest of the content covers.
_COUNTED = (ATTACHMENTS_FILE, ALIASES_FILE, ROUTER_FILE)
# What goes with a checkpoint, and neither knows of.
_BESIDE = (BASIS_INDEX_FILE, COMPONENTS_FILE, "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")


def checkpoint_folder(
    where: str | Path,
    wanted: str | None = None,
    *,
    parts: Parts = Parts.WHOLE,
    foreign: bool = False,
) -> Path:
    """The local folder of a checkpoint.

    Args:
        where: a folder, a Hub id or a URL, without a digest.
        wanted: the digest that its content must have. A state of a URL that has it and is in the cache is
            taken unasked; whether any other has it is for who reads it to check.
        parts: how much is fetched of a Hub id or a URL. What this process then reads of a task that was
            not is fetched there (``fetch_task``).
        foreign: it may be one of another package, all of whose files are then fetched.

    Raises:
        CheckpointError: there is none, it cannot be reached, or at the URL is another content.
        OutputError: the cache cannot be written.
    """
    if not is_remote(where):
        return _from_hub(where, parts)
    url = str(where)
    try:
        return _from_url(url, wanted, parts)
    except RemoteError as problem:
        shown = without_secrets(url)
        if not problem.missing or not str(problem).startswith(CONFIG_FILE):
            raise CheckpointError(f"checkpoint {shown!r}: {problem}") from None
        if not foreign:
            raise CheckpointError(
                f"{shown} is not a vllm-vlora checkpoint: it has no {CONFIG_FILE}; check the URL"
            ) from None
    return resolve_snapshot(where, what="checkpoint", error=CheckpointError)


def newest_folder(where: str, before: Path | None, parts: Parts = Parts.WHOLE) -> Path:
    """The local folder of what a Hub id or a URL has now; never of what it had when last looked.

    Args:
        before: of what it had then, which stays untouched where that is what it has now. parts: as of
            ``checkpoint_folder``.

    Raises:
        CheckpointError: it cannot be asked, or has none. OutputError: the cache cannot be written.
    """
    if not is_remote(where):
        newest = newest_ref(where, what="checkpoint", error=CheckpointError)
        same = before is not None and fixed_ref(where, before) == newest
        return before if before is not None and same else checkpoint_folder(newest, parts=parts)
    cached = Cached(where)
    try:
        return asked(where, lambda remote: _newest_state(cached, remote, None, parts, before))
    except RemoteError as problem:
        raise CheckpointError(f"checkpoint {without_secrets(where)!r}: {problem}") from None


def fixed_checkpoint(where: str | Path, folder: Path, wanted: str | None) -> str:
    """The reference that other processes, also on other machines, find this same state by.

    Args:
        folder: what ``checkpoint_folder`` found for ``where`` and ``wanted``.
    """
    if is_remote(where):
        return pinned(where, folder.name)
    return pinned(fixed_ref(where, folder), wanted)


def fetches_tasks(folder: Path) -> bool:
    """Whether this process took a checkpoint without its tasks, and fetches each when it is read."""
    return _origin(folder) is not None


def may_be_here(file: Path) -> bool:
    """Whether a file is on this machine, or its disk cannot be asked: who reads it says why."""
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def fetch_task(folder: Path, ref: FileRef) -> None:
    """Fetch the file of a task where it is not here and this process took the checkpoint without.

    Raises:
        CheckpointReplacedError: the URL has another by now.
        CheckpointError: it cannot be had. OutputError: the cache cannot be written.
    """
    origin = _origin(folder)
    if origin is None or may_be_here(folder / ref.file):
        return
    root, where = origin
    if not is_remote(where):
        fetch_file(where, folder.resolve().relative_to(root), ref.file, CheckpointError)
        return
    shown = without_secrets(where)
    if is_offline():
        raise CheckpointError(
            f"{ref.file} of {shown} is not in the cache, and {OFFLINE_VARIABLE} is set: unset it"
        )
    try:
        file = RemoteFile(ref.file, ref.nbytes, ref.sha256)
        Cached(where).add_file(folder.resolve(), RemoteFolder(where), file)
    except ChangedError as problem:
        raise CheckpointReplacedError(f"checkpoint {shown!r}: {problem}") from None
    except RemoteError as problem:
        raise CheckpointError(f"checkpoint {shown!r}: {problem}") from None


def _origin(folder: Path) -> tuple[Path, str] | None:
    """What the cache has of the place that a folder's tasks are fetched from, and that place."""
    if not _LATER:
        return None
    return next(((p, _LATER[p]) for p in folder.resolve().parents if p in _LATER), None)


def _from_hub(where: str | Path, parts: Parts) -> Path:
    allowed = ["*.json", INDEX_FILE, RECORDS_FILE] if parts is Parts.MANIFEST else None
    left_out = [f"{TASKS_FOLDER}/*"] if parts is Parts.TASKS_LATER else None
    folder = resolve_snapshot(
        where,
        what="checkpoint",
        error=CheckpointError,
        allow_patterns=allowed,
        ignore_patterns=left_out,
    )
    found = repository_of(where, folder)
    if parts is Parts.TASKS_LATER and found is not None:
        _LATER[found[0]] = found[1]
        return _for_tasks(folder)
    return folder


def _for_tasks(folder: Path) -> Path:
    """A folder that looks the same while its tasks come into it."""
    # What cannot be written is told where a task is to be.
    with suppress(OSError):
        (folder / TASKS_FOLDER).mkdir(exist_ok=True)
    return folder


def _from_url(url: str, wanted: str | None, parts: Parts) -> Path:
    cached = Cached(url)
    if parts is not Parts.TASKS_LATER:
        return _state_of_url(cached, url, wanted, parts)
    # Not those beside them that were fetched whole, by this process or by others.
    _LATER[(cached.folder / parts.value).resolve()] = url
    return _for_tasks(_state_of_url(cached, url, wanted, parts))


def _state_of_url(cached: Cached, url: str, wanted: str | None, parts: Parts) -> Path:
    def ask(remote: RemoteFolder) -> Path:
        return _newest_state(cached, remote, wanted, parts)

    if wanted is None:
        return newest_or_asked(cached, url, ask, parts)
    here = cached.state(wanted, parts)
    if here is None and is_offline():
        raise RemoteError(
            f"the content that is asked for is not in the cache, and {OFFLINE_VARIABLE} is set: unset it"
        )
    return here or asked(url, ask)


def _newest_state(
    cached: Cached,
    remote: RemoteFolder,
    wanted: str | None,
    parts: Parts,
    before: Path | None = None,
) -> Path:
    """The state that the URL has now, from the cache or fetched into it."""
    texts = {CONFIG_FILE: remote.read(CONFIG_FILE, JSON_BYTES)}
    texts |= _optional(remote, _COUNTED)
    if before is not None and _has(before, texts):
        return before
    # Of no state the manifest alone: what has changed beside it would not be asked for.
    for state in cached.states(parts if parts is not Parts.MANIFEST else Parts.WHOLE):
        if wanted is None and _has(state, texts):
            return cached.seen(state)
    described = _described(remote, texts, cached.url)
    if wanted is not None:
        check_content(cached.url, described.digest, wanted)
    texts |= described.texts
    if parts is Parts.MANIFEST:
        return cached.add(described.digest, remote, [], texts, parts)
    texts |= _optional(remote, _BESIDE)
    files = described.tasks if parts is Parts.WHOLE else []
    return cached.add(described.digest, remote, [*described.files, *files], texts, parts)


class _Described(NamedTuple):
    """A state as its manifest has it: what names the tasks, their files, all others, and the digest."""

    texts: dict[str, bytes]
    tasks: list[RemoteFile]
    files: list[RemoteFile]
    digest: str


def _described(remote: RemoteFolder, texts: Mapping[str, bytes], url: str) -> _Described:
    with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
        folder = Path(scratch)
        for name, data in texts.items():
            (folder / name).write_bytes(data)
        try:
            config = read_config(folder)
            names = {config.tasks.file: _checked(remote, config.tasks, folder)}
            records = records_of(folder, config)
            if records is not None:
                names[records.file] = _checked(remote, records, folder)
            tasks = open_tasks(folder, config)
            attachments = read_attachments(folder, tasks)
            aliases = read_aliases(folder, tasks)
            router = read_router(folder)
        except CheckpointError as error:
            # The same, of the URL in place of the folder that nobody will find.
            raise type(error)(str(error).replace(str(folder), url)) from None
    kept = {ref.file: ref for refs in attachments.values() for ref in refs.values()}
    refs = [*config.basis, *kept.values()]
    refs += [router.weights] if router is not None else []
    of_tasks, others = (
        [RemoteFile(ref.file, ref.nbytes, ref.sha256) for ref in found]
        for found in (task_files(tasks), refs)
    )
    digest = content_digest(config, attachments, aliases, router)
    return _Described(names, of_tasks, others, digest)


def _checked(remote: RemoteFolder, ref: FileRef, folder: Path) -> bytes:
    """A file that names tasks, also put into ``folder``."""
    data = remote.read(ref.file, ref.nbytes)
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ChangedError(f"{ref.file} is not the one that its manifest names")
    target = folder / ref.file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return data


def _optional(remote: RemoteFolder, names: list[str] | tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    for name in names:
        try:
            found[name] = remote.read(name, JSON_BYTES)
        except RemoteError as problem:
            # Where a key may not list, what is not there is denied too.
            if not problem.missing and not problem.denied:
                raise
            if problem.denied and name in _COUNTED:
                logger.warning("%s; it is taken not to be there", problem)
    return found


def _has(state: Path, texts: Mapping[str, bytes]) -> bool:
    """Whether a state has this manifest; what it has beside it and that is gone counts too."""
    return all(_content(state / name) == texts.get(name) for name in (CONFIG_FILE, *_COUNTED))


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
