"""Requests for tasks: what ``vllm.LLM`` takes, and what the API server lists and resolves."""

from __future__ import annotations

from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import VLoRAError
from vllm_vlora.plugin.identity import task_ids_to_int, task_path


def lora_request(checkpoint: str | Path | Checkpoint, task: str) -> LoRARequest:
    """A vLLM request for one task of a checkpoint.

        llm = vllm.LLM(model, enable_lora=True)
        llm.generate(prompt, lora_request=vllm_vlora.lora_request("my-checkpoint", "sql"))

    The request names this state of the checkpoint by its content: after a task is published again,
    make a new request for it.

    Args:
        checkpoint: a folder, a Hub id, or an open ``Checkpoint``.
        task: the task's id.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        TaskNotFoundError: it has no such task.

    Examples:
        >>> lora_request(checkpoint, "task_1").lora_name
        'task_1'
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    opened.record(task)
    return _request(opened, task, task_ids_to_int(opened)[task])


def all_requests(checkpoint: str | Path) -> list[LoRARequest]:
    """A request for every task of a checkpoint, in the checkpoint's order."""
    opened = Checkpoint.open(checkpoint)
    numbers = task_ids_to_int(opened)
    return [_request(opened, task_id, numbers[task_id]) for task_id in opened.tasks]


def _request(checkpoint: Checkpoint, task_id: str, number: int) -> LoRARequest:
    return LoRARequest(task_id, number, str(task_path(checkpoint, task_id)))


class CheckpointResolver(LoRAResolver):
    """Finds tasks by name for servers that run with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``.

    The manifest is read at each question, which comes once per name, so a task published after the
    server started is found, and one that was unloaded comes back in its newest state.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self._checkpoint = checkpoint

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request for a task, or None when the checkpoint has no task of that name."""
        from vllm_vlora.plugin.manager import logger

        try:
            opened = Checkpoint.open(self._checkpoint)
            if lora_name not in opened.tasks:
                return None
            return lora_request(opened, lora_name)
        except VLoRAError as error:
            logger.error("vllm-vlora: %s", error)
            return None
