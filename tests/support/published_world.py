"""A server of a folder that is published again and again while it answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine_server import Server, ids, words
from engine_world import PROMPTS, World

# Weights by the name of the adapter that has them. "output head/ü" needs a slot, the others run direct.
FIRST = {"stays": "attention", "changes": "rslora", "goes": "half-packed", "head": "output head/ü"}
SECOND = {"stays": "attention", "changes": "everything", "comes": "embedding", "head": "rslora"}
# What a person would wait; asked for are two, on a machine that does nothing else.
SECONDS = 10.0


def wrong(server: Server, world: World, tasks: dict[str, str]) -> list[str]:
    """What does not answer as its adapter does under stock vLLM, all asked at once."""
    wanted = {"base": "base", "ordinary": "ordinary", **tasks}
    with ThreadPoolExecutor(len(wanted)) as pool:
        texts = list(pool.map(lambda name: server.text(name, PROMPTS[0]), wanted))
    return [
        name
        for (name, weights), text in zip(wanted.items(), texts)
        if ids(text) != words(world.reference[weights][0])
    ]


def publish(world: World, tasks: dict[str, str], name: str) -> Path:
    """A checkpoint of tasks with these adapters' weights, exact, in place of the one of that name."""
    adapters = {**world.adapters, "ordinary": world.ordinary}
    chosen = {task: adapters[weights] for task, weights in tasks.items()}
    return world.compress(
        name, chosen, force=True, representation="private", quantize="none", ratio=0.1
    )


class PublishedWorld:
    """A server with several API servers or workers, and the folder that it follows."""

    def __init__(self, world: World, name: str, options: Sequence[str], **environment: str) -> None:
        self.world, self.name = world, name
        self.folder = self.publish(FIRST)
        log = world.root / f"{name}.log"
        self.server = Server(world, log, self.folder, options=options, **environment)

    def publish(self, tasks: dict[str, str], name: str = "") -> Path:
        return publish(self.world, tasks, name or self.name)

    def wait_until_listed(self, tasks: set[str]) -> float:
        """Seconds until every API server lists these, and nothing else beside what is no task."""
        began = time.monotonic()
        wanted = {"base", "ordinary", *tasks}
        # The two take connections as they come; twelve in a row reach both.
        while any(self.server.listed() != wanted for _ in range(12)):
            assert time.monotonic() - began < SECONDS, self.server.log.read_text()[-3000:]
        return time.monotonic() - began

    def check(self, tasks: dict[str, str]) -> None:
        """Everything answers as its adapter does under stock vLLM."""
        assert wrong(self.server, self.world, tasks) == []

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
