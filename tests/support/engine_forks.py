"""Processes that start with vLLM imported: forks of one process that imported it and did nothing else.

The import takes ten seconds, and vLLM on CPU starts three processes that each import it anew. A script
here pays for none: the engine core is in its process, and what vLLM would spawn is forked.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import engine_logs
import pytest

ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# What an engine imports when it starts; a name that another version lacks is passed over.
IMPORTED = [
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
]


def start(script: str, *arguments: str, log: Path, **environment: str) -> ForkServerProcess:
    """Run a snippet, as ``python -P -c`` would, in a process group of its own; it writes to ``log``."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(IMPORTED)
    variables = {**os.environ, **ENGINE_ENVIRONMENT, **environment}
    process = forks.Process(target=_run, args=(script, arguments, log, variables))
    with pytest.MonkeyPatch.context() as patch:
        # For the first call, which starts the process that is forked. The working folder has a
        # triton_kernels of ours, which vLLM must not find.
        for name, value in {**ENGINE_ENVIRONMENT, "PYTHONSAFEPATH": "1"}.items():
            patch.setenv(name, value)
        process.start()
    engine_logs.follow(log, process)
    return process


def _run(script: str, arguments: tuple[str, ...], log: Path, variables: dict[str, str]) -> None:
    os.setsid()
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # What dies by a signal says where, and so does what it forks.
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["-c", *arguments]
    sys.path = [entry for entry in sys.path if entry not in ("", os.getcwd())]
    # A signal to a fork would be written, and so be one, to the event loop that forked it too.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) and None)
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]
    try:
        exec(script, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out; vLLM ends its processes there


def stop(process: ForkServerProcess, *signals: int) -> None:
    """End a process and what it started; a second signal is for one that the first did not end."""
    engine_logs.end(process)
    for number in signals:
        if process.is_alive():
            os.killpg(process.pid or 0, number)
            process.join(30)


def run(script: str, *arguments: str, **environment: str) -> tuple[int | None, str]:
    """The exit code of a snippet, and what it wrote."""
    with tempfile.NamedTemporaryFile() as file:
        log = Path(file.name)
        process = start(
            script, *arguments, log=log, VLLM_ENABLE_V1_MULTIPROCESSING="0", **environment
        )
        try:
            process.join(500)
        finally:
            stop(process, signal.SIGKILL)
        return process.exitcode, log.read_text(errors="replace")


def run_script(script: str, *arguments: str, **environment: str) -> Any:
    """What a snippet answers: it prints one line, RESULT and JSON."""
    _, output = run(script, *arguments, **environment)
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output[-40_000:]
    return json.loads(lines[-1][len("RESULT ") :])
