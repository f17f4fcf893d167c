"""The floors' formulae against counts made by hand, and the program around them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import BENCHMARKS

from vllm_vlora.checkpoint.card import VLLM_LORA_RANKS
from vllm_vlora.quantize import FORMATS, row_nbytes
from vllm_vlora.triton_kernels.direct import RECORD_FIELDS


def _floors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("floors", BENCHMARKS / "floors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["floors"] = module
    spec.loader.exec_module(module)
    return module


floors = _floors()
LAYER = floors.Layer("qk", 8, (4, 6))
WORK = floors.Work(tokens=3, tasks=2, rank=2, slot_rank=8, k=4, format="nf4")
# x (3 x 8) read, y (3 x 10) read and written, two bytes each.
ACTIVATIONS = 2 * 3 * (8 + 2 * 10)
# A of either slice and both B, in elements a unit of rank; NF4 rows of up to 64 columns are 36 bytes.
SPREAD, PACKED = 8 + 8 + 4 + 6, 4 * 36


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("base", (2 * (8 * 10 + 3 * 8 + 3 * 10), 2 * 3 * 80, 0, 1)),
        (
            "punica",
            (ACTIVATIONS + 2 * (2 * 8 * SPREAD) + 2 * 4 * 3 * 8 * 2, 2 * 3 * 8 * SPREAD, 0, 2),
        ),
        (
            "direct-joint",  # two tasks' cores of 4 x 4 for each slice; z and w of 3 x 4
            (
                ACTIVATIONS + 2 * (4 * SPREAD + 2 * 2 * 16) + 2 * 2 * (2 * 3 * 2 * 4),
                2 * 3 * (4 * SPREAD + 2 * 16),
                0,
                3,
            ),
        ),
        (
            "direct-private",
            (ACTIVATIONS + 2 * 2 * PACKED + 2 * 2 * (3 * 2 * 2), 2 * 3 * 2 * SPREAD, 0, 2),
        ),
        ("materialize-private", (2 * PACKED + 2 * 8 * SPREAD, 0, 0, 0)),
        (
            "materialize-joint",
            (4 * PACKED + 4 * 2 * (2 * 2 * 4) + 2 * 8 * SPREAD, 2 * 2 * 4 * SPREAD, 0, 0),
        ),
        ("activate-stock", (2 * 8 * SPREAD + 2 * 2 * SPREAD, 0, 2 * 2 * SPREAD, 8)),
        ("activate-direct", (2 * 2 * 96, 0, 0, 0)),
    ],
)
def test_costs_by_hand(op: str, expected: tuple[int, int, int, int]) -> None:
    cost = floors.PATHS[op](LAYER, WORK)
    assert (cost.bytes, cost.flops, cost.host_bytes, cost.launches) == expected


def test_only_tasks_with_a_token_are_read() -> None:
    many = floors.Work(tokens=3, tasks=100)
    assert floors.punica(LAYER, many) == floors.punica(LAYER, floors.Work(tokens=3, tasks=3))


def test_a_large_core_is_held_as_factors() -> None:
    assert [floors.core_elements(rank, 64) for rank in (8, 32, 64)] == [1024, 4096, 4096]


def test_a_model_is_the_sum_of_its_layers() -> None:
    model = floors.llama("m", 3, 16, 40, 8)
    work = floors.Work(tokens=2)
    for op, path in floors.PATHS.items():
        each = [path(layer, work) for layer in model.layers]
        total = floors.model_cost(op, model, work)
        assert total.bytes == 3 * sum(cost.bytes for cost in each)
        launches = 1 if op in floors.ONE_LAUNCH else 3 * sum(cost.launches for cost in each)
        assert total.launches == launches
    # Llama-2-7B has 6.476e9 weights in its linear layers.
    work = floors.Work(tokens=1, itemsize=2)
    assert floors.model_cost("base", floors.MODELS["llama-7b"], work).flops == 2 * 6_476_005_376
    assert model.layer("v_proj") == floors.Layer("v_proj", 16, (8,))
    with pytest.raises(KeyError):
        model.layer("lm_head")


def test_time_is_that_of_the_busiest_resource() -> None:
    device = floors.Device("d", bandwidth=100.0, flops=1000.0, pcie=10.0)
    for cost, bound, seconds in (
        (floors.Cost(500, 1000, 0), "memory", 5.0),
        (floors.Cost(500, 9000, 0), "compute", 9.0),
        (floors.Cost(500, 9000, 120), "pcie", 12.0),
    ):
        assert floors.bound(cost, device) == bound
        assert floors.seconds(cost, device) == pytest.approx(seconds)
    cost = floors.Cost(500, 0, 0, launches=4)
    assert floors.seconds(cost, device, launch_seconds=0.25) == pytest.approx(6.0)


def test_facts_that_have_another_home_agree_with_it() -> None:
    for format in FORMATS:
        for cols in (1, 63, 64, 65, 16384, 16385, 20000):
            assert floors.row_bytes(format, cols) == row_nbytes(format, cols), (format, cols)
    assert floors.FORMATS == FORMATS
    assert floors.SLOT_RANKS == VLLM_LORA_RANKS
    assert floors.RECORD_BYTES == 8 * RECORD_FIELDS
    with pytest.raises(ValueError, match="int3"):
        floors.row_bytes("int3", 8)


# --- the program ----------------------------------------------------------------------------------


def call(*arguments: str | Path, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "roofline", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def test_predictions_as_json(tmp_path: Path) -> None:
    options = ("--tokens", "8", "--tasks", "4", "--format", "nf4", "--bandwidth", "2000")
    text = call(*options, "--json", tmp_path / "out.json", "--launch-us", "2", "--rank", "9")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["device"]["bandwidth"] == 2e12
    assert {row["op"] for row in report["rows"]} == set(floors.PATHS)
    for row in report["rows"]:
        assert row["op"] in text
        work = floors.Work(tokens=8, tasks=4, rank=9, slot_rank=16, format="nf4")
        cost = floors.model_cost(row["op"], floors.MODELS["llama-7b"], work)
        device = floors.Device("d", 2e12, 989e12, 64e9)
        assert row["us"] == pytest.approx(1e6 * floors.seconds(cost, device, 2e-6))
        assert (row["bytes"], row["flops"], row["slot_rank"]) == (cost.bytes, cost.flops, 16)


def test_measurements_beside_their_floors(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"rank": 16, "k": 32, "tokens": 64, "tasks": 8, "us_p50": 500.0}
    rows = [
        {"op": "punica", "model": "llama-8b", "module": "qkv_proj", **shared},
        {"op": "direct-joint", "model": "llama-8b", "module": None, **shared},
        {"op": "direct-private", "shape": [512, 256], "format": "nf4", **shared},
        {"op": "sorcery", **shared},
        {"op": "punica", "model": "llama-8b", "module": "router", **shared},
    ]
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"rows": rows}))
    text = call("--measured", file, "--json", tmp_path / "out.json", "--device", "l4")
    found = json.loads((tmp_path / "out.json").read_text())["rows"]
    model, l4 = floors.MODELS["llama-8b"], floors.DEVICES["l4"]
    work = floors.Work(tokens=64, tasks=8, rank=16, slot_rank=16, k=32)
    packed = floors.Work(tokens=64, tasks=8, rank=16, slot_rank=16, k=32, format="nf4")
    costs = [
        floors.punica(model.layer("qkv_proj"), work),
        floors.model_cost("direct-joint", model, work),
        floors.direct_private(floors.Layer("s", 512, (256,)), packed),
    ]
    for row, cost in zip(found, costs):
        floor = 1e6 * floors.seconds(cost, l4)
        assert row["floor_us"] == pytest.approx(floor)
        assert row["ratio_to_floor"] == pytest.approx(500.0 / floor)
    assert [row["no_floor"] for row in found] == [None] * 3 + ["unknown op", "unknown module"]
    assert found[3]["ratio_to_floor"] is None
    assert "none: unknown op" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--rank", "513"], "513"),
        (["--model", "custom"], "--hidden"),
        (["--hidden", "8"], "--model custom"),
        (["--bandwidth", "0"], "--bandwidth"),
        (["--measured", "nowhere.json"], "no such file"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str) -> None:
    assert words in call(*arguments, code=2)


def test_files_that_are_no_measurements(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    for text in ("{", "[]", "{}", '{"rows": 1}', '{"rows": [{"op": "punica"}]}'):
        file.write_text(text)
        assert str(file) in call("--measured", file, code=1)


def test_a_plot_needs_matplotlib_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    plot = ("--plot", tmp_path / "x.png")
    assert "pip install matplotlib" in call(*plot, code=1, PYTHONPATH=str(tmp_path))
    assert not (tmp_path / "x.png").exists()


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    call("--plot", tmp_path / "x.png", "--tokens", "1", "64", "--tasks", "1", "8")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
