"""``auto`` in an API server: what a request asks, what it becomes, and what its client is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from plugin_world import TASKS, build
from prometheus_client import REGISTRY
from vllm.lora.request import LoRARequest

from vllm_vlora.blend_names import parse_blend
from vllm_vlora.blending.text_router import RoutePolicy
from vllm_vlora.checkpoint.aliases import encode_aliases
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.router_files import encode_router
from vllm_vlora.editing.aliasing import remove_alias, set_alias
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.editing.routing import attach_router, remove_router
from vllm_vlora.errors import CheckpointError, SettingError
from vllm_vlora.model.text_routing import train_text_router
from vllm_vlora.plugin import named_requests, prompt_routing
from vllm_vlora.plugin.blend_paths import blend_path
from vllm_vlora.plugin.engine_core import (
    ALIASES_METHOD,
    FOLLOW_METHOD,
    ROUTER_METHOD,
    TASKS_METHOD,
)
from vllm_vlora.plugin.following import State, folder_identity
from vllm_vlora.plugin.identity import MEMORY, TaskPath, parse_task_path, task_paths
from vllm_vlora.plugin.listing import Listing
from vllm_vlora.plugin.named_requests import NameHeaders, TaskRequests
from vllm_vlora.plugin.prompt_routing import prompt_text
from vllm_vlora.plugin.settings import read_settings

WORDS = {
    "joint": "select from where count orders customers table having average",
    "private": "bonjour je voudrais une pomme avec vous merci beaucoup demain",
    "mixed": "def class return import lambda yield async await tuple None",
}
ASKED = {task: words[: words.rindex(" ")] for task, words in WORDS.items()}
TOP1 = RoutePolicy()
BOTH = "select from where count bonjour je voudrais une"


def prompts(task: str, count: int = 40) -> list[str]:
    rng = random.Random(task)
    return [" ".join(rng.choices(WORDS[task].split(), k=6)) for _ in range(count)]


def attach(checkpoint: Path, tasks: Iterable[str] = WORDS) -> None:
    trained = train_text_router({task: prompts(task) for task in tasks})
    attach_router(checkpoint, trained.tasks, trained.weights, temperature=trained.temperature)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build(tmp_path_factory.mktemp("routed") / "ck").path
    attach(path)
    return path


@pytest.fixture
def checkpoint(built: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(built, tmp_path / "ck"))


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{number}" for number in ids)


class Server:
    """An API server of a checkpoint that engine cores serve."""

    def __init__(
        self,
        checkpoint: Path,
        policy: RoutePolicy | None = TOP1,
        base: str = "base",
        memory: str = "",
        **more: LoRARequest,
    ) -> None:
        self.core_engines = range(2)
        # The task that is served from memory, in place of the folder's.
        self.memory = memory
        self.show(checkpoint)
        self.models = SimpleNamespace(
            lora_requests=TaskRequests(more, {}, is_model=base.__eq__),
            is_base_model=base.__eq__,
            base_model_paths=[SimpleNamespace(name=base)],
            renderer=SimpleNamespace(get_tokenizer=Tokenizer),
            engine_client=SimpleNamespace(engine_core=self),
        )
        self.listing = Listing(self.models, None, policy)
        asyncio.run(self.listing.start())
        self.requests: TaskRequests = self.models.lora_requests

    def show(self, checkpoint: Path) -> None:
        opened = Checkpoint.open(checkpoint)
        router, paths = opened.router, task_paths(opened)
        if self.memory:
            paths[self.memory] = TaskPath(MEMORY, paths[self.memory].file, "0" * 32)
        self._answers = {
            TASKS_METHOD: [[task, str(path)] for task, path in paths.items()],
            ALIASES_METHOD: encode_aliases(opened.aliases).decode(),
            ROUTER_METHOD: "" if router is None else encode_router(router).decode(),
            FOLLOW_METHOD: opened.content_digest,
        }

    async def _call_utility_async(self, method: str, *_args: Any, engine: int) -> Any:
        return self._answers[method]

    def follow(self, checkpoint: Path) -> None:
        self.show(checkpoint)
        asyncio.run(self.listing._update())

    def ask(self, **request: Any) -> tuple[Any, dict[bytes, bytes]]:
        """What vLLM looks up and finds for a request, and the headers of the answer."""
        asked = SimpleNamespace(**{"model": "auto", "user": None, **request})
        found: list[Any] = []
        sent: list[Any] = []
        server = self

        class Serving:
            models = server.models

            async def _check_model(self, request: Any) -> Any:
                if self.models.is_base_model(request.model):
                    return None
                if request.model in self.models.lora_requests:
                    return None
                return SimpleNamespace(error=SimpleNamespace(message="It does not exist."))

        check = named_requests._check_model(Serving._check_model)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            refused = await asyncio.create_task(check(Serving(), asked))
            if refused is not None:
                found.append(refused.error.message)
            elif server.models.is_base_model(asked.model):
                found.append(asked.model)
            else:
                found.append(server.requests[asked.model])
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(NameHeaders(app)({"type": "http", "headers": []}, None, send))
        return found[0], dict(sent[0]["headers"])


def picked(kind: str) -> float:
    name = "vllm_vlora:routed_requests_total"
    return REGISTRY.get_sample_value(name, {"picked": kind}) or 0.0


@pytest.mark.parametrize("task", WORDS)
def test_a_prompt_goes_to_its_task(built: Path, task: str) -> None:
    server, before = Server(built), picked("task")
    text = ASKED[task]
    for request in (
        {"prompt": text},
        {"prompt": [text, text]},
        {"input": text},
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": text},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
    ):
        found, headers = server.ask(**request)
        assert found is server.requests[task], request
        assert headers[b"x-vlora-tasks"] == task.encode()
        assert 0.5 <= float(headers[b"x-vlora-confidence"]) <= 1
    assert picked("task") - before == 5


def test_a_prompt_of_no_task_goes_to_the_base_model(built: Path) -> None:
    server, before = Server(built), picked("base")
    for request in ({"prompt": "the weather in Reykjavik"}, {"prompt": ""}, {}):
        found, headers = server.ask(**request)
        assert found == "base"
        assert headers[b"x-vlora-tasks"] == b"base"
        assert float(headers[b"x-vlora-confidence"]) < 0.5
    assert picked("base") - before == 3
    # The threshold says what is of no task.
    found, _ = Server(built, RoutePolicy(1, 0.0)).ask(prompt="the weather in Reykjavik")
    assert isinstance(found, LoRARequest)
    found, _ = Server(built, RoutePolicy(1, 1.0)).ask(prompt=ASKED["joint"])
    assert found == "base"


def test_a_prompt_of_two_tasks_may_be_a_blend(built: Path) -> None:
    before = picked("blend")
    server = Server(built, RoutePolicy(2, 0.5))
    found, headers = server.ask(prompt=BOTH)
    assert "joint*0." in found.lora_name
    assert "+private*0." in found.lora_name
    assert headers[b"x-vlora-tasks"].decode() == found.lora_name
    assert found is server.requests[found.lora_name]
    assert server.ask(prompt=ASKED["joint"])[0] is server.requests["joint"]
    assert picked("blend") - before == 1
    # Also where clients may write none: it is the operator who asked for it.
    server.requests._takes_blends = False
    assert server.ask(prompt=BOTH)[0] is found


def test_a_task_from_memory_is_picked_alone_and_in_blends(built: Path) -> None:
    server = Server(built, RoutePolicy(2, 0.5), memory="joint")
    found, headers = server.ask(prompt=ASKED["joint"])
    assert found.lora_path.startswith(str(MEMORY))
    published = parse_task_path(found.lora_path)
    found, headers = server.ask(prompt=BOTH)
    assert headers[b"x-vlora-tasks"].decode() == found.lora_name
    assert found.lora_name.startswith("joint*0.")
    paths = {**task_paths(Checkpoint.open(built)), "joint": published}
    assert found.lora_path == str(blend_path(paths, parse_blend(found.lora_name, paths)))


def test_the_tasks_that_answer_are_counted_each_of_a_blend(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted() -> dict[str, float]:
        name = "vllm_vlora:routed_task_requests_total"
        names = (*WORDS, "other")
        return {task: REGISTRY.get_sample_value(name, {"task": task}) or 0.0 for task in names}

    def asked(*texts: str) -> dict[str, float]:
        before = counted()
        for text in texts:
            server.ask(prompt=text)
        return {task: n - before[task] for task, n in counted().items() if n > before[task]}

    server = Server(built, RoutePolicy(2, 0.5))
    grown = asked(ASKED["joint"], ASKED["joint"], BOTH, "")
    assert grown == {"joint": 3, "private": 1}
    # No more names than the setting says; those that have a series keep it.
    monkeypatch.setattr(prompt_routing._metrics(), "_most", 2)
    monkeypatch.setattr(prompt_routing._metrics(), "_named", {"joint", "private"})
    assert asked(ASKED["mixed"], BOTH) == {"other": 1, "joint": 1, "private": 1}


def test_auto_is_listed_where_there_is_a_router(checkpoint: Path) -> None:
    server = Server(checkpoint)
    assert list(server.requests) == [*TASKS, "auto"]
    cards = {card.lora_name: card for card in server.requests.values()}
    assert cards["auto"].lora_path == str(checkpoint / "router.json")
    # It is no adapter: nothing but a request becomes one.
    assert server.requests.get("auto") is None
    assert "auto" not in server.requests
    assert list(Server(checkpoint, None).requests) == list(TASKS)


def test_a_name_that_is_something_stays_that(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = LoRARequest("auto", 7, "/adapters/auto")
    server = Server(checkpoint, auto=other)
    assert server.ask(prompt=ASKED["joint"])[0] is other
    assert list(server.requests).count("auto") == 1
    assert len(caplog.messages) == 1
    assert Server(checkpoint, base="auto").ask(prompt=ASKED["joint"]) == ("auto", {})
    assert len(caplog.messages) == 2
    set_alias(checkpoint, "auto", "one")
    server = Server(checkpoint)
    assert server.ask(prompt=ASKED["joint"])[0] is server.requests["one"]
    assert list(server.requests).count("auto") == 1
    # Nobody need wonder why nothing is routed.
    assert len(caplog.messages) == 3
    assert all("the router, which answers to 'auto', is not served" in m for m in caplog.messages)
    assert server.requests.routing is not None


def test_without_a_router_a_404_says_so(checkpoint: Path) -> None:
    for server in (Server(checkpoint, None), Server(build(checkpoint.parent / "plain").path)):
        found, _ = server.ask(prompt=ASKED["joint"])
        assert "has no router (`vllm-vlora router train`)" in found


def test_a_label_may_be_an_alias_which_answers_as_what_it_stands_for(checkpoint: Path) -> None:
    texts = {"prod": "joint", "polite": "private", "mixed": "mixed"}
    trained = train_text_router({label: prompts(task) for label, task in texts.items()})
    attach_router(
        checkpoint, trained.tasks, trained.weights, temperature=trained.temperature
    )  # fmt: skip
    set_alias(checkpoint, "prod", "joint")
    set_alias(checkpoint, "polite", "private*0.5+one*0.5")
    server = Server(checkpoint, RoutePolicy(2, 0.5))
    found, headers = server.ask(prompt=ASKED["joint"])
    assert found is server.requests["joint"]
    assert headers[b"x-vlora-tasks"] == b"joint"
    found, _ = server.ask(prompt=ASKED["private"])
    assert found is server.requests["private*0.5+one*0.5"]
    # Between two labels, of which one is a blend itself.
    found, headers = server.ask(prompt=BOTH)
    paths = task_paths(Checkpoint.open(checkpoint))
    terms = {task: float(w) for task, w in parse_blend(found.lora_name, paths)}
    assert terms.keys() == {"joint", "private", "one"}
    assert terms["private"] == terms["one"]
    assert sum(terms.values()) == pytest.approx(1)
    # Another target is used as it comes, and one that is gone is nothing.
    set_alias(checkpoint, "prod", "one")
    server.follow(checkpoint)
    assert server.ask(prompt=ASKED["joint"])[0] is server.requests["one"]
    remove_alias(checkpoint, "prod")
    server.follow(checkpoint)
    assert server.ask(prompt=ASKED["joint"])[0] == "base"


def test_the_router_follows_what_is_published(checkpoint: Path) -> None:
    server = Server(checkpoint)
    first = server.requests.routing
    set_alias(checkpoint, "prod", "one")
    server.follow(checkpoint)
    assert server.requests.routing is first
    attach(checkpoint, ["joint", "private"])
    server.follow(checkpoint)
    assert server.requests.routing is not first
    assert server.ask(prompt=ASKED["mixed"])[0] is not server.requests["mixed"]
    assert server.ask(prompt=ASKED["private"])[0] is server.requests["private"]
    # A task that is gone is not guessed at.
    remove_tasks(checkpoint, ["private"])
    server.follow(checkpoint)
    assert server.ask(prompt=ASKED["private"])[0] == "base"
    assert server.ask(prompt=ASKED["joint"])[0] is server.requests["joint"]
    remove_router(checkpoint)
    server.follow(checkpoint)
    assert "auto" not in list(server.requests)


def test_a_look_sees_another_router(checkpoint: Path) -> None:
    seen = {folder_identity(checkpoint)}
    attach(checkpoint, ["joint", "mixed"])
    seen.add(folder_identity(checkpoint))
    remove_router(checkpoint)
    seen.add(folder_identity(checkpoint))
    set_alias(checkpoint, "prod", "joint")
    seen.add(folder_identity(checkpoint))
    assert len(seen) == 4
    assert State(Checkpoint.open(checkpoint)).router is None


def test_a_network_that_is_gone_by_now_stops_no_list(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder has another state than the engine cores, which may never take it."""
    server = Server(checkpoint)
    before = server.requests.routing
    attach(checkpoint, list(WORDS)[:2])
    set_alias(checkpoint, "new", "joint")
    server.show(checkpoint)
    for file in checkpoint.glob("router-*"):
        file.unlink()
    asyncio.run(server.listing._update())
    assert "new" in server.requests
    assert server.requests.routing is before is not None
    [line] = caplog.messages
    assert line.startswith(f"vllm-vlora: 'auto' is routed as before: {checkpoint / 'router-'}")


