"""The benchmark of Lots-of-LoRAs on a small collection of the same form, through the same code."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from engine_forks import ENGINE_ENVIRONMENT
from places import ROOT
from tiny_llama import write_tiny_llama

WORDS = ("yes", "no", "left", "right")


@pytest.fixture(scope="module")
def lots() -> Iterator[ModuleType]:
    file = ROOT / "benchmarks" / "lots_of_loras.py"
    spec = importlib.util.spec_from_file_location("lots_of_loras", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lots_of_loras", module)
        spec.loader.exec_module(module)
        yield module


def rows(task: int) -> list[dict[str, Any]]:
    said = [WORDS[task], "x"]
    return [{"input": f"Definition: say it. Input: {n} Output:", "output": said} for n in range(5)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters, each trained by PEFT to say its word, and a fourth without a data set."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("lots")
    model = write_tiny_llama(folder / "base", head_dim=32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for task in range(4):
        torch.manual_seed(task)
        config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained(model), config)
        optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-3)
        for _ in range(60):
            loss = torch.zeros(())
            for row in rows(task)[:2]:
                given = tokenizer(f"[INST] {row['input']} [/INST]")["input_ids"]
                said = tokenizer(f"{row['output'][0]}<|im_end|>", add_special_tokens=False)
                ids = torch.tensor([[*given, *said["input_ids"]]])
                labels = ids.clone()
                labels[0, : len(given)] = -100
                loss = loss + adapted(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        place = folder / "models" / f"Mistral-7B-Instruct-v0.2-4b-r16-task{task:03}"
        adapted.save_pretrained(str(place))
    for task in range(3):
        split = folder / "datasets" / f"task{task:03}_some_title" / "data"
        split.mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows(task))
        (split / "test-00000-of-00001.jsonl").write_text(lines)
        (split / "train-00000-of-00001.jsonl").write_text('{"input": "trained on", "output": []}\n')
    return folder


def test_adapters_and_tasks_are_brought_together(
    lots: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = lots.options(["-o", str(tmp_path), "--source", str(source), "--examples", "3"])
    tasks = lots.gather(lots.Folder(source), tmp_path, args)
    assert sorted(tasks) == ["task0", "task1", "task2"]
    assert "task003: no data set of its task, left out" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "heldout" / "task2.jsonl").open()]
    assert len(lines) == 3
    assert lines[1] == {
        "prompt": "[INST] Definition: say it. Input: 1 Output: [/INST]",
        "completion": "left",
        "references": ["x"],
    }
    with pytest.raises(SystemExit, match="no test split"):
        list(lots.read_rows(source / "models"))


def test_a_table_has_a_row_for_each_ratio(lots: ModuleType) -> None:
    mean = {"base": 0.1, "adapter": 0.8, "compressed": 0.6, "relative": 0.75, "agreement": 0.5}
    found = {"mean": mean, "worst": {"task": "task7", "relative": 0.25}, "ratio": 8.02}
    nothing = {"mean": dict.fromkeys(mean), "worst": None, "ratio": 4.0}
    assert list(lots.table({8.0: found, 4.0: nothing}))[2:] == [
        "| 8x | 8.02x | 0.1000 | 0.8000 | 0.6000 | 0.7500 | 0.2500 (task7) | 0.5000 |",
        "| 4x | 4.00x | - | - | - | - | - | - |",
    ]


@pytest.mark.engine
def test_one_command_goes_all_the_way(
    lots: ModuleType,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in ENGINE_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    arguments = ["-o", str(tmp_path), "--source", str(source), "--model", str(source / "base")]
    arguments += ["--ratios", "2", "--max-length", "256", "--examples", "2"]
    assert lots.main(arguments) == 0
    *_, row = capsys.readouterr().out.strip().splitlines()
    report = json.loads((tmp_path / "rouge-l-2.json").read_text())
    assert len(report["tasks"]) == 3
    # Trained on these very questions: the adapters know the words, and at half their size still do.
    assert report["mean"]["adapter"] > 0.9 > report["mean"]["base"]
    assert report["mean"]["relative"] > 0.9
    assert row.startswith("| 2x | ")
    # What is there is not made again.
    (tmp_path / "heldout").rename(tmp_path / "elsewhere")
    assert lots.measure({}, tmp_path, 2.0, lots.options(arguments)) == report
