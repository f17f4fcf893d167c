"""Whether fitting a checkpoint anew would pay: from its manifest alone, or from plans.

Adding only projects on bases that were fitted to other tasks, and removing leaves rows that nobody
uses. ``rebuild_advice`` says from the manifest alone that a rebuild may pay; ``predict_rebuild`` plans
one and says whether it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from vllm_vlora.adapters.collection import Progress
from vllm_vlora.adapters.peft_folder import Adapter, open_adapter
from vllm_vlora.checkpoint.export import export_all
from vllm_vlora.checkpoint.layout import stored_parts
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_entry import column
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import predict
from vllm_vlora.quantize import row_nbytes
from vllm_vlora.representations.registry import segment_sides
from vllm_vlora.representations.spec import ModuleSpec, Segment

# A rebuild may pay from these shares of private bytes beside bases, and of rows that nobody uses.
_PRIVATE_SHARE = 0.2
_IDLE_SHARE = 0.05
# It pays with a tenth less of either at hardly more of the other.
_CLEARLY = 0.9
_HARDLY = 1.05
_SIZES = (1.0, 0.9, 0.8, 0.65, 0.5)


@dataclass(frozen=True)
class RebuildAdvice:
    """What the manifest says about a rebuild.

    Attributes:
        private_tasks: tasks with private factors in modules that have a shared basis.
        private_nbytes: of these factors. task_nbytes: of all tasks' LoRA weights.
        idle_nbytes: of basis rows that no task uses.
        likely: whether a rebuild may pay. why: that in words; empty where it will not.
    """

    private_tasks: int
    private_nbytes: int
    task_nbytes: int
    idle_nbytes: int
    likely: bool
    why: str


def rebuild_advice(checkpoint: Checkpoint) -> RebuildAdvice:
    """Whether a rebuild may pay, from the manifest alone.

    It does not know whether the private tasks were weighed when the bases were fitted, as
    ``compress`` does, or came later: only a prediction knows.
    """
    private_tasks = private = total = 0
    for segments, task_ids in checkpoint.alike():
        whole = own = 0
        for segment in segments:
            spec = checkpoint.modules[segment.module]
            nbytes = _segment_nbytes(segment, spec)
            whole += nbytes
            if segment.is_private and spec.basis is not None:
                own += nbytes
        total += len(task_ids) * whole
        private += len(task_ids) * own
        private_tasks += len(task_ids) * (own > 0)
    idle = sum(_idle_nbytes(checkpoint).values())
    reasons = []
    if private_tasks > 1 and private >= _PRIVATE_SHARE * total:
        reasons.append(
            f"{private_tasks} tasks are private in modules with a shared basis ({private} of all "
            f"tasks' {total} bytes); if they were added later, bases fitted to them too may hold them"
        )
    if idle and idle >= _IDLE_SHARE * checkpoint.nbytes:
        reasons.append(f"no task uses {idle} bytes of the shared bases")
    return RebuildAdvice(private_tasks, private, total, idle, bool(reasons), "; ".join(reasons))


def _segment_nbytes(segment: Segment, spec: ModuleSpec) -> int:
    return sum(
        count * math.prod(shape) * dtype.itemsize
        for rows, cols in segment_sides(segment, spec).values()
        for _, dtype, count, shape in stored_parts(segment, rows, cols)
    )


def _idle_nbytes(checkpoint: Checkpoint) -> dict[int, int]:
    """Module -> bytes of the rows of its basis that no task uses."""
    used: dict[int, tuple[set[int], set[int]]] = {
        place: (set(), set())
        for place, spec in enumerate(checkpoint.modules)
        if spec.basis is not None
    }
    ranges: dict[int, set[tuple[int, int, int, int]]] = {}
    for segment in checkpoint.usage():
        basis = checkpoint.modules[segment.module].basis
        if segment.is_joint and basis is not None:
            rows = segment.rows or (0, basis.k_out, 0, basis.k_in)
            ranges.setdefault(segment.module, set()).add(rows)
    idle = {}
    for place, (used_u, used_v) in used.items():
        for u_start, u_stop, v_start, v_stop in ranges.get(place, ()):
            used_u.update(range(u_start, u_stop))
            used_v.update(range(v_start, v_stop))
        spec = checkpoint.modules[place]
        assert spec.basis is not None
        rows_u = spec.basis.k_out - len(used_u)
        rows_v = spec.basis.k_in - len(used_v)
        format = spec.basis.format
        idle[place] = rows_u * row_nbytes(format, spec.d_out)
        idle[place] += rows_v * row_nbytes(format, spec.d_in)
    return idle


@dataclass(frozen=True)
class RebuildPoint:
    """A rebuild: its bytes, and the mean relative error of its tasks against their originals."""

    nbytes: int
    error: float


@dataclass(frozen=True)
class RebuildPrediction:
    """What rebuilds of several sizes would keep, beside the checkpoint as it is.

    Attributes:
        nbytes, error: of the checkpoint; mean relative error of its tasks.
        points: predicted. from_originals: whether the originals were there; otherwise the errors are
            those of the tasks as stored and of storing them anew together, taken as independent.
        best: the point for which a rebuild pays, None where it does not.
    """

    nbytes: int
    error: float
    points: list[RebuildPoint]
    from_originals: bool
    best: RebuildPoint | None


def predict_rebuild(
    checkpoint: Checkpoint,
    originals: Mapping[str, Adapter] | None = None,
    *,
    options: CompressOptions | None = None,
    progress: Progress | None = None,
) -> RebuildPrediction:
    """Plan rebuilds of the checkpoint's size and smaller ones; writes nothing that stays.

    Args:
        originals: every task's adapter. Without them the tasks as they are stored are decoded into a
            temporary folder and planned: what they have lost stays lost, so that only a smaller
            size can pay, and the errors that are told are the larger ones.
        options: of ``compress``; a budget in them is not used.

    Raises:
        As :func:`vllm_vlora.predict` and :func:`vllm_vlora.export_all`.
    """
    records = checkpoint.tasks
    today = sum(column(records, "error")) / max(len(records), 1)
    if originals is not None:
        adapters = {task_id: originals[task_id] for task_id in records}
        points = _predict(checkpoint, adapters, 0.0, options, progress)
    else:
        with TemporaryDirectory(prefix="vllm-vlora-") as folder:
            paths = export_all(checkpoint, records, folder, progress=_told(progress))
            decoded = {task_id: open_adapter(path) for task_id, path in paths.items()}
            points = _predict(checkpoint, decoded, today, options, progress)
    paying = [point for point in points if _pays(point, checkpoint.nbytes, today)]
    best = min(paying, key=lambda p: (p.nbytes * p.error, p.nbytes), default=None)
    return RebuildPrediction(checkpoint.nbytes, today, points, originals is not None, best)


def _told(progress: Progress | None) -> Progress | None:
    if progress is None:
        return None
    return lambda _, done, total: progress("decode", done, total)


def _predict(
    checkpoint: Checkpoint,
    adapters: Mapping[str, Adapter],
    lost: float,
    options: CompressOptions | None,
    progress: Progress | None,
) -> list[RebuildPoint]:
    original = sum(adapter.original_nbytes for adapter in adapters.values())
    ratios = [original / (checkpoint.nbytes * size) for size in _SIZES]
    found = predict(adapters, options, ratios=ratios, progress=progress)
    return [
        RebuildPoint(point.candidate.nbytes, math.hypot(point.candidate.mean_error, lost))
        for point in found
    ]


def _pays(point: RebuildPoint, nbytes: int, error: float) -> bool:
    if point.nbytes <= _CLEARLY * nbytes and point.error <= _HARDLY * error:
        return True
    return point.nbytes <= nbytes and point.error <= _CLEARLY * error and error > 0
