"""A checkpoint at a URL that is asked while servers run, and what goes wrong under them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest
from engine_server import Server
from engine_world import PROMPTS, World, make_adapter, make_model
from file_server import FileServer, file_server
from published_world import FIRST, SECOND, publish, wrong
from several_servers import SEVERAL_SERVERS

from vllm_vlora.checkpoint.reader import Checkpoint

pytestmark = [pytest.mark.engine, SEVERAL_SERVERS]

SECONDS = 30.0
STAYS = "the state that is served stays"


class Store:
    """A web server of one checkpoint, and a cache on a small disk of its own where one may be mounted."""

    def __init__(self, world: World, web: FileServer, cache: Path) -> None:
        self.world, self.web, self.cache = world, web, cache
        # A link, so that what is asked for is one state or the other at every moment.
        self.folder = web.folder / "tasks"
        self.url = f"{web.url}/tasks?sig=S3cr3t"

    def publish(self, tasks: dict[str, str]) -> None:
        """Put these tasks there."""
        self.put(publish(self.world, tasks, "made"))

    def put(self, made: Path) -> None:
        """Put a copy of a checkpoint there at once, as a store is never seen half written."""
        state = self.folder.with_name(f"state {time.monotonic_ns()}")
        shutil.copytree(made, state)
        link = state.with_suffix(".link")
        link.symlink_to(state.name)
        link.replace(self.folder)

    def serve(self, name: str, *options: str, **environment: str) -> Server:
        return Server(
            self.world,
            self.world.root / name,
            self.url,
            options=options,
            VLLM_VLORA_POLL_SECONDS="1",
            VLLM_VLORA_CACHE=str(self.cache),
            **environment,
        )


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """Whether a disk of a few MB could be mounted there."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def store(world: World) -> Iterator[Store]:
    (world.root / "web").mkdir()
    with small_disk(world.root / "cache"), file_server(world.root / "web") as web:
        store = Store(world, web, world.root / "cache")
        store.publish(FIRST)
        yield store


@pytest.fixture(scope="module")
def servers(store: Store) -> Iterator[list[Server]]:
    """Two on one cache, the first with two API servers, the second with lines for programs."""
    with ExitStack() as started:
        found = [
            store.serve("one.log", "--api-server-count", "2"),
            store.serve("two.log", VLLM_VLORA_LOG="json"),
        ]
        for server in found:
            started.callback(server.stop)
        for server in found:
            assert server.wait(), server.log.read_text()[-4000:]
        yield found


def settle(servers: list[Server], world: World, tasks: dict[str, str]) -> float:
    """Seconds until every API server of every server lists and answers this and nothing else."""
    began = time.monotonic()
    wanted = {"base", "ordinary", *tasks}
    for server in servers:
        # The two of one take connections as they come; twelve in a row reach both.
        while any(server.listed() != wanted for _ in range(12)) or wrong(server, world, tasks):
            assert time.monotonic() - began < SECONDS, server.log.read_text()[-3000:]
            time.sleep(0.1)
    return time.monotonic() - began


def said(servers: list[Server], what: str) -> int:
    """How often the servers' logs say it."""
    return sum(server.log.read_text().count(what) for server in servers)


def test_what_is_published_at_the_url_is_served_by_all(
    store: Store, servers: list[Server], world: World
) -> None:
    settle(servers, world, FIRST)
    store.web.asked.clear()
    store.publish(SECOND)
    print(f"served after {settle(servers, world, SECOND):.2f} s")
    for server in servers:
        with pytest.raises(openai.NotFoundError):
            server.text("goes", PROMPTS[0])
    fetched = {name: n for name, n in store.web.asked.items() if name.endswith(".safetensors")}
    assert set(fetched.values()) == {1}, "one fetches for both servers"
    assert len(fetched) == 2, "what did not change is there"
    assert said(servers, "S3cr3t") == 0
    lines = [line for line in servers[1].log.read_text().splitlines() if line.startswith("{")]
    found = {line["event"]: line for line in map(json.loads, lines)}
    assert found["start"]["tasks"] == len(FIRST)
    facts = {name: found["publication"][name] for name in ("tasks", "new", "changed", "gone")}
    assert facts == {"tasks": len(SECOND), "new": 1, "changed": 2, "gone": 1}
    assert found["publication"]["digest"] == Checkpoint.open(store.folder).content_digest


def _nothing_answers(store: Store) -> None:
    store.web.status = 503


def _damaged(store: Store) -> None:
    # Weights that the cache has from no other task, which would do.
    made = publish(store.world, {**SECOND, "broken": "ordinary"}, "made")
    (file,) = (made / "tasks").glob("broken*")
    file.write_bytes(file.read_bytes()[::-1])
    store.put(made)


def _of_another_model(store: Store) -> None:
    world = store.world
    make_model(world.root / "other", hidden=64, seed=5)
    make_adapter(world.root / "other", world.root / "a", 6, r=2, target_modules=["q_proj"])
    tasks = {"foreign": world.root / "a"}
    store.put(world.compress("foreign", tasks, representation="private", ratio=0.1))


@pytest.mark.parametrize("change", [_nothing_answers, _damaged, _of_another_model])
def test_what_cannot_be_had_or_served_is_a_line_and_the_state_answers(
    store: Store, servers: list[Server], world: World, change: Callable[[Store], None]
) -> None:
    store.publish(SECOND)
    settle(servers, world, SECOND)
    lines = said(servers, STAYS)
    change(store)
    began = time.monotonic()
    while said(servers, STAYS) == lines:
        assert time.monotonic() - began < SECONDS
        time.sleep(0.1)
    time.sleep(2.5)
    # Each worker asks now and then, and says it once.
    assert lines < said(servers, STAYS) <= lines + len(servers)
    settle(servers, world, SECOND)
    assert said(servers, "Traceback") == 0
    store.web.status = None
    store.publish({**SECOND, "next": "half-packed"})
    settle(servers, world, {**SECOND, "next": "half-packed"})


def test_a_full_disk_under_the_cache(store: Store, servers: list[Server], world: World) -> None:
    if not os.path.ismount(store.cache):
        pytest.skip("may not mount a disk here")
    store.publish(SECOND)
    settle(servers, world, SECOND)
    lines = said(servers, STAYS)
    filler = store.cache / "filler"
    with filler.open("wb") as stream:
        free = os.statvfs(store.cache)
        os.posix_fallocate(stream.fileno(), 0, free.f_bavail * free.f_frsize)
    # What the cache has of other states is not written again.
    fresh = {**SECOND, "fresh": "ordinary"}
    store.publish(fresh)
    began = time.monotonic()
    while said(servers, STAYS) == lines:
        assert time.monotonic() - began < SECONDS
        time.sleep(0.1)
    assert said(servers, "cannot be written: No space left on device; free space") > 0
    settle(servers, world, SECOND)
    filler.unlink()
    settle(servers, world, fresh)


def test_a_server_that_starts_without_the_store_serves_what_was_fetched(
    store: Store, servers: list[Server], world: World
) -> None:
    """On the other's cache, from the state that it fetched last; and goes on from there."""
    store.publish(SECOND)
    settle(servers, world, SECOND)
    servers[1].stop()
    store.web.status = 503
    again = store.serve("three.log")
    try:
        assert again.wait(), again.log.read_text()[-4000:]
        assert wrong(again, world, SECOND) == []
        store.web.status = None
        store.publish(FIRST)
        settle([servers[0], again], world, FIRST)
    finally:
        store.web.status = None
        again.stop()
