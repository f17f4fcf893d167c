"""The path of a blend: like a task's, but it says of what the blend is made and stands for no file.

    CKPT/tasks/~~blend_IDxWEIGHT_IDxWEIGHT.safetensors@DIGEST

ID is the beginning of the SHA-256 of a task's id, of a task from memory that of its publication's digest.
The terms stand in the order of these, and no id is encoded with ``~~`` in front. DIGEST is over the
tasks' digests and the weights, so that it is another one when a task is published with other weights, and
the same whatever the order and however a weight was written. CKPT is the checkpoint's folder, also where
tasks from memory stand beside its own; of these alone it is theirs.
A worker finds the tasks with nothing but the checkpoint and what was published to it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from decimal import Decimal

from vllm_vlora.blend_names import Blend, Term, checked_blend, weight_text
from vllm_vlora.blending.blended import BlendedCheckpoint
from vllm_vlora.blending.joined import JoinedCheckpoint
from vllm_vlora.checkpoint.manifest import TASKS_FOLDER
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import BlendError, CheckpointReplacedError
from vllm_vlora.plugin.identity import MEMORY, TaskPath, parse_task_path

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
        BlendError: the tasks are of different checkpoints.
    """
    terms = sorted(
        (_id(task, paths[task]), weight_text(weight), paths[task].digest, task)
        for task, weight in blend
    )
    checkpoints = {paths[task].checkpoint for task, _ in blend}
    places = checkpoints - {MEMORY} or checkpoints
    if len(places) > 1:
        raise BlendError("tasks of different checkpoints cannot be blended; put them into one")
    file = "_".join(f"{name}x{weight}" for name, weight, _, _ in terms)
    return TaskPath(places.pop(), f"{_PREFIX}{file}{_SUFFIX}", _digest(terms))


def named_in(path: TaskPath) -> list[str]:
    """What names each task in a blend's path."""
    return [name for name, _ in _terms(path)]


def names_in_blends(checkpoint: Checkpoint) -> dict[str, str]:
    """What names a task of a checkpoint in a blend's path -> the task; of 100,000 in 0.2 s."""
    return {_id_alone(task): task for task in checkpoint.tasks}


def blend_of(
    path: TaskPath, checkpoint: Checkpoint | None, published: Iterable[Checkpoint] = ()
) -> Blend | None:
    """What a blend's path names of a checkpoint and of tasks from memory; None for the path of a task.

    Args:
        checkpoint: None for none. published: of one task each.

    Raises:
        CheckpointReplacedError: they do not hold these tasks with these weights, or the path is none that
            ``blend_path`` makes.
    """
    if not is_blend_path(path):
        return None
    weights = dict(_terms(path))
    held = [
        (task, TaskPath(MEMORY, "", other.digest(task)))
        for other in published
        for task in other.tasks
    ]
    if checkpoint is not None:
        own = {task for task in checkpoint.tasks if _id_alone(task) in weights}
        held += [(task, TaskPath(path.checkpoint, "", checkpoint.digest(task))) for task in own]
    found = {_id(task, own_path): (task, own_path) for task, own_path in held}
    try:
        blend = checked_blend(Term(found[name][0], weight) for name, weight in weights.items())
    except (BlendError, KeyError):
        blend = ()
    if not blend or blend_path(dict(found[name] for name in weights), blend) != path:
        raise CheckpointReplacedError(
            f"{path.checkpoint}: a task of the blend {path.file} was published again or removed; make a "
            "new request"
        )
    return blend


def blended_checkpoint(
    checkpoint: Checkpoint | None,
    path: TaskPath,
    published: Collection[Checkpoint] = (),
    layer: Callable[[str], str] = str,
) -> BlendedCheckpoint | None:
    """For a blend's path a checkpoint whose task is that blend; None for the path of a task.

    Args:
        checkpoint, published: as :func:`blend_of` has them.
        layer: a module's name -> the layer's that it means.

    Raises:
        CheckpointReplacedError: as :func:`blend_of`. BlendError: these tasks cannot be blended.
    """
    blend = blend_of(path, checkpoint, published)
    if blend is None:
        return None
    parts = [other for other in published if is_made_of(str(path), _digest_of(other))]
    if parts:
        first, *others = parts if checkpoint is None else [checkpoint, *parts]
        checkpoint = JoinedCheckpoint(first, others, layer)
    assert checkpoint is not None
    return BlendedCheckpoint(checkpoint, blend, path.file, path.digest)


def names_a_blend(path: str) -> bool:
    """Whether a path may be a blend's, as far as a glance tells."""
    return f"/{_PREFIX}" in path


def is_made_of(path: str, digest: str) -> bool:
    """Whether a path is that of a blend in which a task from memory is that has this digest."""
    if not names_a_blend(path):
        return False
    parsed = parse_task_path(path)
    return parsed is not None and digest[:_ID_LENGTH] in named_in(parsed)


def _terms(path: TaskPath) -> Iterator[tuple[str, Decimal]]:
    """ID and weight of each term of a blend's path that is one."""
    for part in path.file[len(_PREFIX) : -len(_SUFFIX)].split("_"):
        term = _TERM.fullmatch(part)
        if term:
            yield term[1], Decimal(term[2])


def _digest_of(published: Checkpoint) -> str:
    return published.digest(next(iter(published.tasks)))


def _id(task: str, path: TaskPath) -> str:
    """What names a task in a blend's path. Of one from memory several versions may be there."""
    return path.digest[:_ID_LENGTH] if path.checkpoint == MEMORY else _id_alone(task)


def _id_alone(task: str) -> str:
    return hashlib.sha256(task.encode()).hexdigest()[:_ID_LENGTH]


def _digest(terms: list[tuple[str, str, str, str]]) -> str:
    """Of the tasks' digests and weights; in the length of a task's digest."""
    content = "\n".join(sorted(f"{digest} {weight}" for _, weight, digest, _ in terms))
    return hashlib.sha256(f"blend\n{content}".encode()).hexdigest()[:32]
