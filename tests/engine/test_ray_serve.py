"""The example of Ray Serve on this machine: two replicas, each a server of its own, behind one door."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from engine_forks import ENGINE_ENVIRONMENT
from engine_server import ids, words
from engine_world import ADAPTERS, MAX_TOKENS, PROMPTS, World, exact
from places import ROOT
from several_servers import SEVERAL_SERVERS

pytest.importorskip("ray")
pytest.importorskip(
    "grpc_reflection", reason="Ray Serve is not whole here: pip install 'ray[serve]'"
)

pytestmark = [pytest.mark.engine, SEVERAL_SERVERS]

APP = ROOT / "examples" / "ray_serve" / "app.py"


@contextmanager
def running(world: World, name: str) -> Iterator[tuple[int, Callable[..., str]]]:
    """A free port, and what starts a program that serves there and returns its URL once it does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    apps: list[subprocess.Popen[bytes]] = []

    def start(arguments: Sequence[object], **variables: str) -> str:
        log = world.root / name
        with log.open("wb") as stream:
            app = subprocess.Popen(
                [sys.executable, "-P", *map(str, arguments)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENGINE_ENVIRONMENT, "RAY_DEDUP_LOGS": "0", **variables},
            )
        apps.append(app)
        wait(app, log)
        return f"http://127.0.0.1:{port}"

    try:
        yield port, start
    finally:
        for app in apps:
            children = psutil.Process(app.pid).children(recursive=True)
            app.send_signal(signal.SIGINT)
            _, left = psutil.wait_procs([psutil.Process(app.pid), *children], 60)
            for process in left:
                process.kill()


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32",
               "--enforce-eager", "--max-loras", "3", "--max-lora-rank", "16"]  # fmt: skip
    with running(world, "ray.log") as (port, start):
        yield start([APP, world.model, exact(world, "private"), "--replicas", "2", "--gpus", "0",
                     "--port", port, "--", *options])  # fmt: skip


def wait(app: subprocess.Popen[bytes], log: Path) -> None:
    """Until all replicas are ready, as Ray Serve says once they are."""
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline and app.poll() is None:
        if "is ready at" in log.read_text(errors="replace"):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace")[-6000:])


def ask(url: str, task: str, prompt: list[int], **more: object) -> httpx.Response:
    asked = {"model": task, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0,
             "ignore_eos": True, "skip_special_tokens": False, **more}  # fmt: skip
    return httpx.post(f"{url}/v1/completions", json=asked, timeout=120)


def test_every_task_answers_as_stock_vllm_from_whichever_replica(url: str, world: World) -> None:
    listed = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    assert set(ADAPTERS) < {model["id"] for model in listed}
    asked = [(name, n) for name in ADAPTERS for n in range(len(PROMPTS))] * 3
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda item: ask(url, item[0], PROMPTS[item[1]]), asked))
    for (name, n), answer in zip(asked, answers):
        text = answer.raise_for_status().json()["choices"][0]["text"]
        assert ids(text) == words(world.reference[name][n]), name
    assert len({answer.headers["x-vlora-replica"] for answer in answers}) == 2


def test_a_task_that_was_asked_for_is_asked_for_where_it_is(url: str) -> None:
    """While nobody is busy: one request after the other."""
    for task in ("attention", "rslora"):
        ask(url, task, PROMPTS[0]).raise_for_status()
        time.sleep(1.0)  # Replicas tell the router what they have.
        found = [ask(url, task, PROMPTS[0]).headers["x-vlora-replica"] for _ in range(6)]
        assert len(set(found)) <= 2
        assert max(map(found.count, found)) >= 5, found


def test_errors_and_streams_are_the_servers_own(url: str) -> None:
    unknown = ask(url, "nobody", PROMPTS[0])
    assert unknown.status_code == 404
    assert "nobody" in unknown.json()["error"]["message"]
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={"model": "attention", "prompt": PROMPTS[0], "max_tokens": 5, "stream": True},
        timeout=120,
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-1])


def test_a_checkpoint_that_is_not_there_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-P", APP, "model", "/none", "--gpus", "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: checkpoint '/none'")
