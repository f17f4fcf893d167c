"""What following the folder and counting for /metrics take from a server that is kept busy."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from harness import (
    WrongResultError,
    count,
    cpu_name,
    end_record,
    print_record,
    record,
    say,
    table,
    write_json,
)
from serving.figures import spread_of_ratios, spread_of_rounds
from serving.program import ENVIRONMENT
from serving.world import World, WorldPlan, task_id

DESCRIPTION = """\
Two real `vllm serve` on CPU with the plugin and the same checkpoint take turns with the same requests.
One looks at its folder, tells its API server what is served, and asks its engine core what /metrics
shows of it, --often times as often as users' servers do. The other does none of that
(VLLM_VLORA_FOLLOW=off, and it asks once an hour). Both are scraped once a second. Reported are requests
a second and CPU seconds of all of a server's processes for a request, and their ratios, round by round;
the answers are compared before any figure is printed. What watching as often as users' servers costs is
what the ratios' medians say, divided by --often: a few per cent of noise become a tenth of one.

Then both have nothing to do at the same time, and what watching takes in a second is told likewise.
"""
EXAMPLES = """\
  python benchmarks/run.py watching --quick          a check that it runs, about a minute
  python benchmarks/run.py watching --json FILE      some eight minutes on two cores
"""
CHECKPOINT, RANK = "nf4", 8
WATCHING, NEITHER = "watching and counting, often", "neither"
SERVERS = (WATCHING, NEITHER)
# After the last request a worker looks for another one for a second, and is asked once more.
_CALM_SECONDS = 5
_PROGRAM = "from vllm.entrypoints.cli.main import main; main()"
# What makes each process of a server watch as often as BENCH_OFTEN says.
_OFTEN = Path(__file__).with_name("often")
_SELDOM = 1 / 3600
_START_SECONDS, _LOG_CHARACTERS = 300, 4000


def add_options(parser: argparse.ArgumentParser) -> None:
    """The load."""
    parser.add_argument("--tasks", type=count, help="of the checkpoint (default: 300)")
    parser.add_argument("--requests", type=count, help="of a turn (default: 600)")
    parser.add_argument("--together", type=count, default=8, help="requests at once (default: 8)")
    parser.add_argument("--prompt-len", type=count, default=16, help="tokens (default: 16)")
    parser.add_argument("--output-len", type=count, default=16, help="tokens (default: 16)")
    parser.add_argument(
        "--often", type=count, default=20, help="times as often as users' servers (default: 20)"
    )
    parser.add_argument("--idle", type=count, help="seconds with nothing to do (default: 120)")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sizes of a smoke run where one is asked for."""
    args.tasks = args.tasks or (20 if args.quick else 300)
    args.requests = args.requests or (60 if args.quick else 600)
    args.rounds = args.rounds or (2 if args.quick else 9)
    args.idle = args.idle or (5 if args.quick else 120)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    os.environ.update(ENVIRONMENT)
    report = record(args, cpu_name(), "vllm", "torch")
    print_record(report)
    with tempfile.TemporaryDirectory(prefix="bench-watching-") as temporary:
        folder = args.work or Path(temporary)
        world = World(folder, WorldPlan(args.model, args.tasks, min(args.tasks, 16), RANK))
        world.make([CHECKPOINT])
        turns, idle = measure(args, world, Path(temporary))
    report |= figures(args, turns, idle)
    print_figures(report)
    end_record(report)
    write_json(args.json, report)
    return 0


@dataclass(frozen=True)
class Turn:
    """What a server did in its turn: wall and CPU seconds, and its answers."""

    seconds: float
    cpu_seconds: float
    answers: list[list[int]]


def measure(
    args: argparse.Namespace, world: World, logs: Path
) -> tuple[dict[str, list[Turn]], dict[str, float]]:
    """Server -> its turns without the first, which warms up; and CPU seconds of each with nothing to do.

    Raises:
        WrongResultError: the servers' answers differ.
    """
    chance = random.Random(0)
    asked = [
        (task_id(chance.randrange(args.tasks)), [chance.randrange(1000) for _ in range(args.prompt_len)])
        for _ in range(args.requests)
    ]  # fmt: skip
    found: dict[str, list[Turn]] = {name: [] for name in SERVERS}
    with contextlib.ExitStack() as running:
        servers = {
            name: running.enter_context(_server(args, world, name, logs)) for name in SERVERS
        }
        for number in range(args.rounds + 1):
            say(f"round {number} of {args.rounds}")
            # Who comes first alternates, as the machine's clock may fall within a round.
            for name in SERVERS if number % 2 else reversed(SERVERS):
                found[name].append(servers[name].turn(args, asked))
            if len({str(turns[-1].answers) for turns in found.values()}) > 1:
                raise WrongResultError("the two servers answer otherwise")
        idle = _idle(args, servers)
    return {name: turns[1:] for name, turns in found.items()}, idle


def _idle(args: argparse.Namespace, servers: dict[str, _Server]) -> dict[str, float]:
    say(f"nothing to do for {args.idle} s")
    time.sleep(_CALM_SECONDS)
    before = {name: server.cpu_seconds() for name, server in servers.items()}

    async def scrape(url: str) -> None:
        async with _client(url) as client:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_scrape(client), args.idle)

    async def scrape_all() -> None:
        await asyncio.gather(*(scrape(server.url) for server in servers.values()))

    asyncio.run(scrape_all())
    return {name: server.cpu_seconds() - before[name] for name, server in servers.items()}


