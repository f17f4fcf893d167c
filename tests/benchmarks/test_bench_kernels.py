"""The kernel benchmark: its checks of results, its figures, and the program on tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import BENCHMARKS

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

import floors
import run as runner
from activation import ways
from kernelbench import forward, program, report
from kernelbench.batches import Batch, Cell, make_batch
from kernelbench.cells import Settings, cells, make_operations
from kernelbench.forward import Operation, count_copies, weight_nbytes
from kernelbench.plot import draw, panels
from kernelbench.punica import load_from_folder
from kernelbench.verify import WrongResultError, check_operation, check_replay

from vllm_vlora.triton_kernels.direct import DirectLayer, add_direct
from vllm_vlora.triton_kernels.materialize import plan_materialize

CPU = torch.device("cpu")
LAYER = floors.Layer("qkv_proj", 64, (32, 16))
CELL = Cell("tiny", LAYER, "decode", 6, 3)
WORK = floors.Work(tokens=6, tasks=3, rank=4, slot_rank=8, k=16, format="nf4")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter"
)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs the files of an installed vLLM"
)


def run(options: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *options],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TINY = ("--device", "cpu", "--tiny")


# --- the program ----------------------------------------------------------------------------------


@needs_triton
@needs_vllm
def test_all_of_it_on_tiny_shapes(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    # Batch-invariant punica cuts d_in into 8 parts in place of 64, each a program to interpret.
    options = [*TINY, "--modules", "gate_up_proj", "--json", str(file)]
    text = run(["run.py", "kernels", *options], VLLM_BATCH_INVARIANT="1")
    data = json.loads(file.read_text())
    rows = data["rows"]
    assert {row["op"] for row in rows} == set(floors.PATHS) | {"copy-pinned"}
    assert {row["format"] for row in rows} == {None, "float16", "nf4", "nf4-narrow", "trellis"}
    for row in rows:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["ratio_to_floor"] == pytest.approx(row["us_p50"] / row["floor_us"])
        if row["op"] in floors.FORWARD:
            assert 0 < row["error"] < 2e-3
            assert (row["tokens"], row["tasks"], row["module"]) == (2, 2, "gate_up_proj")
        assert report.label(row) in text
    assert all(rate > 0 for rate in data["rates"].values())
    assert "the times mean nothing" in text
    assert data["times_mean_something"] is False
    assert data["aims"] == []
    assert "aim" not in text
    assert data["versions"]["punica"].startswith("files of vllm")


Main = Callable[..., int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """The program in this process, with the direct path's torch in place of Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # The program sets it; this puts it back.
    monkeypatch.setattr(program, "load", lambda folder, device: None)
    monkeypatch.setattr(forward, "add_direct_triton", add_direct)
    return lambda *options: runner.main(["kernels", *TINY, *map(str, options)])


def swap_tokens(y: torch.Tensor, x: torch.Tensor, *rest: Any) -> None:
    add_direct(y, x.flip(0), *rest)


def spoil_a_copy(y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, *rest: Any) -> None:
    if layer.private and layer.index:
        y[0, -1] += 1
    add_direct(y, x, layer, *rest)


class StuckPlans:
    """Plans that all do what the first one does."""

    def __init__(self) -> None:
        self.first: Any = None

    def __call__(self, jobs: Any) -> Any:
        self.first = self.first or plan_materialize(jobs)
        return self.first


# (what is broken, by what, what the program must say)
SABOTAGE: list[tuple[Any, str, Any, str]] = [
    (forward, "add_direct_triton", lambda *all: None, "k=16 (copy 0): 2 of 2 tokens are wrong"),
    (forward, "add_direct_triton", swap_tokens, "direct-joint k=16 (copy 0)"),
    (forward, "add_direct_triton", spoil_a_copy, "direct-private float16 (copy 1): 1 of 2 tokens"),
    (ways, "plan_materialize", StuckPlans(), "materialize-private float16, task 1"),
    (ways.SlotTable, "set", lambda self, slot, task: None, "activate-direct"),
]


