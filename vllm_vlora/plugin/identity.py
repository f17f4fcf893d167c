"""Names under which vLLM knows a task: a path that carries the content's digest, and an integer id.

vLLM keys its prefix cache by an adapter's name and path, and its worker by the integer id, so both
must change whenever the weights do. The path is ``CKPT/tasks/FILE.safetensors@DIGEST``: absolute, so
that an engine without the plugin answers "no such adapter" and never asks the Hub for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_vlora.checkpoint.manifest import TASKS_FOLDER, task_file
from vllm_vlora.checkpoint.reader import Checkpoint

_DIGEST_LENGTH = 32
# vLLM's own counters start at 1; ids from 2**20 on keep clear of them. Its GPU runner holds ids in
# int32, so they end below 2**31.
FIRST_ID = 1 << 20
ID_SPAN = (1 << 31) - FIRST_ID - 1
MEMORY = Path("/dev/null/vllm_vlora.publish")
"""In the path of a task that is in no file the place of the checkpoint; nothing can lie there."""


@dataclass(frozen=True)
class TaskPath:
    """The parts of a task's ``lora_path``."""

    checkpoint: Path
    file: str
    digest: str

    def __str__(self) -> str:
        return f"{self.checkpoint / self.file}@{self.digest}"


def task_path(checkpoint: Checkpoint, task_id: str) -> TaskPath:
    """The path of a task of this state of this checkpoint."""
    return TaskPath(checkpoint.path.absolute(), task_file(task_id), checkpoint.digest(task_id))


def task_paths(checkpoint: Checkpoint) -> dict[str, TaskPath]:
    """The path of every task of this state of this checkpoint, in its order."""
    folder = checkpoint.path.absolute()
    return {
        task_id: TaskPath(folder, task_file(task_id), checkpoint.digest(task_id))
        for task_id in checkpoint.tasks
    }


def parse_task_path(path: str) -> TaskPath | None:
    """The parts of a ``lora_path`` of ours; None for any other adapter's path."""
    file, at, digest = path.rpartition("@")
    if not at or len(digest) != _DIGEST_LENGTH or set(digest) - set("0123456789abcdef"):
        return None
    location = Path(file)
    if location.parent.name != TASKS_FOLDER or location.suffix != ".safetensors":
        return None
    return TaskPath(location.parent.parent, f"{TASKS_FOLDER}/{location.name}", digest)


def task_ids_to_int(paths: Mapping[str, TaskPath]) -> dict[str, int]:
    """Task id -> ``lora_int_id``: the same in every process, and another one for other weights.

    ``paths`` are those of every task of one state of a checkpoint.

    The id is 2**20 plus the digest modulo 2**31 - 2**20 - 1. Where two tasks of a checkpoint meet
    (one chance in 4,000 for a thousand tasks) the later in sorted order takes the next free number.
    """
    taken: set[int] = set()
    numbers = {}
    for task_id in sorted(paths):
        offset = int(paths[task_id].digest, 16) % ID_SPAN
        while offset in taken:
            offset = (offset + 1) % ID_SPAN
        taken.add(offset)
        numbers[task_id] = FIRST_ID + offset
    return numbers
