"""An API server that ends tells every request of it, so that no client waits for what cannot come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError


def end_requests(original: Callable[..., None]) -> Callable[..., None]:
    """``AsyncLLM.shutdown`` that leaves no request waiting for an engine core that has ended.

    vLLM cancels the task that reads outputs, whose end is to tell every request, and right after it the
    task that would tell them. A busy event loop does both in one round: then nobody is told, clients wait
    for good, and the server for them.
    """

    @functools.wraps(original)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        handler = getattr(self, "output_handler", None)
        if handler is None:
            return
        processor = self.output_processor

        def tell(_: Any) -> None:
            processor.propagate_error(EngineDeadError())

        # A loop that is closed has no requests.
        with suppress(RuntimeError):
            handler.get_loop().call_soon_threadsafe(handler.add_done_callback, tell)

    return shutdown
