"""Blends, aliases and canaries through the real ``vllm serve``, judged by PEFT's own updates, summed."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engine_server import Server
from engine_sums import Sums
from engine_world import ADAPTERS, MAX_TOKENS, PROMPTS, World, exact, mixed

from vllm_vlora.editing.aliasing import set_alias

pytestmark = pytest.mark.engine

BLENDS: dict[str, dict[str, float]] = {
    "attention*0.7+everything*0.3": {"attention": 0.7, "everything": 0.3},
    "rslora-attention*0.5": {"rslora": 1.0, "attention": -0.5},
    # An id with a minus in it.
    "half-packed*0.25": {"half-packed": 0.25},
    "everything*0.5+rslora*2-attention": {"everything": 0.5, "rslora": 2.0, "attention": -1.0},
}
CANARY = "attention 70, everything 30"


def check(sums: Sums, weights: dict[str, float], prompt: list[int], answer: Any) -> None:
    """An answer of the server is what the sum answers."""
    tokens = [int(word.removeprefix("w")) for word in answer.logprobs.tokens]
    sums.check(weights, prompt, tokens, answer.logprobs.token_logprobs)


@pytest.fixture(scope="module")
def sums(world: World) -> Sums:
    return Sums(world)


@pytest.fixture(scope="module")
def folder(world: World, kind: str) -> Path:
    """The checkpoint that is served."""
    folder = world.root / f"blended-{kind}"
    shutil.copytree(mixed(world) if kind == "mixed" else exact(world, "private"), folder)
    set_alias(folder, "prod", "attention")
    set_alias(folder, "prod/mix", "attention*0.70+everything*.3")
    set_alias(folder, "canary", CANARY)
    return folder


@pytest.fixture(scope="module", params=["private", "mixed"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(world: World, kind: str, folder: Path) -> Iterator[Server]:
    server = Server(world, world.root / f"blends-{kind}.log", folder)
    assert server.wait(), server.log.read_text()[-4000:]
    yield server
    server.stop()


def ask(server: Server, model: str, prompt: list[int], **options: Any) -> Any:
    return server.client.completions.create(
        model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, logprobs=2,
        extra_body={"ignore_eos": True, "skip_special_tokens": False, **options},
    )  # fmt: skip


def test_a_blend_is_the_sum_of_its_tasks_beside_them(server: Server, sums: Sums) -> None:
    singles: dict[str, dict[str, float]] = {name: {name: 1.0} for name in ("attention", "rslora")}
    asked = {**BLENDS, **singles, "base": {}}
    items = [(name, prompt) for prompt in PROMPTS for name in asked]
    with ThreadPoolExecutor(len(items)) as pool:
        answers = list(pool.map(lambda item: ask(server, *item), items))
    for (name, prompt), answer in zip(items, answers):
        check(sums, asked[name], prompt, answer.choices[0])


def test_blends_of_embeddings_and_heads(server: Server, sums: Sums) -> None:
    """These stand in slots, beside direct ones in one batch."""
    asked = {
        "embedding*0.5+output head/ü*0.5": {"embedding": 0.5, "output head/ü": 0.5},
        "attention": {"attention": 1.0},
    }
    items = [(name, prompt) for prompt in PROMPTS for name in asked]
    with ThreadPoolExecutor(len(items)) as pool:
        answers = list(pool.map(lambda item: ask(server, *item), items))
    for (name, prompt), answer in zip(items, answers):
        check(sums, asked[name], prompt, answer.choices[0])


def test_an_answer_says_which_tasks_answered(server: Server) -> None:
    for name, answered in (
        ("attention", "attention"),
        ("prod", "attention"),
        ("everything*0.30+attention*.7", "attention*0.7+everything*0.3"),
        ("prod/mix", "attention*0.7+everything*0.3"),
        ("prod*0.7+everything*0.3", "attention*0.7+everything*0.3"),
    ):
        body = {"model": name, "prompt": PROMPTS[0], "max_tokens": 1}
        for path, extra in (
            ("completions", {}),
            ("chat/completions", {"messages": [{"role": "user", "content": "w3"}]}),
            ("responses", {"input": "w3", "max_output_tokens": 2}),
        ):
            sent = {**body, **extra}
            if path != "completions":
                del sent["prompt"]
            if path == "responses":
                del sent["max_tokens"]
            answer = httpx.post(f"{server.url}/v1/{path}", json=sent, timeout=60)
            assert answer.status_code == 200, (path, answer.text)
            assert answer.json()["model"] == answered, path
            shown = answer.headers.get("x-vlora-tasks")
            assert shown == (None if name == "attention" else answered), path
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60
        ) as stream:
            assert stream.headers.get("x-vlora-tasks") == (
                None if name == "attention" else answered
            )
            assert f'"model":"{answered}"' in "".join(stream.iter_text())
        tokens = httpx.post(
            f"{server.url}/tokenize", json={"model": name, "prompt": "w3"}, timeout=60
        )
        assert tokens.json()["tokens"] == [3]


def test_tasks_and_aliases_are_listed_and_blends_are_not(server: Server) -> None:
    ask(server, "attention*0.5+everything*0.5", PROMPTS[0])
    models = [model.id for model in server.client.models.list().data]
    assert sorted(models) == sorted(["base", "ordinary", *ADAPTERS, "prod", "prod/mix", "canary"])


def test_a_canary_is_sticky_and_falls_on_its_share_of_the_clients(server: Server) -> None:
    def answered(headers: dict[str, str], **body: Any) -> str:
        sent = {"model": "canary", "prompt": [5], "max_tokens": 1, **body}
        answer = httpx.post(f"{server.url}/v1/completions", json=sent, headers=headers, timeout=60)
        assert answer.json()["model"] == answer.headers["x-vlora-tasks"]
        return answer.json()["model"]

    with ThreadPoolExecutor(16) as pool:
        by_header = list(pool.map(lambda n: answered({"X-VLora-Key": f"k{n}"}), range(60)))
        by_user = list(pool.map(lambda n: answered({}, user=f"k{n}"), range(60)))
        again = list(
            pool.map(lambda n: answered({"X-VLora-Key": f"k{n}"}, user="other"), range(60))
        )
        nobody = list(pool.map(lambda _: answered({}), range(60)))
    # A key means the same wherever it comes from, and the header goes before the body.
    assert by_header == by_user == again
    for names in (by_header, nobody):
        counts = Counter(names)
        assert counts.keys() == {"attention", "everything"}
        # 30 % of 60: outside of 5 to 33 once in 10,000.
        assert 5 <= counts["everything"] <= 33


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", None),
        ("attention+nobody", "'\\+nobody' is none"),
        ("attention*0+everything", "weight 0"),
        ("attention+attention", "names task 'attention' twice"),
        ("attention*1e9", None),
        ("attention+ordinary", "is none"),
        ("x" * 5000, "at most 1024 characters"),
    ],
)
def test_what_is_no_name_is_a_404_that_says_why(
    server: Server, name: str, message: str | None
) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        ask(server, name, PROMPTS[0])
    if message is not None:
        assert caught.match(message)


def test_bad_names_cost_little(server: Server, sums: Sums) -> None:
    """As little as any 404, however they are made up, and nothing is kept of them."""

    def seconds(names: list[str]) -> float:
        started = time.perf_counter()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for name in names:
                answer = client.post("/v1/completions", json={"model": name, "prompt": [5]})
                assert answer.status_code == 404
        return time.perf_counter() - started

    plain = min(seconds([f"nobody{n}" for n in range(250)]) for _ in range(2))
    hostile = [
        f"{'attention+rslora-' * 3}{'everything-' * 20}half-packed*{n}x" for n in range(1000)
    ]
    assert seconds(hostile) < 4 * 3 * plain
    [weights] = [BLENDS[name] for name in list(BLENDS)[:1]]
    check(sums, weights, PROMPTS[1], ask(server, next(iter(BLENDS)), PROMPTS[1]).choices[0])


def test_a_blend_that_does_not_fit_is_its_clients_error(server: Server) -> None:
    """Of a rank above the slots', where it cannot run direct; the log says why."""
    body = {"model": "everything+half-packed+embedding", "prompt": [5], "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code in (400, 500), answer.text
    assert "has rank 24, the engine allows 16; start vLLM with --max-lora-rank" in (
        answer.text + server.log.read_text()
    )
    assert ask(server, "attention", PROMPTS[0]).model == "attention"


def test_an_alias_is_moved_while_the_server_runs(server: Server, folder: Path) -> None:
    set_alias(folder, "prod", "rslora")
    deadline = time.monotonic() + 10
    while ask(server, "prod", PROMPTS[0]).model != "rslora":
        assert time.monotonic() < deadline, server.log.read_text()[-4000:]
        time.sleep(0.1)
    set_alias(folder, "later", "everything*0.5+rslora")
    while "later" not in [model.id for model in server.client.models.list().data]:
        assert time.monotonic() < deadline, server.log.read_text()[-4000:]
        time.sleep(0.1)
    assert ask(server, "later", PROMPTS[0]).model == "everything*0.5+rslora"
