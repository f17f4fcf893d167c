"""What all benchmarks share: options, the record of a run, tables, files and processes.

It imports neither torch nor vLLM: some drivers do without their memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).with_name("run.py")
RESULTS = RUNNER.parent / "results"
# A quiet machine has less than this many runnable processes, the benchmark itself included.
QUIET_LOAD = 1.5


class WrongResultError(Exception):
    """Something computes or holds what it should not; no figure may be printed."""


# --- options --------------------------------------------------------------------------------------


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def comma_list(text: str) -> tuple[str, ...]:
    """Names with commas between them, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def count_list(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, in rising order, each once."""
    return tuple(sorted({count(part) for part in comma_list(text)}))


COMMON: dict[str, dict[str, Any]] = {
    "quick": {"action": "store_true", "help": "a smoke run; its figures mean little"},
    "device": {"choices": ["cuda", "cpu"], "help": "cuda is also ROCm (default: cuda)"},
    "rounds": {"type": count, "metavar": "N"},
    "seed": {"type": int, "default": 0},
    "model": {"default": "tiny", "help": "as of the benchmark serving"},
    "work": {"type": Path, "help": "where adapters are kept (default: nowhere)"},
    "device-note": {"metavar": "TEXT", "help": "kept with the device's description"},
    "json": {"metavar": "FILE", "type": Path, "help": "also write everything to FILE"},
    "plot": {"metavar": "FILE", "type": Path, "help": "also draw it (needs matplotlib)"},
}


def add_common(parser: argparse.ArgumentParser, wanted: Mapping[str, str]) -> None:
    """--json, and other options of ``COMMON`` with the help that a benchmark gives them, if any."""
    for name, text in {"json": "", **wanted}.items():
        parser.add_argument(f"--{name}", **(COMMON[name] | ({"help": text} if text else {})))


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


# --- the record of a run --------------------------------------------------------------------------


def record(args: argparse.Namespace, device: str, *packages: str) -> dict[str, Any]:
    """The machine, the versions that a figure depends on, and the command."""
    note = getattr(args, "device_note", None)
    return {
        "device": f"{device} ({note})" if note else device,
        "load_average_at_start": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in (*packages, "vllm-vlora")},
        },
        "command": shlex.join(["python", *sys.argv]),
        "arguments": dict(vars(args)),
    }


def installed(package: str) -> str:
    """A package's version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's name where the system tells it, and its architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else None
    return f"{found[1] if found else 'CPU'} ({platform.machine()})"


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def print_record(report: Mapping[str, Any]) -> None:
    """Device, versions and command."""
    print(f"device: {report['device']}")
    print(", ".join(f"{name} {value}" for name, value in report["versions"].items() if value))
    print(f"command: {report['command']}", flush=True)


def end_record(report: dict[str, Any]) -> None:
    """Note and print the load of the machine."""
    report["load_average_at_end"] = os.getloadavg()[0]
    # At the end the load contains this run's own threads.
    load = report["load_average_at_start"]
    print(f"load average {load:.2f} at the start, {report['load_average_at_end']:.2f} at the end")
    if load > QUIET_LOAD:
        print(f"the machine was not quiet ({load:.2f} > {QUIET_LOAD}): do not quote these figures")


# --- output ---------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Progress, to stderr."""
    print(f"... {text}", file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as what they hold; the first ``left`` of them begin at the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write the report where a file is asked for: beside it, then moved into place."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


# --- processes ------------------------------------------------------------------------------------


def in_another_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh process, so that this one stays as it is."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()
