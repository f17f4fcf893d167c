"""Publish a folder or a file so that a reader sees the old state or the new one, never a mixture.

Everything is written beside the target (a rename is atomic only within one file system), flushed
to the disk, and renamed into place as the last act.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vllm_vlora.errors import OutputError

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The kernel or the file system does not know renameat2 or its flag; seccomp filters say EPERM.
_EXCHANGE_UNSUPPORTED = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP}
)
_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
# A folder is created a moment before it is locked; younger ones are therefore never stale.
_STALE_AFTER_SECONDS = 60.0


@contextmanager
def publish_folder(
    target: str | Path, *, force: bool, owned: Callable[[Path], bool]
) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``target`` when the block ends cleanly.

    On any exception, KeyboardInterrupt included, the temporary folder is removed and ``target`` is
    as it was. A symbolic link is followed: the folder it points to is replaced, the link stays.
    Temporary folders that earlier killed runs left beside ``target`` are removed.

    Args:
        target: the folder to publish; missing parents are created.
        force: whether a non-empty folder may be replaced.
        owned: says whether an existing non-empty folder is one that this package wrote. One that
            is not is never replaced, whatever ``force`` says.

    Raises:
        OutputError: the target exists and may not be replaced, or writing failed (full disk, no
            permission); names the path and the reason.
    """
    target = Path(os.path.realpath(target))
    _check_replaceable(target, force, owned)
    with _write_errors(target, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        temporary, lock = _make_temporary(target)
    try:
        with _write_errors(target, temporary):
            yield temporary
            _finish_tree(temporary)
        _check_replaceable(target, force, owned)
        with _write_errors(target, target.parent):
            _move_into_place(temporary, target)
            _fsync(target.parent)
    finally:
        # After a clean move nothing is left here; after a failure the first error is the one to
        # report, not that of the clean-up.
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def write_file_atomic(path: str | Path, data: bytes) -> None:
    """Replace the file ``path`` by ``data``; a reader sees the old bytes or the new ones.

    Raises:
        OutputError: the file cannot be written; the old one is untouched.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary_name(path)
    with _write_errors(path, path.parent):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise
        _fsync(path.parent)


def exists_error(path: Path) -> OutputError:
    """The error for an output that is there already and may not be replaced."""
    return OutputError(
        f"{path} exists and is not empty; choose another path, or replace it with --force "
        "(force=True in Python)"
    )


def _check_replaceable(target: Path, force: bool, owned: Callable[[Path], bool]) -> None:
    if not target.name:
        raise OutputError(f"{target} cannot be an output folder; name a folder inside it")
    try:
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise OutputError(f"{target} exists and is not a folder; choose another output path")
        with os.scandir(target) as entries:
            if next(entries, None) is None:
                return
        if not force:
            raise exists_error(target)
        if not owned(target):
            raise OutputError(
                f"{target} holds files that this tool did not write, so it is not replaced even "
                "with force; choose another path or remove it yourself"
            )
    except OSError as error:
        raise OutputError(f"cannot look into {target}: {_reason(error)}") from error


@contextmanager
def _write_errors(target: Path, inside: Path) -> Iterator[None]:
    """Turn errors of writing under ``inside`` into OutputError naming ``target``.

    The block of a caller may also read its input; an OSError that names another path is that
    path's, and passes through.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(error, inside):
            raise
        raise OutputError(f"cannot write {target}: {_reason(error)}") from error
    except SafetensorError as error:
        # safetensors reports a full disk in its own class, with Rust's text for the errno; before
        # 0.6 with Rust's other text.
        found = re.search(r"serializ.*(?:\(os error |Os \{ code: )(\d+)", str(error), re.IGNORECASE)
        if not found:
            raise
        reason = os.strerror(int(found[1]))
        raise OutputError(f"cannot write {target}: {reason}; nothing was changed") from error


def _concerns(error: OSError, inside: Path) -> bool:
    if error.filename is None:
        # write() and fsync() name no file. Network libraries raise OSErrors without a name too,
        # but never with these numbers.
        return error.errno in _WRITE_ERRNOS
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return False
    named = Path(os.path.realpath(os.fsdecode(error.filename)))
    return named == inside or inside in named.parents or named in inside.parents


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}; nothing was changed"


def _temporary_name(target: Path) -> Path:
    # Forty characters are at most 160 bytes, which leaves room under the 255 of a file name.
    return target.parent / f".{target.name[:40]}.{secrets.token_hex(8)}.tmp"


def _make_temporary(target: Path) -> tuple[Path, int]:
    """Create a locked temporary folder. The lock tells later runs that its owner is alive."""
    temporary = _temporary_name(target)
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    # Where folders cannot be locked (some network file systems) no run can take the lock of
    # another one's folder either, so nothing is ever mistaken for stale.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temporary, lock


def _remove_stale(target: Path) -> None:
    name = re.compile(rf"\.{re.escape(target.name[:40])}\.[0-9a-f]{{16}}\.tmp")
    with os.scandir(target.parent) as entries:
        found = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    for path in found:
        # Another run may be removing the same folder, or it may belong to another user; either
        # way it does not hinder this run.
        with suppress(OSError):
            _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or time.time() - status.st_mtime < _STALE_AFTER_SECONDS:
        return
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    finally:
        os.close(lock)


def _finish_tree(root: Path) -> None:
    """Flush every file and folder, and let those read the files who may read the folder.

    safetensors creates its files for the owner alone (mode 0600), but a service often runs as
    another user. The mode of ``root`` carries the umask, which cannot be read safely in threads.
    """
    readable = root.stat().st_mode & 0o444
    for folder, _, files in os.walk(root, onerror=_raise):
        for file in files:
            path = Path(folder, file)
            if not path.is_symlink():
                path.chmod(stat.S_IMODE(path.stat().st_mode) | readable)
                _fsync(path)
        _fsync(Path(folder))


def _raise(error: OSError) -> None:
    raise error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, target: Path) -> None:
    try:
        # Also replaces an empty folder, and nothing else: a folder that another process filled
        # in the meantime stays.
        os.rename(temporary, target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(temporary, target):
        _remove_old(temporary)
        return
    old = temporary.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    _remove_old(old)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (``renameat2(2)``)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    status = renameat2(
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(left)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(right)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    if status == 0:
        return True
    number = ctypes.get_errno()
    if number in _EXCHANGE_UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(right))


def _remove_old(old: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:
        # The new folder is in place, so the run has succeeded; only disk space is lost.
        logger.warning("the replaced folder is left at %s: %s", old, error.strerror or error)
