"""Tasks that run direct: the layers' shared bases, and each task's cores and packed factors.

This module knows tensors only. ``layers`` describes vLLM's linear layers as ``LayerLayout``; here they
become the kernels' layers, a stored task becomes their task, and the slots are given out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F

from vllm_vlora.adapters.saved_tensors import is_base_copy
from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.narrow_rows import NARROW_FORMAT
from vllm_vlora.plugin.held_bases import Bases, HeldBases
from vllm_vlora.plugin.images import Image, make_image
from vllm_vlora.plugin.layouts import LayerLayout, Run, SliceLayout
from vllm_vlora.plugin.memory import direct_obstacle
from vllm_vlora.quantize import FLOAT_DTYPES, FORMAT_OF_DTYPE, NF4_BLOCK, PackedMatrix, unpack
from vllm_vlora.representations.joint import dense_keeps_rank, split_core
from vllm_vlora.representations.spec import ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis, StoredModule
from vllm_vlora.triton_kernels.direct import (
    CORE_ALIGNMENT,
    FORMAT_CODES,
    DirectLayer,
    DirectSlice,
    DirectTask,
    Routing,
    SliceTask,
    SlotTable,
    make_task,
    warm_up,
)

EngineName = Callable[[str], str]
# Bytes: addresses of packed parts are multiples of it.
_ALIGNMENT = 16
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class DirectMemory:
    """Bytes on the device."""

    bases: int = 0
    cores: int = 0
    factors: int = 0
    table: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.bases + self.cores + self.factors + self.table

    def __add__(self, other: DirectMemory) -> DirectMemory:
        return DirectMemory(
            self.bases + other.bases,
            self.cores + other.cores,
            self.factors + other.factors,
            self.table + other.table,
        )

    def __neg__(self) -> DirectMemory:
        return DirectMemory(-self.bases, -self.cores, -self.factors, -self.table)


def task_memory(task: DirectTask) -> DirectMemory:
    """What one task takes on the device."""
    cores = [part.core.untyped_storage() for part in task.slices.values() if part.core is not None]
    return DirectMemory(
        cores=sum({storage.data_ptr(): storage.nbytes() for storage in cores}.values()),
        factors=sum(m.nbytes for part in task.slices.values() for m in (part.a, part.b) if m),
        table=task.records.nbytes,
    )


class DirectPath:
    """Everything that direct tasks need on one rank.

    Made once, with the checkpoint that the engine starts with: whether it has private tasks decides
    whether the layers look for any, and how wide their bases are stays, since a captured graph cannot
    change afterwards. Bases that are no wider can be put in the place of those that the layers hold.
    Tasks that come later run direct if they fit all that, and are materialized otherwise.

    Args:
        checkpoint: the checkpoint.
        layouts: every linear layer that may run direct.
        engine_name: turns the adapters' name of a module into the engine's.
        slots: distinct direct tasks in one batch.
        max_tokens: the longest batch, padding included.
        device, dtype: of the layers' inputs.
        packed_basis: keep quantised bases packed where a rank's share can be cut from them.
        basis_rows: components that a layer with a basis has room for, where its own are fewer.
        narrow_rows: hold private rows of 3 and 2 bits with no more; done where a task has such rows.
        elsewhere: modules of the other pipeline-parallel ranks -> whether they have a direct form there.
            How a task runs is decided from all of its modules, and so alike on every rank.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layouts: Iterable[LayerLayout],
        engine_name: EngineName,
        *,
        slots: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        packed_basis: bool = False,
        basis_rows: int = 0,
        narrow_rows: bool = False,
        elsewhere: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        self.dtype, self.device = dtype, device
        self._engine_name = engine_name
        self._elsewhere = elsewhere
        self._layouts = list(layouts)
        self._slices: dict[str, list[tuple[int, SliceLayout]]] = {}
        count = 0
        for layout in self._layouts:
            for part in layout.slices:
                self._slices.setdefault(part.name, []).append((count, part))
                count += 1
        self._count = count
        self.bases = Bases(checkpoint.basis_digest, HeldBases(engine_name))
        users = _users(checkpoint, self._segments_obstacle, self.bases.held)
        # Without a private task nothing looks for one; with one, every layer is ready for such tasks.
        self._max_rank = max((s.rank for s, _ in users if s.is_private), default=0)
        # Known now: captured graphs have one kernel for all tasks, with one body where it can be.
        self.narrow_rows = narrow_rows and any(segment.has_narrow_rows for segment, _ in users)
        self._formats = _formats(users, self.narrow_rows)
        bases = _load_bases(self, checkpoint, packed_basis, basis_rows)
        limits = _Limits(self._max_rank, self._formats, dtype)
        self.layers = _make_layers(self._layouts, bases, limits)
        self._by_slice = {
            layer.index + place: layer
            for layer in self.layers.values()
            for place in range(len(layer.slices))
        }
        self.table = SlotTable(slots, count, device)
        self.routing = Routing(max_tokens, slots, device)
        self.empty = make_task({}, count, device)
        self._tasks = task_memory(self.empty)

    def warm_up(self, ahead: bool) -> None:
        """Have every kernel compiled and loaded that a batch can need; nothing is routed after it."""
        warm_up(self.layers.values(), self.table, self.routing, self.dtype, ahead)

    # --- tasks ---

    def obstacle(
        self, checkpoint: Checkpoint, task_id: str, bases: Bases | None = None
    ) -> str | None:
        """Why a task cannot run direct here, or None when it can.

        Args:
            bases: as if the layers held these; by default those that they hold.
        """
        reason = self._task_obstacle(checkpoint, task_id)
        if reason is not None:
            return reason
        held = (bases or self.bases).of(checkpoint)
        for segment in checkpoint.record(task_id).segments:
            module = checkpoint.modules[segment.module]
            reason = self._segment_obstacle(segment, module.name, held)
            if reason is not None:
                return reason
        return None

    def make_task(self, stored: StoredTask) -> DirectTask:
        """A stored task on the device in the form that the kernels read, counted as held."""
        task = self.describe(stored, self.device)
        self.count(task_memory(task))
        return task

    def describe(self, stored: StoredTask, device: torch.device) -> DirectTask:
        """A stored task in the form that the kernels read; what is on the host stays there."""
        parts: dict[int, SliceTask] = {}
        for name, module in stored.modules.items():
            # What is another pipeline rank's has no slices here.
            for number, layout in self._slices.get(self._engine_name(name), ()):
                if module.is_joint:
                    core, rank = _core(module, *self._widths(number))
                    parts[number] = SliceTask(core=core, core_rank=rank)
                elif module.rank:
                    parts[number] = self._private(module, layout)
        return make_task(_place_cores(parts, self.dtype, device), self._count, device)

    def count(self, memory: DirectMemory) -> None:
        """Take a task into the books; its negative out of them."""
        self._tasks += memory

    def memory(self) -> DirectMemory:
        """What all of it takes on the device."""
        bases = sum(m.nbytes for layer in self.layers.values() for m in _bases(layer))
        slots = self.table.records.nbytes + self.table.codebook.nbytes
        return DirectMemory(bases=bases, table=slots + self.routing.nbytes) + self._tasks

    # --- other bases ---

    def other_bases(self, checkpoint: Checkpoint) -> Bases | None:
        """What the layers would hold for a checkpoint on other bases; None where it needs no others."""
        bases = Bases(checkpoint.basis_digest, HeldBases(self._engine_name))
        if bases.digest == self.bases.digest:
            return None
        users = _users(checkpoint, self._segments_obstacle, bases.held)
        return bases if any(segment.is_joint for segment, _ in users) else None

    def misfit(self, checkpoint: Checkpoint, bases: Bases) -> str | None:
        """Why the layers of this rank have no room for a checkpoint's bases; None where they have."""
        for module in checkpoint.modules:
            place = self._place_of(module.name, bases)
            if place is None or module.basis is None:
                continue
            number, layout = place
            found = self._targets(number)
            if found is None:
                return f"the layer of {module.name} holds no basis"
            u, v = found
            if module.basis.k_out > u.rows or module.basis.k_in > v.rows:
                return (
                    f"{module.name} has {module.basis.k_out} and {module.basis.k_in} components, its "
                    f"layer has room for {u.rows} and {v.rows}"
                )
            for target, run, width in (
                (u, layout.runs_b[0], module.d_out),
                (v, layout.runs_a[0], module.d_in),
            ):
                stored = _cut_format(module.basis.format, run, width)
                if target.format not in FLOAT_DTYPES and stored != target.format:
                    return f"{module.name} is stored {stored}, its layer holds {target.format}"
        return None

    def read_bases(self, checkpoint: Checkpoint, bases: Bases) -> Image[dict[int, Basis]]:
        """This rank's share of bases that fit, in host memory, as ``exchange`` takes it.

        Raises:
            CheckpointError: a file of them is damaged.
        """
        shares: dict[int, Basis] = {}
        for module, basis in checkpoint.bases():
            place = self._place_of(module, bases)
            if place is None:
                continue
            number, layout = place
            targets = self._targets(number)
            assert targets is not None
            pairs = zip((basis.u, basis.v), (layout.runs_b[0], layout.runs_a[0]), targets)
            shares[number] = Basis(
                *(
                    _share(matrix, run, target.format not in FLOAT_DTYPES, self.dtype, _HOST)
                    for matrix, run, target in pairs
                )
            )
        return make_image(shares, pin=self.device.type == "cuda")

    def exchange(self, bases: Bases, shares: Mapping[int, Basis]) -> None:
        """Put other bases in the place of those that the layers hold, on the current stream.

        In place, since captured graphs have the addresses. Tasks on the bases of before must not be
        routed to afterwards.
        """
        for number, basis in shares.items():
            targets = self._targets(number)
            assert targets is not None
            for target, matrix in zip(targets, (basis.u, basis.v)):
                for name, part in target.parts.items():
                    part[: matrix.rows].copy_(matrix.parts[name], non_blocking=True)
                    # No core reaches these rows; they are zeros lest an infinity does.
                    part[matrix.rows :].zero_()
        self.bases = bases

    def _place_of(self, module: str, bases: Bases) -> tuple[int, SliceLayout] | None:
        """The slice on this rank whose layer is to hold a module's basis."""
        name = self._engine_name(module)
        if not bases.held.holds(module) or name in self._elsewhere:
            return None
        (place, *others) = self._slices[name]
        assert not others, f"{name} stands in several layers"
        return place

    def _targets(self, number: int) -> tuple[PackedMatrix, PackedMatrix] | None:
        """U and V of a slice, as views of what its layer holds; None where that is no basis."""
        layer = self._by_slice.get(number)
        if layer is None or layer.v is None:
            return None
        place = number - layer.index
        u, k_in = layer.slices[place].u, layer.slices[place].k_in
        first = sum(part.k_in for part in layer.slices[:place])
        return None if u is None else (u, layer.v.row_slice(first, first + k_in))

    # --- why a task cannot run direct ---

    def _task_obstacle(self, checkpoint: Checkpoint, task_id: str) -> str | None:
        record = checkpoint.record(task_id)
        reason = direct_obstacle(record.segments, checkpoint.modules)
        if reason is not None:
            return reason
        heads = [name for name in record.extra if not is_base_copy(name)]
        if heads:
            return f"it carries {heads[0]}, which stands in a slot"
        return self._segments_obstacle(checkpoint, record.segments)

    def _segments_obstacle(self, checkpoint: Checkpoint, segments: Sequence[Segment]) -> str | None:
        """Why no task with these segments can run direct here, whatever the layers hold."""
        reason = direct_obstacle(segments, checkpoint.modules)
        if reason is not None:
            return reason
        for segment in segments:
            module = checkpoint.modules[segment.module]
            name = self._engine_name(module.name)
            parts = self._slices.get(name, [])
            if not parts and not self._elsewhere.get(name):
                return f"{module.name} is a layer without a direct form"
            if not all(part.is_whole_run for _, part in parts):
                return f"{module.name} is cut into several pieces on a tensor-parallel rank"
        return None

    def _segment_obstacle(
        self, segment: Segment, module: str, held: HeldBases | None
    ) -> str | None:
        """Why the layers, as they were made, cannot take a segment; ``held``: its checkpoint's bases."""
        if segment.is_joint:
            if held is None or held.holder(module) is None:
                return f"{module} has another basis than the layers hold"
            return held.obstacle(module)
        if segment.rank > self._max_rank:
            return (
                f"{module} has rank {segment.rank}, more than the private tasks that the engine "
                "started with"
            )
        if not _served_as(segment.format, self.narrow_rows) <= set(self._formats):
            return (
                f"{module} is {segment.format}, a format that no task had when the engine started"
            )
        return None

    def _widths(self, number: int) -> tuple[int, int]:
        """(k_out, k_in) of the basis that a slice's layer holds."""
        layer = self._by_slice[number]
        part = layer.slices[number - layer.index]
        assert part.u is not None
        return part.u.rows, part.k_in

    def _private(self, module: StoredModule, layout: SliceLayout) -> SliceTask:
        """This rank's columns of private factors, floats in the dtype of the layers' inputs."""
        a, b = module.matrices["A"], module.matrices["B"]
        run_a, run_b = layout.runs_a[0], layout.runs_b[0]
        if run_a.width < a.cols or run_b.width < b.cols:
            # Both, though a rank cuts only one: a cut makes nf4 of nf4-dq, and the kernels read one
            # format; and as a view of its file's flat tensors the other would keep those alive.
            a = a.column_blocks(run_a.source, run_a.source + run_a.width)
            b = b.column_blocks(run_b.source, run_b.source + run_b.width)
        if a.format in FLOAT_DTYPES:
            a, b = _dense(unpack(a, self.dtype)), _dense(unpack(b, self.dtype))
        return SliceTask(a=_aligned(a), b=_aligned(b), scale=module.scale)


