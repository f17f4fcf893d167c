"""Compress very many adapters of a 7B model's shapes: seconds a module, memory, reads, and the floor."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from harness import (
    RESULTS,
    comma_list,
    count_list,
    cpu_name,
    end_record,
    in_another_process,
    print_record,
    record,
    write_json,
)

from vllm_vlora.adapters.peft_folder import Adapter, Factors, open_adapter
from vllm_vlora.checkpoint.report import CompressReport
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.timing import best_seconds

DESCRIPTION = """\
Write synthetic PEFT adapters (bfloat16, a family around common directions) to a folder, compress them,
and report for each representation: seconds of each stage, peak memory of this process and of the
largest worker, how often each adapter's modules were read, bytes of the checkpoint, and what all 224
linear modules of a Llama-7B would take with the same number of adapters. The folder is removed again.

The floor is the time to read the weights once at --disk-gb-s, and to do the products with the factors
that fitting and measuring a basis of 1024 components take, at the speed of a large float32 product on
one thread. It leaves out orthogonalising, packing and writing.
"""
EXAMPLES = """\
  python benchmarks/run.py scale --quick              a check that it runs, some seconds
  python benchmarks/run.py scale                      1000 adapters of two modules
  python benchmarks/run.py scale --adapters 250,1000  memory and reads against the number of adapters
"""
# Llama-7B, a layer: q, k, v, o; gate, up; down.
LAYERS = 32
SQUARE, WIDE = ("q_proj", 4096, 4096), ("down_proj", 11008, 4096)
PER_LAYER = {"q_proj": 4, "down_proj": 3}
QUICK = (("q_proj", 256, 256), ("down_proj", 704, 256))
# The widest basis that compress fits of its own accord, and the products with its components that a
# number of a factor takes part in: twice in each of three passes, once for the widths, once in each of
# three number formats.
COMPONENTS = 1024
PRODUCTS = 2 * 3 + 1 + 3
# Common directions of the synthetic adapters.
COMMON = 48


@dataclass(frozen=True)
class CountingAdapter(Adapter):
    """Notes every read of a module in a file of the reading process."""

    def factors(self, name: str) -> Factors:
        """As of ``Adapter``."""
        _note(self, name)
        return super().factors(name)

    def iter_factors(self, names: Any = None) -> Any:
        """As of ``Adapter``."""
        for name, found in super().iter_factors(names):
            _note(self, name)
            yield name, found


def _note(adapter: Adapter, name: str) -> None:
    with (adapter.path.parent / "reads" / str(os.getpid())).open("a") as file:
        file.write(f"{adapter.path.name} {name}\n")


def run(args: argparse.Namespace) -> int:
    """Write, compress, print and keep the figures."""
    torch.set_num_threads(1)
    report = describe_run(args)
    print_record(report)
    for count in args.adapters:
        folder = Path(tempfile.mkdtemp(prefix="vllm-vlora-scale-", dir=args.folder))
        try:
            adapters = write_adapters(folder, count, args)
            for representation in args.representations:
                # Each in a process of its own, so that peaks of memory are its own too.
                cell = in_another_process(
                    measure, folder, adapters, representation, args, report["float32_gflops"]
                )
                report["cells"].append(cell)
                print(format_cell(cell), flush=True)
        finally:
            shutil.rmtree(folder)
    end_record(report)
    write_json(args.json, report)
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The adapters, what is made of them, and the machine that is extrapolated to."""
    parser.add_argument("--adapters", type=count_list, help="numbers (default: 1000)")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (default: 16)")
    parser.add_argument("--ratio", type=float, default=8.0, help="wanted (default: 8)")
    parser.add_argument("--representations", type=comma_list, default=["auto", "joint"])
    parser.add_argument("--modules", type=comma_list, default=["q_proj", "down_proj"])
    parser.add_argument("--executor", default="serial", help="of compress (default: serial)")
    parser.add_argument("--jobs", type=int, default=0, help="of the executor (default: its own)")
    parser.add_argument("--folder", help="where to write the adapters (default: the system's own)")
    parser.add_argument("--disk-gb-s", type=float, default=2.0, help="of the floor (default: 2)")
    parser.add_argument("--cores", type=int, default=8, help="of the laptop (default: 8)")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What is not given; ends the program where the options cannot be run."""
    if args.adapters is None:
        args.adapters = [12] if args.quick else [1000]
    if args.json is None and not args.quick:
        args.json = RESULTS / "scale-cpu.json"
    shapes = QUICK if args.quick else (SQUARE, WIDE)
    args.shapes = [shape for shape in shapes if shape[0] in args.modules]
    if len(args.shapes) != len(args.modules):
        parser.error(f"--modules are of {', '.join(PER_LAYER)}, got {','.join(args.modules)}")


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the command; ``cells`` is still empty."""
    report = record(args, cpu_name(), "torch")
    return {
        "benchmark": "scale",
        **report,
        "torch": report["versions"]["torch"],
        "python": report["versions"]["python"],
        "executor": f"{args.executor} {args.jobs}".strip(),
        "float32_gflops": product_gflops(args.quick),
        "disk_gb_s": args.disk_gb_s,
        "cells": [],
    }


