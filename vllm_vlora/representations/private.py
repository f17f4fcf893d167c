"""``private``: a task's own factors, whole or truncated, packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from vllm_vlora.quantize import PackedMatrix, pack, pack_narrow, stack_rows
from vllm_vlora.representations.spec import ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis, SideSource, StoredModule

BITS_FAULT = "bits by row, which only private segments in nf4-dq have"


def encode_private(a: torch.Tensor, b: torch.Tensor, scale: float, format: str) -> StoredModule:
    """Store factors as they are: delta_W = scale * B A with A (r, d_in) and B (d_out, r).

    With ``format`` the factors' own dtype this is exact. Truncation is the caller's: pass the
    leading rows and columns of ``balanced_svd``.
    """
    return StoredModule(
        "private",
        format,
        a.shape[0],
        {"A": pack(a, format), "B": pack(b.T.contiguous(), format)},
        scale,
    )


def encode_narrow(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bits: tuple[int, int, int],
) -> StoredModule:
    """Store factors in nf4-dq, the first components with more bits: delta_W = scale * B A.

    Args:
        a: (r, d_in). b: (d_out, r), components in falling order of what they matter.
        bits: how many components have 4, 3 and 2 bits, in this order; they sum to r.

    Raises:
        ValueError: as ``quantize.pack_narrow``.
    """
    assert sum(bits) == a.shape[0], f"bits {bits} for rank {a.shape[0]}"
    matrices = {
        "A": _pack_by_bits(a, bits),
        "B": _pack_by_bits(b.T.contiguous(), bits),
    }
    kept = bits if bits[1] or bits[2] else None
    return StoredModule("private", "nf4-dq", a.shape[0], matrices, scale, bits=kept)


def _pack_by_bits(rows: torch.Tensor, bits: tuple[int, int, int]) -> PackedMatrix:
    four, three, two = rows.split(list(bits))
    parts = [pack(four, "nf4-dq"), pack_narrow(three, 3), pack_narrow(two, 2)]
    return stack_rows([part for part in parts if part.rows] or parts[:1])


def sides(segment: Segment, module: ModuleSpec) -> dict[str, tuple[int, int]]:
    """Side -> (rows, columns) of the matrices that a segment stores."""
    return {"A": (segment.rank, module.d_in), "B": (segment.rank, module.d_out)}


def fault(segment: Segment, module: ModuleSpec) -> str | None:
    """What is wrong with a segment; None where nothing is."""
    if segment.bits is None:
        return None
    if segment.format != "nf4-dq":
        return BITS_FAULT
    if min(segment.bits) < 0 or sum(segment.bits) != segment.rank:
        return f"bits {list(segment.bits)} do not sum to the rank {segment.rank}"
    return None


def sources(stored: StoredModule, basis: Basis | None) -> tuple[SideSource, SideSource]:
    """Sources of A (rank, d_in) and of B transposed (rank, d_out); the scale stands on B."""
    return (
        SideSource(stored.matrices["A"], None, 1.0),
        SideSource(stored.matrices["B"], None, stored.scale),
    )


def shared_sides(module: ModuleSpec) -> Iterator[tuple[str, str, int, int]]:
    """(side, format, rows, columns) of what tasks share: nothing."""
    return iter(())


def shared_fault(module: ModuleSpec) -> str | None:
    """What is wrong with what tasks share; None where nothing is."""
    return None


def shared_rows(segment: Segment, module: ModuleSpec) -> tuple[str, int, int] | None:
    """(format, rows on B's side, rows on A's) of what a task multiplies with beside its own: None."""
    return None


def shared(module: ModuleSpec, matrices: Mapping[str, PackedMatrix]) -> Basis | None:
    """What a module's tasks share, from its matrices by side: nothing."""
    return None