def _users(
    checkpoint: Checkpoint,
    obstacle: Callable[[Checkpoint, Sequence[Segment]], str | None],
    held: HeldBases,
) -> list[tuple[Segment, ModuleSpec]]:
    """The segments of tasks that can run direct, with their modules; ``held`` gets their bases.

    Those that many tasks have in common are looked at once.
    """
    return [
        (segment, checkpoint.modules[segment.module])
        for segments, tasks in checkpoint.alike()
        if obstacle(checkpoint, segments) is None
        and not all(checkpoint.entry(task).carries for task in tasks)
        and held.take(segments, checkpoint.modules) is None
        for segment in segments
    ]


def _formats(users: Iterable[tuple[Segment, ModuleSpec]], narrow: bool) -> tuple[str, ...]:
    """What the kernels must know of: each body that they need not have makes them smaller and faster."""
    found = {
        kind
        for segment, _ in users
        if segment.is_private
        for kind in _served_as(segment.format, narrow)
    }
    return tuple(kind for kind in FORMAT_CODES if kind in found)


def _served_as(format: str, narrow: bool) -> set[str]:
    """The kinds of packed factors that a stored format becomes: a rank's cut makes nf4 of nf4-dq."""
    if format in FLOAT_DTYPES:
        return {"float"}
    if narrow and format == "nf4-dq":
        return {NARROW_FORMAT}
    return {format, "nf4"} if format == "nf4-dq" else {format}


