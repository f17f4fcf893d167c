"""What is lost by the codes of stored rows, beside the rate-distortion bound."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import count_list, cpu_name, end_record, print_record, record, say, table, write_json

from distortion.codes import (
    Coded,
    Trellis,
    entropy_coded,
    lloyd_max,
    lloyd_max_points,
    stored,
    stored_trellis,
)
from vllm_vlora.adapters.discovery import find_adapters
from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.representations.factors import balanced_svd

DESCRIPTION = """\
Pack rows of numbers as checkpoints have them, and in codes that they could have: the bits an element
(scales included), the share of a row's energy that is lost, the bound 2^(-2 bits) for Gaussian numbers,
and how many bits an element a code takes more than the best one that can be, which is

  gap = bits - 1/2 log2(1 / loss)

Rows are Gaussian numbers, and the singular factors of adapters: the first half of each module's, as a
private task of half the rank stores them, a share averaged over rows. Entropy coding is measured as the
entropy of single codes; a trellis by its encoder, whose CPU time a number is given.
"""
EXAMPLES = """\
  python benchmarks/run.py distortion --quick                     a check that it runs
  python benchmarks/run.py distortion --json FILE                 Gaussian rows and the demo's adapters
  python benchmarks/run.py distortion --adapters FOLDER --windows 8
"""
DEMO_ADAPTERS = Path(__file__).parents[2] / "examples" / "demo" / "adapters"
BITS = (2, 3, 4)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters", metavar="FOLDER", type=Path, help="default: those of the demo"
    )
    parser.add_argument(
        "--windows",
        metavar="LIST",
        type=count_list,
        help="bits of a trellis code's window, at most 12 (default: 6,8,10)",
    )
    parser.add_argument("--rows", metavar="N", type=int, help="of each kind (default: 256)")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.windows = args.windows or ((6,) if args.quick else (6, 8, 10))
    args.rows = args.rows or (16 if args.quick else 256)
    args.adapters = args.adapters or DEMO_ADAPTERS
    if args.rows < 1:
        parser.error("--rows must be at least 1")
    if not max(BITS) < min(args.windows) <= max(args.windows) <= 12:
        parser.error(f"--windows must be from {max(BITS) + 1} to 12")


def run(args: argparse.Namespace) -> int:
    report = record(args, cpu_name(), "torch")
    print_record(report)
    torch.set_num_threads(1)
    sources = {
        "Gaussian": torch.randn(
            args.rows, 4096, generator=torch.Generator().manual_seed(args.seed)
        ),
        "adapters": adapter_rows(args.adapters, args.rows, args.seed),
    }
    trellises = []
    for bits in BITS:
        lloyd_max_points(bits)
        for window in args.windows:
            say(f"training a trellis of {bits} bits, window {window}")
            trellises.append(Trellis.trained(bits, window))
    report["cells"] = [
        cell for source, rows in sources.items() for cell in measure(source, rows, trellises)
    ]
    head = ["rows", "code", "bits", "lost", "bound", "gap", "us a number"]
    print(table(head, map(format_cell, report["cells"]), left=2))
    end_record(report)
    write_json(args.json, report)
    return 0


def adapter_rows(folder: Path, most: int, seed: int) -> torch.Tensor:
    """Leading rows of singular factors of adapters, of the commonest length, drawn at random."""
    rows: dict[int, list[torch.Tensor]] = {}
    for path in find_adapters(folder).adapters.values():
        for _, (a, b) in open_adapter(path).iter_factors():
            a, b, _ = balanced_svd(a, b, 1.0)
            kept = -(-a.shape[0] // 2)
            for side in (a[:kept], b.T[:kept]):
                rows.setdefault(side.shape[1], []).append(side)
    found = torch.cat(max(rows.values(), key=lambda sides: sum(map(len, sides))))
    found = found[found.square().sum(1) > 0]
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return found[chosen[:most]]


def measure(
    source: str, rows: torch.Tensor, trellises: Sequence[Trellis]
) -> Iterator[dict[str, Any]]:
    """What each code makes of these rows."""
    for code, call in codes(trellises):
        began = time.process_time()
        coded = call(rows)
        yield describe(source, code, rows, coded, time.process_time() - began)


def codes(
    trellises: Sequence[Trellis],
) -> Iterator[tuple[str, Callable[[torch.Tensor], Coded]]]:
    """Every code by its name, those of as many bits together."""
    yield "int8", partial(stored, bits=8)
    for bits in BITS:
        name = "nf4-dq" if bits == 4 else f"nf4-dq, {bits} bits"
        yield name, partial(stored, bits=bits)
        yield f"{name}, entropy", partial(entropy_coded, bits=bits)
        yield f"stored trellis, {bits} bits", partial(stored_trellis, bits=bits)
        yield f"Lloyd-Max {bits}", partial(lloyd_max, bits=bits)
        for trellis in trellises:
            if trellis.bits == bits:
                yield f"trellis {bits}, window {trellis.window}", trellis.coded


def describe(
    source: str, code: str, rows: torch.Tensor, coded: Coded, seconds: float
) -> dict[str, Any]:
    values, bits = coded
    lost = (values - rows).square().sum(1) / rows.square().sum(1)
    share = float(lost.mean())
    return {
        "source": source,
        "shape": list(rows.shape),
        "code": code,
        "bits": bits,
        "lost": share,
        "bound": 2.0 ** (-2 * bits),
        "gap_bits": bits + 0.5 * math.log2(share),
        "us_a_number": 1e6 * seconds / rows.numel(),
    }


def format_cell(cell: dict[str, Any]) -> list[str]:
    return [
        cell["source"],
        cell["code"],
        f"{cell['bits']:.3f}",
        f"{cell['lost']:.5f}",
        f"{cell['bound']:.5f}",
        f"{cell['gap_bits']:.3f}",
        f"{cell['us_a_number']:.2f}",
    ]
