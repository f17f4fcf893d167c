"""A request whose task was published again while it was on its way is asked once more, for what is there.

An API server that has not heard of a publication names the task of before. Where that is on no device its
weights are gone, since they lay in a folder whose place another has taken. The engine core then refuses
the request, of which no token was made; here it is given to the engine once more under the task's new
path, as it would have been half a second later.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_vlora.errors import CheckpointReplacedError
from vllm_vlora.plugin.identity import parse_task_path

# Where an engine's client keeps what knows the newest request of a task.
_NEWEST = "_vlora_newest"
# Seconds until a publication that the workers have seen is listed, and some more.
_PATIENCE = 5.0
_PERIOD = 0.05
# Publications that one request may meet.
_TRIES = 3

Newest = Callable[[LoRARequest], LoRARequest | None]


def renew_from(client: Any, newest: Newest) -> None:
    """Have the requests of an engine's client renewed.

    Args:
        newest: what a request for a task is to ask for by now; None where nothing is called so.
    """
    setattr(client, _NEWEST, newest)


def renew_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AsyncLLM.generate``, or ``encode``, that asks again for a task which was published meanwhile."""

    @functools.wraps(original)
    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompt = kwargs["prompt"] if "prompt" in kwargs else args[0]
        lora, newest = kwargs.get("lora_request"), getattr(self, _NEWEST, None)
        again = functools.partial(original, self, *args)
        if newest is None or lora is None or not _can_be_asked_again(prompt, lora):
            return again(**kwargs)
        return _ask(again, kwargs, newest)

    return ask


def _can_be_asked_again(prompt: Any, lora: LoRARequest) -> bool:
    # Images are kept by vLLM on both sides of the way to the engine core, which a second one would upset.
    # What is no mapping is a stream of prompts, or a request that is made already.
    text = isinstance(prompt, str) or (isinstance(prompt, Mapping) and "mm_kwargs" not in prompt)
    return text and parse_task_path(lora.lora_path) is not None


async def _ask(
    ask: Callable[..., Any], options: dict[str, Any], newest: Newest
) -> AsyncGenerator[Any, None]:
    for tries_left in reversed(range(_TRIES)):
        begun = False
        try:
            # Closed here and now when its reader goes, as vLLM's own is.
            async with aclosing(ask(**options)) as answer:
                async for output in answer:
                    begun = True
                    yield output
            return
        except CheckpointReplacedError:
            renewed = None
            if tries_left and not begun:
                renewed = await _renewed(options["lora_request"], newest)
            if renewed is None:
                raise
            options = {**options, "lora_request": renewed}


async def _renewed(lora: LoRARequest, newest: Newest) -> LoRARequest | None:
    """The request that takes the place of one, once it is known; None where nothing does."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        found = newest(lora)
        if found is None or found.lora_path != lora.lora_path:
            return found
        if time.monotonic() > deadline:
            return None
        await asyncio.sleep(_PERIOD)
