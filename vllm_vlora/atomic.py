"""Publish a folder or a file so that a reader sees the old state or the new one, never a mixture.

Everything is written beside the target (a rename is atomic only within one file system), flushed
to the disk, and renamed into place as the last act. Who publishes holds the target's lock
(``locking``), so whatever else lies beside it under our names is of a run that was killed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import filecmp
import logging
import multiprocessing
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from vllm_vlora.errors import OutputError, VLoRAError
from vllm_vlora.locking import beside, locked
from vllm_vlora.places import check_movable, check_no_mount_point, mount_of
from vllm_vlora.regular_files import copy_regular
from vllm_vlora.stopping import check_not_stopped

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The kernel or the file system does not know renameat2 or its flag; seccomp filters say EPERM.
_EXCHANGE_UNSUPPORTED = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP}
)
_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
# Where nothing can be locked, what is younger may belong to a run that is alive.
_STALE_AFTER_SECONDS = 60.0

Owned = Callable[[Path], "Collection[str] | None"]
"""The files, relative to a folder, that this package wrote there; None if it is no folder of ours."""


@contextmanager
def publish_folder(
    target: str | Path, *, force: bool, owned: Owned, unchanged: Callable[[], None] | None = None
) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``target`` when the block ends cleanly.

    On any exception, KeyboardInterrupt included, the temporary folder is removed and ``target`` is
    as it was. A symbolic link is followed: the folder it points to is replaced, the link stays.
    Files in a replaced folder that are not ``owned`` stay in it; where the new one has another file
    of that name, as ``NAME.old``. One run at a time writes a target; others wait (``locking``).

    Args:
        target: the folder to publish; missing parents are created.
        force: whether a non-empty folder may be replaced.
        owned: one that is not ours is never replaced, whatever ``force`` says.
        unchanged: called last before the new folder takes the old one's place; raises if it must not.

    Raises:
        OutputError: the target exists and may not be replaced or is where none can be, or writing
            failed (full disk, no permission); names the path and the reason.
    """
    target = Path(os.path.realpath(target))
    _check_replaceable(target, force, owned)
    _make_parents(target)
    with exclusive(target):
        _check_replaceable(target, force, owned)
        with _write_errors(target, target.parent):
            temporary, lock = _make_temporary(target)
        try:
            with _write_errors(target, target):
                _check_place(target, temporary, owned)
            with _write_errors(target, temporary):
                yield temporary
                _finish_tree(temporary)
            with _write_errors(target, target):
                carried = _carry(target, temporary, owned)
            _check_replaceable(target, force, owned)
            if unchanged is not None:
                unchanged()
            check_not_stopped()
            with _write_errors(target, target.parent):
                old = _move_into_place(temporary, target)
                _fsync(target.parent)
        except BaseException:
            # The first error is the one to report, not that of the clean-up.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)
        if old is not None:
            _remove_old(old, target, owned, carried)


@contextmanager
def exclusive(target: str | Path) -> Iterator[None]:
    """Within the block no other run writes ``target``: a change holds it from reading to publishing.

    What killed runs have left is put right first: a folder that they had moved aside is put back, and
    what they had begun is removed. A thread may hold it again inside, as ``publish_folder`` does.

    Raises:
        OutputError: another run writes it and does not end in time (``locking.waiting_at_most``).
        VLoRAError: a process that a script without a guard started imports the script.
    """
    _check_not_imported()
    target = Path(os.path.realpath(target))
    if not target.parent.is_dir():
        # There is nothing to change, nor to wait for.
        yield
        return
    with locked(target) as held:
        with _write_errors(target, target.parent):
            _recover(target, held)
        yield


def _check_not_imported() -> None:
    # Such a process would wait for the lock, and who holds that waits for the process. This mark is what
    # Python's own refusal to start processes there goes by.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise VLoRAError(
            "this script is imported by a process that it started, and must not write then: put what it "
            "does under `if __name__ == '__main__':`"
        )


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder for the length of the block, where files of ``target`` can have second names: beside it.

    Where nothing can be written there it lies among the system's temporary files. Changes of ``target``
    leave it alone while its run lives, and remove what a killed run has left of it once that is old.
    """
    target = Path(os.path.realpath(target))
    with ExitStack() as stack:
        scratch = beside(target, f"{secrets.token_hex(8)}.scratch")
        folder = scratch / "files"
        try:
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            scratch.mkdir()
            folder.mkdir()
            lock = _open_lock(scratch)
        except OSError:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="vllm-vlora-")))
        else:
            # Closed before the folder is removed: NFS keeps what is open under another name in it.
            stack.callback(os.close, lock)
            # Where there are no locks, no other run can take it either.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder


def write_file_atomic(path: str | Path, data: bytes) -> None:
    """Replace the file ``path`` by ``data``; a reader sees the old bytes or the new ones.

    Raises:
        OutputError: the file cannot be written; the old one is untouched.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary_name(path)
    with exclusive(path), _write_errors(path, path.parent):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            check_not_stopped()
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


