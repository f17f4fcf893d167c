"""Time and memory of fitting a shared basis: vllm-vlora, the seed libraries and the exact solution."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    RUNNER,
    cores,
    count,
    count_list,
    cpu_name,
    print_record,
    record,
    say,
    write_json,
)

from fitbench.collection import Size, Spectrum, describe, write_collection
from fitbench.plot import draw
from fitbench.report import format_cell, summarise
from fitbench.runs import Policy, Run, start_worker, take_turns
from fitbench.worker import CONTESTANTS
from vllm_vlora.fitting.shared_basis import fit_bases
from vllm_vlora.timing import best_seconds

DESCRIPTION = """\
Fit one module's shared basis to many adapters, from PEFT folders on disk (in the page cache) to the
bases and every adapter's loadings in them:

  ours             vllm_vlora.fitting.shared_basis, streaming; one more read for the loadings
  vlora            vlora-dev, SharedSubspace.from_adapters
  vlora-streaming  vlora-dev, from_adapters_streaming; grows with the cube of the number of adapters,
                   so that it must be asked for
  lorashare        lorashare, SHAREModel.from_adapters
  exact            all eigenvectors of the matrices that ours approximates (torch.linalg.eigh, float32)

Each measurement is a fresh process. Ours runs before every turn of a rival (A B A C ...), so that a
drift of the machine hits all alike; a rival that takes --stop-at times our time is stopped, and its
figures are then lower bounds, marked ">". Memory is the peak of the resident set above what the
process had after its imports and a warm-up. Energy is the mean over adapters of
1 - ||delta_W' - delta_W||^2 / ||delta_W||^2 with float32 storage, k components for everybody. That is
no equal size: vlora's components are whole adapters, rank times as large as ours, and when k reaches
the number of adapters it keeps everything and compresses nothing. The column "stored MB" shows that.

The adapters are synthetic: mixtures of 192 shared directions a side with falling weights, plus parts
of their own (fitbench/collection.py has the formula). They are float32, since vlora's SVD has no
16-bit version. The floor is the time for the products and reads of ours alone, at the speed of a
large product and of a copy on this machine.
"""
EXAMPLES = """\
  python benchmarks/run.py fit --quick --contestants ours,exact    a check that it runs, seconds
  python benchmarks/run.py fit                                     all sizes, a quarter of an hour
  python benchmarks/run.py fit --sizes 4096x14336 --adapters 500 --stop-at 60
                                            the largest, with more patience: another quarter
  python benchmarks/run.py fit --own 2 --contestants ours,exact    adapters that share little

