"""Memory for tasks that are published again and again: what lies ready, for whom, and when not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from vllm_vlora.adapters.state_dicts import read_state_dict
from vllm_vlora.plugin import offers
from vllm_vlora.plugin.spare_memory import SPARE_MEMORY, Memory, SpareMemory

SIZE = 3 * 4096 + 5


MADE: list[Memory] = []


@pytest.fixture(autouse=True)
def close_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    begin = Memory.__init__

    def make(memory: Memory, size: int) -> None:
        begin(memory, size)
        MADE.append(memory)

    monkeypatch.setattr(Memory, "__init__", make)
    yield
    while MADE:
        MADE.pop().close()


def taken(spare: SpareMemory, size: int = SIZE) -> tuple[Memory, bool]:
    """Memory, and whether it lay ready."""
    lay_ready = spare._ready
    memory = spare.take(size)
    found = os.fstat(memory.file)
    # Its pages are there in any case, so that nobody is killed for writing where there is no room.
    assert found.st_size == len(memory.data) == size
    assert found.st_blocks * 512 >= size
    return memory, memory is lay_ready


def done_with(spare: SpareMemory, memory: Memory) -> bool:
    """Whether something lies ready after memory was written, which nobody maps any more."""
    memory.close()
    spare.renew(memory).join()
    assert not hasattr(memory, "data")
    return spare._ready is not None


@pytest.fixture
def spare() -> SpareMemory:
    """One that has something ready."""
    return with_something_ready(SpareMemory())


def with_something_ready(spare: SpareMemory) -> SpareMemory:
    for ready in (False, True):
        memory, found = taken(spare)
        assert not found
        memory.data[:] = ord("x")
        assert done_with(spare, memory) == ready
    return spare


def test_the_third_of_a_size_finds_its_pages_there_and_they_are_empty(spare: SpareMemory) -> None:
    memory, ready = taken(spare)
    assert ready
    assert not memory.data.any()
    # What is written there is what others read.
    memory.data[5] = 7
    assert os.pread(memory.file, 2 * SIZE, 0) == bytes(5) + b"\7" + bytes(SIZE - 6)
    # It is handed out once.
    other, ready = taken(spare)
    assert not ready
    assert not os.path.sameopenfile(memory.file, other.file)


def test_another_size_gets_memory_of_its_own_and_what_was_ready_is_freed(
    spare: SpareMemory,
) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    memory, ready = taken(spare, SIZE + 1)
    assert not ready
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert not done_with(spare, memory)
    assert not taken(spare)[1]


def test_one_is_ready_at_most(spare: SpareMemory) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    found = [taken(spare)[0] for _ in range(3)]
    # Also of those that are found at once.
    threads = [spare.renew(memory) for memory in found]
    for thread in threads:
        thread.join()
    for memory in found:
        memory.close()
    assert len(os.listdir("/proc/self/fd")) == open_before


class _Watched(SpareMemory):
    """Puts down whether what was taken lay ready, and finds the next before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.were_ready: list[bool] = []

    def take(self, size: int) -> Memory:
        lay_ready = self._ready
        memory = super().take(size)
        self.were_ready.append(memory is lay_ready)
        return memory

    def renew(self, memory: Memory) -> threading.Thread:
        thread = super().renew(memory)
        thread.join()
        return thread


def test_a_task_that_is_published_again_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spare = _Watched()
    monkeypatch.setattr(offers, "SPARE_MEMORY", spare)
    for number in range(4):
        a, b = torch.full((2, 5), float(number)), torch.full((3, 2), -float(number))
        state = {"q_proj.lora_A.weight": a, "q_proj.lora_B.weight": b}
        with offers.offered("t", read_state_dict(state, None, 2.0, "here"), None) as offer:
            task = offers.OfferedCheckpoint(offer).load_task("t")
        (stored,) = task.modules.values()
        assert torch.equal(stored.matrices["A"].parts["values"], a)
        assert torch.equal(stored.matrices["B"].parts["values"], b.T)
    assert spare.were_ready == [False, False, True, True]


def test_a_fork_has_none_of_it() -> None:
    with_something_ready(SPARE_MEMORY)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        found = b"nothing"
        with suppress(BaseException):
            found = b"its own" if not taken(SPARE_MEMORY)[1] else b"the parent's"
        os.write(write, found)
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"its own"
    os.close(read)
    assert taken(SPARE_MEMORY)[1]


def test_without_room_there_is_none_ready(
    spare: SpareMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, _ = taken(spare)
    open_before = len(os.listdir("/proc/self/fd"))

    def fail(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert not done_with(spare, memory)
    with pytest.raises(OSError, match="No space left"):
        spare.take(SIZE)
    # Its file, and the one by which it was mapped.
    assert len(os.listdir("/proc/self/fd")) == open_before - 2


def test_a_process_ends_well_while_pages_are_found() -> None:
    program = (
        "from vllm_vlora.plugin.spare_memory import SpareMemory\n"
        "spare = SpareMemory()\n"
        "for _ in range(2):\n"
        "    memory = spare.take(1 << 28)\n"
        "    spare.renew(memory)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr


def test_many_threads_never_get_the_same(spare: SpareMemory) -> None:
    barrier, found = threading.Barrier(4), []

    def publish() -> None:
        barrier.wait()
        for _ in range(50):
            memory = spare.take(SIZE)
            found.append(os.fstat(memory.file).st_ino)
            spare.renew(memory).join()

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(found) == 200
