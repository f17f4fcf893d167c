"""Requests for tasks: what ``vllm.LLM`` takes, and what the API server lists and resolves."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import BlendError, VLoRAError
from vllm_vlora.plugin.events import logger
from vllm_vlora.plugin.following import folder_identity
from vllm_vlora.plugin.identity import TaskPath, task_ids_to_int, task_paths
from vllm_vlora.plugin.named_requests import TaskRequests, meaning_for

# Seconds until a manifest that could not be read is read again; what it names may come later.
_TRY_AGAIN = 2.0


def lora_request(
    checkpoint: str | Path | Checkpoint | None,
    task: str,
    key: str = "",
    published: Iterable[LoRARequest] = (),
) -> LoRARequest:
    """A vLLM request for one task of a checkpoint, or for what an alias or a blend of tasks stands for.

        llm = vllm.LLM(model, enable_lora=True)
        llm.generate(prompt, lora_request=vllm_vlora.lora_request("my-checkpoint", "sql"))

    The request names this state of the checkpoint by its content: after a task is published again,
    make a new request for it. For tasks from memory ``vllm_vlora.publish`` returns one; blends of them
    are made of these:

        mine = vllm_vlora.publish(llm, "mine", tensors, alpha=32)
        vllm_vlora.lora_request("my-checkpoint", "mine*0.7+french*0.3", published=[mine])

    Args:
        checkpoint: a folder, a Hub id, or an open ``Checkpoint``; None where all tasks are ``published``.
        task: the task's id, an alias, or a blend such as ``sql*0.7+french*0.3``.
        key: of the client, for canaries: one key has one target.
        published: what ``vllm_vlora.publish`` returned last for tasks from memory, which stand before the
            checkpoint's of their names.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        TaskNotFoundError: it has no such task.
        BlendError: the name reads as a blend, and is none of its tasks.

    Examples:
        >>> lora_request(checkpoint, "task_1").lora_name
        'task_1'
        >>> lora_request(checkpoint, "task_1*0.5+task_2*0.50").lora_name
        'task_1*0.5+task_2*0.5'
    """
    opened = checkpoint
    if not isinstance(opened, Checkpoint | None):
        opened = Checkpoint.open(opened)
    paths = {} if opened is None else task_paths(opened)
    listed = {request.lora_name: request for request in (*requests_for(paths), *published)}
    try:
        return meaning_for(
            key, task, TaskRequests(listed, {} if opened is None else opened.aliases)
        )
    except BlendError as error:
        if opened is not None and "no task is called" in str(error):
            opened.record(task)  # Which says what tasks there are.
        raise


def all_requests(checkpoint: str | Path) -> list[LoRARequest]:
    """A request for every task of a checkpoint, in the checkpoint's order."""
    return requests_for(task_paths(Checkpoint.open(checkpoint)))


def requests_for(paths: Mapping[str, TaskPath]) -> list[LoRARequest]:
    """A request for every task of one state of a checkpoint, whose paths these are."""
    numbers = task_ids_to_int(paths)
    return [LoRARequest(task, numbers[task], str(path)) for task, path in paths.items()]


class CheckpointResolver(LoRAResolver):
    """Finds tasks by name for servers that run with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``.

    A task published after the server started is found, and one that was unloaded comes back in its
    newest state: the manifest is looked at for each question. It is read only where it is another file
    than it was, and beside the event loop, so that who asks for names that are not there delays nobody.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self._checkpoint = checkpoint
        self._state = _State(None, {}, None)
        # One thread, so that a burst of questions makes one read of them and takes no others' threads.
        self._reader = ThreadPoolExecutor(1, "vlora-resolver")

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request for a task, or None when the checkpoint has no task of that name."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._find, lora_name)

    def _find(self, name: str) -> LoRARequest | None:
        found = self._newest().requests.get(name)
        # vLLM gives it a number of its own.
        return found and LoRARequest(name, found.lora_int_id, found.lora_path)

    def _newest(self) -> _State:
        state, identity = self._state, folder_identity(self._checkpoint)
        if state.identity == identity and time.monotonic() < (state.until or math.inf):
            return state
        try:
            state = _State(identity, {r.lora_name: r for r in all_requests(self._checkpoint)}, None)
        except VLoRAError as error:
            if state.until is None or state.identity != identity:
                logger.error("vllm-vlora: no new task is found: %s", error)
            state = _State(identity, {}, time.monotonic() + _TRY_AGAIN)
        self._state = state
        return state


class _State(NamedTuple):
    """What was read of a manifest: whose identity it had, the requests, and when to read it again."""

    identity: tuple[int, ...] | None
    requests: dict[str, LoRARequest]
    until: float | None
