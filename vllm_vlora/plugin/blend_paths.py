"""The path of a blend: like a task's, but it says of what the blend is made and stands for no file.

    CKPT/tasks/~~blend_IDxWEIGHT_IDxWEIGHT.safetensors@DIGEST

ID is the beginning of the SHA-256 of a task's id, the terms stand in the order of these, and no id is
encoded with ``~~`` in front. DIGEST is over the tasks' digests and the weights, so that it is another one
when a task is published with other weights, and the same whatever the order and however a weight was
written.
A worker finds the tasks with nothing but the checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from decimal import Decimal

from vllm_vlora.blend_names import Blend, Term, checked_blend, weight_text
from vllm_vlora.blending.blended import BlendedCheckpoint
from vllm_vlora.checkpoint.manifest import TASKS_FOLDER
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import BlendError, CheckpointReplacedError
from vllm_vlora.plugin.identity import MEMORY, TaskPath

_PREFIX = f"{TASKS_FOLDER}/~~blend_"
_SUFFIX = ".safetensors"
_ID_LENGTH = 16
_TERM = re.compile(rf"([0-9a-f]{{{_ID_LENGTH}}})x(-?[0-9]+(?:\.[0-9]+)?)")


def is_blend_path(path: TaskPath) -> bool:
    """Whether a path is a blend's."""
    return path.file.startswith(_PREFIX)


def blend_path(paths: Mapping[str, TaskPath], blend: Blend) -> TaskPath:
    """The path of a blend of tasks, whose own paths these are.

    Raises:
        BlendError: the tasks are of different checkpoints, or of none.
    """
    terms = sorted(
        (_id(task), weight_text(weight), paths[task].digest, task) for task, weight in blend
    )
    checkpoints = {paths[task].checkpoint for task, _ in blend}
    if MEMORY in checkpoints:
        raise BlendError("tasks from memory cannot be blended; put them into the checkpoint")
    if len(checkpoints) > 1:
        raise BlendError("tasks of different checkpoints cannot be blended; put them into one")
    file = "_".join(f"{name}x{weight}" for name, weight, _, _ in terms)
    return TaskPath(checkpoints.pop(), f"{_PREFIX}{file}{_SUFFIX}", _digest(terms))


def blend_of(path: TaskPath, checkpoint: Checkpoint) -> Blend | None:
    """What a blend's path names of a checkpoint; None for the path of a task.

    Raises:
        CheckpointReplacedError: the checkpoint does not hold these tasks with these weights, or the path
            is none that ``blend_path`` makes.
    """
    if not is_blend_path(path):
        return None
    found = [_TERM.fullmatch(part) for part in path.file[len(_PREFIX) : -len(_SUFFIX)].split("_")]
    weights = {term[1]: Decimal(term[2]) for term in found if term}
    tasks = {name: task for task in checkpoint.tasks if (name := _id(task)) in weights}
    try:
        blend = checked_blend(Term(tasks[name], weight) for name, weight in weights.items())
    except (BlendError, KeyError):
        blend = ()
    own = {task: TaskPath(path.checkpoint, "", checkpoint.digest(task)) for task, _ in blend}
    if not blend or blend_path(own, blend) != path:
        raise CheckpointReplacedError(
            f"{path.checkpoint}: a task of the blend {path.file} was published again or removed; make a "
            "new request"
        )
    return blend


def blended_checkpoint(checkpoint: Checkpoint, path: TaskPath) -> BlendedCheckpoint | None:
    """For a blend's path a checkpoint whose task is that blend; None for the path of a task.

    Raises:
        CheckpointReplacedError: as :func:`blend_of`. BlendError: these tasks cannot be blended.
    """
    blend = blend_of(path, checkpoint)
    return None if blend is None else BlendedCheckpoint(checkpoint, blend, path.file, path.digest)


def _id(task: str) -> str:
    return hashlib.sha256(task.encode()).hexdigest()[:_ID_LENGTH]


def _digest(terms: list[tuple[str, str, str, str]]) -> str:
    """Of the tasks' digests and weights; in the length of a task's digest."""
    content = "\n".join(sorted(f"{digest} {weight}" for _, weight, digest, _ in terms))
    return hashlib.sha256(f"blend\n{content}".encode()).hexdigest()[:32]
