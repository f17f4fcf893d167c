"""A server under everything at once: many tasks, publications, removals, blends, bad names, hang-ups.

A short form of what a day brings. ``VLORA_SOAK_REQUESTS=20000 VLORA_SOAK_TASKS=300`` is the long one.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx
import openai
import psutil
import pytest
from engine_server import Server, ids, words
from engine_world import PROMPTS, World

from vllm_vlora.checkpoint.reader import Checkpoint

REQUESTS = int(os.environ.get("VLORA_SOAK_REQUESTS", "1200"))
# Seconds; some 30 requests a second on two cores, of which a third are the clients'.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(max(600, REQUESTS // 5))]

TASKS = int(os.environ.get("VLORA_SOAK_TASKS", "60"))
HELD, CLIENTS = TASKS // 5, 12
# Seconds for which the weights before a publication may still answer: until all have heard of it.
LAG = 6.0
# Both have the weights of one adapter, and keep them.
KEPT = ("t0", "t7")
BLEND = "t0*0.5+t7*0.5"


class Catalogue:
    """The folder that is served, and which weights each task may answer with."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.adapters = {**world.adapters, "ordinary": world.ordinary}
        self.weights = {f"t{n}": [*self.adapters][n % 7] for n in range(TASKS)}
        self.before: dict[str, tuple[str | None, float]] = {}
        self.lock = threading.Lock()
        self.folder = self.publish()

    def publish(self) -> Path:
        chosen = {task: self.adapters[weights] for task, weights in self.weights.items()}
        return self.world.compress(
            "soak", chosen, force=True, representation="private", quantize="none", ratio=0.1
        )

    def change(self, random: Random) -> None:
        """Publish other weights for some tasks, and a task more or less."""
        extra = "comes and goes"
        with self.lock:
            chosen = [*random.sample([task for task in self.weights if task not in KEPT], 5), extra]
            old = {task: self.weights.get(task) for task in chosen}
            for task in chosen:
                self.weights[task] = random.choice([*self.adapters])
            if old[extra] is not None:
                del self.weights[extra]
            self.before.update({task: (weights, math.inf) for task, weights in old.items()})
        self.publish()
        with self.lock:
            now = time.monotonic()
            self.before.update({task: (weights, now) for task, weights in old.items()})

    def allowed(self, task: str, began: float) -> set[str | None]:
        """The weights that a request may have met that began then; None for that it was not there."""
        with self.lock:
            found = {self.weights.get(task)}
            old, since = self.before.get(task, (None, 0.0))
            if task in self.before and began < since + LAG:
                found.add(old)
            return found


@pytest.fixture(scope="module")
def catalogue(world: World) -> Catalogue:
    return Catalogue(world)


@pytest.fixture(scope="module")
def server(world: World, catalogue: Catalogue) -> Iterator[Server]:
    opened = Checkpoint.open(catalogue.folder)
    largest = max(opened.entry(task).nbytes for task in opened.tasks)
    server = Server(
        world,
        world.root / "soak.log",
        catalogue.folder,
        VLLM_VLORA_DEVICE_BYTES=str(HELD * largest),
        VLLM_VLORA_LATE_MIB="0",
        VLLM_VLORA_HOST_BYTES=str(2 * HELD * largest),
    )
    assert server.wait(), server.log.read_text()[-4000:]
    yield server
    server.stop()


def memory(server: Server) -> int:
    """Bytes of the server's processes that are theirs alone."""
    root = psutil.Process(server.process.pid)
    every = [root, *root.children(recursive=True)]
    return sum(process.memory_full_info().uss for process in every)


def test_everything_at_once(server: Server, world: World, catalogue: Catalogue) -> None:
    random = Random(1)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    ended = threading.Event()

    def publish() -> None:
        chance = Random(2)
        while not ended.wait(2.0):
            catalogue.change(chance)
            outcomes["published"] += 1

    def ask(number: int) -> None:
        chance = Random(number)
        kind = chance.choices(["task", "blend", "bad", "hang up"], [80, 8, 6, 6])[0]
        if kind == "bad":
            name = chance.choice(["nobody", "t0*", "t0+nobody", "t1 * 9e9", "\0", "t" * 300])
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                server.text(name, PROMPTS[0])
        elif kind == "hang up":
            asked = {"model": f"t{chance.randrange(TASKS)}", "prompt": "w3", "max_tokens": 100}
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(f"{server.url}/v1/completions", json=asked, timeout=0.03)
        elif kind == "blend":
            # Half of each is what both are, up to rounding.
            text = server.text(BLEND, PROMPTS[0])
            if ids(text) != words(world.reference["attention"][0]):
                wrong.append(f"{BLEND}: {text}")
        else:
            task = "comes and goes" if chance.random() < 0.05 else f"t{zipf(chance)}"
            check(task)
        outcomes[kind] += 1

    def zipf(chance: Random) -> int:
        return min(int(chance.paretovariate(0.7)) - 1, TASKS - 1)

    def check(task: str) -> None:
        began = time.monotonic()
        try:
            text = server.text(task, PROMPTS[0])
        except openai.NotFoundError:
            if None not in catalogue.allowed(task, began):
                wrong.append(f"{task}: not found")
            return
        right = [w for w in catalogue.allowed(task, began) if w is not None]
        if ids(text) not in [words(world.reference[weights][0]) for weights in right]:
            wrong.append(f"{task}: {text} and not as {right}")

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            first = [pool.submit(ask, random.randrange(1 << 30)) for _ in range(REQUESTS // 2)]
            for future in first:
                future.result()
            middle = memory(server)
            second = [pool.submit(ask, random.randrange(1 << 30)) for _ in range(REQUESTS // 2)]
            for future in second:
                future.result()
    finally:
        ended.set()
        publisher.join()
    assert wrong == []
    assert outcomes["published"] >= 2
    assert outcomes["task"] > REQUESTS // 2
    assert server.process.is_alive()
    grown = memory(server) - middle
    print(dict(outcomes), f"memory {middle / 2**20:.0f} MiB, grown by {grown / 2**20:.1f} MiB")
    assert grown < 0.05 * middle
