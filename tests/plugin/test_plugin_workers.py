"""What an engine core asks its workers about the state that they serve, and when it need not."""

from __future__ import annotations

import itertools
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugin_world import build
from residency_world import Executor
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.ray_executor import RayDistributedExecutor
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm.v1.executor.uniproc_executor import UniProcExecutor

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
        self.now = 0.0
        self.workers = Workers(self.executor, lambda: self.now)

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
    # It may have to wait until nobody needs the bases of before.
    assert not world.asks(), "what they offer stays as it is"
    assert world.workers.adopt(digest)
    assert world.asks()
    assert world.workers.states() == same(digest)
    assert not world.asks()
    # And on.
    world.publish(3)
    assert world.asks()


def _no_json(folder: Path) -> None:
    (folder / "vlora_config.json").write_text("{")


@pytest.mark.parametrize("spoil", [_no_json, shutil.rmtree])
def test_the_longer_something_is_refused_the_seldomer_they_are_asked(
    world: World, spoil: Callable[[Path], None]
) -> None:
    world.look()
    assert world.asks()
    assert not world.asks()
    kept = world.folder.with_name("kept")
    shutil.copytree(world.folder, kept)
    spoil(world.folder)
    assert world.asks(), "no worker has looked"
    changes = world.workers.changes
    world.followers[0].look()
    assert world.asks(), "one has"
    world.look()
    assert world.asks()
    assert world.workers.changes > changes, "whoever counts refusals asks for them"
    changes, asked = world.workers.changes, []
    for _ in range(7200):
        world.now += 0.5
        if world.asks():
            asked.append(world.now)
    apart = [later - before for before, later in itertools.pairwise(asked)]
    assert max(apart[:8]) <= 1, "a copy that is under way is seen soon"
    assert apart == sorted(apart)
    assert apart[-1] == 30
    assert len(asked) < 200
    assert world.workers.changes == changes
    # At once, whatever was refused for how long.
    shutil.rmtree(world.folder, ignore_errors=True)
    kept.rename(world.folder)
    assert world.asks()
    world.look()
    assert world.asks()
    assert not world.asks()
    assert world.workers.states() == same(world.first.content_digest)


def test_a_folder_that_only_others_see_and_that_is_gone_there_is_asked_about_always(
    tmp_path: Path,
) -> None:
    gone = SimpleNamespace(state=lambda: ("1", "1", str(tmp_path / "elsewhere"), (), "no folder"))
    executor = Executor([gone])
    workers = Workers(executor)
    for count in range(1, 4):
        workers.states()
        assert len(executor.asked) == count


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


# --- what vLLM's executors can do --------------------------------------------------------------------


class Manager:
    """One worker's, which notes what it does."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def bring(self, *_: Any) -> list[Any]:
        self._done.append("brought")
        return ["here"]

    def hold(self, *_: Any) -> str:
        self._done.append("held")
        return "held"

    def forget(self, *_: Any, **__: Any) -> None:
        self._done.append("forgotten")

    def exchange_bases(self) -> list[str]:
        self._done.append("exchanged")
        return ["gone"]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done on a GPU, and when it is waited for."""
    done: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True)
    return done


def workers_of(executor: type[Any], done: list[str]) -> tuple[Workers, list[bool]]:
    """Workers of an executor of vLLM's without processes, and which of its answers were promises."""
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=Manager(done)))
    )
    promised: list[bool] = []

    def rpc(method: Any, args: tuple[Any, ...] = (), non_block: bool = False) -> Any:
        # As it comes to another process.
        method, args = pickle.loads(pickle.dumps((method, args)))
        promised.append(non_block)
        answers = [method(worker, *args)]
        return SimpleNamespace(result=lambda: answers) if non_block else answers

    vllms = object.__new__(executor)
    vllms.collective_rpc = rpc
    return Workers(vllms), promised


@pytest.mark.parametrize("executor", [MultiprocExecutor, RayExecutorV2, UniProcExecutor])
def test_an_executor_that_keeps_promises_lets_no_step_wait(
    executor: type[Any], done: list[str]
) -> None:
    """Also vLLM's newer one on Ray, whose workers take messages as those of processes do."""
    workers, promised = workers_of(executor, done)
    assert workers.bring(["a"], 1, [], [], []).result() == [["here"]]
    assert promised == [True]
    workers.hold("a", [])
    assert workers.exchange_bases() == {"gone"}
    assert done == ["brought", "held", "exchanged"]


@pytest.mark.parametrize("gpu", [True, False])
def test_vllms_older_executor_on_ray_has_what_it_was_told_done_before_the_next_step(
    gpu: bool, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps run on a thread, and so a stream, of their own, which waits for no other."""
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: gpu)
    workers, promised = workers_of(RayDistributedExecutor, done)
    assert workers.bring(["a"], 1, [], ["b"], []).result() == [["here"]]
    assert workers.hold("a", []) == ["held"]
    workers.forget("a")
    assert workers.exchange_bases() == {"gone"}
    assert not any(promised)
    each = [["forgotten", "brought"], ["held"], ["forgotten"], ["exchanged"]]
    assert done == [what for order in each for what in (*order, *["waited"] * gpu)]
