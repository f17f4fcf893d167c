"""Tasks that are fetched when they are first read, from a URL or from the Hub."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from file_server import FileServer, file_server
from plugin_world import STORED, Store, build, make_path

from vllm_vlora import downloads, snapshots
from vllm_vlora.checkpoint import sources
from vllm_vlora.checkpoint.manifest import FileRef, task_file
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.sources import checkpoint_folder, fetch_task
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.downloads import Parts
from vllm_vlora.errors import CheckpointError, CheckpointReplacedError
from vllm_vlora.plugin import _checkpoint_folder
from vllm_vlora.plugin.following import Follower, State
from vllm_vlora.plugin.identity import task_path
from vllm_vlora.plugin.settings import Budget

COMMIT = "c" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(downloads.OFFLINE_VARIABLE, raising=False)
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(sources, "_LATER", {})
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    build(tmp_path / "ck", STORED)
    with file_server(tmp_path) as served:
        served.key = "S3cr3t"
        yield served


def take(server: FileServer) -> Checkpoint:
    """The checkpoint at the URL, without its tasks."""
    return Checkpoint.open(
        checkpoint_folder(f"{server.url}/ck?sig=S3cr3t", parts=Parts.TASKS_LATER)
    )


def tasks_asked(server: FileServer) -> set[str]:
    return {name for name in server.asked if name.startswith("ck/tasks/")}


def check(opened: Checkpoint, original: Path, task: str) -> None:
    want = Checkpoint.open(original).load_task(task)
    got = opened.load_task(task)
    for name, module in want.modules.items():
        for side, matrix in module.matrices.items():
            for part, tensor in matrix.parts.items():
                assert torch.equal(got.modules[name].matrices[side].parts[part], tensor)


def test_a_task_is_fetched_when_it_is_read_and_once(server: FileServer, cache: Path) -> None:
    opened = take(server)
    assert tasks_asked(server) == set()
    assert dict(opened.bases())
    assert len(opened.tasks) == len(STORED)
    first, second, *_ = STORED
    check(opened, server.folder / "ck", first)
    assert tasks_asked(server) == {f"ck/{task_file(first)}"}
    check(opened, server.folder / "ck", first)
    assert server.asked[f"ck/{task_file(first)}"] == 1
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check(opened, server.folder / "ck", second), range(8)))
    assert server.asked[f"ck/{task_file(second)}"] == 1
    assert "S3cr3t" not in "".join(p.read_text() for p in cache.rglob("url"))
    # Whole, what is here already is not fetched again.
    asked = dict(server.asked)
    whole = Checkpoint.open(f"{server.url}/ck?sig=S3cr3t")
    assert validate(whole.path) == []
    assert server.asked[f"ck/{task_file(first)}"] == asked[f"ck/{task_file(first)}"]
    # And a server that fetches as it is asked takes what is whole.
    assert take(server).path == whole.path


def test_a_process_that_wants_all_takes_no_part(server: FileServer) -> None:
    part = take(server)
    assert Checkpoint.open(f"{server.url}/ck?sig=S3cr3t").path != part.path
    sources._LATER.clear()
    with pytest.raises(CheckpointError, match="the file is missing"):
        part.load_task(next(iter(STORED)))


def test_what_cannot_be_fetched_says_why(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = take(server)
    first, second, third, *_ = STORED
    monkeypatch.setenv(downloads.OFFLINE_VARIABLE, "1")
    with pytest.raises(CheckpointError, match="VLLM_VLORA_OFFLINE is set: unset it"):
        opened.load_task(first)
    monkeypatch.delenv(downloads.OFFLINE_VARIABLE)
    server.status = 503
    with pytest.raises(CheckpointError, match="answers with 503") as caught:
        opened.load_task(first)
    assert "S3cr3t" not in str(caught.value)
    server.status = None
    check(opened, server.folder / "ck", first)
    # A part that came is not asked for again.
    name = f"ck/{task_file(second)}"
    server.cut[name] = [100]
    check(opened, server.folder / "ck", second)
    assert server.first_bytes(name) == [0, 100]
    # Another state at the URL: the API server asks for the newest one.
    file = server.folder / "ck" / task_file(third)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointReplacedError, match="was it replaced"):
        opened.load_task(third)


def test_cleaning_keeps_what_servers_fetch_into(server: FileServer, cache: Path) -> None:
    old = take(server)
    old.load_task(next(iter(STORED)))
    shutil.rmtree(server.folder / "ck")
    build(server.folder / "ck", STORED, seed=1)
    new = take(server)
    assert new.path != old.path
    new.load_task(next(iter(STORED)))
    (entry,) = downloads.cache_entries()
    assert entry.states == 2
    assert downloads.clean(entry, keep_newest=True) > 0
    assert not old.path.exists()
    for task in STORED:
        check(new, server.folder / "ck", task)


def test_the_hub_is_asked_for_files_of_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    original = build(tmp_path / "repository" / "inner", STORED).path
    cached = tmp_path / "hub" / "models--org--many" / "snapshots" / COMMIT
    asked: list[tuple[str, str, str]] = []

    def snapshot_download(repo: str, *, revision: Any, allow_patterns: Any, **more: Any) -> str:
        assert (repo, allow_patterns) == ("org/many", ["inner/*"])
        if more == {"ignore_patterns": ["inner/tasks/*"]}:
            shutil.copytree(original, cached / "inner", ignore=shutil.ignore_patterns("tasks"))
        return str(cached)

    def hf_hub_download(repo: str, filename: str, *, revision: str) -> str:
        asked.append((repo, filename, revision))
        if filename.endswith("bad.safetensors"):
            raise OSError(28, "No space left on device")
        target = cached / filename
        assert target.parent.is_dir(), "the folder would look replaced"
        shutil.copyfile(tmp_path / "repository" / filename, target)
        return str(target)

    monkeypatch.setattr(snapshots.huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(snapshots.huggingface_hub, "hf_hub_download", hf_hub_download)
    folder = checkpoint_folder("org/many/inner", parts=Parts.TASKS_LATER)
    opened = Checkpoint.open(folder)
    for task in list(STORED)[:2]:
        check(opened, original, task)
        check(opened, original, task)
    assert asked == [("org/many", f"inner/{task_file(t)}", COMMIT) for t in list(STORED)[:2]]
    bad = FileRef("tasks/bad.safetensors", "0" * 64, 1)
    far = opened.far_tasks()
    assert far == {*list(STORED)[2:]} == {task for task in opened.tasks if opened.is_far(task)}
    assert opened.count_far() == len(far)
    with pytest.raises(CheckpointError, match="the disk of the Hub cache is full"):
        fetch_task(folder, bad)
    whole = Checkpoint.open(original)
    (whole.path / task_file(next(iter(STORED)))).unlink()
    assert whole.far_tasks() == set()
    assert whole.count_far() == 0
    assert not whole.is_far(next(iter(STORED)))


def test_where_not_even_the_folder_of_tasks_is_all_of_them_are_far(server: FileServer) -> None:
    opened = take(server)
    # Of a cache that is only read, as a container may have it.
    (opened.path / "tasks").rmdir()
    assert opened.far_tasks() == set(STORED)
    assert opened.count_far() == len(STORED)
    store = Store(budget=Budget(device=1 << 20, late=0, host=0)).store
    store.preload(opened.path, make_path)
    assert len(store) == 0


def test_what_was_fetched_whole_is_not_far_where_another_was_taken_without_its_tasks(
    server: FileServer,
) -> None:
    """Two engines in one process, of which the second is told otherwise."""
    assert take(server).far_tasks() == set(STORED)
    whole = Checkpoint.open(checkpoint_folder(f"{server.url}/ck?sig=S3cr3t"))
    assert whole.far_tasks() == set()
    asked, task = tasks_asked(server), next(iter(STORED))
    (whole.path / task_file(task)).unlink()
    assert not whole.is_far(task)
    with pytest.raises(CheckpointError, match="the file is missing"):
        whole.load_task(task)
    assert tasks_asked(server) == asked
    # What is here whole is taken where less would do.
    assert take(server).path == whole.path


def test_the_first_process_and_those_it_starts_take_the_same_part(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", f"{server.url}/ck?sig=S3cr3t")
    folder = _checkpoint_folder(parts=Parts.TASKS_LATER)
    assert folder is not None
    assert tasks_asked(server) == set()
    server.status = 503
    assert _checkpoint_folder(parts=Parts.TASKS_LATER) == folder


# --- a worker -------------------------------------------------------------------------------------


def test_a_worker_brings_far_tasks_and_near_ones_do_not_wait_for_them(server: FileServer) -> None:
    opened = take(server)
    near, far, *others = STORED
    opened.load_task(near)
    store = Store(budget=Budget(device=1 << 20, late=0, host=0)).store
    store.preload(opened.path, make_path)
    # What they take is taken at the start, as others' is.
    assert 0 < store.arena_used < store.arena_nbytes <= 1 << 20
    assert [task.task_id for task in store.tasks()] == [near]
    assert tasks_asked(server) == {f"ck/{task_file(near)}"}
    # As many as there are threads that read what is here, and more.
    for task in (far, *others[:2]):
        server.held[f"ck/{task_file(task)}"] = 10
        assert store.stage(task_path(opened, task), fetched=True) is False
    store.forget(str(task_path(opened, near)))
    deadline = time.monotonic() + 30
    while not store.stage(task_path(opened, near)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert store.place(task_path(opened, near)) == 0
    assert store.stage(task_path(opened, far)) is False
    server.held.clear()
    server.go_on.set()
    for task in STORED:
        assert store.task(task_path(opened, task)).task_id == task
    assert tasks_asked(server) == {f"ck/{task_file(task)}" for task in STORED}


def test_a_state_is_followed_without_its_tasks(server: FileServer) -> None:
    first = take(server)
    follower = Follower(first.path, State(first), lambda *_: None, sources.logger)
    shutil.rmtree(server.folder / "ck")
    build(server.folder / "ck", STORED, seed=1)
    second = take(server)
    asked = tasks_asked(server)
    found = follower.sound_state(second.path)
    assert found.digest == second.content_digest
    assert tasks_asked(server) == asked
    barrier = threading.Barrier(2)

    def read(task: str) -> None:
        barrier.wait(30)
        check(found.checkpoint, server.folder / "ck", task)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, list(STORED)[:2]))