def product_gflops(quick: bool) -> float:
    """Speed of a large float32 product on one thread."""
    n = 512 if quick else 2048
    a = torch.randn(n, n)
    return 2 * n**3 / best_seconds(lambda: a @ a) / 1e9


def write_adapters(folder: Path, count: int, args: argparse.Namespace) -> list[str]:
    """Adapters that mix common directions, of falling weight, with parts of their own."""
    (folder / "reads").mkdir()
    generator = torch.Generator().manual_seed(0)
    fall = torch.logspace(0, -1, COMMON)
    common = {
        name: (torch.randn(COMMON, d_in), torch.randn(COMMON, d_out))
        for name, d_in, d_out in args.shapes
    }
    config = {
        "peft_type": "LORA",
        "r": args.rank,
        "lora_alpha": 2 * args.rank,
        "target_modules": sorted(name for name, _, _ in args.shapes),
        "base_model_name_or_path": "synthetic/7b",
    }
    names = []
    for number in range(count):
        tensors = {}
        for name, d_in, d_out in args.shapes:
            for side, d, rows in (("A", d_in, common[name][0]), ("B", d_out, common[name][1])):
                mix = torch.randn(args.rank, COMMON, generator=generator) * fall
                value = mix @ rows / COMMON**0.5 + 0.3 * torch.randn(args.rank, d)
                value = value.T.contiguous() * 0.02 if side == "B" else value
                key = f"base_model.model.model.layers.0.{name}.lora_{side}.weight"
                tensors[key] = value.to(torch.bfloat16)
        names.append(f"task{number:04d}")
        (folder / names[-1]).mkdir()
        safetensors.torch.save_file(tensors, folder / names[-1] / "adapter_model.safetensors")
        (folder / names[-1] / "adapter_config.json").write_text(json.dumps(config))
    return names


def measure(
    folder: Path,
    names: Sequence[str],
    representation: str,
    args: argparse.Namespace,
    gflops: float,
) -> dict[str, Any]:
    """Compress once; everything that is reported of it."""
    torch.set_num_threads(1)
    adapters = {}
    for name in names:
        opened = open_adapter(folder / name)
        adapters[name] = CountingAdapter(
            **{f.name: getattr(opened, f.name) for f in fields(opened)}
        )
    for old in (folder / "reads").iterdir():
        old.unlink()
    before = _peak_mb()
    stages = Stages()
    options = CompressOptions(
        representation, ratio=args.ratio, executor=args.executor, jobs=args.jobs
    )
    started, cpu = time.monotonic(), _cpu_seconds()
    done = compress(adapters, folder / "out", options, progress=stages)
    seconds, cpu = time.monotonic() - started, _cpu_seconds() - cpu
    stages.close()
    shutil.rmtree(folder / "out")
    reads = Counter[str]()
    for path in (folder / "reads").iterdir():
        reads.update(path.read_text().splitlines())
    modules = len(args.shapes)
    cell = {
        "representation": representation,
        "adapters": len(names),
        "modules": {name: [d_in, d_out] for name, d_in, d_out in args.shapes},
        "rank": args.rank,
        "chosen": f"{done.representation} {done.format}",
        "ratio": done.original_nbytes / done.nbytes,
        "worst_error": max(task.error for task in done.tasks),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "stage_seconds": stages.seconds,
        "cpu_ms_per_task_and_module": 1e3 * cpu / len(names) / modules,
        "peak_mb_before": before,
        "peak_mb": _peak_mb(),
        "largest_worker_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "reads_per_task_and_module": sorted(set(reads.values())),
        "read_gb": sum(reads.values()) / modules * adapters[names[0]].original_nbytes / 1e9,
    }
    return cell | {"all_modules": extrapolate(cell, done, args, gflops)}


