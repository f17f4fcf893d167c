"""Work that is begun in a pool's thread, from where nothing may be raised: an engine's loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from vllm_vlora.errors import TaskLoadError

Found = TypeVar("Found")


def begin(pool: ThreadPoolExecutor, read: Callable[..., Found], *args: Any) -> Future[Found]:
    """Begin ``read(*args)``; where no thread can be had, the future holds that as its error."""
    future: Future[Found] = Future()
    try:
        pool.submit(_run, future, read, *args)
    except RuntimeError as error:
        # The pool keeps the work nevertheless, for a thread that it has or gets later. One that has begun
        # it goes on; for the others it is none any more.
        if future.cancel():
            future = Future()
            future.set_exception(_no_thread(error))
    return future


def _no_thread(error: RuntimeError) -> TaskLoadError:
    return TaskLoadError(f"no thread to read it ({error}): allow more threads, or ask again")


def _run(future: Future[Found], read: Callable[..., Found], *args: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        found = read(*args)
    except BaseException as error:  # noqa: BLE001 - it is the future's
        future.set_exception(error)
    else:
        future.set_result(found)
