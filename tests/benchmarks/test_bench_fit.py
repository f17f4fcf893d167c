"""The fit benchmark: its turns, figures and measure of energy, and the program on tiny sizes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import BENCHMARKS

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

from fitbench import program
from fitbench.collection import MODULE, Size, Spectrum, write_collection
from fitbench.report import format_cell, summarise
from fitbench.runs import Policy, Run, start_worker, take_turns
from fitbench.worker import Fitted, exact, kept_energy

from vllm_vlora.adapters.peft_folder import open_adapter

SIZE = Size(d_in=24, d_out=20, adapters=6, rank=3)


def a_run(seconds: float, stopped: bool = False, energy: float | None = 0.5) -> Run:
    return Run(seconds, seconds * 0.9, int(seconds * 1e6), stopped, None if stopped else energy, 10)


def test_ours_runs_before_each_turn_and_slow_rivals_have_one() -> None:
    log: list[tuple[str, float | None]] = []
    took = {"ours": 2.0, "quick": 3.0, "slow": 50.0, "exact": 40.0}

    def start(name: str, limit: float | None) -> Run:
        log.append((name, limit))
        return a_run(took[name])

    runs = take_turns(["quick", "slow", "exact"], Policy(2, once_above_s=20, stop_at=60), start)
    assert log == [
        *[("ours", None), ("quick", 120.0), ("ours", None), ("slow", 120.0), ("ours", None)],
        *[("exact", None), ("ours", None), ("quick", 120.0)],
    ]
    assert {name: len(past) for name, past in runs.items()} == {
        **{"ours": 4, "quick": 2},
        **{"slow": 1, "exact": 1},
    }


def test_ratios_refer_to_our_median_and_stopped_ones_are_marked() -> None:
    runs = {
        "ours": [a_run(2.0), a_run(1.0), a_run(4.0)],
        "lorashare": [a_run(100.0, stopped=True)],
        "exact": [a_run(30.0, energy=0.625)],
    }
    cell = summarise(SIZE, 4, runs)
    ours, rival = cell["rows"]["ours"], cell["rows"]["lorashare"]
    assert (ours["seconds"], ours["peak_nbytes"]) == (2.0, 4_000_000)
    assert ours["peak_above_one_adapter_nbytes"] == 4_000_000 - 4 * 3 * (24 + 20)
    assert ours["energy_of_exact"] == pytest.approx(0.8)
    assert (rival["times_ours"], rival["stopped"], rival["energy"]) == (50.0, True, None)
    table = format_cell(cell, 1.0)
    assert ">100.0" in table
    assert ">50.0" in table


def test_collections_are_adapters_that_share_what_they_say(tmp_path: Path) -> None:
    size = Size(d_in=400, d_out=300, adapters=30, rank=3)
    paths = write_collection(tmp_path / "a", size, Spectrum(shared=5, own=0.5))
    again = write_collection(tmp_path / "b", size, Spectrum(shared=5, own=0.5))
    rows = []
    for path, same in zip(paths, again, strict=True):
        (a, b), (a_again, _) = (open_adapter(p).factors(MODULE) for p in (path, same))
        assert torch.equal(a, a_again)
        assert (a.shape, b.shape) == ((3, 400), (300, 3))
        rows.append(a)
    stacked = torch.cat(rows).double()
    energy = torch.linalg.svdvals(stacked).square()
    # Five directions hold 1 / (1 + own^2) of a side, and a little of the private parts.
    assert float(energy[:5].sum() / energy.sum()) == pytest.approx(0.8, abs=0.04)
    assert energy[0] / energy[4] > 2


def test_kept_energy_is_that_of_dense_updates(tmp_path: Path) -> None:
    paths = [str(path) for path in write_collection(tmp_path / "x", SIZE, Spectrum(shared=8))]
    noise = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)) / 50
    kept = kept_energy(Fitted(lambda number, a, b: (a + noise, b), 0, {}), paths)
    expected = []
    for path in paths:
        a, b = (x.double() for x in open_adapter(path).factors(MODULE))
        expected.append(1 - ((b @ noise.double()).norm() / (b @ a).norm()) ** 2)
    assert kept == pytest.approx(float(torch.stack(expected).mean()), abs=1e-6)


@pytest.mark.parametrize("k", [4, 12])
def test_exact_is_the_dense_solution(tmp_path: Path, k: int) -> None:
    # 18 rows in all: fewer than 24 and 20 columns, so one adapter more reaches the other route.
    for count in (6, 12):
        size = Size(24, 20, count, 3)
        paths = [str(p) for p in write_collection(tmp_path / f"{count}", size, Spectrum(shared=8))]
        units = []
        for path in paths:
            a, b = (x.double() for x in open_adapter(path).factors(MODULE))
            units.append(b @ a / (b @ a).norm())
        v = torch.linalg.eigh(torch.stack([w.T @ w for w in units]).sum(0))[1][:, -k:]
        u = torch.linalg.eigh(torch.stack([w @ w.T for w in units]).sum(0))[1][:, -k:]
        best = torch.stack([(u.T @ w @ v).square().sum() for w in units]).mean()
        assert kept_energy(exact(paths, k), paths) == pytest.approx(float(best), abs=1e-5)


def test_a_worker_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    # Large enough that the fit takes many times the interval at which it is looked at.
    paths = write_collection(tmp_path / "x", Size(1400, 1600, 300, 8), Spectrum())
    run = start_worker(sys.executable, "ours", paths, 64, 1)(0.0)
    assert run.stopped
    assert run.energy is None
    assert 0 < run.seconds < 20


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ours failed"):
        start_worker(sys.executable, "ours", [tmp_path / "nothing"], 4, 1)(None)


def test_the_program_on_a_tiny_size(tmp_path: Path) -> None:
    options = ["--quick", "--contestants", "ours,exact", "--json", str(tmp_path / "out.json")]
    plotted = importlib.util.find_spec("matplotlib") is not None
    if plotted:
        options += ["--plot", str(tmp_path / "out.png")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "fit", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "of exact" in done.stdout
    (cell,) = json.loads((tmp_path / "out.json").read_text())["cells"]
    ours = cell["rows"]["ours"]
    assert 0.98 < ours["energy_of_exact"] < 1.0001
    assert ours["stored_nbytes"] == 4 * (16 * (96 + 160) + 40 * 2 * 16 * 4)
    assert (tmp_path / "out.png").exists() == plotted


@pytest.mark.parametrize("text", ["4096", "4096x", "0x4", "axb"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="D_INxD_OUT"):
        program.parse_sizes(text)


def test_contestants_must_be_known_and_have_ours() -> None:
    assert program.parse_contestants("ours,exact") == ["ours", "exact"]
    for text in ("exact", "ours,other"):
        with pytest.raises(argparse.ArgumentTypeError):
            program.parse_contestants(text)
