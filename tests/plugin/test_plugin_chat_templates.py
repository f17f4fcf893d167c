"""Chats to tasks that brought a chat template, in an API server that uses these."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from plugin_world import TASKS, build
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.pooling.classify.protocol import ClassificationChatRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingBatchChatRequest, EmbeddingChatRequest
from vllm.entrypoints.pooling.pooling.protocol import PoolingChatRequest
from vllm.lora.request import LoRARequest

from vllm_vlora.checkpoint.aliases import encode_aliases
from vllm_vlora.checkpoint.attachments import AttachmentWriter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.editing.aliasing import set_alias
from vllm_vlora.errors import CheckpointError, ModelMismatchError
from vllm_vlora.plugin import kept_templates, listing, named_requests
from vllm_vlora.plugin.chat_templates import TaskTemplates
from vllm_vlora.plugin.engine_core import ALIASES_METHOD, FOLLOW_METHOD, TASKS_METHOD
from vllm_vlora.plugin.following import Follower, State
from vllm_vlora.plugin.identity import MEMORY, TaskPath, task_paths
from vllm_vlora.plugin.listing import Listing
from vllm_vlora.plugin.named_requests import Asked, TaskRequests
from vllm_vlora.plugin.seam_table import CHAT_REQUESTS

CONFIG, JINJA = "tokenizer_config.json", "chat_template.jinja"
BASE = "the base model's"


def keep(folder: Path, files: dict[str, dict[str, str]]) -> Path:
    """Keep files (task -> name -> text) with tasks of a checkpoint."""
    writer = AttachmentWriter(folder)
    for task, texts in files.items():
        for name, text in texts.items():
            file = folder.parent / f"source of {name}"
            file.write_text(text)
            writer.attach(task, {name: file})
    writer.finish()
    return folder


def config(template: str) -> dict[str, str]:
    return {CONFIG: json.dumps({"chat_template": template})}


class World:
    """An API server, and engine cores that serve a folder as they found it."""

    def __init__(self, root: Path, *models: str, **adapters: LoRARequest) -> None:
        self.root, self.folder = root, root / "ck"
        self.core_engines = [0]
        self.memory: dict[str, str] = {}
        keep(build(self.folder).path, {"one": config("one's"), "mixed": {JINJA: "mixed's"}})
        self.templates = TaskTemplates(self.folder)
        # vLLM's own attribute of the same name.
        self.engine_core = self
        self.server = SimpleNamespace(
            lora_requests=TaskRequests(adapters, {}, True, models.__contains__),
            is_base_model=models.__contains__,
            engine_client=self,
        )
        self.adopt()
        self.listing = Listing(self.server, self.templates)

    def start(self) -> World:
        asyncio.run(self.listing.start())
        return self

    @property
    def requests(self) -> TaskRequests:
        return self.server.lora_requests

    def publish(self, files: dict[str, dict[str, str]], seed: int = 1, tasks: Any = TASKS) -> None:
        """Exchange the folder; the engine cores serve what they served."""
        new = keep(build(self.root / "new", tasks, seed=seed).path, files)
        shutil.rmtree(self.folder)
        new.rename(self.folder)

    def adopt(self) -> None:
        opened = Checkpoint.open(self.folder)
        self._served = task_paths(opened)
        self._aliases, self._digest = encode_aliases(opened.aliases).decode(), opened.content_digest

    def follow(self) -> None:
        asyncio.run(self.listing._update())

    async def _call_utility_async(self, method: str, *_: str, engine: int) -> Any:
        memory = {t: TaskPath(MEMORY, f"tasks/{t}.safetensors", d) for t, d in self.memory.items()}
        paths = {**self._served, **memory}
        return {
            TASKS_METHOD: [[task, str(path)] for task, path in paths.items()],
            ALIASES_METHOD: self._aliases,
            FOLLOW_METHOD: "\n".join([self._digest, *map(str, memory.values())]),
        }[method]

    def template(self, name: str) -> str:
        """That by which a chat to a name is rendered, whose name was looked up before."""
        build_params = self.templates.wrap(lambda request, template: template)
        token = named_requests._asked.set(Asked("key"))
        try:
            _ = name in self.requests
            return build_params(SimpleNamespace(model=name), BASE)
        finally:
            named_requests._asked.reset(token)

    def templates_of(self, *names: str) -> list[str]:
        return [self.template(name) for name in names]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).start()


def test_a_chat_is_rendered_by_the_template_of_what_answers_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    set_alias(world.folder, "prod", "one")
    world.adopt()
    world.start()
    assert world.templates_of("one", "mixed", "prod") == ["one's", "mixed's", "one's"]
    # A blend is no task, and `joint` brought none.
    assert world.templates_of("joint", "one+mixed", "nobody", "") == [BASE] * 4


def test_what_is_called_as_a_task_is_not_rendered_by_its_template(tmp_path: Path) -> None:
    world = World(tmp_path, "mixed", one=LoRARequest("one", 1, "/adapters/ordinary")).start()
    assert world.templates_of("one", "mixed") == [BASE, BASE]


def test_an_adapter_in_the_place_of_a_task_that_was_unloaded_has_no_template(world: World) -> None:
    del world.requests["one"]
    world.requests["one"] = LoRARequest("one", 1, "/adapters/ordinary")
    assert world.template("one") == BASE


def test_a_blend_in_whose_form_a_task_is_called_is_not_rendered_by_its_template(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    tasks = {**TASKS, "joint+one": TASKS["one"]}
    world.publish({"joint+one": config("a task's")}, tasks=tasks)
    world.adopt()
    world.start()
    assert world.templates_of("joint+one", "one+joint") == ["a task's", BASE]


def test_templates_follow_what_is_published(world: World) -> None:
    world.publish({"one": config("new"), "joint": {JINJA: "joint's"}})
    world.adopt()
    world.follow()
    assert world.templates_of("one", "mixed", "joint") == ["new", BASE, "joint's"]
    # Attachments alone are a state, too.
    shutil.rmtree(world.folder / "attachments")
    keep(world.folder, {"mixed": config("mixed again")})
    world.adopt()
    world.follow()
    assert world.templates_of("one", "mixed", "joint") == [BASE, "mixed again", BASE]


@pytest.mark.parametrize("data", [b'{"chat_template": "x",}', b"[" * 100_000, b"\xff\xfe", b""])
def test_a_file_that_is_no_template_is_said_once_and_stops_nothing(
    world: World, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    """``b""``: it is damaged."""
    world.publish({"one": config("gone"), "joint": config("joint's")})
    bad = world.root / "bad"
    bad.write_bytes(data or b"as it was")
    writer = AttachmentWriter(world.folder)
    writer.tasks = dict(Checkpoint.open(world.folder).attachments)
    for task in ("one", "private"):
        writer.attach(task, {CONFIG: bad})
    writer.finish()
    world.adopt()
    if not data:
        (world.folder / writer.tasks["one"][CONFIG].file).write_bytes(b"as it is")
    world.follow()
    world.memory["policy"] = "a" * 32
    world.follow()
    assert "policy" in world.requests
    assert world.requests["one"].lora_path == str(world._served["one"])
    assert world.templates_of("one", "private", "joint") == [BASE, BASE, "joint's"]
    [line] = caplog.messages
    assert line.startswith(
        "vllm-vlora: chats to 'one', 'private' are rendered with the base model's template: "
    )
    assert str(world.folder / "attachments") in line


def test_a_server_starts_with_a_file_that_is_no_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As it went on when that was published."""
    world = World(tmp_path)
    world.publish({"one": {CONFIG: "{"}, "mixed": {JINJA: "mixed's"}})
    world.adopt()
    world.start()
    assert world.templates_of("one", "mixed") == [BASE, "mixed's"]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("broken", [False, True], ids=["another", "unreadable"])
