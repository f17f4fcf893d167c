"""The exact bytes of the files that a plan makes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

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
    rows_of = {
        block.group: plan.stored_rows(block) for found in plan.blocks.values() for block in found
    }
    spec_of = {spec.name: spec for spec in specs}
    # Of small tasks many are stored alike.
    known: dict[tuple[_Kind, ...], int] = {}
    for task, adapter in enumerate(collection.adapters):
        kinds: list[_Kind] = []
        for name, module in adapter.modules.items():
            spec, block = spec_of[name], block_of.get((task, name))
            shape = (module.d_in, module.d_out)
            if spec.flat is not None:
                own = plan.flat[name].loadings_format, spec.flat.rank
                kinds.append((*shape, spec.basis, spec.flat, "flat", *own))
            elif block is not None:
                shared = block.shared
                core, rank, _ = core_shape(
                    module.rank, shared.spec.k_out, shared.spec.k_in, shared.factored
                )
                rows = rows_of[block.group]
                own = shared.core_format, rank
                kinds.append((*shape, spec.basis, spec.flat, "joint", *own, None, core, rows))
            else:
                option = plan.private[task, name]
                own = option.format, option.rank
                # Nearly all are private, and of few kinds: whatever the module's basis is.
                kinds.append((*shape, None, None, "private", *own, option.bits))
        key = tuple(kinds)
        if adapter.extra:
            total += file_nbytes(_together(key), adapter.extra)
            continue
        if key not in known:
            known[key] = file_nbytes(_together(key))
        total += known[key]
    return total


# The arguments of ``_sizes``.
_Kind = tuple[Any, ...]


def _together(kinds: Sequence[_Kind]) -> dict[str, tuple[torch.dtype, int]]:
    sizes: dict[str, tuple[torch.dtype, int]] = {}
    for kind in kinds:
        for part, (dtype, count) in _sizes(*kind).items():
            have = sizes.get(part)
            sizes[part] = dtype, count if have is None else have[1] + count
    return sizes


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
