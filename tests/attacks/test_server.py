"""A server whose checkpoint changes under it from its start on, whose clients shout, lie and hang up.

One ``vllm serve`` with runtime updating on, as a client may then name models and paths of its own. It
must live, and answer what it holds with what it held at its start.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from engine_server import FORKED, Server, ids, words
from engine_world import ADAPTERS, PROMPTS, World, exact, make_adapter, make_model, make_world

from vllm_vlora.checkpoint.manifest import CONFIG_FILE, TASKS_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.plugin.identity import task_path

pytestmark = pytest.mark.engine

# Another state takes the folder's place as soon as a worker has read it, before the API server does.
PUBLISHED_MEANWHILE = f"""
import os
from vllm_vlora.plugin.resident import ResidentStore

preload = ResidentStore.preload

def publish_after(self, folder, *arguments):
    found = preload(self, folder, *arguments)
    os.rename(folder, folder + ".first")
    os.rename(folder + ".next", folder)
    return found

ResidentStore.preload = publish_after
{FORKED}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def folder(world: World) -> Path:
    """What the server is started with; beside it what is published meanwhile.

    That has other weights under the names there are, and a task that the engine cannot take.
    """
    served = world.root / "served"
    shutil.copytree(exact(world, "private"), served)
    large = make_adapter(world.model, world.root / "large", 6, r=32, target_modules=["lm_head"])
    others = [*ADAPTERS][1:] + [*ADAPTERS][:1]
    tasks = {name: world.adapters[other] for name, other in zip(ADAPTERS, others)}
    world.compress("served.next", {**tasks, "large": large}, representation="private", ratio=0.1)
    return served


@pytest.fixture(scope="module")
def server(world: World, folder: Path) -> Iterator[Server]:
    server = Server(
        world,
        world.root / "server.log",
        folder,
        PUBLISHED_MEANWHILE,
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
    )
    assert server.wait(), server.log.read_text()[-4000:]
    yield server
    server.stop()


def _check(server: Server, world: World) -> None:
    """Everything that the server holds answers as it did at the start, and nothing else is listed."""
    names = ["base", "ordinary", *ADAPTERS]
    assert {model.id for model in server.client.models.list().data} == set(names)
    with ThreadPoolExecutor(len(names)) as pool:
        texts = list(pool.map(lambda name: server.text(name, PROMPTS[0]), names))
    for name, text in zip(names, texts):
        assert ids(text) == words(world.reference[name][0]), name
    assert server.process.is_alive()


@contextmanager
def _aside(folder: Path) -> Iterator[None]:
    """The folder is gone meanwhile."""
    aside = shutil.move(folder, folder.with_name("aside"))
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.unlink(missing_ok=True)
        shutil.move(aside, folder)


def test_what_is_published_while_it_starts_does_not_reach_it(
    server: Server, world: World, folder: Path
) -> None:
    assert folder.with_name("served.first").exists(), "nothing was published"
    with _aside(folder):
        _check(server, world)
    _check(server, world)


def _nothing(folder: Path, world: World) -> None:
    """It is deleted."""


def _a_file(folder: Path, world: World) -> None:
    folder.write_text("no folder")


def _unreadable(folder: Path, world: World) -> None:
    # Whoever runs as root may read every file, but not a folder as a file.
    (folder / CONFIG_FILE).mkdir(parents=True)


def _cut_short(folder: Path, world: World) -> None:
    shutil.copytree(exact(world, "private"), folder)
    tasks = folder / TASKS_FILE
    tasks.write_bytes(tasks.read_bytes()[:-1])


def _damaged_task(folder: Path, world: World) -> None:
    world.compress(folder.name, {"unknown": world.ordinary}, representation="private", ratio=0.1)
    for file in (folder / "tasks").iterdir():
        file.write_bytes(file.read_bytes()[::-1])


def _of_another_model(folder: Path, world: World) -> None:
    if not (world.root / "other").exists():
        make_model(world.root / "other", hidden=64, seed=5)
        make_adapter(world.root / "other", world.root / "a", 6, r=2, target_modules=["q_proj"])
    world.compress(folder.name, {"unknown": world.root / "a"}, representation="private", ratio=0.1)


@pytest.mark.parametrize(
    "change", [_nothing, _a_file, _unreadable, _cut_short, _damaged_task, _of_another_model]
)
def test_whatever_takes_the_folders_place(
    server: Server, world: World, folder: Path, change: Callable[[Path, World], None]
) -> None:
    with _aside(folder):
        change(folder, world)
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
            server.text("unknown", PROMPTS[0])
        _check(server, world)


def test_bursts_of_unknown_names_delay_nobody(server: Server, world: World) -> None:
    def bogus(number: int) -> int:
        asked = {"model": f"bogus-{number}", "prompt": "w1", "max_tokens": 1}
        return httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).status_code

    with ThreadPoolExecutor(50) as pool:
        answers = pool.map(bogus, range(400))
        began = time.monotonic()
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        waited = time.monotonic() - began
        assert set(answers) == {404}
    assert waited < 5
    _check(server, world)


def test_clients_that_hang_up(server: Server, world: World) -> None:
    """In the middle of a request, of its answer, and of what is loaded for it."""
    place = urlsplit(server.url)
    body = b'{"model": "%s", "prompt": "w1 w2 w3", "max_tokens": 200, "stream": true}'

    def hang_up(number: int) -> None:
        name = [*ADAPTERS, "base", "nobody", "large"][number % (len(ADAPTERS) + 3)]
        data = body % name.encode()
        with socket.create_connection((place.hostname, place.port), timeout=30) as stream:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            whole = head + b"Content-Length: %d\r\n\r\n" % len(data) + data
            stream.sendall(whole[: len(whole) // 2] if number % 3 == 0 else whole)
            if number % 3 == 2:
                stream.recv(64)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(hang_up, range(80)))
    _check(server, world)


def test_paths_that_a_client_makes_up_are_refused(
    server: Server, world: World, folder: Path
) -> None:
    held = str(task_path(Checkpoint.open(folder), "large"))
    file, _, digest = held.rpartition("@")
    paths = [
        f"{file}@{'0' * 32}",
        f"tasks/x.safetensors@{digest}",
        f"org/name/tasks/x.safetensors@{digest}",
        f"/nowhere/tasks/x.safetensors@{digest}",
        f"{folder}/../served/tasks/x.safetensors@{digest}",
        f"{'x' * 5000}/tasks/x.safetensors@{digest}",
        f"/\0/tasks/x.safetensors@{digest}",
        f"~/tasks/x.safetensors@{digest}",
    ]
    for number, path in enumerate(paths):
        asked = {"lora_name": f"made-up-{number}", "lora_path": path}
        answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=asked, timeout=60)
        assert answer.status_code in (400, 404, 500), path
        message = answer.json()["error"]["message"]
        for word in ("\n", "Traceback", "KeyError", "Hub cache", "the Hub"):
            assert word not in message, path
    _check(server, world)
