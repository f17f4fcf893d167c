"""vLLM knows the package's environment variables, and so says which one is misspelled."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm import envs
from vllm.platforms import current_platform

from vllm_vlora.plugin.variables import VARIABLES, tell_vllm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM as it is where the plugin was not installed before, in another test."""
    vllms = {
        name: value for name, value in envs.environment_variables.items() if name not in VARIABLES
    }
    monkeypatch.setattr(envs, "environment_variables", vllms)
    for name in list(os.environ):
        if name.startswith("VLLM_") and name not in vllms:
            monkeypatch.delenv(name)


def test_each_variable_that_is_read_is_among_them() -> None:
    sources = [*(ROOT / "vllm_vlora").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    read = {
        name
        for source in sources
        for name in re.findall(r'"(VLLM_VLORA_[A-Z_]+)"', source.read_text())
    }
    assert sorted(VARIABLES) == sorted(read)


def test_vllm_says_of_a_misspelled_variable_alone_that_it_knows_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="VLLM_VLORA_"):
        current_platform.validate_environ(hard_fail=True)
    tell_vllm()
    current_platform.validate_environ(hard_fail=True)
    monkeypatch.setenv("VLLM_VLORA_TASK_CONCURENCY", "4")
    with pytest.raises(ValueError, match="VLLM_VLORA_TASK_CONCURENCY"):
        current_platform.validate_environ(hard_fail=True)


def test_no_value_of_theirs_is_in_what_vllm_writes_beside_compiled_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tell_vllm()
    before = envs.compile_factors()
    for name in VARIABLES:
        monkeypatch.setenv(name, "https://user:secret@models.example/tasks")
    assert envs.compile_factors() == before
    assert "secret" not in json.dumps(before, default=str)
