"""The run of everything that only a GPU can say: its stages, tried out on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import BENCHMARKS, ROOT

SCRIPT = BENCHMARKS / "run_gpu.sh"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter"
)


def call(*arguments: str | Path, code: int = 0, cwd: Path = ROOT, **environment: str) -> str:
    """What the script prints, when it ends with ``code``."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code < 2 else done.stderr


def results(folder: Path) -> dict[str, str]:
    """Stage -> what became of it."""
    lines = (folder / "stages.txt").read_text().splitlines()
    assert lines[0].startswith("# ")
    found = [re.fullmatch(r"(\w+) +(\d+) s  (.+)", line) for line in lines[1:]]
    return {match[1]: match[3] for match in found if match is not None}


def test_the_presets_hold_every_stage_and_fit_their_time() -> None:
    *stages, first, second, third = call("--list").splitlines()
    limits = {line.split()[0]: int(line.split()[1]) for line in stages}
    presets = [line.partition(": ")[2].split() for line in (first, second, third)]
    assert sorted(name for preset in presets for name in preset) == sorted(limits)
    assert sum(limits[name] for name in presets[0]) < 8 * 60
    assert sum(limits[name] for name in presets[1]) < 4 * 60
    assert sum(limits[name] for name in presets[2]) < 6 * 60
    files = {
        name: re.findall(r"\((\S+)\)$", line) for name, line in zip(limits, stages, strict=True)
    }
    for preset in presets:
        # With the lines and the logs: no more than one transfer brings home, under plain names.
        of_preset = {file for name in preset for file in files[name]}
        assert len({*of_preset, "stages.txt", "logs.txt"}) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for found in files.values() for name in found)


@needs_triton
def test_a_stage_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    # Nothing there has vLLM's kernels.
    stages = ("kernels", "memory", "profile")
    text = call(tmp_path, "--tiny", "--stages", *stages, code=1, PUNICA=str(tmp_path))
    assert results(tmp_path) == {"kernels": "failed (1)", "memory": "ok", "profile": "ok"}
    assert "no lora_shrink_op.py" in text
    assert "no lora_shrink_op.py" in (tmp_path / "logs.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert [row["right"] for row in rows if "right" in row] == [True] * 4
    timed = {row["check"] for row in rows if row.get("us", 0) > 0}
    assert timed == {"beside", "idle", "profile"}


@needs_triton
def test_time_that_is_up_ends_a_stage_and_the_run(tmp_path: Path) -> None:
    started = time.monotonic()
    call("here", "--tiny", "--box", "3", "--stages", "smoke", "profile", code=1, cwd=tmp_path)
    assert time.monotonic() - started < 15
    assert results(tmp_path / "here") == {"smoke": "time out", "profile": "no time left"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages", "smoke", "nonsense"], "no stage 'nonsense'"),
        (["--stages"], "--stages takes names"),
        (["--box", "0"], "--box takes whole seconds"),
        (["--fast"], "no option '--fast'"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str, tmp_path: Path) -> None:
    assert words in call(tmp_path / "out", *arguments, code=2)
    assert not (tmp_path / "out").exists()


def test_an_interpreter_without_torch_is_refused_before_anything_runs(tmp_path: Path) -> None:
    base = Path(sys.base_prefix) / "bin" / "python3"
    if subprocess.run([base, "-P", "-c", "import torch"], capture_output=True).returncode == 0:
        pytest.skip("torch is installed for all")
    words = "PYTHON names another interpreter"
    assert words in call(tmp_path / "out", code=2, PYTHON=str(base))


@pytest.mark.parametrize("path", [str(ROOT), f"/nowhere:{ROOT}", "/nowhere:"])
def test_the_root_on_the_path_would_shadow_what_vllm_imports(path: str, tmp_path: Path) -> None:
    words = "leave this repository's root out of PYTHONPATH"
    assert words in call(tmp_path / "out", code=2, PYTHONPATH=path)
    assert not (tmp_path / "out").exists()