@dataclass(frozen=True)
class _Server:
    url: str
    process: psutil.Process

    def turn(self, args: argparse.Namespace, asked: list[tuple[str, list[int]]]) -> Turn:
        before, began = self.cpu_seconds(), time.perf_counter()
        answers = asyncio.run(_ask_all(self.url, asked, args.together, args.output_len))
        seconds = time.perf_counter() - began
        return Turn(seconds, self.cpu_seconds() - before, answers)

    def cpu_seconds(self) -> float:
        every = [self.process, *self.process.children(recursive=True)]
        times = [process.cpu_times() for process in every]
        return sum(spent.user + spent.system for spent in times)


@contextlib.contextmanager
def _server(args: argparse.Namespace, world: World, name: str, logs: Path) -> Iterator[_Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    length = str(args.prompt_len + args.output_len)
    command = [
        sys.executable, "-c", _PROGRAM, "serve", str(world.model), "--host", "127.0.0.1",
        "--port", str(port), "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager",
        "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", str(args.together),
        "--max-model-len", length, "--max-num-seqs", str(args.together),
        "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(256 * 2**20),
    ]  # fmt: skip
    environment = os.environ | _watching(args, name) | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_VLORA_CHECKPOINT": str(world.checkpoint(CHECKPOINT)),
    }  # fmt: skip
    log = logs / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield _Server(url, psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _watching(args: argparse.Namespace, name: str) -> dict[str, str]:
    """The environment in which a server watches as it is to."""
    paths = [str(_OFTEN), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if name == WATCHING:
        return found | {"BENCH_OFTEN": str(args.often)}
    return found | {"BENCH_OFTEN": str(_SELDOM), "VLLM_VLORA_FOLLOW": "off"}


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                return
        time.sleep(0.5)
    raise WrongResultError(f"a server did not start:\n{log.read_text()[-_LOG_CHARACTERS:]}")


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120)


async def _scrape(client: httpx.AsyncClient) -> None:
    while True:
        (await client.get("/metrics")).raise_for_status()
        await asyncio.sleep(1)


async def _ask_all(
    url: str, asked: list[tuple[str, list[int]]], together: int, length: int
) -> list[list[int]]:
    """The tokens of each answer."""
    room = asyncio.Semaphore(together)
    async with _client(url) as client:

        async def ask(task: str, prompt: list[int]) -> list[int]:
            body = {
                "model": task, "prompt": prompt, "max_tokens": length, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True,
            }  # fmt: skip
            async with room:
                answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer.json()["choices"][0]["token_ids"]

        scraping = asyncio.ensure_future(_scrape(client))
        try:
            answers = await asyncio.gather(*(ask(*request) for request in asked))
            if (
                scraping.done()
            ):  # It ends by failing alone, and the turn was not watched to its end.
                scraping.result()
            return answers
        finally:
            scraping.cancel()


def figures(
    args: argparse.Namespace, turns: dict[str, list[Turn]], idle: dict[str, float]
) -> dict[str, Any]:
    """Requests a second and CPU milliseconds for a request of each server, and their ratios; and of a
    second in which nothing is to do.
    """
    rates = {name: [args.requests / turn.seconds for turn in turns[name]] for name in SERVERS}
    costs = {
        name: [1e3 * turn.cpu_seconds / args.requests for turn in turns[name]] for name in SERVERS
    }
    throughput = spread_of_ratios(rates[WATCHING], rates[NEITHER])
    cpu = spread_of_ratios(costs[WATCHING], costs[NEITHER])
    spent = {name: 1e3 * idle[name] / args.idle for name in SERVERS}
    return {
        "requests_per_second": {name: spread_of_rounds(rates[name]) for name in SERVERS},
        "cpu_milliseconds": {name: spread_of_rounds(costs[name]) for name in SERVERS},
        "throughput_ratio": throughput,
        "cpu_ratio": cpu,
        "idle_cpu_milliseconds": spent,
        "as_often_as_users_servers": {
            "throughput_lost": (1 / throughput["p50"] - 1) / args.often,
            "cpu_more": (cpu["p50"] - 1) / args.often,
            "idle_cpu_milliseconds": (spent[WATCHING] - spent[NEITHER]) / args.often,
        },
    }


def print_figures(found: dict[str, Any]) -> None:
    """A table of both servers, and the ratios."""
    rows = [
        [name, f"{found['requests_per_second'][name]['p50']:.1f}",
         f"{found['cpu_milliseconds'][name]['p50']:.2f}",
         f"{found['idle_cpu_milliseconds'][name]:.2f}"]
        for name in SERVERS
    ]  # fmt: skip
    heads = ["a server", "requests/s", "CPU ms a request", "CPU ms a second, idle"]
    print(f"\n{table(heads, rows)}")
    for ratio, what in (("throughput_ratio", "requests/s"), ("cpu_ratio", "CPU")):
        p20, p50, p80 = (found[ratio][p] for p in ("p20", "p50", "p80"))
        print(f"{what} of {WATCHING} / {NEITHER}: {p50:.3f} (p20 {p20:.3f}, p80 {p80:.3f})")
    once = found["as_often_as_users_servers"]
    print(
        f"as often as users' servers: {once['throughput_lost']:.2%} of the requests/s lost, "
        f"{once['cpu_more']:.2%} more CPU, {once['idle_cpu_milliseconds']:.2f} ms of CPU a second, idle"
    )
