"""Damaged files in front of every reader: it returns, or raises an error of the package in one line.

Each input is made from a number and the reader's name, so a failure can be made again. Memory and time
are limited: an input that asks for gigabytes, or for minutes, fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import mutations
import pytest
import torch
from attacking import scaled
from mutations import Files
from places import DATA
from safetensors.torch import load_file, save_file

from vllm_vlora.adapters.discovery import find_adapters
from vllm_vlora.adapters.fused_experts import split_experts
from vllm_vlora.adapters.peft_folder import as_peft_folder, open_adapter
from vllm_vlora.blending.text_router import RoutePolicy, TextRouter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import report_contents
from vllm_vlora.checkpoint.router_files import Measured, read_router_weights
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.editing.routing import attach_router
from vllm_vlora.errors import VLoRAError
from vllm_vlora.evaluation.texts import read_examples
from vllm_vlora.fitting.calibration import (
    Calibration,
    ModuleRecord,
    Settings,
    Source,
    calibration_files,
)
from vllm_vlora.fitting.moments import FullMoment, LowRankMoment
from vllm_vlora.foreign.convert import convert
from vllm_vlora.representations.factors import balanced_svd, squared_norm
from vllm_vlora.subspace.storage import read_subspace
from vllm_vlora.tools.summary import describe_router

GIGABYTES = 2
SECONDS = 20
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.3.down_proj"
PREFIX = "base_model.model."


# --- what is damaged ------------------------------------------------------------------------------


def adapter(folder: Path) -> None:
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "bias": "none",
        "base_model_name_or_path": "org/base", "target_modules": r".*\.(q_proj|down_proj)",
        "rank_pattern": {"down_proj": 3, r"layers\.9\..*": 7}, "alpha_pattern": {"q_proj": 8},
        "modules_to_save": ["score"], "exclude_modules": ["vision"], "layers_to_transform": [0, 1, 3],
        "layers_pattern": ["layers"], "use_rslora": True, "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(lora_tensors(), folder / "adapter_model.safetensors")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')


def lora_tensors() -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{Q}.lora_A.weight": torch.ones(2, 6),
        f"{PREFIX}{Q}.lora_B.weight": torch.ones(4, 2),
        f"{PREFIX}{V}.lora_A.weight": torch.ones(3, 5, dtype=torch.bfloat16),
        f"{PREFIX}{V}.lora_B.weight": torch.ones(4, 3, dtype=torch.float16),
        f"{PREFIX}score.weight": torch.ones(2, 4, dtype=torch.float64),
    }


def sharded(folder: Path) -> None:
    adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    tensors = list(lora_tensors().items())
    index = {}
    for number, some in enumerate((tensors[:2], tensors[2:]), 1):
        name = f"adapter_model-{number:05d}-of-00002.safetensors"
        save_file(dict(some), folder / name)
        index |= dict.fromkeys(dict(some), name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "adapter_model.safetensors.index.json").write_text(text)


def pickled(folder: Path) -> None:
    adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(lora_tensors(), folder / "adapter_model.bin")


def fused(folder: Path) -> None:
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    block = f"{PREFIX}model.layers.0.mlp.experts"
    tensors = {
        f"{block}.base_layer.lora_A.weight": torch.ones(6, 4),
        f"{block}.base_layer.lora_B.weight": torch.ones(10, 6),
        f"{block}.lora_A.weight": torch.ones(6, 5),
        f"{block}.lora_B.weight": torch.ones(4, 6),
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def mlx(folder: Path) -> None:
    config = {
        "model": "org/base", "fine_tune_type": "lora", "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 20.0, "alpha": 16, "dropout": 0.0},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        "model.layers.0.self_attn.q_proj.lora_a": torch.ones(6, 2),
        "model.layers.0.self_attn.q_proj.lora_b": torch.ones(2, 4),
        "model.layers.1.self_attn.q_proj.lora_a": torch.ones(6, 3),
        "model.layers.1.self_attn.q_proj.lora_b": torch.ones(3, 4),
    }
    save_file(tensors, folder / "adapters.safetensors")


def stored(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copytree(DATA / name, folder, dirs_exist_ok=True)


def with_attachments(folder: Path) -> None:
    stored("format3")(folder)
    content = b'{"chat_template": "x"}'
    ref = {"sha256": mutations.hashlib.sha256(content).hexdigest(), "nbytes": len(content)}
    ref["file"] = f"attachments/{ref['sha256']}"
    (folder / "attachments").mkdir()
    (folder / ref["file"]).write_bytes(content)
    tasks = dict.fromkeys(json.loads((folder / "tasks.json").read_bytes()))
    index = {"version": 1, "tasks": {task: {"tokenizer_config.json": ref} for task in tasks}}
    (folder / "attachments.json").write_text(json.dumps(index))


def with_router(folder: Path) -> None:
    stored("format3")(folder)
    tasks = list(json.loads((folder / "tasks.json").read_bytes()))
    weights = {
        "idf": torch.ones(8),
        "net.0.weight": torch.ones(3, 8),
        "net.0.bias": torch.ones(3),
        "net.2.weight": torch.ones(len(tasks) + 1, 3),
        "net.2.bias": torch.ones(len(tasks) + 1),
    }
    measured = {task: Measured(8, 2, 1) for task in [*tasks, ""]}
    attach_router(folder, tasks, weights, others=True, measured=measured)


def calibration(folder: Path) -> None:
    settings = Settings(None, 64, 2, True, 2048, 2, "float32")
    source = Source("tiny", ["data.jsonl"], "0" * 64, 2, 20, 10, settings, {"torch": "2"})
    modules = [ModuleRecord("q", 4, 6, 0, 1), ModuleRecord("k", 4, 6, 0, None)]
    moments = [
        FullMoment(torch.eye(4)),
        LowRankMoment(torch.eye(2, 6), torch.ones(2), torch.ones(6)),
    ]
    Calibration(source, modules, moments).write(folder)


def texts(folder: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"text": "a"},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "data.txt").write_text("one\ntwo\n\nthree\n")


# --- what reads it --------------------------------------------------------------------------------


def read_adapter(folder: Path, out: Path) -> None:
    find_adapters(folder)
    opened = open_adapter(folder)
    _ = opened.original_nbytes, opened.companions, opened.base_model, opened.warnings
    for name, (a, b) in opened.iter_factors():
        scale = opened.modules[name].scale
        squared_norm(a, b, scale)
        balanced_svd(a.float(), b.float(), 1.0)
    opened.extra_tensors()
    with as_peft_folder(opened):
        pass


def split(folder: Path, out: Path) -> None:
    split_experts(folder, out / "split", interleaved=False)


def read_checkpoint(folder: Path, out: Path) -> None:
    validate(folder)
    opened = Checkpoint.open(folder)
    _ = opened.nbytes, opened.ratio, opened.max_rank, opened.attachments, opened.usage()
    report_contents(folder, opened.tasks, opened.modules, opened.basis_nbytes)
    for number, task in enumerate(opened.tasks):
        for narrow in (False, True):
            with contextlib.suppress(VLoRAError):
                opened.load_task(task, narrow=narrow)
        with contextlib.suppress(VLoRAError):
            export_task(opened, task, out / str(number))
    with contextlib.suppress(VLoRAError):
        read_subspace(folder)


def read_routed(folder: Path, out: Path) -> None:
    validate(folder)
    opened = Checkpoint.open(folder)
    describe_router(opened)
    record = opened.router
    if record is not None:
        weights = read_router_weights(folder, record)
        router = TextRouter(record.tasks, record.temperature, weights)
        for text in ("", "a", "some text of a prompt"):
            pick = router.pick(text, opened.tasks, RoutePolicy(3, 0.0))
            assert 0 <= pick.confidence <= 1 + 1e-9


def read_foreign(folder: Path, out: Path) -> None:
    with contextlib.suppress(VLoRAError):
        read_subspace(folder)
    convert(folder, out / "converted")


def read_calibration(folder: Path, out: Path) -> None:
    calibration_files(folder)
    opened = Calibration.open(folder)
    for moment in opened.moments:
        moment.whiten(0.01)
    for module in opened.modules:
        opened.metric(module.name)
        opened.weight(module.name)


def read_texts(folder: Path, out: Path) -> None:
    for name in ("data.jsonl", "data.txt"):
        with contextlib.suppress(VLoRAError):
            read_examples(folder / name)
    read_examples(folder / "data.jsonl")


READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path, Path], None]]] = {
    "a PEFT adapter": (adapter, read_adapter),
    "a sharded adapter": (sharded, read_adapter),
    "an adapter of a .bin": (pickled, read_adapter),
    "an adapter of fused experts": (fused, split),
    "an adapter of mlx-lm": (mlx, read_adapter),
    "a checkpoint of format 1": (stored("format1"), read_checkpoint),
    "a checkpoint of format 2": (stored("format2"), read_checkpoint),
    "a checkpoint of format 4": (stored("format4"), read_checkpoint),
    "a checkpoint of format 5": (stored("format5"), read_checkpoint),
    "a checkpoint with attachments": (with_attachments, read_checkpoint),
    "a checkpoint with a router": (with_router, read_routed),
    "vlora's files": (stored("seeds/vlora-1.0.0-float"), read_foreign),
    "vlora's packed files": (stored("seeds/vlora-1.0.0-nf4"), read_foreign),
    "lorashare's files": (stored("seeds/lorashare-0.1.3-heads"), read_foreign),
    "a calibration": (calibration, read_calibration),
    "data files": (texts, read_texts),
}


@pytest.mark.parametrize("reader", READERS)
def test_damage_is_an_error_of_ours(reader: str, tmp_path: Path) -> None:
    attack(reader, scaled(25), tmp_path)


@pytest.mark.attacks_long
@pytest.mark.parametrize("reader", READERS)
def test_much_damage_is_an_error_of_ours(
    reader: str, tmp_path: Path, tally: Callable[[str, int], None]
) -> None:
    count = scaled(1000)
    attack(reader, count, tmp_path)
    tally(reader, count)


def attack(reader: str, count: int, scratch: Path) -> None:
    make, read = READERS[reader]
    whole = scratch / "whole"
    whole.mkdir()
    make(whole)
    files: Files = {
        path.relative_to(whole).as_posix(): path.read_bytes()
        for path in sorted(whole.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }
    if reader != "an adapter of a .bin":
        read(whole, scratch)
    with limited():
        for number in range(count):
            random = Random(f"{reader} {number}")
            folder = scratch / "damaged"
            out = scratch / "out"
            folder.mkdir()
            out.mkdir()
            mutations.write(mutations.mutated(files, random), folder, random)
            _hold(reader, number, lambda f=folder, o=out: read(f, o))  # type: ignore[misc]
            shutil.rmtree(folder)
            shutil.rmtree(out)


def _hold(reader: str, number: int, call: Callable[[], None]) -> None:
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        call()
    except VLoRAError as error:
        said = str(error)
        said.encode()
        assert "\n" not in said, f"{reader}, input {number}: {said!r}"
    except BaseException as error:
        error.add_note(f"{reader}, input {number}") if hasattr(error, "add_note") else None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert time.monotonic() - began < SECONDS, f"{reader}, input {number}: slow"


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """So much more memory than now and no more, and an alarm that raises."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + (GIGABYTES << 30)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


