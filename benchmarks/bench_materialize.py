"""Time the activation of one task: writing its A and B of every module into a serving slot."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import vllm_vlora
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.triton_kernels.materialize import (
    MaterializeJob,
    materialize,
    materialize_reference,
    plan_materialize,
)

DESCRIPTION = """\
Time the activation of one task of a checkpoint: its LoRA factors A and B of every module of a
model are written into the slot of a serving engine, from packed matrices that are resident on
the device. Methods, run in turn (A B C A B C ...) so that a drift of the machine hits all alike:

  plan           the jobs planned once and run, as the plugin does: on a GPU two or three launches of
                 the Triton kernel, host time included; elsewhere torch
  plan and run   the same with the planning, which the plugin does once a task
  plan, graph    the launches replayed from a CUDA graph: the device's own time
  reference      the torch reference on the same device, factor by factor
  host copy      the finished A and B copied from (pinned) host memory, as stock LoRA swapping does

Every method's result is compared with a float64 product before anything is timed; when one is
wrong, no figure is printed and the exit status is 1.

The byte floor is the time to read the packed matrices once and to write A and B once at the copy
bandwidth that this run measures on the device; "x floor" is a method's p50 over it.
"""
EPILOG = """\
examples:
  python benchmarks/bench_materialize.py                            on a GPU: Llama-7B shapes
  python benchmarks/bench_materialize.py --formats nf4 --k 64 --json result.json
  python benchmarks/bench_materialize.py --device cpu               a small model, without Triton
"""
FORMATS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "nf4": "nf4", "nf4-dq": "nf4-dq"}
# (layers, hidden, intermediate)
MODELS = {"llama-7b": (32, 4096, 11008), "tiny": (4, 256, 704)}
SLOT_DTYPE = torch.bfloat16


@dataclass
class Setup:
    """One task's jobs on the device, and what they move."""

    jobs: list[MaterializeJob]
    bytes_read: int
    bytes_written: int

    def poison(self) -> None:
        for job in self.jobs:
            job.out.fill_(float("nan"))


@dataclass
class Method:
    name: str
    run: Callable[[], object]


