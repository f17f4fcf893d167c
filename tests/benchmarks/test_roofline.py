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

from vllm_vlora.checkpoint.serving import VLLM_LORA_RANKS
from vllm_vlora.narrow_rows import NARROW_FORMAT, narrow_nbytes
from vllm_vlora.quantize import SHARED_FORMATS, row_nbytes, trellis_row_nbytes
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
            (ACTIVATIONS + 2 * (2 * 8 * SPREAD) + 3 * 4 * 3 * 8 * 2, 2 * 3 * 8 * SPREAD, 0, 3),
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


def test_a_rank_has_columns_of_y_or_of_x() -> None:
    part = floors.llama("m", 3, 16, 40, 8).on_rank(4)
    assert [(layer.name, layer.d_in, layer.widths) for layer in part.layers] == [
        ("qkv_proj", 16, (4, 2, 2)),
        ("o_proj", 4, (16,)),
        ("gate_up_proj", 16, (10, 10)),
        ("down_proj", 10, (16,)),
    ]
    with pytest.raises(ValueError, match="qkv_proj is not 3 equal parts"):
        floors.llama("m", 3, 18, 36, 8).on_rank(3)


WORLDS = """
import sys, numpy, torch
sys.path.append(sys.argv[1])
import floors
from gpucheck.world import make_world
from vllm_vlora.triton_kernels import direct_kernel, launch
called = []
run = launch.Launch.__call__
launch.Launch.__call__ = lambda *given, **named: called.append(1) or run(*given, **named)
shape = floors.Layer("qkv_proj", 96, (64, 32, 32))
for kind in ({"private": ()}, {"joint": False, "private": ("nf4",)}):
    world = make_world(shape, torch.float16, torch.device("cpu"), slots=2, tokens=3, k=16, **kind)
    world.routing.update(numpy.array([0, 1, 0], dtype=numpy.int32))
    x, y = world.batch(3)
    rest = direct_kernel.begin_direct(x, world.layer, world.table, world.routing, ahead=True)
    early = len(called)
    rest(y)
    print(early, len(called))
    called.clear()
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the interpreter")
def test_the_launches_are_those_of_the_kernels() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", WORLDS, str(BENCHMARKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    costs = [path(LAYER, WORK) for path in (floors.direct_joint, floors.direct_private)]
    wanted = [[cost.early_launches, cost.launches] for cost in costs]
    assert [[int(n) for n in line.split()] for line in done.stdout.splitlines()] == wanted


def test_time_is_that_of_the_busiest_resource() -> None:
    device = floors.Device("d", bandwidth=100.0, flops=1000.0, pcie=10.0)
    for cost, bound, seconds in (
        (floors.Cost(500, 1000, 0), "memory", 5.0),
        (floors.Cost(500, 9000, 0), "compute", 9.0),
        (floors.Cost(500, 9000, 120), "pcie", 12.0),
    ):
        assert floors.bound(cost, device) == bound
        assert floors.seconds(cost, device) == pytest.approx(seconds)
    cost = floors.Cost(500, 0, 0, launches=4, loads=10, early_launches=1, early_loads=6)
    assert floors.seconds(cost, device, launch=0.25) == pytest.approx(6.0)
    assert floors.seconds(cost, device, 0.25, 0.125) == pytest.approx(7.25)
    assert floors.seconds(cost, device, 0.25, 0.125, beside=True) == pytest.approx(6.25)


def test_facts_that_have_another_home_agree_with_it() -> None:
    for format in SHARED_FORMATS:
        for cols in (1, 63, 64, 65, 16384, 16385, 20000):
            assert floors.row_bytes(format, cols) == row_nbytes(format, cols), (format, cols)
    for cols in (1, 64, 65, 16385):
        assert 4 * floors.row_bytes(NARROW_FORMAT, cols) == narrow_nbytes((1, 1, 2), cols)
    for cols in (1, 64, 65, 4096):
        exact = sum(trellis_row_nbytes(cols, bits) for bits in (4, 3, 2, 2)) / 4
        assert 0 <= exact - floors.row_bytes("trellis", cols) < 1
    assert (*SHARED_FORMATS, NARROW_FORMAT, "trellis") == floors.FORMATS
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
    text = call(
        *options,
        "--json",
        tmp_path / "out.json",
        "--launch-us",
        "2",
        "--load-us",
        "1",
        "--rank",
        "9",
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["device"]["bandwidth"] == 2e12
    assert {row["op"] for row in report["rows"]} == set(floors.PATHS)
    for row in report["rows"]:
        assert row["op"] in text
        work = floors.Work(tokens=8, tasks=4, rank=9, slot_rank=16, format="nf4")
        cost = floors.model_cost(row["op"], floors.MODELS["llama-7b"], work)
        device = floors.Device("d", 2e12, 989e12, 64e9)
        alone, beside = (
            1e6 * floors.seconds(cost, device, 2e-6, 1e-6, beside=early) for early in (False, True)
        )
        assert row["us"] == pytest.approx(alone)
        if row["op"] in floors.FORWARD:
            assert row["us_layer"] == pytest.approx(alone / 32)
            assert row["us_layer_beside"] == pytest.approx(beside / 32)
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


def test_predictions_for_a_rank(tmp_path: Path) -> None:
    options = ("--model", "llama-70b", "--tp", "4", "--tokens", "1", "--tasks", "1")
    assert "llama-70b, one of 4 ranks" in call(*options, "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    whole = floors.model_cost("base", floors.MODELS["llama-70b"], floors.Work())
    assert rows[0]["op"] == "base"
    assert 4 * rows[0]["flops"] == whole.flops
    joint = next(row for row in rows if row["op"] == "direct-joint")
    assert (joint["launches"], joint["early_launches"]) == (80 * 4 * 3, 80 * 4 * 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", "3"], "qkv_proj is not 3 equal parts"),
        (["--load-us", "-1"], "must not be negative"),
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
