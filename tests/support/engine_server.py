"""The real ``vllm serve`` with the plugin, as a process that tests ask through the OpenAI client."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import openai
from engine_forks import start, stop
from engine_world import MAX_TOKENS, World

# ``vllm-vlora serve``, which becomes the ``vllm`` command.
OURS = "from vllm_vlora.tools.cli import main; main()"
# What it starts, in a process that has imported vLLM.
FORKED = "from vllm.entrypoints.cli.main import main; main()"

_IN_FLIGHT = re.compile(r"vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)")


class Server:
    """A ``vllm serve`` process on a free port of this machine."""

    def __init__(
        self,
        world: World,
        log: Path,
        checkpoint: Path | str,
        script: str = FORKED,
        options: Sequence[str] = (),
        **environment: str,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # A connection that the server closes just when it is used again is the client's business.
        environment.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "600")
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        model = ["serve", str(world.model)]
        if script == OURS:
            model = ["serve", "--base", str(world.model), str(checkpoint)]
        else:
            environment["VLLM_VLORA_CHECKPOINT"] = str(checkpoint)
        arguments = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
                     "--max-model-len", "256", "--max-num-seqs", "32", "--enforce-eager",
                     "--enable-lora", "--max-loras", "3", "--max-lora-rank", "16",
                     "--served-model-name", "base",
                     "--lora-modules", f"ordinary={world.ordinary}", *options]  # fmt: skip
        self.process = start(script, *model, *arguments, log=log, **environment)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait(self, seconds: float = 240) -> bool:
        """Whether the server answered before it ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.is_alive():
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return True
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.5)
        return False

    def text(self, model: str, prompt: list[int]) -> str:
        done = self.client.completions.create(
            model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )  # fmt: skip
        return done.choices[0].text

    def listed(self) -> set[str]:
        """The names in /v1/models, asked on a connection of its own: of any of its API servers."""
        models = httpx.get(f"{self.url}/v1/models", timeout=60).json()["data"]
        return {model["id"] for model in models}

    def wait_until_begun(self, running: Collection[Future[Any]], seconds: float = 60) -> None:
        """Until the engine has all of these requests, or has answered them; nobody may make others."""
        began = time.monotonic()
        while True:
            lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
            found = (_IN_FLIGHT.match(line) for line in lines)
            held = sum(float(match[1]) for match in found if match)
            if held + sum(future.done() for future in running) >= len(running):
                return
            assert time.monotonic() - began < seconds, f"{held} of {len(running)}"
            time.sleep(0.1)

    def stop(self) -> None:
        stop(self.process, signal.SIGTERM, signal.SIGKILL)


def words(tokens: list[int]) -> list[str]:
    """What the tokenizer of the tests' model makes of tokens."""
    return [f"w{token}" for token in tokens]


def ids(text: str) -> list[str]:
    """The words of an answer."""
    return re.findall(r"w\d+", text)
