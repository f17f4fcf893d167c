"""What requests are told when their API server ends: vLLM's own shutdown and handler of outputs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_vlora.plugin.endings import end_requests


class Client:
    """An engine core's client whose reader says that it ended when it is cancelled, as vLLM's does."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[Exception] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.reader = self.loop.create_task(self._read())

    async def _read(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.outputs.put_nowait(RuntimeError("ended"))

    async def get_output_async(self) -> Any:
        raise await self.outputs.get()

    def shutdown(self, timeout: float | None = None) -> None:
        self.loop.call_soon_threadsafe(self.reader.cancel)


class Processor:
    """Requests in flight: what they are told."""

    def __init__(self) -> None:
        self.told: list[Exception] = []

    def propagate_error(self, error: Exception) -> None:
        self.told.append(error)


async def _end(shutdown: Callable[..., None], busy: float) -> list[Exception]:
    """Shut down from another thread while the event loop is busy for so many seconds."""
    from vllm.v1.engine.async_llm import AsyncLLM

    llm: Any = object.__new__(AsyncLLM)
    llm.engine_core, llm.output_processor = Client(), Processor()
    llm.log_stats, llm.logger_manager, llm.output_handler = False, None, None
    llm.renderer = SimpleNamespace(mm_processor_cache=None, shutdown=lambda: None)
    llm._run_output_handler()
    await asyncio.sleep(0.05)
    done = llm.engine_core.loop.run_in_executor(None, shutdown, llm)
    time.sleep(busy)
    await done
    for _ in range(20):
        await asyncio.sleep(0)
    told: list[Exception] = llm.output_processor.told
    llm.output_handler = None  # Nothing is left for its end.
    return told


@pytest.mark.parametrize("busy", [0, 0.5])
def test_requests_are_told_however_busy_the_event_loop_is(busy: float) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    told = asyncio.run(_end(end_requests(AsyncLLM.shutdown), busy))
    assert isinstance(told[-1], EngineDeadError)


def test_stock_vllm_tells_nobody_on_a_busy_event_loop() -> None:
    """What the wrapper is for: where this fails, vLLM has mended it and the wrapper can go."""
    from vllm.v1.engine.async_llm import AsyncLLM

    assert asyncio.run(_end(AsyncLLM.shutdown, 0.5)) == []


def test_an_engine_that_never_ran_ends_as_before() -> None:
    ended: list[float | None] = []
    shutdown = end_requests(lambda self, timeout=None: ended.append(timeout))
    shutdown(SimpleNamespace(output_handler=None), timeout=3)
    shutdown(SimpleNamespace())
    assert ended == [3, None]
