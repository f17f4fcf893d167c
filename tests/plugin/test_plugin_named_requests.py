"""The dictionary in which vLLM looks names up, and the way of a key in and of an answer out."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from plugin_world import TASKS, build
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.lora.protocol import (
    LoadLoRAAdapterRequest,
    UnloadLoRAAdapterRequest,
)
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from vllm_vlora.checkpoint.aliases import encode_aliases
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.editing.aliasing import remove_alias, set_alias
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import (
    BlendError,
    CheckpointError,
    TaskIdError,
    TaskNotFoundError,
    VLoRAError,
)
from vllm_vlora.merging.blending import blend_tasks
from vllm_vlora.plugin import listing, named_requests
from vllm_vlora.plugin.blend_paths import blend_of
from vllm_vlora.plugin.counters import ENDING
from vllm_vlora.plugin.engine_core import ALIASES_METHOD, FOLLOW_METHOD, TASKS_METHOD
from vllm_vlora.plugin.following import State, folder_identity
from vllm_vlora.plugin.identity import parse_task_path, task_paths
from vllm_vlora.plugin.listing import Listing
from vllm_vlora.plugin.named_requests import (
    NameHeaders,
    TaskRequests,
    answering,
)
from vllm_vlora.plugin.requests import CheckpointResolver, all_requests, lora_request

ORDINARY = LoRARequest("ordinary", 1, "/adapters/ordinary")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = build(tmp_path / "ck").path
    set_alias(path, "prod", "joint")
    set_alias(path, "mix", "joint*0.5+private*0.25")
    set_alias(path, "canary", "joint 1, private 1")
    return path


@pytest.fixture
def requests(checkpoint: Path) -> TaskRequests:
    listed = {request.lora_name: request for request in all_requests(checkpoint)}
    return TaskRequests({"ordinary": ORDINARY, **listed}, Checkpoint.open(checkpoint).aliases)


def test_what_vllm_does_with_a_dictionary(requests: TaskRequests) -> None:
    assert isinstance(requests, dict)
    names = ["ordinary", *TASKS, "canary", "mix", "prod"]
    assert list(requests) == names
    assert len(requests) == len(names)
    assert [request.lora_name for request in requests.values()] == names
    assert [name for name, _ in requests.items()] == names
    assert all(name in requests for name in names)
    assert "nobody" not in requests
    assert None not in requests
    assert requests.get("nobody") is None
    with pytest.raises(KeyError):
        requests["nobody"]
    assert requests["ordinary"] is requests.get("ordinary") is ORDINARY


def test_the_list_looks_up_what_has_no_request_alone(
    requests: TaskRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM goes through it with each chat to the base model, of however many tasks."""
    looked_up: list[str] = []
    card = TaskRequests._card

    def counted(self: TaskRequests, name: str) -> LoRARequest:
        looked_up.append(name)
        return card(self, name)

    monkeypatch.setattr(TaskRequests, "_card", counted)
    assert len(requests.values()) == len(requests) == len(TASKS) + 4
    assert looked_up == ["canary", "mix", "prod"]


def test_names_of_one_content_are_one_request(requests: TaskRequests, checkpoint: Path) -> None:
    assert requests["prod"] is requests["joint"]
    assert requests["joint*1"] is requests["joint"]
    blend = requests["mix"]
    assert blend is requests["private*.250+joint*0.5"] is requests["prod*0.5+private*0.25"]
    assert blend.lora_name == "joint*0.5+private*0.25"
    path = parse_task_path(blend.lora_path)
    assert path is not None
    terms = blend_of(path, Checkpoint.open(checkpoint))
    assert terms is not None
    assert {term.task: float(term.weight) for term in terms} == {"joint": 0.5, "private": 0.25}
    assert len(requests) == 8


def test_ordinary_adapters_are_no_part_of_a_blend(requests: TaskRequests) -> None:
    assert "ordinary+joint" not in requests
    requests["joint-private"] = LoRARequest("joint-private", 2, "/adapters/other")
    # The name of an adapter is that adapter.
    assert requests["joint-private"].lora_path == "/adapters/other"


