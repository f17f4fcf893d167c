"""A URL or a Hub branch that is asked what it has now: what is followed of it, and what is said."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from file_server import FileServer, file_server
from plugin_world import TASKS, build

from vllm_vlora import downloads
from vllm_vlora.checkpoint import newest
from vllm_vlora.checkpoint.manifest import CONFIG_FILE
from vllm_vlora.checkpoint.newest import state_of
from vllm_vlora.checkpoint.pinning import pinned
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.editing.aliasing import set_alias
from vllm_vlora.errors import ModelMismatchError, SettingError
from vllm_vlora.plugin import _checkpoint_folder
from vllm_vlora.plugin.following import Follower, State
from vllm_vlora.plugin.polling import POLLED_VARIABLE, Poller

LOG = logging.getLogger("polling")
MORE = {**TASKS, "new": {"v": ("private", 2)}}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv(downloads.OFFLINE_VARIABLE, raising=False)
    # Set here so that what the code under test sets is taken back.
    monkeypatch.setenv(POLLED_VARIABLE, "")


class Worker:
    """What a worker has of it."""

    def __init__(self, folder: str, where: str) -> None:
        self.refused: list[str] = []
        self.cannot_take = ""
        self.follower = Follower(folder, State(Checkpoint.open(folder)), self._check, LOG)
        self.poller = Poller(
            where, 1, self.follower.sound_state, lambda e: self.refused.append(str(e)), LOG
        )

    def _check(self, checkpoint: Checkpoint, tasks: Collection[str]) -> None:
        if self.cannot_take in tasks:
            raise ModelMismatchError(f"{self.cannot_take} does not fit")

    def look(self) -> str:
        """The state that is offered after a question and a look."""
        _let_time_pass()
        self.poller.look()
        self.follower.look()
        return self.follower._offered.digest


def _let_time_pass() -> None:
    for link in (downloads.cache_folder() / "followed").iterdir():
        os.utime(link, (0, 0), follow_symlinks=False)


class World:
    """A web server of a checkpoint, and an engine's first process that was given its URL."""

    def __init__(self, root: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.server = root, server
        self.url, self.place = f"{server.url}/ck", server.folder / "ck"
        self.first = build(self.place).content_digest
        monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", self.url)
        self.folder = self.start()

    def start(self) -> str:
        """What a process of the engine serves."""
        folder = _checkpoint_folder(poll_seconds=1)
        assert folder is not None
        return folder

    def publish(self, tasks: dict = MORE, seed: int = 0) -> str:
        shutil.rmtree(self.place)
        return build(self.place, tasks, seed=seed).content_digest


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "served").mkdir()
    with file_server(tmp_path / "served") as server:
        yield World(tmp_path, server, monkeypatch)


def test_a_clock_that_was_set_back_does_not_end_the_asking(world: World) -> None:
    worker = Worker(world.folder, world.url)
    second = world.publish()
    link = Path(world.folder)
    ahead = time.time() + 3600
    os.utime(link, (ahead, ahead), follow_symlinks=False)
    worker.poller.look()
    assert state_of(link) is not None
    assert Checkpoint.open(link).content_digest == second


def test_a_new_state_at_the_url_takes_the_followed_folders_place(world: World) -> None:
    worker = Worker(world.folder, world.url)
    assert worker.look() == world.first
    before = worker.follower.served.paths
    second = world.publish()
    assert worker.look() == second != world.first
    assert worker.follower.adopt(second)
    now = worker.follower.served.paths
    assert now.keys() == MORE.keys()
    assert {task: now[task] for task in before} == before, "what did not change has its name still"
    assert Checkpoint.open(world.folder).load_task("new").modules
    set_alias(world.place, "prod", "new")
    third = worker.look()
    assert third == Checkpoint.open(world.place).content_digest != second


def test_nothing_but_the_manifest_is_asked_for_while_nothing_changes(world: World) -> None:
    worker = Worker(world.folder, world.url)
    state = state_of(Path(world.folder))
    assert state is not None
    stamp = state.stat().st_ctime_ns
    world.server.asked.clear()
    for _ in range(3):
        assert worker.look() == world.first
    beside = {"ck/attachments.json", "ck/aliases.json", "ck/router.json"}
    assert set(world.server.asked) == {f"ck/{CONFIG_FILE}", *beside}
    assert state.stat().st_ctime_ns == stamp, "who reads a state would take it for another"


