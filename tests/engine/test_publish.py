"""A checkpoint that is published again and again under a server, which follows it while it answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from engine_server import Server, ids, words
from engine_world import PROMPTS, World

from vllm_vlora.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.engine

# Weights by the name of the adapter that has them. "output head/ü" needs a slot, the others run direct.
FIRST = {"stays": "attention", "changes": "rslora", "goes": "half-packed", "head": "output head/ü"}
SECOND = {"stays": "attention", "changes": "everything", "comes": "embedding", "head": "rslora"}
# What a person would wait; asked for are two, on a machine that does nothing else.
SECONDS = 10.0


class World2:
    """A server with two API servers, and the folder that it follows."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.folder = self.publish(FIRST)
        self.server = Server(
            world, world.root / "publish.log", self.folder, options=["--api-server-count", "2"]
        )

    def publish(self, tasks: dict[str, str], name: str = "followed") -> Path:
        adapters = {**self.world.adapters, "ordinary": self.world.ordinary}
        chosen = {task: adapters[weights] for task, weights in tasks.items()}
        return self.world.compress(
            name, chosen, force=True, representation="private", quantize="none", ratio=0.1
        )

    def wait_until_listed(self, tasks: set[str]) -> float:
        """Seconds until every API server lists these, and nothing else beside what is no task."""
        began = time.monotonic()
        wanted = {"base", "ordinary", *tasks}
        # The two take connections as they come; twelve in a row reach both.
        while any(self.server.listed() != wanted for _ in range(12)):
            assert time.monotonic() - began < SECONDS, self.server.log.read_text()[-3000:]
        return time.monotonic() - began

    def check(self, tasks: dict[str, str]) -> None:
        """Everything answers as its adapter does under stock vLLM, all at once."""
        wanted = {"base": "base", "ordinary": "ordinary", **tasks}
        with ThreadPoolExecutor(len(wanted)) as pool:
            texts = list(pool.map(lambda name: self.server.text(name, PROMPTS[0]), wanted))
        for (name, weights), text in zip(wanted.items(), texts):
            assert ids(text) == words(self.world.reference[weights][0]), name

    def settle(self, tasks: dict[str, str]) -> None:
        """Until requests for a task that changed get the new weights: lists change by name alone."""
        began = time.monotonic()
        while True:
            try:
                return self.check(tasks)
            except AssertionError:
                assert time.monotonic() - began < SECONDS
                time.sleep(0.1)

    def long(self, name: str, tokens: int = 150) -> list[str]:
        done = self.server.client.completions.create(
            model=name, prompt=PROMPTS[1], max_tokens=tokens, temperature=0,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )  # fmt: skip
        return ids(done.choices[0].text)


@pytest.fixture(scope="module")
def world2(world: World) -> Iterator[World2]:
    world2 = World2(world)
    assert world2.server.wait(), world2.server.log.read_text()[-4000:]
    yield world2
    world2.server.stop()


def test_new_tasks_come_changed_ones_change_and_removed_ones_go(world2: World2) -> None:
    world2.check(FIRST)
    before = {name: world2.long(name) for name in ("changes", "goes", "head")}
    with ThreadPoolExecutor(30) as pool:
        # In flight while the weights change: more than fit into a batch at once.
        running: dict[Future[list[str]], str] = {
            pool.submit(world2.long, name): name for name in before for _ in range(8)
        }
        time.sleep(0.3)
        world2.publish(SECOND)
        waited = world2.wait_until_listed(set(SECOND))
        for future, name in running.items():
            assert future.result() == before[name], "it began with the old weights"
    world2.settle(SECOND)
    with pytest.raises(openai.NotFoundError):
        world2.server.text("goes", PROMPTS[0])
    print(f"listed after {waited:.2f} s")


def test_the_commands_that_edit_a_checkpoint_are_followed(world2: World2) -> None:
    adapters = world2.world.adapters
    run(["add", world2.folder, "--name", f"added={adapters['half-packed']}", "--ratio", "0.1",
         "--quantize", "none"])  # fmt: skip
    world2.wait_until_listed({*SECOND, "added"})
    world2.settle({**SECOND, "added": "half-packed"})
    run(["remove", world2.folder, "stays", "comes"])
    left = {name: SECOND[name] for name in ("changes", "head")} | {"added": "half-packed"}
    world2.wait_until_listed(set(left))
    world2.check(left)
    run(["pull", world2.publish(SECOND, "elsewhere"), "-o", world2.folder, "--force"])
    world2.wait_until_listed(set(SECOND))
    world2.check(SECOND)


def _gone(world2: World2) -> None:
    """The folder is deleted."""


def _unreadable(world2: World2) -> None:
    (world2.folder / "vlora_config.json").mkdir(parents=True)


def _damaged(world2: World2) -> None:
    world2.publish({**SECOND, "broken": "attention"})
    file = world2.folder / Checkpoint.open(world2.folder).record("broken").file
    file.write_bytes(file.read_bytes()[::-1])


def _half_copied(world2: World2) -> None:
    world2.publish({**SECOND, "half": "attention"})
    (world2.folder / Checkpoint.open(world2.folder).record("half").file).unlink()


@pytest.mark.parametrize("change", [_gone, _unreadable, _damaged, _half_copied])
def test_what_cannot_be_served_is_refused_and_the_state_before_it_answers(
    world2: World2, change: Callable[[World2], None]
) -> None:
    world2.publish(SECOND)
    world2.wait_until_listed(set(SECOND))
    lines = world2.server.log.read_text().count("what was published is not served")
    world2.folder.rename(world2.world.root / "aside")
    change(world2)
    time.sleep(3)
    assert world2.server.listed() == {"base", "ordinary", *SECOND}
    world2.check(SECOND)
    assert world2.server.log.read_text().count("what was published is not served") > lines
    shutil.rmtree(world2.folder, ignore_errors=True)
    (world2.world.root / "aside").rename(world2.folder)
    world2.check(SECOND)
    # And it goes on from there.
    world2.publish({**SECOND, "next": "ordinary"})
    world2.wait_until_listed({*SECOND, "next"})
    world2.check({**SECOND, "next": "ordinary"})


def test_memory_of_old_states_comes_back(world2: World2) -> None:
    """Publications with requests between them; the log says when something does not fit."""
    for number in range(6):
        tasks = {**SECOND, "changes": ["everything", "attention", "rslora"][number % 3]}
        world2.publish(tasks)
        world2.settle(tasks)
    assert "no room for task" not in world2.server.log.read_text()


def run(arguments: list[str | Path]) -> None:
    command = [sys.executable, "-P", "-m", "vllm_vlora.tools", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
