"""A weighted sum of tasks of one checkpoint, made in memory and in the form of a stored task.

Nothing is fitted and nothing cut:

- modules that are joint in every task: the core is the sum of the cores in float64, kept in float32,
  dense or as factors one after another, whichever is smaller;
- otherwise the factors stand one after another, of the sum of the ranks:
  delta_W = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]. Rows of one number format stay packed in it,
  with their weight in the scales of B; others become float32. So do cores, which the basis is multiplied
  into, and flat loadings, beside private rows of the same module;
- a module that one task alone has stays as it is, with another scale.

Against the sum in float64 what is rounded is a product with a weight: 2**-24 of a row's numbers or of its
scales, for nf4-dq 2**-16 of the scales, whose steps have 16 bits.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from vllm_vlora.blend_names import Blend, blend_text, is_alone
from vllm_vlora.checkpoint.manifest import TaskRecord
from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.checkpoint.serving import carried_tensors
from vllm_vlora.checkpoint.task_entry import TaskEntry
from vllm_vlora.errors import BlendError
from vllm_vlora.narrow_rows import NarrowMatrix, stack_narrow
from vllm_vlora.quantize import (
    FLOAT_DTYPES,
    PackedMatrix,
    nf4_scales,
    pack,
    stack_rows,
    unpack,
)
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.joint import core_factors, core_shape, dense_keeps_rank
from vllm_vlora.representations.spec import ModuleSpec, Segment, rank_fault
from vllm_vlora.representations.stored import Basis, StoredModule

_Rows = tuple[int, int, int, int]


class BlendedCheckpoint(Checkpoint):
    """A checkpoint whose one task is a blend of another one's.

    Whatever takes a task of a checkpoint takes it: its record says how its modules are stored, and
    ``load_task`` makes them.

    Args:
        source: has the tasks that are blended.
        blend: of them.
        file, digest: what its record and ``digest`` say; nothing is written.

    Raises:
        BlendError: a task has more than LoRA weights, or a module's rank would be above every bound.
        TaskNotFoundError: there is no such task.
    """

    def __init__(self, source: Checkpoint, blend: Blend, file: str, digest: str) -> None:
        self._source, self._blend, self._own_digest = source, blend, digest
        self.task_id = blend_text(blend)
        records = [source.record(term.task) for term in blend]
        for term, record in zip(blend, records):
            for name in carried_tensors(record)[:1]:
                raise BlendError(
                    f"task {term.task!r} carries {name}, which is no LoRA weight and cannot be added up; "
                    "blend tasks without such tensors"
                )
        self._parts = _parts_by_module(records)
        segments = [
            _blended_segment(source.modules[place], place, [segment for _, segment in parts])
            for place, parts in self._parts.items()
        ]
        record = TaskRecord(
            file=file,
            sha256="",
            nbytes=0,
            original_nbytes=0,
            error=0.0,
            segments=segments,
            adapter_config=records[0].adapter_config,
            source=self.task_id,
        )
        super().__init__(source.path, source.config, {self.task_id: record}, source._state)

    def digest(self, task_id: str) -> str:
        """The digest that it was made with."""
        self.record(task_id)
        return self._own_digest

    def load_task(
        self, task_id: str, device: torch.device | str = "cpu", narrow: bool = False
    ) -> StoredTask:
        """The blend, of its tasks as they are read now.

        Raises:
            CheckpointError: a file is damaged.
        """
        segments = self.record(task_id).segments
        tasks = [self._source.load_task(term.task, device, narrow) for term in self._blend]
        bases = self._needed_bases(segments)
        modules = {}
        for segment in segments:
            spec = self.modules[segment.module]
            parts = [
                (float(self._blend[place].weight), tasks[place].modules[spec.name])
                for place, _ in self._parts[segment.module]
            ]
            modules[spec.name] = _blended(segment, spec, parts, bases)
        return StoredTask(task_id, self._own_digest, modules, {})

    def _needed_bases(self, segments: Iterable[Segment]) -> Mapping[tuple[str, str], Basis]:
        """Of what becomes factors."""
        wanted = {
            (self.modules[s.module].name, part.representation)
            for s in segments
            for _, part in self._parts[s.module]
            if s.is_private and not part.is_private
        }
        if not wanted:
            return {}
        return {(n, kind): basis for n, kind, basis in self.shared() if (n, kind) in wanted}


def with_named_blends(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose tasks are also the blends that its aliases name, as far as they can be made.

    For who asks what may come: their records are there, but no file is.

    Raises:
        CheckpointError: the aliases are damaged.
    """
    blends = [route.blend for routes in checkpoint.aliases.values() for route in routes]
    named: dict[str, TaskRecord] = {}
    for blend in blends:
        if not is_alone(blend):
            with suppress(BlendError):
                named.update(BlendedCheckpoint(checkpoint, blend, "", "").tasks)
    if not named:
        return checkpoint
    return _WithBlends(checkpoint, named)


