"""The direct operation in torch, for CPU: by runs of neighbouring tokens that use one slot.

Many runs of one length (decode: one token a task) would be as many tiny products as there are tasks.
Their cores are put together once a batch composition, and one batched product serves them all, for as
many steps as the composition lasts. A run whose length is its own is one product with its task's core,
straight from where it lies.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, unpack
from vllm_vlora.triton_kernels.direct import (
    DirectLayer,
    DirectSlice,
    Routing,
    SliceTask,
    SlotTable,
)

Run = tuple[int, int, int]

# Bytes of cores that a batch composition may keep together, over all layers.
_STACK_LIMIT = 512 << 20
_TILE_COLUMNS = 32


@torch.no_grad()
def add_by_runs(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> None:
    """``add_direct`` on CPU for arguments that have passed its checks."""
    runs = routing.runs
    if not runs:
        return
    x = _whole_tiles(x)
    if layer.v is not None:
        _add_joint(y, x, layer, table, routing)
    if layer.private:
        _add_private(y, x, layer, table, runs)


def _whole_tiles(x: torch.Tensor) -> torch.Tensor:
    """x with zeros after each row where a bfloat16 product would read on from there.

    oneDNN's AMX kernel (torch 2.13.0) takes 32 columns at a time and reads past the end of a row
    whose length is no multiple of that, against weights of zero: NaN there makes NaN here. What
    stands there is the next token's row, another request's.
    """
    columns = x.shape[1]
    if x.dtype != torch.bfloat16 or columns % _TILE_COLUMNS == 0:
        return x
    return torch.nn.functional.pad(x, (0, -columns % _TILE_COLUMNS))[:, :columns]


# --- joint -----------------------------------------------------------------------------------------


def _add_joint(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> None:
    plan = routing.derived.get(layer.index)
    if plan is None:
        plan = routing.derived[layer.index] = _JointPlan(layer, table, routing)
    assert isinstance(plan, _JointPlan)
    if plan.first == plan.end:
        return
    assert layer.v is not None
    rows = slice(plan.first, plan.end)
    z = torch.nn.functional.linear(x[rows], unpack(layer.v, x.dtype))
    column = k_in = 0
    for place, part in enumerate(layer.slices):
        if part.u is not None:
            w = plan.apply_cores(z[:, k_in : k_in + part.k_in], layer.index + place, part)
            target = y[rows, column : column + part.width]
            target.addmm_(w, unpack(part.u, x.dtype))
        column += part.width
        k_in += part.k_in


class _JointPlan:
    """What one layer does with one batch composition's joint tasks.

    Attributes:
        first, end: the tokens between which all joint tasks lie.
    """

    def __init__(self, layer: DirectLayer, table: SlotTable, routing: Routing) -> None:
        runs = [run for run in routing.runs if _has_core(table, run[2], layer)]
        self.first = min((run[0] for run in runs), default=0)
        self.end = max((run[1] for run in runs), default=0)
        self._table, self._kept = table, routing.derived
        self._covered = sum(end - start for start, end, _ in runs) == self.end - self.first
        self._groups = _group_runs(runs, self.first)
        self._stacks: dict[tuple[int, int], torch.Tensor] = {}

    def apply_cores(self, z: torch.Tensor, number: int, part: DirectSlice) -> torch.Tensor:
        """w ``[tokens, k_out]`` of one slice from its z ``[tokens, k_in]``; zero without a core."""
        if len(self._groups) == 1 and self._covered:
            return self._apply(0, z, number, part)
        shape = (z.shape[0], part.k_out)
        w = z.new_empty(shape) if self._covered else z.new_zeros(shape)
        for place, group in enumerate(self._groups):
            w[group.rows] = self._apply(place, z[group.rows], number, part)
        return w

    def _apply(self, place: int, z: torch.Tensor, number: int, part: DirectSlice) -> torch.Tensor:
        group = self._groups[place]
        if len(group.slots) == 1:
            return _multiply(z, self._table.part(group.slots[0], number), part)
        stack = self._stacks.get((place, number))
        if stack is None:
            stack = self._stack(group, number, part, z.dtype)
            self._keep((place, number), stack)
        # A row times a matrix: the BLAS takes four times as long for a matrix times a column.
        product = torch.bmm(z.reshape(len(group.slots), group.length, part.k_in), stack)
        return product.view(-1, part.k_out)

    def _stack(
        self, group: _Group, number: int, part: DirectSlice, dtype: torch.dtype
    ) -> torch.Tensor:
        """The group's cores, dense and transposed: ``[runs, k_in, k_out]``."""
        held = {
            slot: _dense_core(self._table.part(slot, number), part, dtype)
            for slot in set(group.slots)
        }
        stack = torch.empty(len(group.slots), part.k_in, part.k_out, dtype=dtype)
        return torch.stack([held[slot].T for slot in group.slots], out=stack)

    def _keep(self, key: tuple[int, int], stack: torch.Tensor) -> None:
        kept = self._kept.get("bytes", 0)
        assert isinstance(kept, int)
        if kept + stack.nbytes <= _STACK_LIMIT:
            self._kept["bytes"] = kept + stack.nbytes
            self._stacks[key] = stack


