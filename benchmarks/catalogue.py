"""Opening checkpoints of very many tasks: CPU seconds and memory, as JSON and as an index."""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from harness import (
    count_list,
    cpu_name,
    end_record,
    in_another_process,
    print_record,
    record,
    say,
    table,
    write_json,
)

from vllm_vlora.checkpoint import manifest
from vllm_vlora.checkpoint.manifest import TaskRecord, task_file
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.plugin.identity import task_ids_to_int, task_paths
from vllm_vlora.representations.spec import Segment

DESCRIPTION = """\
Write what names the tasks of a checkpoint, with records of a Llama's layers and without any weights, in
both ways: tasks.json (formats 1 to 3) and tasks.index with tasks.records (format 4). Then, in a process
for each, open it, list its tasks, sum their sizes, read the record of one, and find the path and the
number by which vLLM would know every task. Times are of the CPU, with the files in the page cache. Memory
is what the process's peak has grown by in all of it. The folder is removed again.
"""
EXAMPLES = """\
  python benchmarks/run.py catalogue --quick             a check that it runs
  python benchmarks/run.py catalogue                     100 to 100000 tasks, JSON up to 10000
  python benchmarks/run.py catalogue --distinct 100000   no two tasks are stored alike
"""
LEAVES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (2048, 512),
    "self_attn.v_proj": (2048, 512),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (2048, 8192),
    "mlp.up_proj": (2048, 8192),
    "mlp.down_proj": (8192, 2048),
}
ORDERS = 100
WAYS = ("json", "index")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", metavar="LIST", type=count_list)
    parser.add_argument(
        "--json-tasks",
        metavar="N",
        type=int,
        help="the most that are written as JSON (default: 10000)",
    )
    parser.add_argument("--layers", metavar="N", type=int, help="of seven modules (default: 16)")
    parser.add_argument(
        "--distinct", metavar="N", type=int, default=100, help="lists of segments (default: 100)"
    )


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.tasks = args.tasks or ((100, 1000) if args.quick else (100, 1000, 10_000, 100_000))
    args.layers = args.layers or (2 if args.quick else 16)
    args.json_tasks = 10_000 if args.json_tasks is None else args.json_tasks
    if args.distinct < 1:
        parser.error("--distinct must be at least 1")


def run(args: argparse.Namespace) -> int:
    report = record(args, cpu_name(), "msgspec", "numpy", "torch")
    print_record(report)
    cells = []
    for tasks in args.tasks:
        for way in WAYS:
            if way == "json" and tasks > args.json_tasks:
                continue
            say(f"{tasks} tasks, {way}")
            cells.append(in_another_process(measure, args.layers, args.distinct, tasks, way))
    report["cells"] = cells
    head = ["tasks", "as", "MB", "write s", "open ms", "list", "sums", "record", "paths", "peak MB"]
    print(table(head, [format_cell(cell) for cell in cells], left=2))
    end_record(report)
    if args.json:
        write_json(args.json, report)
    return 0


def measure(layers: int, distinct: int, tasks: int, way: str) -> dict[str, Any]:
    """One cell; the checkpoint is written by another process, whose memory is not counted."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-vlora-catalogue-"))
    try:
        seconds = in_another_process(write, folder, layers, distinct, tasks, way)
        before = _peak_mb()
        cell = {"tasks": tasks, "as": way, "write_seconds": seconds, **read(folder)}
        return cell | {"peak_mb": _peak_mb() - before}
    finally:
        shutil.rmtree(folder)


def write(folder: Path, layers: int, distinct: int, tasks: int, way: str) -> float:
    """Write what names so many tasks; returns the CPU seconds."""
    from vllm_vlora.checkpoint import task_spool

    assert task_spool.manifest is manifest
    started = time.process_time()
    with mock.patch.object(manifest, "INDEXED_TASKS", 1 if way == "index" else sys.maxsize):
        writer = CheckpointWriter(folder, "meta-llama/Llama-3.2-1B")
        names = [
            (f"model.layers.{layer}.{leaf}", *shape)
            for layer in range(layers)
            for leaf, shape in LEAVES.items()
        ]
        for name, d_in, d_out in names:
            writer.add_module(name, d_in, d_out)
        for number in range(tasks):
            task_id = f"tenant-{number % 997}/adapter-{number}"
            writer.tasks.add(task_id, make_record(task_id, number, distinct, len(names)))
        writer.finish("")
    return time.process_time() - started


def make_record(task_id: str, number: int, distinct: int, modules: int) -> TaskRecord:
    """A task with ranks of its own kind, and errors and a digest of its own."""
    kind, own = random.Random(number % distinct), random.Random(number)
    segments = [
        Segment(place, "private", "nf4-dq", kind.randint(4, 16), 1.0, own.random() / 10)
        for place in range(modules)
    ]
    targets = [leaf.rpartition(".")[2] for leaf in LEAVES]
    # Python saves a set in an order that differs from process to process.
    random.Random(number % ORDERS).shuffle(targets)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "bias": "none",
        "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "target_modules": targets,
        "lora_dropout": 0.05, "modules_to_save": None, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    return TaskRecord(
        file=task_file(task_id),
        sha256=own.randbytes(32).hex(),
        nbytes=1_000_000,
        original_nbytes=8_000_000,
        error=own.random() / 10,
        segments=segments,
        adapter_config=config,
        source=f"adapter-{number}",
    )


def read(folder: Path) -> dict[str, Any]:
    """CPU seconds of what a server does at its start, and of reading one task's record."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = call()
        seconds[name] = time.process_time() - began
        return found

    names = ("tasks.json", "tasks.index", "tasks.records")
    nbytes = sum((folder / name).stat().st_size for name in names if (folder / name).exists())
    opened = timed("open", lambda: Checkpoint.open(folder))
    ids = timed("list", lambda: list(opened.tasks))
    timed("sums", lambda: (opened.max_rank, opened.nbytes, opened.ratio, opened.usage()))
    timed("record", lambda: opened.record(ids[len(ids) // 2]))
    timed("paths", lambda: task_ids_to_int(task_paths(opened)))
    return {"nbytes": nbytes, "seconds": seconds}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def format_cell(cell: dict[str, Any]) -> list[str]:
    seconds = cell["seconds"]
    return [
        str(cell["tasks"]),
        cell["as"],
        f"{cell['nbytes'] / 1e6:.1f}",
        f"{cell['write_seconds']:.1f}",
        *(f"{1e3 * seconds[name]:.1f}" for name in ("open", "list", "sums", "record", "paths")),
        f"{cell['peak_mb']:.0f}",
    ]
