"""Tasks that are on no disk of a worker's machine yet: who says so, and when they are fetched."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from file_server import FileServer, file_server
from plugin_world import STORED, Store, build, make_path

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from vllm_vlora import downloads
from vllm_vlora.blend_names import Term
from vllm_vlora.checkpoint import sources
from vllm_vlora.checkpoint.manifest import task_file
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.sources import checkpoint_folder
from vllm_vlora.downloads import Parts
from vllm_vlora.errors import (
    CheckpointError,
    CheckpointReplacedError,
    OutputError,
    TaskLoadError,
)
from vllm_vlora.plugin.arrivals import FAR
from vllm_vlora.plugin.blend_paths import blend_path
from vllm_vlora.plugin.far_tasks import FarTasks
from vllm_vlora.plugin.following import State
from vllm_vlora.plugin.identity import TaskPath, parse_task_path, task_path
from vllm_vlora.plugin.manager import TaskLoRAManager
from vllm_vlora.plugin.settings import Budget


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(downloads.OFFLINE_VARIABLE, raising=False)
    monkeypatch.setattr(sources, "_LATER", {})
    build(tmp_path / "ck", STORED)
    with file_server(tmp_path) as served:
        yield served


def take(server: FileServer) -> Checkpoint:
    return Checkpoint.open(checkpoint_folder(f"{server.url}/ck", parts=Parts.TASKS_LATER))


def tasks_asked(server: FileServer) -> set[str]:
    return {name for name in server.asked if name.startswith("ck/tasks/")}


def until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def has_begun(opened: Checkpoint) -> bool:
    """Whether the first bytes of a task are here, and the server keeps the others."""
    contents = opened.path.resolve().parents[1] / "files"
    return any(part.stat().st_size == 10 for part in contents.glob("*.part"))


def test_a_worker_says_what_is_on_no_disk(server: FileServer) -> None:
    opened, far = take(server), FarTasks()
    state, (first, second, *others) = State(opened), STORED
    paths = {task: task_path(opened, task) for task in STORED}
    blend = blend_path(paths, (Term(first, Decimal(1)), Term(second, Decimal(1))))
    half_near = blend_path(paths, (Term(first, Decimal(1)), Term(others[0], Decimal(1))))
    assert all(far.has(state, path) for path in (*paths.values(), blend, half_near))
    assert far.count(state) == len(STORED)
    assert far.count(None) == 0
    assert not far.has(None, paths[first])
    opened.load_task(first)
    assert not far.has(state, paths[first])
    assert far.has(state, blend)
    opened.load_task(second)
    assert not far.has(state, blend), "what it is made of is here"
    assert all(far.has(state, path) for path in (half_near, *(paths[task] for task in others)))
    # Counted again after a while, of which counting takes a small part.
    until(lambda: far.count(state) == len(others))
    for task in others:
        opened.load_task(task)
    until(lambda: far.count(state) == 0)
    assert not far.has(state, half_near)
    # Another state's folder is another count, at once.
    shutil.rmtree(server.folder / "ck")
    build(server.folder / "ck", STORED, seed=1)
    second = State(take(server))
    assert far.count(second) == len(STORED)
    # What is not there to be counted is as it was.
    shutil.rmtree(second.checkpoint.path)
    assert far.count(second) == len(STORED)


def manager_of(opened: Checkpoint) -> Any:
    """A worker's manager that serves a checkpoint and fetches its tasks."""
    store = Store(budget=Budget(device=1 << 20, late=0, host=0)).store
    store.preload(opened.path, make_path)
    manager: Any = TaskLoRAManager.__new__(TaskLoRAManager)
    manager.vlora_store, manager._far = store, FarTasks()
    return manager


def request(path: TaskPath) -> LoRARequest:
    return LoRARequest(path.file, 1, str(path))


def test_a_manager_fetches_only_what_it_is_told_to(server: FileServer) -> None:
    opened = take(server)
    near, far, *_ = STORED
    opened.load_task(near)
    manager = manager_of(opened)
    asked = [request(task_path(opened, task)) for task in (far, near)]
    seen = tasks_asked(server)
    assert manager.bring(asked, 0) == [FAR, True]
    assert tasks_asked(server) == seen
    assert manager.far_tasks() == len(STORED) - 1
    until(lambda: manager.bring(asked, 0, (), [0]) == [True, True])
    assert tasks_asked(server) == seen | {f"ck/{task_file(far)}"}
    # Once it is here it is a task like the others.
    assert manager.bring(asked, 0) == [True, True]
    # Where all was fetched before nothing is looked at.
    manager._far = None
    assert manager.bring(asked, 0) == [True, True]
    assert manager.far_tasks() is None


def test_a_disk_that_cannot_be_asked_is_an_error_of_its_task_alone(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = take(server)
    bad, good, *_ = STORED
    opened.load_task(bad)
    opened.load_task(good)
    manager = manager_of(opened)
    for task in (bad, good):
        manager.vlora_store.forget(str(task_path(opened, task)))
    asked = [request(task_path(opened, task)) for task in (bad, good)]
    file = str(opened.path / task_file(bad))

    def stale(original: Callable[..., Any]) -> Callable[..., Any]:
        def ask(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path) == file:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), file)
            return original(path, *args, **kwargs)

        return ask

    monkeypatch.setattr(os, "stat", stale(os.stat))
    monkeypatch.setattr(os, "open", stale(os.open))
    until(lambda: manager.bring(asked, 0) == [True, True])
    with pytest.raises(CheckpointError, match="Stale file handle"):
        manager.vlora_store.place(task_path(opened, bad))
    assert manager.vlora_store.place(task_path(opened, good)) == 0
    assert tasks_asked(server) == {f"ck/{task_file(task)}" for task in (bad, good)}


