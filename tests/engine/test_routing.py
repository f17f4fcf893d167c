"""``model="auto"`` through the real ``vllm serve``: prompts of each task go to their tasks.

Judged by what stock vLLM answers with the task's own adapter.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_routers import NO_TASK, TASKS, attach, text_of
from engine_server import Server, ids, words
from engine_world import MAX_TOKENS, PROMPTS, World, exact

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.editing.routing import remove_router

pytestmark = pytest.mark.engine

ELSEWHERE = text_of(NO_TASK[:6])


@pytest.fixture(scope="module")
def folder(world: World) -> Path:
    folder = Path(shutil.copytree(exact(world, "private"), world.root / "routed"))
    attach(folder, dict(zip(TASKS, PROMPTS)))
    return folder


@pytest.fixture(scope="module")
def server(world: World, folder: Path) -> Iterator[Server]:
    server = Server(world, world.root / "routed.log", folder, VLLM_VLORA_ROUTE="blend:2")
    assert server.wait(), server.log.read_text()[-4000:]
    yield server
    server.stop()


def complete(server: Server, prompt: Any, model: str = "auto") -> httpx.Response:
    body = {
        "model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0,
        "ignore_eos": True, "skip_special_tokens": False,
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def answered(answer: httpx.Response) -> list[str]:
    return ids(answer.json()["choices"][0]["text"])


def test_prompts_go_to_their_tasks(server: Server, world: World) -> None:
    """As text and as token ids, at once, beside a prompt of no task."""
    asked = [(task, prompt) for task, prompt in zip(TASKS, PROMPTS)]
    items = [(task, i, form(p)) for i, (task, p) in enumerate(asked) for form in (list, text_of)]
    with ThreadPoolExecutor(len(items) + 1) as pool:
        other = pool.submit(complete, server, ELSEWHERE)
        answers = list(pool.map(lambda item: complete(server, item[2]), items))
    for (task, number, prompt), answer in zip(items, answers):
        assert answer.json()["model"] == answer.headers["x-vlora-tasks"] == task
        assert 0.5 < float(answer.headers["x-vlora-confidence"]) <= 1
        if isinstance(prompt, list):
            assert answered(answer) == words(world.reference[task][number]), task
        else:
            # Words of special tokens are none of a text's, which then is another prompt.
            assert answered(answer) == answered(complete(server, prompt, task)), task
    base = other.result()
    assert base.json()["model"] == base.headers["x-vlora-tasks"] == "base"
    assert answered(base) == answered(complete(server, ELSEWHERE, "base"))


def test_chats_and_streams(server: Server) -> None:
    for task, prompt in zip(TASKS, PROMPTS):
        content = text_of(prompt)
        messages = [
            {"role": "system", "content": ELSEWHERE},
            {"role": "user", "content": [{"type": "text", "text": content}]},
        ]
        body = {"messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
        url = f"{server.url}/v1/chat/completions"
        found = httpx.post(url, json={"model": "auto", **body}, timeout=60)
        wanted = httpx.post(url, json={"model": task, **body}, timeout=60)
        assert found.status_code == wanted.status_code == 200, found.text
        assert found.json()["model"] == found.headers["x-vlora-tasks"] == task
        message = found.json()["choices"][0]["message"]
        assert message == wanted.json()["choices"][0]["message"]
        body = {"model": "auto", "prompt": content, "max_tokens": 1, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            assert stream.headers["x-vlora-tasks"] == task
            assert f'"model":"{task}"' in "".join(stream.iter_text())
        body = {"model": "auto", "input": content, "max_output_tokens": 2}
        found = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
        assert found.json()["model"] == found.headers["x-vlora-tasks"] == task


def test_a_prompt_of_two_tasks_is_their_blend(server: Server) -> None:
    text = text_of(PROMPTS[0][:6] + PROMPTS[1][:6])
    answer = complete(server, text)
    name = answer.json()["model"]
    assert name == answer.headers["x-vlora-tasks"]
    assert {part.partition("*")[0] for part in name.split("+")} == {"attention", "everything"}
    # What this blend is was judged where it is named.
    assert answered(answer) == answered(complete(server, text, name))


def test_it_is_listed_and_counted(server: Server) -> None:
    assert "auto" in server.listed()

    def counted() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("vllm_vlora:rout")
        }

    complete(server, PROMPTS[0])
    before = counted()
    complete(server, PROMPTS[0])
    complete(server, ELSEWHERE)
    grown = {name: value - before[name] for name, value in counted().items()}
    assert grown['vllm_vlora:routed_requests_total{picked="task"}'] == 1
    assert grown['vllm_vlora:routed_requests_total{picked="base"}'] == 1
    assert grown["vllm_vlora:route_confidence_count"] == 2


def test_another_router_is_used_while_the_server_runs(server: Server, folder: Path) -> None:
    attach(folder, dict(zip(TASKS, PROMPTS[1:] + PROMPTS[:1])))
    started = time.monotonic()
    while complete(server, PROMPTS[0]).json()["model"] != "rslora":
        assert time.monotonic() < started + 2, server.log.read_text()[-4000:]
        time.sleep(0.05)
    # One that is damaged is not used, and the one before it is.
    [network] = folder.glob("router-*")
    record = (folder / "router.json").read_bytes()
    (folder / "router.json").write_bytes(record.replace(b'"version": 1', b'"version": 7'))
    while "router.json: version 7 is unknown" not in server.log.read_text():
        assert time.monotonic() < started + 20
        time.sleep(0.1)
    assert complete(server, PROMPTS[0]).json()["model"] == "rslora"
    (folder / "router.json").write_bytes(record)
    assert network.exists()
    assert Checkpoint.open(folder).router is not None
    remove_router(folder)
    started = time.monotonic()
    while "auto" in server.listed():
        assert time.monotonic() < started + 5, server.log.read_text()[-4000:]
        time.sleep(0.1)
    gone = httpx.post(
        f"{server.url}/v1/completions", json={"model": "auto", "prompt": "w3"}, timeout=60
    )
    assert gone.status_code == 404
    assert "vllm-vlora router train" in gone.text
