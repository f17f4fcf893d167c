"""Run the checks that only a GPU can make, and keep every row as it comes."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Iterable
from typing import Any

import floors
import torch
from harness import record, say

DESCRIPTION = """\
Check the direct kernels where only a device can: on real shapes, in graphs, kernel by kernel.

  smoke    results against the operation's definition, from one token to prefill
  replay   a graph captured with nothing routed, replayed with other tasks, slots and token counts
  beside   a layer in a graph: alone, and with its direct work after it or beside it, as in an engine
  idle     the same when the batch has no task
  profile  microseconds of every kernel, launched and in a graph, the caches emptied before each call
  sizes    the same of the private kernels in the graph of a long batch, with other sizes than they choose

Every row is written to --json as it comes (a line of JSON each); a failing check does not end the run,
and the exit status is 1 when one failed.
"""
EXAMPLES = """\
  python benchmarks/run.py gpucheck --json out.jsonl
  python benchmarks/run.py gpucheck --stages smoke replay --layers qkv_proj
  python benchmarks/run.py gpucheck --device cpu    tiny, in Triton's interpreter: tries the program
"""
TINY = floors.llama("tiny", 1, 128, 192, 64)
MODELS = {**floors.MODELS, "tiny": TINY}
STAGES = ("smoke", "replay", "beside", "idle", "profile", "sizes")
DECODE_PROFILE = ((1, 1, 1), (64, 64, 64), (256, 256, 256), (512, 512, 512), (64, 64, 1024))
# vLLM's longest decode batches: of few tasks, of some, each token's own.
CROWDED_PROFILE = ((1024, 1, 1024), (1024, 64, 1024), (1024, 1024, 1024))
PREFILL_PROFILE = ((2048, 8, 8), (2048, 8, 1024))
FEW_PROFILE = ((1, 1, 1), (7, 7, 16))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to check, on which layers."""
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="(default: all)")
    parser.add_argument("--shape", choices=MODELS, help="(default: llama-7b)")
    names = [layer.name for layer in TINY.layers]
    parser.add_argument("--layers", nargs="+", choices=names, help="(default: qkv_proj)")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Defaults, and what cannot be run here."""
    args.device = args.device or "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; --device cpu tries the program")
    tiny = args.device == "cpu"
    args.shape = args.shape or ("tiny" if tiny else "llama-7b")
    args.quick = args.quick or tiny
    args.stages = args.stages or list(STAGES)
    args.layers = args.layers or ["qkv_proj"]


def run(args: argparse.Namespace) -> int:
    """All stages; the exit status."""
    device = torch.device(args.device)
    if device.type == "cpu":
        # Read when the kernels are imported, which happens when they are first used.
        os.environ["TRITON_INTERPRET"] = "1"
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float16
    name = torch.cuda.get_device_name() if gpu else "CPU, interpreted"
    output = open(args.json, "a") if args.json else None  # noqa: SIM115 (closed at the end)
    failed = 0

    def keep(row: dict[str, Any]) -> None:
        say(json.dumps(row, default=str))
        if output:
            print(json.dumps(row, default=str), file=output, flush=True)

    keep({"check": "record"} | record(args, name, "torch", "triton", "vllm"))
    for stage in args.stages:
        for layer in args.layers:
            started = time.monotonic()
            try:
                for row in _rows(stage, MODELS[args.shape].layer(layer), dtype, device, args.quick):
                    failed += row.get("right") is False
                    keep(row)
            except Exception:  # noqa: BLE001
                # The others may still say something.
                failed += 1
                keep(
                    {
                        "check": stage,
                        "layer": layer,
                        "right": False,
                        "failure": traceback.format_exc(),
                    }
                )
            keep({"check": stage, "layer": layer, "seconds": time.monotonic() - started})
    if output:
        output.close()
    return int(failed > 0)


def _rows(
    stage: str, layer: floors.Layer, dtype: torch.dtype, device: torch.device, few: bool
) -> Iterable[dict[str, Any]]:
    from gpucheck import profile, replay, sizes, smoke

    gpu = device.type == "cuda"
    if stage == "smoke":
        return smoke.check(layer, smoke.FEW if few else smoke.BATCHES, dtype, device)
    if stage == "replay":
        return replay.check(layer, (64, 272) if gpu else (16,), dtype, device)
    if stage == "profile":
        batches = FEW_PROFILE if few else DECODE_PROFILE + CROWDED_PROFILE + PREFILL_PROFILE
        return profile.kernels(layer, batches, dtype, device, repeats=10 if gpu else 1)
    if stage == "sizes":
        tokens, tasks = (4, (1, 4)) if few else (1024, (1, 64, 256, 1024))
        variants = sizes.VARIANTS[:2] if few else sizes.VARIANTS
        return sizes.search(layer, tokens, tasks, variants, dtype, device, 5 if gpu else 1)
    if stage == "beside":
        decode = ((1, 1),) if few else ((64, 64), (1, 1), (256, 256))
        return profile.beside(layer, decode, dtype, device, rounds=15 if gpu else 1)
    return profile.idle(layer, dtype, device, tokens=64 if gpu else 4, rounds=15 if gpu else 1)
