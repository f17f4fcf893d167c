"""A checkpoint that is published again and again under a server, which follows it while it answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from engine_server import Server, ids, words
from engine_world import PROMPTS, World
from published_world import FIRST, SECOND, PublishedWorld, publish

from vllm_vlora.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def world2(world: World) -> Iterator[PublishedWorld]:
    world2 = PublishedWorld(world, "followed", ["--api-server-count", "2"])
    assert world2.server.wait(), world2.server.log.read_text()[-4000:]
    yield world2
    world2.server.stop()


def test_new_tasks_come_changed_ones_change_and_removed_ones_go(world2: PublishedWorld) -> None:
    world2.check(FIRST)
    before = {name: world2.long(name) for name in ("changes", "goes", "head")}
    with ThreadPoolExecutor(30) as pool:
        # In flight while the weights change: more than fit into a batch at once.
        running: dict[Future[list[str]], str] = {
            pool.submit(world2.long, name): name for name in before for _ in range(8)
        }
        world2.server.wait_until_begun(running)
        world2.publish(SECOND)
        waited = world2.wait_until_listed(set(SECOND))
        for future, name in running.items():
            assert future.result() == before[name], "it began with the old weights"
    world2.settle(SECOND)
    with pytest.raises(openai.NotFoundError):
        world2.server.text("goes", PROMPTS[0])
    print(f"listed after {waited:.2f} s")


def test_the_commands_that_edit_a_checkpoint_are_followed(world2: PublishedWorld) -> None:
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


def _gone(world2: PublishedWorld) -> None:
    """The folder is deleted."""


def _unreadable(world2: PublishedWorld) -> None:
    (world2.folder / "vlora_config.json").mkdir(parents=True)


def _damaged(world2: PublishedWorld) -> None:
    made = world2.publish({**SECOND, "broken": "attention"}, "damaged")
    file = made / Checkpoint.open(made).record("broken").file
    file.write_bytes(file.read_bytes()[::-1])
    # Nobody sees it before.
    made.rename(world2.folder)


def _half_copied(world2: PublishedWorld) -> None:
    made = world2.publish({**SECOND, "half": "attention"}, "half copied")
    (made / Checkpoint.open(made).record("half").file).unlink()
    made.rename(world2.folder)


@pytest.mark.parametrize("change", [_gone, _unreadable, _damaged, _half_copied])
def test_what_cannot_be_served_is_refused_and_the_state_before_it_answers(
    world2: PublishedWorld, change: Callable[[PublishedWorld], None]
) -> None:
    world2.publish(SECOND)
    world2.wait_until_listed(set(SECOND))
    # What was asked for once is there without the folder.
    world2.settle(SECOND)
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


def test_a_task_with_the_name_of_something_else_is_not_served_and_that_answers_on(
    world2: PublishedWorld,
) -> None:
    world2.publish({**SECOND, "base": "rslora", "ordinary": "attention", "last": "half-packed"})
    world2.wait_until_listed({*SECOND, "last"})
    # Of "base" and "ordinary" too: as stock vLLM answers for the model and the adapter.
    world2.settle({**SECOND, "last": "half-packed"})
    log = world2.server.log.read_text()
    for name in ("base", "ordinary"):
        assert f"task {name!r} is not served: it has the name of a served model" in log
    world2.publish(SECOND)
    world2.wait_until_listed(set(SECOND))


def test_memory_of_old_states_comes_back(world2: PublishedWorld) -> None:
    """Publications with requests between them; the log says when something does not fit."""
    for number in range(6):
        tasks = {**SECOND, "changes": ["everything", "attention", "rslora"][number % 3]}
        world2.publish(tasks)
        world2.settle(tasks)
    assert "no room for task" not in world2.server.log.read_text()


def test_who_asks_while_it_is_published_is_answered(world: World) -> None:
    """Tasks that are on no device, whose weights of before are gone when an API server asks for them."""
    weights = ("attention", "everything", "rslora", "half-packed")
    states = [{f"t{n}": weights[(n + turn) % 4] for n in range(12)} for turn in range(2)]
    name = "met"
    folder = publish(world, states[0], name)
    opened = Checkpoint.open(folder)
    device = 3 * max(opened.entry(task).nbytes for task in opened.tasks)
    server = Server(
        world,
        world.root / f"{name}.log",
        folder,
        VLLM_VLORA_DEVICE_BYTES=str(device),
        VLLM_VLORA_LATE_MIB="0",
        VLLM_VLORA_HOST_BYTES="0",
    )
    ended = threading.Event()

    def ask(task: str) -> int:
        allowed = [words(world.reference[state[task]][0]) for state in states]
        count = 0
        while not ended.is_set():
            assert ids(server.text(task, PROMPTS[0])) in allowed, task
            count += 1
        return count

    try:
        assert server.wait(), server.log.read_text()[-4000:]
        with ThreadPoolExecutor(12) as pool:
            asking = [pool.submit(ask, task) for task in states[0]]
            for turn in range(6):
                publish(world, states[(turn + 1) % 2], name)
                # Adopted at different times after it was published.
                time.sleep(1.0 + 0.3 * turn)
            ended.set()
            assert all(future.result() > 1 for future in asking)
    finally:
        ended.set()
        server.stop()


def run(arguments: list[str | Path]) -> None:
    command = [sys.executable, "-P", "-m", "vllm_vlora.tools", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