# --- what needs no chance -------------------------------------------------------------------------


def in_child(code: str) -> str:
    """The last line that a process prints that runs this code; a signal that ends it fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_an_adapter_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    adapter(tmp_path)
    big = {f"{PREFIX}{Q}.lora_A.weight": torch.ones(2, 1 << 16)}
    save_file(lora_tensors() | big, tmp_path / "adapter_model.safetensors")
    said = in_child(f"""
        import os
        from vllm_vlora.adapters.peft_folder import open_adapter
        from vllm_vlora.errors import AdapterError
        adapter = open_adapter({str(tmp_path)!r})
        factors = adapter.iter_factors()
        name, (a, b) = next(factors)
        os.truncate(adapter.path / "adapter_model.safetensors", 4096)
        print(float(a.sum()))
        try:
            dict(factors)
        except AdapterError as error:
            print(error)
    """)
    assert "was cut" in said


def test_a_rank_whose_square_is_no_matter_of_its_file(tmp_path: Path) -> None:
    adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {
        "r": 60000,
        "rank_pattern": {},
        "target_modules": ["q_proj"],
        "modules_to_save": None,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"{PREFIX}{Q}.lora_A.weight": torch.ones(60000, 1),
        f"{PREFIX}{Q}.lora_B.weight": torch.ones(1, 60000),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(VLoRAError, match="rank 60000 is above 1024"):
        open_adapter(tmp_path)


def test_components_that_are_more_than_their_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "share"
    stored("seeds/lorashare-0.1.3-heads")(folder)
    path = folder / "shared_components.safetensors"
    tensors = {name: torch.ones(1, 60000) for name in load_file(path)}
    save_file(tensors, path)
    with limited(), pytest.raises(VLoRAError, match="60000 components of 1 numbers"):
        convert(folder, tmp_path / "out")


def test_a_tensor_without_elements_of_an_impossible_shape(tmp_path: Path) -> None:
    adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["x"] = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(VLoRAError, match="impossible shape"):
        open_adapter(tmp_path)


def test_files_grown_without_a_byte_written(tmp_path: Path) -> None:
    stored("format2")(tmp_path)
    os.truncate(tmp_path / "tasks" / "rows.safetensors", 60 << 30)
    with limited(), pytest.raises(VLoRAError, match="the manifest says"):
        Checkpoint.open(tmp_path).load_task("rows")
    os.truncate(tmp_path / "tasks.json", 60 << 30)
    with limited(), pytest.raises(VLoRAError, match="the manifest says"):
        Checkpoint.open(tmp_path)
    stored("format4")(tmp_path / "many")
    os.truncate(tmp_path / "many" / "tasks.records", 60 << 30)
    with limited(), pytest.raises(VLoRAError, match="the index says"):
        Checkpoint.open(tmp_path / "many")
    os.truncate(tmp_path / "many" / "tasks.index", 60 << 30)
    with limited(), pytest.raises(VLoRAError, match="the manifest says"):
        Checkpoint.open(tmp_path / "many")
    os.truncate(tmp_path / "vlora_config.json", 60 << 30)
    with limited(), pytest.raises(VLoRAError, match="larger than"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": mutations.Raw("1" + "0" * 400)}, "401 digits"),
        ({"lora_alpha": 1e308}, "a number that float32 holds"),
        ({"rank_pattern": {"(" * 5000 + ")" * 5000: 2}}, "nested too deep"),
        ({"rank_pattern": {"a{99999999999}": 2}}, "no regular expression"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path is"),
        ({"x": mutations.Raw(mutations.NESTED)}, "nested deeper"),
        ({"base_model_name_or_path": mutations.Raw('"\\ud800"')}, "lone surrogate"),
        ({"x": mutations.Raw('{"a": 1, "a": 2}')}, "stands twice"),
    ],
)
def test_configs_that_ended_in_a_traceback(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(mutations.dumped(json.loads(path.read_text()) | change))
    with pytest.raises(VLoRAError, match=words):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    "name", ["tasks.json", "attachments.json", "router.json", "vlora_config.json"]
)
def test_a_key_that_stands_twice_in_a_manifest(name: str, tmp_path: Path) -> None:
    """Which of the two counts would be chance; also in the compact form that msgspec writes itself."""
    with_attachments(tmp_path)
    with_router(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    text = mutations.dumped(json.loads(files[name]))
    key = next(iter(json.loads(text)))
    files[name] = f'{{"{key}":{mutations.dumped(json.loads(text)[key])},{text[1:]}'.encode()
    mutations.refit(files, keep=name)
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(VLoRAError, match=f"key '{key}' stands twice"):
        _ = Checkpoint.open(tmp_path).content_digest


def test_sixty_thousand_names(tmp_path: Path) -> None:
    """Counting them takes no time that grows with their square."""
    stored("seeds/vlora-1.0.0-float")(tmp_path)
    path = tmp_path / "subspace_meta.json"
    names = [f"task {number}" for number in range(60000)]
    meta = json.loads(path.read_text()) | {"task_ids": names, "task_filenames": {}}
    path.write_text(json.dumps(meta))
    began = time.monotonic()
    with pytest.raises(VLoRAError, match="missing"):
        convert(tmp_path, tmp_path / "out")
    assert time.monotonic() - began < 30
