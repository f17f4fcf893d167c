"""Serve every task of a checkpoint with ``vllm-vlora serve``, and ask some of them at once.

    python examples/serve_and_query.py BASE_MODEL my-checkpoint "What is the capital of Italy?"
    python examples/serve_and_query.py BASE_MODEL my-checkpoint "Hello" --task sql --task french
    python examples/serve_and_query.py BASE_MODEL my-checkpoint "Hello" --url http://localhost:8000
    python examples/serve_and_query.py BASE_MODEL my-checkpoint "Hello" -- --enforce-eager

Starts one server with the plugin and stops it at the end; with ``--url`` it asks one that runs
already. A task is chosen by the OpenAI ``model`` field, so any client will do. What comes after
``--`` is passed on to ``vllm serve``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai

from vllm_vlora import Checkpoint, VLoRAError

START_SECONDS = 600


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        checkpoint = Checkpoint.open(options.checkpoint)
        tasks = list(options.task or checkpoint.tasks)
        for task in tasks:
            checkpoint.record(task)  # raises for one that is not there
    except VLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.url is not None:
        print_answers(ask(options.url, tasks, options.prompt, options.max_tokens))
        return 0
    with serving(options.model, checkpoint, options.log, options.vllm) as url:
        print_answers(ask(url, tasks, options.prompt, options.max_tokens))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Options after -- are passed on to vllm serve.",
    )
    parser.add_argument("model", help="the base model: a folder or a Hub id")
    parser.add_argument("checkpoint", help="the checkpoint: a folder or a Hub id")
    parser.add_argument("prompt", help="what to ask")
    parser.add_argument("--task", action="append", help="ask this task; default: all of them")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--url", help="ask the server that runs here, and start none")
    parser.add_argument("--log", type=Path, default=Path("vllm-serve.log"), help="server's output")
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.vllm = words[cut + 1 :]
    return options


@contextmanager
def serving(
    model: str, checkpoint: Checkpoint, log: Path, more: Sequence[str] = ()
) -> Iterator[str]:
    """The URL of a running server; it is gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", "--base", model, str(checkpoint.path), "--host", "127.0.0.1",
               "--port", str(port), *more]  # fmt: skip
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "vllm_vlora.tools", *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        print(f"$ vllm-vlora {shlex.join(command)}", flush=True)
        _wait(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(server)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError):
            pass  # not listening yet
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise SystemExit(f"error: vLLM did not start; the end of {log}:\n{tail}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is not None:
        return
    # The server has workers; all of them are in its session.
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def ask(url: str, tasks: Sequence[str], prompt: str, max_tokens: int) -> dict[str, str]:
    """What every task answers to the same prompt, all asked at once: task -> text."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    listed = {model.id for model in client.models.list().data}
    missing = [task for task in tasks if task not in listed]
    if missing:
        raise SystemExit(f"error: {url} does not serve {', '.join(missing)}; is the plugin there?")

    def answer(task: str) -> str:
        done = client.chat.completions.create(
            model=task,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=0,
        )
        return done.choices[0].message.content or ""

    with ThreadPoolExecutor(min(len(tasks), 64)) as pool:
        return dict(zip(tasks, pool.map(answer, tasks), strict=True))


def print_answers(answers: dict[str, str]) -> None:
    width = max(map(len, answers))
    for task, text in answers.items():
        print(f"{task:<{width}}  {' '.join(text.split())}")


if __name__ == "__main__":
    sys.exit(main())
