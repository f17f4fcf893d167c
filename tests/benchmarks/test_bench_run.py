"""The runner of the benchmarks, what they share, and an activation by the device alone."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from places import BENCHMARKS

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

import floors
import harness
import run
from activation import ways

from vllm_vlora.timing import spread, take_turns

ALONE = ("activation", "--no-engine", "--device", "cpu", "--rounds", "2", "--warmup", "1")


# --- the runner -----------------------------------------------------------------------------------


def test_without_a_name_it_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert run.main(arguments) == 0
        text = capsys.readouterr().out
        for name, found in run.BENCHMARKS.items():
            assert f"  {name} " in text
            assert found.purpose in text
    assert run.main(["nonsense"]) == 2
    assert "no benchmark 'nonsense'; use activation, kernels" in capsys.readouterr().err


@pytest.mark.parametrize("name", run.BENCHMARKS)
def test_the_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python benchmarks/run.py {name}" in text
    assert "--json FILE" in text


# --- what they share ------------------------------------------------------------------------------


def test_turns_are_taken_and_the_first_rounds_left_out() -> None:
    order: list[str] = []
    numbers = count()

    def clock(name: str) -> float:
        order.append(name)
        return float(next(numbers))

    times = take_turns([lambda: clock("a"), lambda: clock("b")], rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert times == [[2.0, 4.0, 6.0], [3.0, 5.0, 7.0]]
    assert spread([1.0, 2.0, 3.0, 4.0], 1e3) == pytest.approx(
        {"p20": 1600, "p50": 2500, "p80": 3400}
    )


def test_a_table_is_as_wide_as_what_it_holds() -> None:
    assert harness.table(["", "us"], [["a long name", "1.5"], ["b", "20.25"]]) == (
        "                us\na long name    1.5\nb            20.25"
    )


def test_a_record_has_the_note_the_versions_and_the_command(tmp_path: Path) -> None:
    found = harness.record(argparse.Namespace(device_note="idle", work=tmp_path), "a CPU", "torch")
    assert found["device"] == "a CPU (idle)"
    assert set(found["versions"]) == {"python", "torch", "vllm-vlora"}
    harness.write_json(tmp_path / "new" / "out.json", found)
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["arguments"] == {"device_note": "idle", "work": str(tmp_path)}
    harness.write_json(None, found)


# --- an activation by the device alone ------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    from activation import program

    monkeypatch.setitem(program.MODELS, "tiny", floors.llama("tiny", 1, 64, 96, 32))


def test_every_way_and_mode_is_timed(tiny: None, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    options = ("--formats", "bf16", "nf4", "--k", "8", "--json", str(file))
    assert run.main([*ALONE, *options]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["op"] for row in rows} == set(floors.READY) | {"copy-pinned"}
    for row in rows:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["samples"] == 2
    found = [
        (row["op"], row["format"], row["mode"])
        for row in rows
        if row["op"].startswith("materialize")
    ]
    assert found == [
        (f"materialize-{kind}", format, mode)
        for format in ("bfloat16", "nf4")
        for kind in ("private", "joint")
        for mode in ("eager", "plan+run", "reference")
    ]


def test_the_floor_counts_the_cores_in_their_own_dtype() -> None:
    layer = floors.Layer("l", 8, (4,))
    costs = [
        floors.materialize_joint(layer, floors.Work(rank=2, k=4, core_itemsize=size)).bytes
        for size in (2, 4)
    ]
    # Two cores of 2 x 4.
    assert costs[1] - costs[0] == 2 * 2 * 2 * 4


@pytest.mark.parametrize("broken", ["plan_materialize", "materialize", "materialize_reference"])
def test_no_figures_when_a_mode_is_wrong(
    tiny: None,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def another_task(jobs: Any) -> Any:
        for job in jobs:
            job.out.fill_(1)
        return argparse.Namespace(run=lambda: another_task(jobs))

    monkeypatch.setattr(ways, broken, another_task)
    assert run.main([*ALONE, "--formats", "bf16", "--k"]) == 1
    output = capsys.readouterr()
    assert "wrong result, no figures: materialize-private bfloat16, task 0" in output.err
    assert "p50" not in output.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-engine", "--tasks", "4"], "--tasks needs --engine"),
        (["--engine", "--formats", "nf4"], "--formats needs --no-engine"),
        (["--engine", "--rounds", "14"], "at least 15"),
        (["--engine", "--k", "32", "64"], "one --k"),
        (["--engine", "--model", "nowhere"], "no config.json there"),
        (["--no-engine", "--device", "cpu", "--model", "7b"], "one of llama-7b"),
        (["--no-engine", "--device", "cpu", "--k", "0"], "'0' is not a whole number"),
        (["--no-engine", "--startup"], "--startup needs --engine"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.parse("activation", arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