@dataclass(frozen=True)
class _Limits:
    """What private tasks may be, and the dtype of the layers' inputs."""

    max_rank: int
    formats: tuple[str, ...]
    dtype: torch.dtype


def _make_layers(
    layouts: Iterable[LayerLayout], bases: dict[str, Basis], limits: _Limits
) -> dict[str, DirectLayer]:
    layers, index = {}, 0
    for layout in layouts:
        layer = _make_layer(layout, index, bases, limits)
        if layer is not None:
            layers[layout.name] = layer
        index += len(layout.slices)
    return layers


def _make_layer(
    layout: LayerLayout, index: int, bases: dict[str, Basis], limits: _Limits
) -> DirectLayer | None:
    # Nothing runs direct in a slice of several runs, but its columns of y lie between the others'.
    held = [bases.pop(part.name, None) for part in layout.slices]
    v = [basis.v for basis in held if basis is not None]
    if not v and not limits.max_rank:
        return None
    slices = tuple(
        DirectSlice(
            width=sum(run.width for run in part.runs_b),
            start_in=_start(part.runs_a[0], part.d_in),
            start_out=_start(part.runs_b[0], part.d_out),
            u=None if basis is None else basis.u,
            k_in=0 if basis is None else basis.v.rows,
        )
        for part, basis in zip(layout.slices, held)
    )
    stacked = _stack_rows(v, limits.dtype) if v else None
    d_in = sum(run.width for run in layout.slices[0].runs_a)
    return DirectLayer(index, d_in, slices, stacked, limits.max_rank, limits.formats)


