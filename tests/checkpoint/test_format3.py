"""Format 3: tasks whose adapters have other names for their modules than the checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pinned import assert_same_but_for_program
from places import ROOT
from safetensors.torch import load_file

from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.manifest import CONFIG_FILE, TASKS_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import CheckpointError
from vllm_vlora.representations.private import encode_private

DATA = ROOT / "tests" / "data" / "format3"
COUNT = torch.arange(1, 5, dtype=torch.float32)


def write_pinned(folder: Path) -> None:
    """What ``tests/data/format3`` was made with; every value is exact."""
    writer = CheckpointWriter(folder, "org/base")
    writer.add_module("model.layers.0.q", 3, 2)
    writer.add_module("lm_head", 3, 4)
    for task_id, scale, renamed in (
        ("head", 1.0, {}),
        ("bare", 0.5, {"model.layers.": "layers."}),
    ):
        a = COUNT[:3].view(1, 3)
        modules = {
            "model.layers.0.q": encode_private(a, COUNT[:2].view(2, 1), scale, "bfloat16"),
            "lm_head": encode_private(a, COUNT.view(4, 1), 1.0, "bfloat16"),
        }
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q", "lm_head"]}
        if scale != 1.0:
            config["alpha_pattern"] = {"layers.0.q": scale}
        writer.add_task(
            task_id,
            modules,
            original_nbytes=24,
            error=0.0,
            adapter_config=config,
            renamed=renamed,
        )
    writer.finish("# card\n")


def edit_json(folder: Path, file: str, edit: Callable[[Any], None]) -> None:
    """Change a JSON file and, for tasks.json, its digest in the manifest."""
    data = json.loads((folder / file).read_text())
    edit(data)
    written = json.dumps(data).encode()
    (folder / file).write_bytes(written)
    if file == TASKS_FILE:
        ref = {"sha256": hashlib.sha256(written).hexdigest(), "nbytes": len(written)}
        edit_json(folder, CONFIG_FILE, lambda config: config["tasks"].update(ref))


def test_a_checkpoint_of_format_3_reads_to_the_same_values_for_ever(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(DATA)
    assert checkpoint.config.format_version == 3
    assert validate(DATA) == []
    for task, q, scale in (("head", "model.layers.0.q", 1.0), ("bare", "layers.0.q", 0.5)):
        record, stored = checkpoint.record(task), checkpoint.load_task(task)
        assert [record.own_name(name) for name in stored.modules] == [q, "lm_head"]
        assert stored.modules["model.layers.0.q"].scale == scale
        # Kept as it was: the config speaks of the adapter's own names.
        folder = export_task(checkpoint, task, tmp_path / task)
        tensors = load_file(folder / "adapter_model.safetensors")
        assert tensors[f"base_model.model.{q}.lora_A.weight"].tolist() == [[1, 2, 3]]
        assert tensors[f"base_model.model.{q}.lora_B.weight"].tolist() == [[1], [2]]
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config == record.adapter_config


def test_the_writer_still_writes_format_3(tmp_path: Path) -> None:
    """Byte for byte, but for the version of the program in the manifest."""
    write_pinned(tmp_path)
    assert_same_but_for_program(tmp_path, DATA)


def test_the_name_of_a_task_is_no_part_of_its_digest(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "ckpt")
    edit_json(tmp_path / "ckpt", TASKS_FILE, lambda tasks: tasks["bare"].pop("renamed"))
    first, second = (Checkpoint.open(path).digest("bare") for path in (DATA, tmp_path / "ckpt"))
    assert first == second


@pytest.mark.parametrize("version", [1, 2])
def test_in_an_older_format_the_field_is_an_error(tmp_path: Path, version: int) -> None:
    shutil.copytree(DATA, tmp_path / "ckpt")
    edit_json(tmp_path / "ckpt", CONFIG_FILE, lambda c: c.update(format_version=version))
    with pytest.raises(CheckpointError, match="renamed"):
        Checkpoint.open(tmp_path / "ckpt")


@pytest.mark.parametrize(
    "edit",
    [
        lambda task: task["renamed"].update({"model.layers.0.q": "lm_head"}),
        lambda task: task["renamed"].update({"lm_head": ""}),
        lambda task: task.update(renamed={"model.": 1}),
        lambda task: task.update(renamed=[]),
    ],
)
def test_names_that_are_none_are_refused(tmp_path: Path, edit: Callable[[Any], None]) -> None:
    shutil.copytree(DATA, tmp_path / "ckpt")
    edit_json(tmp_path / "ckpt", TASKS_FILE, lambda tasks: edit(tasks["bare"]))
    with pytest.raises(CheckpointError, match=r"tasks\.json: "):
        Checkpoint.open(tmp_path / "ckpt")