class _WithBlends(Checkpoint):
    """A checkpoint that has more records than its own, before whose names the tasks' ids go.

    Of an index still no record is read that nobody asks for.
    """

    def __init__(self, source: Checkpoint, named: Mapping[str, TaskRecord]) -> None:
        self._source = source
        self._named = {name: named[name] for name in named if name not in source.tasks}
        tasks = ChainMap(source.tasks, self._named)  # type: ignore[arg-type]
        super().__init__(source.path, source.config, tasks, source._state)

    def alike(self) -> Iterator[tuple[Sequence[Segment], list[str]]]:
        """The source's, and then each blend."""
        yield from self._source.alike()
        yield from ((record.segments, [name]) for name, record in self._named.items())

    def entry(self, task_id: str) -> TaskEntry:
        """As the source knows it."""
        known = task_id in self._source.tasks
        return self._source.entry(task_id) if known else super().entry(task_id)


def _parts_by_module(records: Sequence[TaskRecord]) -> dict[int, list[tuple[int, Segment]]]:
    """Module -> the segments that some of the tasks have there, each with its task's place."""
    parts: dict[int, list[tuple[int, Segment]]] = {}
    for place, record in enumerate(records):
        for segment in record.segments:
            parts.setdefault(segment.module, []).append((place, segment))
    return dict(sorted(parts.items()))


# --- what the manifest would say ------------------------------------------------------------------


def _blended_segment(spec: ModuleSpec, place: int, parts: Sequence[Segment]) -> Segment:
    if len(parts) == 1:
        # A scale that the file leaves out is of no consequence here: the module has the true one.
        return parts[0]
    rank = sum(part.rank for part in parts)
    if all(part.is_joint for part in parts):
        assert spec.basis is not None
        rows = _hull(parts, (0, spec.basis.k_out, 0, spec.basis.k_in))
        u_start, u_stop, v_start, v_stop = rows or (0, spec.basis.k_out, 0, spec.basis.k_in)
        form, rank, _ = core_shape(rank, u_stop - u_start, v_stop - v_start)
        return Segment(place, "joint", "float32", rank, core=form, rows=rows)
    fault = rank_fault(rank, spec.d_in, spec.d_out)
    if fault is not None:
        raise BlendError(f"module {spec.name}: {fault}; blend fewer tasks")
    return Segment(place, "private", _common_format(parts), rank)


def _hull(parts: Sequence[Segment], whole: _Rows) -> _Rows | None:
    """The rows of the basis that hold the tasks' own; None for all of them."""
    own = [part.rows or whole for part in parts]
    hull = (
        min(rows[0] for rows in own),
        max(rows[1] for rows in own),
        min(rows[2] for rows in own),
        max(rows[3] for rows in own),
    )
    return None if hull == whole else hull


def _common_format(parts: Sequence[Segment]) -> str:
    """A format in which the rows of all parts can stand as they are."""
    formats = {part.format if part.is_private else "float32" for part in parts}
    if len(formats) == 1 and formats <= {"int8", "nf4", "nf4-dq", "trellis"}:
        return formats.pop()
    return "nf4" if formats == {"nf4", "nf4-dq"} else "float32"


# --- the numbers ----------------------------------------------------------------------------------


def _blended(
    segment: Segment,
    spec: ModuleSpec,
    parts: Sequence[tuple[float, StoredModule]],
    bases: Mapping[tuple[str, str], Basis],
) -> StoredModule:
    if len(parts) == 1:
        ((weight, stored),) = parts
        # Copies: views would keep the whole file's tensors.
        copies = {side: _copy(matrix) for side, matrix in stored.matrices.items()}
        return replace(stored, matrices=copies, scale=weight * stored.scale)
    if segment.is_joint:
        return _core(segment, spec, parts)
    sides: dict[str, list[PackedMatrix]] = {"A": [], "B": []}
    for weight, stored in parts:
        a, b, scale = _factors(stored, bases.get((spec.name, stored.representation)))
        sides["A"].append(_in_format(a, segment.format))
        sides["B"].append(_times(_in_format(b, segment.format), weight * scale))
    matrices = {side: _stacked(rows) for side, rows in sides.items()}
    return StoredModule("private", segment.format, segment.rank, matrices)


