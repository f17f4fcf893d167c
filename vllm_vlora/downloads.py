"""What is at URLs, kept on this machine: each state of a folder whole, files that states share once.

    CACHE/NAME-KEY/url                 which URL it is of, without what could be secret
    CACHE/NAME-KEY/files/KEY           contents; KEY.part is one that is not complete yet
    CACHE/NAME-KEY/states/DIGEST/      a complete folder; its files are links to contents
    CACHE/NAME-KEY/partial/DIGEST/     a checkpoint's state, of whose tasks those that were asked for
    CACHE/NAME-KEY/manifests/DIGEST/   the JSON alone of a checkpoint's state
    CACHE/followed/NAME-KEY            a link to the state that servers follow (``checkpoint.newest``)

CACHE is ``VLLM_VLORA_CACHE``, or ``vllm-vlora`` in ``XDG_CACHE_HOME`` or ``~/.cache``. A state appears
when all of it is there and checked; the one that its URL was last seen to have is the newest by time.
What a run that was cut off has left is taken up by the next one. Any number of processes may share a
cache, as far as its file system has locks (``locking``). Nothing is removed but by ``clean``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from vllm_vlora.errors import LockedError, OutputError
from vllm_vlora.locking import locked, waiting_at_most
from vllm_vlora.stopping import check_not_stopped
from vllm_vlora.urls import RemoteError, RemoteFile, RemoteFolder, is_inner, url_name
from vllm_vlora.wording import quoted, without_secrets

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "VLLM_VLORA_CACHE"
OFFLINE_VARIABLE = "VLLM_VLORA_OFFLINE"
# Requests under way at once: a task's file is small, and most of its time the way there and back.
_AT_ONCE = 8
# How often a file is asked for again without a byte more of it, and a folder that changes meanwhile.
_TRIES = 3
_PAUSE_SECONDS = 0.5
_KEY = re.compile("[0-9a-f]{64}")
_URL = "url"
_FILES = "files"
_PART = ".part"
# What the weights of an adapter are in, whole or in parts.
_WEIGHTS = ".safetensors"


class Parts(Enum):
    """How much of a state is fetched, by the name of the folder with such states."""

    WHOLE = "states"
    TASKS_LATER = "partial"
    MANIFEST = "manifests"

    @property
    def enough(self) -> tuple[Parts, ...]:
        """What will do where so much is wanted, the most first."""
        every = tuple(Parts)
        return every[: every.index(self) + 1]


Progress = Callable[[int, int], None]
"""Called with the bytes that are here and all that are to come."""
_progress: ContextVar[Progress | None] = ContextVar("vllm_vlora_downloads", default=None)
_cache_alone: ContextVar[bool] = ContextVar("vllm_vlora_cache_alone", default=False)


class ChangedError(RemoteError):
    """What lies at a URL became another one while it was fetched; begin again."""


@contextmanager
def telling(progress: Progress) -> Iterator[None]:
    """Within the block downloads report to ``progress``."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def cache_folder() -> Path:
    """Where everything is kept; it need not exist."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "vllm-vlora"


@contextmanager
def from_cache_alone() -> Iterator[None]:
    """Within the block nothing is asked of URLs or the Hub: what the cache has is meant."""
    token = _cache_alone.set(True)
    try:
        yield
    finally:
        _cache_alone.reset(token)


def means_cache() -> bool:
    """Whether this is within ``from_cache_alone``."""
    return _cache_alone.get()


def is_offline() -> bool:
    """Whether nothing may be asked of URLs (``VLLM_VLORA_OFFLINE=1``, ``from_cache_alone``)."""
    return means_cache() or os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0")


def cache_name(where: str) -> str:
    """The file name of what is kept of a URL or a Hub id: the same for all signatures of it."""
    shown = _shown_url(where)
    key = hashlib.sha256(shown.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", url_name(shown) or shown, flags=re.ASCII).strip("-.")[:40]
    return f"{name}-{key}"


def followed_folder(where: str) -> Path:
    """The link to what servers follow of a URL or a Hub id, if any do (``checkpoint.newest``)."""
    return cache_folder() / "followed" / cache_name(where)


def _shown_url(url: str) -> str:
    return without_secrets(url).removesuffix("?...").rstrip("/")


class Cached:
    """What is kept of one URL; what may differ between two signatures of it is no part of its name."""

    def __init__(self, url: str) -> None:
        self.url = _shown_url(url)
        self.folder = cache_folder() / cache_name(url)

    def state(self, digest: str, parts: Parts = Parts.WHOLE) -> Path | None:
        """The folder of a state, if so much of it is here."""
        places = (self.folder / kind.value / digest for kind in parts.enough)
        return next((place for place in places if place.is_dir()), None)

    def states(self, parts: Parts = Parts.WHOLE) -> list[Path]:
        """The folders of all states of which so much is here."""
        return _states(self.folder, parts)

    def newest(self, parts: Parts = Parts.WHOLE) -> Path | None:
        """The state that was found at the URL when last looked, of those that are here."""
        return _newest(self.states(parts))

    def seen(self, state: Path) -> Path:
        """Note that the URL has this state now."""
        with suppress(OSError):
            os.utime(state)
        return state

    def add(
        self,
        digest: str,
        remote: RemoteFolder,
        files: Sequence[RemoteFile],
        texts: Mapping[str, bytes],
        parts: Parts = Parts.WHOLE,
    ) -> Path:
        """Fetch what is not here of a state, and let it appear; others that want it wait.

        Args:
            files: what to fetch, with SHA-256. texts: what was fetched before, name -> content.
            parts: how much of the state both are.

        Raises:
            RemoteError: a file cannot be had. ChangedError: one is not what ``files`` says.
            OutputError: the cache cannot be written.
        """
        _check_names(files, texts)
        with cache_written(self.folder):
            self._begin()
            with locked(self.folder) as has_locks:
                found = self.state(digest, parts)
                if found is None:
                    _fetch_all(remote, files, self.folder / _FILES, lock=has_locks)
                    found = self._publish(self.folder / parts.value / digest, files, texts)
                return self.seen(found)

    def add_listed(
        self,
        remote: RemoteFolder,
        files: Sequence[RemoteFile],
        look: Callable[[], Sequence[RemoteFile]],
    ) -> Path:
        """Fetch what is not here of a folder as it was listed, and let it appear; others wait.

        Args:
            files: what there is. look: lists it anew.

        Raises:
            RemoteError: a file cannot be had. ChangedError: the folder is another one by now.
            OutputError: the cache cannot be written.
        """
        _check_names(files, {})
        contents = self.folder / _FILES
        with cache_written(self.folder):
            self._begin()
            with locked(self.folder) as has_locks:
                try:
                    came = _fetch_all(remote, files, contents, lock=has_locks)
                    if list(look()) != list(files):
                        raise ChangedError("it changes while it is fetched; try again")
                except ChangedError:
                    # It may be of the folder as it is now, under the name of what it was.
                    for file in files:
                        if not file.sha256:
                            _part(contents / file.key).unlink(missing_ok=True)
                    raise
                for file in came:
                    _complete(_part(contents / file.key), contents / file.key)
                digest = _listing_digest(came)
                found = self.state(digest)
                if found is None:
                    found = self._publish(self.folder / Parts.WHOLE.value / digest, came, {})
                return self.seen(found)

    def add_file(self, state: Path, remote: RemoteFolder, file: RemoteFile) -> None:
        """Fetch a file that a state lacks; others that want it wait.

        Raises:
            RemoteError: it cannot be had. ChangedError: the URL has another by now.
            OutputError: the cache cannot be written.
        """
        _check_names([file], {})
        content = self.folder / _FILES / file.key
        with cache_written(self.folder), locked(content):
            if not (state / file.name).exists():
                _fetch_all(remote, [file], content.parent, lock=False)
                _link(content, state / file.name)

    def _begin(self) -> None:
        for kind in (*(parts.value for parts in Parts), _FILES):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        if not (self.folder / _URL).exists():
            (self.folder / _URL).write_text(self.url)

    def _publish(
        self, state: Path, files: Sequence[RemoteFile], texts: Mapping[str, bytes]
    ) -> Path:
        """Called with the lock held: what lies in the way was left by a run that was killed."""
        temporary = state.with_name(f".{state.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, data in texts.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as stream:
                stream.write(data)
                _flush(stream.fileno())
        for file in files:
            _link(self.folder / _FILES / file.key, temporary / file.name)
        os.rename(temporary, state)
        return state


def _part(content: Path) -> Path:
    """Where a content is while it comes."""
    return content.with_name(content.name + _PART)


def _complete(part: Path, content: Path) -> None:
    """Give what has come its name; what has it already stays, since states are links to it."""
    if content.is_file():
        part.unlink(missing_ok=True)
    else:
        part.chmod(0o444)
        os.rename(part, content)


def _link(content: Path, target: Path) -> None:
    """Have a content under a name too, which appears with all of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(content, target)
    except OSError:
        # The file system has no hard links.
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(content, temporary)
        os.replace(temporary, target)


