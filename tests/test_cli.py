"""The command line: what it does, what it says, and its exit codes (0 done, 1 check, 2 input)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_vlora import __version__
from vllm_vlora.adapters import open_adapter, save_adapter
from vllm_vlora.checkpoint import CONFIG_FILE, Checkpoint
from vllm_vlora.compress import DEFAULT_RATIO
from vllm_vlora.task_ids import encode_task_id
from vllm_vlora.tools.cli import app

COMMANDS = ("compress", "info", "validate", "export")
runner = CliRunner()


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.output
    return result


def error_line(*args: str | Path, code: int = 2) -> str:
    """The one line that a failing call says on stderr; it prints nothing on stdout."""
    result = invoke(*args, code=code)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def usage_error(*args: str | Path) -> str:
    """A call that the parser refuses; the box it draws is taken away."""
    return " ".join(invoke(*args, code=2).stderr.replace("│", " ").split())


def make_adapter(
    folder: Path, *, rank: int = 4, seed: int = 0, size: int = 96, layers: int = 1, **config: Any
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    names = [
        f"model.layers.{layer}.self_attn.{leaf}"
        for layer in range(layers)
        for leaf in ("q_proj", "v_proj")
    ]
    factors = {
        name: (
            torch.randn(rank, size, generator=generator).bfloat16(),
            torch.randn(size, rank, generator=generator).bfloat16(),
        )
        for name in names
    }
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "org/base",
    }
    return save_adapter(folder, settings | config, factors)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for seed, name in enumerate(("sql", "chat", "Zürich 東京")):
        make_adapter(folder / name, rank=4 + seed, seed=seed)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tests only read: awkward task ids, one task kept exactly."""
    root = tmp_path_factory.mktemp("shared")
    names = []
    for seed, task_id in enumerate(("../../etc/x", "a/b", "a_b", "Ünïcode [red]")):
        folder = make_adapter(root / f"adapter{seed}", rank=4, seed=seed)
        names += ["--name", f"{task_id}={folder}"]
    invoke("compress", *names, "-o", root / "ckpt", "--max-error", "0")
    return root / "ckpt"


def same_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- help and version ----------------------------------------------------------------------------


def test_version() -> None:
    assert invoke("--version").stdout == f"vllm-vlora {__version__}\n"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_by_example_and_fits(
    monkeypatch: pytest.MonkeyPatch, command: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = invoke(*([command] if command else []), "--help").stdout
    assert max(map(len, text.splitlines())) <= width
    lines = [line.strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line in ("Example", "Examples"))
    assert any(line.startswith(f"vllm-vlora {command}".strip()) for line in lines[start:])


def test_help_states_the_default_ratio() -> None:
    assert f"without one the ratio is {DEFAULT_RATIO}." in invoke("compress", "--help").stdout


def test_help_is_quick_since_it_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from vllm_vlora.tools.cli import app; "
        "assert CliRunner().invoke(app, ['compress', '--help']).exit_code == 0; "
        "assert not {'torch', 'vllm', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- compress ------------------------------------------------------------------------------------


def test_compress_a_folder_of_adapters(adapters: Path, tmp_path: Path) -> None:
    (adapters / "notes").mkdir()
    (adapters / "README.md").write_text("not an adapter")
    result = invoke("compress", adapters, "-o", tmp_path / "ckpt", "--ratio", "2")
    assert f"{adapters} is a folder of adapters: 3 found" in result.stderr
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert set(checkpoint.tasks) == {"sql", "chat", "Zürich 東京"}
    assert checkpoint.ratio >= 2
    assert checkpoint.base_model == "org/base"
    for task_id in checkpoint.tasks:
        assert task_id in result.stdout
        assert f"{checkpoint.record(task_id).error:.4f}" in result.stdout
    assert "vllm serve org/base --enable-lora --max-lora-rank 8" in result.stdout
    assert "chosen" in result.stdout
    card = (tmp_path / "ckpt" / "README.md").read_text()
    assert 'base_model: "org/base"' in card
    assert "Zürich 東京" in card
    assert "proxy" in card


def test_compress_json_is_all_that_stands_on_stdout(adapters: Path, tmp_path: Path) -> None:
    result = invoke("compress", adapters, "-o", tmp_path / "ckpt", "--json", "--ratio", "2")
    data = json.loads(result.stdout)
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert data["bytes"] == checkpoint.nbytes
    assert data["ratio"] == pytest.approx(checkpoint.ratio)
    assert {task["task"]: task["error"] for task in data["tasks"]} == {
        task_id: record.error for task_id, record in checkpoint.tasks.items()
    }
    assert {"private", "joint"} <= {c["representation"] for c in data["candidates"]}
    assert data["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        (["--representation", "private", "--quantize", "int8"], "private int8"),
        (["--representation", "private", "--quantize", "none", "--ratio", "1"], "private bfloat16"),
        (["--num-components", "6", "--dtype", "float32"], "joint float32"),
    ],
)
def test_options_reach_the_library(
    adapters: Path, tmp_path: Path, options: list[str], stored: str
) -> None:
    if "int8" in options:
        options = [*options, "--ratio", "1.5"]
    result = invoke("compress", adapters, "-o", tmp_path / "ckpt", "--json", *options)
    for task in json.loads(result.stdout)["tasks"]:
        assert list(task["stored_as"]) == [stored]


def test_names_rename_and_add(adapters: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "run" / "sql", seed=9)
    message = error_line("compress", adapters, other, "-o", tmp_path / "ckpt")
    assert "'sql'" in message
    assert f"--name NEW_ID={other}" in message
    invoke(
        *("compress", adapters, other, "-o", tmp_path / "ckpt", "--max-error", "0"),
        *("--name", f"org/sql={other}", "--name", f"again=x={tmp_path}/adapters/../run/sql/"),
        *("--name", f"more={make_adapter(tmp_path / 'third')}"),
    , code=2)
