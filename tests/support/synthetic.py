"""Small synthetic adapters with a known structure, and checks of a checkpoint made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import CompressReport
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.fitting.calibration import Calibration, ModuleRecord, Settings, Source
from vllm_vlora.fitting.moments import FullMoment
from vllm_vlora.representations.decode import decode

SHAPES = {"model.layers.0.q_proj": (96, 80), "model.layers.0.v_proj": (96, 40)}


def save(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    rank: int,
    generator: torch.Generator,
    *,
    parents: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kinds: dict[str, str] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    zero: bool = False,
    base: str = "org/base",
    alpha: int = 16,
    scale_up: float = 1.0,
) -> Adapter:
    factors = {}
    for name, (d_in, d_out) in shapes.items():
        a = torch.randn(rank, d_in, generator=generator)
        b = torch.randn(d_out, rank, generator=generator) * 0.01
        if parents is not None:
            parent_a, parent_b = parents[name]
            left, right = parent_b.shape[1], parent_a.shape[0]
            a = 0.05 * a + torch.randn(rank, right, generator=generator) @ parent_a
            b = 0.05 * b + 0.01 * parent_b @ torch.randn(left, rank, generator=generator)
        a *= torch.logspace(0, -1, rank)[:, None]
        a *= scale_up
        factors[name] = a.to(dtype), (b * 0 if zero else b).to(dtype)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "base_model_name_or_path": base,
    }
    if extra:
        config["modules_to_save"] = ["score"]
    write_adapter(folder, config, factors, kinds, extra)
    return open_adapter(folder)


def family(
    folder: Path,
    count: int,
    *,
    related: bool,
    seed: int = 0,
    shapes: dict[str, tuple[int, int]] = SHAPES,
    **options: Any,
) -> dict[str, Adapter]:
    """Adapters around three common directions, or with nothing in common."""
    generator = torch.Generator().manual_seed(seed)
    parents = None
    if related:
        parents = {
            name: (
                torch.randn(3, d_in, generator=generator),
                torch.randn(d_out, 3, generator=generator),
            )
            for name, (d_in, d_out) in shapes.items()
        }
    return {
        f"task{i}": save(
            folder / f"task{i}", shapes, 4 + i % 2, generator, parents=parents, **options
        )
        for i in range(count)
    }


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    a, b = adapter.factors(name)
    return adapter.modules[name].scale * b.double() @ a.double()


def check(path: Path, adapters: dict[str, Adapter], report: CompressReport) -> Checkpoint:
    """Sizes against the files, errors against dense float64."""
    checkpoint = Checkpoint.open(path)
    shared = {(name, kind): basis for name, kind, basis in checkpoint.shared()}
    heads = sum(
        math.prod(shape) * dtype.itemsize
        for adapter in adapters.values()
        for dtype, shape in adapter.extra.values()
    )
    files = sum(file.stat().st_size for file in path.rglob("*.safetensors")) - heads
    assert report.nbytes == files == checkpoint.nbytes
    assert report.original_nbytes == checkpoint.original_nbytes
    assert not list(path.glob(".*"))
    assert [task.task_id for task in report.tasks] == list(adapters) == list(checkpoint.tasks)
    for task in report.tasks:
        adapter, lost, norm = adapters[task.task_id], 0.0, 0.0
        stored = checkpoint.load_task(task.task_id)
        record = checkpoint.record(task.task_id)
        assert list(stored.modules) == list(adapter.modules)
        for segment in record.segments:
            name = checkpoint.modules[segment.module].name
            a, b = decode(stored.modules[name], shared.get((name, segment.representation)))
            wanted = dense(adapter, name)
            difference = float((b.double() @ a.double() - wanted).square().sum())
            square = float(wanted.square().sum())
            if square:
                assert segment.error == pytest.approx(
                    math.sqrt(difference / square), rel=1e-4, abs=1e-6
                )
            lost, norm = lost + difference, norm + square
        expected = math.sqrt(lost / norm) if norm else 0.0
        assert task.error == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert record.error == task.error
    return checkpoint


def run(adapters: dict[str, Adapter], out: Path, **options: Any) -> CompressReport:
    return compress(adapters, out, CompressOptions(**options), force=True)


SOURCE = Source(
    base_model="org/base",
    data=["text.jsonl"],
    data_sha256="0" * 64,
    examples=400,
    tokens=400,
    gradient_tokens=400,
    settings=Settings(400, 100, 4, True, 2048, 256, "float32"),
    versions={},
)


def calibration_of(folder: Path, shapes: dict[str, tuple[int, int]] = SHAPES) -> Path:
    """Moments of inputs that use few directions, and of modules that matter unequally."""
    generator = torch.Generator().manual_seed(11)
    records, moments = [], []
    for number, (name, (d_in, d_out)) in enumerate(shapes.items()):
        inputs = torch.randn(400, d_in, generator=generator) * torch.logspace(0, -2, d_in)
        gradients = torch.randn(400, d_out, generator=generator) * 10.0**-number
        moments += [FullMoment(x.T @ x / len(x)) for x in (inputs, gradients)]
        records.append(ModuleRecord(name, d_in, d_out, 2 * number, 2 * number + 1))
    Calibration(SOURCE, records, moments).save(folder)
    return folder
