"""The exact bytes of the files that a plan makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from vllm_vlora.adapters.collection import Collection, Module
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
    # Of small tasks many are stored alike, so kinds get numbers: those are compared in less time.
    numbers: dict[_Kind, int] = {}

    def number_of(kind: _Kind) -> int:
        return numbers.setdefault(kind, len(numbers))

    kinds_of: list[list[int]] = [[] for _ in collection.adapters]
    for module, spec in zip(collection.modules.values(), specs):
        shared = _shared_kinds(plan, module, spec, number_of)
        for task in module.tasks:
            number = shared.get(task)
            if number is None:
                option = plan.private[task, module.name]
                # Nearly all are private, and of few kinds: whatever the module's basis is.
                kind = module.d_in, module.d_out, None, None, "private"
                number = number_of((*kind, option.format, option.rank, option.bits))
            kinds_of[task].append(number)
    by_number = list(numbers)
    plain: Counter[tuple[int, ...]] = Counter()
    for adapter, kinds in zip(collection.adapters, kinds_of):
        if adapter.extra:
            total += file_nbytes(_together([by_number[n] for n in kinds]), adapter.extra)
        else:
            plain[tuple(kinds)] += 1
    for key, count in plain.items():
        total += count * file_nbytes(_together([by_number[n] for n in key]))
    return total


def _shared_kinds(
    plan: Plan, module: Module, spec: ModuleSpec, number_of: Callable[[_Kind], int]
) -> dict[int, int]:
    """The number of what each task has of a module that it shares."""
    common = module.d_in, module.d_out, spec.basis, spec.flat
    if spec.flat is not None:
        flat = (*common, "flat", plan.flat[module.name].loadings_format, spec.flat.rank)
        return dict.fromkeys(module.tasks, number_of(flat))
    found: dict[int, int] = {}
    ranks = dict(zip(module.tasks, module.ranks))
    for block in plan.blocks.get(module.name, ()):
        shared, rows = block.shared, plan.stored_rows(block)
        by_rank: dict[int, int] = {}
        for task in shared.tasks:
            if ranks[task] not in by_rank:
                widths = shared.spec.k_out, shared.spec.k_in
                core, rank, _ = core_shape(ranks[task], *widths, shared.factored)
                own = shared.core_format, rank, None, core, rows
                by_rank[ranks[task]] = number_of((*common, "joint", *own))
            found[task] = by_rank[ranks[task]]
    return found


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
