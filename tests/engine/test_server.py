"""The real ``vllm serve`` with the plugin, asked through the OpenAI client."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from engine_server import OURS, Server, ids, words
from engine_world import ADAPTERS, MAX_TOKENS, PROMPTS, World, exact, for_stock, mixed
from file_server import file_server
from places import ROOT
from scrapes import Scrape
from typer.testing import CliRunner

from vllm_vlora.checkpoint.attachments import AttachmentWriter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.plugin.identity import task_path
from vllm_vlora.tools.cli import app

pytestmark = pytest.mark.engine

TEMPLATED = sorted(ADAPTERS)[0]
TEMPLATE = "w7 {% for m in messages %}w9 {{ m['content'] }} {% endfor %}w8"


@pytest.fixture(scope="module")
def checkpoint(world: World) -> Path:
    """The tasks, one of which brought a chat template."""
    folder = world.root / "served"
    shutil.copytree(exact(world, "private"), folder)
    (world.root / "template.jinja").write_text(TEMPLATE)
    writer = AttachmentWriter(folder)
    writer.attach(TEMPLATED, {"chat_template.jinja": world.root / "template.jinja"})
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def server(world: World, checkpoint: Path) -> Iterator[Server]:
    server = Server(
        world, world.root / "server.log", checkpoint, OURS, VLLM_VLORA_CHAT_TEMPLATES="on"
    )
    assert server.wait(), server.log.read_text()[-4000:]
    yield server
    server.stop()


def test_the_line_that_serves_is_shown(server: Server, checkpoint: Path) -> None:
    line = server.log.read_text().splitlines()[0]
    assert re.match(rf"VLLM_VLORA_CHECKPOINT={re.escape(str(checkpoint))} \S*vllm serve ", line)
    # What is given stands there once, as it was given.
    for option in ("--enable-lora", "--max-loras 3", "--max-lora-rank 16"):
        assert line.count(option.split()[0]) == line.count(option) == 1


def test_every_task_is_listed_without_opening_the_load_routes(server: Server) -> None:
    models = {model.id: model for model in server.client.models.list().data}
    assert set(models) == {"base", "ordinary", *ADAPTERS}
    for route in ("load_lora_adapter", "unload_lora_adapter"):
        answer = httpx.post(f"{server.url}/v1/{route}", json={"lora_name": "x", "lora_path": "/x"})
        assert answer.status_code == 404


def test_ready_means_that_every_task_is_there(server: Server, checkpoint: Path) -> None:
    for folder, code in ((checkpoint, 0), (ROOT / "tests/data/format1", 1)):
        done = CliRunner().invoke(app, ["ready", str(folder), "--url", server.url])
        assert done.exit_code == code, done.output


def test_all_kinds_of_requests_at_once(server: Server, world: World) -> None:
    names = ["base", "ordinary", *ADAPTERS]
    items = [(name, number) for number in range(len(PROMPTS)) for name in names]
    with ThreadPoolExecutor(len(items)) as pool:
        texts = list(pool.map(lambda item: server.text(item[0], PROMPTS[item[1]]), items))
    for (name, number), text in zip(items, texts):
        assert ids(text) == words(world.reference[name][number]), (name, number)


def test_a_chat_is_rendered_with_the_template_that_its_task_brought(server: Server) -> None:
    messages = [{"role": "user", "content": "w20 w21"}, {"role": "user", "content": "w22"}]
    root, own, other = server.url, [7, 9, 20, 21, 9, 22, 8], sorted(ADAPTERS)[1]
    rendered = {TEMPLATED: own, other: [20, 21, 22], "base": [20, 21, 22], "ordinary": [20, 21, 22]}
    for model, tokens in rendered.items():
        asked = {"model": model, "messages": messages}
        answer = httpx.post(f"{root}/tokenize", json=asked, timeout=60).json()
        assert answer["tokens"] == tokens, model
        chat = server.client.chat.completions.create(
            model=model, messages=messages, max_tokens=MAX_TOKENS, temperature=0,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )  # fmt: skip
        assert chat.choices[0].message.content == server.text(model, tokens), model
    asked = {"model": TEMPLATED, "messages": messages, "chat_template": "w3"}
    answer = httpx.post(f"{root}/v1/chat/completions", json=asked, timeout=60)
    assert answer.status_code == 400, "a request's own template stays the operator's choice"


@pytest.mark.parametrize("name", ["nobody", "../../etc/passwd", "x" * 300, "é"])
def test_an_unknown_task_is_a_404_in_the_apis_own_form(server: Server, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        server.text(name, PROMPTS[0])
    assert caught.value.body["type"] == "NotFoundError"  # type: ignore[index]
    assert server.text("base", PROMPTS[0])


def test_the_checkpoint_may_vanish_while_the_server_runs(
    server: Server, world: World, checkpoint: Path
) -> None:
    """Everything is resident: nothing is read from disk when a request switches task."""
    aside = shutil.move(checkpoint, checkpoint.with_name("aside"))
    try:
        for name in ADAPTERS:
            text = server.text(name, PROMPTS[2])
            assert ids(text) == words(world.reference[name][2])
    finally:
        shutil.move(aside, checkpoint)


def test_a_checkpoint_at_a_url_outlives_its_store(world: World, tmp_path: Path) -> None:
    """Every process reads the state that the first one fetched; the store is gone before they start."""
    folder = exact(world, "joint")
    with file_server(folder.parent) as store:
        url = f"{store.url}/{folder.name}?sig=S3cr3t"
        cache = {"VLLM_VLORA_CACHE": str(tmp_path / "cache")}
        subprocess.run(
            [sys.executable, "-P", "-m", "vllm_vlora.tools", "validate", url],
            env={**os.environ, **cache},
            check=True,
        )
    server = Server(world, tmp_path / "server.log", url, **cache)
    try:
        assert server.wait(), server.log.read_text()[-4000:]
        for name in ADAPTERS:
            assert ids(server.text(name, PROMPTS[1])) == words(world.reference[name][1])
    finally:
        server.stop()
    log = server.log.read_text()
    assert "the state that was fetched last is used" in log
    assert "S3cr3t" not in log


def _scrape(server: Server) -> Scrape:
    return Scrape(httpx.get(f"{server.url}/metrics", timeout=30).text)


def test_tasks_far_away_come_when_they_are_asked_for(world: World, tmp_path: Path) -> None:
    folder = exact(world, "joint")
    with file_server(folder.parent) as store:
        url = f"{store.url}/{folder.name}"
        server = Server(
            world,
            tmp_path / "server.log",
            url,
            VLLM_VLORA_CACHE=str(tmp_path / "cache"),
            VLLM_VLORA_FETCH="asked",
        )
        try:
            assert server.wait(), server.log.read_text()[-4000:]
            assert server.listed() >= set(ADAPTERS)
            assert not [name for name in store.asked if "/tasks/" in name]
            for count, name in enumerate(ADAPTERS, 1):
                assert ids(server.text(name, PROMPTS[1])) == words(world.reference[name][1])
                assert len([n for n in store.asked if "/tasks/" in n]) == count
            deadline = time.monotonic() + 60

            # The API server asks once a second: it may show the last task as here and not yet let in.
            def counted(shown: Scrape) -> bool:
                asked = shown.value("vllm_vlora:requests_total", tier="remote")
                return asked == len(ADAPTERS) and not shown.value("vllm_vlora:tasks", tier="remote")

            while not counted(shown := _scrape(server)):
                assert time.monotonic() < deadline, shown.samples("vllm_vlora:requests_total")
                time.sleep(0.2)
            loads = "vllm:lora_adapter_load_seconds_count"
            assert shown.value(loads, transition="fetch") == len(ADAPTERS)
            store.status = 503
            with ThreadPoolExecutor(len(ADAPTERS)) as pool:
                texts = list(pool.map(lambda name: server.text(name, PROMPTS[0]), ADAPTERS))
            for name, text in zip(ADAPTERS, texts):
                assert ids(text) == words(world.reference[name][0])
        finally:
            server.stop()


def test_runtime_updating_resolves_and_renews_tasks(world: World, tmp_path: Path) -> None:
    """With VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: a new task is found, a re-published one renewed."""
    first, second, *_ = ADAPTERS
    path = world.compress("live", {"task": world.adapters[first]}, ratio=0.1)
    server = Server(world, tmp_path / "log", path, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")
    try:
        assert server.wait(), server.log.read_text()[-4000:]
        assert ids(server.text("task", PROMPTS[0])) == words(world.reference[first][0])
        world.compress(
            "live",
            {"task": world.adapters[second], "new": world.adapters[first]},
            force=True,
            ratio=0.1,
        )
        assert ids(server.text("new", PROMPTS[0])) == words(world.reference[first][0])
        answer = httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "task"})
        assert answer.status_code == 200
        assert ids(server.text("task", PROMPTS[0])) == words(world.reference[second][0])
        with pytest.raises(openai.NotFoundError):
            server.text("nobody", PROMPTS[0])
    finally:
        server.stop()


def test_ordinary_adapters_come_and_go_beside_tasks(world: World, tmp_path: Path) -> None:
    """By vLLM's own routes and its own resolver, all with stock vLLM's answers."""
    first, second, third, *_ = ADAPTERS
    path = world.compress("beside", {"task": world.adapters[first]}, ratio=0.1)
    kept = shutil.copytree(for_stock(world.adapters[third]), tmp_path / "kept" / "resolved")
    config = json.loads((kept / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(world.model)
    (kept / "adapter_config.json").write_text(json.dumps(config))
    server = Server(
        world,
        tmp_path / "log",
        path,
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
        VLLM_PLUGINS="vlora,lora_filesystem_resolver",
        VLLM_LORA_RESOLVER_CACHE_DIR=str(kept.parent),
    )
    answered = {"base": "base", "ordinary": "ordinary", "task": first}

    def post(route: str, name: str, **more: str) -> int:
        asked = {"lora_name": name, **more}
        return httpx.post(f"{server.url}/v1/{route}", json=asked, timeout=60).status_code

    def load(name: str, adapter: Path) -> int:
        return post("load_lora_adapter", name, lora_path=str(adapter))

    def check() -> None:
        items = [(name, number) for number in range(len(PROMPTS)) for name in answered]
        with ThreadPoolExecutor(len(items)) as pool:
            texts = list(pool.map(lambda item: server.text(item[0], PROMPTS[item[1]]), items))
        for (name, number), text in zip(items, texts):
            assert ids(text) == words(world.reference[answered[name]][number]), (name, number)
        assert server.listed() == set(answered)

    try:
        assert server.wait(), server.log.read_text()[-4000:]
        check()
        assert load("loaded", for_stock(world.adapters[second])) == 200
        answered |= {"loaded": second, "resolved": third}
        check()
        assert load("loaded", for_stock(world.adapters[third])) == 400, "it is loaded"
        assert load("other", tmp_path / "none") == 404
        assert load("task", for_stock(world.adapters[second])) == 400, "the checkpoint has it"
        check()
        assert post("unload_lora_adapter", "loaded") == 200
        assert post("unload_lora_adapter", "loaded") == 404
        del answered["loaded"]
        with pytest.raises(openai.NotFoundError):
            server.text("loaded", PROMPTS[0])
        check()
        assert load("loaded", for_stock(world.adapters[third])) == 200
        answered["loaded"] = third
        # What a resolver finds, an adapter or a task, is listed no more and comes back by its name.
        for name in ("resolved", "task"):
            assert post("unload_lora_adapter", name) == 200
            assert post("unload_lora_adapter", name) == 404
        assert server.listed() == set(answered) - {"resolved", "task"}
        check()
    finally:
        server.stop()


def test_a_task_beyond_the_budget_is_a_bad_request_and_the_server_lives(
    world: World, tmp_path: Path
) -> None:
    first, second, *_ = ADAPTERS
    path = world.compress("full", {"task": world.adapters[first]}, ratio=0.1)
    # The first fits into so many bytes, the second does not.
    server = Server(
        world,
        tmp_path / "log",
        path,
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
        VLLM_VLORA_FOLLOW="off",
        VLLM_VLORA_DEVICE_BYTES=str(64 << 10),
        VLLM_VLORA_LATE_MIB="0",
    )
    try:
        assert server.wait(), server.log.read_text()[-4000:]
        tasks = {"task": world.adapters[first], "new": world.adapters[second]}
        world.compress("full", tasks, force=True, ratio=0.1)
        with pytest.raises(openai.BadRequestError, match="'new' was found but could not be loaded"):
            server.text("new", PROMPTS[0])
        assert "no room for task 'new'" in server.log.read_text()
        new = str(task_path(Checkpoint.open(path), "new"))
        answer = httpx.post(
            f"{server.url}/v1/load_lora_adapter",
            json={"lora_name": "n", "lora_path": new},
            timeout=60,
        )
        assert answer.status_code == 500
        assert "it is larger than all that tasks may take" in answer.json()["error"]["message"]
        assert ids(server.text("task", PROMPTS[0])) == words(world.reference[first][0])
    finally:
        server.stop()


def test_a_task_that_gave_way_and_is_gone_fails_its_request_alone(
    world: World, tmp_path: Path
) -> None:
    """The engine core finds it missing when the request comes, outside of every step."""
    first, second, *_ = ADAPTERS
    path = world.compress("gone", {"task": world.adapters[first]}, ratio=0.1)
    server = Server(
        world,
        tmp_path / "log",
        path,
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
        VLLM_VLORA_DEVICE_BYTES="0",
        VLLM_VLORA_HOST_BYTES="0",
        VLLM_VLORA_LATE_MIB="1",
    )
    try:
        assert server.wait(), server.log.read_text()[-4000:]
        late = [f"late-{i}" for i in range(14)]
        tasks = {"task": world.adapters[first], **dict.fromkeys(late, world.adapters[second])}
        world.compress("gone", tasks, force=True, ratio=0.1)
        for name in late:
            assert ids(server.text(name, PROMPTS[0])) == words(world.reference[second][0])
        opened = Checkpoint.open(path)
        (path / opened.record("late-0").file).unlink()
        with pytest.raises(openai.InternalServerError):
            server.text("late-0", PROMPTS[0])
        assert "is refused" in server.log.read_text()
        for name, stock in (("late-1", second), ("task", first)):
            assert ids(server.text(name, PROMPTS[0])) == words(world.reference[stock][0])
    finally:
        server.stop()


@pytest.mark.parametrize("fault", ["another model", "rank", "future format"])
def test_a_checkpoint_the_engine_cannot_take_stops_the_start_by_name(
    world: World, tmp_path: Path, fault: str
) -> None:
    from engine_world import make_adapter, make_model

    if fault == "another model":
        model = make_model(tmp_path / "other", hidden=64, seed=5)
        adapter = make_adapter(model, tmp_path / "a", 6, r=2, target_modules=["q_proj"])
        message = "module model.layers.0.self_attn.q_proj is 64 x 64"
    else:
        adapter = make_adapter(world.model, tmp_path / "a", 6, r=32, target_modules=["q_proj"])
        message = "task 'task' has rank 32, the engine allows 16; start vLLM with --max-lora-rank"
    path = world.compress(f"bad-{fault}", {"task": adapter}, ratio=0.1)
    if fault == "future format":
        manifest = path / "vlora_config.json"
        manifest.write_text(
            manifest.read_text().replace('"format_version": 1', '"format_version": 9')
        )
        message = "format version 9 is newer"
    # A task that runs direct has its own rank, whatever --max-lora-rank is.
    mode = {"VLLM_VLORA_MODE": "materialize"} if fault == "rank" else {}
    server = Server(world, tmp_path / "log", path, **mode)
    try:
        assert not server.wait()
        assert message in server.log.read_text()
    finally:
        server.stop()


def test_the_rust_frontend_lists_and_serves_every_task(world: World, tmp_path: Path) -> None:
    """It is in vLLM's wheels for CUDA, and in the environment of the vLLM that has no CPU build."""
    import vllm

    if not Path(vllm.__file__).with_name("vllm-rs").exists():
        pytest.skip("this build of vLLM has no Rust frontend")
    log = tmp_path / "log"
    server = Server(world, log, mixed(world), VLLM_USE_RUST_FRONTEND="1")
    try:
        assert server.wait(), log.read_text()[-8000:]
        assert "Launching Rust frontend" in log.read_text()
        listed = [model.id for model in server.client.models.list().data]
        assert sorted(listed) == sorted(["base", "ordinary", *ADAPTERS])
        for name in listed:
            for number, prompt in enumerate(PROMPTS):
                text = server.text(name, prompt)
                assert ids(text) == words(world.reference[name][number]), (name, number)
        with pytest.raises(openai.NotFoundError):
            server.text("nobody", PROMPTS[0])
    finally:
        server.stop()
