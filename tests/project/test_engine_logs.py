"""A test that fails says what its engine wrote, and the end of a run says it once more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import engine_logs
import pytest

TESTS = Path(__file__).resolve().parent.parent

FAILING = """
from pathlib import Path

import engine_logs


class Dead:
    exitcode = -11


LOG = Path(__file__).with_name("engine.log")


def test_one_before():
    LOG.write_text("ERROR of a test before\\n")
    engine_logs.follow(LOG, Dead())


def test_that_fails():
    with LOG.open("a") as log:
        log.write("INFO begins\\nERROR the cause\\n" + "INFO goes on\\n" * 100 + "INFO the last\\n")
    assert False


def test_that_finds_it_gone():
    assert False
"""


def test_a_test_that_fails_says_what_its_engine_wrote(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_failing.py").write_text(FAILING)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", "2",
         "--dist", "loadfile", "--rootdir", str(tmp_path), "-o", "tmp_path_retention_policy=none",
         str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(TESTS / "support")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )  # fmt: skip
    report, _, summary = done.stdout.partition("short test summary info")
    title = f"log of an engine, which ended with -11: {tmp_path / 'engine.log'}"
    assert done.returncode == 1, done.stdout + done.stderr
    assert report.count(title) == 2
    assert "--- errors:\nERROR the cause\n--- the end:\nINFO goes on\n" in report
    assert "ERROR of a test before" not in report
    # Behind the names of the tests that failed, and once for the two.
    assert f"test_that_fails: {title}\n--- errors:\nERROR the cause\n" in summary
    assert summary.count(title) == 1


def test_an_excerpt_has_the_first_errors_and_the_last_lines() -> None:
    errors = [f"(EngineCore pid=7) \x1b[31mERROR\x1b[0m number {n}" for n in range(100)]
    others = [f"INFO number {n}" for n in range(100)]
    found = engine_logs.excerpt("\n".join([*errors, *others]).encode()).splitlines()
    assert found[:2] == ["--- errors:", "(EngineCore pid=7) ERROR number 0"]
    assert found[engine_logs.LINES + 1] == "--- the end:"
    assert found[-1] == "INFO number 99"
    assert len(found) == 2 * (engine_logs.LINES + 1)


def test_an_excerpt_is_short_whatever_was_written() -> None:
    assert engine_logs.excerpt(b"") == ""
    (_, line) = engine_logs.excerpt(b"\xff" + b"x" * 10_000).splitlines()
    assert len(line) == engine_logs.WIDTH + len(" ...")


def test_a_summary_has_what_was_raised_and_not_where() -> None:
    start = "(Worker pid=2) ERROR 11-28 03:33:45 [multiproc_executor.py:1063]"
    raised = ["WorkerProc hit an exception.", "Traceback (most recent call last):", "MyError: it"]
    frames = ['  File "worker.py", line 1', "    return self.execute()", "           ^^^^^^^"] * 30
    written = [f"{start} {line}" for line in (*raised[:2], *frames, raised[2])]
    found = engine_logs.excerpt("\n".join(written).encode())
    title = f"{engine_logs.TITLE}, which runs: engine.log"
    lines = engine_logs.summary([("one", [(title, found)]), ("two", [(title, found)])])
    assert lines[:2] == [f"one: {title}", "--- errors:"]
    assert f"{start} MyError: it" in lines
    assert not any("File" in line or "^" in line for line in lines)
    assert len(lines) <= 1 + engine_logs.SUMMARY_LINES


@pytest.mark.parametrize(
    "line",
    [
        "(EngineCore pid=1) ERROR 11-28 [core.py:1] EngineCore encountered a fatal error.",
        "Traceback (most recent call last):",
        "KeyError: 'request'",
        "(Worker pid=2) Fatal Python error: Segmentation fault",
    ],
)
def test_what_is_an_error(line: str) -> None:
    assert "--- errors:" in engine_logs.excerpt(line.encode())
    assert "--- errors:" not in engine_logs.excerpt(b"WARNING may end in `OSError: [Errno 24]`")
