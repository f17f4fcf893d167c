"""The direct operation in torch, for CPU: by runs of neighbouring tokens that use one slot.

A run of many tokens (prefill) is one product with its task's matrices, straight from where they lie.
Tokens of short runs (decode: one token a task) would be as many tiny products as there are tasks; their
cores are put together once a batch composition, and one batched product serves them all, for as many
steps as the composition lasts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

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

# Runs of at least this many tokens are multiplied by themselves.
_LONG_RUN = 8
# Bytes of cores that a batch composition may keep together, over all layers.
_STACK_LIMIT = 512 << 20


@torch.no_grad()
def add_by_runs(
    y: torch.Tensor, x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing
) -> None:
    """``add_direct`` on CPU for arguments that have passed its checks."""
    runs = routing.runs
    if not runs:
        return
    if layer.v is not None:
        _add_joint(y, x, layer, table, routing)
    if layer.private:
        _add_private(y, x, layer, table, runs)


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
    z = x[rows] @ unpack(layer.v, x.dtype).T
    w = plan.apply_cores(z, layer)
    column = offset = 0
    for part in layer.slices:
        if part.u is not None:
            target = y[rows, column : column + part.width]
            target.addmm_(w[:, offset : offset + part.k_out], unpack(part.u, x.dtype))
            offset += part.k_out
        column += part.width


class _JointPlan:
    """What one layer does with one batch composition's joint tasks.

    Attributes:
        first, end: the tokens between which all joint tasks lie.
    """

    def __init__(self, layer: DirectLayer, table: SlotTable, routing: Routing) -> None:
        runs = [run for run in routing.runs if _has_core(table, run[2], layer)]
        self.first = min((run[0] for run in runs), default=0)
        self.end = max((run[1] for run in runs), default=0)
        self._table = table
        self._long = [run for run in runs if run[1] - run[0] >= _LONG_RUN]
        short = [run for run in runs if run[1] - run[0] < _LONG_RUN]
        self._positions = _positions(short, self.first, self.end)
        self._short_slots = [slot for start, end, slot in short for _ in range(start, end)]
        self._stacks = self._stack(layer, routing)

    def apply_cores(self, z: torch.Tensor, layer: DirectLayer) -> torch.Tensor:
        """w ``[tokens, sum of k_out]`` of z ``[tokens, sum of k_in]``; zero without a core."""
        total = sum(part.k_out for part in layer.slices)
        covered = len(self._short_slots) + sum(end - start for start, end, _ in self._long)
        shape = (z.shape[0], total)
        w = z.new_empty(shape) if covered == z.shape[0] else z.new_zeros(shape)
        if self._short_slots:
            self._apply_short(w, z, layer)
        for start, end, slot in self._long:
            rows = slice(start - self.first, end - self.first)
            for number, part, k_in, k_out in _parts(layer):
                _multiply(w[rows, k_out], z[rows, k_in], self._table.part(slot, number), part)
        return w

    def _apply_short(self, w: torch.Tensor, z: torch.Tensor, layer: DirectLayer) -> None:
        whole = self._positions is None
        source = z if whole else z[self._positions]
        for place, (number, part, k_in, k_out) in enumerate(_parts(layer)):
            stack = self._stacks[place] if self._stacks else self._cores(number, part)
            product = torch.bmm(stack, source[:, k_in].unsqueeze(2)).squeeze(2)
            if whole:
                w[:, k_out] = product
            else:
                w[self._positions, k_out] = product

    def _stack(self, layer: DirectLayer, routing: Routing) -> list[torch.Tensor]:
        """The short runs' cores of every slice, if there is room to keep them."""
        if not self._short_slots:
            return []
        elements = sum(part.k_out * part.k_in for part in layer.slices) * len(self._short_slots)
        kept = routing.derived.get("bytes", 0)
        assert isinstance(kept, int)
        if kept + elements * 4 > _STACK_LIMIT:
            return []
        routing.derived["bytes"] = kept + elements * 4
        return [self._cores(number, part) for number, part, _, _ in _parts(layer)]

    def _cores(self, number: int, part: DirectSlice) -> torch.Tensor:
        """Dense cores ``[short tokens, k_out, k_in]``."""
        held: dict[int, torch.Tensor] = {}
        for slot in self._short_slots:
            if slot not in held:
                held[slot] = _dense_core(self._table.part(slot, number), part, self._dtype())
        return torch.stack([held[slot] for slot in self._short_slots])

    def _dtype(self) -> torch.dtype:
        task = self._table.tasks[self._short_slots[0]]
        assert task is not None
        return next(p.core.dtype for p in task.slices.values() if p.core is not None)


def _has_core(table: SlotTable, slot: int, layer: DirectLayer) -> bool:
    task = table.tasks[slot]
    if task is None:
        return False
    numbers = range(layer.index, layer.index + len(layer.slices))
    return any((part := task.slices.get(n)) and part.core is not None for n in numbers)


def _positions(short: list[Run], first: int, end: int) -> torch.Tensor | None:
    """Rows of the short runs' tokens counted from ``first``; None when they are all rows."""
    rows = [row - first for start, stop, _ in short for row in range(start, stop)]
    return None if len(rows) == end - first else torch.tensor(rows, dtype=torch.long)


def _parts(layer: DirectLayer) -> Iterator[tuple[int, DirectSlice, slice, slice]]:
    """(number, slice, its columns of z, its columns of w) of each slice with a basis."""
    k_in = k_out = 0
    for place, part in enumerate(layer.slices):
        if part.u is not None:
            yield (
                layer.index + place,
                part,
                slice(k_in, k_in + part.k_in),
                slice(k_out, k_out + part.k_out),
            )
        k_in += part.k_in
        k_out += part.k_out


def _multiply(w: torch.Tensor, z: torch.Tensor, task: SliceTask | None, part: DirectSlice) -> None:
    if task is None or task.core is None:
        w.zero_()
    elif task.core_rank:
        w.copy_((z @ task.core[:, : part.k_in].T) @ task.core[:, part.k_in :])
    else:
        w.copy_(z @ task.core.T)


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
        self._held: OrderedDict[tuple[int, ...], tuple[PackedMatrix, torch.Tensor]] = OrderedDict()
        self._nbytes = 0

    def get(self, matrix: PackedMatrix, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        key = (id(matrix), start, stop, dtype.itemsize)
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