def main() -> int:
    args = parse_arguments()
    device = torch.device(args.device)
    methods_note = "" if device.type == "cuda" else " (no GPU: torch only)"
    device_name, versions = describe(device)
    print(f"{device_name}{methods_note}")
    print(", ".join(f"{name} {value}" for name, value in versions.items()))
    copy_bandwidth = measure_copy_bandwidth(device, args.repeats)
    print(
        f"copy bandwidth: on the device {copy_bandwidth['device'] / 1e9:.1f} GB/s (bytes read plus "
        f"written), from the host {copy_bandwidth['host'] / 1e9:.1f} GB/s"
    )
    layers, hidden, intermediate = MODELS[args.model]
    print(
        f"{args.model} shapes: {layers} layers, hidden {hidden}, intermediate {intermediate}; rank "
        f"{args.rank}; left {args.left_dtype}, slots bfloat16; {args.repeats} interleaved runs\n"
    )
    columns = f"{'format':8} {'stored as':12} {'method':14} {'p20':>9} {'p50':>9} {'p80':>9}"
    print(f"{columns}  {'floor':>9}  x floor")
    results = []
    for name in args.formats:
        for k in [0, *args.k]:
            torch.manual_seed(0)
            setup = build(args.model, FORMATS[name], k, args.rank, args.left_dtype, device)
            try:
                methods = prepare(setup, device)
            except ArithmeticError as error:
                print(f"wrong result, no figures: {name} k={k}: {error}", file=sys.stderr)
                return 1
            floor = (setup.bytes_read + setup.bytes_written) / copy_bandwidth["device"]
            times = interleave(methods, device, args.repeats, args.warmup)
            for method in methods:
                row = summarise(name, k, method.name, times[method.name], floor, setup)
                results.append(row)
                print_row(row)
            del setup, methods
    if args.json:
        report = {"device": device_name, "versions": versions, "arguments": vars(args)}
        report["copy_bytes_per_s"] = copy_bandwidth
        Path(args.json).write_text(
            json.dumps({**report, "results": results}, indent=1, default=str)
        )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda (also ROCm) or cpu (default: cuda where there is one)",
    )
    parser.add_argument(
        "--model", choices=MODELS, help="shapes (default: llama-7b on a GPU, tiny elsewhere)"
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the task (default: 16)")
    parser.add_argument(
        "--k",
        type=int,
        nargs="*",
        default=[32, 64, 128],
        help="components of the shared bases (default: 32 64 128); a private task, which has no "
        "basis, is always timed too",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=["bf16", "int8", "nf4"],
        help="how bases and private factors are stored (default: bf16 int8 nf4)",
    )
    parser.add_argument(
        "--left-dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="dtype of a joint task's own matrices (default: bfloat16)",
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed runs a method (default: 30)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed runs a method (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="also write everything to FILE")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    for option in ("rank", "repeats"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1")
    if args.warmup < 0 or any(k < 1 for k in args.k):
        parser.error("--warmup must not be negative and --k must be at least 1")
    args.model = args.model or ("llama-7b" if args.device.startswith("cuda") else "tiny")
    return args


def describe(device: torch.device) -> tuple[str, dict[str, str]]:
    """The device's name, and the versions that a figure depends on."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm-vlora": vllm_vlora.__version__,
    }
    if device.type != "cuda":
        return f"CPU {platform.machine()}, {torch.get_num_threads()} threads", versions
    import triton

    versions["triton"] = triton.__version__
    versions["HIP" if torch.version.hip else "CUDA"] = str(torch.version.hip or torch.version.cuda)
    return torch.cuda.get_device_name(device), versions


def measure_copy_bandwidth(device: torch.device, repeats: int) -> dict[str, float]:
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.ones(size // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    methods = [
        Method("device", lambda: target.copy_(source)),
        Method("host", lambda: target[: host.numel()].copy_(host, non_blocking=True)),
    ]
    times = interleave(methods, device, min(repeats, 20), 3)
    return {
        "device": 2 * size / percentile(times["device"], 50),
        "host": host.numel() / percentile(times["host"], 50),
    }


def build(
    model: str, format: str, k: int, rank: int, left_dtype: str, device: torch.device
) -> Setup:
    """Jobs of one task: joint over ``k`` components, or private for ``k = 0``.

    Every module has matrices of its own, as in a checkpoint, so that no cache can serve twice.
    """
    layers, hidden, intermediate = MODELS[model]
    shapes = [(hidden, hidden)] * 4 + [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
    jobs = []
    for d_in, d_out in shapes * layers:
        slot_a = torch.empty(rank, d_in, dtype=SLOT_DTYPE, device=device)
        slot_b = torch.empty(d_out, rank, dtype=SLOT_DTYPE, device=device)
        for out in (slot_a, slot_b.t()):
            matrix = pack(torch.randn(k or rank, out.shape[1], device=device), format)
            left = None
            if k:
                left = torch.randn(rank, k, device=device).to(getattr(torch, left_dtype))
            jobs.append(MaterializeJob(out, matrix, left, 1.0, 0, out.shape[1]))
    lefts = [job.left for job in jobs if job.left is not None]
    read = sum(job.matrix.nbytes for job in jobs) + sum(t.nbytes for t in lefts)
    return Setup(jobs, read, sum(job.out.numel() * job.out.element_size() for job in jobs))


def prepare(setup: Setup, device: torch.device) -> list[Method]:
    """The methods, each run once on poisoned slots and found right.

    Raises:
        ArithmeticError: a method's result differs from the float64 product by more than rounding.
    """
    plan = plan_materialize(setup.jobs)
    methods = [
        Method("plan", plan.run),
        Method("plan and run", lambda: materialize(setup.jobs)),
        Method("reference", lambda: materialize_reference(setup.jobs)),
    ]
    for method in methods:
        check(setup, method)
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.run()
        methods.insert(2, Method("plan, graph", graph.replay))
        check(setup, methods[2])
    pinned = device.type == "cuda"
    # In the memory order of the slot: a contiguous copy, the best case for the host.
    hosts = [memory_order(job.out).cpu() for job in setup.jobs]
    hosts = [host.pin_memory() if pinned else host.clone() for host in hosts]

    def copy_from_host() -> None:
        for job, host in zip(setup.jobs, hosts):
            memory_order(job.out).copy_(host, non_blocking=True)

    methods.append(Method("host copy", copy_from_host))
    check(setup, methods[-1])
    return methods


def memory_order(out: torch.Tensor) -> torch.Tensor:
    return out if out.is_contiguous() else out.t()


def check(setup: Setup, method: Method) -> None:
    setup.poison()
    method.run()
    for index, job in enumerate(setup.jobs):
        matrix = unpack(job.matrix).double()
        expected, magnitude = matrix, matrix.abs()
        if job.left is not None:
            left = job.left.double()
            expected, magnitude = left @ matrix, left.abs() @ matrix.abs()
        # float32 accumulation, then one rounding to bfloat16.
        bound = (job.matrix.rows + 2) * 2.0**-24 * magnitude + 2.0**-8 * 1.001 * expected.abs()
        error = (job.out.double() - expected).abs()
        if not bool((error <= bound).all()):
            raise ArithmeticError(f"{method.name}, factor {index}: error up to {error.max():g}")


def interleave(
    methods: list[Method], device: torch.device, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each run of each method, from the call to the end of the device's work."""
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    for index in range(warmup + repeats):
        for method in methods:
            synchronise(device)
            started = time.perf_counter()
            method.run()
            synchronise(device)
            if index >= warmup:
                times[method.name].append(time.perf_counter() - started)
    return times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(values: list[float], percent: int) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(percent / 100).item()


def summarise(
    format: str, k: int, method: str, times: list[float], floor: float, setup: Setup
) -> dict[str, object]:
    return {
        "format": format,
        "representation": "joint" if k else "private",
        "k": k,
        "method": method,
        "unit": "ms",
        **{f"p{percent}": 1e3 * percentile(times, percent) for percent in (20, 50, 80)},
        "floor": 1e3 * floor,
        "ratio_to_floor": percentile(times, 50) / floor,
        "bytes_read": setup.bytes_read,
        "bytes_written": setup.bytes_written,
    }


def print_row(row: dict[str, object]) -> None:
    stored = f"joint k={row['k']}" if row["k"] else "private"
    times = " ".join(f"{row[name]:6.3f} ms" for name in ("p20", "p50", "p80", "floor"))
    print(
        f"{row['format']:8} {stored:12} {row['method']:14} {times}  {row['ratio_to_floor']:7.2f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
