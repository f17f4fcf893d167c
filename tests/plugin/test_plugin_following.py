"""What is published into a folder: what is offered of it, what is refused, and what is said."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from plugin_world import STORED, TASKS, Store, build, make_path

from vllm_vlora.checkpoint.manifest import CONFIG_FILE
from vllm_vlora.checkpoint.pinning import pinned
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import CheckpointError, ModelMismatchError
from vllm_vlora.plugin import following
from vllm_vlora.plugin.following import Follower, State
from vllm_vlora.plugin.identity import task_path

LOG = logging.getLogger("following")


class World:
    """A folder that is followed."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "ck"
        self.first = build(self.folder)
        self.checked: list[list[str]] = []
        self.cannot_take = ""
        self.follower = Follower(self.folder, State(self.first), self._check, LOG)

    def _check(self, checkpoint: Checkpoint, tasks: Collection[str]) -> None:
        self.checked.append(sorted(tasks))
        if self.cannot_take in tasks:
            raise ModelMismatchError(f"{self.cannot_take} does not fit")

    def publish(self, folder: Path) -> None:
        """Exchange the folder, as publishing does."""
        self.folder.rename(self.root / f"old {time.monotonic_ns()}")
        folder.rename(self.folder)

    def look(self) -> str:
        """The state that is offered after a look."""
        self.follower.look()
        return self.follower._offered.digest


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_published_state_is_offered_and_served_when_it_is_adopted(world: World) -> None:
    first = world.first.content_digest
    assert world.look() == first
    later = build(world.root / "next", STORED, seed=1)
    paths = {str(task_path(later, "one")).replace("/next/", "/ck/")}
    world.publish(later.path)
    second = world.look()
    assert second == later.content_digest != first
    assert world.checked == [sorted(STORED)]
    assert world.follower.served.digest == first
    assert not world.follower.adopt(first)
    assert world.follower.adopt(second)
    assert world.follower.served.digest == second
    assert paths <= world.follower.served.tasks.keys()
    assert list(world.follower.served.paths) == list(STORED)


def test_tasks_that_did_not_change_are_neither_checked_nor_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = following.read_checked
    monkeypatch.setattr(
        following, "read_checked", lambda path, ref: read.append(ref.file) or original(path, ref)
    )
    more = {**TASKS, "new": {"v": ("private", 2)}}
    world.publish(build(world.root / "next", more).path)
    assert world.look() != world.first.content_digest
    assert world.checked == [["new"]]
    assert read == ["tasks/new.safetensors"]
    monkeypatch.setattr(following, "READ_NBYTES", 0)
    even_more = {**more, "newer": {"v": ("private", 2)}}
    later = build(world.root / "third", even_more)
    (later.path / "tasks" / "newer.safetensors").write_bytes(b"short")
    world.publish(later.path)
    world.look()
    assert read == ["tasks/new.safetensors"]
    assert "5 bytes, the manifest says" in world.follower._said


def _nothing(world: World) -> None:
    world.folder.rename(world.root / "away")


def _half(world: World) -> None:
    (world.folder / "tasks.json").write_bytes(b"{}")
    (world.folder / CONFIG_FILE).touch()


def _damaged(world: World) -> None:
    later = build(world.root / "next", {**TASKS, "new": {"v": ("private", 2)}})
    file = later.path / "tasks" / "new.safetensors"
    file.write_bytes(file.read_bytes()[::-1])
    world.publish(later.path)


def _no_json(world: World) -> None:
    (world.folder / CONFIG_FILE).write_text("no")


def _another_model(world: World) -> None:
    world.cannot_take = "one"
    world.publish(build(world.root / "next", seed=2).path)


@pytest.mark.parametrize("change", [_nothing, _half, _damaged, _no_json, _another_model])
def test_what_is_wrong_is_said_once_and_what_is_served_stays(
    world: World, change: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_TRY_AGAIN", 0.0)
    first = world.look()
    kept = world.root / "kept"
    shutil.copytree(world.folder, kept)
    change(world)  # type: ignore[operator]
    for _ in range(3):
        assert world.look() == first
    assert len(caplog.messages) == 1
    assert "what was published is not served, the state before it is: " in caplog.messages[0]
    # What takes its place is offered.
    world.cannot_take = ""
    if world.folder.exists():
        world.folder.rename(world.root / "wrong")
    later = build(world.root / "right", {"one": TASKS["one"]}, seed=3)
    later.path.rename(world.folder)
    assert world.look() == later.content_digest


def test_what_was_refused_is_read_the_seldomer_the_longer_it_is_as_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, read = [1000.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    world.look()
    missing = world.folder / "tasks" / "later.safetensors"
    later = build(world.root / "next", {"later": TASKS["one"]}, seed=1)
    world.publish(later.path)
    kept = missing.read_bytes()
    missing.unlink()
    original = world.follower.sound_state
    monkeypatch.setattr(
        world.follower, "sound_state", lambda folder: read.append(now[0]) or original(folder)
    )
    for _ in range(4 * 3600):
        now[0] += 0.25
        assert world.look() == world.first.content_digest
    apart = [later - before for before, later in itertools.pairwise(read)]
    assert apart == sorted(apart)
    assert (apart[0], apart[-1]) == (2, 30)
    assert len(read) < 160
    # A file that was late is found, and what is published at once.
    missing.write_bytes(kept)
    now[0] += 30
    assert world.look() == later.content_digest
    assert world.follower.state().refused == ""


def test_a_folder_that_comes_back_is_the_state_that_is_served(world: World) -> None:
    first = world.look()
    world.publish(build(world.root / "next", seed=1).path)
    assert world.look() != first
    again = world.root / "again"
    build(again)
    world.publish(again)
    assert world.look() == first
    assert world.follower._offered is world.follower.served


def test_a_pinned_checkpoint_is_not_followed(world: World) -> None:
    reference = pinned(world.folder, world.first.content_digest)
    follower = Follower(reference, State(world.first), world._check, LOG)
    assert follower.state().offered == world.first.content_digest
    assert follower._thread is None


def test_it_looks_by_itself_once_somebody_asks(world: World) -> None:
    assert world.follower._thread is None
    assert world.follower.state().offered == world.first.content_digest
    later = build(world.root / "next", seed=1)
    digest = later.content_digest
    world.publish(later.path)
    deadline = time.monotonic() + 20
    while world.follower.state().offered != digest:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    world.follower.close()


def test_a_store_serves_what_was_adopted_beside_what_it_holds(world: World) -> None:
    store = Store().store
    store.preload(world.folder, make_path)
    assert store.state is not None
    follower = Follower(world.folder, store.state, store.check, LOG)
    old = {name: task_path(world.first, name) for name in TASKS}
    store.forget(str(old["mixed"]))
    # "one" and "private" stay as they are, though the rest changes.
    same = {name: TASKS[name] for name in ("one",)}
    world.publish(build(world.root / "next", same, seed=7).path)
    follower.look()
    assert follower.adopt(follower.state().offered)
    follower.close()
    store.serve(follower.served)
    ((name, path),) = store.served()
    assert name == "one"
    assert store.held(str(old["joint"])) is not None, "requests in flight keep their weights"
    new = store.task(task_path(Checkpoint.open(world.folder), "one"))
    assert new.path == path != str(old["one"])
    with pytest.raises(CheckpointError):
        store.task(old["mixed"])
