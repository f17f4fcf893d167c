"""compress with a model beside it: calibration from text, and sizes found by quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import write_tiny_llama
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.evaluation.evaluator import EvaluationOptions, Evaluator
from vllm_vlora.fitting.calibration import Calibration
from vllm_vlora.tools.cli import app

TEXTS = {"count": "one two three four five", "greet": "hello, how do you do?"}
runner = CliRunner()


def invoke(*args: Any, code: int = 0) -> Any:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def train(model: Path, folder: Path, text: str, seed: int) -> None:
    """An adapter that knows one sentence by heart."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(text)["input_ids"]])
    optimizer = torch.optim.Adam(adapted.parameters(), lr=2e-2)
    for _ in range(60):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, adapters/TASK, data/TASK.jsonl and text.jsonl."""
    root = tmp_path_factory.mktemp("world")
    model = write_tiny_llama(root / "model")
    (root / "data").mkdir()
    for seed, (task, text) in enumerate(TEXTS.items()):
        train(model, root / "adapters" / task, text, seed)
        line = json.dumps({"text": text}) + "\n"
        (root / "data" / f"{task}.jsonl").write_text(line * 3)
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in TEXTS.values())
    )
    return root


def test_a_calibration_is_gathered_from_text_kept_and_taken_again(
    world: Path, tmp_path: Path
) -> None:
    command = ("compress", world / "adapters", "--ratio", 2, "--base", world / "model")
    command += ("--calibration", world / "text.jsonl", "--json", "--force", "-o", tmp_path / "ckpt")
    first = json.loads(invoke(*command).stdout)
    folder = world / "text.jsonl.calibration"
    assert Calibration.open(folder).source.base_model == str(world / "model")
    assert set(first["seen_errors"]) == set(TEXTS)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = json.loads(invoke(*command).stdout)
    assert again["seen_errors"] == first["seen_errors"]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    with (world / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "something else"}) + "\n")
    invoke(*command)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} != written


def test_every_task_keeps_what_was_asked_for(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    command = ("compress", world / "adapters", "-o", out, "--min-kept", 0.9)
    command += ("--base", world / "model", "--data", world / "data", "--json")
    data = json.loads(invoke(*command).stdout)
    assert data["kl_kept"].keys() == TEXTS.keys()
    assert min(data["kl_kept"].values()) >= 0.9
    # Judged again, by itself.
    evaluator = Evaluator(
        world / "model",
        {task: [world / "data" / f"{task}.jsonl"] for task in TEXTS},
        EvaluationOptions(greedy_tokens=0),
    )
    for task in TEXTS:
        invoke("export", out, task, "-o", tmp_path / task)
        compared = evaluator.compare(
            task, tmp_path / task, open_adapter(world / "adapters" / task).path
        )
        assert compared.kl_kept.value == pytest.approx(data["kl_kept"][task], abs=0.02)
    card = (out / "README.md").read_text()
    assert f"worst {min(data['kl_kept'].values()):.4f}" in card
    assert data["bytes"] < 0.6 * data["original_bytes"]


def test_the_model_judges_the_representations(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    command = ("compress", world / "adapters", "-o", out, "--ratio", 1.5)
    command += ("--base", world / "model", "--data", world / "data")
    data = json.loads(invoke(*command, "--json").stdout)
    judged = {c["representation"]: c["kl_kept"] for c in data["candidates"]}
    assert {"private", "joint"} <= judged.keys()
    assert data["original_bytes"] / data["bytes"] >= 1.5
    mean = sum(data["kl_kept"].values()) / len(data["kl_kept"])
    assert mean == max(judged.values())
    assert "KL kept" in invoke(*command, "--force").stdout


def test_what_does_not_go_together_is_one_line(world: Path, tmp_path: Path) -> None:
    command = ("compress", world / "adapters", "-o", tmp_path / "x")
    assert "--base" in invoke(*command, "--base", "m", code=2).stderr
    partly = (*command, "--min-kept", 0.9, "--data", f"count={world / 'data' / 'count.jsonl'}")
    assert "'greet' has none" in invoke(*partly, "--base", world / "model", code=2).stderr
    both = (*command, "--min-kept", 0.9, "--ratio", 3, "--data", world / "data")
    assert "leave out" in invoke(*both, "--base", world / "model", code=2).stderr
    assert not (tmp_path / "x").exists()
