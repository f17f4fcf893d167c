"""Files that others wrote, opened only where they are regular files and read only as far as allowed.

A FIFO or a device in a file's place would be waited for or read without end, and a file can be grown to
any size without a byte written. Both are an ``OSError`` here, whose ``strerror`` says so.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

JSON_BYTES = 256 << 20
"""The most that is read of a file of JSON whose size nothing else says."""
TEXT_BYTES = 4 << 30
"""The most that is read of a file of text."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is a FIFO, a device, a socket or a folder.
    """
    # Opening a FIFO without O_NONBLOCK waits for a writer; regular files do not know the flag.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(number, "not a regular file", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def size_of(file: BinaryIO) -> int:
    """Bytes of an opened file."""
    return os.fstat(file.fileno()).st_size


def read_regular(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file that has at most ``most``.

    Raises:
        OSError: as :func:`open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        size = size_of(file)
        _check_size(size, most, path)
        # What is written to it meanwhile is left out, so that no more is held than was allowed.
        return file.read(size)


def copy_regular(source: str | Path, target: str | Path, most: int | None = None) -> None:
    """Copy the bytes of a regular file to a new one; holes stay holes.

    A file can be grown to any size without a byte written: its copy takes no more room than it does.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: as :func:`open_regular`, it is larger or was cut meanwhile, or the copy cannot be
            written.
    """
    with open_regular(source) as file, open(target, "xb") as copy:
        size = size_of(file)
        _check_size(size, most, source)
        for start, end in _written(file.fileno(), size):
            copy.seek(start)
            while start < end:
                sent = os.sendfile(copy.fileno(), file.fileno(), start, end - start)
                if not sent:
                    raise OSError(errno.EIO, "was cut while it was copied", os.fspath(source))
                start += sent
        copy.truncate(size)


def _written(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are no holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        yield start, end


def _check_size(size: int, most: int | None, path: str | Path) -> None:
    if most is not None and size > most:
        raise OSError(
            errno.EFBIG, f"larger than the {most} bytes that it may have", os.fspath(path)
        )