Other work on the machine spoils the figures: the load average is printed and stored with them.
"""
DEFAULT_CONTESTANTS = ("ours", "vlora", "lorashare", "exact")
SEEDS = {"vlora", "vlora-streaming", "lorashare"}
CACHE = RUNNER.parent.parent / ".cache"


def run(args: argparse.Namespace) -> int:
    """Measure all sizes, print a table after each, write JSON and the plot."""
    sizes = [
        Size(d_in, d_out, adapters, args.rank)
        for d_in, d_out in args.sizes
        for adapters in args.adapters
    ]
    torch.set_num_threads(args.threads)
    rates = measure_rates(args.quick)
    report = describe_run(args, rates)
    print_record(report)
    print(f"load average {report['load_average_at_start']:.2f}")
    estimate = sum(estimate_s(size, args) for size in sizes)
    print(f"about {estimate / 60:.0f} min on a quiet two-core machine of 2025\n", flush=True)
    pythons = contestant_pythons(args)
    for size in sizes:
        try:
            cell = measure(size, args, pythons)
        except RuntimeError as error:
            print(f"{size}: {error}", file=sys.stderr)
            return 1
        cell["floor_s"] = floor_s(size, args.k, rates)
        report["cells"].append(cell)
        report["load_average_at_end"] = os.getloadavg()[0]
        print(format_cell(cell, cell["floor_s"]) + "\n", flush=True)
        # After each size: a long run that is cut short keeps what it has.
        write_json(args.json, report)
    if args.plot:
        title = f"Fit of rank {args.rank}, k {args.k}: {report['device']}"
        draw(report["cells"], title, str(args.plot))
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes, the contestants and their turns."""
    parser.add_argument(
        "--sizes", type=parse_sizes, help="D_INxD_OUT,... (default: 4096x4096,4096x14336)"
    )
    parser.add_argument(
        "--adapters", type=count_list, help="numbers of adapters (default: 100,500)"
    )
    parser.add_argument("--rank", type=count, help="of every adapter (default: 16)")
    parser.add_argument("--k", type=count, help="components (default: 128)")
    parser.add_argument(
        "--own",
        type=float,
        default=Spectrum.own,
        help="norm of an adapter's private part, its share of the common directions having norm one "
        f"(default: {Spectrum.own})",
    )
    parser.add_argument(
        "--contestants",
        type=parse_contestants,
        default=list(DEFAULT_CONTESTANTS),
        help=f"of {', '.join(CONTESTANTS)} (default: {','.join(DEFAULT_CONTESTANTS)})",
    )
    parser.add_argument(
        "--once-above",
        type=float,
        default=15,
        metavar="SECONDS",
        help="a rival that takes longer has one turn (default: 15)",
    )
    parser.add_argument(
        "--stop-at",
        type=float,
        default=25,
        metavar="TIMES",
        help="stop a rival after this multiple of our time; 0 for never (default: 25)",
    )
    parser.add_argument("--threads", type=count, default=1, help="of torch (default: 1)")
    parser.add_argument("--work", type=Path, help="where adapters are written (default: /tmp)")
    parser.add_argument(
        "--seeds-environment", type=Path, default=CACHE / "seeds", help="made on first use"
    )


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The sizes that are not given; ends the program where the options cannot be run."""
    small = args.quick
    args.sizes = args.sizes or ([(96, 160)] if small else [(4096, 4096), (4096, 14336)])
    args.adapters = args.adapters or ([40] if small else [100, 500])
    args.rank = args.rank or (4 if small else 16)
    args.k = args.k or (16 if small else 128)
    args.rounds = 1 if small else args.rounds or 2
    if args.own < 0:
        parser.error("--own must not be negative")


def parse_sizes(text: str) -> list[tuple[int, int]]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not D_INxD_OUT, as in 4096x14336")
    pairs = (part.split("x") for part in text.split(","))
    return [(int(d_in), int(d_out)) for d_in, d_out in pairs]


def parse_contestants(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown or "ours" not in names:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be names of {', '.join(CONTESTANTS)}, with ours among them"
        )
    return names


def contestant_pythons(args: argparse.Namespace) -> dict[str, str]:
    """Contestant -> the interpreter that runs it."""
    pythons = dict.fromkeys(args.contestants, sys.executable)
    if SEEDS & set(args.contestants):
        from fidelity.seeds import make_environment

        from vllm_vlora.errors import OptionError

        try:
            seeds = str(make_environment(args.seeds_environment))
        except OptionError as error:
            raise SystemExit(f"{error}; here that is --contestants ours,exact") from error
        pythons |= {name: seeds for name in args.contestants if name in SEEDS}
    return pythons


def measure(size: Size, args: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    """Write the collection, run everybody in turns, and summarise."""
    policy = Policy(args.rounds, args.once_above, args.stop_at or None)
    spectrum = Spectrum(own=args.own)
    if args.quick:
        spectrum = replace(spectrum, shared=24)
    with tempfile.TemporaryDirectory(prefix="bench-fit-", dir=args.work) as folder:
        paths = write_collection(Path(folder), size, spectrum)
        runners = {
            name: start_worker(python, name, paths, args.k, args.threads)
            for name, python in pythons.items()
        }
        shown = partial(start_shown, runners)
        runs = take_turns([name for name in pythons if name != "ours"], policy, shown)
    return summarise(size, args.k, runs) | {"spectrum": describe(spectrum)}


def start_shown(runners: dict[str, Any], contestant: str, limit: float | None) -> Run:
    """Run once and say how it went, on stderr."""
    begun = time.monotonic()
    run: Run = runners[contestant](limit)
    ended = "stopped" if run.stopped else f"energy {run.energy:.4f}"
    say(
        f"{contestant}: {run.seconds:.2f} s, {run.peak_nbytes / 1e6:.0f} MB, {ended} "
        f"({time.monotonic() - begun:.0f} s in all)"
    )
    return run


# --- what to expect ------------------------------------------------------------------------------


def measure_rates(quick: bool) -> dict[str, float]:
    """Floating-point operations and copied bytes a second, of the best of some tries."""
    n = 256 if quick else 1024
    x, y = torch.randn(n, 8 * n), torch.randn(8 * n, n)
    block = torch.empty(2**22 if quick else 2**25)
    return {
        "flops_per_s": 16 * n**3 / best_seconds(lambda: x @ y),
        "copied_bytes_per_s": block.nbytes / best_seconds(block.clone),
    }


def our_flops(size: Size, k: int) -> float:
    """Of the large products: four a pass, and two for the loadings."""
    numbers = size.adapters * size.rank * (size.d_in + size.d_out)
    return numbers * (our_default("passes") * 4 * (k + our_default("oversample")) + 2 * k)


def our_default(name: str) -> int:
    """Of an argument of ``fit_bases``, with which ours runs."""
    value: int = inspect.signature(fit_bases).parameters[name].default
    return value


def floor_s(size: Size, k: int, rates: dict[str, float]) -> float:
    """Seconds for our products and reads, if there were nothing else."""
    nbytes = (our_default("passes") + 2) * size.adapters * size.adapter_nbytes
    return our_flops(size, k) / rates["flops_per_s"] + nbytes / rates["copied_bytes_per_s"]


def estimate_s(size: Size, args: argparse.Namespace) -> float:
    """Seconds for a size, from what one core of an EPYC of 2025 took; processes start in 3 s."""
    ours = 1 + 2e-11 * our_flops(size, args.k)
    smaller = [min(d, size.adapters * size.rank) for d in (size.d_in, size.d_out)]
    rivals = {
        "vlora": 1.2e-9 * size.adapters * (size.adapters + 100) * size.adapter_nbytes / 4,
        "vlora-streaming": 4e-10 * size.adapters**3 * size.adapter_nbytes / 4,
        "lorashare": 3e-10 * (size.d_in**3 + size.d_out**3),
        "exact": 3.2e-10 * sum(d**3 for d in smaller),
    }
    chosen = {name: seconds for name, seconds in rivals.items() if name in args.contestants}
    if not chosen:
        return args.rounds * (ours + 6)
    total = 0.0
    for name, seconds in chosen.items():
        if args.stop_at and name != "exact":
            seconds = min(seconds, args.stop_at * ours)
        turns = 1 if seconds > args.once_above else args.rounds
        total += turns * (seconds + ours + 8)
    return total


def describe_run(args: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """The machine, the versions and the command; ``cells`` is still empty."""
    report = record(args, f"{cpu_name()}, {cores()} cores, {args.threads} thread(s)", "torch")
    if SEEDS & set(args.contestants):
        from fidelity.seeds import PINS

        report["versions"] |= PINS
    return {**report, "rates": rates, "cells": []}
