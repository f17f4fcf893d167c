"""The start of a vLLM engine with the plugin and a checkpoint, against stock vLLM's.

What is timed includes vLLM's import, and so torch's: this file imports neither before.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import RUNNER, in_another_process, say

from vllm_vlora.timing import percentile, seconds_of, take_turns

if TYPE_CHECKING:
    from activation.work import Work

CHILD = "import sys; from activation.startup import child; child(sys.argv[1])"


def measure(work: Work) -> dict[str, Any]:
    """Seconds from spawning a process to a ready engine, stock and with a checkpoint, in turn."""
    args = work.args
    say(f"making a private nf4 checkpoint of {args.startup_tasks} tasks")
    in_another_process(make_startup_checkpoint, work)
    checkpoint = work.startup_checkpoint
    job = {
        "engine": work.engine_arguments(),
        "folders": [str(work.adapter_folder / str(i)) for i in range(args.tasks)],
        "rounds": args.rounds,
        "warmup": args.warmup,
    }
    starts: dict[str, list[dict[str, Any]]] = {"stock": [], "plugin": []}
    for turn in range(args.startup_rounds):
        for arm, runs in starts.items():
            say(f"start {turn + 1} of {args.startup_rounds}, {arm}")
            runs.append(start_once(job, checkpoint if arm == "plugin" else None))
    size = sum(f.stat().st_size for f in checkpoint.rglob("*.safetensors"))
    return {
        "tasks": args.startup_tasks,
        "checkpoint_bytes": size,
        "unit": "s",
        **starts,
    }


def make_startup_checkpoint(work: Work) -> None:
    from vllm_vlora import CompressOptions, compress

    options = CompressOptions(representation="private", quantize="nf4", ratio=0.1)
    compress(work.make_adapters(work.args.startup_tasks), work.startup_checkpoint, options)


def start_once(job: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """One fresh process; its own account, the wall time until it was ready, and the plugin's log."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "PYTHONUNBUFFERED": "1"}
    environment["VLLM_PLUGINS"] = "vlora" if checkpoint else ""
    if checkpoint:
        environment["VLLM_VLORA_CHECKPOINT"] = str(checkpoint)
    command = [sys.executable, "-c", CHILD, json.dumps(job)]
    started = time.perf_counter()
    lines: list[str] = []
    account: dict[str, Any] = {}
    with subprocess.Popen(
        command,
        env=environment,
        cwd=RUNNER.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("READY "):
                account |= {"ready": time.perf_counter() - started}
            if line.startswith(("READY ", "DONE ")):
                account |= json.loads(line.split(" ", 1)[1])
    if process.returncode or "ready" not in account:
        raise SystemExit("the engine did not start:\n" + "".join(lines[-30:]))
    log = "".join(lines)
    if checkpoint:
        preload = re.search(r"(\d+) tasks resident on .*?, ([\d.]+) MiB, loaded in ([\d.]+) s", log)
        if preload is None:
            raise SystemExit("the plugin logged no preload:\n" + "".join(lines[-30:]))
        account |= {"preload": float(preload[3]), "resident_mib": float(preload[2])}
    return account


def child(text: str) -> None:
    """In the fresh process: start the engine, say so, and time stock code alone there."""
    job = json.loads(text)
    began = time.perf_counter()
    import vllm  # noqa: F401
    from vllm import LLM  # noqa: F401  (the name that loads the rest)

    account = {"import_vllm": time.perf_counter() - began}
    plugin = os.environ["VLLM_PLUGINS"] != ""
    if plugin:
        # vLLM would call it itself, a little later; it does nothing the second time.
        began = time.perf_counter()
        from vllm_vlora.plugin import register

        register()
        account["plugin_import"] = time.perf_counter() - began
    from activation.work import start_engine, worker_manager

    began = time.perf_counter()
    llm = start_engine(job["engine"])
    account["engine"] = time.perf_counter() - began
    print("\nREADY " + json.dumps(account), flush=True)
    times = time_stock(worker_manager(llm), job["folders"], job["rounds"], job["warmup"])
    print("\nDONE " + json.dumps({"stock_activation_ms": 1e3 * percentile(times, 50)}))
    llm.llm_engine.engine_core.shutdown()


def time_stock(manager: Any, folders: list[str], rounds: int, warmup: int) -> list[float]:
    """Seconds of stock code's loads, one task after another."""
    from clock import synchronise
    from vllm.lora.request import LoRARequest

    requests = cycle(
        LoRARequest(f"task-{number}", 1 + number, folder) for number, folder in enumerate(folders)
    )

    def load() -> float:
        request = next(requests)
        add = partial(manager.add_adapter, request)
        seconds = seconds_of(add, partial(synchronise, manager.device))
        manager.remove_adapter(request.lora_int_id)
        return seconds

    (times,) = take_turns([load], rounds, warmup)
    return times


def show(startup: dict[str, Any]) -> None:
    print(
        f"\nStart of the engine in a fresh process, in s, to ready; checkpoint of {startup['tasks']} "
        f"private nf4 tasks, {startup['checkpoint_bytes'] / 1e6:.0f} MB:"
    )
    for arm, label in (("stock", "VLLM_PLUGINS=''"), ("plugin", "with plugin")):
        runs = startup[arm]
        print(f"  {label:16} " + " ".join(f"{run['ready']:7.2f}" for run in runs))
    print(
        "  within it: vLLM's import, plugin's import and install, engine with preload (as logged); "
        "then a PEFT folder's\n  activation by stock code, p50 in ms"
    )
    for arm, label in (("stock", "VLLM_PLUGINS=''"), ("plugin", "with plugin")):
        for run in startup[arm]:
            print(
                f"  {label:16} {run['import_vllm']:7.2f} {run.get('plugin_import', 0):7.2f} "
                f"{run['engine']:7.2f} ({run.get('preload', 0):.2f})   "
                f"{run['stock_activation_ms']:7.3f}"
            )
    print(f"  the plugin logged {startup['plugin'][0]['resident_mib']:.1f} MiB resident")
