"""A burst of one task beside a few requests of others: what fair sharing gives and what it costs."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    WrongResultError,
    count,
    cpu_name,
    end_record,
    print_record,
    record,
    table,
    write_json,
)
from serving.engine import Engine, EngineSpec
from serving.figures import Trace, spread_of_ratios
from serving.loads import Job, make_calls
from serving.program import CPU_ENVIRONMENT, ENVIRONMENT
from serving.world import World, WorldPlan

DESCRIPTION = """\
Two real vLLM engines on CPU with the plugin, one with VLLM_VLORA_FAIR=on and one without, take turns:
each serves --burst requests of one task and, handed over right behind them, --few of another and the
base model's --few. Reported are the seconds until the few had their first token, which is what a burst
takes from others, and the tokens a second of the whole, which is what fairness may cost: ratios are
taken round by round. The answers of both engines are compared before any figure is printed.

A second load asks --tasks tasks in turn, as many requests together, so that no one is favoured: what
the counters themselves cost.
"""
EXAMPLES = """\
  python benchmarks/run.py fairness --quick          a check that it runs, about a minute
  python benchmarks/run.py fairness --json FILE      two to three minutes on two cores
"""
CHECKPOINT, RANK = "nf4", 8
KV_BYTES = 256 * 2**20
ENGINES = {"first come": {}, "fair": {"VLLM_VLORA_FAIR": "on"}}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The loads and the engine's room."""
    parser.add_argument("--burst", type=count, help="requests of one task (default: 200)")
    parser.add_argument("--few", type=count, default=5, help="of the other, and base (default: 5)")
    parser.add_argument("--tasks", type=count, default=8, help="of the second load (default: 8)")
    parser.add_argument("--prompt-len", type=count, default=16, help="tokens (default: 16)")
    parser.add_argument("--output-len", type=count, default=16, help="tokens (default: 16)")
    parser.add_argument("--max-num-seqs", type=count, default=16, help="at once (default: 16)")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sizes of a smoke run where one is asked for."""
    args.burst = args.burst or (40 if args.quick else 200)
    args.rounds = args.rounds or (2 if args.quick else 7)
    if args.tasks < 2:
        parser.error("--tasks is at least 2")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    os.environ.update(ENVIRONMENT)
    report = record(args, cpu_name(), "vllm", "torch")
    print_record(report)
    with tempfile.TemporaryDirectory(prefix="bench-fairness-") as temporary:
        world = World(
            args.work or Path(temporary), WorldPlan(args.model, args.tasks, args.tasks, RANK)
        )
        world.make([CHECKPOINT])
        loads = {"burst": _burst(args, world), "even": _even(args, world)}
        traces = measure(args, world, loads, Path(temporary))
    report["loads"] = {name: figures(args, name, traces[name]) for name in loads}
    print_figures(report["loads"])
    end_record(report)
    write_json(args.json, report)
    return 0


def _burst(args: argparse.Namespace, world: World) -> Job:
    """A burst of task 0, then the others."""
    tasks: list[Any] = [0] * args.burst + [1, None] * args.few
    return _job(args, world, tasks)


def _even(args: argparse.Namespace, world: World) -> Job:
    return _job(args, world, [number % args.tasks for number in range(args.burst)])


def _job(args: argparse.Namespace, world: World, tasks: list[Any]) -> Job:
    vocabulary = world.config["vocab_size"]
    calls = make_calls(tasks, args.prompt_len, vocabulary, np.random.default_rng(0))
    return Job(calls, args.output_len, concurrency=len(calls))


def measure(
    args: argparse.Namespace, world: World, loads: dict[str, Job], folder: Path
) -> dict[str, dict[str, list[Trace]]]:
    """Load -> engine -> a trace a round, of engines that took turns.

    Raises:
        WrongResultError: the engines' answers differ.
    """
    found: dict[str, dict[str, list[Trace]]] = {
        load: {name: [] for name in ENGINES} for load in loads
    }
    engines = {name: Engine(_spec(args, world, name, folder)) for name in ENGINES}
    try:
        for turn in range(args.rounds + 1):
            for load, job in loads.items():
                for name, engine in engines.items():
                    trace = engine.run(job)
                    if turn:  # The first is to warm up.
                        found[load][name].append(trace)
                answers = [traces[-1].tokens for traces in found[load].values() if traces]
                if any(other != answers[0] for other in answers):
                    raise WrongResultError(f"{load}: with fair sharing other tokens come out")
    finally:
        for engine in engines.values():
            engine.stop()
    return found


def _spec(args: argparse.Namespace, world: World, name: str, folder: Path) -> EngineSpec:
    checkpoint = str(world.checkpoint(CHECKPOINT))
    return EngineSpec(
        name=name,
        arguments={
            "model": str(world.model),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "enable_lora": True,
            "max_loras": args.tasks,
            "max_lora_rank": RANK,
            "max_model_len": args.prompt_len + args.output_len,
            "max_num_seqs": args.max_num_seqs,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": KV_BYTES,
        },
        environment=CPU_ENVIRONMENT
        | {"OMP_NUM_THREADS": "1", "VLLM_VLORA_CHECKPOINT": checkpoint}
        | ENGINES[name],
        adapters=[],
        checkpoint=checkpoint,
        initialise=world.load_format == "dummy",
        log=folder / "logs" / f"{name}.log",
    )


def figures(args: argparse.Namespace, load: str, traces: dict[str, list[Trace]]) -> dict[str, Any]:
    """Of one load: throughput of each engine and their ratio, and when the few were answered."""
    rates = {
        name: [args.output_len * len(trace.tokens) / trace.seconds for trace in rounds]
        for name, rounds in traces.items()
    }
    made: dict[str, Any] = {
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "throughput_ratio": spread_of_ratios(rates["fair"], rates["first come"]),
    }
    if load == "burst":
        made["few_first_token_seconds"] = {
            name: statistics.median(
                max(trace.first_token_times()[args.burst :]) for trace in rounds
            )
            for name, rounds in traces.items()
        }
        made["burst_last_token_seconds"] = {
            name: statistics.median(
                max(times[-1] for times in trace.arrivals[: args.burst]) - trace.started
                for trace in rounds
            )
            for name, rounds in traces.items()
        }
    return made


def print_figures(loads: dict[str, Any]) -> None:
    """A table a load."""
    for load, found in loads.items():
        seconds = [key for key in found if key.endswith("_seconds")]
        rows = [
            [name, f"{found['tokens_per_second'][name]:.0f}"]
            + [f"{found[key][name]:.3f}" for key in seconds]
            for name in ENGINES
        ]
        head = [load, "tokens/s", *(key.replace("_", " ") for key in seconds)]
        print(f"\n{table(head, rows)}")
        ratio = found["throughput_ratio"]
        print(
            f"throughput of fair / first come: {ratio['p50']:.3f} "
            f"(p20 {ratio['p20']:.3f}, p80 {ratio['p80']:.3f}, {ratio['count']} rounds)"
        )
