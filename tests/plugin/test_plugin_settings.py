"""The plugin's environment variables."""

from __future__ import annotations

import pytest

from vllm_vlora.downloads import Parts
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
        ({"VLLM_VLORA_TASK_CONCURRENCY": "8"}, Settings(task_concurrency=8)),
        ({"VLLM_VLORA_TASK_QUEUE": "100", "VLLM_VLORA_FAIR": ""}, Settings(task_queue=100)),
        (
            {"VLLM_VLORA_FAIR": "on", "VLLM_VLORA_WEIGHTS": '{"sql": 2, "é,=": 0.5}'},
            Settings(fair=True, weights={"sql": 2.0, "é,=": 0.5}),
        ),
        ({"VLLM_VLORA_POLL_SECONDS": "60"}, Settings(poll_seconds=60)),
        ({"VLLM_VLORA_FETCH": "asked"}, Settings(fetch=Parts.TASKS_LATER)),
        ({"VLLM_VLORA_LOG": "json"}, Settings(log="json")),
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


def test_vllms_scheduler_is_left_alone_unless_something_is_asked_for() -> None:
    assert not Settings().limited
    assert not read_settings({"VLLM_VLORA_TASK_CONCURRENCY": "0", "VLLM_VLORA_FAIR": "off"}).limited
    for asked in (Settings(fair=True), Settings(task_queue=1), Settings(task_concurrency=1)):
        assert asked.limited


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("sql=2", "use a JSON object of names and numbers"),
        ('{"sql": 2', "use a JSON object of names and numbers"),
        ('{"sql": "2"}', "use a JSON object of names and numbers"),
        ('{"sql": 1, "sql": 2}', "use a JSON object of names and numbers"),
        ('{"sql": NaN}', "use a JSON object of names and numbers"),
        ("[1]", "use a JSON object of names and numbers"),
        ('{"sql": 0}', "'sql' has 0; use a number above 0"),
        ('{"sql": 1e-320}', "'sql' has 9.99989e-321; use a number above 0"),
        ('{"sql": 1e300}', "'sql' has 1e+300; use a number above 0, from 1e-06 to 1e+06"),
        ('{"sql": -1.5}', "'sql' has -1.5; use a number above 0"),
    ],
)
def test_weights_that_mean_nothing_are_named(weights: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({"VLLM_VLORA_FAIR": "on", "VLLM_VLORA_WEIGHTS": weights})
    assert str(caught.value).startswith("VLLM_VLORA_WEIGHTS")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_without_fairness_are_not_ignored() -> None:
    with pytest.raises(SettingError, match="does nothing without VLLM_VLORA_FAIR=on"):
        read_settings({"VLLM_VLORA_WEIGHTS": '{"sql": 2}'})


def test_polling_without_following_is_not_ignored() -> None:
    with pytest.raises(SettingError, match="does nothing with VLLM_VLORA_FOLLOW=off"):
        read_settings({"VLLM_VLORA_FOLLOW": "off", "VLLM_VLORA_POLL_SECONDS": "60"})


def test_settings_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_VLORA_SLOTS", "3")
    monkeypatch.setenv("VLLM_VLORA_MODE", "direct")
    monkeypatch.delenv("VLLM_VLORA_BASIS", raising=False)
    assert read_settings() == Settings("direct", 3)


@pytest.mark.parametrize("name", ["MODE", "TASK_QUEUE", "ROUTE", "ROUTE_THRESHOLD", "WEIGHTS"])
def test_a_line_that_refuses_a_value_does_not_repeat_all_of_a_long_one(name: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({"VLLM_VLORA_FAIR": "on", f"VLLM_VLORA_{name}": "x" * 5000})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODE", "fast", "'fast': use one of auto, direct, materialize"),
        ("MODE", "Direct", "'Direct': use one of"),
        ("MODE", " auto", "' auto': use one of"),
        ("BASIS", "nf4", "'nf4': use one of dense, packed"),
        ("ROWS", "3", "'3': use one of wide, narrow"),
        ("LOG", "JSON", "'JSON': use one of text, keys, json"),
        ("FAIR", "yes", "'yes': use one of off, on"),
        ("TASK_CONCURRENCY", "-1", "'-1': use a whole number from 0 on"),
        ("POLL_SECONDS", "0.5", "'0.5': use a whole number from 0 on"),
        ("POLL_SECONDS", "9" * 12, "'999999999999': use a whole number from 0 on, 1000000000 at most"),
        ("BASIS_WAIT", "9" * 12, "'999999999999': use a whole number from 0 on, 1000000000 at most"),
        ("TASK_QUEUE", "9" * 5000, f"'{'9' * 79}: use a whole number from 0 on"),
        ("TASK_QUEUE", "many", "'many': use a whole number from 0 on"),
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