def test_one_of_many_workers_asks_for_all(world: World) -> None:
    workers = [Worker(world.folder, world.url) for _ in range(4)]
    second = world.publish()
    _let_time_pass()
    world.server.asked.clear()
    threads = [threading.Thread(target=worker.poller.look) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.server.asked[f"ck/{CONFIG_FILE}"] == 1
    for worker in workers:
        worker.follower.look()
        assert worker.follower._offered.digest == second


def test_it_asks_by_itself(world: World) -> None:
    worker = Worker(world.folder, world.url)
    second = world.publish()
    worker.poller.start()
    deadline = time.monotonic() + 20
    while Checkpoint.open(world.folder).content_digest != second:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker.poller.close()


@pytest.mark.parametrize(
    ("status", "said"), [(503, "answers with 503"), (403, "is denied"), (404, "is not there")]
)
def test_what_cannot_be_had_is_said_once_and_the_state_stays(
    world: World, status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(world.folder, world.url)
    world.server.status = status
    for _ in range(3):
        assert worker.look() == world.first
    (line,) = caplog.messages
    assert line.startswith("vllm-vlora: the state that is served stays: checkpoint 'http://")
    assert said in line
    assert len(worker.refused) == 1
    world.server.status = None
    second = world.publish()
    assert worker.look() == second


def test_a_connection_that_ends_before_the_manifest_is_said_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(world.folder, world.url)
    world.server.cut[f"ck/{CONFIG_FILE}"] = [10] * 20
    for _ in range(2):
        assert worker.look() == world.first
    (line,) = caplog.messages
    assert "cannot be reached" in line


def test_what_the_model_cannot_take_is_not_followed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(world.folder, world.url)
    state = state_of(Path(world.folder))
    worker.cannot_take = "new"
    world.publish()
    for _ in range(3):
        assert worker.look() == world.first
    assert len(caplog.messages) == len(worker.refused) == 1
    assert state_of(Path(world.folder)) == state, "its tasks are read from where they were"
    third = world.publish({"one": TASKS["one"]}, seed=3)
    assert worker.look() == third


def test_the_state_that_is_followed_is_not_cleaned_away(world: World) -> None:
    worker = Worker(world.folder, world.url)
    old = state_of(Path(world.folder))
    assert old is not None
    world.publish({"one": TASKS["one"]}, seed=1)
    middle = worker.look()
    worker.cannot_take = "new"
    world.publish()
    worker.look()
    (entry,) = downloads.cache_entries()
    assert entry.states == 3
    downloads.clean(entry, keep_newest=True)
    served = state_of(Path(world.folder))
    assert served is not None
    assert (served.name, old.exists()) == (middle, False)
    assert Checkpoint.open(world.folder).load_task("one").modules


def test_what_is_damaged_is_fetched_by_nobody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(world.folder, world.url)
    second = world.publish()
    file = world.place / "tasks" / "new.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[::-1])
    assert worker.look() == world.first
    assert "another SHA-256" in caplog.messages[0]
    file.write_bytes(sound)
    assert worker.look() == second


def test_a_connection_that_is_cut_goes_on_where_it_was(world: World) -> None:
    worker = Worker(world.folder, world.url)
    second = world.publish()
    name = "ck/tasks/new.safetensors"
    size = (world.server.folder / name).stat().st_size
    world.server.cut[name] = [size // 2, *[0] * 5]
    assert worker.look() == world.first
    world.server.cut.clear()
    world.server.begun.clear()
    assert worker.look() == second
    assert world.server.first_bytes(name) == [size // 2]


def test_a_full_disk_under_the_cache_is_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(world.folder, world.url)
    second = world.publish()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(downloads, "_flush", full)
        for _ in range(2):
            assert worker.look() == world.first
    (line,) = caplog.messages
    assert "No space left on device" in line
    assert "set VLLM_VLORA_CACHE to another folder" in line
    assert worker.look() == second


def test_processes_that_start_later_follow_the_same_folder(world: World) -> None:
    assert world.start() == world.folder
    fixed = os.environ["VLLM_VLORA_CHECKPOINT"]
    assert fixed == pinned(world.url, world.first)
    # On another machine, whose cache has nothing: asked for, it has the newest; else the first.
    downloads.followed_folder(world.url).unlink()
    second = world.publish()
    assert Checkpoint.open(world.start()).content_digest == second
    downloads.followed_folder(world.url).unlink()
    world.server.status = 503
    assert Checkpoint.open(world.start()).content_digest == world.first
    # Another reference in the same process has nothing to do with it.
    os.environ["VLLM_VLORA_CHECKPOINT"] = str(world.place)
    with pytest.raises(SettingError, match="VLLM_VLORA_POLL_SECONDS is for a branch"):
        world.start()


def test_a_key_in_the_url_is_in_no_name_and_no_message(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{world.url}?sig=S3cr3t"
    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", url)
    world.server.key = "sig=S3cr3t"
    folder = world.start()
    assert folder == world.folder
    worker = Worker(folder, url)
    second = world.publish()
    assert worker.look() == second
    world.server.key = "another"
    worker.look()
    assert "is denied" in caplog.messages[0]
    assert not any("S3cr3t" in text for text in (*caplog.messages, folder))


@pytest.mark.parametrize("ref", ["org/tasks@" + "a" * 40, "s3://bucket/ck@sha256:" + "b" * 64])
def test_what_never_changes_is_not_asked(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", ref)
    # Whatever it is found to be.
    monkeypatch.setattr(
        "vllm_vlora.checkpoint.sources.checkpoint_folder",
        lambda *_, **__: build(tmp_path / "ck").path,
    )
    with pytest.raises(SettingError, match="without a digest; unset it"):
        _checkpoint_folder(poll_seconds=1)


class Hub:
    """A repository whose branch has one commit after another, each a folder as the Hub's cache has it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "models--org--tasks" / "snapshots"
        self.commit, self.down = "", False
        self.fetched: list[str] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", self._info)

    def publish(self, digit: str, tasks: dict, seed: int = 0) -> str:
        self.commit = digit * 40
        self.root.mkdir(parents=True, exist_ok=True)
        return build(self.root / self.commit, tasks, seed=seed).content_digest

    def _download(self, repo: str, *, revision: str | None, allow_patterns: object) -> str:
        assert repo == "org/tasks"
        commit = self.commit if revision in (None, "main") else str(revision)
        self.fetched.append(commit)
        return str(self.root / commit)

    def _info(self, repo: str, *, revision: str | None) -> SimpleNamespace:
        assert (repo, revision) == ("org/tasks", "main")
        if self.down:
            raise ConnectionError("no route to host\nat line 3")
        return SimpleNamespace(sha=self.commit)


def test_a_branch_on_the_hub_is_asked_for_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = Hub(tmp_path, monkeypatch)
    first = hub.publish("1", TASKS)
    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", "org/tasks@main")
    folder = _checkpoint_folder(poll_seconds=1)
    assert folder is not None
    assert os.environ["VLLM_VLORA_CHECKPOINT"] == "org/tasks@" + "1" * 40
    assert json.loads(os.environ[POLLED_VARIABLE])[1] == "org/tasks@main"
    assert _checkpoint_folder(poll_seconds=1) == folder
    worker = Worker(folder, "org/tasks@main")
    hub.fetched.clear()
    assert worker.look() == first
    assert hub.fetched == []
    hub.down = True
    for _ in range(2):
        assert worker.look() == first
    (line,) = caplog.messages
    assert "ConnectionError: no route to host" in line
    assert "\n" not in line
    hub.down = False
    second = hub.publish("2", MORE)
    assert worker.look() == second
    assert hub.fetched == ["2" * 40]


def test_only_looks_are_dated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that starts between two questions does not ask at once, and one that is late does."""
    asked: list[str] = []
    monkeypatch.setattr(
        newest, "newest_folder", lambda where, before, parts: asked.append(where) or before
    )
    worker = Worker(world.folder, world.url)
    worker.poller.look()
    assert asked == []
    _let_time_pass()
    worker.poller.look()
    worker.poller.look()
    assert asked == [world.url]
