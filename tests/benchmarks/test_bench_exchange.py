"""The benchmark of exchanged bases runs, and compares what it measured with a path made anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from places import BENCHMARKS


def test_the_program_measures_both_halves_beside_a_path_made_anew(tmp_path: Path) -> None:
    written = tmp_path / "exchange.json"
    run = [sys.executable, BENCHMARKS / "run.py", "exchange", "--quick", "--json", written]
    shown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    report = json.loads(written.read_text())
    assert len(report["turns"]) == 2
    assert all(turn[way] > 0 for turn in report["turns"] for way in ("read", "exchange", "anew"))
    # 16 rows of each side of seven layers, in two bytes, of 32 blocks.
    columns = 2 * (4096 + 4096 + 4096 + 1024 + 3 * (4096 + 14336) // 2)
    assert report["basis_nbytes"] == 32 * 16 * 2 * columns
    assert "exchange" in shown
