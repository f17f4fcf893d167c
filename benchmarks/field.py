"""Compressing at field scale: CPU milliseconds a module and adapter of an 8B model, and tiny adapters."""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    cores,
    count,
    cpu_name,
    end_record,
    in_another_process,
    print_record,
    record,
    table,
    write_json,
)
from safetensors.torch import save_file

from vllm_vlora.planning.survey import MOST_COMPONENTS
from vllm_vlora.timing import best_seconds

DESCRIPTION = """\
Compress synthetic adapters and count the CPU time (user and system, all processes), which other work on
the machine changes less than the clock's:

  8b-private, 8b-auto   one layer of an 8B model (4096 wide, 14336 inside, 1024 for keys and values),
                        rank 16, bfloat16, nothing in common, eight times smaller. A layer has too few
                        modules for bases to be tried on some of them: auto fits them all
  8b-family             the same of adapters that share: all but a hundredth of their rows' energy lies
                        in 32 directions of either side
  tiny                  many adapters of four 64 x 64 modules, rank 4, float32, four times smaller
  analyze               ten adapters with all 210 modules of SmolLM2-135M, rank 16, float32

All of an 8B model (224 modules) is extrapolated from the layer, and says so: private storage of all
modules, and bases on the 21 modules on which they are tried where they do not pay. With --layers 32 it is
compressed as a whole, in as many processes as the machine has cores, as a user's is.

The floor of private storage: the weights read once, seven roundings as one copy in float32 each, and the
products of the Gram matrices in float64 and float32 at the speed of this machine on one thread. It leaves
out codes, small decompositions and writing. The floor of bases: the operations of their fit (Gram
matrices, eigenvectors, directions) and of measuring their widths once, at the speed of float32 products;
it leaves out packing and what is done in float64.
"""
EXAMPLES = """\
  python benchmarks/run.py compress --quick                  a check that it runs
  python benchmarks/run.py compress                          some minutes
  python benchmarks/run.py compress --cells 8b-auto --adapters 100
  python benchmarks/run.py compress --cells 8b-auto --adapters 100 --layers 32 --rounds 1
                                                             a whole 8B model; 17 GB of disk
"""
WIDE, INSIDE, NARROW, RANK = 4096, 14336, 1024, 16
LAYERS, ADAPTERS, TRIED = 32, 100, 21
LAYER = {
    "self_attn.q_proj": (WIDE, WIDE),
    "self_attn.k_proj": (WIDE, NARROW),
    "self_attn.v_proj": (WIDE, NARROW),
    "self_attn.o_proj": (WIDE, WIDE),
    "mlp.gate_proj": (WIDE, INSIDE),
    "mlp.up_proj": (WIDE, INSIDE),
    "mlp.down_proj": (INSIDE, WIDE),
}
SMOL = {
    f"layers.{layer}.{name}": shape
    for layer in range(30)
    for name, shape in {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (576, 192),
        "self_attn.v_proj": (576, 192),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (576, 1536),
        "mlp.up_proj": (576, 1536),
        "mlp.down_proj": (1536, 576),
    }.items()
}
TINY = {f"layers.{n // 2}.self_attn.{'qv'[n % 2]}_proj": (64, 64) for n in range(4)}
QUICK = {"mlp.up_proj": (256, 512)}
CELLS = ("8b-private", "8b-auto", "8b-family", "tiny", "analyze")
PARENTS = 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which cells, and how many adapters."""
    parser.add_argument("--cells", type=lambda text: text.split(","), default=list(CELLS))
    parser.add_argument("--adapters", type=count, help="of the 8B layer (default: 20)")
    parser.add_argument("--layers", type=count, default=1, help="of the 8B cells (default: 1)")
    parser.add_argument("--tiny", type=count, help="tiny adapters (default: 1000)")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Numbers that are not given; ends the program where there is no such cell."""
    unknown = sorted(set(args.cells) - set(CELLS))
    if unknown:
        parser.error(f"--cells: no {', '.join(unknown)}; there are {', '.join(CELLS)}")
    args.adapters = args.adapters or (3 if args.quick else 20)
    args.tiny = args.tiny or (10 if args.quick else 1000)
    args.rounds = 1 if args.quick else args.rounds or 2


