"""Tasks taken out of a checkpoint; those that stay keep their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_vlora.checkpoint.successor import Successor, edited
from vllm_vlora.errors import OptionError


def remove_tasks(
    checkpoint: str | Path,
    task_ids: Sequence[str],
    *,
    output: str | Path | None = None,
    force: bool = False,
) -> int:
    """Remove tasks from a checkpoint, in place or as the folder ``output``; bases stay as they are.

    Returns:
        The bytes that were freed, of its safetensors files.

    Raises:
        TaskNotFoundError: no such task. OptionError: no task would be left.
        CheckpointError, OutputError: as :func:`add_adapters`.

    Examples:
        >>> freed = remove_tasks(checkpoint, ["task_1", "task_3"])
        >>> freed > 0, list(Checkpoint.open(checkpoint).tasks)
        (True, ['task_0', 'task_2'])
    """
    with edited(checkpoint, output, force=force) as (opened, folder):
        removed = dict.fromkeys(task_ids)
        freed = sum(opened.entry(task_id).nbytes for task_id in removed)
        kept = [task_id for task_id in opened.tasks if task_id not in removed]
        if not kept:
            raise OptionError(
                f"{checkpoint}: no task would be left; delete the folder instead of its last task"
            )
        writer = Successor(folder, opened)
        writer.keep_bases()
        for task_id in kept:
            writer.copy_task(opened, task_id)
        writer.finish_edited()
    return freed
