"""The exact bytes of the files that a plan makes."""

from __future__ import annotations

from functools import lru_cache

import torch

from vllm_vlora.adapters.collection import Collection
from vllm_vlora.checkpoint.layout import (
    BASIS_SHARD_BYTES,
    basis_nbytes,
    file_nbytes,
    task_tensor_sizes,
)
from vllm_vlora.planning.plan import Plan
from vllm_vlora.representations.joint import core_shape
from vllm_vlora.representations.spec import FlatSpec, ModuleSpec, Segment


def _flat_spec(plan: Plan, name: str) -> FlatSpec | None:
    return plan.flat[name].spec if name in plan.flat else None


def plan_nbytes(collection: Collection, plan: Plan) -> int:
    """Bytes of every safetensors file that a plan makes, extra tensors' data left out."""
    specs = [
        ModuleSpec(
            module.name,
            module.d_in,
            module.d_out,
            module.kind,
            plan.basis_spec(module.name),
            _flat_spec(plan, module.name),
        )
        for module in collection.modules.values()
    ]
    basis = basis_nbytes(specs)
    # Each further shard has a header of its own: a length word, padding and two braces.
    total = basis + 64 * (basis // BASIS_SHARD_BYTES)
    block_of = {
        (task, name): block
        for name, blocks in plan.blocks.items()
        for block in blocks
        for task in block.shared.tasks
    }
    for task, adapter in enumerate(collection.adapters):
        private: dict[str, tuple[torch.dtype, int]] = {}
        segments = []
        for name, module in adapter.modules.items():
            index = collection.modules[name].index
            block, flat = block_of.get((task, name)), plan.flat.get(name)
            if flat is not None:
                segments.append(Segment(index, "flat", flat.loadings_format, flat.spec.rank))
                continue
            if block is not None:
                shared = block.shared
                core, rank, _ = core_shape(
                    module.rank, shared.spec.k_out, shared.spec.k_in, shared.factored
                )
                rows = plan.stored_rows(block)
                segments.append(
                    Segment(index, "joint", shared.core_format, rank, core=core, rows=rows)
                )
                continue
            option = plan.private[task, name]
            parts = _private_sizes(
                module.d_in, module.d_out, option.format, option.rank, option.bits
            )
            for part, (dtype, count) in parts.items():
                private[part] = dtype, private.get(part, (dtype, 0))[1] + count
        total += file_nbytes(private | task_tensor_sizes(segments, specs), adapter.extra)
    return total


@lru_cache(maxsize=1 << 16)
def _private_sizes(
    d_in: int, d_out: int, format: str, rank: int, bits: tuple[int, int, int] | None
) -> dict[str, tuple[torch.dtype, int]]:
    # Nearly all segments are private, and of few kinds.
    segment = Segment(0, "private", format, rank, bits=bits)
    return task_tensor_sizes([segment], [ModuleSpec("", d_in, d_out)])