def run(args: argparse.Namespace) -> int:
    """Measure in turns, print a table, write JSON; returns the exit status."""
    report = record(args, f"{cpu_name()}, {cores()} cores", "torch")
    print_record(report)
    layer = QUICK if args.quick else LAYER
    model = {
        f"layers.{n}.{name}": shape for n in range(args.layers) for name, shape in layer.items()
    }
    collections = {
        "8b-private": (model, args.adapters, RANK, torch.bfloat16),
        "8b-auto": (model, args.adapters, RANK, torch.bfloat16),
        "8b-family": (model, args.adapters, RANK, torch.bfloat16, PARENTS),
        "tiny": (TINY, args.tiny, 4, torch.float32),
        "analyze": (dict(list(SMOL.items())[:3]) if args.quick else SMOL, 10, RANK, torch.float32),
    }
    report["cells"] = {name: [] for name in args.cells}
    with tempfile.TemporaryDirectory(prefix="bench-field-") as folder:
        for name in args.cells:
            write(Path(folder) / name, *collections[name])
        for _ in range(args.rounds):
            for name in args.cells:
                found = in_another_process(measure, name, str(Path(folder) / name), args.layers > 1)
                report["cells"][name].append(found)
    pairs = {name: len(shapes) * many for name, (shapes, many, *_) in collections.items()}
    report["floor_ms"] = floor_ms(layer)
    report["bases_floor_s"] = bases_floor_s(layer, args.adapters)
    report["summary"] = summarise(report["cells"], pairs, len(model))
    if args.layers > 1:
        # Bases are tried on some modules only, so that nothing is said of the others.
        report["summary"]["extrapolated_cpu_s"].clear()
    rows = [
        [n, f"{s['cpu_s']:.2f}", f"{s['clock_s']:.1f}", f"{s['ms']:.2f}", f"{s['peak_gb']:.2f}"]
        for n, s in report["summary"]["cells"].items()
    ]
    head = ["", "CPU s", "clock, s", "CPU ms a module and adapter", "GB of the largest process"]
    print(table(head, rows))
    print(
        f"floor of private storage: {report['floor_ms']:.2f} ms a module and adapter of the layer; of "
        f"bases: {report['bases_floor_s']:.2f} s a module of {args.adapters} adapters"
    )
    for name, seconds in report["summary"]["extrapolated_cpu_s"].items():
        print(
            f"extrapolated, {ADAPTERS} adapters of {LAYERS * len(LAYER)} modules, {name}: "
            f"{seconds:.0f} CPU s, {seconds / 120:.1f} min on two quiet cores"
        )
    end_record(report)
    write_json(args.json, report)
    return 0


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    many: int,
    rank: int,
    dtype: torch.dtype,
    parents: int = 0,
) -> None:
    """PEFT adapters with nothing in common, or with so many rows of A and columns of B."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.arange(1, rank + 1)[:, None] ** -0.5
    common = {
        d: torch.randn(parents, d, generator=generator) / max(parents, 1) ** 0.5
        for d in sorted({d for shape in shapes.values() for d in shape})
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "synthetic",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "bias": "none",
    }
    for number in range(many):
        tensors = {}
        for name, (d_in, d_out) in shapes.items():
            a, b = (0.1 * levels * torch.randn(rank, d, generator=generator) for d in (d_in, d_out))
            if parents:
                mixture = torch.randn(rank, parents, generator=generator)
                a, b = (0.1 * x + 0.1 * levels * mixture @ common[x.shape[1]] for x in (a, b))
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.T.to(dtype).contiguous()
        path = folder / f"adapter-{number:04d}"
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(name: str, folder: str, whole: bool) -> dict[str, Any]:
    """Seconds and peak memory of one cell; in a process of its own, whose imports are left out.

    Args:
        whole: use all cores, and not one thread.
    """
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.compression.options import CompressOptions
    from vllm_vlora.compression.pipeline import compress
    from vllm_vlora.merging.comparing import analyze_adapters

    if not whole:
        torch.set_num_threads(1)
    used, begun = _cpu_seconds(), time.monotonic()
    adapters = {path.name: open_adapter(path) for path in sorted(Path(folder).iterdir())}
    found: dict[str, Any] = {}
    if name == "analyze":
        analyze_adapters(adapters, 0.9, lambda *_: None)
    else:
        options = CompressOptions(
            representation="private" if name == "8b-private" else "auto",
            ratio=4.0 if name == "tiny" else 8.0,
            executor="auto" if whole else "serial",
        )
        with tempfile.TemporaryDirectory() as output:
            report = compress(adapters, Path(output) / "out", options)
        found = {"representation": report.representation, "mean_error": report.mean_error}
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(who).ru_maxrss for who in both) * 1024
    return found | {
        "cpu_s": _cpu_seconds() - used,
        "clock_s": time.monotonic() - begun,
        "peak_nbytes": peak,
    }


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in used)


def summarise(
    cells: Mapping[str, Sequence[Mapping[str, Any]]], pairs: Mapping[str, int], modules: int
) -> dict[str, Any]:
    """The turn of each cell that took least, and what it means for a whole 8B model."""
    best = {name: min(runs, key=lambda found: found["cpu_s"]) for name, runs in cells.items()}
    least = {name: found["cpu_s"] for name, found in best.items()}
    shown = {
        name: {
            "cpu_s": found["cpu_s"],
            "clock_s": found["clock_s"],
            "ms": 1e3 * found["cpu_s"] / pairs[name],
            "peak_gb": found["peak_nbytes"] / 1e9,
        }
        for name, found in best.items()
    }
    whole: dict[str, float] = {}
    if "8b-private" in least:
        whole["private"] = shown["8b-private"]["ms"] / 1e3 * LAYERS * len(LAYER) * ADAPTERS
        if "8b-auto" in least:
            # Of as many adapters as were measured: a basis of more costs more.
            bases = (least["8b-auto"] - least["8b-private"]) / modules
            whole["auto where sharing does not pay"] = whole["private"] + TRIED * bases
            whole["auto where it does"] = whole["private"] + LAYERS * len(LAYER) * bases
    return {"cells": shown, "extrapolated_cpu_s": whole}


def floor_ms(layer: Mapping[str, tuple[int, int]]) -> float:
    """Of private storage of a module and adapter, mean over the layer."""
    torch.set_num_threads(1)
    width = sum(d_in + d_out for d_in, d_out in layer.values()) / len(layer)
    numbers = RANK * int(width)
    source = torch.randn(numbers)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), 50)
    rates = {dtype: _product_rate(dtype) for dtype in (torch.float32, torch.float64)}
    product = 2 * RANK * numbers
    # Gram matrices and the leading factors; then four formats of these (one three times as wide on both
    # sides), and two of the own factors, with their changes and themselves.
    wide, narrow = 2 * product, (3 * 2 + 3 + 9 + 2 * 2 + 2) * product
    return 1e3 * (7.5 * copy + wide / rates[torch.float64] + narrow / rates[torch.float32])


def bases_floor_s(layer: Mapping[str, tuple[int, int]], adapters: int) -> float:
    """Of fitting and measuring one basis for so many adapters, mean over the layer's modules."""
    torch.set_num_threads(1)
    rows, operations = RANK * adapters, 0.0
    for d in itertools.chain.from_iterable(layer.values()):
        short, wide = min(rows, d), min(rows, d, MOST_COMPONENTS)
        # A Gram matrix' half; its reduction, and its eigenvectors; then the directions themselves.
        fit = short * rows * d + 4 * short**3 + 2 * rows * d * wide
        # Products with what was fitted, and half of its Gram matrix.
        operations += fit + 2 * rows * d * wide + wide**2 * d
    return operations / _product_rate(torch.float32) / len(layer)


def _product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a square product."""
    square = torch.randn(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / best_seconds(partial(torch.mm, square, square), 5)