@pytest.mark.parametrize(("where", "name", "broken", "message"), SABOTAGE)
def test_what_is_wrong_has_no_figures(
    where: Any,
    name: str,
    broken: Any,
    message: str,
    main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(where, name, broken)
    file = tmp_path / "out.json"
    assert main("--json", file) == 1
    output = capsys.readouterr()
    data = json.loads(file.read_text())
    wrong = [line for line in data["wrong"] if message in line]
    assert wrong, data["wrong"]
    assert f"WRONG, not timed: {wrong[0]}" in output.out
    # What is right keeps its figures; what is wrong has none.
    assert len(data["wrong"]) == len(set(data["wrong"]))
    for line in data["wrong"]:
        named = [row for row in data["rows"] if f": {report.label(row)} (" in line]
        assert not named, line
    assert any(row["op"] == "base" for row in data["rows"])


def test_nothing_is_begun_when_the_time_is_up(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    assert main("--budget", 0, "--json", file) == 0
    data = json.loads(file.read_text())
    assert data["left_out"] == ["tiny qkv_proj, decode, 2 tokens of 2 tasks"]
    assert "left out, the budget of 0 s was spent: 1 cells" in capsys.readouterr().out
    assert {row["phase"] for row in data["rows"]} == {"activation"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cpu"], "--tiny"),
        ([*TINY, "--rank", "9"], "--rank must be one of"),
        ([*TINY, "--rank", "1000"], "512"),
        ([*TINY, "--k", "0"], "start at 1"),
        ([*TINY, "--quick"], "not allowed with"),
        ([*TINY, "--json", "nowhere/out.json"], "its folder does not exist"),
    ],
)
def test_wrong_calls(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.main(["kernels", *options])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_punica(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"no lora_shrink_op\.py; give a copy of vllm"):
        load_from_folder(tmp_path, "an empty folder")


def test_a_plot_needs_matplotlib_and_says_so(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "can_plot", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main("--plot", "x.png")
    assert ended.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# --- vLLM's kernels -------------------------------------------------------------------------------

PUNICA_SCRIPT = """
import sys, torch
from pathlib import Path
from kernelbench.punica import load_from_folder
sys.modules["vllm"] = before = type(sys)("vllm")
punica = load_from_folder(Path(sys.argv[1]), "a copy")
assert sys.modules["vllm"] is before
assert [name for name in sys.modules if name.startswith("vllm.")] == []
assert Path(punica.utils.__file__).parent == Path(sys.argv[1])
torch.manual_seed(0)
widths, rank = (64, 32), 8
x = torch.randn(3, 48).half()
a = [torch.randn(2, 1, rank, 48).half() / 7 for _ in widths]
b = [torch.randn(2, 1, width, rank).half() / 3 for width in widths]
before = torch.randn(3, sum(widths)).half()
y, slots = before.clone(), torch.tensor([1, -1, 0])
meta = punica.meta.make(2, 3, "cpu")
meta.prepare_tensors(slots)
arguments = meta.meta_args(3, False)
between = torch.full((2, 3, rank), torch.nan)
punica.shrink(x, a, between, *arguments, 1.0)
punica.expand(between, b, y, *arguments, offset_start=0, add_inputs=True)
wanted = before.double()
for token, slot in enumerate(slots.tolist()):
    if slot >= 0:
        h = [one[slot, 0].double() @ x[token].double() for one in a]
        wanted[token] += torch.cat([one[slot, 0].double() @ z for one, z in zip(b, h)])
assert ((y.double() - wanted).norm(dim=1) < 2e-3 * wanted.norm(dim=1)).all()
assert (y[1] == before[1]).all()
assert punica.utils._LORA_A_PTR_DICT and punica.utils._LORA_B_PTR_DICT
punica.forget()
assert not punica.utils._LORA_A_PTR_DICT and not punica.utils._LORA_B_PTR_DICT
"""


@needs_triton
@needs_vllm
def test_punica_from_a_folder_computes_what_it_should(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    installed = Path(spec.submodule_search_locations[0]) / "lora" / "ops" / "triton_ops"
    shutil.copytree(installed, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"TRITON_INTERPRET": "1", "VLLM_BATCH_INVARIANT": "1"}
    run(["-c", PUNICA_SCRIPT, str(tmp_path / "copy")], **environment)


# --- checks ---------------------------------------------------------------------------------------


def _operation(batch: Batch, run: Any, adds: bool = True) -> Operation:
    def expected(copy: int) -> torch.Tensor:
        return batch.x.double().sum(1, keepdim=True) * torch.ones(len(batch.x), LAYER.d_out)

    return Operation("punica", WORK, 3, run, expected, adds)


def test_checks_pass_what_is_right_and_nothing_else() -> None:
    batch = make_batch(CELL, torch.float16, CPU, 0)
    total = batch.x.double().sum(1, keepdim=True)

    def right(copy: int) -> None:
        batch.y.copy_(batch.y.double() + total)

    assert 0 < check_operation(_operation(batch, right), batch) < 2e-3

    def unwritten_token(copy: int) -> None:
        batch.y[1:] = (batch.y.double() + total)[1:].half()

    def unwritten_slice(copy: int) -> None:
        batch.y[:, :32] = (batch.y.double() + total)[:, :32].half()

    def only_the_last_copy_is_wrong(copy: int) -> None:
        batch.y.copy_(batch.y.double() + total * (1.01 if copy == 2 else 1))

    def reads_unwritten_memory(copy: int) -> None:
        batch.y.copy_(batch.y.double() + total + 0 * torch.empty(1))

    wrong = [unwritten_token, unwritten_slice, only_the_last_copy_is_wrong, reads_unwritten_memory]
    for run in wrong:
        with pytest.raises(WrongResultError, match="punica"):
            check_operation(_operation(batch, run), batch)
    assert not torch.are_deterministic_algorithms_enabled()

    def nothing(copy: int) -> None:
        pass

    with pytest.raises(WrongResultError, match="6 of 6 tokens"):
        check_operation(_operation(batch, nothing, adds=False), batch)


def test_a_replay_must_do_what_the_calls_do() -> None:
    batch = make_batch(CELL, torch.float16, CPU, 0)

    def add() -> None:
        batch.y.add_(1)

    operation = _operation(batch, add)
    check_replay(operation, batch, add, add)
    with pytest.raises(WrongResultError, match="as a graph"):
        check_replay(operation, batch, add, lambda: None)
    with pytest.raises(WrongResultError, match="as a graph"):
        check_replay(operation, batch, add, lambda: (add(), add()))


# --- batches and copies ---------------------------------------------------------------------------


def test_every_task_has_its_tokens() -> None:
    for phase in ("decode", "prefill"):
        for tokens, tasks in ((64, 64), (64, 3), (10, 4), (1, 1)):
            cell = Cell("tiny", LAYER, phase, tokens, tasks)
            batch = make_batch(cell, torch.float16, CPU, slots=8)
            counts = np.bincount(batch.token_tasks, minlength=tasks)
            assert len(counts) == tasks
            assert counts.min() >= tokens // tasks
            assert batch.slots == max(8, tasks)
            grouped = (np.diff(batch.token_tasks) >= 0).all()
            assert grouped or phase == "decode"
            for task, rows in enumerate(batch.rows):
                assert (batch.token_tasks[rows.numpy()] == task).all()


@pytest.mark.parametrize(
    ("op", "nbytes"),
    [
        ("base", 2 * 64 * 48),
        # A of both slices and B, at the slots' rank, of three tasks.
        ("punica", 2 * 3 * 8 * (2 * 64 + 48)),
        # V and U with k = 16, and a core of 16 x 2 x 4 for each task and slice.
        ("direct-joint", 2 * (16 * (2 * 64 + 48) + 3 * 2 * 128)),
        # NF4: half a byte a value and four bytes a block of 64.
        ("direct-private", 3 * 4 * (2 * 36 + 36 + 36)),
    ],
)
def test_weights_are_what_does_not_grow_with_the_tokens(op: str, nbytes: int) -> None:
    assert weight_nbytes(op, LAYER, WORK) == nbytes
    assert count_copies(op, LAYER, WORK, cache=0) == 2
    assert count_copies(op, LAYER, WORK, cache=10 * nbytes) == 20
    assert count_copies(op, LAYER, WORK, cache=1 << 40) == 1024


def test_operations_hold_as_many_copies_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelbench.cells.l2_nbytes", lambda device: 20000)
    settings = _settings(ks=(8, 16), formats=("float16", "int8", "nf4", "nf4-narrow"))
    batch = make_batch(CELL, torch.float16, CPU, 0)
    operations = make_operations(batch, settings, None)
    assert [operation.label for operation in operations] == [
        "base",
        "direct-joint k=8",
        "direct-joint k=16",
        "direct-private float16",
        "direct-private int8",
        "direct-private nf4",
        "direct-private nf4-narrow",
    ]
    for operation in operations:
        assert operation.copies * weight_nbytes(operation.op, LAYER, operation.work) >= 2 * 20000
        first, last = operation.expected(0), operation.expected(operation.copies - 1)
        assert not torch.allclose(first, last)
        with pytest.raises((IndexError, ValueError)):
            operation.expected(operation.copies * 100)
    private = [operation.expected(0) for operation in operations[3:]]
    # The same tasks in other formats.
    for quantised, lost in zip(private[1:], (0.3, 0.3, 0.5), strict=True):
        assert (quantised - private[0]).norm() < lost * private[0].norm()


def _settings(**values: Any) -> Settings:
    defaults: dict[str, Any] = {
        "device": CPU,
        "dtype": torch.float16,
        "models": {"llama-7b": floors.MODELS["llama-7b"]},
        "modules": ("o_proj", "qkv_proj"),
        "rank": 8,
        "ks": (),
        "formats": (),
        "decode": ((4, 4), (4, 2)),
        "prefill": ((9, 1),),
        "slots": 0,
        "rounds": 1,
        "warmup": 0,
    }
    return Settings(**{**defaults, **values})


def test_cells_are_all_combinations() -> None:
    found = [(c.layer.name, c.phase, c.tokens, c.tasks) for c in cells(_settings())]
    assert found == [
        (name, phase, tokens, tasks)
        for phase, tokens, tasks in (("decode", 4, 4), ("decode", 4, 2), ("prefill", 9, 1))
        for name in ("qkv_proj", "o_proj")
    ]


def test_what_the_aims_look_at_comes_first() -> None:
    decode, prefill = ((1, 1), (64, 64), (512, 512)), ((512, 8), (2048, 8))
    found = cells(_settings(modules=("o_proj",), decode=decode, prefill=prefill))
    assert [(cell.tokens, cell.tasks) for cell in found] == [
        (64, 64), (2048, 8), (1, 1), (512, 512), (512, 8),
    ]  # fmt: skip


# --- rows and aims --------------------------------------------------------------------------------

DEVICE = floors.Device("d", bandwidth=2e12, flops=5e14, pcie=5e10)
MODEL = floors.MODELS["llama-7b"]
MODULES = {"llama-7b": {layer.name for layer in MODEL.layers}}
NAMES = {"bf16": "bfloat16", "nf4": "nf4"}


def forward_row(op: str, module: str, us: float, mode: str = "graph", **work: Any) -> report.Row:
    values = floors.Work(**{"tokens": 64, "tasks": 64, **work})
    floor = report.Floors(DEVICE).layer_floor(op, MODEL.layer(module), values)
    return report.make_row(
        op,
        values,
        floor,
        [us * 1e-6] * 3,
        model="llama-7b",
        module=module,
        phase="decode",
        mode=mode,
        copies=2,
        error=0.0,
    )


def task_row(op: str, us: float, mode: str, **work: Any) -> report.Row:
    values = floors.Work(**work)
    cost = floors.Cost(bytes=200_000_000, host_bytes=1000)
    if op in floors.PATHS:
        cost = floors.model_cost(op, MODEL, values)
    floor = report.Floors(DEVICE).floor(cost)
    return report.make_row(
        op,
        values,
        floor,
        [us * 1e-6],
        model="llama-7b",
        module="all",
        phase="activation",
        mode=mode,
        copies=2,
        error=None,
    )


def test_roofline_finds_the_same_floors(tmp_path: Path) -> None:
    rows = [
        forward_row(op, module, 100.0, format="nf4", k=128)
        for op in floors.FORWARD
        for module in MODULES["llama-7b"]
    ]
    rows += [
        task_row(op, 100.0, "eager", format="nf4", k=32, rank=64, slot_rank=64)
        for op in floors.READY
    ]
    file, out = tmp_path / "rows.json", tmp_path / "out.json"
    file.write_text(json.dumps({"rows": rows}))
    rates = ("--bandwidth", "2000", "--flops", "500", "--pcie", "50")
    run(["run.py", "roofline", "--measured", str(file), "--json", str(out), *rates])
    found = json.loads(out.read_text())["rows"]
    assert len(found) == len(rows) == 4 * 4 + 4
    for row in found:
        assert row["no_floor"] is None
        # The first is this benchmark's, the second roofline's own.
        assert row["floor_us"] == pytest.approx(100.0 / row["ratio_to_floor"])
    for row, ours in zip(found, rows):
        assert row["floor_us"] == pytest.approx(ours["floor_us"])


def layer_rows(us: dict[str, float], **work: Any) -> list[report.Row]:
    """A row a module of a quarter of the time each."""
    return [
        forward_row(op, module, time / 4, **{**work, **details})
        for op, time in us.items()
        for module in MODULES["llama-7b"]
        for details in ([{"format": "nf4"}] if op == "direct-private" else [{}])
    ]


def test_a_layer_is_the_sum_of_its_modules() -> None:
    rows = layer_rows({"base": 100.0, "punica": 60.0})
    lacking = layer_rows({"direct-joint": 8.0})[:3]
    eager = [{**row, "mode": "eager", "us_p50": 999.0} for row in rows]
    sums = report.layer_sums([*rows, *lacking, *eager], MODULES)
    graph = sums[("llama-7b", "decode", 64, 64, "graph")]
    assert graph == {"base": pytest.approx(100.0), "punica": pytest.approx(60.0)}
    assert sums[("llama-7b", "decode", 64, 64, "eager")]["base"] == pytest.approx(4 * 999.0)


def verdicts(rows: list[report.Row]) -> dict[str, tuple[str, float | None]]:
    aims = report.find_aims(rows, MODULES, NAMES)
    assert len({aim.text for aim in aims}) == len(aims)
    return {aim.text.removeprefix("llama-7b: "): (aim.verdict, aim.ratio) for aim in aims}


def test_aims_of_the_forward_pass() -> None:
    good = {"base": 100.0, "punica": 45.0, "direct-joint": 15.0, "direct-private": 22.0}
    found = verdicts(layer_rows(good))
    joint, private = "direct-joint k=64, decode, 64 tasks", "direct-private nf4, decode, 64 tasks"
    over = "direct-joint k=64 over the base linears, decode, 64 tasks"
    assert found[f"{joint}, faster than punica"] == ("pass", pytest.approx(3.0))
    assert found[f"{private}, faster than punica"] == ("pass", pytest.approx(45 / 22))
    assert found[over] == ("pass", pytest.approx(0.15))
    prefill = "direct-joint k=64 over the base linears, prefill, 2048 tokens of 8 tasks"
    assert found[prefill] == ("not measured", None)
    found = verdicts(layer_rows({**good, "direct-joint": 15.1, "direct-private": 22.6}))
    assert [found[name][0] for name in (f"{joint}, faster than punica", over)] == ["fail"] * 2
    assert found[f"{private}, faster than punica"][0] == "fail"
    # Eager rows must not stand in for those of a graph, nor other batches for that of the aim.
    for other in (layer_rows(good, tasks=16), [{**r, "mode": "eager"} for r in layer_rows(good)]):
        assert {verdict for verdict, _ in verdicts(other).values()} == {"not measured"}


def test_aims_of_an_activation() -> None:
    def rows(factor: float, host: float) -> list[report.Row]:
        floor = task_row("materialize-private", 1.0, "graph", format="nf4")["floor_us"]
        return [
            task_row("copy-pinned", host, "eager"),
            task_row("materialize-private", factor * floor, "graph", format="nf4"),
            task_row("materialize-private", 100.0, "eager", format="nf4"),
        ]

    device = "materialize-private nf4, device time over its floor"
    host = "materialize-private nf4, faster than a copy from pinned host memory, host time included"
    found = verdicts(rows(1.59, 1001.0))
    assert found[device] == ("pass", pytest.approx(1.59))
    assert found[host] == ("pass", pytest.approx(10.01))
    assert found["materialize bfloat16"] == ("not measured", None)
    found = verdicts(rows(1.61, 999.0))
    assert (found[device][0], found[host][0]) == ("fail", "fail")


# --- drawing --------------------------------------------------------------------------------------

SUMS = {
    ("llama-7b", "decode", 64, 64, "graph"): {"base": 9.0, "punica": 7.0},
    ("llama-7b", "decode", 64, 1, "graph"): {"base": 8.0, "punica": 6.0},
    ("llama-7b", "decode", 1, 1, "graph"): {"base": 5.0, "punica": 2.0},
    ("llama-7b", "decode", 1, 1, "eager"): {"base": 50.0, "punica": 20.0},
    ("llama-7b", "prefill", 2048, 8, "graph"): {"base": 99.0},
}


def test_panels_have_two_or_more_numbers_of_tasks() -> None:
    assert panels(SUMS, "graph") == {
        "llama-7b, decode, 64 tokens": {
            "base": [(1, 8.0), (64, 9.0)],
            "punica": [(1, 6.0), (64, 7.0)],
        },
        "llama-7b, decode, a token a task": {
            "base": [(1, 5.0), (64, 9.0)],
            "punica": [(1, 2.0), (64, 7.0)],
        },
    }


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(SUMS, "graph", "a device", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="two or more"):
        draw(SUMS, "eager", "a device", str(tmp_path / "y.png"))
