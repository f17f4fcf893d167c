"""Runs in forked children, for attacks that need several processes or end one in the middle."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from vllm_vlora.errors import VLoRAError

DONE, REFUSED, BROKEN = 0, 2, 70


class Child:
    """A forked process that runs ``work`` and ends: 0 done, 2 one of our own errors, 70 any other."""

    def __init__(self, work: Callable[[], object], log: Path | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(work, log))

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"a child did not end in {seconds} s")


def _run(work: Callable[[], object], log: Path | None) -> int:
    # Nothing of pytest may run in the child, whatever happens.
    try:
        if log is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            # pytest has put its own in the place of these.
            sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
            logging.getLogger().handlers.clear()
        work()
    except VLoRAError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return REFUSED
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stderr.flush()
        return BROKEN
    return DONE


def at_once(works: Iterable[Callable[[], object]], log: Path | None = None) -> list[int]:
    """The exit codes of functions that run at the same time, each in a child."""
    start = time.monotonic() + 0.05

    def after_start(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            time.sleep(max(0.0, start - time.monotonic()))
            return work()

        return run

    return [child.wait() for child in [Child(after_start(work), log) for work in works]]
