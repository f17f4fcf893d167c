"""``examples/merge_tasks.py`` does what it says, on tiny adapters."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from places import EXAMPLES
from tiny_adapters import SHAPES, delta_w, save_tiny_adapters, tiny_weights

from vllm_vlora import Checkpoint, load_adapter, validate
from vllm_vlora.merging.blending import read_tasks

EXAMPLE = EXAMPLES / "merge_tasks.py"
WEIGHTS = (0.75, 0.5, -0.25)


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_merge_tasks", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    more = {**SHAPES, "layers.1.q_proj": (12, 8)}
    adapters = [
        tiny_weights(0, rank=2, alpha=8),
        tiny_weights(1, rank=2, alpha=3, shapes=more),
        tiny_weights(2, rank=1, alpha=4),
    ]
    return save_tiny_adapters(tmp_path / "adapters", adapters)


def test_merging_and_blending(
    tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    weights = ",".join(map(str, WEIGHTS))
    assert _example().main([*folders, "-o", str(out), f"--weights={weights}"]) == 0
    adapters = [load_adapter(folder) for folder in folders]
    merged = load_adapter(out / "sum")
    [blended] = read_tasks(Checkpoint.open(out / "checkpoint"), ["blend"])
    assert len(merged.layer_names) == 3
    for name in merged.layer_names:
        parts = [w * delta_w(a, name) for a, w in zip(adapters, WEIGHTS) if name in a.lora_a]
        wanted = torch.stack(parts).sum(0)
        assert torch.allclose(delta_w(merged, name), wanted, atol=1e-5)
        assert torch.allclose(delta_w(blended, name), wanted, atol=1e-4)
    assert validate(out / "checkpoint") == []
    assert load_adapter(out / "ties").rank == load_adapter(out / "dare").rank == 2
    printed = capsys.readouterr().out
    assert "task 'blend' is joint" in printed
    assert f"as PEFT folders in {out}" in printed
    # Again: refused without --force, and the same with it.
    assert _example().main([*folders, "-o", str(out)]) == 2
    assert "error: " in capsys.readouterr().err
    assert _example().main([*folders, "-o", str(out), "--force"]) == 0


def test_what_it_needs(
    tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _example().main([folders[0], "-o", str(tmp_path / "out")]) == 2
    assert "name at least two" in capsys.readouterr().err
