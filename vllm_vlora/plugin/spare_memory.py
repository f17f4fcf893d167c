"""Memory for the next task that is published from memory, whose pages are there when it comes.

Over half of writing a task into memory that nobody has used is the kernel's finding and clearing of
pages, and a training loop publishes tasks of one size again and again. So from the second of a size on,
the pages of the next are found in a thread while the caller goes on. At its peak that is no more than
without: the next publication needs them beside the task whose place it takes.
"""

from __future__ import annotations

import os
import threading


class SpareMemory:
    """Files in memory without a name, of which one may lie ready."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._ready: int | None = None
        self._size, self._is_repeated = 0, False

    def leave_to_parent(self) -> None:
        """Have nothing of what was there before this process was forked: both would write to it."""
        if self._ready is not None:
            os.close(self._ready)
        self._forget()

    def take(self, size: int) -> int:
        """A file of zeros, the caller's to write and to close, with room for ``size`` bytes where one of
        that size was taken before.
        """
        with self._lock:
            self._is_repeated, self._size = size == self._size, size
            file, self._ready = self._ready, None
        if file is not None and not self._is_repeated:
            os.close(file)
            file = None
        return _new_file() if file is None else file

    def prepare(self) -> threading.Thread | None:
        """Find pages for another file of the size that was taken twice; the thread that does, or None."""
        with self._lock:
            if not self._is_repeated or self._ready is not None:
                return None
            size = self._size
        thread = threading.Thread(
            target=self._find, args=(size,), name="vlora-spare-memory", daemon=True
        )
        thread.start()
        return thread

    def _find(self, size: int) -> None:
        file = _new_file()
        try:
            os.posix_fallocate(file, 0, size)
        except OSError:
            # No room now; the next publication finds it, or says that there is none.
            os.close(file)
            return
        with self._lock:
            if self._ready is None and self._size == size:
                self._ready = file
                return
        os.close(file)


def _new_file() -> int:
    return os.memfd_create("vllm-vlora-task", os.MFD_CLOEXEC)


SPARE_MEMORY = SpareMemory()
"""This process's."""
os.register_at_fork(after_in_child=SPARE_MEMORY.leave_to_parent)
