"""Memory for tasks that are published from memory, whose pages are there when the next one comes.

Most of writing a task into memory that nobody has used is the kernel's finding, clearing and mapping of
pages, and a training loop publishes tasks of one size again and again. So from the second of a size on,
the pages of the next are found in a thread while the caller goes on. At its peak that is no more than
without: the next publication needs them beside the task whose place it takes.
"""

from __future__ import annotations

import mmap
import os
import threading

import torch


class Memory:
    """A file in memory without a name, and its bytes as this process writes them.

    Attributes:
        file: its descriptor, by which others map it; -1 once it is closed.
        data: (size,) uint8, zeros at first; mapped as long as it or a view of it is there.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, size: int) -> None:
        self.file = os.memfd_create("vllm-vlora-task", os.MFD_CLOEXEC)
        try:
            # It says where there is no room; who writes to what is mapped would be killed.
            os.posix_fallocate(self.file, 0, size)
            self.data = torch.frombuffer(mmap.mmap(self.file, size), dtype=torch.uint8)
        except BaseException:
            os.close(self.file)
            raise

    def touch(self) -> None:
        """Map all pages now; other threads go on."""
        self.data[:: mmap.PAGESIZE].zero_()

    def unmap(self) -> None:
        """Let go of ``data``; whoever else has mapped the file keeps it."""
        del self.data

    def close(self) -> None:
        """Let go of the file; nothing where that was done."""
        file, self.file = self.file, -1
        if file >= 0:
            os.close(file)


class SpareMemory:
    """Makes memory, of which one may lie ready."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._ready: Memory | None = None
        self._size, self._is_repeated = 0, False

    def leave_to_parent(self) -> None:
        """Have nothing of what was there before this process was forked: both would write to it."""
        if self._ready is not None:
            _free(self._ready)
        self._forget()

    def take(self, size: int) -> Memory:
        """Memory of this size, the caller's to write and to close.

        Raises:
            OSError: there is no room for it.
        """
        with self._lock:
            self._is_repeated, self._size = size == self._size, size
            memory, self._ready = self._ready, None
        if memory is not None and not self._is_repeated:
            _free(memory)
            memory = None
        return Memory(size) if memory is None else memory

    def renew(self, memory: Memory) -> threading.Thread:
        """Unmap what nobody writes any more; then find pages for another of a size that was taken twice.

        Returns:
            The thread that does: for 84 MB it takes 10 ms, and then 80.
        """
        # No daemon: a process that ends while one is in torch is aborted.
        thread = threading.Thread(target=self._renew, args=(memory,), name="vlora-spare-memory")
        thread.start()
        return thread

    def _renew(self, memory: Memory) -> None:
        memory.unmap()
        with self._lock:
            size = self._size
            if not self._is_repeated or self._ready is not None:
                return
        try:
            found = Memory(size)
            found.touch()
        except OSError:
            # No room now; the next publication finds it, or says that there is none.
            return
        with self._lock:
            if self._ready is None and self._size == size:
                self._ready = found
                return
        _free(found)


def _free(memory: Memory) -> None:
    memory.unmap()
    memory.close()


SPARE_MEMORY = SpareMemory()
"""This process's."""
os.register_at_fork(after_in_child=SPARE_MEMORY.leave_to_parent)