def newest_or_asked(
    cached: Cached, url: str, ask: Callable[[RemoteFolder], Path], parts: Parts = Parts.WHOLE
) -> Path:
    """What ``ask`` makes of a URL, or the state that it had when last looked, where none can look now.

    That is where ``VLLM_VLORA_OFFLINE`` is set, and where nothing answers, which a warning says.

    Raises:
        RemoteError: there is an answer, and it is no; or none, and nothing is here.
    """
    here = cached.newest(parts)
    if is_offline():
        if here is None:
            raise RemoteError(f"it is not in the cache, and {OFFLINE_VARIABLE} is set: unset it")
        return here
    try:
        return asked(url, ask)
    except RemoteError as problem:
        if problem.reached or here is None:
            raise
        logger.warning("%s: %s; the state that was fetched last is used", cached.url, problem)
        return here


def asked(url: str, ask: Callable[[RemoteFolder], Path]) -> Path:
    """What ``ask`` makes of a URL, begun anew where it became another one meanwhile.

    Raises:
        RemoteError: what ``ask`` raises; nothing answers.
    """
    for _ in range(_TRIES - 1):
        with suppress(ChangedError):
            return ask(RemoteFolder(url))
    return ask(RemoteFolder(url))


def fetch_folder(url: str, patterns: Sequence[str], required: str | None = None) -> Path:
    """The local folder of those files at a URL that have such names, of one moment.

    Args:
        patterns: as of ``resolve_snapshot``. required: a name without which there is nothing to fetch.

    Raises:
        RemoteError: it cannot be had. OutputError: the cache cannot be written.
    """
    cached = Cached(url)

    def ask(remote: RemoteFolder) -> Path:
        files = remote.files(patterns, required)
        if not files:
            raise RemoteError("no such folder, or nothing in it that was sought", missing=True)
        if required is not None and not any(file.name.endswith(_WEIGHTS) for file in files):
            raise RemoteError(
                f"no weights (*{_WEIGHTS}) are beside its {required}, or they may not be read; check the "
                "URL and the credentials"
            )
        # What nothing tells from another one is fetched each time.
        known = all(file.is_known for file in files)
        found = cached.state(_listing_digest(files)) if known else None
        if found is not None:
            return cached.seen(found)
        return cached.add_listed(remote, files, lambda: remote.files(patterns, required))

    return newest_or_asked(cached, url, ask)


