"""Serve the tasks of a checkpoint with Ray Serve: a vLLM server with the plugin in each replica.

    pip install "vllm-vlora[serve]" "ray[serve]"
    python examples/ray_serve/app.py BASE_MODEL org/my-tasks --replicas 2 --gpus 1 -- --max-model-len 4096
    curl localhost:8000/v1/models
    curl localhost:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "sql", "prompt": "List all users.", "max_tokens": 32}'

``Gateway`` takes whatever vLLM's HTTP API takes and sends it on by its ``model``: Ray Serve prefers
replicas that have answered for a task before, which have it on their device, and goes to others while
these are busy. All replicas serve one state of the checkpoint, fixed before the first of them starts;
another state is a new ``serve.run``, which Ray Serve rolls out by replicas. A replica is ready, and
stays healthy, while every task of that state is served. What comes after ``--`` is for ``vllm serve``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from vllm_vlora import Checkpoint, VLoRAError

START_SECONDS = 600.0
# Tasks that a replica is said to have at hand, for the routing alone: which of them are on the device is
# the plugin's business.
AT_HAND = 64
# What is of one connection, and not of what it carries.
_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


class Tasks:
    """A vLLM server of the base model with all tasks of one state of a checkpoint.

    Args:
        base: folder or Hub id of the base model.
        checkpoint: the checkpoint, with its digest.
        options: further ones of ``vllm serve``.
    """

    def __init__(self, base: str, checkpoint: str, options: Sequence[str]) -> None:
        self._tasks = set(Checkpoint.open(checkpoint, manifest_only=True).tasks)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-P",
            "-m",
            "vllm_vlora.tools",
            "serve",
            "--base",
            base,
            checkpoint,
        ]
        command += ["--host", "127.0.0.1", "--port", str(port), *options]
        # It ends with the replica: Ray ends what a replica has started.
        self._server = subprocess.Popen(command, start_new_session=True)
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None)
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._wait(f"http://127.0.0.1:{port}/health")

    def _wait(self, health: str) -> None:
        """Until it answers, which is when it has every task."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._server.poll() is None:
            try:
                if httpx.get(health, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.5)
        raise RuntimeError("vLLM did not start; its words are in this replica's log")

    async def check_health(self) -> None:
        """Ray Serve asks now and then; a replica that raises is replaced."""
        (await self._client.get("/health", timeout=30)).raise_for_status()
        listed = (await self._client.get("/v1/models", timeout=30)).raise_for_status().json()
        missing = self._tasks - {model["id"] for model in listed["data"]}
        if missing:
            raise RuntimeError(f"{len(missing)} tasks are not served, {min(missing)!r} among them")

    @serve.multiplexed(max_num_models_per_replica=AT_HAND)
    async def _at_hand(self, task: str) -> str:
        """Tells Ray Serve that this replica has it."""
        return task

    async def forward(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncIterator[Any]:
        """The server's answer: its status and headers, and then its bytes as they come."""
        task = serve.get_multiplexed_model_id()
        if task in self._tasks:
            await self._at_hand(task)
        async with self._client.stream(method, path, headers=headers, content=body) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
            yield answer.status_code, {**kept, "x-vlora-replica": self._replica}
            async for data in answer.aiter_raw():
                yield data

    def __del__(self) -> None:
        server = getattr(self, "_server", None)
        if server is not None and server.poll() is None:
            # With its workers, which are in its session.
            os.killpg(server.pid, signal.SIGTERM)


class Gateway:
    """Sends each request to a replica by the task that it is for."""

    def __init__(self, tasks: DeploymentHandle) -> None:
        self._tasks = tasks

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        handle = self._tasks.options(stream=True, multiplexed_model_id=_model(body))
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP]
        answer: Any = handle.forward.remote(request.method, path, headers, body)
        try:
            status, found = await anext(answer)
        except httpx.TransportError as error:
            why = {"error": {"message": f"the engine does not answer ({error})", "code": 503}}
            return JSONResponse(why, 503)
        return StreamingResponse(answer, status, found)


def _model(body: bytes) -> str:
    """The ``model`` of a request in JSON; nothing where it has none, which any replica may answer."""
    try:
        found = json.loads(body).get("model")
    except (ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""


def application(
    base: str, checkpoint: str, options: Sequence[str] = (), *, replicas: int = 1, gpus: float = 0
) -> Application:
    """The application, whose replicas all serve the state that the checkpoint has now.

    Args:
        checkpoint: a folder, a Hub id or a URL that every node can read.
        gpus: of each replica; more than one for tensor parallelism.

    Raises:
        CheckpointError: there is none.
    """
    opened = Checkpoint.open(checkpoint, manifest_only=True)
    if "@sha256:" not in checkpoint:
        where = Path(checkpoint).absolute() if Path(checkpoint).is_dir() else checkpoint
        checkpoint = f"{where}@sha256:{opened.content_digest}"
    tasks = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=256,
        health_check_period_s=30,
        health_check_timeout_s=60,
        ray_actor_options={"num_gpus": gpus},
    )(Tasks)
    gateway = serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})(
        Gateway
    )
    return gateway.bind(tasks.bind(base, checkpoint, list(options)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Options after -- are passed on to vllm serve.",
    )
    parser.add_argument("model", help="the base model: a folder or a Hub id")
    parser.add_argument("checkpoint", help="the checkpoint: a folder, a Hub id or a URL")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=1, help="of each replica; 0 for the CPU")
    parser.add_argument("--port", type=int, default=8000)
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    try:
        app = application(
            options.model,
            options.checkpoint,
            words[cut + 1 :],
            replicas=options.replicas,
            gpus=options.gpus,
        )
    except VLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    print(f"$ serving {shlex.quote(options.checkpoint)} on port {options.port}", flush=True)
    serve.run(app, name="tasks", blocking=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
