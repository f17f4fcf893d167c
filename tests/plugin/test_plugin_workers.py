"""What an engine core asks its workers about the state that they serve, and when it need not."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_world import build
from residency_world import Executor

from vllm_vlora.plugin.following import Follower, State
from vllm_vlora.plugin.workers import States, Workers


class World:
    """Workers with real followers of a real folder, which look when they are told to."""

    def __init__(self, folder: Path, count: int = 2, pin: str = "") -> None:
        self.folder = folder
        self.first = build(folder)
        reference = f"{folder}@sha256:{self.first.content_digest}" if pin else folder
        self.followers = [
            Follower(reference, State(self.first), lambda *_: None, logging.getLogger("test"))
            for _ in range(count)
        ]
        for follower in self.followers:
            # No thread of its own.
            follower._thread = SimpleNamespace(join=lambda: None)  # type: ignore[assignment]
        self.executor = Executor(
            [SimpleNamespace(state=f.state, adopt=f.adopt) for f in self.followers]
        )
        self.workers = Workers(self.executor)

    def publish(self, seed: int) -> str:
        shutil.rmtree(self.folder)
        return build(self.folder, seed=seed).content_digest

    def look(self) -> None:
        for follower in self.followers:
            follower.look()

    def asks(self) -> bool:
        """Whether the workers are asked what they serve."""
        before = len(self.executor.asked)
        self.workers.states()
        return len(self.executor.asked) > before


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "c")


def same(digest: str) -> States:
    return States({digest}, {digest})


def test_who_has_seen_the_folder_as_it_is_is_not_asked_again(world: World) -> None:
    assert world.asks()
    assert world.asks(), "they have not looked yet"
    world.look()
    assert world.asks()
    for _ in range(3):
        assert not world.asks()
    assert world.workers.states() == same(world.first.content_digest)


def test_a_publication_is_asked_about_until_all_serve_it(world: World) -> None:
    world.look()
    world.workers.states()
    digest = world.publish(2)
    assert world.asks(), "no worker has looked"
    world.followers[0].look()
    served, offered = world.workers.states()
    assert (served, len(offered)) == ({world.first.content_digest}, 2)
    world.followers[1].look()
    assert world.workers.states() == States({world.first.content_digest}, {digest})
    assert world.asks(), "it is not served yet"
    assert world.workers.adopt(digest)
    assert world.asks()
    assert world.workers.states() == same(digest)
    assert not world.asks()
    # And on.
    world.publish(3)
    assert world.asks()


def test_while_something_is_refused_they_are_asked(world: World) -> None:
    world.look()
    world.workers.states()
    config = world.folder / "vlora_config.json"
    sound = config.read_bytes()
    config.write_text("{")
    world.look()
    for _ in range(3):
        assert world.asks()
    config.write_bytes(sound)
    world.look()
    assert world.asks()
    assert not world.asks()
    shutil.rmtree(world.folder)
    world.look()
    assert world.asks()
    assert world.asks()


def test_a_worker_that_lost_an_offer_is_told_again(world: World) -> None:
    world.look()
    world.workers.states()
    world.publish(2)
    world.followers[0].look()
    digest = world.followers[0].state().offered
    assert not world.workers.adopt(digest), "the other does not offer it"
    served, _ = world.workers.states()
    assert len(served) == 2
    world.look()
    world.workers.states()
    assert world.workers.adopt(digest)
    assert world.workers.states() == same(digest)


def test_folders_of_other_machines_are_asked_about_always(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.look()
    for follower in world.followers:
        # Another file system's numbers.
        monkeypatch.setattr(follower, "_looked", (7, *follower._looked[1:]))
    for _ in range(3):
        assert world.asks()


def test_what_cannot_change_is_asked_once(tmp_path: Path) -> None:
    world = World(tmp_path / "c", pin="yes")
    assert world.asks()
    assert not world.asks()
    nothing: Any = Executor([SimpleNamespace(state=lambda: ("", "", "", ()))])
    workers = Workers(nothing)
    assert [workers.states() for _ in range(3)] == [same("")] * 3
    assert nothing.asked == ["_state"]
