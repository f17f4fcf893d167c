"""A changed basis: what it costs a worker to read it, and to put it in the place of the one before."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    WrongResultError,
    count,
    cpu_name,
    end_record,
    print_record,
    record,
    say,
    table,
    write_json,
)

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.layouts import LayerLayout, Run, SliceLayout
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.stored import Basis

DESCRIPTION = """\
Two checkpoints with shared bases for the linear layers of a Llama 3 8B, or of some of its blocks, take
each other's place in the layers of one direct path, in turns. Reported are the CPU seconds of one core,
scaled to all 32 blocks: reading the bases and unpacking this rank's share, which a thread does beside the
steps; putting them in place, which is between two steps; and making a path of them anew, as at a start,
beside which both are ratios, taken turn by turn. What the layers hold is compared with the path made
anew.
"""
EXAMPLES = """\
  python benchmarks/run.py exchange --quick        a check that it runs
  python benchmarks/run.py exchange --json FILE    under a minute
"""
SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
BLOCKS, RANK = 32, 16
WAYS = ("read", "exchange", "anew")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The size of what is exchanged."""
    parser.add_argument("--blocks", type=count, help="that are measured (default: 4)")
    parser.add_argument("--components", type=count, help="of each basis (default: 64)")
    parser.add_argument("--format", default="nf4-dq", help="of what is stored (default: nf4-dq)")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sizes of a smoke run where one is asked for."""
    args.blocks = args.blocks or (1 if args.quick else 4)
    args.components = args.components or (16 if args.quick else 64)
    args.rounds = args.rounds or (2 if args.quick else 9)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    torch.set_num_threads(1)
    report = record(args, cpu_name(), "torch")
    print_record(report)
    with tempfile.TemporaryDirectory(prefix="bench-exchange-") as folder:
        turns, nbytes = measure(args, Path(folder))
    report["turns"], report["basis_nbytes"] = turns, nbytes * BLOCKS // args.blocks
    print(f"bases on the device: {report['basis_nbytes'] / 2**20:.0f} MiB in bfloat16")
    rows = [
        [way, _spread([turn[way] * BLOCKS / args.blocks for turn in turns]),
         _spread([turn[way] / turn["anew"] for turn in turns])]
        for way in WAYS
    ]  # fmt: skip
    print(table(["", "CPU s", "of a path made anew"], rows))
    end_record(report)
    write_json(args.json, report)
    return 0


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, float]], int]:
    """CPU seconds of each way, turn by turn, and bytes of the bases in the layers.

    Raises:
        WrongResultError: the layers hold something else than those of a path made anew.
    """
    say("writing two checkpoints")
    states = [_build(args, folder / str(seed), seed) for seed in range(2)]
    path = _make_path(args, states[0])
    turns = []
    for number in range(args.rounds + 1):
        state = states[(number + 1) % 2]
        bases = path.other_bases(state)
        assert bases is not None
        shares, read = _timed(path.read_bases, state, bases)
        _, exchange = _timed(path.exchange, bases, shares.tree)
        anew, whole = _timed(_make_path, args, state)
        if not _same(path, anew):
            raise WrongResultError("the layers do not hold the bases that were read")
        if number:  # The first is to warm up.
            turns.append({"read": read, "exchange": exchange, "anew": whole})
    return turns, path.memory().bases


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = time.process_time()
    found = call(*arguments)
    return found, time.process_time() - began


def _same(one: DirectPath, other: DirectPath) -> bool:
    return all(
        torch.equal(left, right)
        for name, layer in one.layers.items()
        for mine, its in zip(_matrices(layer), _matrices(other.layers[name]))
        for left, right in zip(mine.parts.values(), its.parts.values())
    )


def _matrices(layer: Any) -> list[Any]:
    return [layer.v, *(part.u for part in layer.slices)]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _modules(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    return {f"{b}.{name}": shape for b in range(args.blocks) for name, shape in SHAPES.items()}


def _build(args: argparse.Namespace, folder: Path, seed: int) -> Checkpoint:
    """A checkpoint of one task whose modules all stand on bases of random rows."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    stored = {}
    for name, (d_in, d_out) in _modules(args).items():
        u, v = (
            torch.randn(args.components, width, generator=generator) / width**0.5
            for width in (d_out, d_in)
        )
        basis = Basis(pack(u, args.format), pack(v, args.format))
        writer.add_module(name, d_in, d_out, basis=basis)
        a = torch.randn(RANK, d_in, generator=generator)
        b = torch.randn(d_out, RANK, generator=generator)
        stored[name] = encode_joint(a, b, 1.0, unpack(basis.u), unpack(basis.v), "bfloat16")
    writer.add_task("task", stored, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("")
    return Checkpoint.open(folder)


def _make_path(args: argparse.Namespace, checkpoint: Checkpoint) -> DirectPath:
    layouts = [
        LayerLayout(name, (SliceLayout(name, _no_slot, _no_slot, d_in, d_out,
                                       (Run(0, 0, d_in),), (Run(0, 0, d_out),)),))
        for name, (d_in, d_out) in _modules(args).items()
    ]  # fmt: skip
    return DirectPath(
        checkpoint,
        layouts,
        str,
        slots=4,
        max_tokens=64,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )


def _no_slot(slot: int) -> torch.Tensor:
    raise AssertionError("a direct task looked at a slot")
