"""Memory for tasks that are published again and again: what lies ready, for whom, and when not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from vllm_vlora.adapters.state_dicts import read_state_dict
from vllm_vlora.plugin import offers
from vllm_vlora.plugin.spare_memory import SPARE_MEMORY, SpareMemory

SIZE = 3 * 4096 + 5


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    yield
    for file in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # The listing's own, which is closed by now.
            if os.readlink(f"/proc/self/fd/{file}").startswith("/memfd:vllm-vlora-task"):
                os.close(int(file))


def taken(spare: SpareMemory, size: int = SIZE) -> tuple[int, bool]:
    """A file, and whether its pages are there already."""
    file = spare.take(size)
    found = os.fstat(file)
    ready = found.st_blocks * 512 >= size
    assert found.st_size == (size if ready else 0)
    return file, ready


def prepare(spare: SpareMemory) -> bool:
    """Whether there was something to prepare, which is done."""
    thread = spare.prepare()
    if thread is not None:
        thread.join()
    return thread is not None


@pytest.fixture
def spare() -> SpareMemory:
    """One that has something ready."""
    return with_something_ready(SpareMemory())


def with_something_ready(spare: SpareMemory) -> SpareMemory:
    for ready in (False, True):
        file, found = taken(spare)
        assert not found
        os.pwrite(file, b"x" * SIZE, 0)
        os.close(file)
        assert prepare(spare) == ready
    return spare


def test_the_third_of_a_size_finds_its_pages_there_and_they_are_empty(spare: SpareMemory) -> None:
    file, ready = taken(spare)
    assert ready
    assert os.pread(file, 2 * SIZE, 0) == bytes(SIZE)
    # It is handed out once.
    other, ready = taken(spare)
    assert not ready
    assert not os.path.sameopenfile(file, other)


def test_another_size_gets_memory_of_its_own_and_what_was_ready_is_freed(
    spare: SpareMemory,
) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    file, ready = taken(spare, SIZE + 1)
    assert not ready
    assert len(os.listdir("/proc/self/fd")) == open_before
    os.close(file)
    assert not prepare(spare)
    assert not taken(spare)[1]


def test_one_is_ready_at_most(spare: SpareMemory) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    assert not prepare(spare)
    # Also of two that are found at once.
    taken(spare)
    threads = [spare.prepare() for _ in range(3)]
    for thread in filter(None, threads):
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == open_before + 1


class _Watched(SpareMemory):
    """Puts down whether what was taken lay ready, and finds the next before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.were_ready: list[bool] = []

    def take(self, size: int) -> int:
        file = super().take(size)
        self.were_ready.append(os.fstat(file).st_blocks > 0)
        return file

    def prepare(self) -> None:
        if (thread := super().prepare()) is not None:
            thread.join()


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


def test_without_room_there_is_none_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    spare = SpareMemory()
    for _ in range(3):
        open_before = len(os.listdir("/proc/self/fd"))
        file, ready = taken(spare)
        assert not ready
        os.close(file)
        prepare(spare)
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_many_threads_never_get_the_same(spare: SpareMemory) -> None:
    barrier, found = threading.Barrier(4), []

    def publish() -> None:
        barrier.wait()
        for _ in range(50):
            file = spare.take(SIZE)
            found.append(os.fstat(file).st_ino)
            prepare(spare)

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(found) == 200
