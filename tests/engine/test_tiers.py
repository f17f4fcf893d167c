"""A server whose device has room for a few of a checkpoint's tasks, asked for all of them at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx
import openai
import pytest
from engine_server import Server, ids, words
from engine_world import ADAPTERS, PROMPTS, World

from vllm_vlora.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.engine

# Task -> whose weights it has. All kinds: run direct, materialized, with and without a shared part.
TASKS = {f"t{number}": [*ADAPTERS, "ordinary"][number % 7] for number in range(28)}
HELD = 5


@pytest.fixture(scope="module")
def checkpoint(world: World) -> Path:
    adapters = {**world.adapters, "ordinary": world.ordinary}
    tasks = {task: adapters[weights] for task, weights in TASKS.items()}
    return world.compress("many", tasks, representation="private", quantize="none", ratio=0.1)


@pytest.fixture(scope="module", params=["0", "1000000"], ids=["from disk", "from the host"])
def server(world: World, checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    largest = max(entry.nbytes for entry in map(Checkpoint.open(checkpoint).entry, TASKS))
    log = world.root / f"tiers-{request.param}.log"
    server = Server(
        world,
        log,
        checkpoint,
        VLLM_VLORA_DEVICE_BYTES=str(HELD * largest),
        VLLM_VLORA_LATE_MIB="0",
        VLLM_VLORA_HOST_BYTES=request.param,
    )
    assert server.wait(), log.read_text()[-4000:]
    yield server
    server.stop()


def _ask(server: Server, world: World, names: list[str], at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        texts = list(pool.map(lambda name: server.text(name, PROMPTS[0]), names))
    for name, text in zip(names, texts):
        weights = TASKS.get(name, name)
        assert ids(text) == words(world.reference[weights][0]), name


def test_every_task_is_listed_and_few_are_held(server: Server) -> None:
    assert server.listed() == {"base", "ordinary", *TASKS}
    line = next(line for line in server.log.read_text().splitlines() if "tasks resident" in line)
    held = int(line.split(" of 28 tasks resident")[0].split()[-1])
    assert HELD <= held < 16


def test_all_are_asked_for_at_once_and_again(server: Server, world: World) -> None:
    random = Random(0)
    for _ in range(3):
        names = [*TASKS, *random.choices([*TASKS, "base", "ordinary"], k=40)]
        random.shuffle(names)
        _ask(server, world, names, at_once=24)


def test_who_hangs_up_while_the_task_comes_leaves_nothing_behind(
    server: Server, world: World
) -> None:
    def hang_up(name: str) -> None:
        asked = {"model": name, "prompt": "w1 w2", "max_tokens": 200, "ignore_eos": True}
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json=asked, timeout=0.02)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hang_up, [*TASKS] * 2))
    _ask(server, world, [*TASKS], at_once=8)
    assert server.process.is_alive()


def test_a_task_whose_file_is_damaged_is_an_error_of_its_own_requests(
    server: Server, world: World, checkpoint: Path
) -> None:
    record = Checkpoint.open(checkpoint).record("t27")
    _ask(server, world, [f"t{number}" for number in range(20)], at_once=4)
    file = checkpoint / record.file
    whole = file.read_bytes()
    file.write_bytes(whole[::-1])
    try:
        outcomes = []
        with ThreadPoolExecutor(4) as pool:
            others = pool.submit(_ask, server, world, [f"t{n}" for n in range(20)], 4)
            for _ in range(2):
                try:
                    outcomes.append(server.text("t27", PROMPTS[0]))
                except openai.APIError as error:
                    outcomes.append(type(error).__name__)
            others.result()
    finally:
        file.write_bytes(whole)
    # From the host's memory it answers; from disk it cannot.
    right = " ".join(words(world.reference[TASKS["t27"]][0]))
    assert all(out == "InternalServerError" or ids(out) == right.split() for out in outcomes)
    time.sleep(0.5)
    _ask(server, world, ["t27", "t0"], at_once=2)
