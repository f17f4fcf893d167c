"""Run one of the benchmarks by its name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from harness import WrongResultError, add_common, can_plot


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that this program can run.

    Attributes:
        purpose: one line.
        module: has DESCRIPTION and EXAMPLES for --help, ``add_options(parser)``,
            ``resolve(parser, args)``, which fills in what was not given and refuses what cannot be run,
            and ``run(args)``, which returns the exit status. It is imported when it is asked for.
        common: options of ``harness.COMMON`` beside --json, with other help or none.
    """

    purpose: str
    module: str
    common: dict[str, str]


# Of those that make adapters for a model of their own.
_SERVED = {"device-note": "", "model": "", "work": ""}
BENCHMARKS = {
    "activation": Benchmark(
        "time to make a task ready that is not loaded: vLLM's worker, or the kernels alone",
        "activation.program",
        {
            "device": "with --no-engine (default: cuda where there is one)",
            "rounds": "timed calls of each (default: 40, 15 or more; 30 with --no-engine)",
            "device-note": "",
        },
    ),
    "kernels": Benchmark(
        "the kernels of a LoRA forward pass and of an activation, against vLLM's own",
        "kernelbench.program",
        {
            "device": "",
            "quick": "only what the aims need of llama-7b",
            "rounds": "samples of each operation (default: 20)",
            "device-note": "",
            "plot": "",
        },
    ),
    "gpucheck": Benchmark(
        "what only a GPU can show of the direct kernels: results, graphs, each kernel's time",
        "gpucheck.program",
        {"device": "", "quick": "few and small batches", "device-note": ""},
    ),
    "serving": Benchmark(
        "throughput and latency of a vLLM engine against the number of tasks it serves",
        "serving.program",
        {
            "quick": "",
            "rounds": "how often everything is run (default: 3; 5 on a GPU)",
            "seed": "of prompts and popularity (default: 0)",
            "device-note": "",
            "plot": "",
        },
    ),
    "fairness": Benchmark(
        "one task's burst beside others: latency and throughput, with fair sharing and without",
        "fairness",
        {"quick": "", "rounds": "turns of each (default: 7)", **_SERVED},
    ),
    "watching": Benchmark(
        "what following the folder and counting for /metrics take from a busy server",
        "watching",
        {"quick": "", "rounds": "turns of each (default: 9)", **_SERVED},
    ),
    "residency": Benchmark(
        "the first token of tasks on the device, in host memory and on disk; starts with many tasks",
        "residency",
        {"quick": "", "rounds": "turns of each (default: 3)", **_SERVED},
    ),
    "publish": Benchmark(
        "a task from tensors in memory: until an engine has it, beside a folder and a copy",
        "publish",
        {"quick": "", "rounds": "turns of each (default: 9)", "device-note": ""},
    ),
    "exchange": Benchmark(
        "a changed basis: reading it, and putting it in the place of the one before",
        "exchange",
        {"quick": "", "rounds": "turns (default: 9)", "device-note": ""},
    ),
    "fidelity": Benchmark(
        "what adapters keep when they are compressed: recovered fraction against bytes",
        "fidelity.program",
        {
            "quick": "",
            "device-note": "",
            "plot": "picture (default: beside the JSON file, .svg)",
        },
    ),
    "fit": Benchmark(
        "time and memory of fitting a shared basis: ours, the seed libraries, exact",
        "fitbench.program",
        {"quick": "", "rounds": "turns of each (default: 2)", "device-note": "", "plot": ""},
    ),
    "compress": Benchmark(
        "compressing adapters of an 8B model and very many tiny ones: CPU time, the floor",
        "field",
        {"quick": "", "rounds": "turns of each (default: 2)", "device-note": ""},
    ),
    "scale": Benchmark(
        "compressing very many adapters: seconds a module, memory, reads, the floor",
        "scale",
        {"quick": "", "device-note": ""},
    ),
    "catalogue": Benchmark(
        "opening checkpoints of very many tasks: seconds and memory, as JSON and as an index",
        "catalogue",
        {"quick": "", "device-note": ""},
    ),
    "routing": Benchmark(
        "a router of prompts: which features are right how often, and what a pick costs",
        "routing",
        {"quick": "", "rounds": "routers of each (default: 3)", "device-note": ""},
    ),
    "distortion": Benchmark(
        "what codes of 2 to 8 bits lose, beside the rate-distortion bound",
        "distortion.program",
        {"quick": "", "seed": "of rows (default: 0)", "device-note": ""},
    ),
    "roofline": Benchmark(
        "the least time of every path on a named GPU, beside what was measured",
        "roofline",
        {"plot": ""},
    ),
}


def parse(name: str, arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The benchmark's module, and its options; ends the program where they cannot be run."""
    chosen = BENCHMARKS[name]
    module = importlib.import_module(chosen.module)
    parser = argparse.ArgumentParser(
        prog=f"run.py {name}",
        description=module.DESCRIPTION,
        epilog="examples:\n" + module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser, chosen.common)
    module.add_options(parser)
    args = parser.parse_args(arguments)
    if getattr(args, "plot", None) and not can_plot():
        parser.error("--plot needs matplotlib: pip install matplotlib")
    module.resolve(parser, args)
    return module, args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names, or list them; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(
            "python benchmarks/run.py NAME [options]; NAME --help says what is measured and how\n"
        )
        for name, found in BENCHMARKS.items():
            print(f"  {name:12} {found.purpose}")
        return 0
    if given[0] not in BENCHMARKS:
        print(f"no benchmark {given[0]!r}; use {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    module, args = parse(given[0], given[1:])
    try:
        return module.run(args)
    except WrongResultError as error:
        print(f"wrong result, no figures: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
