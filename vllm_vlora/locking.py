"""A lock for what is about to be replaced, so that two runs never change one folder at once.

The lock is ``flock(2)`` on a file beside the target, ``.NAME.lock``: the kernel lets it go when its
holder ends, however it ends, and Linux carries it over NFS. The file is removed with the lock; one
that a killed run has left holds nobody up. Where a file system has no locks, a warning says so.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from vllm_vlora.errors import LockedError, OutputError
from vllm_vlora.strict_json import decode

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
# What flock says where the file system or its server has no locks.
_NO_LOCKS = frozenset(
    {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
)
_patience: ContextVar[float | None] = ContextVar("vllm_vlora_patience", default=None)


class _Held(threading.local):
    """What this thread holds: a lock is taken once, however often it is asked for.

    By process, since a forked child has what its parent had, and does not hold it.
    """

    def __init__(self) -> None:
        self.locks: dict[tuple[int, Path], bool] = {}


_held = _Held()


@contextmanager
def waiting_at_most(seconds: float | None) -> Iterator[None]:
    """Within the block nobody waits longer than this for another run; None: as long as it takes.

    Examples:
        >>> with waiting_at_most(10):
        ...     freed = remove_tasks(checkpoint, ["task_1"])
    """
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


@contextmanager
def locked(target: Path, check: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock of ``target``, a resolved path whose parent exists; waits, and says so once.

    Args:
        check: called again and again while it waits; what it raises ends that.

    Yields:
        Whether the lock is held; False where the file system has none.

    Raises:
        LockedError: another run held it for longer than ``waiting_at_most`` allows.
        OutputError: nothing can be written beside the target.
    """
    key = os.getpid(), target
    if key in _held.locks:
        yield _held.locks[key]
        return
    path = beside(target, "lock")
    try:
        descriptor = _take(target, path, check)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OutputError(
                f"cannot write {target}: {error.strerror}; nothing was changed"
            ) from error
        with suppress(OSError):
            path.unlink()
        logger.warning(
            "%s cannot be locked (%s): let no two runs write it at once", target, error.strerror
        )
        descriptor = None
    _held.locks[key] = descriptor is not None
    try:
        yield descriptor is not None
    finally:
        del _held.locks[key]
        if descriptor is not None:
            # In this order: whoever gets the lock then finds that the file is another one.
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def beside(target: Path, ending: str) -> Path:
    """The hidden name of a file or folder that belongs to ``target``, beside it."""
    name = target.name
    if len(os.fsencode(name)) > 160:
        # A file name has at most 255 bytes.
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:40]
    return target.parent / f".{name}.{ending}"


def _take(target: Path, path: Path, check: Callable[[], None]) -> int:
    """A descriptor that holds the lock."""
    patience = _patience.get()
    deadline = None if patience is None else time.monotonic() + patience
    told = False
    while True:
        descriptor = _open(path)
        try:
            if _locks(descriptor) and _is(descriptor, path):
                _sign(descriptor)
                taken, descriptor = descriptor, -1
                return taken
            holder = _holder(descriptor)
            # A lock that is held on a file that is gone says nothing; the next one may be free.
            gone = not _is(descriptor, path)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if gone:
            continue
        if deadline is not None and time.monotonic() >= deadline:
            raise LockedError(
                f"{target} is being written by another run{holder}; wait for it, or allow more "
                "time with --timeout (waiting_at_most in Python)"
            )
        if not told:
            logger.warning("waiting for another run%s that writes %s ...", holder, target)
            told = True
        check()
        time.sleep(_POLL_SECONDS)


def _open(path: Path) -> int:
    flags = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # NFS locks only what is open for writing.
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:
        try:
            # Somebody else's, which a killed run left.
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            # It went in between, or there is none and none may be made, which this says.
            return os.open(path, os.O_RDWR | flags, 0o666)


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Who holds the lock, for those who wait; nothing depends on it."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        signed = {"pid": os.getpid(), "host": socket.gethostname()}
        os.pwrite(descriptor, json.dumps(signed).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        signed = decode(os.pread(descriptor, 1000, 0), dict[str, int | str])
        pid, host = int(signed["pid"]), str(signed["host"])
    except (OSError, ValueError, KeyError):
        return ""
    return f" (process {pid})" if host == socket.gethostname() else f" (process {pid} on {host!r})"