def test_blends_are_bounded_in_number(
    requests: TaskRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_requests, "_MOST_BLENDS", 3)
    for n in range(1, 9):
        assert f"joint*0.{n}+private" in requests
        assert requests["joint*0.1+private"].lora_name == "joint*0.1+private"
    assert len(requests._blends) == 3
    for n in range(1000):
        assert f"joint*0.5+nobody{n}" not in requests
    assert len(requests._blends) == 3


def test_no_two_names_have_one_number(requests: TaskRequests) -> None:
    """The engine knows tasks by their number; a client may search for a blend with another's."""
    wanted = requests["joint*0.5+private"]
    requests._blends.clear()
    requests["other"] = LoRARequest("other", wanted.lora_int_id, "/adapters/other")
    assert requests["joint*0.5+private"].lora_int_id == wanted.lora_int_id + 1
    numbers = [requests[f"joint*0.{n}+private"].lora_int_id for n in range(1, 10)]
    numbers += [request.lora_int_id for name, request in requests.items() if name in TASKS]
    assert len(set(numbers)) == len(numbers)


def test_a_number_is_free_once_nothing_has_it(requests: TaskRequests) -> None:
    def numbers() -> dict[int, int]:
        found = [request.lora_int_id for request in dict.values(requests)]
        found += [held.request.lora_int_id for held in requests._blends.values()]
        return dict(Counter(found))

    wanted = requests["joint*0.5+private"].lora_int_id
    for n in range(1, 300):
        assert f"joint*0.{n:03d}+private" in requests
    assert requests._numbers == numbers()
    other = LoRARequest("other", wanted, "/adapters/other")
    requests["other"] = other
    requests["other"] = requests["another"] = other
    assert requests["joint*0.5+private"].lora_int_id == wanted + 1
    del requests["joint*0.5+private"]
    del requests["other"]
    assert requests["joint*0.5+private"].lora_int_id == wanted + 1
    del requests["joint*0.5+private"]
    del requests["another"]
    assert requests._numbers == numbers()
    assert requests["joint*0.5+private"].lora_int_id == wanted


def test_a_new_blend_looks_at_no_other_task(checkpoint: Path) -> None:
    """However many there are: a number is free or it is not."""
    made: list[int] = []

    class Counted(LoRARequest):
        @property
        def lora_int_id(self) -> int:
            made.append(1)
            return super().lora_int_id

    listed = all_requests(checkpoint)
    more = [Counted(f"t{n}", n + 1, f"/adapters/{n}") for n in range(1000)]
    requests = TaskRequests({r.lora_name: r for r in [*listed, *more]}, {})
    made.clear()
    assert requests["joint*0.5+private"].lora_name == "joint*0.5+private"
    assert made == []


# In its one form the first is called as a task, and the second reads as a blend of others.
@pytest.mark.parametrize("name", ["one+joint", "joint+private+one"])
def test_the_newest_of_a_blend_is_that_blend(tmp_path: Path, name: str) -> None:
    worlds = []
    for seed in (0, 1):
        path = build(tmp_path / str(seed), {**TASKS, "joint+one": TASKS["one"]}, seed=seed).path
        worlds.append(TaskRequests({r.lora_name: r for r in all_requests(path)}, {}))
    requests, later = worlds
    asked = requests[name]
    parts = {"one+joint": "one*1+joint*1", "joint+private+one": "one+joint*1+private*1"}
    assert asked == requests[parts[name]]
    assert requests.newest(asked) is asked
    # Its tasks are published again.
    for request in later.values():
        requests[request.lora_name] = request
    newest = requests.newest(asked)
    assert newest is not None
    assert newest.lora_path == requests[parts[name]].lora_path != asked.lora_path
    # Of a blend that was forgotten the name alone is left, which is another's.
    requests._blends.clear()
    assert requests.newest(asked) is None
    asked = requests["joint*0.5+private"]
    requests._blends.clear()
    assert requests.newest(asked) == asked
    del requests["joint"]
    assert requests.newest(asked) is None


