"""Time the kernels of a LoRA forward pass and of a task's activation, against vLLM's own on one GPU."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import floors
import torch
from activation.ways import run_activation
from clock import Rates, l2_nbytes, measure_rates
from harness import WrongResultError, print_record, record, say, write_json

from kernelbench import report
from kernelbench.batches import Cell
from kernelbench.cells import Settings, cells, run_cell
from kernelbench.forward import format_name
from kernelbench.plot import draw
from kernelbench.punica import Punica, load
from kernelbench.report import Floors, Row

DESCRIPTION = """\
Time one linear layer of a model at a time, and the activation of a whole task, on the device.

  base                 the layer itself, torch's matrix product
  punica               vLLM's lora_shrink and lora_expand, from slots that hold the tasks
  direct-joint         shared bases and the tasks' cores (k components)
  direct-private       packed factors, read where they lie; for vLLM's slots the same tasks
  materialize-private  a whole task into a slot, from packed factors on the device
  materialize-joint    the same from packed bases and the task's cores
  activate-stock       every A and B of a slot zeroed, then copied from pinned host memory
  copy-pinned          all of an adapter's bytes in one copy from pinned host memory
  activate-direct      a resident task's records into the slot table

Before a cell is timed, each of its operations is compared with float64, token by token, on fresh random
inputs with new memory poisoned. One that is wrong has no figure, and the exit status is 1.

All operations of a cell take turns, so that a drift of the machine hits all alike. Each has as many
copies of its weights as it takes to fill the cache twice, and goes through them in turn: in a model the
weights of a layer are not in the cache either. x and y are shared by the copies, as a layer finds them
just written. The main figure is the device's time in a CUDA graph, which is how vLLM runs decode (in
prefill it is what is left when the host runs ahead); eager beside it is from the call to the end of the
device's work, host included.

Floors are bytes and operations (floors.py) over the rates that this run measures on the device.
"""
EXAMPLES = """\
  python benchmarks/run.py kernels --json out.json --plot out.png
  python benchmarks/run.py kernels --quick                        what the aims need of llama-7b
  python benchmarks/run.py kernels --shapes llama-8b --k 64 --tasks 1 64 --punica FOLDER
  python benchmarks/run.py kernels --device cpu --tiny            the program without a GPU; slow
  python benchmarks/run.py roofline --measured out.json                 the same rows, other rates
