"""The launches of an engine: a model's layers as the plugin makes them, without memory behind them.

To be run inside ``record_launches.recording``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import numpy as np
import torch
from places import ROOT
from record_launches import Recording

from vllm_vlora.narrow_rows import NARROW_FORMAT, NarrowMatrix, plane_nbytes
from vllm_vlora.quantize import FORMAT_OF_DTYPE, PackedMatrix, part_specs
from vllm_vlora.triton_kernels import device, direct, direct_kernel
from vllm_vlora.triton_kernels.direct import (
    FORMAT_CODES,
    DirectLayer,
    DirectSlice,
    Routing,
    SlotTable,
    add_direct_triton,
)
from vllm_vlora.triton_kernels.materialize import MaterializeJob

sys.path.append(str(ROOT / "benchmarks"))
import floors

if TYPE_CHECKING:
    from vllm_vlora.triton_kernels.materialize_kernel import KernelPlan

MODELS = floors.MODELS

META = torch.device("meta")
MAX_TOKENS = 8192
# Modules whose x is cut on a tensor-parallel rank; of the others y is.
ROW_PARALLEL = ("o_proj", "down_proj")


class Way(NamedTuple):
    """How a layer is run: into a graph that is replayed for other batches, begun ahead of its y."""

    captured: bool = False
    ahead: bool = False


EAGER = Way()
# What the plugin does; vLLM's own dual stream captures without beginning ahead.
WAYS = (EAGER, Way(captured=True, ahead=True), Way(captured=True))


class Batch(NamedTuple):
    """Tokens of so many tasks in turn; those beyond ``routed`` have none."""

    tokens: int
    tasks: int
    routed: int


@dataclass(frozen=True)
class Engine:
    """One rank of an engine with a checkpoint.

    Attributes:
        model: a key of ``MODELS``.
        parallel: tensor-parallel ranks.
        dtype: of the layers' inputs.
        k: components of the shared bases; 0 for none.
        basis: format that the device holds them in; "float" for the dtype.
        rank: of private tasks; 0 for none.
        formats: kinds of private factors that the checkpoint has.
    """

    model: str
    parallel: int = 1
    dtype: torch.dtype = torch.bfloat16
    k: int = 0
    basis: str = "float"
    rank: int = 0
    formats: tuple[str, ...] = tuple(FORMAT_CODES)

    def __str__(self) -> str:
        parts = [f"k {self.k} {self.basis}"] * bool(self.k)
        parts += [f"rank {self.rank} {'+'.join(self.formats)}"] * bool(self.rank)
        return f"{self.model} TP {self.parallel} {FORMAT_OF_DTYPE[self.dtype]} {' '.join(parts)}"


def matrix(rows: int, cols: int, format: str) -> PackedMatrix:
    """A packed matrix without memory; a narrow one's rows are mostly of 3 and 2 bits."""
    if format == NARROW_FORMAT:
        bits = (rows // 4, rows // 4, rows - rows // 4 * 2)
        parts = dict(matrix(rows, cols, "nf4-dq").parts)
        size = sum(plane_nbytes(bits, parts["scale_codes"].shape[1]))
        parts["codes"] = torch.empty(size, dtype=torch.uint8, device=META)
        return NarrowMatrix(format, rows, cols, parts, bits)
    parts = {
        name: torch.empty(rows, *shape, dtype=dtype, device=META)
        for name, (dtype, shape) in part_specs(format, cols).items()
    }
    return PackedMatrix(format, rows, cols, parts)


def direct_layers(
    engine: Engine, repeats: int = 1, modules: Sequence[str] = ()
) -> list[DirectLayer]:
    """The first ``repeats`` blocks of the model: their numbers differ, and so may their launches.

    Args:
        modules: names of the layers, all of a block's for none.
    """
    format = FORMAT_OF_DTYPE[engine.dtype] if engine.basis == "float" else engine.basis
    layers: list[DirectLayer] = []
    index = 0
    for shape in MODELS[engine.model].layers * repeats:
        if modules and shape.name not in modules:
            continue
        cut_in, cut_out = (
            (engine.parallel, 1) if shape.name in ROW_PARALLEL else (1, engine.parallel)
        )
        d_in = shape.d_in // cut_in
        slices = tuple(
            DirectSlice(
                width // cut_out,
                0,
                0,
                matrix(engine.k, width // cut_out, format) if engine.k else None,
                engine.k,
            )
            for width in shape.widths
        )
        v = matrix(engine.k * len(slices), d_in, format) if engine.k else None
        layers.append(DirectLayer(index, d_in, slices, v, engine.rank, engine.formats))
        index += len(slices)
    return layers


def run_direct(
    recording: Recording,
    engine: Engine,
    batches: Iterable[Batch],
    repeats: int = 1,
    slots: int = 64,
    modules: Sequence[str] = (),
    ways: Sequence[Way] = WAYS,
) -> None:
    """Run layers on batches, in each way."""
    layers = direct_layers(engine, repeats, modules)
    table, routing = _tables(layers, slots)
    for batch in batches:
        tokens = np.arange(batch.tokens, dtype=np.int32)
        routing.update(np.where(tokens < batch.routed, tokens % batch.tasks, slots))
        for way in ways:
            recording.label = f"{engine}, {batch}, {way}"
            with _way(way):
                for layer in layers:
                    x = torch.empty(batch.tokens, layer.d_in, dtype=engine.dtype, device=META)
                    y = torch.empty(batch.tokens, layer.width, dtype=engine.dtype, device=META)
                    _begin(x, layer, table, routing, way.ahead)(y)


def run_warm_up(recording: Recording, engine: Engine, ahead: bool, slots: int = 64) -> None:
    """What an engine runs before it serves; ``ahead``: one that begins ahead."""
    layers = direct_layers(engine)
    table, routing = _tables(layers, slots)
    table.records = table.records.as_subclass(_OnGpu)
    recording.label = f"{engine}, warm-up"
    with mock.patch.multiple(
        direct,
        add_direct=add_direct_triton,
        begin_direct=lambda *arguments: _begin(*arguments, ahead=True),
    ):
        direct.warm_up(layers, table, routing, engine.dtype, ahead=ahead)


class _OnGpu(torch.Tensor):
    is_cuda = True


def _tables(layers: Sequence[DirectLayer], slots: int) -> tuple[SlotTable, Routing]:
    count = layers[-1].index + len(layers[-1].slices)
    return SlotTable(slots, count, META), Routing(MAX_TOKENS, slots, META)


def _begin(
    x: torch.Tensor, layer: DirectLayer, table: SlotTable, routing: Routing, ahead: bool
) -> device.Rest:
    return direct_kernel.begin_direct(x, layer, table, routing, ahead=ahead)


@contextmanager
def _way(way: Way) -> Iterator[None]:
    """Only a GPU knows whether a graph is being captured."""
    with ExitStack() as stack:
        for module in (device, direct_kernel):
            stack.enter_context(mock.patch.object(module, "capturing", return_value=way.captured))
        yield


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Launches on tensors of the CPU have the options of those on a GPU."""
    options = device.pdl_options(META)
    with mock.patch.object(direct_kernel, "pdl_options", return_value=options):
        yield


def batches(tokens: Iterable[int], slots: int = 64) -> Iterator[Batch]:
    """One task, as many as there can be, and a single token that has one."""
    for count in tokens:
        yield from {
            Batch(count, 1, count),
            Batch(count, min(count, slots), count),
            Batch(count, 1, 1),
        }


def run_materialize(
    recording: Recording,
    engine: Engine,
    core: torch.dtype | None,
    slot_rank: int,
) -> None:
    """Write a task into a slot of the model's layers: joint where there is a ``core``, else private.

    Args:
        core: dtype of the cores; None for private factors.
        slot_rank: rows of A that a slot has.
    """
    part = "private" if core is None else "joint"
    recording.label = f"materialize {part} {engine}, slots of {slot_rank}"
    materialize_plan(engine, core, slot_rank).run()


def materialize_plan(engine: Engine, core: torch.dtype | None, slot_rank: int) -> KernelPlan:
    """What ``run_materialize`` runs."""
    from vllm_vlora.triton_kernels.materialize_kernel import KernelPlan

    format = FORMAT_OF_DTYPE[engine.dtype] if engine.basis == "float" else engine.basis
    jobs = []
    for layer in direct_layers(engine):
        for part in layer.slices:
            a = torch.empty(slot_rank, layer.d_in, dtype=engine.dtype, device=META)
            b = torch.empty(part.width, slot_rank, dtype=engine.dtype, device=META).t()
            for out in (a, b):
                left = None
                if core is not None:
                    left = torch.empty(engine.rank, engine.k, dtype=core, device=META)
                rows = engine.rank if core is None else engine.k
                packed = matrix(rows, out.shape[1], format)
                jobs.append(MaterializeJob(out, packed, left, 1.0, 0, out.shape[1]))
    return KernelPlan(jobs)


def run_unaligned(recording: Recording) -> None:
    """What no model has: factors into views that are contiguous along neither side, or begin anywhere."""
    from vllm_vlora.triton_kernels.materialize_kernel import KernelPlan

    recording.label = "materialize unaligned"
    out = torch.empty(100, 64, dtype=torch.bfloat16, device=META)
    KernelPlan(
        [
            MaterializeJob(out.t(), matrix(64, 103, "nf4-dq"), None, 1.0, 3, 100),
            MaterializeJob(
                out[::2, ::2],
                matrix(64, 35, "bfloat16"),
                torch.empty(50, 64, dtype=torch.bfloat16, device=META),
                1.0,
                1,
                32,
            ),
        ]
    ).run()