def test_unloading(requests: TaskRequests) -> None:
    """vLLM's unload route deletes whatever it finds."""
    blend = requests["joint*0.5+private"]
    del requests["joint*0.5+private"]
    assert blend.lora_path not in requests._blends
    del requests["prod"]
    assert "prod" not in requests
    del requests["joint"]
    # What stood for it is not listed and not found, and nothing fails.
    assert list(requests) == ["ordinary", "private", "mixed", "one"]
    assert "mix" not in requests
    assert [request.lora_name for request in requests.values()] == list(requests)


# --- adapters that clients load -----------------------------------------------------------------------


class Engine:
    """What vLLM's ``OpenAIServingModels`` asks of an engine."""

    model_config = SimpleNamespace(model="base")
    renderer = input_processor = None

    def __init__(self) -> None:
        self.loaded: list[tuple[str, int]] = []

    async def add_lora(self, request: LoRARequest) -> bool:
        self.loaded.append((request.lora_name, request.lora_int_id))
        return True


def load(requests: TaskRequests, name: str, in_place: bool) -> tuple[Any, Engine]:
    """vLLM's own load of an adapter, where clients may: (what it answers or raises, the engine)."""
    engine: Any = Engine()
    models = OpenAIServingModels(engine, [BaseModelPath("base", "base")])
    models.lora_requests = requests
    asked = LoadLoRAAdapterRequest(lora_name=name, lora_path="/adapters/x", load_inplace=in_place)
    loading = named_requests._load_lora_adapter(OpenAIServingModels.load_lora_adapter)
    try:
        return asyncio.run(loading(models, asked)), engine
    except VLoRAError as error:
        return error, engine


