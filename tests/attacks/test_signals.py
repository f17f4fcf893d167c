"""A run is asked to end at any moment: it ends, with everything that it started, and nothing is lost.

The command line itself, with processes of its own, gets the signal from outside as from a shell or an
orchestrator: to all of its processes (Ctrl-C at a terminal, or its end) or to the first (``kill``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from attacking import scaled
from edited_world import NEW, OLD, World

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate

SECONDS = 60
# What a signal ends before Python is far enough to handle it has the signal as its code, negative. The
# handlers raise KeyboardInterrupt, and where that comes through a text that is executed, as dataclasses
# are made, CPython ends itself by SIGINT at last, whatever became of the exception.
CODES = {
    signal.SIGTERM: (143, -signal.SIGTERM, -signal.SIGINT),
    signal.SIGINT: (130, -signal.SIGINT),
    signal.SIGHUP: (129, -signal.SIGHUP, -signal.SIGINT),
}


def unignored() -> None:
    """A shell may have started the tests with signals ignored, which a child would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(world: World) -> subprocess.Popen[str]:
    """Compress two adapters into the place of four, by two processes."""
    command = [sys.executable, "-P", "-m", "vllm_vlora.tools", "compress"]
    command += [str(world.adapter(task)) for task in NEW]
    command += ["-o", str(world.checkpoint), "--force", "--executor", "processes", "--jobs", "2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=unignored,
    )


def attack(world: World, number: signal.Signals, count: int) -> Counter[int]:
    """Signals at random moments of a run; how many runs ended with which code."""
    began = time.monotonic()
    process = start(world)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    took = time.monotonic() - began
    codes: Counter[int] = Counter()
    random = Random(f"{number.name} {count}")
    for turn in range(count):
        world.refresh()
        process = start(world)
        # The later part of a run is where something is written.
        time.sleep(took * max(random.random(), random.random()))
        if number != signal.SIGTERM:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
        codes[process.returncode] += 1
        where = f"{number.name}, turn {turn}, code {process.returncode}: {said}"
        assert process.returncode in (0, *CODES[number]), where
        assert "Traceback" not in said, where
        check(world, process, where)
    return codes


def check(world: World, process: subprocess.Popen[str], where: str) -> None:
    tasks = tuple(Checkpoint.open(world.checkpoint).tasks)
    # A signal may also come when all is done and Python is about to end.
    assert tasks in ((tuple(NEW),) if process.returncode == 0 else (tuple(OLD), tuple(NEW))), where
    assert validate(world.checkpoint) == [], where
    left = set(os.listdir(world.place))
    # What no handler runs for is for the next run to remove.
    hidden = (
        {name for name in left if name.startswith(".ckpt.")} if process.returncode < 0 else set()
    )
    assert left - hidden == {"ckpt"}, where
    end = time.monotonic() + 10
    while alive(process.pid):
        assert time.monotonic() < end, f"{where}: a process goes on"
        time.sleep(0.05)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_at_some_moment(world: World, number: signal.Signals) -> None:
    attack(world, number, 2)


@pytest.mark.attacks_long
@pytest.mark.parametrize("number", CODES)
def test_signals_at_many_moments(
    world: World, number: signal.Signals, tally: Callable[[str, int], None]
) -> None:
    count = scaled(32)
    codes = attack(world, number, count)
    tally(f"a run of three processes by {number.name} ({dict(codes)})", count)