@dataclass(frozen=True)
class _Group:
    """Runs of one length: their slots, and their rows counted from the plan's first token."""

    length: int
    slots: list[int]
    rows: torch.Tensor | slice


def _group_runs(runs: list[Run], first: int) -> list[_Group]:
    by_length: dict[int, list[Run]] = {}
    for run in runs:
        by_length.setdefault(run[1] - run[0], []).append(run)
    groups = []
    for length, members in by_length.items():
        starts = [start - first for start, _, _ in members]
        slots = [slot for _, _, slot in members]
        rows: torch.Tensor | slice
        if starts[-1] - starts[0] == length * (len(starts) - 1):
            rows = slice(starts[0], starts[-1] + length)
        else:
            rows = (torch.tensor(starts)[:, None] + torch.arange(length)).reshape(-1)
        groups.append(_Group(length, slots, rows))
    return groups


def _has_core(table: SlotTable, slot: int, layer: DirectLayer) -> bool:
    task = table.tasks[slot]
    if task is None:
        return False
    numbers = range(layer.index, layer.index + len(layer.slices))
    return any((part := task.slices.get(n)) and part.core is not None for n in numbers)


def _multiply(z: torch.Tensor, task: SliceTask | None, part: DirectSlice) -> torch.Tensor:
    if task is None or task.core is None:
        return z.new_zeros(z.shape[0], part.k_out)
    if task.core_rank:
        return (z @ task.core[:, : part.k_in].T) @ task.core[:, part.k_in :]
    return z @ task.core.T


def _dense_core(task: SliceTask | None, part: DirectSlice, dtype: torch.dtype) -> torch.Tensor:
    if task is None or task.core is None:
        return torch.zeros(part.k_out, part.k_in, dtype=dtype)
    if not task.core_rank:
        return task.core
    return task.core[:, part.k_in :].T @ task.core[:, : part.k_in]


# --- private ---------------------------------------------------------------------------------------


def _add_private(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, runs: list[Run]
) -> None:
    column = 0
    for place, part in enumerate(layer.slices):
        number, columns = layer.index + place, slice(column, column + part.width)
        column += part.width
        for start, end, slot in runs:
            task = table.part(slot, number)
            if task is None or task.a is None or task.b is None:
                continue
            a = _factor(task.a, x.dtype, part.start_in, layer.d_in)
            b = _factor(task.b, x.dtype, part.start_out, part.width)
            y[start:end, columns].addmm_(x[start:end] @ a.T, b, alpha=task.scale)


class _UnpackedFactors:
    """Dequantised factors, the least recently used dropped first.

    A GPU dequantises in registers; a CPU that did so in torch would spend most of a decode step on
    it, again in every step.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[
            tuple[int, int, int, torch.dtype], tuple[PackedMatrix, torch.Tensor]
        ] = OrderedDict()
        self._nbytes = 0

    def get(self, matrix: PackedMatrix, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        key = (id(matrix), start, stop, dtype)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][1]
        values = unpack(matrix, dtype, start, stop)
        # The matrix is kept beside its values, so that its id is nobody else's.
        self._held[key] = (matrix, values)
        self._nbytes += values.nbytes
        while self._nbytes > self._limit:
            _, (_, dropped) = self._held.popitem(last=False)
            self._nbytes -= dropped.nbytes
        return values


_UNPACKED = _UnpackedFactors(1 << 30)


def _factor(matrix: PackedMatrix, dtype: torch.dtype, start: int, width: int) -> torch.Tensor:
    if FLOAT_DTYPES.get(matrix.format) == dtype:
        return unpack(matrix, dtype, start, start + width)  # A view.
    return _UNPACKED.get(matrix, dtype, start, start + width)