def _listing_digest(files: Iterable[RemoteFile]) -> str:
    """The name of a state that is these files."""
    return hashlib.sha256(repr([(file.name, file.key) for file in files]).encode()).hexdigest()


def _check_names(files: Sequence[RemoteFile], texts: Mapping[str, bytes]) -> None:
    """Whatever says which files there are was written by others."""
    names = [file.name for file in files] + list(texts)
    for file in files:
        if not is_inner(file.name) or not _KEY.fullmatch(file.key):
            raise RemoteError(f"{file.name!r} leads out of the folder, or has no SHA-256")
    if len(set(names)) < len(names):
        raise RemoteError("two of its files have one name")


# --- one file -------------------------------------------------------------------------------------


def _fetch_all(
    remote: RemoteFolder, files: Sequence[RemoteFile], contents: Path, *, lock: bool
) -> list[RemoteFile]:
    """Fetch those that are not here; returns all of them, with the SHA-256 where nothing else was known.

    What has a SHA-256 then has its name; what has a token alone has come, and has it with ``_complete``.

    Args:
        lock: take the lock of each content; not where it is held already, or there are no locks.
    """
    wanted = {file.key: file for file in files if not (contents / file.key).is_file()}
    if not wanted:
        return list(files)
    fetch = _Fetch(remote, contents, lock)
    total = sum(file.nbytes for file in wanted.values())
    progress = _progress.get() or (lambda here, all_: None)
    progress(0, total)
    with ThreadPoolExecutor(_AT_ONCE, "vlora-download") as threads:
        try:
            # Within, as who stops the program may do so while the first are fetched already.
            # In a context of its own each: how long one waits for another run is said in it.
            fetched = {
                key: threads.submit(copy_context().run, fetch.file, file)
                for key, file in wanted.items()
            }
            left: set[Future[RemoteFile]] = set(fetched.values())
            while left:
                done, left = wait(left, timeout=0.2, return_when=FIRST_EXCEPTION)
                progress(min(fetch.here, total), total)
                check_not_stopped()
                for future in done:
                    future.result()
        finally:
            fetch.stopped = True
            remote.close()
            threads.shutdown(cancel_futures=True)
    # Two names may have one content, which came once.
    return [
        replace(file, sha256=fetched[file.key].result().sha256) if file.key in fetched else file
        for file in files
    ]