"""
MODELS = {**floors.MODELS, "tiny": floors.llama("tiny", 2, 128, 192, 64)}
FORMATS = ("float", "int8", "nf4", "nf4-dq", "nf4-narrow", "trellis")
PRESETS: dict[str, dict[str, Any]] = {
    "full": {
        "shapes": ["llama-7b", "llama-70b"],
        "k": [32, 64, 128],
        "formats": ["float", "int8", "nf4"],
        "tasks": [1, 4, 16, 64, 256],
        "prefill_tokens": [2048, 8192],
        "prefill_tasks": [1, 8, 64],
        "rounds": 20,
    },
    "quick": {
        "shapes": ["llama-7b"],
        "k": [64],
        "formats": ["float", "nf4"],
        "tasks": [1, 64],
        "prefill_tokens": [2048],
        "prefill_tasks": [8],
        "rounds": 10,
    },
    "tiny": {
        "shapes": ["tiny"],
        "modules": ["qkv_proj"],
        "rank": 8,
        "k": [16],
        "formats": ["float", "nf4", "nf4-narrow", "trellis"],
        "tasks": [2],
        "prefill_tokens": [],
        "prefill_tasks": [1],
        "rounds": 1,
    },
}
# Decode batches of this many tokens are also run with fewer tasks than tokens.
DECODE_TOKENS = 64
WARM_UP = 3


def run(args: argparse.Namespace) -> int:
    """Measure, then print and write everything; the exit status is 1 when a result was wrong."""
    device = torch.device(args.device)
    if device.type == "cpu":
        # Read when the kernels are imported, which happens when they are first used.
        os.environ["TRITON_INTERPRET"] = "1"
    settings = make_settings(args, device)
    punica = load_punica(args, device)
    rates = measure_rates(device, settings.dtype)
    header = describe(args, settings, punica, rates)
    print_header(header)
    limits = Floors.of(header["device"], rates)
    found = measure(settings, punica, limits, args.budget, partial(keep, header, args.json))
    show(header, found, args)
    return int(bool(found.wrong))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where to run, and on what."""
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny shapes, to try the program; no time means anything",
    )
    parser.add_argument(
        "--punica",
        metavar="FOLDER",
        type=Path,
        help="a copy of vllm/lora/ops/triton_ops, where vLLM is not installed",
    )
    parser.add_argument(
        "--budget", type=float, metavar="S", help="begin no cell after so many seconds"
    )
    parser.add_argument(
        "--no-activation",
        action="store_true",
        help="the forward pass only, no activation of a task",
    )
    add_work_options(parser)


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """The shapes, the tasks and the batches."""
    parser.add_argument(
        "--shapes", nargs="+", choices=MODELS, help="models (default: llama-7b llama-70b)"
    )
    parser.add_argument(
        "--modules",
        nargs="+",
        choices=[layer.name for layer in MODELS["tiny"].layers],
        help="of a layer (default: all; the sums, the plot and most aims need all)",
    )
    parser.add_argument("--rank", type=int, help="of every task and of the slots (default: 16)")
    parser.add_argument(
        "--k", type=int, nargs="*", help="components of shared bases (default: 32 64 128)"
    )
    parser.add_argument(
        "--formats",
        nargs="*",
        choices=FORMATS,
        help="of private factors; float is the dtype itself (default: float int8 nf4)",
    )
    parser.add_argument(
        "--tasks",
        type=int,
        nargs="*",
        help="distinct tasks in decode, with a token each, and with 64 tokens where these are more "
        "(default: 1 4 16 64 256)",
    )
    parser.add_argument(
        "--prefill-tokens", type=int, nargs="*", metavar="T", help="(default: 2048 8192)"
    )
    parser.add_argument(
        "--prefill-tasks", type=int, nargs="*", metavar="N", help="(default: 1 8 64)"
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=0,
        help="slots of the direct table and of punica's (default: as many as tasks, best for both)",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16"],
        help="of x, y, weights and slots (default: bfloat16; float16 on a CPU, where Triton's "
        "interpreter cannot multiply bfloat16)",
    )


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The preset's values where none are given; ends the program when something cannot be run."""
    if args.quick and args.tiny:
        parser.error("--quick is not allowed with --tiny")
    preset = PRESETS["tiny" if args.tiny else "quick" if args.quick else "full"]
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.rank, args.device = args.rank or 16, args.device or "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; --device cpu --tiny tries the program")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu needs --tiny: Triton's interpreter is slow")
    if args.device == "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: unset it to time compiled kernels")
    counts = [*args.k, *args.tasks, *args.prefill_tokens, *args.prefill_tasks]
    if min(counts, default=1) < 1 or args.slots < 0:
        parser.error("--k, --tasks, --prefill-tokens and --prefill-tasks start at 1")
    for path in (args.json, args.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist")
    try:
        slot_rank = floors.slot_rank(args.rank)
    except ValueError as error:
        parser.error(str(error))
    # With rank 1 the tasks' int8 scales would not lie at multiples of 16 bytes.
    if slot_rank != args.rank or args.rank == 1:
        parser.error(f"--rank must be one of {', '.join(map(str, floors.SLOT_RANKS[1:]))}")


def make_settings(args: argparse.Namespace, device: torch.device) -> Settings:
    """What the command line asks for."""
    dtype_name = args.dtype or ("float16" if device.type == "cpu" else "bfloat16")
    decode = [(tasks, tasks) for tasks in args.tasks]
    decode += [(DECODE_TOKENS, t) for t in args.tasks if t < DECODE_TOKENS and not args.tiny]
    prefill = [(t, n) for t in args.prefill_tokens for n in args.prefill_tasks if n <= t]
    return Settings(
        device=device,
        dtype=getattr(torch, dtype_name),
        models={name: MODELS[name] for name in args.shapes},
        modules=tuple(args.modules) if args.modules else None,
        rank=args.rank,
        ks=tuple(args.k),
        formats=tuple(dtype_name if name == "float" else name for name in args.formats),
        decode=tuple(decode),
        prefill=tuple(prefill),
        slots=args.slots,
        activation=not args.no_activation,
        rounds=args.rounds,
        warmup=0 if args.tiny else WARM_UP,
    )


def load_punica(args: argparse.Namespace, device: torch.device) -> Punica | None:
    """vLLM's kernels, or a line that says why there are none."""
    try:
        punica = load(args.punica, device)
    except ImportError as error:
        sys.exit(f"--punica: {error}" if args.punica else f"vLLM's kernels: {error}")
    if punica is None:
        print("punica is left out: vLLM is not installed; give its kernels with --punica FOLDER")
    return punica


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What a run has so far.

    Attributes:
        wrong: what is wrong with operations that have no rows.
        left_out: cells for which there was no time.
    """

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[Cell] = field(default_factory=list)


def measure(
    settings: Settings,
    punica: Punica | None,
    limits: Floors,
    budget: float | None,
    keep: Callable[[Measured], None],
) -> Measured:
    """Everything, kept after each cell in case the run is ended; progress goes to stderr."""
    started, found = time.monotonic(), Measured()
    formats = (format_name(settings.dtype), "nf4")
    activated = replace(settings, formats=tuple(f for f in formats if f in settings.formats))
    for cell in cells(settings):
        if budget is not None and time.monotonic() - started > budget:
            found.left_out.append(cell)
            continue
        rows, wrong = run_cell(cell, settings, punica, limits)
        found.rows += rows
        found.wrong += wrong
        for line in wrong:
            log(f"WRONG {line}", started)
        keep(found)
        log(str(cell), started)
    if not settings.activation:
        return found
    for name, model in settings.models.items():
        try:
            found.rows += run_activation(name, model, activated, limits)
        except WrongResultError as error:
            found.wrong.append(str(error))
        keep(found)
        log(f"{name}, activation", started)
    return found


def log(what: str, started: float) -> None:
    """A line of progress."""
    say(f"{time.monotonic() - started:7.1f} s  {what}")


# --- reporting ------------------------------------------------------------------------------------


def describe(
    args: argparse.Namespace, settings: Settings, punica: Punica | None, rates: Rates
) -> dict[str, Any]:
    """What the figures depend on, as JSON data."""
    gpu = settings.device.type == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}, interpreted"
    header = record(args, device, "torch", "triton")
    header["versions"] |= {
        "HIP" if torch.version.hip else "CUDA": torch.version.hip or torch.version.cuda,
        "punica": punica.source if punica else None,
    }
    return {
        **header,
        "dtype": format_name(settings.dtype),
        "times_mean_something": gpu and not args.tiny,
        "rates": vars(rates),
        "l2_nbytes": l2_nbytes(settings.device),
    }


def print_header(header: dict[str, Any]) -> None:
    """The device, the versions and the rates."""
    rates = header["rates"]
    print_record(header)
    print(
        f"measured: copy {rates['copy'] / 1e9:,.0f} GB/s (read plus written), read "
        f"{rates['read'] / 1e9:,.0f} GB/s, {header['dtype']} product {rates['flops'] / 1e12:,.1f} "
        f"TFLOP/s, from pinned host memory {rates['host'] / 1e9:,.1f} GB/s; "
        f"L2 {header['l2_nbytes'] / 2**20:,.0f} MiB"
    )
    if not header["times_mean_something"]:
        print("tiny shapes: the program is tried out, the times mean nothing")


def keep(header: dict[str, Any], path: Path | None, found: Measured) -> None:
    """Write what there is so far."""
    left_out = [str(cell) for cell in found.left_out]
    rows = {"rows": found.rows, "wrong": found.wrong, "left_out": left_out}
    write_json(path, header | rows)


def show(header: dict[str, Any], found: Measured, args: argparse.Namespace) -> None:
    """Tables, aims, JSON and plot."""
    rows, left_out = found.rows, found.left_out
    modules = {name: {layer.name for layer in MODELS[name].layers} for name in args.shapes}
    sums = report.layer_sums(rows, modules)
    report.print_forward(rows)
    report.print_activation(rows)
    report.print_sums(sums)
    aims = []
    if header["times_mean_something"]:
        aims = report.find_aims(rows, modules, {"bf16": header["dtype"], "nf4": "nf4"})
        print(
            "\naims (decode and prefill: the whole layer in a graph, cold; floors at measured rates)"
        )
        for aim in aims:
            print(f"  {aim}")
    if left_out:
        print(f"\nleft out, the budget of {args.budget:g} s was spent: {len(left_out)} cells")
    for line in found.wrong:
        print(f"WRONG, not timed: {line}")
    keep({**header, "aims": [report.aim_data(aim) for aim in aims]}, args.json, found)
    if args.plot:
        mode = "graph" if args.device == "cuda" else "eager"
        try:
            draw(sums, mode, f"{header['device']}, rank {args.rank}", args.plot)
        except ValueError as error:
            sys.exit(f"--plot {args.plot}: {error}")