def test_a_folder_whose_state_is_refused_takes_no_template_and_stops_no_list(
    world: World, caplog: pytest.LogCaptureFixture, broken: bool
) -> None:
    world.publish({"one": config("new"), "joint": {JINJA: "new"}})
    if broken:
        (world.folder / "vlora_config.json").write_text("{")
    # Published from memory meanwhile.
    world.memory["policy"] = "a" * 32
    world.follow()
    assert "policy" in world.requests
    assert world.templates_of("one", "mixed", "joint", "policy") == ["one's", "mixed's", BASE, BASE]
    assert not caplog.messages


def test_a_task_that_was_published_over_before_it_was_listed_is_told_of(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.publish({"one": config("second")}, seed=1)
    world.adopt()
    world.publish({"one": config("third")}, seed=2)
    world.follow()
    world.memory["policy"] = "a" * 32
    world.follow()
    assert world.requests["one"].lora_path == str(world._served["one"])
    assert world.template("one") == BASE
    [line] = caplog.messages
    assert "are rendered with the base model's template" in line
    assert line.endswith(f"{world.folder} was published again")
    world.adopt()
    world.follow()
    assert world.template("one") == "third"


def test_a_state_from_before_the_start_ends_the_start(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.publish({})
    with pytest.raises(CheckpointError, match="published again while the server started"):
        world.start()


def test_tasks_from_memory_stand_before_the_folders(world: World) -> None:
    world.memory["one"] = "a" * 32
    world.follow()
    assert world.templates_of("one", "mixed") == [BASE, "mixed's"]
    del world.memory["one"]
    world.follow()
    assert world.template("one") == "one's"


def test_equal_files_are_read_once_and_kept_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    checked = kept_templates.read_checked

    def count(file: Path, ref: Any) -> bytes:
        read[file.name] += 1
        return checked(file, ref)

    monkeypatch.setattr(kept_templates, "read_checked", count)
    files = {"one": config("shared"), "joint": config("shared"), "private": config("another")}
    world.publish(files)
    world.adopt()
    world.follow()
    assert sorted(read.values()) == [1, 1]
    texts = world.templates._used.texts
    assert texts["one"] is texts["joint"]
    # The same files in another state.
    world.publish(files, seed=2)
    world.adopt()
    world.follow()
    assert sorted(read.values()) == [1, 1]
    assert world.templates_of("one", "private") == ["shared", "another"]


# --- vLLM's own requests ------------------------------------------------------------------------------


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "asked",
    [
        ChatCompletionRequest(model="one", messages=MESSAGES),
        ClassificationChatRequest(model="one", messages=MESSAGES),
        EmbeddingChatRequest(model="one", messages=MESSAGES),
        EmbeddingBatchChatRequest(model="one", messages=[MESSAGES, MESSAGES]),
        PoolingChatRequest(model="one", messages=MESSAGES),
    ],
    ids=lambda request: type(request).__name__,
)
def test_every_kind_of_chat_is(world: World, monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    for module, name in CHAT_REQUESTS:
        owner = getattr(importlib.import_module(f"vllm.entrypoints.{module}.protocol"), name)
        wrapped = world.templates.wrap(owner.build_chat_params)
        monkeypatch.setattr(owner, "build_chat_params", wrapped)
    assert asked.build_chat_params(BASE, "auto").chat_template == "one's"
    for model in ("joint", None):
        other = asked.model_copy(update={"model": model})
        assert other.build_chat_params(BASE, "auto").chat_template == BASE
    # The client's own stands before both.
    mine = asked.model_copy(update={"chat_template": "mine"})
    assert mine.build_chat_params(BASE, "auto").chat_template == "mine"


# --- what is judged sound, and what is said -----------------------------------------------------------


@pytest.mark.parametrize("used", [False, True])
def test_a_state_is_sound_once_the_templates_that_are_used_are_there(
    tmp_path: Path, used: bool
) -> None:
    world = World(tmp_path)
    state = State(Checkpoint.open(world.folder))
    follower = Follower(world.folder, state, lambda c, n: None, logging.getLogger("f"), used)
    world.publish({"one": {CONFIG: "{"}, "joint": config("joint's"), "private": config("p")})
    late = next(f for f in (world.folder / "attachments").iterdir() if b"joint's" in f.read_bytes())
    data = late.read_bytes()
    late.write_bytes(data[:-1])
    if used:
        with pytest.raises(CheckpointError, match=late.name):
            follower.sound_state(world.folder)
    else:
        follower.sound_state(world.folder)
    late.write_bytes(data)
    # What is no template stops no publication.
    assert follower.sound_state(world.folder).digest != state.digest


def test_why_the_list_is_as_it_was_is_said_once(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listing, "PERIOD", 0.0)
    said = ["one", "one", "two", "one", None, "one"]

    async def update() -> None:
        if not said:
            raise listing.EngineDeadError
        if (why := said.pop(0)) is not None:
            raise ModelMismatchError(why)

    monkeypatch.setattr(world.listing, "_update", update)
    asyncio.run(asyncio.wait_for(world.listing._follow(), 10))
    assert [line.rpartition(": ")[2] for line in caplog.messages] == ["one", "two", "one"]