class _Fetch:
    """Files of one folder that are fetched at once, each into its place or not at all."""

    def __init__(self, remote: RemoteFolder, contents: Path, lock: bool) -> None:
        self._remote = remote
        self._contents = contents
        self._lock = lock
        self._counting = threading.Lock()
        self.here = 0
        self.stopped = False

    def file(self, file: RemoteFile) -> RemoteFile:
        """Fetch one, which was there when the folder was looked at.

        Raises:
            RemoteError: it cannot be had. ChangedError: it is another one, or gone.
        """
        content = self._contents / file.key
        try:
            # A server may be fetching it for a task (``Cached.add_file``).
            with locked(content, self._check_not_stopped) if self._lock else nullcontext():
                if content.is_file():
                    self._count(file.nbytes)
                    return file
                return self._file(file)
        except RemoteError as problem:
            if problem.missing:
                raise ChangedError(str(problem), missing=True) from None
            raise

    def _check_not_stopped(self) -> None:
        if self.stopped:
            raise RemoteError("stopped")

    def _file(self, file: RemoteFile) -> RemoteFile:
        """Begun anew once, where what an earlier run had left was not a part of it."""
        part = _part(self._contents / file.key)
        begun = self._left(file, part)
        self._count(begun)
        digest = self._whole(file, part)
        if begun and file.sha256 and digest != file.sha256:
            part.unlink()
            self._count(-file.nbytes)
            digest = self._whole(file, part)
        if file.sha256 and digest != file.sha256:
            part.unlink()
            raise ChangedError(
                f"{file.name} has another SHA-256 than it is to have; was it replaced?"
            )
        if not file.is_known:
            file = replace(file, sha256=digest)
        if file.sha256:
            _complete(part, self._contents / digest)
        return file

    def _left(self, file: RemoteFile, part: Path) -> int:
        """Bytes that are here of it; none where nothing says that they are of this content."""
        size = part.stat().st_size if part.exists() else 0
        if size > file.nbytes or not file.is_known:
            part.unlink(missing_ok=True)
            return 0
        return size

    def _whole(self, file: RemoteFile, part: Path) -> str:
        """Append what is missing, and return the SHA-256 of the whole."""
        tries = 0
        while True:
            before = self._left(file, part)
            try:
                with part.open("ab") as stream:
                    for data in self._remote.stream(file, before) if before < file.nbytes else ():
                        self._check_not_stopped()
                        stream.write(data)
                        # What has come stays, also where this process is killed.
                        stream.flush()
                        self._count(len(data))
                    _flush(stream.fileno())
            except RemoteError as problem:
                tries = self._tries(file, part, before, tries)
                if problem.reached or tries == _TRIES or self.stopped:
                    raise
                time.sleep(_PAUSE_SECONDS * tries)
                continue
            size = part.stat().st_size
            if size == file.nbytes:
                return _digest(part)
            tries = self._tries(file, part, before, tries)
            if tries == _TRIES:
                raise ChangedError(f"{file.name} has {size} bytes, not {file.nbytes}")

    def _tries(self, file: RemoteFile, part: Path, before: int, tries: int) -> int:
        """How often nothing was gained by asking; what has come of what is not known is none."""
        size = part.stat().st_size
        if file.is_known:
            return 0 if size > before else tries + 1
        self._count(-size)
        return tries + 1

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self.here += nbytes


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)


