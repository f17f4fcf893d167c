"""Device memory of a served checkpoint, counted from its manifest: no tensor is read.

Per device, which is one tensor-parallel rank (the first), for each way to run (``VLLM_VLORA_MODE``) and
for stock vLLM serving the same adapters. With s bytes an element of the engine's dtype, R the slots'
rank, w_in and w_out what the rank holds of a layer's d_in and d_out, and row(w) the bytes of w packed
columns:

* slots: ``count * R * s * sum(w_in + w_out)`` over every slice of every LoRA layer of the model. Stock
  vLLM and ``materialize`` have ``max_loras`` slots; ``direct`` and ``auto`` have at most ``peft_slots``,
  for ordinary adapters and for tasks that cannot run direct.
* bases: to materialize, as stored and whole; to run direct, ``s * (k_in w_in + k_out w_out)``, or
  quantised ones packed. With ``basis_rows`` no k is less than that.
* cores: to materialize, float32 factors, ``4 rank (k_in + k_out)`` of the rows of the basis that a
  task uses; to run direct, ``s * min(k_out k_in, rank (k_in + k_out))`` of all its rows, each rounded
  up to 8 elements.
* flat tasks are materialized: their components as stored and whole, and a task's loadings spread over
  float32 factors, ``4 rank^2 (k_in + k_out + 2)``.
* private factors, packed: to materialize ``rank * (row(d_in) + row(d_out))``, whole; to run direct
  ``rank * (row(w_in) + row(w_out))``, floats in the engine's dtype. Rows of 3 and 2 bits count with 4,
  or with ``narrow_rows`` as in the file, where a task that runs so has any.
* direct also: a record of 12 words for each slice, one for each of ``max_loras + 1`` slots and one for
  each task (and none), and the routing of a batch.

What every mode and stock vLLM need alike (punica's index buffers, activations) is left out.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_vlora.adapters.module_names import layer_shapes, renamed, shared_prefixes
from vllm_vlora.adapters.peft_config import lora_rank
from vllm_vlora.checkpoint.manifest import TaskRecord
from vllm_vlora.checkpoint.serving import (
    VLLM_LORA_RANKS,
    carried_tensors,
    extra_obstacle,
    remove_line,
    serving_rank,
)
from vllm_vlora.checkpoint.task_entry import entries
from vllm_vlora.errors import ModelMismatchError, OptionError
from vllm_vlora.narrow_rows import narrow_nbytes
from vllm_vlora.plugin.held_bases import HeldBases
from vllm_vlora.plugin.model_layers import (
    LM_HEAD,
    LayerSlice,
    ModelShape,
    match_modules,
    module_slice,
    targeted,
)
from vllm_vlora.plugin.settings import DEFAULT_PEFT_SLOTS
from vllm_vlora.plugin.settings import MODES as SERVING_MODES
from vllm_vlora.quantize import FLOAT_DTYPES, row_nbytes
from vllm_vlora.representations.joint import dense_keeps_rank
from vllm_vlora.representations.registry import shared_rows, shared_sides
from vllm_vlora.representations.spec import BasisSpec, ModuleSpec, Segment, core_widths
from vllm_vlora.triton_kernels.codebook import CODEBOOK
from vllm_vlora.triton_kernels.direct import CORE_ALIGNMENT, RECORD_NBYTES, routing_nbytes
from vllm_vlora.wording import some_of

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.reader import Checkpoint

STOCK = "stock"
MODES = SERVING_MODES[::-1]
"""From what is nearest to stock vLLM on."""
DEFAULT_BATCHED_TOKENS = 8192
# vLLM fuses the experts of every model that has them, numbered so in adapters.
_EXPERT = re.compile(r"\.experts\.\d+\.")
_SIDE_ITEMSIZE = FLOAT_DTYPES["float32"].itemsize
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Fits:
    """What a number of bytes on one device holds.

    ``batch_tasks``: distinct tasks that one batch may have while every task stays resident, at most
    all of them. ``resident_tasks``: tasks of this checkpoint's mean size that stay resident beside
    the slots asked for; with stock vLLM the slots themselves.
    """

    batch_tasks: int
    resident_tasks: int


@dataclass(frozen=True)
class ModeMemory:
    """Bytes on one device in one mode; ``mode`` is one of :data:`MODES` or :data:`STOCK`.

    Attributes:
        slots, slot_rank: number of vLLM's slots, and their rank.
        slots_nbytes, bases_nbytes, cores_nbytes, factors_nbytes: see the module.
        table_nbytes: records of the slots of direct tasks. records_nbytes: those of the tasks.
        buffers_nbytes: routing of a batch to direct tasks, and the codebook.
        host_nbytes: pinned host memory for adapters that wait to be copied (all of them).
        direct_tasks, materialized_tasks: tasks by how they run; stock vLLM's count as materialized.
        distinct_tasks: different tasks that one batch may have.
        switch_host_nbytes, switch_device_nbytes: bytes that a task not in a slot moves before its
            first token, from the host and within device memory (read plus written), for the task
            that moves most.
        fits: what the memory given holds; None without one.
        obstacle: why an engine would not start or not serve every task; the numbers are then zero.
    """

    mode: str
    slots: int = 0
    slot_rank: int = 0
    slots_nbytes: int = 0
    bases_nbytes: int = 0
    cores_nbytes: int = 0
    factors_nbytes: int = 0
    table_nbytes: int = 0
    records_nbytes: int = 0
    buffers_nbytes: int = 0
    host_nbytes: int = 0
    direct_tasks: int = 0
    materialized_tasks: int = 0
    distinct_tasks: int = 0
    switch_host_nbytes: int = 0
    switch_device_nbytes: int = 0
    fits: Fits | None = None
    obstacle: str | None = None

    @property
    def tasks_nbytes(self) -> int:
        """Bytes that grow with the number of resident tasks."""
        return self.cores_nbytes + self.factors_nbytes + self.records_nbytes

    @property
    def total_nbytes(self) -> int:
        """Bytes on the device."""
        fixed = self.slots_nbytes + self.bases_nbytes + self.table_nbytes + self.buffers_nbytes
        return fixed + self.tasks_nbytes


@dataclass(frozen=True)
class MemoryPlan:
    """What ``plan_memory`` counted.

    Attributes:
        tp, dtype, max_loras, max_lora_rank: of the engine; the rank is the plugin's slots'.
        tasks: number of tasks of the checkpoint.
        layers_from: the model's config, or None where the checkpoint's modules stand in for it.
        slices: slices of LoRA layers that have slots.
        modes: stock vLLM first, then :data:`MODES`.
        not_direct: task id -> why it cannot run direct.
        assumptions: what was taken for granted, a sentence each.

    Examples:
        >>> found = plan_memory(Checkpoint.open(checkpoint), max_loras=64, tp=2)
        >>> found.tasks, found.mode("direct").direct_tasks, found.not_direct
        (4, 4, {})
    """

    tp: int
    dtype: str
    max_loras: int
    max_lora_rank: int
    tasks: int
    layers_from: str | None
    slices: int
    modes: tuple[ModeMemory, ...]
    not_direct: dict[str, str] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    def mode(self, name: str) -> ModeMemory:
        """The mode of that name; KeyError when there is none."""
        return {memory.mode: memory for memory in self.modes}[name]


def direct_obstacle(segments: Iterable[Segment], modules: Sequence[ModuleSpec]) -> str | None:
    """Why a task with these segments cannot run direct, naming the module; None when it can.

    A task runs direct when each of its modules is a linear layer other than ``lm_head`` and no fused
    expert, stored joint or private: vLLM runs LoRA on ``lm_head``, on embeddings and on experts through
    other calls. Flat tasks are materialized: the direct pass would cost rank times as many products as
    they have components.
    """
    for segment in segments:
        module = modules[segment.module]
        if module.kind != "linear":
            return f"module {module.name} is of kind {module.kind}"
        if module.name.rsplit(".", 1)[-1] == LM_HEAD:
            return f"module {module.name} is the output head"
        if _EXPERT.search(module.name):
            return f"module {module.name} is of a fused expert"
        if not (segment.is_joint or segment.is_private):
            return f"module {module.name} is stored {segment.representation}"
    return None


def serving_obstacles(checkpoint: Checkpoint) -> dict[str, str]:
    """Task id -> why vLLM cannot serve it in any mode, with whatever model; an engine would not start."""
    # What an entry shows to be served needs no look at its record.
    found = {
        task_id: serving_obstacle(checkpoint.record(task_id), checkpoint.modules)
        for task_id, entry in entries(checkpoint.tasks)
        if entry.carries or entry.max_rank > VLLM_LORA_RANKS[-1]
    }
    return {task_id: reason for task_id, reason in found.items() if reason is not None}


def serving_obstacle(record: TaskRecord, modules: Sequence[ModuleSpec]) -> str | None:
    """Why vLLM cannot serve a task in any mode, with whatever model; None where it may."""
    reason = extra_obstacle(record)
    if reason is not None or record.max_rank <= VLLM_LORA_RANKS[-1]:
        return reason
    reason = _task_obstacle(record, modules)
    return reason and (
        f"it has rank {record.max_rank}, above vLLM's largest ({VLLM_LORA_RANKS[-1]}), and cannot run "
        f"direct: {reason}"
    )


def refuse_unserved(checkpoint: Checkpoint) -> None:
    """Raise ModelMismatchError where an engine would not start with the checkpoint."""
    found = serving_obstacles(checkpoint)
    if found:
        task_id, reason = next(iter(found.items()))
        others = list(map(repr, found))[1:]
        more = f"; nor {some_of(others)}" if others else ""
        raise ModelMismatchError(
            f"{checkpoint.path}: vLLM cannot serve task {task_id!r}: {reason}{more}; serve a copy "
            f"without: {remove_line('CKPT', found)}"
        )


def plan_memory(
    checkpoint: Checkpoint,
    *,
    max_loras: int,
    tp: int = 1,
    dtype: str = "bfloat16",
    max_lora_rank: int | None = None,
    peft_slots: int = DEFAULT_PEFT_SLOTS,
    model: ModelShape | None = None,
    target_modules: Sequence[str] | None = None,
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS,
    packed_basis: bool = False,
    basis_rows: int = 0,
    narrow_rows: bool = False,
    memory: int | None = None,
    cpu: bool = False,
) -> MemoryPlan:
    """Count what serving ``checkpoint`` takes on each device, in every mode.

    Args:
        checkpoint: an opened checkpoint.
        max_loras: vLLM's ``--max-loras``.
        tp: tensor-parallel size.
        dtype: of the engine, and so of the slots; ``bf16``, ``fp16`` and ``fp32`` are understood.
        max_lora_rank: vLLM's ``--max-lora-rank``; the least that holds the checkpoint by default.
        peft_slots: ``VLLM_VLORA_SLOTS``.
        model: the served model, for the slots of layers that no task adapts.
        target_modules: vLLM's ``--lora-target-modules``.
        max_num_batched_tokens: vLLM's option of that name.
        packed_basis: ``VLLM_VLORA_BASIS=packed``: quantised bases stay packed to run direct too.
        basis_rows: ``VLLM_VLORA_BASIS_ROWS``: layers have room for a basis of so many components.
        narrow_rows: ``VLLM_VLORA_ROWS=narrow``: rows of 3 and 2 bits take no more on the device.
        memory: bytes for adapters on one device, to say what they hold.
        cpu: vLLM's CPU build, where the plugin takes one slot more.

    Raises:
        OptionError: an option is out of range, the rank is too small for every mode, or the
            tensor-parallel size does not divide a layer.
        ModelMismatchError: vLLM cannot serve one of the tasks, or the model, or its target modules, lack
            a module of the checkpoint.

    Examples:
        >>> found = plan_memory(Checkpoint.open(checkpoint), max_loras=64)
        >>> [memory.mode for memory in found.modes]
        ['stock', 'materialize', 'direct', 'auto']
    """
    counts = {
        "max_loras": max_loras,
        "tensor parallel size": tp,
        "peft_slots": peft_slots,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    _check_counts(counts, memory)
    refuse_unserved(checkpoint)
    dtype = _dtype_name(dtype)
    itemsize = FLOAT_DTYPES[dtype].itemsize
    if model is not None:
        model.check_tp(tp)
    fillers = match_modules(checkpoint.modules, model) if model else _own_slices(checkpoint)
    slices = targeted(model.slices() if model else dict.fromkeys(fillers), target_modules)
    _check_targets(checkpoint, fillers, slices)
    counter = _Counter(
        slot_row=itemsize * sum(sum(item.widths(tp)) for item in slices),
        direct_slices=sum(item.side != "whole" for item in slices),
        tasks=_count_tasks(checkpoint, fillers, tp, itemsize, narrow_rows, basis_rows),
        bases=_count_bases(checkpoint.modules, fillers, tp, itemsize, packed_basis, basis_rows),
        rank=_slot_rank(checkpoint, max_lora_rank),
        stock_rank=_stock_rank(checkpoint, max_lora_rank),
        peft_slots=peft_slots,
        batched_tokens=max_num_batched_tokens,
        spare_slots=int(cpu),
    )
    modes = tuple(
        replace(counter.mode(mode, max_loras), fits=counter.fits(mode, max_loras, memory))
        for mode in (STOCK, *MODES)
    )
    if all(mode.obstacle for mode in modes[1:]):
        raise OptionError(f"{checkpoint.path}: {modes[1].obstacle}")
    return MemoryPlan(
        tp=tp,
        dtype=dtype,
        max_loras=max_loras,
        max_lora_rank=counter.rank,
        tasks=len(checkpoint.tasks),
        layers_from=model.source if model else None,
        slices=len(slices),
        modes=modes,
        not_direct={task.task_id: task.obstacle for task in counter.tasks if task.obstacle},
        assumptions=_assumptions(checkpoint, slices, tp, model),
    )


# --- counting -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FormBytes:
    """One task in one form, direct or to be materialized: its bytes on one rank."""

    cores: int = 0
    factors: int = 0

    def __add__(self, other: _FormBytes) -> _FormBytes:
        return _FormBytes(self.cores + other.cores, self.factors + other.factors)


@dataclass(frozen=True)
class _Narrow:
    """Whether a task's rows of 3 and 2 bits take no more in either form."""

    direct: bool
    sources: bool