@pytest.mark.parametrize("name", ["joint", "prod", "mix", "canary"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_adapter_that_a_client_loads_takes_no_name_of_the_checkpoint(
    requests: TaskRequests, name: str, in_place: bool
) -> None:
    """vLLM would give it the number of the task, which then answered for it, or it for the task."""
    before = requests[name]
    answer, engine = load(requests, name, in_place)
    assert isinstance(answer, TaskIdError)
    assert str(answer) == (
        f"{name!r} is a task or an alias of the served checkpoint; give the adapter another name"
    )
    assert not engine.loaded
    if name != "canary":
        assert requests[name] is before


@pytest.mark.parametrize("in_place", [False, True])
def test_an_adapter_that_a_client_loads_may_be_called_as_a_blend(
    requests: TaskRequests, in_place: bool
) -> None:
    blend = requests["joint-private"]
    answer, engine = load(requests, "joint-private", in_place)
    assert str(answer).startswith("Success")
    assert engine.loaded == [("joint-private", 1)]
    assert requests["joint-private"].lora_path == "/adapters/x"
    assert requests["joint*1-private"] is blend
    # And another one comes in its place, under its own number.
    assert load(requests, "joint-private", True)[1].loaded == [("joint-private", 1)]


def test_a_name_that_was_unloaded_is_free(requests: TaskRequests) -> None:
    del requests["joint"]
    answer, engine = load(requests, "joint", False)
    assert str(answer).startswith("Success")
    assert engine.loaded == [("joint", 1)]


# --- adapters that vLLM chooses by what a message holds ------------------------------------------------


def chosen(requests: TaskRequests, *kinds: str) -> LoRARequest | None:
    """What vLLM takes for a chat to the base model whose message has parts of these kinds."""
    serving = object.__new__(BaseServing)
    serving.models = SimpleNamespace(  # type: ignore[assignment]
        lora_requests=requests, is_base_model=lambda name: name == "base"
    )
    parts = [{"type": kind} for kind in kinds]
    chat: Any = SimpleNamespace(model="base", messages=[{"role": "user", "content": parts}])
    return serving._maybe_get_adapters(chat, supports_default_mm_loras=True)


def test_a_task_answers_no_chat_to_the_base_model_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(tmp_path / "ck", {"text": TASKS["joint"], "image": TASKS["private"]}).path
    set_alias(path, "audio", "text")
    listed = {request.lora_name: request for request in all_requests(path)}
    requests = TaskRequests(listed, Checkpoint.open(path).aliases)
    # This is what it is for: vLLM's own takes it.
    assert chosen(requests, "text") is requests["text"]
    name = "_get_active_default_mm_loras"
    ours = named_requests._get_active_default_mm_loras(getattr(BaseServing, name))
    monkeypatch.setattr(BaseServing, name, ours)
    assert chosen(requests, "text") is None
    assert chosen(requests, "text", "image_url", "input_audio", "audio_url") is None


def test_ordinary_adapters_of_a_kind_of_part_are_taken_as_without_the_plugin(
    requests: TaskRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, audio = (LoRARequest(name, n, "/x") for n, name in enumerate(("image", "audio"), 1))
    requests["image"], requests["audio"] = image, audio
    name = "_get_active_default_mm_loras"
    ours = named_requests._get_active_default_mm_loras(getattr(BaseServing, name))
    asked = [("text",), ("text", "image_url"), ("audio_url",), ("image_url", "audio_url"), ()]
    stock = [chosen(requests, *kinds) for kinds in asked]
    monkeypatch.setattr(BaseServing, name, ours)
    assert (
        [chosen(requests, *kinds) for kinds in asked] == stock == [None, image, audio, None, None]
    )


# --- a request's way ----------------------------------------------------------------------------------


def through(
    requests: TaskRequests, name: str, *headers: tuple[bytes, bytes], user: Any = None
) -> Any:
    """What a request gets: (the request that is found, the header of the answer)."""
    found: list[Any] = []
    sent: list[Any] = []

    class Serving:
        models = SimpleNamespace(lora_requests=requests)

        async def _check_model(self, request: Any) -> Any:
            if request.model in self.models.lora_requests:
                return None
            return SimpleNamespace(error=SimpleNamespace(message="It does not exist."))

    check = named_requests._check_model(Serving._check_model)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # A task of its own, as of vLLM's middlewares.
        found.append(await asyncio.create_task(handler()))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    async def handler() -> Any:
        refused = await check(Serving(), SimpleNamespace(model=name, user=user))
        if refused is not None:
            return refused.error.message
        assert requests[name] is requests[name] is requests.get(name)
        assert answering(name, requests) is requests[name]
        return requests[name]

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": list(headers)}
    asyncio.run(NameHeaders(app)(scope, None, send))
    [start] = sent
    assert start["headers"][0] == (b"a", b"b")
    return found[0], dict(start["headers"]).get(b"x-vlora-tasks")


def test_the_answer_names_what_answered(requests: TaskRequests) -> None:
    assert through(requests, "joint") == (requests["joint"], None)
    assert through(requests, "prod") == (requests["joint"], b"joint")
    assert through(requests, "mix")[1] == b"joint*0.5+private*0.25"


def test_a_header_holds_any_name(tmp_path: Path) -> None:
    path = build(tmp_path / "ck", {"é\u3000,\u2603": TASKS["joint"]}).path
    set_alias(path, "prod", "é\u3000,\u2603")
    listed = {request.lora_name: request for request in all_requests(path)}
    requests = TaskRequests(listed, Checkpoint.open(path).aliases)
    assert through(requests, "prod")[1] == b"%C3%A9%E3%80%80%2C%E2%98%83"


def test_a_canary_is_one_task_for_a_request_and_for_a_client(requests: TaskRequests) -> None:
    for n in range(30):
        key = str(n)
        header = (b"x-vlora-key", key.encode())
        by_header = through(requests, "canary", header)[0]
        assert by_header is through(requests, "canary", user=key)[0]
        assert by_header is through(requests, "canary", header, user="another")[0]
    # A client that says nothing gets either, and one of them for the whole of a request.
    assert len({through(requests, "canary")[1] for _ in range(40)}) == 2


def test_a_canary_is_one_task_for_a_user_of_a_batch(requests: TaskRequests) -> None:
    """``vllm run-batch`` has no HTTP, and so no middleware."""
    serving = object.__new__(BaseServing)
    serving.request_logger, serving.models = None, SimpleNamespace(lora_requests=requests)  # type: ignore
    serving.models.is_base_model = "base".__eq__
    check = named_requests._check_model(BaseServing._check_model)

    async def answered(user: str | None) -> str:
        request: Any = SimpleNamespace(model="canary", user=user)
        assert await check(serving, request) is None
        found = serving._maybe_get_adapters(request)
        assert found is not None
        return found.lora_name

    users = [str(n) for n in range(20)] * 2
    wanted = [through(requests, "canary", user=user)[0].lora_name for user in users]

    async def batch() -> None:
        # One after the other, in one context, and all at once, as vLLM has them.
        assert [await answered(user) for user in users] == wanted
        assert await asyncio.gather(*map(answered, users)) == wanted
        assert {await answered(None) for _ in range(40)} == {"joint", "private"}

    asyncio.run(batch())


def test_a_404_says_what_is_wrong_with_a_blend(requests: TaskRequests) -> None:
    assert through(requests, "nobody")[0] == "It does not exist."
    assert through(requests, "joint+nobody")[0].startswith(
        "It does not exist. 'joint+nobody' is no"
    )
    assert "weight 0" in through(requests, "joint*0")[0]


class Pooling(PoolingBaseServing):
    """An endpoint of pooling models, as far as it looks names up."""

    def __init__(self, requests: TaskRequests) -> None:
        self.models: Any = SimpleNamespace(lora_requests=requests, is_base_model="base".__eq__)

    def get_io_processor(self, request: Any) -> Any:
        raise AssertionError("nothing is processed")

    def _build_response(self, ctx: Any) -> Any:
        raise AssertionError("nothing is answered")

    async def look_up(self, name: str | None) -> Any:
        """As ``_init_ctx`` does: what answers, or vLLM's error."""
        request: Any = SimpleNamespace(model=name)
        try:
            assert await self._check_model(request) is None
            return self._maybe_get_adapters(request)
        except VLLMNotFoundError as error:
            return create_error_response(error).error


def test_a_404_of_a_pooling_model_says_it_too(
    requests: TaskRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = {owner: new for owner, name, new in named_requests.name_patches() if "_check" in name}
    for owner, new in patches.items():
        monkeypatch.setattr(owner, "_check_model", new)
    found = {
        name: asyncio.run(Pooling(requests).look_up(name))
        for name in ("joint", "prod", "base", None, "nobody", "joint+nobody", "joint*0", "auto")
    }
    assert (found["joint"], found["prod"]) == (requests["joint"], requests["joint"])
    assert found["base"] is found[None] is None
    unknown = {name: found[name] for name in ("nobody", "joint+nobody", "joint*0", "auto")}
    assert {(error.code, error.type) for error in unknown.values()} == {(404, "NotFoundError")}
    begins = {name: f"The model `{name}` does not exist." for name in unknown}
    assert unknown["nobody"].message == begins["nobody"]
    assert unknown["joint+nobody"].message.startswith(
        f"{begins['joint+nobody']} 'joint+nobody' is no blend of tasks: '+nobody'"
    )
    assert unknown["joint*0"].message.startswith(f"{begins['joint*0']} weight 0")
    assert unknown["auto"].message.startswith(
        f"{begins['auto']} The served checkpoint has no router"
    )


def test_what_is_no_http_passes(requests: TaskRequests) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    asyncio.run(NameHeaders(app)({"type": "lifespan"}, 1, 2))
    assert seen == [({"type": "lifespan"}, 1, 2)]


# --- what a server lists ------------------------------------------------------------------------------


class Core:
    """Engine cores that serve a checkpoint, as an API server asks them."""

    def __init__(self, checkpoint: Path) -> None:
        self.core_engines = range(2)
        self.show(checkpoint)

    def show(self, checkpoint: Path) -> None:
        opened = Checkpoint.open(checkpoint)
        self._answers = {
            TASKS_METHOD: [[task, str(path)] for task, path in task_paths(opened).items()],
            ALIASES_METHOD: encode_aliases(opened.aliases).decode(),
            FOLLOW_METHOD: opened.content_digest,
        }

    async def _call_utility_async(self, method: str, *arguments: str, engine: int) -> Any:
        return self._answers[method]


class Server:
    """What is listed of a checkpoint, beside ordinary adapters."""

    def __init__(self, checkpoint: Path, blends: bool = True, **more: LoRARequest) -> None:
        self.core = Core(checkpoint)
        served = ("base", "other-base", "mixed-private")
        models = SimpleNamespace(
            lora_requests=TaskRequests(more, {}, blends, served.__contains__),
            is_base_model=served.__contains__,
            engine_client=SimpleNamespace(engine_core=self.core),
        )
        self._listing = Listing(models)
        asyncio.run(self._listing.start())
        self.requests: TaskRequests = models.lora_requests

    def follow(self, checkpoint: Path) -> None:
        self.core.show(checkpoint)
        asyncio.run(self._listing._update())


def test_a_server_that_ends_asks_no_more(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "PERIOD", 0.0)
    warnings: list[str] = []
    monkeypatch.setattr(listing.logger, "warning", lambda *a: warnings.append(str(a)))
    server = Server(checkpoint)
    told = iter([RuntimeError("not now"), RuntimeError(f"call: {ENDING}")])

    async def fail(*question: Any, engine: int) -> None:
        if engine == 0:
            raise next(told)

    monkeypatch.setattr(server.core, "_call_utility_async", fail)
    asyncio.run(asyncio.wait_for(server._listing._follow(), 10))
    assert len(warnings) == 1
    assert "not now" in warnings[0]


def test_names_follow_what_is_published(checkpoint: Path) -> None:
    server = Server(checkpoint)
    requests = server.requests
    assert list(requests) == [*TASKS, "canary", "mix", "prod"]
    assert requests["prod"] is requests["joint"]
    before = requests["joint*0.5+private"].lora_path
    set_alias(checkpoint, "prod", "private")
    server.follow(checkpoint)
    assert requests["prod"] is requests["private"]
    remove_tasks(checkpoint, ["one"])
    # Its id reads as a blend of others, and it is a task all the same.
    blend_tasks(checkpoint, {"joint": 2.0}, "joint-private")
    server.follow(checkpoint)
    assert "one" not in requests
    assert requests["joint-private"].lora_name == "joint-private"
    assert requests["joint*0.5+private"].lora_path == before
    remove_alias(checkpoint, "mix")
    set_alias(checkpoint, "base", "joint")
    set_alias(checkpoint, "new", "joint-private")
    server.follow(checkpoint)
    # The name of the served model stays its own.
    assert list(requests) == ["joint", "private", "mixed", "joint-private", "canary", "new", "prod"]


def test_blends_of_tasks_that_were_published_again_are_others(
    checkpoint: Path, tmp_path: Path
) -> None:
    server = Server(checkpoint)
    old = server.requests["joint*0.5+private"].lora_path
    server.follow(build(tmp_path / "other", seed=1).path)
    assert server.requests["joint*0.5+private"].lora_path != old
    assert "prod" not in server.requests


def test_blends_may_be_off(checkpoint: Path) -> None:
    requests = Server(checkpoint, blends=False).requests
    assert "joint+private" not in requests
    assert "nobody" not in requests
    # What the operator named is served.
    assert requests["mix"].lora_name == "joint*0.5+private*0.25"
    assert requests["prod"] is requests["joint"]


TAKEN = "has the name of a served model or --lora-modules adapter, which goes on answering"


@pytest.mark.parametrize("later", [False, True], ids=["at the start", "published"])
def test_a_name_that_is_taken_stays_its_holders(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, later: bool
) -> None:
    """The same however it came, so that a server that is started again serves what it served."""
    taken = {"Joint": ORDINARY, "private": ORDINARY, "prod": ORDINARY}
    if later:
        server = Server(checkpoint, **taken)
        caplog.clear()
    set_alias(checkpoint, "base", "joint")
    set_alias(checkpoint, "other-base", "joint")
    set_alias(checkpoint, "Base", "joint")
    if later:
        server.follow(checkpoint)
    else:
        server = Server(checkpoint, **taken)
    requests = server.requests
    assert requests["private"] is requests["prod"] is requests["Joint"] is ORDINARY
    assert "base" not in requests
    assert "other-base" not in requests
    # Names are compared as they stand.
    assert requests["Base"] is requests["joint"] is not ORDINARY
    # What stands for a task that is not served is not either, and never for another of its name.
    assert list(requests) == ["Joint", "private", "prod", "joint", "mixed", "one", "Base"]
    assert "mix" not in requests
    assert through(requests, "mix")[0].endswith("stands for task 'private', which is not served")
    found = {through(requests, "canary", (b"x-vlora-key", b"%d" % n))[0] for n in range(20)}
    assert {str(one) for one in found} == {
        str(requests["joint"]),
        "It does not exist. 'canary' stands for task 'private', which is not served",
    }
    names = ["alias 'base'", "alias 'other-base'"]
    names = names if later else ["task 'private'", *names[:1], "alias 'other-base'", "alias 'prod'"]
    assert [line.split(" is not served: ")[0] for line in caplog.messages] == [
        f"vllm-vlora: {name}" for name in names
    ]
    assert all(TAKEN in line and "another name" in line for line in caplog.messages)
    assert {record.levelname for record in caplog.records} == {"ERROR"}
    # It is said once, however often something else is published.
    set_alias(checkpoint, "new", "joint")
    server.follow(checkpoint)
    assert len(caplog.messages) == len(names)
    assert "new" in requests
    remove_alias(checkpoint, "base")
    server.follow(checkpoint)
    set_alias(checkpoint, "base", "joint")
    server.follow(checkpoint)
    assert len(caplog.messages) == len(names) + 1


class Updating(Server):
    """A server whose clients may load adapters (``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``)."""

    def __init__(self, checkpoint: Path, **more: LoRARequest) -> None:
        super().__init__(checkpoint, **more)
        engine: Any = Engine()
        self._models = OpenAIServingModels(engine, [BaseModelPath("base", "base")])
        self._models.lora_requests = self.requests
        self._models.lora_resolvers = [CheckpointResolver(checkpoint)]

    def ask(self, name: str) -> LoRARequest:
        """What vLLM has a request of a name answered by, as its ``_check_model`` finds that."""
        if name not in self.requests:
            asyncio.run(self._models.resolve_lora(name))
        return self.requests[name]

    def unload(self, name: str) -> None:
        asked = UnloadLoRAAdapterRequest(lora_name=name)
        assert str(asyncio.run(self._models.unload_lora_adapter(asked))).startswith("Success")


def served(checkpoint: Path, task: str) -> tuple[str, int]:
    """The path and the number of a task of what a checkpoint has now."""
    [request] = [r for r in all_requests(checkpoint) if r.lora_name == task]
    return request.lora_path, request.lora_int_id


@pytest.mark.parametrize("way", ["before the list has it", "after it was unloaded"])
def test_a_task_that_vllms_resolver_found_follows_what_is_published(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    if way == "before the list has it":
        server = Updating(checkpoint)
        blend_tasks(checkpoint, {"joint": 2.0}, "new")
    else:
        blend_tasks(checkpoint, {"joint": 2.0}, "new")
        server = Updating(checkpoint)
        server.unload("new")
    found = server.ask("new")
    # A number of vLLM's own, which another API server gives to something else.
    assert (found.lora_path, found.lora_int_id) == (served(checkpoint, "new")[0], 1)
    set_alias(checkpoint, "other", "new")
    server.follow(checkpoint)
    listed = server.ask("new")
    assert (listed.lora_path, listed.lora_int_id) == served(checkpoint, "new")
    assert server.requests["other"] is listed
    server.unload("new")
    server.ask("new")
    remove_alias(checkpoint, "other")
    remove_tasks(checkpoint, ["new"])
    blend_tasks(checkpoint, {"joint": 3.0}, "new")
    server.follow(checkpoint)
    again = server.ask("new")
    assert (again.lora_path, again.lora_int_id) == served(checkpoint, "new")
    assert server.requests.newest(found) is again
    server.unload("new")
    server.ask("new")
    remove_tasks(checkpoint, ["new"])
    server.follow(checkpoint)
    assert list(server.requests) == [*TASKS, "canary", "mix", "prod"]
    assert not caplog.messages


def test_a_task_that_was_found_and_removed_before_it_was_listed_is_not_listed(
    checkpoint: Path,
) -> None:
    server = Updating(checkpoint)
    blend_tasks(checkpoint, {"joint": 2.0}, "new")
    server.ask("new")
    remove_tasks(checkpoint, ["new"])
    set_alias(checkpoint, "new", "joint")
    server.follow(checkpoint)
    assert server.requests["new"] is server.requests["joint"]


def test_a_task_that_was_unloaded_stays_away_until_it_is_published_again(checkpoint: Path) -> None:
    server = Updating(checkpoint)
    server.unload("one")
    set_alias(checkpoint, "other", "joint")
    server.follow(checkpoint)
    assert "one" not in server.requests
    remove_tasks(checkpoint, ["one"])
    blend_tasks(checkpoint, {"joint": 2.0}, "one")
    server.follow(checkpoint)
    assert server.requests["one"].lora_path == served(checkpoint, "one")[0]


def test_a_task_of_another_checkpoint_or_of_another_name_is_an_adapter(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = LoRARequest("one", 1, served(build(tmp_path / "other", seed=1).path, "one")[0])
    renamed = LoRARequest("mixed", 2, served(checkpoint, "joint")[0])
    requests = Server(checkpoint, one=theirs, mixed=renamed).requests
    assert (requests["one"], requests["mixed"]) == (theirs, renamed)
    assert ["'one'" in line or "'mixed'" in line for line in caplog.messages] == [True] * 2


def test_a_served_model_is_no_blend(checkpoint: Path) -> None:
    """vLLM looks among adapters before it looks among models."""
    requests = Server(checkpoint).requests
    assert "joint-one" in requests
    assert "mixed-private" not in requests
    assert requests.get("mixed-private") is None
    with pytest.raises(KeyError):
        requests["mixed-private"]


def test_a_state_reads_its_aliases_at_once(checkpoint: Path) -> None:
    state, before = State(Checkpoint.open(checkpoint)), folder_identity(checkpoint)
    set_alias(checkpoint, "prod", "private")
    assert state.aliases["prod"][0].blend[0].task == "joint"
    # A change of aliases alone is seen.
    assert folder_identity(checkpoint) != before
    assert State(Checkpoint.open(checkpoint)).digest != state.digest
    content = {"version": 1, "aliases": {"a": [{"share": 1, "terms": {"gone": "1"}}]}}
    (checkpoint / "aliases.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="alias 'a' names task 'gone'"):
        State(Checkpoint.open(checkpoint))


def test_names_for_the_offline_engine(checkpoint: Path) -> None:
    tasks = {request.lora_name: request for request in all_requests(checkpoint)}
    assert lora_request(checkpoint, "joint") == tasks["joint"]
    assert lora_request(checkpoint, "prod") == tasks["joint"]
    both = {lora_request(checkpoint, "canary", str(n)).lora_name for n in range(20)}
    assert both == {"joint", "private"}
    assert lora_request(checkpoint, "canary", "k") == lora_request(checkpoint, "canary", "k")
    assert lora_request(checkpoint, "joint+private*0.5").lora_name == "joint+private*0.5"
    with pytest.raises(TaskNotFoundError, match=r"no task 'nobody'; it has: .*joint"):
        lora_request(checkpoint, "nobody")
    with pytest.raises(BlendError, match="nobody' is none"):
        lora_request(checkpoint, "joint+nobody")
