"""What a step of the direct path launches in one block of a model, counted without a GPU.

A launch costs the device some microseconds and an idle program some nanoseconds, so both are held to a
number: what changes one of them on purpose changes it here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from compile_kernels import TARGETS, in_own_process

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton to count"
)

# What a block's four layers launch, and programs of it all.
DECODE = {
    "llama-7b joint": [12, 1560],
    "llama-7b private": [8, 5248],
    "llama-8b joint": [12, 1568],
    "llama-8b private": [8, 5248],
    "llama-70b joint": [12, 2208],
    "llama-70b private": [8, 10368],
}
# A product of torch's is among the joint launches of a layer; its programs are not counted.
PREFILL = {
    "llama-7b joint": [12, 10848],
    "llama-7b private": [8, 4736],
    "llama-8b joint": [12, 10976],
    "llama-8b private": [8, 4736],
    "llama-70b joint": [12, 21216],
    "llama-70b private": [8, 7552],
}


def counted() -> dict[str, dict[str, list[int]]]:
    """Batch -> engine -> launches, and programs of them."""
    from engine_launches import EAGER, MODELS, Batch, Engine, Way, run_direct
    from record_launches import recording

    steps = {
        "decode": (Batch(64, 64, 64), 64, EAGER),
        "decode in 1024 slots": (Batch(64, 64, 64), 1024, EAGER),
        "captured decode": (Batch(64, 64, 64), 64, Way(captured=True, ahead=True)),
        "captured decode in 1024 slots": (Batch(64, 64, 64), 1024, Way(captured=True, ahead=True)),
        "prefill": (Batch(2048, 8, 2048), 8, EAGER),
        "prefill in 1024 slots": (Batch(2048, 8, 2048), 1024, EAGER),
        "one of many": (Batch(2048, 1, 1), 1024, EAGER),
        "nothing": (Batch(64, 1, 0), 64, EAGER),
    }
    found: dict[str, dict[str, list[int]]] = {name: {} for name in steps}
    for name, (batch, slots, way) in steps.items():
        for model in MODELS:
            for kind, engine in (
                ("joint", Engine(model, k=64)),
                ("private", Engine(model, rank=16, formats=("nf4",))),
            ):
                with recording(TARGETS["sm_90"]) as recorded:
                    run_direct(recorded, engine, [batch], slots=slots, ways=[way])
                found[name][f"{model} {kind}"] = [len(recorded.launches), recorded.programs]
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return in_own_process(__file__, "counted", Path(tmp_path_factory.mktemp("steps")))


@pytest.mark.parametrize("step", ["decode", "captured decode"])
@pytest.mark.parametrize("slots", ["", " in 1024 slots"])
def test_decode(steps: Any, step: str, slots: str) -> None:
    """64 tokens of 64 tasks."""
    assert steps[step + slots] == DECODE


@pytest.mark.parametrize("slots", ["", " in 1024 slots"])
def test_prefill_costs_what_its_tasks_need(steps: Any, slots: str) -> None:
    """2048 tokens of 8 tasks, in as many slots and in many more."""
    assert steps["prefill" + slots] == PREFILL


def test_one_token_with_a_task_among_many_without(steps: Any) -> None:
    private = {name: counts for name, counts in steps["one of many"].items() if "private" in name}
    assert private == {
        "llama-7b private": [8, 148],
        "llama-8b private": [8, 148],
        "llama-70b private": [8, 236],
    }


def test_a_batch_without_tasks_launches_nothing(steps: Any) -> None:
    assert len(steps["nothing"]) == 6
    assert set(map(tuple, steps["nothing"].values())) == {(0, 0)}
