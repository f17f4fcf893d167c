"""Start a worker a measurement, in turns, and stop those that take too long."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from fitbench.worker import status_nbytes

_WORKER = Path(__file__).with_name("worker.py")
# What is imported before the clock starts.
_IMPORTS = {
    "ours": ["vllm_vlora.adapters.peft_folder", "vllm_vlora.fitting.shared_basis"],
    "vlora": ["vlora"],
    "vlora-streaming": ["vlora"],
    "lorashare": ["lorashare"],
    "exact": ["torch"],
}
_STARTUP_LIMIT_S = 120


@dataclass(frozen=True)
class Run:
    """One measurement. A stopped run gives lower bounds and no energy."""

    seconds: float
    cpu_seconds: float
    peak_nbytes: int
    stopped: bool
    energy: float | None = None
    stored_numbers: int | None = None
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """How often a contestant runs.

    Attributes:
        rounds: turns; ``ours`` runs before each turn of each rival.
        once_above_s: a rival that took longer is not run again.
        stop_at: a rival is stopped after this multiple of our median time; None never stops one.
            ``exact`` is never stopped, since the others' energies refer to it.
    """

    rounds: int
    once_above_s: float
    stop_at: float | None


Start = Callable[[str, float | None], Run]


def take_turns(rivals: list[str], policy: Policy, start: Start) -> dict[str, list[Run]]:
    """A B A C A B A C ...: ``start(contestant, limit in seconds)`` for each, by the policy."""
    runs: dict[str, list[Run]] = {"ours": []}
    for _ in range(policy.rounds):
        for rival in rivals or [None]:
            past = runs.setdefault(rival, []) if rival else []
            if past and max(run.seconds for run in past) > policy.once_above_s:
                continue
            runs["ours"].append(start("ours", None))
            if rival:
                limit = None
                if policy.stop_at is not None and rival != "exact":
                    limit = policy.stop_at * median(run.seconds for run in runs["ours"])
                past.append(start(rival, limit))
    return runs


def start_worker(
    python: Path | str, contestant: str, paths: list[Path], k: int, threads: int
) -> Callable[[float | None], Run]:
    """A function that measures once and stops the worker after its argument in seconds, if any."""

    def run(limit: float | None) -> Run:
        with tempfile.TemporaryDirectory(prefix="bench-fit-") as folder:
            work = Path(folder)
            job = {
                "contestant": contestant,
                "imports": _IMPORTS[contestant],
                "paths": [str(path) for path in paths],
                "k": k,
                "threads": threads,
                "started": str(work / "started.json"),
                "fitted": str(work / "fitted"),
                "answer": str(work / "answer.json"),
            }
            (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
            count = str(threads)
            environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
            with (work / "log").open("w+b") as log:
                process = subprocess.Popen(
                    [str(python), "-P", str(_WORKER), str(work / "job.json")],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
                try:
                    stopped = _wait(process, work, limit)
                finally:
                    process.kill()
                    process.wait()
                if stopped is not None:
                    return stopped
                if process.returncode:
                    log.seek(0)
                    text = log.read().decode(errors="replace").strip()
                    raise RuntimeError(f"{contestant} failed:\n{text[-2000:]}")
            return Run(stopped=False, **json.loads((work / "answer.json").read_text()))

    return run


def _wait(process: subprocess.Popen[bytes], work: Path, limit: float | None) -> Run | None:
    """None when the worker ends by itself; else what is known of it when the limit passes."""
    begun = time.monotonic()
    started, fit_begun = work / "started.json", None
    while process.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        if fit_begun is None:
            if started.exists():
                fit_begun = now
            elif now - begun > _STARTUP_LIMIT_S:
                raise RuntimeError(f"a worker has not started in {_STARTUP_LIMIT_S} s")
        elif limit is not None and now - fit_begun > limit and not (work / "fitted").exists():
            before = json.loads(started.read_text(encoding="utf-8"))
            return Run(
                seconds=now - fit_begun,
                cpu_seconds=_cpu_seconds(process.pid) - before["cpu_seconds"],
                peak_nbytes=status_nbytes("VmHWM", process.pid) - before["rss"],
                stopped=True,
            )
    return None


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
