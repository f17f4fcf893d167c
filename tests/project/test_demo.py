"""The demo's committed adapters are what its table of tasks says, and small enough to keep."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import ModuleType

import pytest
from places import EXAMPLES

from vllm_vlora import open_adapter

DEMO = EXAMPLES / "demo"
LIMIT = 12_000_000


def _tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_tasks", DEMO / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_tasks"] = module
    spec.loader.exec_module(module)
    return module


TASKS = _tasks().TASKS


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_an_adapter_is_the_one_its_task_describes(task) -> None:  # type: ignore[no-untyped-def]
    adapter = open_adapter(DEMO / "adapters" / task.name)
    scale = task.alpha / (math.sqrt(task.rank) if task.rslora else task.rank)
    assert {module.rank for module in adapter.modules.values()} == {task.rank}
    for module in adapter.modules.values():
        assert module.scale == pytest.approx(scale)
    suffixes = {name.rsplit(".", 1)[1] for name in adapter.modules}
    assert suffixes == set(task.target_modules)
    norms = [float(b.float().norm()) for _, (_, b) in adapter.iter_factors()]
    assert min(norms) > 0, "a module was never trained"
    prompts = {prompt for prompt, _ in task.train}
    assert not prompts & {prompt for prompt, _ in task.held_out}


def test_the_collection_is_mixed_and_small() -> None:
    assert len(TASKS) >= 9
    assert len({task.rank for task in TASKS}) > 1
    assert len({task.seed for task in TASKS}) == len(TASKS)
    files = (DEMO / "adapters").rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) < LIMIT
