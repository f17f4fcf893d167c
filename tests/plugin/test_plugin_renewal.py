"""Requests that met a publication on their way are asked again, once and for what is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from vllm_vlora.errors import CheckpointError, CheckpointReplacedError
from vllm_vlora.plugin import renewal
from vllm_vlora.plugin.named_requests import TaskRequests
from vllm_vlora.plugin.refusals import callers_error
from vllm_vlora.plugin.renewal import renew_from, renew_requests

TEXT = {"prompt_token_ids": [1, 2]}


def request(name: str, digest: str) -> LoRARequest:
    return LoRARequest(name, 1, f"/folder/tasks/{name}.safetensors@{digest * 32}")


OLD, NEW = request("sql", "a"), request("sql", "b")


class Engine:
    """An engine that has other weights of a task than these."""

    def __init__(self, gone: tuple[LoRARequest, ...] = (OLD,), after: int = 0) -> None:
        self.gone, self.after = [one.lora_path for one in gone], after
        self.asked: list[str] = []
        self.closed = 0

    @renew_requests
    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncGenerator[int, None]:
        self.asked.append(lora_request and lora_request.lora_path)
        try:
            for number in range(3):
                if lora_request and lora_request.lora_path in self.gone and number == self.after:
                    raise callers_error(CheckpointReplacedError, "published again")
                yield number
        finally:
            self.closed += 1


async def answer(engine: Any, lora: Any, prompt: Any = TEXT) -> list[int]:
    return [number async for number in engine.generate(prompt, {}, "id", lora_request=lora)]


def test_what_was_published_meanwhile_is_asked_for_again() -> None:
    engine = Engine()
    listed = TaskRequests({"sql": NEW}, {})
    renew_from(engine, listed.newest)
    assert asyncio.run(answer(engine, OLD)) == [0, 1, 2]
    assert engine.asked == [OLD.lora_path, NEW.lora_path]
    assert asyncio.run(answer(engine, None)) == [0, 1, 2]
    assert engine.closed == 3


def test_it_may_be_asked_by_keywords_as_vllm_does() -> None:
    engine = Engine()
    renew_from(engine, TaskRequests({"sql": NEW}, {}).newest)

    async def ask() -> list[int]:
        asked: Any = engine.generate(  # type: ignore[call-arg]
            prompt=TEXT, params={}, request_id="id", lora_request=OLD
        )
        return [number async for number in asked]

    assert asyncio.run(ask()) == [0, 1, 2]
    assert engine.asked == [OLD.lora_path, NEW.lora_path]


def test_it_waits_until_the_publication_is_listed() -> None:
    engine = Engine()
    listed = TaskRequests({"sql": OLD}, {})
    renew_from(engine, listed.newest)

    async def published_later() -> list[int]:
        asked = asyncio.create_task(answer(engine, OLD))
        while not engine.closed:
            await asyncio.sleep(0)
        await asyncio.sleep(3 * renewal._PERIOD)
        assert engine.asked == [OLD.lora_path]
        listed["sql"] = NEW
        return await asked

    assert asyncio.run(published_later()) == [0, 1, 2]


def test_a_blend_is_renewed_by_its_name() -> None:
    other = [request("other", "c"), request("other", "d")]
    before = TaskRequests({"sql": OLD, "other": other[0]}, {}).meaning("sql*0.5+other")
    engine = Engine((before,))
    listed = TaskRequests({"sql": NEW, "other": other[1]}, {})
    renew_from(engine, listed.newest)
    assert asyncio.run(answer(engine, before)) == [0, 1, 2]
    assert engine.asked == [before.lora_path, listed.meaning("sql*0.5+other").lora_path]
    assert len({*engine.asked}) == 2


@pytest.mark.parametrize(
    ("why", "engine", "listed", "lora", "prompt"),
    [
        ("it is no more", Engine(), {}, OLD, TEXT),
        ("some of it was answered", Engine(after=1), {"sql": NEW}, OLD, TEXT),
        ("it has images", Engine(), {"sql": NEW}, OLD, {**TEXT, "mm_kwargs": {}}),
        ("its pieces come as they are made", Engine(), {"sql": NEW}, OLD, object()),
        ("it changes again and again", Engine((OLD, NEW)), None, OLD, TEXT),
    ],
)
def test_its_caller_is_told_where(
    why: str, engine: Engine, listed: Any, lora: LoRARequest, prompt: Any
) -> None:
    newest = {OLD.lora_path: NEW, NEW.lora_path: OLD}
    renew_from(
        engine,
        (lambda one: newest[one.lora_path]) if listed is None else TaskRequests(listed, {}).newest,
    )
    with pytest.raises(CheckpointReplacedError):
        asyncio.run(answer(engine, lora, prompt))
    assert len(engine.asked) == (3 if listed is None else 1), why


def test_other_errors_and_other_adapters_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "_PATIENCE", 0.0)
    ordinary = LoRARequest("ordinary", 2, "/adapters/ordinary")

    async def fail(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[int, None]:
        raise callers_error(CheckpointError, "damaged")
        yield 0

    damaged: Any = SimpleNamespace()
    damaged.generate = renew_requests(fail).__get__(damaged)
    renew_from(damaged, TaskRequests({"sql": NEW}, {}).newest)
    with pytest.raises(CheckpointError, match="damaged"):
        asyncio.run(answer(damaged, OLD))
    engine = Engine((ordinary,))
    renew_from(engine, TaskRequests({"ordinary": NEW}, {}).newest)
    with pytest.raises(CheckpointReplacedError):
        asyncio.run(answer(engine, ordinary))
    # What is listed stays as it is, as where the folder was damaged.
    engine = Engine()
    renew_from(engine, TaskRequests({"sql": OLD}, {}).newest)
    with pytest.raises(CheckpointReplacedError):
        asyncio.run(answer(engine, OLD))


def test_a_reader_that_goes_ends_the_request_at_once() -> None:
    engine = Engine()
    renew_from(engine, TaskRequests({"sql": NEW}, {}).newest)

    async def go() -> None:
        reader = engine.generate(TEXT, {}, "id", lora_request=NEW)  # type: ignore[call-arg]
        assert await anext(reader) == 0
        await reader.aclose()
        assert engine.closed == 1

    asyncio.run(go())
