"""The plugin's environment variables."""

from __future__ import annotations

import pytest

from vllm_vlora.errors import SettingError
from vllm_vlora.plugin.settings import Settings, read_settings


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Settings("auto", 8, packed_basis=False)),
        ({"VLLM_VLORA_MODE": "", "VLLM_VLORA_SLOTS": "", "VLLM_VLORA_BASIS": ""}, Settings()),
        ({"VLLM_VLORA_MODE": "direct", "VLLM_VLORA_SLOTS": "1"}, Settings("direct", 1)),
        ({"VLLM_VLORA_MODE": "materialize"}, Settings("materialize")),
        ({"VLLM_VLORA_SLOTS": "064"}, Settings(slots=64)),
        ({"VLLM_VLORA_BASIS": "packed"}, Settings(packed_basis=True)),
        ({"VLLM_VLORA_LATE_MIB": "0"}, Settings(late_mib=0)),
        ({"VLLM_VLORA_LATE_MIB": "4096"}, Settings(late_mib=4096)),
        ({"VLLM_VLORA_CHAT_TEMPLATES": "on"}, Settings(chat_templates=True)),
        ({"VLLM_VLORA_ROWS": "narrow"}, Settings(narrow_rows=True)),
        ({"VLLM_VLORA_METRICS_TASKS": "5"}, Settings(metrics_tasks=5)),
        ({"VLLM_VLORA_METRICS_LISTED": "0"}, Settings(metrics_listed=0)),
        ({"VLLM_VLORA_ROWS": "wide"}, Settings()),
        ({"VLLM_VLORA_BASIS": "dense", "VLLM_VLORA_MODE": "auto"}, Settings()),
    ],
)
def test_settings_are_read_from_the_environment(
    environment: dict[str, str], expected: Settings
) -> None:
    assert read_settings(environment) == expected
    assert expected.direct == (expected.mode != "materialize")


def test_settings_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_VLORA_SLOTS", "3")
    monkeypatch.setenv("VLLM_VLORA_MODE", "direct")
    monkeypatch.delenv("VLLM_VLORA_BASIS", raising=False)
    assert read_settings() == Settings("direct", 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODE", "fast", "'fast': use one of auto, direct, materialize"),
        ("MODE", "Direct", "'Direct': use one of"),
        ("MODE", " auto", "' auto': use one of"),
        ("BASIS", "nf4", "'nf4': use one of dense, packed"),
        ("ROWS", "3", "'3': use one of wide, narrow"),
        *(("LATE_MIB", bad, f"{bad!r}: use a whole number from 0 on")
          for bad in ("-1", "1.5", "1G", " 8")),
        *(("SLOTS", bad, f"{bad!r}: use a whole number from 1 on")
          for bad in ("0", "-1", "+3", "2.0", "eight", " 8", "٣", "²", "1e3", "00")),
    ],
)  # fmt: skip
def test_a_setting_that_means_nothing_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({f"VLLM_VLORA_{name}": value})
    assert str(caught.value).startswith(f"VLLM_VLORA_{name}={message}")
