"""How long it takes to make a task ready that is not loaded: in an engine, or by the device alone."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import floors
import torch
from clock import l2_nbytes, measure_rates
from harness import cores, count, cpu_name, end_record, print_record, record, write_json
from kernelbench.cells import Settings
from kernelbench.report import Floors, print_activation

from activation import engine
from activation.ways import run_activation

DESCRIPTION = """\
Time what is done when a request names a task that is not loaded.

With --engine, the default where vLLM is installed: a vLLM worker's LoRA manager's add_adapter, from the
call until A and B of every module are in a slot. One real engine (vllm.LLM, in this process) takes the
same adapters in turn (A B C A B C ...), so that a drift of the machine hits all alike, and each task is
removed again before its next turn, so that every call loads:

  stock, PEFT folder   vLLM's own path: read the folder (from the page cache), convert, fill a slot
  stock, in host RAM   only vLLM's slot write, of an adapter already converted in host memory; such a
                       task is loaded, so this is a reference and no rival
  private bfloat16     vllm-vlora: fill a slot from a resident checkpoint of the adapters as they are
  private int8, nf4    the same, from quantised factors, dequantised on the way
  joint k=64           the same, from shared bases and small cores, multiplied on the way
  direct joint k=64,   vllm-vlora's direct mode, which fills no slot: a row of addresses, in an engine
  direct private nf4   of its own in the same process, started with that checkpoint

The adapters are random, of rank 16 on all seven linears of a layer, bfloat16, with nonzero B, and lie
near a common subspace of 64 dimensions, so that a joint checkpoint is not mere error. The plugin is
installed while stock code runs; --startup also times stock code in processes with and without it.

In the same engine slots are then poisoned with NaN, filled by each method with each task and
compared: stock and private bfloat16 with the adapter's own factors, bit for bit; the others with the
checkpoint's decoded factors, and their delta_W with the adapter's, whose relative error must be the
one that the checkpoint records. Direct tasks must add to random inputs, in every layer, what the decoded
factors add.

In turn, each call finds what the others left in the caches and the allocator, as a server would; by
itself, each method runs again and again alone, which favours small working sets. The byte floor is
the time to read the stored factors once and to write the slot once, zeros of layers that the adapter
leaves out included, at the copy bandwidth that this run measures.

With --no-engine: the same work by the device alone, without vLLM, over all linears of --model:

  activate-stock       every A and B of a slot zeroed, then copied from (pinned) host memory
  copy-pinned          all of an adapter's bytes in one copy from there
  materialize-private  a task into the slot, from packed factors on the device
  materialize-joint    the same from packed bases and the task's cores
  activate-direct      a resident task's records into the slot table

  eager       the jobs planned once and run, as the plugin does, host time included
  graph       the same launches replayed from a CUDA graph: the device's own time
  plan+run    with the planning, which the plugin does once a task
  reference   the torch reference, factor by factor

Every result is compared with float64 before anything is timed. Tasks take turns, as many as it takes for
none to be found in the cache. Floors are bytes (floors.py) over the rates that this run measures.

When anything is wrong, no figure is printed and the exit status is 1.
"""
EXAMPLES = """\
  python benchmarks/run.py activation                        a Llama of 8 layers, about a minute
  python benchmarks/run.py activation --model DIR            the shapes and weights of a real model
  python benchmarks/run.py activation --rounds 60 --device-note "idle, 2 vCPU" --json result.json
  python benchmarks/run.py activation --startup              also the engine's start, 5 minutes more
  python benchmarks/run.py activation --no-engine            on a GPU: Llama-7B shapes
  python benchmarks/run.py activation --no-engine --formats nf4 --k 64 --json result.json
  python benchmarks/run.py activation --no-engine --device cpu     a small model, without Triton

Other work on the machine spoils the figures: the load average is printed and stored with them.
"""
FORMATS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "nf4": "nf4", "nf4-dq": "nf4-dq"}
MODELS = {**floors.MODELS, "tiny": floors.llama("tiny", 4, 256, 704, 256)}
# What is not given: (through an engine, by the device alone).
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "dtype": ("float32", "bfloat16"),
    "k": ([64], [32, 64, 128]),
    "rounds": (40, 30),
    "warmup": (4, 5),
}
# Options that mean something one way only.
ENGINE_ONLY = {"tasks": 8, "startup_rounds": 2, "startup_tasks": 64}
DEVICE_ONLY = {
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "formats": ["bf16", "int8", "nf4"],
    "left_dtype": "bfloat16",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of both ways, then of each."""
    parser.add_argument(
        "--engine",
        action=argparse.BooleanOptionalAction,
        default=find_spec("vllm") is not None,
        help="through a vLLM engine, or by the device alone (default: where vLLM is installed)",
    )
    parser.add_argument(
        "--model",
        help="a Llama-like model's folder, with weights (default: a generated config, hidden 1024, "
        f"8 layers, dummy weights); with --no-engine shapes: {', '.join(MODELS)} (default: "
        "llama-7b on a GPU, tiny elsewhere)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the slots, and of the engine; its adapters are bfloat16 always (default: float32; "
        "bfloat16 with --no-engine)",
    )
    parser.add_argument(
        "--rank", type=count, default=16, help="of a task; 8, 16, 32 or 64 (default: 16)"
    )
    parser.add_argument(
        "--k",
        type=count,
        nargs="*",
        help="components of shared bases: one number (default: 64), with --no-engine any number of "
        "them (default: 32 64 128)",
    )
    parser.add_argument("--repeats", dest="rounds", type=count, help=argparse.SUPPRESS)
    parser.add_argument("--warmup", type=int, help="untimed rounds (default: 4; 5)")
    add_engine_options(parser.add_argument_group("with --engine"))
    add_device_options(parser.add_argument_group("with --no-engine"))