@contextmanager
def cache_written(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an OutputError that says where the cache is."""
    try:
        yield
    except OSError as problem:
        raise OutputError(
            f"the cache at {folder} cannot be written: {problem.strerror or problem}; free space "
            f"(`vllm-vlora cache` shows what it holds), or set {CACHE_VARIABLE} to another folder"
        ) from problem


def copy_again(file: Path) -> str:
    """What to do about a damaged file of a checkpoint; one in the cache would be taken for ever."""
    for folder in file.parent.resolve().parents:
        # What cannot be read here is no reason to say less of the file.
        with suppress(OSError):
            url = (folder / _URL).read_text(errors="replace")
            if folder.name == cache_name(url):
                line = quoted(["vllm-vlora", "cache", url, "--clean"])
                return f"remove what the cache has of it, `{line}`, and it is fetched again"
    return "copy the checkpoint again"


# --- looking and cleaning -------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds of one URL: complete states, bytes on disk, seconds since it was looked at."""

    url: str
    folder: Path
    states: int
    nbytes: int
    age: float


def cache_entries() -> list[CacheEntry]:
    """All that the cache holds, the oldest last."""
    found = []
    for file in cache_folder().glob(f"*/{_URL}"):
        with suppress(OSError):
            states = _states(file.parent, Parts.TASKS_LATER)
            times = [place.stat().st_mtime for place in (*states, file)]
            url = file.read_text(errors="replace")
            age = max(0.0, time.time() - max(times))
            found.append(CacheEntry(url, file.parent, len(states), _disk_usage(file.parent), age))
    return sorted(found, key=lambda entry: entry.age)


def clean(entry: CacheEntry, *, keep_newest: bool = False) -> int:
    """Remove what the cache holds of a URL; returns the bytes freed. Waits for one that is fetching it.

    A server that was started from it keeps the tasks that it has loaded, and finds no others.

    Args:
        keep_newest: keep the newest state, one that servers follow, and what is being fetched for a task;
            remove the others and what is not complete.

    Raises:
        OutputError: it cannot be removed.
    """
    before = _disk_usage(entry.folder)
    with cache_written(entry.folder), locked(entry.folder) as has_locks:
        states = _states(entry.folder, Parts.TASKS_LATER)
        newest = _newest(states) if keep_newest else None
        if newest is None:
            shutil.rmtree(entry.folder)
            return before
        # Servers may have refused the newest, and serve on what they followed before.
        kept = {newest.resolve(), followed_folder(entry.url).resolve()}
        for parts in Parts:
            for place in (entry.folder / parts.value).glob("*"):
                if place.resolve() not in kept:
                    shutil.rmtree(place)
        files = (path for state in kept for path in state.rglob("*") if path.is_file())
        used = {path.stat().st_ino for path in files}
        for place in list((entry.folder / _FILES).iterdir()):
            # A lock is its holder's, and a part may be gone by now: a task's file has come.
            with suppress(FileNotFoundError):
                if not place.name.startswith(".") and place.stat().st_ino not in used:
                    _remove_content(place, lock=has_locks)
    return before - _disk_usage(entry.folder)


def _remove_content(place: Path, *, lock: bool) -> None:
    """Remove a content, or the part of one, unless it is being fetched for a task right now."""
    content = place.with_name(place.name.removesuffix(_PART))
    alone = locked(content) if lock else nullcontext()
    with suppress(LockedError), waiting_at_most(0), alone:
        place.unlink()


def _newest(states: Iterable[Path]) -> Path | None:
    return max(states, key=lambda place: place.stat().st_mtime_ns, default=None)


def _states(folder: Path, parts: Parts) -> list[Path]:
    """The states in what is kept of a URL of which so much is here."""
    kinds = [folder / kind.value for kind in parts.enough]
    places = (place for kind in kinds if kind.is_dir() for place in kind.iterdir())
    return [place for place in places if _KEY.fullmatch(place.name)]


def _disk_usage(folder: Path) -> int:
    """Bytes of all files, links to one counted once."""
    files = (path.lstat() for path in folder.rglob("*") if path.is_file())
    return sum({status.st_ino: status.st_size for status in files}.values())
