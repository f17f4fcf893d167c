"""Tasks that the device has no room for: the first token of those that are there and those that come."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    WrongResultError,
    count,
    count_list,
    end_record,
    in_another_process,
    print_record,
    record,
    say,
    table,
    write_json,
)
from serving.loads import zipf_probabilities
from serving.program import CPU_ENVIRONMENT, ENVIRONMENT, probe_device
from serving.world import World, WorldPlan

from vllm_vlora.timing import percentile

DESCRIPTION = """\
A real vLLM engine with its engine core in a process of its own, as a server has it, and a checkpoint of
--tasks tasks, of which its arena holds --held and its host memory --kept more. Tasks are asked for with
Zipf's popularity. One request at a time, each is put down by where its task was, which the engine core's
counters say; then --together at a time, the whole. The same requests go to an engine that holds every
task. Both take turns, and answers are compared before any figure is printed.

With --start the engine is only started, with checkpoints of so many tasks, of which the arena holds
--held.
"""
EXAMPLES = """\
  python benchmarks/run.py residency --quick            a check that it runs, about a minute
  python benchmarks/run.py residency --json FILE        some ten minutes on two cores
  python benchmarks/run.py residency --start 100,10000  only how long a start takes
"""
CHECKPOINT, RANK = "nf4", 8
ALL, SOME = "all on the device", "as many as fit"
TIERS = ("device", "host", "disk")
KV_BYTES = 256 * 2**20
# Requests that are not timed.
WARM_UP = 32
# vLLM's own kernels are compiled when they are first used: by the requests that are not timed.
GPU_ARGUMENTS = {
    "dtype": "bfloat16", "kernel_config": {"enable_jit_warmup": False}, "gpu_memory_utilization": 0.5,
    "compilation_config": {
        "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8],
    },
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The tasks and the room for them."""
    parser.add_argument("--tasks", type=count, help="of the checkpoint (default: 1000)")
    parser.add_argument("--held", type=count, help="that the device has room for (default: 100)")
    parser.add_argument("--kept", type=count, help="that the host has room for (default: 300)")
    parser.add_argument("--requests", type=count, help="of each part and round (default: 400)")
    parser.add_argument("--together", type=count, default=8, help="requests at once (default: 8)")
    parser.add_argument("--prompt-len", type=count, default=16, help="tokens (default: 16)")
    parser.add_argument("--output-len", type=count, default=4, help="tokens (default: 4)")
    parser.add_argument(
        "--start", type=count_list, help="tasks of checkpoints that are only started"
    )


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sizes of a smoke run where one is asked for."""
    quick = args.quick
    args.tasks = args.tasks or (40 if quick else 1000)
    args.held = args.held or (8 if quick else 100)
    args.kept = args.kept or (12 if quick else 300)
    args.requests = args.requests or (60 if quick else 400)
    args.rounds = args.rounds or (1 if quick else 3)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    device = in_another_process(probe_device)
    args.gpu = device["type"] != "cpu"
    report = record(args, device["name"], "vllm", "torch")
    print_record(report)
    with tempfile.TemporaryDirectory(prefix="bench-residency-") as temporary:
        folder = args.work or Path(temporary)
        if args.start:
            report["start"] = []
            for tasks in args.start:
                report["start"].append(_start(args, folder, tasks))
                write_json(args.json, report)
            _print_start(report["start"])
        else:
            report["rounds"] = []
            for turn in _rounds(args, folder):
                report["rounds"].append(turn)
                report["summary"] = _summary(report["rounds"])
                # In case the run is ended.
                write_json(args.json, report)
            _print(report["summary"])
    end_record(report)
    write_json(args.json, report)
    return 0


def _world(args: argparse.Namespace, folder: Path, tasks: int) -> World:
    world = World(folder, WorldPlan(args.model, tasks, min(tasks, 16), RANK))
    world.make([CHECKPOINT])
    return world


def _block_bytes(world: World) -> int:
    """What the largest task of the checkpoint takes on the device, with a margin for its records."""
    from vllm_vlora.checkpoint.reader import Checkpoint

    largest = max(
        record.nbytes for record in Checkpoint.open(world.checkpoint(CHECKPOINT)).tasks.values()
    )
    return int(largest * 1.1) + 4096


# --- first tokens ----------------------------------------------------------------------------------


def _rounds(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """What each engine did, a round at a time.

    Raises:
        WrongResultError: the engines' answers differ.
    """
    world = _world(args, folder, args.tasks)
    size = _block_bytes(world)
    budgets = {
        ALL: {"VLLM_VLORA_DEVICE_BYTES": str(4 * args.tasks * size)},
        SOME: {
            "VLLM_VLORA_DEVICE_BYTES": str(args.held * size),
            "VLLM_VLORA_HOST_BYTES": str(args.kept * size),
            "VLLM_VLORA_LATE_MIB": "0",
        },
    }
    for number in range(args.rounds):
        random = np.random.default_rng(number)
        asked = _zipf(random, args.tasks, 2 * args.requests)
        turn = {}
        # Who comes first alternates.
        for name in reversed(budgets) if number % 2 else budgets:
            say(f"round {number + 1} of {args.rounds}: {name}")
            turn[name] = in_another_process(_ask, args, world, asked, budgets[name])
        # On a GPU requests beside each other change each other's last bits.
        compared = args.requests if args.gpu else None
        if turn[ALL]["answers"][:compared] != turn[SOME]["answers"][:compared]:
            raise WrongResultError(
                "a task that came and went answers otherwise than one that stayed"
            )
        for one in turn.values():
            del one["answers"]
        yield turn


def _zipf(random: np.random.Generator, tasks: int, requests: int) -> list[int]:
    """Task numbers, the k-th most popular with a weight of 1 / k, which is which by chance."""
    names = random.permutation(tasks)
    return names[random.choice(tasks, requests, p=zipf_probabilities(tasks))].tolist()


def _ask(
    args: argparse.Namespace, world: World, asked: list[int], budget: dict[str, str]
) -> dict[str, Any]:
    os.environ.update(ENVIRONMENT | CPU_ENVIRONMENT | budget)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_VLORA_CHECKPOINT"] = str(world.checkpoint(CHECKPOINT))
    return asyncio.run(_ask_engine(args, world, asked))


async def _ask_engine(args: argparse.Namespace, world: World, asked: list[int]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**_arguments(args, world)))
    try:
        return await _ask_both_ways(args, world, asked, engine)
    finally:
        engine.shutdown()


async def _ask_both_ways(
    args: argparse.Namespace, world: World, asked: list[int], engine: Any
) -> dict[str, Any]:
    """One request at a time, then some together."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from vllm_vlora.plugin.counters import METRICS_METHOD
    from vllm_vlora.plugin.requests import all_requests

    requests = {r.lora_name: r for r in all_requests(world.checkpoint(CHECKPOINT))}
    prompt = [7 * i % world.config["vocab_size"] for i in range(1, args.prompt_len + 1)]
    sampling = SamplingParams(
        temperature=0, max_tokens=args.output_len, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip

    async def one(number: int, task: int) -> tuple[float, list[int]]:
        """Seconds to the first token, and all of them."""
        began, first, tokens = time.perf_counter(), 0.0, []
        async for output in engine.generate(
            {"prompt_token_ids": [number % 500 + 1, *prompt]}, sampling, str(number),
            lora_request=requests[world.task_ids[task]],
        ):  # fmt: skip
            first = first or time.perf_counter() - began
            tokens += output.outputs[0].token_ids
        return first, tokens

    async def tiers() -> dict[str, int]:
        client = engine.engine_core
        snapshot = await client._call_utility_async(
            METRICS_METHOD, -1, engine=client.core_engines[0]
        )
        return snapshot["requests"]

    # Each engine compiles what it needs before anything is timed, for one request and for some together.
    await one(-1, 0)
    warm_up = [(-2 - number, number % args.tasks) for number in range(WARM_UP)]
    await _at_once(one, warm_up, args.together)
    half = len(asked) // 2
    alone: dict[str, list[float]] = {tier: [] for tier in TIERS}
    answers = []
    before = await tiers()
    for number, task in enumerate(asked[:half]):
        seconds, tokens = await one(number, task)
        answers.append(tokens)
        after = await tiers()
        (tier,) = (name for name in TIERS if after[name] > before[name])
        alone[tier].append(seconds)
        before = after
    together, wall = await _at_once(one, list(enumerate(asked[half:], half)), args.together)
    answers += [tokens for _, tokens in together]
    return {
        "alone": alone,
        "together": [seconds for seconds, _ in together],
        "requests_per_second": len(together) / wall,
        "answers": answers,
    }


async def _at_once(
    one: Callable[[int, int], Any], jobs: list[tuple[int, int]], at_once: int
) -> tuple[list[tuple[float, list[int]]], float]:
    """Run all, so many at a time; their results in order, and the seconds of the whole."""
    gate = asyncio.Semaphore(at_once)

    async def gated(number: int, task: int) -> tuple[float, list[int]]:
        async with gate:
            return await one(number, task)

    began = time.perf_counter()
    found = await asyncio.gather(*(gated(*job) for job in jobs))
    return found, time.perf_counter() - began


def _arguments(args: argparse.Namespace, world: World) -> dict[str, Any]:
    return {
        "model": str(world.model),
        "skip_tokenizer_init": True,
        **(GPU_ARGUMENTS if args.gpu else {"dtype": "float32", "enforce_eager": True}),
        "enable_lora": True,
        "max_loras": 64,
        "max_lora_rank": RANK,
        "max_num_seqs": 64,
        "max_model_len": 128,
        "kv_cache_memory_bytes": KV_BYTES,
        # Prompts repeat, and a hit would hide what a task does.
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Percentiles over all rounds, in milliseconds."""
    found: dict[str, Any] = {}
    for name in (ALL, SOME):
        turns = [turn[name] for turn in rounds]
        alone = {tier: [s for turn in turns for s in turn["alone"][tier]] for tier in TIERS}
        rows = {f"alone, {tier}": values for tier, values in alone.items() if values}
        rows["together"] = [s for turn in turns for s in turn["together"]]
        found[name] = {
            row: {
                "requests": len(values),
                "p50_ms": 1e3 * percentile(values, 50),
                "p99_ms": 1e3 * percentile(values, 99),
            }
            for row, values in rows.items()
        }
        rates = sorted(turn["requests_per_second"] for turn in turns)
        found[name]["requests_per_second"] = rates[len(rates) // 2]
    return found


def _print(summary: dict[str, Any]) -> None:
    head = ("time to the first token", "requests", "p50, ms", "p99, ms")
    rows = [
        (f"{name}: {row}", str(v["requests"]), f"{v['p50_ms']:.1f}", f"{v['p99_ms']:.1f}")
        for name, found in summary.items()
        for row, v in found.items()
        if isinstance(v, dict)
    ]
    print(table(head, rows))
    for name, found in summary.items():
        print(f"{name}: {found['requests_per_second']:.1f} requests a second together")


# --- starts ----------------------------------------------------------------------------------------


def _start(args: argparse.Namespace, folder: Path, tasks: int) -> dict[str, Any]:
    world = _world(args, folder, tasks)
    budget = {
        "VLLM_VLORA_DEVICE_BYTES": str(args.held * _block_bytes(world)),
        "VLLM_VLORA_LATE_MIB": "0",
    }
    say(f"{tasks} tasks")
    found = [in_another_process(_start_engine, args, world, budget) for _ in range(args.rounds)]
    return {"tasks": tasks, "seconds": sorted(found)}


def _start_engine(args: argparse.Namespace, world: World, budget: dict[str, str]) -> float:
    os.environ.update(ENVIRONMENT | CPU_ENVIRONMENT | budget)
    os.environ["VLLM_VLORA_CHECKPOINT"] = str(world.checkpoint(CHECKPOINT))
    from vllm import LLM

    began = time.perf_counter()
    LLM(**_arguments(args, world))
    return time.perf_counter() - began


def _print_start(found: list[dict[str, Any]]) -> None:
    rows = [(str(one["tasks"]), f"{one['seconds'][len(one['seconds']) // 2]:.1f}") for one in found]
    print(table(("tasks", "start, s"), rows))
