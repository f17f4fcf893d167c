"""The examples of training, routing and QLoRA run from their first line to their last on a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from byte_tokenizer import make_byte_tokenizer
from places import EXAMPLES

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate

TASKS = ["french", "keywords", "sentiment", "sql", "ticket"]


@pytest.fixture(autouse=True)
def _as_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script's own folder is where it imports from; what it writes goes elsewhere."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Llama of bytes, and adapters of mixed rank under names of the demo's tasks."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    # bitsandbytes packs blocks of 64 along a row.
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / "model")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=2 + seed % 2,
            lora_alpha=2,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
        )
        wrapped = peft.get_peft_model(model, config)
        wrapped.save_pretrained(folder / "adapters" / task)
        model = wrapped.unload()
    return {"model": folder / "model", "adapters": folder / "adapters"}


def arguments(world: dict[str, Any], *more: str) -> list[str]:
    return ["--model", str(world["model"]), "--adapters", str(world["adapters"]), *more]


def test_hf_trainer(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example("hf_trainer")
    options = example._parse(
        arguments(world, "--components", "4", "--steps", "6", "--max-length", "80", "--lr", "0.1")
    )
    losses = example.run(options)
    assert list(losses) == [
        "base model",
        "trained cores",
        "own adapter, projected",
        "own adapter",
    ]
    assert losses["trained cores"] < losses["base model"]
    assert validate(options.output) == []
    assert list(Checkpoint.open(options.output).tasks) == [*TASKS[1:], "french"]
    assert "64 numbers trained in 6 steps" in capsys.readouterr().out
    # A second run does not overwrite, and says so.
    assert example.main(arguments(world, "--components", "1", "--steps", "1")) == 2
    assert "error: " in capsys.readouterr().err


def test_hf_trainer_on_data_of_its_own(world: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "new.jsonl"
    line = '{"prompt": "Say %d. ", "completion": "It is %d."}\n'
    data.write_text("".join(line % (i, i) for i in range(10)))
    example = load_example("hf_trainer")
    losses = example.run(
        example._parse(
            arguments(
                world, "--task", "new", "--data", str(data), "--steps", "6", "--components", "4",
                "--lr", "0.1",
            )
        )
    )  # fmt: skip
    assert list(losses) == ["base model", "trained cores"]
    assert losses["trained cores"] < losses["base model"]


def test_router(world: dict[str, Any]) -> None:
    example = load_example("router")
    report = example.run(example._parse(arguments(world, "--epochs", "150", "--lr", "0.01")))
    # Four tasks: a quarter by chance. Bytes alone tell requests for SQL from reviews.
    assert report.accuracy >= 0.7
    assert min(report.base, report.routed, report.oracle) > 0
    assert report.routed != report.base


@pytest.mark.parametrize("bits", [16, 4])
def test_qlora_pipeline(
    world: dict[str, Any], bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    example = load_example("qlora_pipeline")
    options = example._parse(arguments(world, "--bits", str(bits), "--tokens", "3"))
    answers = example.run(options)
    assert list(answers) == ["(base model)", *TASKS]
    assert len(set(answers.values())) > 1
    assert validate(options.output) == []
    out = capsys.readouterr().out
    assert f"'quantized': {bits == 4}" in out
    assert "saved in nf4" in out
