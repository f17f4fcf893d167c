"""Several workers and engine cores behind several API servers: a publication, and a worker's death."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import openai
import psutil
import pytest
from engine_server import Server
from engine_world import PROMPTS, World
from published_world import FIRST, SECOND, PublishedWorld, wrong

pytestmark = pytest.mark.engine

LAYOUTS = {
    "tensor": ["--tensor-parallel-size", "2", "--api-server-count", "2"],
    "data": ["--data-parallel-size", "2", "--api-server-count", "2"],
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def scaled(world: World, request: pytest.FixtureRequest) -> Iterator[PublishedWorld]:
    made = PublishedWorld(world, f"scaled-{request.param}", LAYOUTS[request.param])
    assert made.server.wait(), made.server.log.read_text()[-6000:]
    yield made
    made.server.stop()


def test_all_of_them_take_the_same_publication(scaled: PublishedWorld) -> None:
    scaled.check(FIRST)
    scaled.publish(SECOND)
    print(f"listed after {scaled.wait_until_listed(set(SECOND)):.2f} s")
    scaled.settle(SECOND)
    # Whichever engine core a request meets.
    for _ in range(3):
        scaled.check(SECOND)
    assert scaled.server.log.read_text().count("was published again and is served now") == 2


def death(server: Server, model: str) -> tuple[float, float, str]:
    """Kill a process with weights while it answers: seconds until the client knows, and until the
    server has ended; and what the client was told."""
    told: list[str] = []

    def ask() -> None:
        try:
            server.client.completions.create(
                model=model, prompt=PROMPTS[0], max_tokens=200, extra_body={"ignore_eos": True}
            )
        except openai.APIError as error:
            told.append(type(error).__name__)

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    time.sleep(0.2)
    children = psutil.Process(server.process.pid).children(recursive=True)
    # The engine core is the server's, and the workers are the engine core's.
    workers = [child for child in children if child.ppid() != server.process.pid]
    assert len(workers) == 2, [child.name() for child in children]
    began = time.monotonic()
    os.kill(workers[-1].pid, signal.SIGKILL)
    for thread in asking:
        thread.join(120)
    knows = time.monotonic() - began
    server.process.join(120)
    assert not server.process.is_alive()
    assert told
    return knows, time.monotonic() - began, told[0]


def test_a_killed_worker_ends_the_server_as_under_stock(world: World) -> None:
    options = LAYOUTS["tensor"][:2]
    made = PublishedWorld(world, "killed", options)
    stock = Server(world, world.root / "stock.log", made.folder, options=options, VLLM_PLUGINS="")
    try:
        for server in (made.server, stock):
            assert server.wait(), server.log.read_text()[-4000:]
        ours, theirs = death(made.server, "stays"), death(stock, "ordinary")
        print(f"the client knows after {ours[0]:.2f} s (stock {theirs[0]:.2f}), the server has ended "
              f"after {ours[1]:.2f} s (stock {theirs[1]:.2f})")  # fmt: skip
        assert ours[2] == theirs[2]
        # On a machine that does other things too.
        assert ours[1] < theirs[1] + 10
        again = Server(world, world.root / "again.log", made.folder, options=options)
        try:
            assert again.wait(), again.log.read_text()[-4000:]
            assert wrong(again, world, FIRST) == []
        finally:
            again.stop()
    finally:
        made.server.stop()
        stock.stop()
