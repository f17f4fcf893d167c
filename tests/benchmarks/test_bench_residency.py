"""How the residency benchmark takes turns, warms up and keeps what it has; no engine."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import residency
import run

TASKS = [f"t{number}" for number in range(5)]


def _turn(requests: int) -> dict[str, Any]:
    return {
        "alone": {tier: [0.5] for tier in residency.TIERS},
        "together": [0.5],
        "requests_per_second": 2.0,
        "answers": [[1]] * 2 * requests,
    }


def test_engines_take_turns_and_each_round_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, order, kept = tmp_path / "residency.json", [], []

    def in_another_process(function: Any, *args: Any) -> Any:
        if function is residency.probe_device:
            return {"type": "cpu", "name": "a CPU"}
        _, _, asked, budget = args
        kept.append(len(json.loads(path.read_text())["rounds"]) if path.exists() else 0)
        order.append("VLLM_VLORA_HOST_BYTES" in budget)
        return _turn(len(asked) // 2)

    monkeypatch.setattr(residency, "in_another_process", in_another_process)
    monkeypatch.setattr(residency, "_world", lambda *_: None)
    monkeypatch.setattr(residency, "_block_bytes", lambda _: 1)
    run.main(["residency", "--quick", "--rounds", "3", "--json", str(path)])
    # The engine of as many as fit comes first in every other round.
    assert order == [False, True, True, False, False, True]
    assert kept == [0, 0, 1, 1, 2, 2]
    assert len(json.loads(path.read_text())["rounds"]) == 3


class _Engine:
    """Notes what it was asked before its counters were, and how much of it at once."""

    def __init__(self) -> None:
        self.engine_core = SimpleNamespace(
            core_engines=[b""], _call_utility_async=self._call_utility_async
        )
        self.before: list[str] | None = None
        self.asked: list[str] = []
        self.inside = self.most = 0

    async def _call_utility_async(self, *_: Any, **__: Any) -> dict[str, Any]:
        if self.before is None:
            self.before, self.most_before = list(self.asked), self.most
        return {"requests": Counter(device=len(self.asked))}

    async def generate(self, prompt: Any, sampling: Any, name: str, lora_request: Any) -> Any:
        self.asked.append(name)
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0)
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])])
        self.inside -= 1


def test_some_requests_together_come_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    from vllm_vlora.plugin import requests

    made = [SimpleNamespace(lora_name=name) for name in TASKS]
    monkeypatch.setattr(requests, "all_requests", lambda _: made)
    world: Any = SimpleNamespace(
        config={"vocab_size": 100}, task_ids=TASKS, checkpoint=lambda name: name
    )
    args = Namespace(prompt_len=2, output_len=1, tasks=len(TASKS), together=4)
    engine = _Engine()
    found = asyncio.run(residency._ask_both_ways(args, world, [0, 1, 2, 3], engine))
    assert engine.before is not None
    assert len(engine.before) == len({*engine.before}) >= 24
    assert engine.most_before == 4
    assert [len(found["alone"]["device"]), len(found["together"])] == [2, 2]
