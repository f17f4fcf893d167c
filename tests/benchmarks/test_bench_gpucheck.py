"""What the device's checks call a failure, tried in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import BENCHMARKS

# "as chosen" works or not, every other variant does not compile.
_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import gpucheck.sizes as sizes, run
graph = sizes._graph
def broken(world, chosen, *rest):
    if sys.argv[3] == "others" and chosen.name == "as chosen":
        return graph(world, chosen, *rest)
    raise RuntimeError("PTX error")
sizes._graph = broken
sys.exit(run.main(["gpucheck", "--device", "cpu", "--stages", "sizes", "--json", sys.argv[2]]))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
@pytest.mark.parametrize(("broken", "status"), [("all", 1), ("others", 0)])
def test_sizes_that_are_chosen_must_compile(broken: str, status: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROGRAM, BENCHMARKS, path, broken],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    failed = [row for row in rows if "failure" in row]
    assert {row["failure"] for row in failed} == {"RuntimeError: PTX error"}
    # Of three formats: sizes that are not in use may fail.
    assert [row["right"] for row in failed if "right" in row] == [False] * 3 * status
    assert {row["what"] for row in failed if "right" in row} <= {"as chosen"}
    assert all(isinstance(row["error"], float) for row in rows if "error" in row)
