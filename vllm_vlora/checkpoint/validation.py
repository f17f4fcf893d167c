"""Read a whole checkpoint and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch

from vllm_vlora.adapters.peft_config import GATHER
from vllm_vlora.checkpoint.aliases import read_aliases
from vllm_vlora.checkpoint.attachments import Attached, read_attached
from vllm_vlora.checkpoint.manifest import BASIS_INDEX_FILE, CONFIG_FILE, hash_file
from vllm_vlora.checkpoint.pinning import pinned, split_pin
from vllm_vlora.checkpoint.reader import Checkpoint, read_one_state
from vllm_vlora.checkpoint.router_files import read_router_weights
from vllm_vlora.checkpoint.sources import checkpoint_folder
from vllm_vlora.checkpoint.task_index import IndexedTasks, Usage
from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import CheckpointError, CheckpointReplacedError, CheckpointVersionError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.quantize import PackedMatrix, unpack
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.representations.stored import Basis, FlatBasis
from vllm_vlora.strict_json import JSONError, decode
from vllm_vlora.tensor_files import ShardIndex

# Ranges (start, stop) of rows, by module and side of its basis.
_Ranges = Mapping[tuple[str, str], Collection[tuple[int, int]]]

# How far rows that were orthonormal before they were packed may be from it: |G - I| <= tolerance.
# Rounding to 16 bits moves a squared norm by about 2**-8 (bfloat16) or 2**-11 (float16).
# Quantisation moves it by a tenth and more in short rows; there the check finds bases that were
# never orthonormal, not small damage, which the digests find.
_TOLERANCES = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}
_QUANTIZED_TOLERANCE = 0.3


def validate(
    ref: str | Path, *, progress: Callable[[str, int, int], None] | None = None
) -> list[str]:
    """Read every file of a checkpoint and return the problems found, one line each.

    Checked are the manifest, every digest (of files kept with tasks too), every tensor's name, dtype,
    size and values, that the bases' rows are orthonormal (each range of rows that tasks use, by
    itself: rows of several clusters are not orthonormal to each other, and those that no task uses are
    held by their digest alone) and that the shard index agrees with the shards. An empty list
    means that the checkpoint is sound.

    Args:
        ref: a folder or a Hub id; a content that it does not have (``@sha256:...``) is a problem.
        progress: called with (what was read, files done, all files).

    Raises:
        CheckpointError: there is no checkpoint at ``ref`` to check.
        CheckpointVersionError: a newer format wrote it, so this version cannot tell.

    Examples:
        >>> validate(checkpoint)
        []
    """
    where, wanted = split_pin(ref)
    path = checkpoint_folder(where, wanted)
    try:
        ref = pinned(path, wanted)
        return read_one_state(ref, lambda opened: _problems_of(opened, progress))
    except CheckpointVersionError:
        raise
    except CheckpointError as error:
        if not (path / CONFIG_FILE).exists():
            raise
        return [str(error)]


def _problems_of(
    checkpoint: Checkpoint, progress: Callable[[str, int, int], None] | None
) -> list[str]:
    """Raises CheckpointReplacedError where the problems are those of two states read as one."""
    problems: list[str] = []
    total = len(checkpoint.tasks) + 1 + isinstance(checkpoint.tasks, IndexedTasks)
    for done, (what, found) in enumerate(_inspect(checkpoint), 1):
        problems += found
        if progress is not None:
            progress(what, done, total)
    if problems and checkpoint.was_replaced:
        raise CheckpointReplacedError(f"{checkpoint.path} was replaced again and again; try later")
    return problems


def _inspect(checkpoint: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    problems = [*_basis_problems(checkpoint), *_index_problems(checkpoint)]
    attachments: Mapping[str, Attached] = {}
    try:
        attachments = checkpoint.attachments
    except CheckpointError as error:
        problems.append(str(error))
    try:
        read_aliases(checkpoint.path, checkpoint.tasks)
    except CheckpointError as error:
        problems.append(str(error))
    try:
        router = checkpoint.router
        if router is not None:
            read_router_weights(checkpoint.path, router)
    except CheckpointError as error:
        problems.append(str(error))
    yield "bases", problems
    sound: set[str] = set()
    usage = Usage()
    for task_id in checkpoint.tasks:
        try:
            # What an index says of a task is compared with its record when that is read.
            usage.add(checkpoint.record(task_id).segments)
            checkpoint.load_task(task_id)
            kept = attachments.get(task_id, {})
            # A file of many tasks is read once.
            read_attached(
                checkpoint.path, {n: ref for n, ref in kept.items() if ref.sha256 not in sound}
            )
            sound.update(ref.sha256 for ref in kept.values())
        except CheckpointError as error:
            yield task_id, [str(error)]
        else:
            yield task_id, list(_empty_tensors(checkpoint, task_id))
    if isinstance(checkpoint.tasks, IndexedTasks):
        yield "index", list(_table_problems(checkpoint.path, checkpoint.tasks, usage))


def _table_problems(path: Path, tasks: IndexedTasks, usage: Usage) -> Iterator[str]:
    """What no record shows by itself; a damaged one makes the usage differ too."""
    if usage.segments() != tasks.usage:
        yield f"{tasks.file}: what it says of the modules' use is not what the records say"
    records = path / tasks.records.file
    if hash_file(records) != (tasks.records.sha256, tasks.records.nbytes):
        yield f"{records}: SHA-256 differs from the index's; {copy_again(records)}"


def _empty_tensors(checkpoint: Checkpoint, task_id: str) -> Iterator[str]:
    """Heads without elements, which sharded training leaves behind; nothing can be done with them."""
    for name, (_, shape) in checkpoint.record(task_id).extra.items():
        if 0 in shape:
            yield (
                f"{checkpoint.path}: task {task_id!r}: tensor {name!r} is empty, shape {list(shape)}; "
                f"{GATHER}, and compress it anew"
            )


def _basis_problems(checkpoint: Checkpoint) -> list[str]:
    problems: list[str] = []
    ranges = _used_ranges(checkpoint)
    try:
        for name, _, basis in checkpoint.shared():
            # The components that flat tasks share are weighted as they come.
            if not isinstance(basis, FlatBasis):
                problems += _orthonormality_problems(checkpoint, name, basis, ranges)
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def _used_ranges(checkpoint: Checkpoint) -> dict[tuple[str, str], set[tuple[int, int]]]:
    """The rows of each side of a basis that tasks use together; all of them where no task says."""
    found: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for segment in checkpoint.usage():
        module = checkpoint.modules[segment.module]
        if not segment.is_joint or module.basis is None:
            continue
        whole = (0, module.basis.k_out, 0, module.basis.k_in)
        u_start, u_stop, v_start, v_stop = segment.rows or whole
        found.setdefault((module.name, "U"), set()).add((u_start, u_stop))
        found.setdefault((module.name, "V"), set()).add((v_start, v_stop))
    return found


def _orthonormality_problems(
    checkpoint: Checkpoint, name: str, basis: Basis, ranges: _Ranges
) -> Iterator[str]:
    for side, matrix in (("U", basis.u), ("V", basis.v)):
        tolerance = _TOLERANCES.get(matrix.format, _QUANTIZED_TOLERANCE)
        for start, stop in sorted(ranges.get((name, side), ())):
            distance = _distance_from_orthonormal(matrix.row_slice(start, stop))
            if not distance <= tolerance:
                rows = "" if stop - start == matrix.rows else f", rows {start}:{stop},"
                yield (
                    f"{checkpoint.path}: basis {side} of module {name}{rows} is not orthonormal: "
                    f"its Gram matrix is {distance:.3g} away from the identity, allowed is "
                    f"{tolerance:g}"
                )


def _distance_from_orthonormal(matrix: PackedMatrix) -> float:
    rows = unpack(matrix)
    gram = rows @ rows.T
    return float((gram - torch.eye(matrix.rows)).abs().max())


def _index_problems(checkpoint: Checkpoint) -> list[str]:
    """The index is for tools that read the shards by the Hub's convention; it has no digest."""
    shards = {ref.file for ref in checkpoint.config.basis}
    if len(shards) < 2:
        return []
    path = checkpoint.path / BASIS_INDEX_FILE
    try:
        refuse_link_out(path, checkpoint.path, CheckpointError)
        named = set(decode(read_regular(path, JSON_BYTES), ShardIndex).weight_map.values())
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    except JSONError:
        return [f"{path}: not a shard index; compress again"]
    return [] if named == shards else [f"{path}: names other files than {CONFIG_FILE} lists"]
