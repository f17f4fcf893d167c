"""What the engines of a test wrote, for its report where it fails: nothing else says why one died."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TITLE = "log of an engine"
# Lines of a report, and of the summary at a run's end; characters of a line.
LINES, SUMMARY_LINES, WIDTH = 60, 12, 300
_ERROR = re.compile(
    r"^(?!.*\b(INFO|WARNING)\b)"
    r".*\b(ERROR|CRITICAL|Traceback|Fatal Python error|[A-Z]\w*(Error|Exception):)"
)
# Where a traceback goes through, behind vLLM's own beginning of each line.
_FRAME = re.compile(r"(^|\]) {2,}")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class Process(Protocol):
    """What writes a log."""

    @property
    def exitcode(self) -> int | None:
        """None while it lives."""


@dataclass
class _Log:
    file: Path
    process: Process
    # What tests before this one made it write.
    before: int = 0
    # A test ended it, and did so before the next one.
    ended: bool = False


_logs: list[_Log] = []


def follow(file: Path, process: Process) -> None:
    """A process writes to a file from now on."""
    _logs.append(_Log(file, process))


def end(process: Process) -> None:
    """A test ends a process, whose log is of no use to the tests after it."""
    for log in _logs:
        log.ended |= log.process is process


def begin_test() -> None:
    """What was written so far is not of the test that begins."""
    _logs[:] = [log for log in _logs if not log.ended and log.file.exists()]
    for log in _logs:
        log.before = log.file.stat().st_size


def sections() -> Iterable[tuple[str, str]]:
    """Of each engine that this test had a title, and what it wrote: errors of this test first."""
    for log in _logs:
        if log.file.exists():
            code = log.process.exitcode
            state = "which runs" if code is None else f"which ended with {code}"
            yield f"{TITLE}, {state}: {log.file}", excerpt(log.file.read_bytes(), log.before)


def excerpt(written: bytes, before: int = 0) -> str:
    """The first lines with errors after so many bytes, and the last lines of all."""
    whole, own = _lines(written), _lines(written[before:])
    # The first is the cause: what comes after it is what each request was told.
    errors = [line for line in own if _ERROR.search(line)][:LINES]
    return "\n".join([*_under("errors", errors), *_under("the end", whole[-LINES:])])


def _lines(written: bytes) -> list[str]:
    text = _COLOUR.sub("", written.decode(errors="replace"))
    return [line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in text.splitlines()]


def _under(title: str, lines: Sequence[str]) -> list[str]:
    return [f"--- {title}:", *lines] if lines else []


def summary(reports: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> list[str]:
    """The beginning of every engine's section without the frames of tracebacks, once each.

    It stands at the end of a run's output, which is shown where the whole is not.

    Args:
        reports: of the tests that failed the name and the sections.
    """
    said: dict[str, list[str]] = {}
    for test, found in reports:
        for title, text in found:
            file = title.rpartition(": ")[2]
            if title.startswith(TITLE) and file not in said:
                lines = [line for line in text.splitlines() if not _FRAME.search(line)]
                said[file] = [f"{test}: {title}", *lines[:SUMMARY_LINES]]
    return [line for lines in said.values() for line in lines]
