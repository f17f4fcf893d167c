"""Tasks that cannot be brought, and a server that ends while tasks come: what clients are told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_server import Server, ids, words
from engine_world import PROMPTS, World

from vllm_vlora.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.engine

# What an embedding model has, too.
WEIGHTS = ("attention", "everything", "rslora", "half-packed")
TASKS = {f"t{number}": WEIGHTS[number % 4] for number in range(16)}
HELD = 4
GONE, DAMAGED = "t14", "t15"
CHAT = {"messages": [{"role": "user", "content": "w20 w21"}]}
TEXT = {"prompt": PROMPTS[0]}


@pytest.fixture(scope="module")
def checkpoint(world: World) -> Path:
    tasks = {task: world.adapters[weights] for task, weights in TASKS.items()}
    return world.compress("failing", tasks, representation="private", quantize="none", ratio=0.1)


def _serve(world: World, checkpoint: Path, log: Path, *options: str, **environment: str) -> Server:
    largest = max(entry.nbytes for entry in map(Checkpoint.open(checkpoint).entry, TASKS))
    settings = {
        "VLLM_VLORA_DEVICE_BYTES": str(HELD * largest),
        "VLLM_VLORA_LATE_MIB": "0",
        "VLLM_VLORA_HOST_BYTES": "0",
        "VLLM_VLORA_FOLLOW": "off",
    }
    server = Server(world, log, checkpoint, options=options, **settings | environment)
    assert server.wait(), log.read_text()[-4000:]
    return server


@contextlib.contextmanager
def _spoilt(checkpoint: Path) -> Iterator[None]:
    """The file of one task is gone, and another's damaged."""
    opened = Checkpoint.open(checkpoint)
    files = {task: checkpoint / opened.record(task).file for task in (GONE, DAMAGED)}
    whole = {task: file.read_bytes() for task, file in files.items()}
    files[GONE].unlink()
    files[DAMAGED].write_bytes(whole[DAMAGED][::-1])
    try:
        yield
    finally:
        for task, file in files.items():
            file.write_bytes(whole[task])


def _post(server: Server, route: str, model: str, **body: Any) -> httpx.Response:
    asked = {"model": model, "max_tokens": 4, **body}
    return httpx.post(f"{server.url}/v1/{route}", json=asked, timeout=60)


def _check_errors(server: Server, route: str, body: dict[str, Any]) -> None:
    """Each of several callers, who meet different API servers, is told why."""
    with ThreadPoolExecutor(8) as pool:
        names = [GONE, DAMAGED, "t1"] * 4
        answers = list(pool.map(lambda name: _post(server, route, name, **body), names))
    for name, answer in zip(names, answers):
        if name == "t1":
            assert answer.status_code == 200, answer.text
            continue
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == (503, "Service Unavailable")
        why = "the file is missing" if name == GONE else "SHA-256 differs"
        assert f"task '{name}': " in error["message"]
        assert why in error["message"]
        assert "\n" not in error["message"]


def test_every_client_is_told_why_and_the_others_are_served(
    world: World, checkpoint: Path, tmp_path: Path
) -> None:
    server = _serve(world, checkpoint, tmp_path / "log", "--api-server-count", "2")
    try:
        with _spoilt(checkpoint):
            for route, body in (("completions", TEXT), ("chat/completions", CHAT)):
                _check_errors(server, route, body)
                stream = _post(server, route, GONE, stream=True, **body)
                first = json.loads(stream.text.splitlines()[0].removeprefix("data: "))
                assert first["error"]["code"] == 503
                assert f"task '{GONE}': " in first["error"]["message"]
            # Several answers to one request, and several prompts in one.
            assert _post(server, "completions", GONE, n=3, **TEXT).status_code == 503
            assert _post(server, "completions", DAMAGED, prompt=PROMPTS[:3]).status_code == 503
        for name in (GONE, DAMAGED):
            assert ids(server.text(name, PROMPTS[0])) == words(world.reference[TASKS[name]][0])
    finally:
        server.stop()


def test_an_embedding_whose_task_is_gone_ends_no_other(
    world: World, checkpoint: Path, tmp_path: Path
) -> None:
    server = _serve(world, checkpoint, tmp_path / "log", "--runner", "pooling")
    try:
        before = _post(server, "embeddings", "t1", input=[PROMPTS[0]]).json()["data"]
        with _spoilt(checkpoint):
            _check_errors(server, "embeddings", {"input": [PROMPTS[0]]})
        assert _post(server, "embeddings", "t1", input=[PROMPTS[0]]).json()["data"] == before
        assert _post(server, "embeddings", GONE, input=[PROMPTS[0]]).status_code == 200
    finally:
        server.stop()
