"""What the benchmark of watching and counting makes of what its servers did."""

from __future__ import annotations

import argparse
import sys

import pytest
from places import BENCHMARKS

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

import watching
from watching import NEITHER, WATCHING, Turn


def test_requests_a_second_and_cpu_of_a_request_and_ratios_of_turns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    turns = {
        WATCHING: [Turn(2.0, 3.0, []), Turn(4.0, 4.0, []), Turn(4.0, 4.0, [])],
        NEITHER: [Turn(1.0, 2.0, []), Turn(4.0, 2.0, []), Turn(2.0, 4.0, [])],
    }
    found = watching.figures(
        argparse.Namespace(requests=100, idle=4), turns, {WATCHING: 0.02, NEITHER: 0.012}
    )
    assert found["requests_per_second"][WATCHING]["p50"] == pytest.approx(25)
    assert found["cpu_milliseconds"][NEITHER]["rounds"] == pytest.approx([20, 20, 40])
    assert found["throughput_ratio"]["rounds"] == pytest.approx([0.5, 1.0, 0.5])
    assert found["cpu_ratio"]["rounds"] == pytest.approx([1.5, 2.0, 1.0])
    assert found["idle_cpu_milliseconds"] == pytest.approx({WATCHING: 5, NEITHER: 3})
    watching.print_figures(found)
    printed = capsys.readouterr().out
    for word in (WATCHING, NEITHER, "0.500 (p20", "1.500 (p20"):
        assert word in printed