def test_whatever_goes_wrong_is_an_error_of_its_task_alone(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = take(server)
    bad, good, *_ = STORED
    opened.load_task(good)
    manager = manager_of(opened)
    asked = [request(task_path(opened, task)) for task in (bad, good)]
    is_far = Checkpoint.is_far

    def fails(self: Checkpoint, task: str) -> bool:
        if task == bad:
            raise RuntimeError("what nobody thought of")
        return is_far(self, task)

    monkeypatch.setattr(Checkpoint, "is_far", fails)
    of_bad, of_good = manager.bring(asked, 0)
    assert isinstance(of_bad.error, TaskLoadError)
    assert "what nobody thought of" in str(of_bad.error)
    assert of_good is True


def test_blends_that_are_fetched_hold_up_no_task_that_is_here(server: FileServer) -> None:
    opened = take(server)
    near, first, second, *_ = STORED
    opened.load_task(near)
    manager, here = manager_of(opened), task_path(opened, near)
    manager.vlora_store.forget(str(here))
    paths = {task: task_path(opened, task) for task in STORED}
    blends = [
        request(blend_path(paths, (Term(first, Decimal(1)), Term(second, Decimal(weight)))))
        for weight in range(1, 9)
    ]
    for task in (first, second):
        server.held[f"ck/{task_file(task)}"] = 10
    assert manager.bring(blends, 0) == [FAR] * 8
    assert manager.bring(blends, 0, (), range(8)) == [False] * 8
    until(lambda: manager.bring([request(here)], 0) == [True])
    assert manager.bring(blends, 0, (), range(8)) == [False] * 8
    server.held.clear()
    server.go_on.set()
    until(lambda: manager.bring(blends, 0, (), range(8)) == [True] * 8)
    for blend in blends:
        assert manager.vlora_store.place(parse_task_path(blend.lora_path)) == 0


def test_what_failed_when_nobody_waited_any_more_is_fetched_again(server: FileServer) -> None:
    opened = take(server)
    task = next(iter(STORED))
    path, file = task_path(opened, task), f"ck/{task_file(task)}"
    store = manager_of(opened).vlora_store
    server.held[file] = 10
    assert store.stage(path, fetched=True) is False
    until(lambda: has_begun(opened))
    store.drop(str(path))
    # The thread that reads it is in the midst of that, and then finds the server broken.
    reading = store._staging[str(path)]
    server.status = 404
    server.go_on.set()
    until(reading.done)
    assert isinstance(reading.exception(), CheckpointError)
    server.status = None
    server.held.clear()
    assert store.stage(path, fetched=True) is False
    until(lambda: store.stage(path, fetched=True))
    assert store.place(path) == 0


def test_who_comes_back_while_it_is_fetched_waits_for_the_same(server: FileServer) -> None:
    opened = take(server)
    task = next(iter(STORED))
    path, file = task_path(opened, task), f"ck/{task_file(task)}"
    store = manager_of(opened).vlora_store
    server.held[file] = 10
    for _ in range(20):
        assert store.stage(path, fetched=True) is False
        until(lambda: has_begun(opened))
        store.drop(str(path))
    assert store.stage(path, fetched=True) is False
    server.held.clear()
    server.go_on.set()
    until(lambda: store.stage(path, fetched=True))
    assert store.place(path) == 0
    # It was cut off once, and taken up where it was.
    assert server.first_bytes(file) == [0, 10]


def test_a_publication_while_a_task_is_fetched(server: FileServer) -> None:
    first = take(server)
    task = "private"  # What stands on other bases waits for them.
    path, file = task_path(first, task), f"ck/{task_file(task)}"
    store = manager_of(first).vlora_store
    server.held[file] = 10
    assert store.stage(path, fetched=True) is False
    until(lambda: has_begun(first))
    shutil.rmtree(server.folder / "ck")
    build(server.folder / "ck", STORED, seed=1)
    second = take(server)
    store.serve(State(second))
    server.held.clear()
    server.go_on.set()
    until(lambda: store.stage(path, fetched=True))
    with pytest.raises(CheckpointReplacedError):
        store.place(path)
    new = task_path(second, task)
    until(lambda: store.stage(new, fetched=True))
    assert store.place(new) == 0
    assert store.held(str(path)) is None


def test_a_full_disk_fails_the_task_that_is_fetched_and_no_other(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = take(server)
    near, far, *_ = STORED
    opened.load_task(near)
    store = manager_of(opened).vlora_store
    path, here = task_path(opened, far), task_path(opened, near)
    store.drop(str(here))
    flush = downloads._flush

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(downloads, "_flush", full)
    until(lambda: store.stage(path, fetched=True))
    with pytest.raises(OutputError, match=r"No space left on device; free space"):
        store.place(path)
    assert store.place(here) == 0
    monkeypatch.setattr(downloads, "_flush", flush)
    until(lambda: store.stage(path, fetched=True))
    assert store.place(path) == 0


def test_where_a_task_is_is_looked_up_once_each_time(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = take(server)
    near, far, *_ = STORED
    opened.load_task(near)
    manager = manager_of(opened)
    looked: list[str] = []
    is_far = Checkpoint.is_far
    monkeypatch.setattr(
        Checkpoint, "is_far", lambda self, task: looked.append(task) or is_far(self, task)
    )
    for task, fetch in ((near, ()), (far, ()), (far, [0])):
        path = task_path(opened, task)
        manager.vlora_store.drop(str(path))
        looked.clear()
        manager.bring([request(path)], 0, (), fetch)
        assert looked == ([] if fetch else [task])
