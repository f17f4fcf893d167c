"""The benchmark of compressing at field scale runs, and extrapolates from what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from places import BENCHMARKS

sys.path.append(str(BENCHMARKS))

import field
import run


def test_a_quick_run_has_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cells", "8b-private,analyze", "--json", str(tmp_path / "x.json")]
    assert run.main(["compress", "--quick", *options]) == 0
    report = json.loads((tmp_path / "x.json").read_text())
    assert set(report["cells"]) == {"8b-private", "analyze"}
    (found,) = report["cells"]["8b-private"]
    assert found["representation"] == "private"
    assert 0 < found["mean_error"] < 1
    assert 0 < report["floor_ms"] < report["summary"]["cells"]["8b-private"]["ms"]
    assert "extrapolated" in capsys.readouterr().out


def test_layers_are_compressed_as_one_model(tmp_path: Path) -> None:
    options = ["--cells", "8b-auto", "--layers", "3", "--json", str(tmp_path / "x.json")]
    assert run.main(["compress", "--quick", *options]) == 0
    report = json.loads((tmp_path / "x.json").read_text())
    one = report["summary"]["cells"]["8b-auto"]
    # Three adapters of three layers with one module.
    assert one["ms"] == pytest.approx(1e3 * one["cpu_s"] / 9)


def test_what_a_whole_model_takes_is_extrapolated() -> None:
    cells = {
        name: [{"cpu_s": s, "clock_s": 2 * s, "peak_nbytes": 1_000_000_000} for s in seconds]
        for name, seconds in {"8b-private": (3.0, 1.4), "8b-auto": (4.9,)}.items()
    }
    pairs = {"8b-private": 70, "8b-auto": 70}
    summary = field.summarise(cells, pairs, 7)
    assert summary["cells"]["8b-private"]["ms"] == pytest.approx(20.0)
    assert summary["cells"]["8b-private"]["clock_s"] == 2.8
    # 224 modules of 100 adapters at 20 ms, and half a second for each module's bases.
    whole = summary["extrapolated_cpu_s"]
    assert whole["private"] == pytest.approx(448.0)
    assert whole["auto where sharing does not pay"] == pytest.approx(448.0 + 21 * 0.5)
    assert whole["auto where it does"] == pytest.approx(448.0 + 224 * 0.5)
