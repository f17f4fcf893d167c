"""What is logged for programs: each line, its facts, and that nothing stands before it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_world import TASKS, build

from vllm_vlora.errors import CheckpointError, MemoryBudgetError
from vllm_vlora.plugin import events
from vllm_vlora.plugin.counters import DISK, ServingCounters
from vllm_vlora.plugin.events import EVENTS, JSON, KEYS, TEXT, LineFormatter, facts, happened
from vllm_vlora.plugin.following import Follower, State

LOGGER = logging.getLogger("vllm.plugins.vlora")


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    yield
    events.install(TEXT)
    LOGGER.setLevel(level)


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> object:
    def read() -> list[dict]:
        return [json.loads(line) for line in capfd.readouterr().err.splitlines()]

    return read


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = LOGGER.makeRecord(
        LOGGER.name, logging.WARNING, __file__, 1, message, args, None, extra=extra or None
    )
    made.created, made.msecs, made.process = 1_700_000_000.25, 250.0, 7
    return made


def test_a_line_is_its_facts_and_its_words() -> None:
    made = record('vllm-vlora: %s is "full"\nnow', "it", **facts("refusal", task="a b", tasks=3))
    assert LineFormatter(KEYS).format(made) == (
        'time=2023-11-14T22:13:20.250Z level=warning process=7 event=refusal task="a b" tasks=3 '
        'message="it is \\"full\\"\\nnow"'
    )
    assert LineFormatter(JSON).format(made) == (
        '{"time": "2023-11-14T22:13:20.250Z", "level": "warning", "process": 7, "event": "refusal", '
        '"task": "a b", "tasks": 3, "message": "it is \\"full\\"\\nnow"}'
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("sql", "sql"), ("", '""'), ("a=b", '"a=b"'), ("é", "é"), ("\x1b[31m", '"\\u001b[31m"'),
        ("back\\slash", '"back\\\\slash"'), ("\u202e", '"\\u202e"'), (1.5, "1.5"), (None, "null"),
    ],
)  # fmt: skip
def test_a_value_cannot_be_taken_for_another_key_or_line(value: object, written: str) -> None:
    line = LineFormatter(KEYS).format(record("m", **facts("load", task=value)))
    assert f" event=load task={written} message=m" in line


def test_a_line_without_facts_and_an_error_are_lines_too() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        made = record("plain")
        made.exc_info = sys.exc_info()
    found = json.loads(LineFormatter(JSON).format(made))
    assert found["event"] == "message"
    assert found["exception"].endswith("ValueError: bad")
    assert "\n" not in LineFormatter(KEYS).format(made)


def test_nothing_stands_before_a_line(
    lines, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As vLLM up to 0.30 has it: every process writes its name before each line of its own."""
    plain = sys.stderr.write
    monkeypatch.setattr(sys.stderr, "write", lambda text: plain(f"(Worker pid=7) {text}"))
    events.install(JSON)
    LOGGER.info("vllm-vlora: it is there")
    logging.getLogger("vllm_vlora.downloads").warning("no answer")
    print("other", file=sys.stderr)
    *ours, other = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["message"] for line in ours] == ["it is there", "no answer"]
    assert other.startswith("(Worker pid=7)")


def test_what_happens_to_tasks_is_told_to_programs_alone(
    lines, caplog: pytest.LogCaptureFixture
) -> None:
    def use(counters: ServingCounters) -> None:
        counters.loaded(DISK, 0.25, 4096, "sql")
        counters.evicted(task="old")
        counters.refused(MemoryBudgetError("no room for it"), "big")
        counters.refused(CheckpointError, "gone")

    use(ServingCounters(1, 1))
    assert caplog.messages == []
    events.install(JSON)
    use(ServingCounters(1, 1))
    found = lines()
    for line in found:
        assert line.pop("time").endswith("Z")
        assert line.pop("level") == "info"
        assert line.pop("process") > 0
    assert found == [
        {"event": "load", "task": "sql", "source": "disk", "seconds": 0.25, "bytes": 4096},
        {"event": "eviction", "task": "old", "tier": "device"},
        {"event": "refusal", "task": "big", "reason": "memory", "why": "no room for it"},
        {"event": "refusal", "task": "gone", "reason": "checkpoint", "why": "checkpoint"},
    ]
    events.install(TEXT)
    LOGGER.warning("as before")
    assert lines() == []
    assert caplog.messages[-1] == "as before"


def test_people_see_them_at_the_level_of_debugging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="vllm.plugins.vlora.events"):
        happened("load", task="a b", seconds=0.5)
    assert caplog.messages == ['vllm-vlora: load task="a b" seconds=0.5']


def test_a_refused_publication_says_why(lines, tmp_path: Path) -> None:
    events.install(JSON)
    opened = build(tmp_path / "ck", TASKS)
    follower = Follower(opened.path, State(opened), lambda *_: None, LOGGER)
    opened.path.rename(tmp_path / "gone")
    follower.look()
    (line,) = lines()
    assert (line["event"], line["level"], line["reason"]) == (
        "publication_refused",
        "error",
        "checkpoint",
    )
    assert "no such folder" in line["message"]


def test_vllm_may_set_its_logging_up_again() -> None:
    """As it does in each process, after the plugin is there; it closes every handler of the process."""
    program = """
import logging, logging.config
from vllm_vlora.plugin import events

logger = logging.getLogger("vllm.plugins.vlora")
logger.setLevel(logging.INFO)
events.install(events.JSON)
vllms = {"vllm": {"level": "INFO", "handlers": []}}
logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": vllms})
logger.info("still there")
events.happened("load", task="sql")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["message", "load"]


def test_installing_twice_writes_once(lines) -> None:
    for _ in range(2):
        events.install(JSON)
    LOGGER.info("once")
    assert len(lines()) == 1


@pytest.mark.parametrize("log", [TEXT, JSON])
def test_a_warning_of_the_library_is_seen_whatever_the_root_is_set_to(log: str) -> None:
    program = (
        "import logging\n"
        "from vllm_vlora.plugin import events\n"
        "logging.getLogger().setLevel(logging.ERROR)\n"
        f"events.install({log!r})\n"
        "logging.getLogger('vllm_vlora.downloads').warning('seen')\n"
        "logging.getLogger('vllm_vlora.downloads').info('not seen')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    (line,) = done.stderr.splitlines()
    assert "seen" in line
    assert "not" not in line


def test_every_event_is_documented() -> None:
    page = Path(__file__, "../../../docs/monitoring.md").resolve().read_text()
    for event in EVENTS:
        assert f"| `{event}` |" in page, event
