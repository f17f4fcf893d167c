"""The main job on a real model: compress real adapters, serve every task from the real vLLM.

    python examples/demo/run_demo.py            # what `make demo` runs

Prepares SmolLM2-135M-Instruct from its package, compresses the trained adapters beside this file,
starts `vllm serve` with the plugin and the same adapters uncompressed beside it, asks the base model,
every original and every compressed task the same held-out question at the same time, and prints what
each answered. Everything it starts, it stops.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
from prepare_model import prepare_model
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Task

HERE = Path(__file__).resolve().parent
WORK = HERE.parent.parent / ".cache" / "demo"
BASE = "smollm2"
ORIGINAL = "{}-original"
MAX_TOKENS = 32
console = Console(width=max(120, Console().width))


def main() -> int:
    options = _arguments()
    started = time.monotonic()
    console.rule("1  the model: SmolLM2-135M-Instruct from its package")
    model = prepare_model(WORK / "model")
    console.rule(f"2  compress {len(TASKS)} adapters into one checkpoint")
    checkpoint = WORK / "checkpoint"
    report = compress(checkpoint, options.ratio)
    console.rule("3  vllm serve --enable-lora, with the plugin and the originals beside it")
    with serving(model, checkpoint) as url:
        answers, seconds = ask(url)
    console.rule("4  what each answered")
    print_table(report, answers)
    console.print(
        f"{len(answers)} requests at once over {2 * len(TASKS)} adapters and the base model, answered "
        f"in {seconds:.1f} s; the whole demo took {time.monotonic() - started:.0f} s."
    )
    same = sum(answers[t.name] == answers[ORIGINAL.format(t.name)] for t in TASKS)
    changed = sum(answers[t.name] != answers[f"{BASE}/{t.name}"] for t in TASKS)
    console.print(
        f"{changed} of {len(TASKS)} tasks answer otherwise than the base model, {same} to the letter "
        "as their original adapter."
    )
    return 0 if changed == len(TASKS) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ratio",
        type=float,
        default=6.0,
        help="how many times smaller than 16-bit LoRA (default 6)",
    )
    return parser.parse_args()


def compress(checkpoint: Path, ratio: float) -> dict:
    """Run the command line tool as a user would; return what its ``info --json`` says."""
    folders = [str(HERE / "adapters" / task.name) for task in TASKS]
    console.print(
        f"$ vllm-vlora compress {' '.join(t.name for t in TASKS)} -o checkpoint --ratio {ratio:g}"
    )
    tool = [sys.executable, "-m", "vllm_vlora.tools"]
    arguments = ["-o", str(checkpoint), "--ratio", str(ratio), "--force"]
    subprocess.run([*tool, "compress", *folders, *arguments], check=True)
    done = subprocess.run(
        [*tool, "info", str(checkpoint), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


@contextmanager
def serving(model: Path, checkpoint: Path) -> Iterator[str]:
    """A running server's URL; the server and its workers are gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    originals = [f"{ORIGINAL.format(t.name)}={HERE / 'adapters' / t.name}" for t in TASKS]
    arguments = ["--enable-lora", "--max-loras", "8", "--max-cpu-loras", "32",
                 "--max-lora-rank", "16", "--max-model-len", "512", "--max-num-seqs", "32",
                 "--dtype", "bfloat16", "--enforce-eager", "--served-model-name", BASE,
                 "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                   **os.environ, "VLLM_VLORA_CHECKPOINT": str(checkpoint)}  # fmt: skip
    console.print(
        f"$ VLLM_VLORA_CHECKPOINT={checkpoint.name} vllm serve {model.name} --enable-lora ..."
    )
    log = WORK / "server.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [Path(sys.executable).with_name("vllm"), "serve", str(model), *arguments,
             "--lora-modules", *originals],
            env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        with console.status("starting vLLM (about a minute on two cores)"):
            _wait(server, url, log)
        for line in log.read_text(errors="replace").splitlines():
            if "vllm-vlora:" in line:
                console.print(line[line.index("vllm-vlora:") :], highlight=False)
        yield url
    finally:
        _stop(server)


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError):
            pass  # not listening yet
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise SystemExit(f"vLLM did not start; the end of {log}:\n{tail}")


def _stop(server: subprocess.Popen) -> None:
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def ask(url: str) -> tuple[dict[str, str], float]:
    """Every task's held-out question to the base model, its original and its compressed adapter.

    Returns:
        The answers by model name (``smollm2/TASK`` for the base model), and the seconds they took.
    """
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    listed = {model.id for model in client.models.list().data}
    missing = [task.name for task in TASKS if task.name not in listed]
    if missing:
        raise SystemExit(f"not in /v1/models: {', '.join(missing)}")

    def answer(job: tuple[str, str, Task]) -> tuple[str, str]:
        key, name, task = job
        done = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": task.held_out[0][0]}],
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        return key, " ".join((done.choices[0].message.content or "").split())

    jobs = []
    for task in TASKS:
        jobs.append((f"{BASE}/{task.name}", BASE, task))
        jobs.append((ORIGINAL.format(task.name), ORIGINAL.format(task.name), task))
        jobs.append((task.name, task.name, task))
    started = time.monotonic()
    with console.status(f"{len(jobs)} requests at once"), ThreadPoolExecutor(len(jobs)) as pool:
        answers = dict(pool.map(answer, jobs))
    return answers, time.monotonic() - started


def print_table(report: dict, answers: dict[str, str]) -> None:
    """One row a task: sizes, error and the three answers."""
    table = Table(show_lines=True)
    for title in ("task", "KB before", "KB after", "rel. error"):
        table.add_column(title, justify="left" if title == "task" else "right", no_wrap=True)
    for title in ("question", "base model", "original adapter", "served compressed"):
        table.add_column(title, ratio=1)
    rows = {row["task"]: row for row in report["tasks"]}
    for task in TASKS:
        row = rows[task.name]
        table.add_row(
            task.name,
            f"{row['original_bytes'] / 1000:,.0f}",
            f"{row['bytes'] / 1000:,.0f}",
            f"{row['error']:.3f}",
            task.held_out[0][0],
            _cut(answers[f"{BASE}/{task.name}"]),
            answers[ORIGINAL.format(task.name)],
            answers[task.name],
        )
    console.print(table)


def _cut(text: str, length: int = 70) -> str:
    """The base model rambles; the start of it shows the difference."""
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} ..."


if __name__ == "__main__":
    sys.exit(main())