class Stages:
    """Seconds between the first call of a stage and the first of the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._now, self._since = "", time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A progress callback."""
        if stage != self._now:
            self.close()
            self._now = stage
        elif done == total:
            # What follows until another stage begins is planning.
            self.close()
            self._now = "plan"

    def close(self) -> None:
        """End the stage that runs."""
        now = time.monotonic()
        if self._now:
            self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._since = now


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def extrapolate(
    cell: dict[str, Any], done: CompressReport, args: argparse.Namespace, gflops: float
) -> dict[str, float]:
    """All linear modules of a Llama-7B, at the same cost for each number of a factor."""
    count = cell["adapters"]
    here = sum(d_in + d_out for _, d_in, d_out in args.shapes)
    whole = LAYERS * sum(PER_LAYER[name] * (d_in + d_out) for name, d_in, d_out in (SQUARE, WIDE))
    times = whole / here
    originals_gb = times * done.original_nbytes / 1e9
    core_hours = cell["cpu_seconds"] * times / 3600
    floor_flop = 2 * PRODUCTS * COMPONENTS * args.rank * whole * count
    modules = LAYERS * sum(PER_LAYER.values())
    return {
        "modules": modules,
        "originals_gb": originals_gb,
        "core_hours": core_hours,
        "hours_on_cores": core_hours / args.cores,
        "cores": args.cores,
        "floor_core_hours": floor_flop / gflops / 1e9 / 3600,
        "read_gb": cell["read_gb"] * times,
        "read_hours": cell["read_gb"] * times / args.disk_gb_s / 3600,
        "floor_read_hours": originals_gb / args.disk_gb_s / 3600,
        "tasks_times_modules": modules * count,
    }


def format_cell(cell: dict[str, Any]) -> str:
    whole = cell["all_modules"]
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in cell["stage_seconds"].items())
    reads = "-".join(map(str, cell["reads_per_task_and_module"]))
    return (
        f"{cell['representation']}: {cell['adapters']} adapters, {len(cell['modules'])} modules -> "
        f"{cell['chosen']}, ratio {cell['ratio']:.2f}, worst error {cell['worst_error']:.3f}\n"
        f"  {cell['seconds']:.1f} s ({stages}); {cell['cpu_seconds']:.1f} s of CPU, "
        f"{cell['cpu_ms_per_task_and_module']:.1f} ms a task and module\n"
        f"  peak {cell['peak_mb']:.0f} MB ({cell['peak_mb_before']:.0f} before), largest worker "
        f"{cell['largest_worker_mb']:.0f} MB; each module of each adapter read {reads} times, "
        f"{cell['read_gb']:.1f} GB\n"
        f"  all {whole['modules']} modules: {whole['core_hours']:.1f} core hours, "
        f"{whole['hours_on_cores']:.1f} h on {whole['cores']} cores (floor of the products "
        f"{whole['floor_core_hours']:.1f} core hours)\n"
        f"  and {whole['read_gb']:.0f} GB read, {whole['read_hours']:.2f} h at the disk's speed (once: "
        f"{whole['floor_read_hours']:.2f} h)"
    )
