"""Files that others wrote, opened only where they are regular files and read only as far as allowed.

A FIFO or a device in a file's place would be waited for or read without end, and a file can be grown to
any size without a byte written. Both are an ``OSError`` here, whose ``strerror`` says so.
"""

from __future__ import annotations

import errno
import os
import stat
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
        if size > most:
            raise OSError(errno.EFBIG, f"larger than the {most} bytes that it may have", str(path))
        # What is written to it meanwhile is left out, so that no more is held than was allowed.
        return file.read(size)
