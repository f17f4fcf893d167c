"""Format 5: private factors in trellis codes."""

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

from vllm_vlora.checkpoint import manifest
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.manifest import CONFIG_FILE, TASKS_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import CheckpointError, CheckpointVersionError
from vllm_vlora.quantize import unpack
from vllm_vlora.representations.private import encode_private, encode_trellis
from vllm_vlora.representations.stored import StoredModule

DATA = ROOT / "tests" / "data" / "format5"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q", "o"]}
# Module -> d_in, d_out.
MODULES = {"q": (70, 5), "o": (3, 66)}


def tasks() -> dict[str, dict[str, StoredModule]]:
    """What ``tests/data/format5`` was made with."""
    a, b = (
        ((torch.arange(4 * width).view(4, width) * 37 % 101) - 50) / 32.0 for width in MODULES["q"]
    )
    c, d = (rows[:2] for rows in (a[:, :3], b.new_ones(4, 66) * torch.arange(66) / 64))
    mixed, four = encode_trellis([a, c], [b, d], [(1, 2, 1), (2, 0, 0)])
    return {
        "trellis": {"q": mixed, "o": four},
        "plain": {"q": encode_private(a[:1], b[:1].T, 0.5, "nf4-dq")},
    }


def write_pinned(folder: Path) -> None:
    writer = CheckpointWriter(folder, "org/base")
    for name, shape in MODULES.items():
        writer.add_module(name, *shape)
    for task_id, modules in tasks().items():
        writer.add_task(task_id, modules, original_nbytes=1000, error=0.25, adapter_config=CONFIG)
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "ckpt"))


def test_a_checkpoint_of_format_5_reads_to_the_same_values_for_ever(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(DATA)
    assert checkpoint.config.format_version == 5
    assert validate(DATA) == []
    task = checkpoint.load_task("trellis")
    assert task.modules["q"].bits == (1, 2, 1)
    assert task.modules["o"].bits is None
    assert task.modules["q"].matrices["A"].parts["widths"][:, 0].tolist() == [4, 3, 3, 2]
    values = torch.cat(
        [
            unpack(matrix).flatten()
            for module in task.modules.values()
            for matrix in module.matrices.values()
        ]
    )
    assert (
        hashlib.sha256(values.numpy().tobytes()).hexdigest()
        == "c370f9d1339828969a56d6f0c861df915c29d81d2fdf5853124924b98ecb5f32"
    )
    exported = export_task(checkpoint, "trellis", tmp_path / "t", dtype=torch.float32)
    tensors = load_file(exported / "adapter_model.safetensors")
    assert torch.equal(
        tensors["base_model.model.q.lora_A.weight"], unpack(task.modules["q"].matrices["A"])
    )


def test_a_file_takes_no_byte_more_than_the_rows(tmp_path: Path) -> None:
    tensors = load_file(DATA / "tasks" / "trellis.safetensors")
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    # A row of n elements with w bits has 8 + (n - 1) w bits, in whole bytes.
    assert sizes == {
        "private.A.trellis.codes": 36 + 2 * 2,
        "private.A.trellis.codes3": 2 * 27,
        "private.A.trellis.codes2": 19,
        "private.A.trellis.scales": 6,
        "private.B.trellis.codes": 3 + 2 * 34,
        "private.B.trellis.codes3": 2 * 3,
        "private.B.trellis.codes2": 2,
        "private.B.trellis.scales": 6,
    }


def test_the_writer_still_writes_format_5(tmp_path: Path) -> None:
    """Byte for byte, but for the version of the program in the manifest."""
    write_pinned(tmp_path)
    assert_same_but_for_program(tmp_path, DATA)


def test_what_was_encoded_is_what_is_read() -> None:
    checkpoint = Checkpoint.open(DATA)
    for task_id, modules in tasks().items():
        read = checkpoint.load_task(task_id).modules
        for name, stored in modules.items():
            for side, matrix in stored.matrices.items():
                again = read[name].matrices[side]
                assert matrix.parts.keys() == again.parts.keys()
                assert all(torch.equal(p, again.parts[n]) for n, p in matrix.parts.items())


def test_without_trellis_codes_it_is_of_the_version_before(folder: Path) -> None:
    remove_tasks(folder, ["trellis"])
    assert Checkpoint.open(folder).config.format_version == 1
    assert validate(folder) == []


@pytest.mark.parametrize("index", [False, True])
def test_it_is_edited_with_an_index_and_without(
    folder: Path, index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "INDEXED_TASKS", 1 if index else 9)
    digest = Checkpoint.open(folder).digest("trellis")
    remove_tasks(folder, ["plain"])
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.format_version == 5
    assert (checkpoint.config.tasks.file == "tasks.index") == index
    assert checkpoint.digest("trellis") == digest
    assert validate(folder) == []


@pytest.mark.parametrize("index", [False, True])
def test_an_older_version_has_no_such_codes(
    tmp_path: Path, index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "INDEXED_TASKS", 1 if index else 9)
    write_pinned(tmp_path)
    version = 4 if index else 3
    edit_json(tmp_path, CONFIG_FILE, lambda config: config.update(format_version=version))
    with pytest.raises(CheckpointError, match=f"'trellis', which format {version} has not"):
        Checkpoint.open(tmp_path)


def test_an_older_reader_says_what_it_always_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 4)
    with pytest.raises(CheckpointVersionError, match="format version 5 is newer"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("bits", "message"),
    [([1, 1, 1], "do not sum to the rank 4"), ([5, 0, -1], "do not sum to the rank 4")],
)
def test_impossible_bits_are_refused(folder: Path, bits: list[int], message: str) -> None:
    edit_json(folder, TASKS_FILE, lambda t: t["trellis"]["segments"][0].update(bits=bits))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_only_private_factors_have_them(folder: Path) -> None:
    def share(config: Any) -> None:
        config["modules"][0]["basis"] = {"k_out": 1, "k_in": 1, "format": "trellis"}

    edit_json(folder, CONFIG_FILE, share)
    with pytest.raises(CheckpointError, match="module q has an impossible basis"):
        Checkpoint.open(folder)
