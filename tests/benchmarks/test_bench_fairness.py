"""What the benchmark of fair sharing makes of what its engines did."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pytest
from places import BENCHMARKS

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

import fairness
from serving.figures import Trace


def _trace(seconds: float, first: list[float]) -> Trace:
    return Trace(
        started=10.0,
        ended=10.0 + seconds,
        submitted=[10.0] * len(first),
        arrivals=[[10.0 + at, 10.0 + at + 0.5] for at in first],
        tokens=[[1, 2]] * len(first),
    )


def _args(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"burst": 2, "output_len": 2, **given})


def test_the_few_are_those_behind_the_burst() -> None:
    traces = {
        "first come": [_trace(2.0, [0.1, 0.2, 1.0, 1.4])],
        "fair": [_trace(2.5, [0.1, 1.5, 0.2, 0.3])],
    }
    found = fairness.figures(_args(), "burst", traces)
    assert found["few_first_token_seconds"] == pytest.approx({"first come": 1.4, "fair": 0.3})
    assert found["burst_last_token_seconds"] == pytest.approx({"first come": 0.7, "fair": 2.0})
    assert found["tokens_per_second"] == {"first come": 4.0, "fair": 3.2}
    assert found["throughput_ratio"]["p50"] == pytest.approx(0.8)
    assert set(fairness.figures(_args(), "even", traces)) == {
        "tokens_per_second",
        "throughput_ratio",
    }


def test_the_table_names_both_engines(capsys: pytest.CaptureFixture[str]) -> None:
    traces = {name: [_trace(2.0, [0.1, 0.2, 1.0])] for name in fairness.ENGINES}
    fairness.print_figures({"burst": fairness.figures(_args(), "burst", traces)})
    printed = capsys.readouterr().out
    for word in (*fairness.ENGINES, "tokens/s", "few first token seconds", "1.000 (p20"):
        assert word in printed
