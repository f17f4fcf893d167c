"""A signal ends a program without publication, wherever it strikes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_vlora import stopping

# The signal comes while the garbage collector closes a generator, where exceptions are only printed.
SWALLOWED = """
import os, signal, sys, typer
from pathlib import Path
from vllm_vlora import stopping
from vllm_vlora.atomic import publish_folder, write_file_atomic
from vllm_vlora.planning.executors import Executor
from vllm_vlora.tools.terminal import prepare_process, reported

def generate():
    try:
        yield
    finally:
        os.kill(os.getpid(), int(sys.argv[2]))
        sum(range(100_000))

def swallow():
    generator = generate()
    next(generator)
    del generator

def publish_a_folder(target):
    with publish_folder(target, force=False, owned=lambda _: True) as folder:
        (folder / "file").write_text("text")
        swallow()

def write_a_file(target):
    swallow()
    write_file_atomic(target, b"text")

def run_jobs(target):
    for number in Executor().run(len, ["", "a", "b"]):
        target.write_text("a job ran") if number else swallow()

prepare_process()
try:
    with reported(False):
        globals()[sys.argv[1]](Path(sys.argv[3]))
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("what", ["publish_a_folder", "write_a_file", "run_jobs"])
def test_a_signal_that_was_swallowed_comes_again(
    what: str, number: int, code: int, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SWALLOWED)
    (tmp_path / "place").mkdir()
    target = tmp_path / "place" / "target"
    found = subprocess.run(
        [sys.executable, script, what, str(int(number)), target],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=dict(os.environ),
    )
    assert found.returncode == code, found.stderr
    assert "Error: interrupted" in found.stderr
    assert list((tmp_path / "place").iterdir()) == []


def test_a_block_that_is_kept_whole_is_interrupted_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "_received", [])
    done = []

    def block() -> None:
        with stopping.kept_whole():
            stopping.stop(signal.SIGTERM, None)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["whole"]