def _start(run: Run, full: int) -> int:
    """Where a rank's columns begin in what ``DirectPath._private`` makes of a factor."""
    return 0 if run.width == full else run.source % NF4_BLOCK


def _load_bases(
    path: DirectPath, checkpoint: Checkpoint, packed: bool, least: int
) -> dict[str, Basis]:
    """This rank's share of every wanted basis by the engine's name; host copies are not kept.

    ``least``: rows of each, zeros behind its own.
    """
    bases: dict[str, Basis] = {}
    for module, basis in checkpoint.bases():
        place = path._place_of(module, path.bases)
        if place is None:
            continue
        _, layout = place
        u = _share(basis.u, layout.runs_b[0], packed, path.dtype, path.device)
        v = _share(basis.v, layout.runs_a[0], packed, path.dtype, path.device)
        bases[layout.name] = Basis(_with_room(u, least), _with_room(v, least))
    return bases


def _with_room(matrix: PackedMatrix, rows: int) -> PackedMatrix:
    if rows <= matrix.rows:
        return matrix
    parts = {n: part.new_zeros(rows, *part.shape[1:]) for n, part in matrix.parts.items()}
    for name, part in parts.items():
        part[: matrix.rows].copy_(matrix.parts[name])
    return PackedMatrix(matrix.format, rows, matrix.cols, parts)


def _cut_format(format: str, run: Run, width: int) -> str:
    """The format of a rank's share of a packed matrix."""
    return "nf4" if format == "nf4-dq" and run.width < width else format


