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
from vllm_vlora.representations.spec import BasisSpec, FlatSpec, ModuleSpec, Segment


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
    spec_of = {spec.name: spec for spec in specs}
    for task, adapter in enumerate(collection.adapters):
        sizes: dict[str, tuple[torch.dtype, int]] = {}
        for name, module in adapter.modules.items():
            spec, block = spec_of[name], block_of.get((task, name))
            shape = (module.d_in, module.d_out, spec.basis, spec.flat)
            if spec.flat is not None:
                found = _sizes(*shape, "flat", plan.flat[name].loadings_format, spec.flat.rank)
            elif block is not None:
                shared = block.shared
                core, rank, _ = core_shape(
                    module.rank, shared.spec.k_out, shared.spec.k_in, shared.factored
                )
                rows = plan.stored_rows(block)
                found = _sizes(*shape, "joint", shared.core_format, rank, None, core, rows)
            else:
                option = plan.private[task, name]
                # Nearly all are private, and of few kinds: whatever the module's basis is.
                found = _sizes(
                    *shape[:2], None, None, "private", option.format, option.rank, option.bits
                )
            for part, (dtype, count) in found.items():
                have = sizes.get(part)
                sizes[part] = dtype, count if have is None else have[1] + count
        total += file_nbytes(sizes, adapter.extra)
    return total


@lru_cache(maxsize=1 << 16)
def _sizes(
    d_in: int,
    d_out: int,
    basis: BasisSpec | None,
    flat: FlatSpec | None,
    representation: str,
    format: str,
    rank: int,
    bits: tuple[int, int, int] | None = None,
    core: str | None = None,
    rows: tuple[int, int, int, int] | None = None,
) -> dict[str, tuple[torch.dtype, int]]:
    """Tensor name -> (dtype, elements) of one segment; not to be changed."""
    segment = Segment(0, representation, format, rank, core=core, bits=bits, rows=rows)
    module = ModuleSpec("", d_in, d_out, "linear", basis, flat)
    return task_tensor_sizes([segment], [module])
