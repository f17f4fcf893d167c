"""Tasks from memory in an engine core and its workers: taken by all of them or by none.

An engine core is first asked whether all its workers can take a task (*offer*), which changes nothing
that is served, and then told to serve it under its name (*adopt*), or to let it go (*withdraw*). With
several engine cores the second comes when all have said yes to the first. What had the name before stays
as long as requests ask for it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_vlora.errors import MemoryBudgetError, VLoRAError
from vllm_vlora.plugin.blend_paths import is_made_of, names_a_blend
from vllm_vlora.plugin.counters import counters_of
from vllm_vlora.plugin.engine_core import (
    is_ours,
    refuse_request,
    requests_inside,
    tasks_of,
    tasks_so_far,
    wake_message,
)
from vllm_vlora.plugin.events import logger
from vllm_vlora.plugin.identity import MEMORY
from vllm_vlora.plugin.offers import ElsewhereError, Offer, OfferedCheckpoint
from vllm_vlora.plugin.residency import GRACE
from vllm_vlora.plugin.workers import manager_of
from vllm_vlora.wording import shown

OFFER_METHOD, ADOPT_METHOD = "vlora_offer", "vlora_adopt"
WITHDRAW_METHOD, UNPUBLISH_METHOD = "vlora_withdraw", "vlora_unpublish"
ELSEWHERE = "elsewhere"
"""What an engine core answers to an offer whose memory a worker of it cannot map."""
# Seconds until it is looked again whether the last request of an old version has ended.
_LOOK_AGAIN = 0.25


# --- what the workers are asked -------------------------------------------------------------------


def _take(worker: Any, described: bytes, content: bytes | None) -> str:
    """Have a worker check a task and keep it; why it does not, or nothing."""
    try:
        checkpoint = OfferedCheckpoint(msgspec.json.decode(described, type=Offer), content)
        manager_of(worker).vlora_store.take(checkpoint.task_path, checkpoint)
    except ElsewhereError:
        return ELSEWHERE
    except VLoRAError as error:
        # Whose files lie nowhere.
        return str(error).removeprefix(f"{MEMORY}: ")
    except Exception as error:  # noqa: BLE001 - with several workers, each must answer
        logger.exception("vllm-vlora: a task from memory cannot be taken")
        return f"{type(error).__name__}: {error}"
    return ""


def _discard(worker: Any, path: str) -> None:
    manager_of(worker).vlora_store.discard(path)


def _leave_bases(worker: Any) -> None:
    manager_of(worker).vlora_store.leave_bases()


# --- an engine core's methods ---------------------------------------------------------------------


def offer(core: Any, described: bytes, content: bytes | None = None) -> str:
    """Ask all workers to take a task; why one does not, or nothing.

    Args:
        described: the ``Offer`` as JSON. content: its memory's bytes, where a worker cannot map them.
    """
    answers = tasks_of(core).workers.tell(_take, bytes(described), content)
    # One that cannot map the memory is asked again.
    return next((a for a in answers if a and a != ELSEWHERE), next(filter(None, answers), ""))


def adopt(core: Any, task: str, path: str) -> str:
    """Serve an offered task under its name; the path of what was published under it, or nothing.

    Who was interrupted tells it once more.
    """
    tasks = tasks_of(core)
    before = tasks.published.get(task, "")
    if before == path:
        return ""
    # First, so that it leaves even if an interrupt falls between the two.
    if before:
        tasks.unpublished[before] = time.monotonic()
    tasks.published[task] = path
    tasks.unpublished.pop(path, None)
    if before:
        if hasattr(core, "input_queue"):
            # To give 84 MB back takes 30 ms, and who publishes waits for the answer alone.
            core.input_queue.put_nowait(wake_message())
        else:
            release(core)
    again = " in place of the version before" if before else ""
    logger.info("vllm-vlora: task %s is served from memory%s", shown(repr(task)), again)
    return before


def withdraw(core: Any, path: str) -> None:
    """Let a task go that was offered and is not to be served."""
    tasks_of(core).workers.tell(_discard, path)


def unpublish(core: Any, task: str) -> str:
    """Serve no task from memory under a name any more; its path, or nothing where there is none."""
    tasks = tasks_of(core)
    path = tasks.published.get(task, "")
    if path:
        tasks.unpublished[path] = time.monotonic()
        del tasks.published[task]
        release(core)
        logger.info("vllm-vlora: task %s is served from memory no more", shown(repr(task)))
    return path


def release(core: Any) -> None:
    """Let go of versions that are no longer published, that no request needs and nobody pinned.

    With each go the blends that it is in.
    """
    tasks = tasks_of(core)
    # Who is just let in is neither among those that wait nor among those inside.
    if not tasks.unpublished or tasks.letting_in:
        return
    # An API server may not have heard of it yet, and asks for it.
    latest = time.monotonic() - (GRACE if tasks.followed else 0.0)
    due = [path for path, since in tasks.unpublished.items() if since <= latest]
    if due:
        _release(tasks, due)
    if tasks.unpublished and hasattr(core, "input_queue"):
        _look_again(core, tasks)


def _release(tasks: Any, due: list[str]) -> None:
    asked = tasks.residency.in_use() | tasks.arrivals.paths()
    blends = [path for path in {*tasks.residency.paths(), *asked} if names_a_blend(path)]
    for path in due:
        digest = path.rpartition("@")[2]
        gone = [path, *(blend for blend in blends if is_made_of(blend, digest))]
        if any(one in asked or tasks.residency.is_pinned(one) for one in gone):
            continue
        del tasks.unpublished[path]
        for one in gone:
            tasks.residency.forget(one, wholly=True)
        tasks.workers.tell(_discard, path)


def leave_devices(core: Any) -> None:
    """Take every task off the devices, whose memory will be lost; each comes when it is asked for."""
    tasks = tasks_so_far(core)
    if tasks is None:
        return
    # Also what came to them and is not in the books yet.
    for path in dict.fromkeys([*tasks.arrivals.unask(), *tasks.residency.paths()]):
        tasks.residency.forget(path)
    # Which what the host keeps of tasks would take to be there still.
    tasks.workers.tell(_leave_bases)


def return_to_devices(core: Any) -> None:
    """Have on the devices again what requests need that stayed in the engine, before steps go on.

    They do so with ``mode="keep"``, or where they came while a pause was waited for. A step would find
    the room taken, or read the task itself. Requests whose task does not come are ended.

    Raises:
        VLoRAError: one did not come, in an engine core of the caller's process; its requests stay.
    """
    tasks = tasks_so_far(core)
    if tasks is None:
        return
    inside: dict[str, list[Any]] = {}
    for request in requests_inside(core.scheduler):
        if is_ours(request.lora_request):
            inside.setdefault(request.lora_request.lora_path, []).append(request)
    failed = [
        (error, requests)
        for requests in inside.values()
        if (error := _return(tasks, requests[0].lora_request)) is not None
    ]
    # Last, since it lets others in, which want room too.
    for error, requests in failed:
        if not hasattr(core, "output_queue"):
            raise error
        core.abort_requests([request.request_id for request in requests])
        for request in requests:
            counters_of(core).refused(error, request.lora_request.lora_name)
            refuse_request(core, request, error)


def _return(tasks: Any, lora: Any) -> VLoRAError | None:
    """Have a task held again for requests that use its adapter's number; why it is not."""
    tasks.residency.number(lora.lora_path, lora.lora_int_id)
    try:
        if tasks.residency.place(lora) is not None:
            return None
    except VLoRAError as error:
        return error
    return MemoryBudgetError(
        f"no room for task {lora.lora_name!r} beside the tasks that requests in flight use, after a "
        "sleep of level 2; ask again later"
    )


def _look_again(core: Any, tasks: Any) -> None:
    """Have an engine core that does nothing look again."""
    if tasks.looks is not None and tasks.looks.is_alive():
        return
    tasks.looks = threading.Timer(_LOOK_AGAIN, core.input_queue.put_nowait, (wake_message(),))
    tasks.looks.daemon = True
    tasks.looks.start()


def release_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``EngineCore`` before which old versions are let go."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        tasks = tasks_so_far(self)
        if tasks is not None and tasks.unpublished:
            release(self)
        return original(self, *args, **kwargs)

    return method
