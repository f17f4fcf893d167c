"""``ready``: whether a server answers for every task of a checkpoint, for start-up probes."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.connections import why_unreachable
from vllm_vlora.tools.terminal import EXIT_CHECK_FAILED, AsJson, Verbose, print_result, reported
from vllm_vlora.wording import first_line, some_of

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS = 5.0
# A list of a hundred thousand models has some 50 MB.
_MOST_BYTES = 1 << 28


def ready(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CKPT",
            help="The checkpoint that is served. Default: VLLM_VLORA_CHECKPOINT.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str,
        typer.Option(
            "--url", metavar="URL", help="The server: http://HOST:PORT, with or without /v1."
        ),
    ] = "http://127.0.0.1:8000",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Ask a server whether it is up and lists every task of a checkpoint.

    A server without the plugin, or with another checkpoint, is healthy too:
    vLLM's /health cannot tell. The key is VLLM_API_KEY, if there is one. Of a
    checkpoint at a URL or on the Hub the state in the cache is meant.

    Exit code 0: it does. 1: not yet, or not all of them.

    Example:
        vllm-vlora ready my-tasks --url http://localhost:8000
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.checkpoint.serving import CHECKPOINT_VARIABLE
        from vllm_vlora.downloads import from_cache_alone
        from vllm_vlora.errors import OptionError
        from vllm_vlora.tools.servers import server_url

        where = server_url(url)
        ref = checkpoint or os.environ.get(CHECKPOINT_VARIABLE)
        if not ref:
            raise OptionError(f"name the checkpoint, or set {CHECKPOINT_VARIABLE}")
        # A probe asks every few seconds, and means what its server has fetched.
        with from_cache_alone():
            tasks = Checkpoint.open(ref, manifest_only=True).tasks
        listed, why = _listed(where, os.environ.get("VLLM_API_KEY"))
        missing = [task for task in tasks if task not in listed]
        if not why and missing:
            why = f"it does not list {some_of(missing)}"
        data = {"url": url, "ready": not why, "why": why, "tasks": len(tasks), "missing": missing}
        print_result(data, _print_ready, as_json)
        if why:
            raise typer.Exit(EXIT_CHECK_FAILED)


def _listed(server: str, key: str | None) -> tuple[set[str], str]:
    """The models that a server lists, or why there are none."""
    from vllm_vlora.tools.servers import fetch, headers_with

    headers = headers_with(key)
    try:
        fetch(f"{server}/health", headers, _SECONDS, _MOST_BYTES)
        models = json.loads(fetch(f"{server}/v1/models", headers, _SECONDS, _MOST_BYTES))["data"]
        return {str(model["id"]) for model in models}, ""
    except urllib.error.HTTPError as error:
        return set(), f"it answers with {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return set(), f"it does not answer ({why_unreachable(error) or first_line(error)})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return set(), "its list of models is none"


def _print_ready(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.tools.summary import line
    from vllm_vlora.wording import count_of

    said = (
        f"not ready: {data['why']}" if data["why"] else f"lists {count_of(data['tasks'], 'task')}"
    )
    line(console, f"{data['url']}: {said}")
