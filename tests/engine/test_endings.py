"""How a server ends: told to while requests are in flight and wait for their tasks, or by a death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from engine_server import FORKED, Server, ids, words
from engine_world import PROMPTS, World
from scrapes import Scrape
from several_servers import SEVERAL_SERVERS

from vllm_vlora.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.engine

WEIGHTS = ("attention", "everything", "rslora", "half-packed")
TASKS = {f"t{number}": WEIGHTS[number % 4] for number in range(8)}
TOKENS = 100
# A model whose steps take long enough for a test to see who is in flight and who waits.
SLOW = f"""
import time
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

execute = GPUModelRunner.execute_model

def slowly(self, scheduler_output, *args, **kwargs):
    if scheduler_output.total_num_scheduled_tokens:
        time.sleep(0.08)
    return execute(self, scheduler_output, *args, **kwargs)

GPUModelRunner.execute_model = slowly
{FORKED}
"""


@pytest.fixture(scope="module")
def checkpoint(world: World) -> Path:
    tasks = {task: world.adapters[weights] for task, weights in TASKS.items()}
    return world.compress("ending", tasks, representation="private", quantize="none", ratio=0.1)


@contextmanager
def serving(
    world: World, checkpoint: Path, folder: Path, *options: str, **environment: str
) -> Iterator[Server]:
    """A server with room for half of the tasks, whose temporary files come into ``folder``."""
    nbytes = sum(entry.nbytes for entry in map(Checkpoint.open(checkpoint).entry, TASKS))
    settings = {
        "VLLM_VLORA_DEVICE_BYTES": str(nbytes // 2),
        "VLLM_VLORA_LATE_MIB": "0",
        "TMPDIR": str(folder),
    }
    folder.mkdir()
    log = folder.with_suffix(".log")
    server = Server(world, log, checkpoint, SLOW, options=options, **settings | environment)
    try:
        assert server.wait(), log.read_text()[-4000:]
        yield server
    finally:
        server.stop()


def ask(server: Server, model: str) -> httpx.Response:
    asked = {"model": model, "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0,
             "ignore_eos": True, "skip_special_tokens": False}  # fmt: skip
    return httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120)


def counted(server: Server) -> tuple[float, float, float]:
    """How many requests are in flight, how many wait for their task, and how many for tasks ever came."""
    scrape = Scrape(httpx.get(f"{server.url}/metrics", timeout=30).text)
    names = (
        "vllm:num_requests_running",
        "vllm_vlora:requests_waiting_for_load",
        "vllm_vlora:requests_total",
    )
    running, waiting, let_in = (sum(scrape.samples(name).values()) for name in names)
    return running, waiting, waiting + let_in


def until(seen: Callable[[], bool], server: Server) -> None:
    deadline = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < deadline, server.log.read_text()[-4000:]
        time.sleep(0.2)


@contextmanager
def asked(server: Server, names: Sequence[str]) -> Iterator[dict[Future[httpx.Response], str]]:
    """Requests, of which some are in flight and, of those for tasks, some wait for room for theirs."""
    tasks = sum(name in TASKS for name in names)

    def all_are_there() -> bool:
        # One that comes after a server was told to end is sent away.
        running, waiting, came = counted(server)
        return running >= 1 and waiting >= min(tasks, 1) and came >= tasks

    with ThreadPoolExecutor(len(names)) as pool:
        answers = {pool.submit(ask, server, name): name for name in names}
        until(all_are_there, server)
        assert not any(answer.done() for answer in answers)
        yield answers


def test_a_server_that_is_told_to_end_serves_first_who_waits(
    world: World, checkpoint: Path, tmp_path: Path
) -> None:
    with serving(world, checkpoint, tmp_path / "t", "--shutdown-timeout", "120") as server:
        with asked(server, list(TASKS)) as answers:
            os.kill(server.process.pid or 0, signal.SIGTERM)
            for answer, name in answers.items():
                (choice,) = answer.result().json()["choices"]
                right = words(world.reference[TASKS[name]][0])
                assert len(ids(choice["text"])) == TOKENS, (name, choice)
                assert ids(choice["text"])[: len(right)] == right, name
        server.process.join(60)
        assert server.process.exitcode == 0, server.log.read_text()[-4000:]


def family(server: Server) -> list[psutil.Process]:
    """The processes of a server that live, itself and what it forked."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == server.process.pid:
                found.append(process)
        except ProcessLookupError:
            pass  # it has ended meanwhile
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def core_of(server: Server) -> int:
    return next(p.pid for p in family(server) if p.ppid() == server.process.pid)


def worker_of(server: Server) -> int:
    return max(p.pid for p in family(server) if p.ppid() == core_of(server))


Told = tuple[set[int], int | None]
"""The status of all answers, and the server's exit code."""


def death(server: Server, names: Sequence[str], of: Callable[[Server], int]) -> Told:
    """Kill a process of a server that answers some requests while others wait: how all of it ends."""
    with asked(server, names) as answers:
        began = time.monotonic()
        os.kill(of(server), signal.SIGKILL)
        statuses = {answer.result().status_code for answer in answers}
        known = time.monotonic() - began
    server.process.join(60)
    print(f"clients know after {known:.2f} s, it ended after {time.monotonic() - began:.2f} s")
    assert not server.process.is_alive(), server.log.read_text()[-4000:]
    until(lambda: not family(server), server)
    return statuses, server.process.exitcode


@pytest.mark.parametrize(
    ("of", "options"),
    [
        pytest.param(core_of, [], id="engine core"),
        pytest.param(
            worker_of, ["--tensor-parallel-size", "2"], id="worker", marks=SEVERAL_SERVERS
        ),
    ],
)
def test_a_killed_process_ends_the_server_as_under_stock(
    world: World,
    checkpoint: Path,
    tmp_path: Path,
    of: Callable[[Server], int],
    options: Sequence[str],
) -> None:
    """So that what supervises it starts another, which finds nothing that hinders it."""
    files = sorted(checkpoint.parent.rglob("*"))
    with serving(world, checkpoint, tmp_path / "t", *options) as server:
        found = death(server, list(TASKS), of)
    assert [*(tmp_path / "t").iterdir()] == []
    assert sorted(checkpoint.parent.rglob("*")) == files
    with serving(world, checkpoint, tmp_path / "stock", *options, VLLM_PLUGINS="") as stock:
        assert found == death(stock, ["ordinary"] * len(TASKS), of)
    with serving(world, checkpoint, tmp_path / "again", *options) as again:
        for name, weights in TASKS.items():
            assert ids(again.text(name, PROMPTS[0])) == words(world.reference[weights][0]), name