def test_a_server_without_the_network_does_not_start(checkpoint: Path) -> None:
    for file in checkpoint.glob("router-*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="router-"):
        Server(checkpoint)


def test_the_text_of_a_request() -> None:
    models = SimpleNamespace(renderer=SimpleNamespace(get_tokenizer=Tokenizer))

    def text(**request: Any) -> str:
        return prompt_text(models, SimpleNamespace(**request))

    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "two"}]},
    ]
    assert text(messages=chat) == "one\ntwo"
    assert text(messages=[chat, chat[:2]]) == "one\ntwo\none"
    assert text(messages=chat[:1]) == "s"
    assert text(input=[SimpleNamespace(role="user", content="object")]) == "object"
    assert text(prompt=[1, 2]) == "w1 w2"
    assert text(prompt=[[1], [2, 3]]) == "w1\nw2 w3"
    assert text(token_ids=[4]) == "w4"
    many = text(prompt=list(range(100_000))).split()
    assert (len(many), many[0], many[-1]) == (2048, "w0", "w99999")
    # However many there are, few of them are decoded.
    many = text(prompt=[[number] for number in range(100_000)]).split("\n")
    assert (len(many), many[0], many[-1]) == (16, "w0", "w99999")
    assert text(prompt=None, prompt_embeds=b"x") == ""
    assert text(messages=[{"role": "user", "content": None}]) == ""
    models = SimpleNamespace(renderer=SimpleNamespace())
    assert text(prompt=[1, 2]) == ""


@pytest.mark.parametrize(
    ("route", "terms"), [("", 1), ("top1", 1), ("off", 0), ("blend:2", 2), ("blend:8", 8)]
)
def test_settings(route: str, terms: int) -> None:
    settings = read_settings({"VLLM_VLORA_ROUTE": route})
    assert (settings.route_terms, settings.route_threshold) == (terms, 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ROUTE", value) for value in ("on", "blend", "blend:1", "blend:9", "blend:02", "top2")),
        *(("ROUTE_THRESHOLD", value) for value in ("x", "1.1", "-0.1", "nan", "1e0", ".", "½")),
    ],
)
def test_settings_that_are_none(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"VLLM_VLORA_{name}="):
        read_settings({f"VLLM_VLORA_{name}": value})


def test_thresholds() -> None:
    for value, wanted in (("0", 0.0), ("1", 1.0), (".25", 0.25), ("0.750", 0.75)):
        found = read_settings({"VLLM_VLORA_ROUTE_THRESHOLD": value}).route_threshold
        assert found == wanted