def _factors(stored: StoredModule, basis: Basis | None) -> tuple[PackedMatrix, PackedMatrix, float]:
    """A, B transposed and the scale, packed where they are."""
    if stored.is_private:
        return stored.matrices["A"], stored.matrices["B"], stored.scale
    assert basis is not None
    device = next(iter(stored.matrices.values())).device
    a, b = decode(stored, replace(basis, u=basis.u.to(device), v=basis.v.to(device)))
    return pack(a, "float32"), pack(b.T.contiguous(), "float32"), 1.0


def _in_format(matrix: PackedMatrix, format: str) -> PackedMatrix:
    """The same values in a format that holds them."""
    if matrix.format == format or (isinstance(matrix, NarrowMatrix) and format == "nf4-dq"):
        return matrix
    matrix = matrix.widened()
    if format == "nf4":
        parts = {"codes": matrix.parts["codes"], "scales": nf4_scales(matrix)}
        return PackedMatrix("nf4", matrix.rows, matrix.cols, parts)
    return PackedMatrix("float32", matrix.rows, matrix.cols, {"values": unpack(matrix)})


def _times(matrix: PackedMatrix, factor: float) -> PackedMatrix:
    """The matrix times a number, which scales take where there are any."""
    name = "values" if matrix.format in FLOAT_DTYPES else "scales"
    name = name if name in matrix.parts else "scale_range"
    scaled = (matrix.parts[name].double() * factor).float()
    if name == "scale_range":
        # As ``quantize`` has it, so that a step times a code is exact.
        steps = scaled[..., 1].contiguous().view(torch.int32)
        scaled[..., 1] = ((steps + 0x80) & ~0xFF).view(torch.float32)
    return replace(matrix, parts={**matrix.parts, name: scaled})


def _stacked(rows: Sequence[PackedMatrix]) -> PackedMatrix:
    narrow = [matrix for matrix in rows if isinstance(matrix, NarrowMatrix)]
    if narrow:
        assert len(narrow) == len(rows), "rows of one task are narrow, and of another not"
        return stack_narrow(narrow)
    return stack_rows(rows)


def _core(
    segment: Segment, spec: ModuleSpec, parts: Sequence[tuple[float, StoredModule]]
) -> StoredModule:
    assert spec.basis is not None
    whole = (0, spec.basis.k_out, 0, spec.basis.k_in)
    hull = segment.rows or whole
    if segment.core == "dense":
        device = parts[0][1].matrices[next(iter(parts[0][1].matrices))].device
        shape = hull[1] - hull[0], hull[3] - hull[2]
        core = torch.zeros(shape, dtype=torch.float64, device=device)
        for weight, stored in parts:
            rows = stored.rows or whole
            own = core[rows[0] - hull[0] : rows[1] - hull[0], rows[2] - hull[2] : rows[3] - hull[2]]
            own += weight * stored.scale * _dense_core(stored)
        matrices = {"C": pack(core.float(), "float32")}
    else:
        a, b = [], []
        for weight, stored in parts:
            rows = stored.rows or whole
            right, left = core_factors(stored)
            a.append(_padded(right, rows[2] - hull[2], hull[3] - rows[3]))
            scaled = (weight * stored.scale * left.double()).float()
            b.append(_padded(scaled, rows[0] - hull[0], hull[1] - rows[1]))
        matrices = {"A": pack(torch.cat(a), "float32"), "B": pack(torch.cat(b), "float32")}
    return StoredModule(
        "joint", "float32", segment.rank, matrices, core=segment.core, rows=segment.rows
    )


def _dense_core(stored: StoredModule) -> torch.Tensor:
    """A core without its scale, in float64."""
    if stored.core == "dense":
        core = unpack(stored.matrices["C"])
        if dense_keeps_rank(stored.format, stored.rank, core.shape):
            return core.double()
    right, left = core_factors(stored)
    return left.double().T @ right.double()


def _padded(rows: torch.Tensor, before: int, after: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (before, after))


def _copy(matrix: PackedMatrix) -> PackedMatrix:
    return replace(matrix, parts={name: part.clone() for name, part in matrix.parts.items()})