def _share(
    matrix: PackedMatrix, run: Run, packed: bool, dtype: torch.dtype, device: torch.device
) -> PackedMatrix:
    if packed and matrix.format not in FLOAT_DTYPES and run.source % NF4_BLOCK == 0:
        if run.width < matrix.cols:
            matrix = matrix.column_blocks(run.source, run.source + run.width)
        return matrix.to(device)
    return _dense(unpack(matrix.to(device), dtype, run.source, run.source + run.width))


def _stack_rows(matrices: list[PackedMatrix], dtype: torch.dtype) -> PackedMatrix:
    if len({matrix.format for matrix in matrices}) > 1:
        matrices = [_dense(unpack(matrix, dtype)) for matrix in matrices]
    first = matrices[0]
    if len(matrices) == 1:
        return first
    parts = {name: torch.cat([m.parts[name] for m in matrices]) for name in first.parts}
    return PackedMatrix(first.format, sum(m.rows for m in matrices), first.cols, parts)


def _aligned(matrix: PackedMatrix) -> PackedMatrix:
    """The matrix with each part at a multiple of 16 bytes, as the kernels read it.

    A task's parts are views of a few flat tensors; only those of very small ones stand elsewhere.
    """
    parts = {n: p if p.data_ptr() % _ALIGNMENT == 0 else p.clone() for n, p in matrix.parts.items()}
    return replace(matrix, parts=parts)


def _dense(values: torch.Tensor) -> PackedMatrix:
    rows, cols = values.shape
    return PackedMatrix(FORMAT_OF_DTYPE[values.dtype], rows, cols, {"values": values.contiguous()})


def _bases(layer: DirectLayer) -> Iterator[PackedMatrix]:
    if layer.v is not None:
        yield layer.v
    yield from (part.u for part in layer.slices if part.u is not None)


def _place_cores(
    parts: Mapping[int, SliceTask], dtype: torch.dtype, device: torch.device
) -> dict[int, SliceTask]:
    """The same parts with all cores in one allocation of the dtype."""
    cores = {number: part.core for number, part in parts.items() if part.core is not None}
    sizes = {n: -(-c.numel() // CORE_ALIGNMENT) * CORE_ALIGNMENT for n, c in cores.items()}
    placed, offset = dict(parts), 0
    # Filled where the cores are, so that a task read on the host takes one copy to the device.
    where = next((core.device for core in cores.values()), device)
    whole = torch.zeros(sum(sizes.values()), dtype=dtype, device=where)
    starts = {}
    for number, core in cores.items():
        whole[offset : offset + core.numel()].view(core.shape).copy_(core)
        starts[number] = offset
        offset += sizes[number]
    whole = whole.to(device)
    for number, core in cores.items():
        view = whole[starts[number] : starts[number] + core.numel()].view(core.shape)
        placed[number] = replace(parts[number], core=view)
    return placed


def _core(module: StoredModule, k_out: int, k_in: int) -> tuple[torch.Tensor, int]:
    """(core, its rank or 0 when dense) as ``SliceTask`` holds them, in float32.

    A core on some rows of the basis, or on all of one that is narrower than what its layer has room for,
    becomes one on all ``k_out`` and ``k_in`` of them, with zeros: the layer's passes over the basis are
    the same for every task, whatever rows it uses.
    """
    own_out, own_in = _core_widths(module)
    u_start, u_stop, v_start, v_stop = module.rows or (0, own_out, 0, own_in)
    is_whole = (own_out, own_in) == (k_out, k_in)
    dense_is_smaller = k_out * k_in <= module.rank * (k_out + k_in)
    if module.core == "dense":
        core = unpack(module.matrices["C"])
        if dense_keeps_rank(module.format, module.rank, core.shape) and (
            is_whole or dense_is_smaller
        ):
            padding = (v_start, k_in - v_stop, u_start, k_out - u_stop)
            return F.pad(core * module.scale, padding), 0
        a, b = split_core(core, module.rank)
    else:
        a, b = unpack(module.matrices["A"]), unpack(module.matrices["B"])
    a = F.pad(a, (v_start, k_in - v_stop))
    b = F.pad(b * module.scale, (u_start, k_out - u_stop))
    if dense_is_smaller:
        return b.T @ a, 0
    return torch.cat([a, b], dim=1), module.rank


def _core_widths(module: StoredModule) -> tuple[int, int]:
    """Components of U and of V that a stored core is on."""
    matrices = module.matrices
    if module.core == "dense":
        return matrices["C"].rows, matrices["C"].cols
    return matrices["B"].cols, matrices["A"].cols
