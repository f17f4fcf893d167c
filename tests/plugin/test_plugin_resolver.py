"""Which names a server finds that it was not started with, and what asking for others costs."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from plugin_world import build

from vllm_vlora.checkpoint.manifest import CONFIG_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.plugin import requests
from vllm_vlora.plugin.identity import task_path
from vllm_vlora.plugin.requests import CheckpointResolver


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The thread of each read of a manifest."""
    seen: list[str] = []
    read = requests.all_requests

    def count(checkpoint: Any) -> Any:
        seen.append(threading.current_thread().name)
        return read(checkpoint)

    monkeypatch.setattr(requests, "all_requests", count)
    return seen


def ask(resolver: CheckpointResolver, *names: str) -> list[Any]:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(resolver.resolve_lora("base", name) for name in names))

    return asyncio.run(all_at_once())


def test_a_manifest_is_read_once_beside_the_loop(tmp_path: Path, reads: list[str]) -> None:
    resolver = CheckpointResolver(build(tmp_path / "ckpt").path)
    assert ask(resolver, *(f"bogus {i}" for i in range(200))) == [None] * 200
    first, second = (*ask(resolver, "one"), *ask(resolver, "one"))
    assert len(reads) == 1
    assert reads[0] != threading.current_thread().name
    first.lora_int_id = 7  # as vLLM does
    assert second.lora_int_id != 7
    assert first.lora_path == str(task_path(Checkpoint.open(tmp_path / "ckpt"), "one"))


def test_what_is_published_later_is_found(tmp_path: Path, reads: list[str]) -> None:
    folder = build(tmp_path / "ckpt").path
    resolver = CheckpointResolver(folder)
    (old,) = ask(resolver, "one")
    build(tmp_path / "next", seed=1)
    folder.rename(tmp_path / "old")
    assert ask(resolver, "one") == [None]
    (tmp_path / "next").rename(folder)
    (new,) = ask(resolver, "one")
    assert new.lora_path == str(task_path(Checkpoint.open(folder), "one")) != old.lora_path
    # The same bytes in another file, as a copy brings them.
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    assert ask(resolver, "one")[0].lora_path == new.lora_path


def test_a_manifest_that_cannot_be_read_is_not_read_for_every_name(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path / "ckpt").path
    tasks = folder / json.loads((folder / CONFIG_FILE).read_bytes())["tasks"]["file"]
    whole = tasks.read_bytes()
    tasks.write_bytes(whole[:-1])
    resolver = CheckpointResolver(folder)
    assert ask(resolver, *["one"] * 100) == [None] * 100
    assert len(reads) == 1
    tasks.write_bytes(whole)
    now = time.monotonic()
    monkeypatch.setattr(requests.time, "monotonic", lambda: now + 3)
    assert ask(resolver, "one")[0].lora_name == "one"
    assert len(reads) == 2