def add_engine_options(group: Any) -> None:
    """The adapters, and the engine's start."""
    group.add_argument("--tasks", type=count, help="number of adapters (default: 8)")
    group.add_argument(
        "--startup",
        action="store_true",
        help="also time the engine's start with the plugin and a private nf4 checkpoint, against "
        "VLLM_PLUGINS='' (A B A B, each a fresh process)",
    )
    group.add_argument("--startup-rounds", type=count, help="starts of each kind (default: 2)")
    group.add_argument("--startup-tasks", type=count, help="tasks of that checkpoint (default: 64)")


def add_device_options(group: Any) -> None:
    """What is stored how."""
    group.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        help="how bases and private factors are stored (default: bf16 int8 nf4)",
    )
    group.add_argument(
        "--left-dtype",
        choices=["bfloat16", "float32"],
        help="of a joint task's own matrices (default: bfloat16)",
    )


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what was not given; end the program where the options cannot be run."""
    ours, others = (ENGINE_ONLY, DEVICE_ONLY) if args.engine else (DEVICE_ONLY, ENGINE_ONLY)
    for name in others:
        if getattr(args, name) is not None:
            needed = "--no-engine" if args.engine else "--engine"
            parser.error(f"--{name.replace('_', '-')} needs {needed}")
    defaults = {name: values[not args.engine] for name, values in DEFAULTS.items()} | ours
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.warmup < args.engine:
        parser.error(f"--warmup must be at least {int(args.engine)}")
    (check_engine if args.engine else check_device)(parser, args)


def check_engine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Whether an engine can be asked for it."""
    if args.rounds < 15:
        parser.error("--rounds must be at least 15")
    if args.rank not in (8, 16, 32, 64) or len(args.k) != 1:
        parser.error("an engine takes --rank 8, 16, 32 or 64, and one --k")
    (args.k,) = args.k
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there; give a model's folder")


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Whether the device can do it."""
    if args.startup:
        parser.error("--startup needs --engine")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    args.model = args.model or ("llama-7b" if args.device == "cuda" else "tiny")
    if args.model not in MODELS:
        parser.error(f"--model {args.model}: with --no-engine one of {', '.join(MODELS)}")
    if args.rank > floors.SLOT_RANKS[-1]:
        parser.error(f"--rank must be at most {floors.SLOT_RANKS[-1]}, vLLM's largest slot")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit status.

    Raises:
        WrongResultError: something is wrong; there are no figures then.
    """
    write_json(args.json, engine.run(args) if args.engine else run_alone(args))
    return 0


def run_alone(args: argparse.Namespace) -> dict[str, Any]:
    """By the device alone, without vLLM."""
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"{cpu_name()}, {cores()} cores, torch only"
    report = record(args, name, "torch", *(["triton"] if gpu else []))
    print_record(report)
    settings = Settings(
        device=device,
        dtype=getattr(torch, args.dtype),
        models={args.model: MODELS[args.model]},
        rank=args.rank,
        ks=tuple(args.k),
        formats=tuple(FORMATS[name] for name in args.formats),
        rounds=args.rounds,
        warmup=args.warmup,
        core_dtype=getattr(torch, args.left_dtype),
        every_mode=True,
    )
    rates = measure_rates(device, settings.dtype)
    print(
        f"measured: copy {rates.copy / 1e9:,.1f} GB/s (read plus written), from the host "
        f"{rates.host / 1e9:,.1f} GB/s; {args.rounds} interleaved rounds, every result checked"
    )
    limits = Floors.of(name, rates)
    rows = run_activation(args.model, MODELS[args.model], settings, limits)
    print_activation(rows)
    end_record(report)
    return {**report, "rates": vars(rates), "l2_nbytes": l2_nbytes(device), "rows": rows}
