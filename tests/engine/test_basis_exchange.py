"""A checkpoint on another shared basis is published under a server, whose layers take that basis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from engine_server import FORKED, Server, ids, words
from engine_world import PROMPTS, World, all_directions
from openai import Stream
from openai.types import Completion
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.engine

# Weights by the name of the adapter that has them. The second collection's basis is narrower in every
# layer, the third's is wider in some.
FIRST = {"a": "attention", "b": "everything", "c": "rslora", "d": "half-packed"}
SECOND = {"a": "everything", "b": "attention", "c": "rslora"}
WIDER = {"a": "rslora", "b": "everything", "c": "attention", "d": "half-packed", "e": "ordinary"}
SECONDS = 30.0
# Longer than a block of keys and values, which on CPU is one of 128 tokens.
LONG_PROMPT = [(7 * j) % 250 + 1 for j in range(150)]


# vLLM for CPU fails in its first step otherwise: the second rank has no buffers for what the first sends.
PIPELINED = f"""
from vllm.v1.worker.cpu_worker import CPUWorker

measure = CPUWorker.determine_available_memory

def profile_first(self):
    self.model_runner.profile_run()
    return measure(self)

CPUWorker.determine_available_memory = profile_first
{FORKED}
"""


@dataclass
class Published:
    """A server, and the folder that it follows: a link, which is moved to whole checkpoints."""

    world: World
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    script: str = FORKED

    def __post_init__(self) -> None:
        self.own = self.world.root / f"exchange-{time.monotonic_ns()}"
        self.folder, log = self.own / "followed", self.own / "log"
        self.made: dict[str, Path] = {}
        self.publish(FIRST)
        self.server = Server(
            self.world, log, self.folder, self.script, self.options, **self.environment
        )
        assert self.server.wait(), self.log()

    def publish(self, tasks: dict[str, str]) -> None:
        link = self.own / "next"
        link.symlink_to(self.make(tasks))
        link.replace(self.folder)

    def make(self, tasks: dict[str, str]) -> Path:
        """A checkpoint that loses nothing, made once."""
        if str(tasks) not in self.made:
            name = f"{self.own.name}/{len(self.made)}"
            self.made[str(tasks)] = self.compress(name, tasks)
        return self.made[str(tasks)]

    def compress(self, name: str, tasks: dict[str, str]) -> Path:
        adapters = {**self.world.adapters, "ordinary": self.world.ordinary}
        chosen = {task: adapters[weights] for task, weights in tasks.items()}
        return self.world.compress(
            name,
            chosen,
            force=True,
            representation="joint",
            quantize="none",
            num_components=all_directions(chosen),
        )

    def log(self) -> str:
        lines = self.server.log.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if '"GET /' not in line)

    def value(self, name: str, **labels: str) -> float:
        """Of a metric, added up over engine cores; of the last second."""
        text = httpx.get(f"{self.server.url}/metrics", timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def until(self, holds: Callable[[], object]) -> None:
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < SECONDS, self.log()[-4000:]
            time.sleep(0.1)

    def until_listed(self, tasks: dict[str, str]) -> None:
        wanted = {"base", "ordinary", *tasks}
        self.until(lambda: all(self.server.listed() == wanted for _ in range(8)))

    def until_taken(self, count: int) -> None:
        """Until so many states were taken."""
        self.until(lambda: self.value("vllm_vlora:checkpoint_reloads_total") == count)

    def until_served(self, tasks: dict[str, str], count: int) -> None:
        """Until the state that is the ``count``-th that was taken is listed by all API servers."""
        self.until_taken(count)
        self.until_listed(tasks)
        # Names alone say nothing of digests: twice the time in which each asks.
        time.sleep(1.5)

    def check(self, tasks: dict[str, str]) -> None:
        """Everything answers as its adapter does under stock vLLM, all at once."""
        wanted = {"base": "base", "ordinary": "ordinary", **tasks}
        with ThreadPoolExecutor(len(wanted)) as pool:
            texts = list(pool.map(lambda name: self.server.text(name, PROMPTS[0]), wanted))
        for (name, weights), text in zip(wanted.items(), texts):
            assert ids(text) == words(self.world.reference[weights][0]), name

    def begin_long(self, name: str) -> Stream[Completion]:
        """An answer that has begun: what its name means is settled, whatever is published from now on."""
        return self.server.client.completions.create(
            model=name, prompt=PROMPTS[1], max_tokens=240, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )  # fmt: skip

    def long(self, name: str) -> list[str]:
        return rest_of(self.begin_long(name))

    def ask_until(self, ended: threading.Event, name: str, *states: dict[str, str]) -> int:
        """How often a task was asked, which answered each time as in one of these states."""
        allowed = [words(self.world.reference[tasks[name]][0]) for tasks in states]
        count = 0
        while not ended.is_set():
            assert ids(self.server.text(name, PROMPTS[0])) in allowed, name
            count += 1
        return count

    def cached(self, name: str) -> list[str]:
        """An answer to the long prompt, whose first block the second request finds in the cache."""
        first, second = (
            self.server.client.completions.create(
                model=name, prompt=LONG_PROMPT, max_tokens=20, temperature=0,
                extra_body={"ignore_eos": True, "skip_special_tokens": False},
            )
            for _ in range(2)
        )  # fmt: skip
        assert first.choices[0].text == second.choices[0].text
        usage = second.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 128
        return ids(first.choices[0].text)

    def exchanges(self) -> float:
        return self.value("vllm_vlora:basis_exchanges_total")

    def all_direct(self, tasks: dict[str, str]) -> bool:
        return self.value("vllm_vlora:direct_tasks") == len(tasks)


def rest_of(answer: Stream[Completion]) -> list[str]:
    return ids("".join(piece.choices[0].text for piece in answer))


@contextmanager
def set_at_the_end(event: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        event.set()


@pytest.fixture(params=["auto", "direct"])
def published(world: World, request: pytest.FixtureRequest) -> Iterator[Published]:
    servers = 2 if request.param == "auto" else 1
    made = Published(
        world,
        (
            "--api-server-count",
            str(servers),
            "--enable-prefix-caching",
            "--enable-prompt-tokens-details",
        ),
        {"VLLM_VLORA_MODE": request.param},
    )
    yield made
    made.server.stop()


def test_a_changed_basis_is_exchanged_and_what_runs_ends_on_the_one_before(
    published: Published,
) -> None:
    published.check(FIRST)
    published.until(lambda: published.all_direct(FIRST))
    before = {name: published.long(name) for name in "ab"}
    published.make(SECOND)
    cached = {name: published.cached(name) for name in "ab"}
    assert cached["a"] != cached["b"]
    ended = threading.Event()
    # In this order, so that nobody asks on where something is wrong.
    with ThreadPoolExecutor(84) as pool, set_at_the_end(ended):
        # In flight while the basis changes, some of them waiting for a place in a batch.
        names = [name for name in "ab" for _ in range(40)]
        begun = list(pool.map(published.begin_long, names))
        running = [(name, pool.submit(rest_of, answer)) for name, answer in zip(names, begun)]
        # Whoever asks meanwhile is answered, with the weights of before or those of after.
        asking = [pool.submit(published.ask_until, ended, name, FIRST, SECOND) for name in "aabc"]
        published.publish(SECOND)
        # The metrics lag a second behind.
        published.until(lambda: "is served now" in published.log())
        assert not all(future.done() for _, future in running)
        published.until_served(SECOND, 1)
        published.check(SECOND)
        # Under the names and with the prompt of before, of which no old block may be hit.
        assert [published.cached(name) for name in "ab"] == [cached["b"], cached["a"]]
        for name, future in running:
            assert future.result() == before[name], "it began on the basis of before"
    assert all(future.result() > 1 for future in asking)
    published.until(lambda: published.exchanges() == 1)
    published.until(lambda: published.all_direct(SECOND))
    assert "took the place of those before" in published.log()
    after = {name: published.long(name) for name in "ab"}
    assert after != before
    # And back to what the engine started with.
    published.publish(FIRST)
    published.until_served(FIRST, 2)
    published.check(FIRST)
    assert {name: published.long(name) for name in "ab"} == before
    published.until(lambda: published.exchanges() == 2)
    published.until(lambda: published.all_direct(FIRST))
    # Wider than the layers have room for, and by the command that users give.
    published.compress(f"{published.own.name}/followed", WIDER)
    if published.environment["VLLM_VLORA_MODE"] == "direct":
        published.until(lambda: "has another basis than the layers hold" in published.log())
        published.check(FIRST)
        return
    published.until_served(WIDER, 3)
    published.check(WIDER)
    published.until(lambda: published.exchanges() == 2)
    assert "its layer has room for" in published.log()


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_every_rank_exchanges_its_share_in_one_step(world: World, parallel: str) -> None:
    published = Published(
        world,
        (f"--{parallel}-parallel-size", "2"),
        # Nobody waits: the tasks are materialized until no request is on the basis of before.
        {"VLLM_VLORA_BASIS_WAIT": "0"},
        PIPELINED if parallel == "pipeline" else FORKED,
    )
    try:
        published.check(FIRST)
        before = published.long("b")
        published.make(SECOND)
        running = [published.begin_long("b") for _ in range(6)]
        published.publish(SECOND)
        published.until_served(SECOND, 1)
        published.check(SECOND)
        for answer in running:
            assert rest_of(answer) == before
        published.until(lambda: published.exchanges() == 1)
        published.check(SECOND)
        published.until(lambda: published.all_direct(SECOND))
    finally:
        published.server.stop()