def check_apart(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise OutputError if a folder to write is or holds something that is read.

    Replacing it would take away what it is made from. Inputs that are not there are left to others.
    """
    target = Path(os.path.realpath(os.path.expanduser(output)))
    for given in inputs:
        path = Path(os.path.realpath(os.path.expanduser(given)))
        if path.exists() and target in (path, *path.parents):
            relation = "is" if path == target else "holds"
            raise OutputError(
                f"the output {target} {relation} {path}, which is read; choose an output beside it"
            )


def foreign_files(folder: Path, owned: Collection[str]) -> list[str]:
    """What lies in a folder and is not in ``owned``, relative to it: files, links, empty folders."""
    found = []
    for where, folders, files in os.walk(folder, onerror=_raise):
        here = Path(where)
        links = [name for name in folders if (here / name).is_symlink()]
        names = [(here / name).relative_to(folder).as_posix() for name in [*files, *links]]
        found += [name for name in names if name not in owned]
        if not folders and not files and here != folder:
            found.append(here.relative_to(folder).as_posix())
    return sorted(found)


def _check_replaceable(target: Path, force: bool, owned: Owned) -> None:
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
        if owned(target) is None:
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
    # A copy that finds the disk full names its source first.
    named = [name for name in (error.filename, error.filename2) if name is not None]
    if not named:
        # write() and fsync() name no file. Network libraries raise OSErrors without a name too,
        # but never with these numbers.
        return error.errno in _WRITE_ERRNOS
    paths = [
        Path(os.path.realpath(os.fsdecode(name)))
        for name in named
        if isinstance(name, str | bytes | os.PathLike)
    ]
    return any(path == inside or inside in path.parents or path in inside.parents for path in paths)


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}; nothing was changed"


def _make_parents(target: Path) -> None:
    with _write_errors(target, target.parent):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            file = next(above for above in target.parents if os.path.lexists(above))
            raise OutputError(
                f"cannot write {target}: {file} is not a folder; choose another output path"
            ) from error


def _temporary_name(target: Path) -> Path:
    return beside(target, f"{secrets.token_hex(8)}.tmp")


def _make_temporary(target: Path) -> tuple[Path, int]:
    """Create a locked temporary folder. The lock tells later runs that its owner is alive."""
    temporary = _temporary_name(target)
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    # Folders cannot be locked on some network file systems; there the target's lock must do.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temporary, lock


def _open_lock(scratch: Path) -> int:
    """The lock of a scratch folder, not taken yet. It is a file, since NFS locks no folders."""
    return os.open(scratch / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _check_place(target: Path, temporary: Path, owned: Owned) -> None:
    """Find what would end the run after all its work: a place or a content that cannot be moved."""
    if not target.is_dir():
        return
    check_no_mount_point(target)
    files = owned(target)
    if files is None:
        # An empty folder, which any other may replace.
        return
    probe = temporary / ".probe"
    probe.mkdir()
    try:
        check_movable(target, temporary)
    finally:
        probe.rmdir()
    mount = mount_of(target)
    for name in foreign_files(target, files):
        if mount_of(target / name) != mount:
            raise OutputError(
                f"{target / name} is mounted inside {target}, which can therefore not be replaced; "
                "unmount it, or choose another output path"
            )


# --- what killed runs leave -----------------------------------------------------------------------


def _recover(target: Path, held: bool) -> None:
    """Put right what runs that were killed left beside ``target``."""
    left = _left_behind(target)
    for old in [path for path in left if path.suffix == ".old"]:
        if not _is_abandoned(old, held):
            continue
        if not old.with_suffix(".tmp").exists():
            # The new folder had taken its place; the run was killed while removing the old one.
            shutil.rmtree(old, ignore_errors=True)
        elif not os.path.lexists(target):
            os.rename(old, target)
            logger.warning("put %s back, which a run that was killed had moved aside", target)
        else:
            logger.warning(
                "%s was %s before a run was killed; keep it or remove it", old, target.name
            )
            left.remove(old.with_suffix(".tmp"))
    for temporary in [path for path in left if path.suffix == ".tmp"]:
        # It may belong to another user; that does not hinder this run.
        with suppress(OSError):
            if _is_abandoned(temporary, held):
                if stat.S_ISDIR(temporary.lstat().st_mode):
                    shutil.rmtree(temporary)
                else:
                    temporary.unlink()
    for scratch in [path for path in left if path.suffix == ".scratch"]:
        # Its run is alive, nothing can be locked here, or it is another user's.
        with suppress(OSError):
            # Of a young one the lock may be about to be taken.
            if _is_old(scratch.lstat()):
                _check_unlocked(scratch)
                shutil.rmtree(scratch)


def _check_unlocked(scratch: Path) -> None:
    """Raise OSError if a living run has it, or if that cannot be known."""
    lock = _open_lock(scratch)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(lock)


def _left_behind(target: Path) -> list[Path]:
    name = re.compile(rf"{re.escape(beside(target, '').name)}[0-9a-f]{{16}}\.(tmp|old|scratch)")
    with os.scandir(target.parent) as entries:
        return [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]


def _is_abandoned(path: Path, held: bool) -> bool:
    """Whether no living run has it: none can while we hold the target's lock.

    Where there are no locks, or an older version of this package is at work, the lock on the folder
    itself counts, and its age.
    """
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return held and stat.S_ISREG(status.st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return held
    finally:
        os.close(descriptor)
    return held or _is_old(status)


def _is_old(status: os.stat_result) -> bool:
    return time.time() - max(status.st_mtime, status.st_ctime) > _STALE_AFTER_SECONDS


# --- what is not ours -----------------------------------------------------------------------------


def _carry(target: Path, temporary: Path, owned: Owned) -> set[str]:
    """Take what is not ours from the folder that is to be replaced; returns the names."""
    files = owned(target) if target.is_dir() else None
    if files is None:
        return set()
    carried = carry_over(target, temporary, foreign_files(target, files), link_or_copy)
    for folder, _, _ in os.walk(temporary) if carried else ():
        _fsync(Path(folder))
    return carried


def carry_over(
    source: Path, folder: Path, names: Iterable[str], copy: Callable[[Path, Path], None]
) -> set[str]:
    """Take files, links and empty folders of ``source`` over into ``folder``; returns their names.

    Where ``folder`` has another file of that name the one that comes is called ``NAME.old`` there.
    """
    names = set(names)
    for name in sorted(names):
        origin, place = source / name, folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(place):
            if _same(origin, place):
                continue
            place = _free(place)
            logger.warning("%s is kept as %s", source / name, place.name)
        if origin.is_symlink():
            os.symlink(os.readlink(origin), place)
        elif origin.is_dir():
            place.mkdir()
        else:
            copy(origin, place)
    return names


def _same(left: Path, right: Path) -> bool:
    if left.is_symlink() or right.is_symlink() or left.is_dir() or right.is_dir():
        return left.is_dir() and right.is_dir() and not left.is_symlink()
    return left.is_file() and right.is_file() and filecmp.cmp(left, right, shallow=False)


def _free(place: Path) -> Path:
    number, found = 1, place.with_name(f"{place.name}.old")
    while os.path.lexists(found):
        number += 1
        found = place.with_name(f"{place.name}.old{number}")
    return found


def link_or_copy(source: Path, target: Path) -> None:
    """The file itself under another name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        copy_regular(source, target)
        shutil.copystat(source, target)


def link_own(source: Path, target: Path) -> bool:
    """Give a regular file of this user a second name, where the file system can; says whether it did."""
    try:
        status = source.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        os.link(source, target)
    except OSError:
        return False
    return True


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
                status = path.stat()
                mode = stat.S_IMODE(status.st_mode)
                if mode | readable != mode:
                    path.chmod(mode | readable)
                # A file with a second name is one of the old folder, flushed when that was published.
                if status.st_nlink == 1:
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


def _move_into_place(temporary: Path, target: Path) -> Path | None:
    """Returns where the folder that was replaced is now, if there was one."""
    try:
        # Also replaces an empty folder, and nothing else: a folder that another process filled
        # in the meantime stays.
        os.rename(temporary, target)
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(temporary, target):
        return temporary
    old = temporary.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    return old


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


def _remove_old(old: Path, target: Path, owned: Owned, carried: Collection[str]) -> None:
    try:
        # What somebody has put there since the rest was carried over.
        late = set(foreign_files(old, owned(old) or ())) - set(carried)
        carry_over(old, target, late, link_or_copy)
        shutil.rmtree(old)
    except OSError as error:
        # The new folder is in place, so the run has succeeded; only disk space is lost.
        logger.warning("the replaced folder is left at %s: %s", old, error.strerror or error)