@dataclass(frozen=True)
class _Task:
    """One task on one rank.

    Attributes:
        rank: of the slot it needs. obstacle: why it cannot run direct.
        direct, sources: its bytes in either form. shared: what it needs beside them, by module and
            representation.
        read: what filling a slot reads.
        adapter: the original A and B in the engine's dtype, as stock vLLM copies them. host: the same
            over all ranks.
    """

    task_id: str
    rank: int
    obstacle: str | None
    direct: _FormBytes
    sources: _FormBytes
    shared: frozenset[tuple[int, str]]
    read: int
    adapter: int
    host: int


@dataclass(frozen=True)
class _BasisBytes:
    direct: int = 0
    packed: int = 0

    def __add__(self, other: _BasisBytes) -> _BasisBytes:
        return _BasisBytes(self.direct + other.direct, self.packed + other.packed)


_NO_BASIS = _BasisBytes()


@dataclass(frozen=True)
class _Counter:
    """Everything that does not depend on ``max_loras``; ``mode`` then only multiplies and adds.

    ``slot_row`` is the bytes of one rank of one slot, over all slices; ``direct_slices`` counts those
    that may run direct.
    """

    slot_row: int
    direct_slices: int
    tasks: list[_Task]
    bases: dict[tuple[int, str], _BasisBytes]
    rank: int
    stock_rank: int | None
    peft_slots: int
    batched_tokens: int
    spare_slots: int

    def mode(self, mode: str, max_loras: int) -> ModeMemory:
        """What one mode takes with ``max_loras``."""
        if mode == STOCK:
            return self._stock(max_loras)
        runs_direct = mode != "materialize"
        direct = [task for task in self.tasks if runs_direct and task.obstacle is None]
        others = [task for task in self.tasks if not runs_direct or task.obstacle is not None]
        obstacle = self._obstacle(mode, others)
        if obstacle is not None:
            return ModeMemory(mode, obstacle=obstacle)
        slots = min(max_loras, self.peft_slots) if runs_direct else max_loras
        slot, record = self.rank * self.slot_row, self.direct_slices * RECORD_NBYTES
        held = sum((task.direct for task in direct), _FormBytes())
        held = sum((task.sources for task in others), held)
        # A direct task's record is on the device already; it is read and written.
        switches = [task.read + slot for task in others] + [2 * record for _ in direct]
        return ModeMemory(
            mode,
            slots=slots + self.spare_slots,
            slot_rank=self.rank,
            slots_nbytes=(slots + self.spare_slots) * slot,
            bases_nbytes=self._bases_nbytes(direct, others),
            cores_nbytes=held.cores,
            factors_nbytes=held.factors,
            table_nbytes=(max_loras + 1) * record if runs_direct else 0,
            records_nbytes=(len(direct) + 1) * record if runs_direct else 0,
            buffers_nbytes=self._buffers_nbytes(max_loras) if runs_direct else 0,
            direct_tasks=len(direct),
            materialized_tasks=len(others),
            distinct_tasks=min(max_loras, len(direct) + min(slots, len(others))),
            switch_device_nbytes=max(switches, default=0),
        )

    def fits(self, mode: str, max_loras: int, memory: int | None) -> Fits | None:
        """What ``memory`` bytes hold; None when there is no limit, or the mode cannot run."""
        found = self.mode(mode, max_loras)
        if memory is None or found.obstacle is not None:
            return None
        # The total grows with max_loras, so the counts that fit are the first ones.
        counts = range(1, len(self.tasks) + 1)
        most = bisect_right(counts, memory, key=lambda n: self.mode(mode, n).total_nbytes)
        batch = self.mode(mode, most).distinct_tasks if most else 0
        if mode == STOCK:
            slot = found.slot_rank * self.slot_row
            return Fits(batch, memory // slot if slot else 0)
        left = max(0, memory - (found.total_nbytes - found.tasks_nbytes))
        # Tasks of the mean size: left / (tasks_nbytes / tasks), in whole numbers.
        held = found.tasks_nbytes
        return Fits(batch, left * len(self.tasks) // held if held else 0)

    def _stock(self, max_loras: int) -> ModeMemory:
        if self.stock_rank is None:
            largest_rank = VLLM_LORA_RANKS[-1]
            reason = f"an original adapter has a rank above {largest_rank}, vLLM's largest"
            return ModeMemory(STOCK, obstacle=reason)
        slot = self.stock_rank * self.slot_row
        largest = max((task.adapter for task in self.tasks), default=0)
        return ModeMemory(
            STOCK,
            slots=max_loras,
            slot_rank=self.stock_rank,
            slots_nbytes=max_loras * slot,
            host_nbytes=sum(task.host for task in self.tasks),
            materialized_tasks=len(self.tasks),
            distinct_tasks=min(max_loras, len(self.tasks)),
            switch_host_nbytes=largest,
            # The slot is set to zero whole before A and B are copied into it.
            switch_device_nbytes=slot + largest if self.tasks else 0,
        )

    def _obstacle(self, mode: str, others: list[_Task]) -> str | None:
        if mode == "direct" and others:
            return f"task {others[0].task_id!r} cannot run direct: {others[0].obstacle}"
        largest = max(others, key=lambda task: task.rank, default=None)
        if largest is None or largest.rank <= self.rank:
            return None
        needed = serving_rank(largest.rank)
        advice = f"use {needed} or more"
        if needed is None:
            advice = "vLLM allows none that large; compress the adapters to a smaller one"
        return (
            f"task {largest.task_id!r} has rank {largest.rank}, which max_lora_rank {self.rank} does "
            f"not hold; {advice}"
        )

    def _buffers_nbytes(self, max_loras: int) -> int:
        return routing_nbytes(self.batched_tokens, max_loras) + 4 * len(CODEBOOK)

    def _bases_nbytes(self, direct: list[_Task], others: list[_Task]) -> int:
        sliced = frozenset[tuple[int, str]]().union(*(task.shared for task in direct))
        packed = frozenset[tuple[int, str]]().union(*(task.shared for task in others))
        return sum(self.bases[key].direct for key in sliced) + sum(
            self.bases[key].packed for key in packed
        )


def _count_tasks(
    checkpoint: Checkpoint,
    fillers: Sequence[LayerSlice],
    tp: int,
    itemsize: int,
    narrow_rows: bool,
    basis_rows: int,
) -> list[_Task]:
    widths = [item.widths(tp) for item in fillers]
    modules, kinds = checkpoint.modules, list(_kinds(checkpoint))
    held = HeldBases({m.name: item.name for m, item in zip(modules, fillers)}.__getitem__)
    obstacles = [
        _task_obstacle(record, modules) or held.take(record.segments, modules)
        for record, _ in kinds
    ]
    direct = [task for (_, (task, *_)), why in zip(kinds, obstacles) if why is None]
    # To run direct, all are held in one way, whatever each has; to be materialized, each for itself.
    all_direct = narrow_rows and checkpoint.has_narrow_rows(direct)
    counted: dict[str, _Task] = {}
    for (record, tasks), obstacle in zip(kinds, obstacles):
        narrow = _Narrow(all_direct, narrow_rows and checkpoint.has_narrow_rows(tasks[:1]))
        found = _count_task(
            tasks[0], record, modules, widths, itemsize, narrow, obstacle, basis_rows
        )
        counted.update((task, replace(found, task_id=task)) for task in tasks)
    return [counted[task] for task in checkpoint.tasks]


def _kinds(checkpoint: Checkpoint) -> Iterator[tuple[TaskRecord, list[str]]]:
    """``Checkpoint.kinds``, where ranks that an adapter has by its own names of modules are its own."""
    for record, tasks in checkpoint.kinds():
        if record.adapter_config.get("rank_pattern"):
            yield from ((checkpoint.record(task), [task]) for task in tasks)
        else:
            yield record, tasks


def _count_task(
    task_id: str,
    record: TaskRecord,
    modules: Sequence[ModuleSpec],
    widths: Sequence[tuple[int, int]],
    itemsize: int,
    narrow: _Narrow,
    obstacle: str | None,
    basis_rows: int,
) -> _Task:
    direct = sources = _FormBytes()
    read = adapter = 0
    shared = set()
    for segment in record.segments:
        module, (width_in, width_out) = modules[segment.module], widths[segment.module]
        whole, cut = (module.d_in, module.d_out), (width_in, width_out)
        adapter += _adapter_rank(record, segment, module) * sum(cut) * itemsize
        of_all = shared_rows(segment, module)
        if of_all is not None:
            shared.add((segment.module, segment.representation))
            format, rows_out, rows_in = of_all
            pair = segment.rank * (rows_in + rows_out) * _SIDE_ITEMSIZE
            sources += _FormBytes(cores=pair)
            if module.basis is not None and segment.is_joint:
                elements = _core_elements(segment, module.basis, basis_rows)
                direct += _FormBytes(cores=elements * itemsize)
            read += pair + rows_in * _row(format, width_in) + rows_out * _row(format, width_out)
        else:
            sources += _FormBytes(
                factors=_factors_nbytes(segment, whole, whole, None, narrow.sources)
            )
            direct += _FormBytes(
                factors=_factors_nbytes(segment, whole, cut, itemsize, narrow.direct)
            )
            read += _factors_nbytes(segment, whole, cut, None, narrow.sources)
    return _Task(
        task_id=task_id,
        rank=record.max_rank,
        obstacle=obstacle,
        direct=direct,
        sources=sources,
        shared=frozenset(shared),
        read=read,
        adapter=adapter,
        # original_nbytes counts 16 bits a weight.
        host=record.original_nbytes * itemsize // 2,
    )


def _factors_nbytes(
    segment: Segment,
    whole: tuple[int, int],
    cut: tuple[int, int],
    itemsize: int | None,
    narrow: bool,
) -> int:
    """Bytes of a private segment's factors of ``whole`` columns, of which a rank has the ``cut``.

    ``itemsize``: of floats; None for as they are stored.
    """
    format = segment.format
    if narrow and format == "nf4-dq":
        bits = segment.bits or (segment.rank, 0, 0)
        return sum(narrow_nbytes(bits, width) for width in cut)
    if format == "nf4-dq" and cut != whole:
        format = "nf4"  # Where one side is cut, both get plain scales.
    if itemsize is None:
        return segment.rank * sum(_row(format, width) for width in cut)
    return segment.rank * sum(_cut_row(format, n, w, itemsize) for n, w in zip(whole, cut))


def _task_obstacle(record: TaskRecord, modules: Sequence[ModuleSpec]) -> str | None:
    heads = carried_tensors(record)
    if heads:
        return f"it carries {heads[0]}, which stands in a slot"
    return direct_obstacle(record.segments, modules)


def _core_elements(segment: Segment, basis: BasisSpec, basis_rows: int) -> int:
    """Elements of a core as the direct path holds it: dense unless factors are smaller."""
    k_in, k_out = max(basis.k_in, basis_rows), max(basis.k_out, basis_rows)
    elements = k_in * k_out
    own = core_widths(segment, basis)
    keeps = dense_keeps_rank(segment.format, segment.rank, own)
    if segment.core != "dense" or own != (k_out, k_in) or not keeps:
        elements = min(elements, segment.rank * (k_in + k_out))
    return -(-elements // CORE_ALIGNMENT) * CORE_ALIGNMENT


# A thousand tasks ask for the same few rows: planning them takes 2 s with this and 5 s without.
@lru_cache(maxsize=4096)
def _row(format: str, cols: int) -> int:
    return row_nbytes(format, cols)


def _cut_row(format: str, cols: int, width: int, itemsize: int) -> int:
    """Bytes of ``width`` of a row's ``cols`` columns, floats in the engine's dtype.

    A cut gives doubly quantised scales plain ones: it would tear their groups.
    """
    if format in FLOAT_DTYPES:
        return width * itemsize
    return _row("nf4" if format == "nf4-dq" and width < cols else format, width)


def _count_bases(
    modules: Sequence[ModuleSpec],
    fillers: Sequence[LayerSlice],
    tp: int,
    itemsize: int,
    packed_basis: bool,
    basis_rows: int,
) -> dict[tuple[int, str], _BasisBytes]:
    found: dict[tuple[int, str], _BasisBytes] = {}
    for index, (module, item) in enumerate(zip(modules, fillers)):
        width_in, width_out = item.widths(tp)
        for side, format, rows, cols in shared_sides(module):
            key = index, "flat" if side.startswith("flat") else "joint"
            width = width_in if side.endswith("V") else width_out
            kept = _cut_row(format, cols, width, itemsize)
            held = max(rows, basis_rows)
            direct = held * (kept if packed_basis else width * itemsize)
            found[key] = found.get(key, _NO_BASIS) + _BasisBytes(direct, rows * _row(format, cols))
    return found


# --- options --------------------------------------------------------------------------------------


def _check_counts(counts: dict[str, int], memory: int | None) -> None:
    for name, value in counts.items():
        if value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")
    if memory is not None and memory < 0:
        raise OptionError(f"memory must not be negative, got {memory}")


def _dtype_name(dtype: str) -> str:
    name = _DTYPE_NAMES.get(dtype, dtype)
    if name not in FLOAT_DTYPES:
        known = ", ".join((*_DTYPE_NAMES, *FLOAT_DTYPES))
        raise OptionError(f"unknown dtype {dtype!r}: use one of {known}")
    return name


def _own_slices(checkpoint: Checkpoint) -> list[LayerSlice]:
    """The slice that each module of the checkpoint takes; modules that are one layer take one."""
    of_tasks = {
        frozenset(checkpoint.modules[segment.module].name for segment in segments)
        for segments, _ in checkpoint.alike()
    }
    by_name = layer_shapes({module.name: module for module in checkpoint.modules})
    prefixes = shared_prefixes([{name: by_name[name] for name in names} for names in of_tasks])
    shared = {old: new for change in prefixes for new, old in change.items()}
    return [
        replace(module_slice(module), name=renamed(module.name, shared))
        for module in checkpoint.modules
    ]


def _slot_rank(checkpoint: Checkpoint, asked: int | None) -> int:
    """The plugin's ``--max-lora-rank``; vLLM's largest where the checkpoint needs more."""
    if asked is None:
        return serving_rank(checkpoint.max_rank) or VLLM_LORA_RANKS[-1]
    if asked not in VLLM_LORA_RANKS:
        ranks = ", ".join(map(str, VLLM_LORA_RANKS))
        raise OptionError(f"max_lora_rank {asked} is none that vLLM takes; use one of {ranks}")
    return asked


def _stock_rank(checkpoint: Checkpoint, asked: int | None) -> int | None:
    """The ``--max-lora-rank`` that stock vLLM needs for the original adapters; None above 512."""
    ranks = [_declared_rank(record) for record, _ in checkpoint.kinds()]
    return serving_rank(max([asked or 0, *ranks]))


def _declared_rank(record: TaskRecord) -> int:
    """The rank by which vLLM judges an adapter: the largest its config names, used or not."""
    config = record.adapter_config
    if config.get("r") is None:
        return record.max_rank
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _adapter_rank(record: TaskRecord, segment: Segment, module: ModuleSpec) -> int:
    """The original adapter's rank of a module."""
    if record.adapter_config.get("r") is None:
        return segment.rank
    return lora_rank(record.adapter_config, record.own_name(module.name))


def _check_targets(
    checkpoint: Checkpoint, fillers: Sequence[LayerSlice], slices: Sequence[LayerSlice]
) -> None:
    kept = {item.name for item in slices}
    for segments, tasks in checkpoint.alike():
        for segment in segments:
            name = fillers[segment.module].name
            if name not in kept:
                raise ModelMismatchError(
                    f"the target modules leave out {name}, which task {tasks[0]!r} adapts; name its "
                    "last component too"
                )


def _assumptions(
    checkpoint: Checkpoint, slices: Sequence[LayerSlice], tp: int, model: ModelShape | None
) -> list[str]:
    found = []
    headed = sum(entry.carries for _, entry in entries(checkpoint.tasks))
    if headed:
        found.append(f"{headed} of the tasks carry heads of their own, which are not counted.")
    if model is None:
        found.append(
            "Slots are counted for the checkpoint's modules alone; vLLM makes them for every linear "
            "layer of the model and, in many models, for lm_head and the embedding. Give the model "
            "to count all."
        )
        if tp > 1 and any(item.leaf in ("k_proj", "v_proj") for item in slices):
            found.append(
                "The model is taken to have a KV head for each rank; with fewer, k_proj and v_proj "
                "take more."
            )
    unknown = sorted({item.leaf for item in slices if item.side == "unknown"})
    if tp > 1 and unknown:
        found.append(
            "How tensor parallel splits these modules is not known; they are counted whole on each "
            f"rank: {', '.join(unknown)}."
        )
    return found
