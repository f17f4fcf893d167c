"""``private``: a task's own factors, whole or truncated, packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from vllm_vlora.quantize import PackedMatrix, pack, pack_narrow, pack_trellis
from vllm_vlora.representations.spec import ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis, SideSource, StoredModule

_FORMATS_WITH_BITS = ("nf4-dq", "trellis")
BITS_FAULT = "bits by row, which only private segments in nf4-dq or trellis codes have"


def encode_private(a: torch.Tensor, b: torch.Tensor, scale: float, format: str) -> StoredModule:
    """Store factors as they are: delta_W = scale * B A with A (r, d_in) and B (d_out, r).

    With ``format`` the factors' own dtype this is exact. Truncation is the caller's: pass the
    leading rows and columns of ``balanced_svd``.
    """
    return encode_stacked(a[None], b.T[None], [scale], format)[0]


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
    return encode_stacked(a[None], b.T[None], [scale], "nf4-dq", bits)[0]


def encode_stacked(
    a: torch.Tensor,
    b_t: torch.Tensor,
    scales: Sequence[float],
    format: str,
    bits: tuple[int, int, int] | None = None,
) -> list[StoredModule]:
    """``encode_private``, or with ``bits`` ``encode_narrow``, of many updates of one shape.

    Args:
        a: (n, r, d_in). b_t: B transposed, (n, r, d_out). scales: n.
    """
    sides = zip(_pack_stack(a, format, bits), _pack_stack(b_t, format, bits), scales, strict=True)
    kept = bits if bits is not None and (bits[1] or bits[2]) else None
    return [
        StoredModule("private", format, a.shape[1], {"A": one, "B": other}, scale, bits=kept)
        for one, other, scale in sides
    ]


def encode_trellis(
    a: Sequence[torch.Tensor], b_t: Sequence[torch.Tensor], bits: Sequence[tuple[int, int, int]]
) -> list[StoredModule]:
    """Store many updates in trellis codes, each B A: all rows of a width are searched together.

    Args:
        a: of each (r, d_in), components in falling order of what they matter. b_t: B transposed,
            (r, d_out).
        bits: how many components of each have 4, 3 and 2 bits; they sum to its r.
    """
    matrices = _pack_together([*a, *b_t], [*bits, *bits])
    return [
        StoredModule(
            "private",
            "trellis",
            sum(own),
            {"A": matrices[place], "B": matrices[len(a) + place]},
            bits=own if own[1] or own[2] else None,
        )
        for place, own in enumerate(bits)
    ]


def _pack_together(
    matrices: Sequence[torch.Tensor], bits: Sequence[tuple[int, int, int]]
) -> list[PackedMatrix]:
    """Matrices in trellis codes, those of as many columns at once."""
    by_cols: dict[int, list[int]] = {}
    for place, matrix in enumerate(matrices):
        by_cols.setdefault(matrix.shape[1], []).append(place)
    found: dict[int, PackedMatrix] = {}
    for places in by_cols.values():
        rows = torch.cat([matrices[place] for place in places])
        widths = [torch.tensor((4, 3, 2)).repeat_interleave(torch.tensor(bits[p])) for p in places]
        packed, stop = pack_trellis(rows, torch.cat(widths).to(rows.device)), 0
        for place in places:
            start, stop = stop, stop + len(matrices[place])
            # Copies: a view would keep all rows, in memory and on the way to another process.
            own = packed.row_slice(start, stop)
            found[place] = replace(own, parts={n: part.clone() for n, part in own.parts.items()})
    return [found[place] for place in range(len(matrices))]


def _pack_stack(
    rows: torch.Tensor, format: str, bits: tuple[int, int, int] | None
) -> list[PackedMatrix]:
    """Each matrix of a stack, of which all rows of one width are packed at once."""
    count, rank, cols = rows.shape
    if bits is None:
        packed = [pack(rows.flatten(0, 1), format)]
    else:
        assert sum(bits) == rank, f"bits {bits} for rank {rank}"
        four, three, two = (part.flatten(0, 1) for part in rows.split(list(bits), dim=1))
        packed = [pack(four, format), pack_narrow(three, 3), pack_narrow(two, 2)]
    parts = {
        name: torch.cat([p.parts[name].unflatten(0, (count, p.rows // count)) for p in packed], 1)
        for name in packed[0].parts
    }
    # Copies: a view would keep the whole stack, in memory and on the way to another process.
    return [
        PackedMatrix(format, rank, cols, {name: part[i].clone() for name, part in parts.items()})
        for i in range(count)
    ]


def sides(segment: Segment, module: ModuleSpec) -> dict[str, tuple[int, int]]:
    """Side -> (rows, columns) of the matrices that a segment stores."""
    return {"A": (segment.rank, module.d_in), "B": (segment.rank, module.d_out)}


def fault(segment: Segment, module: ModuleSpec) -> str | None:
    """What is wrong with a segment; None where nothing is."""
    if segment.bits is None:
        return None
    if segment.format not in _FORMATS_WITH_BITS:
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
