"""``flat``: loadings on the principal components of whole flattened factors (vlora's representation)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from vllm_vlora.quantize import FLOAT_DTYPES, SHARED_FORMATS, PackedMatrix, pack, unpack
from vllm_vlora.representations.spec import FlatSpec, ModuleSpec, Segment, rank_fault
from vllm_vlora.representations.stored import Basis, FlatBasis, SideSource, StoredModule


def encode_flat(
    loadings_a: torch.Tensor, loadings_b: torch.Tensor, format: str, rank: int
) -> StoredModule:
    """Store a task's loadings on a module's flat basis.

        A = V_0 + sum_j loadings_a[j] V_{j+1}        B^T = U_0 + sum_j loadings_b[j] U_{j+1}

    with V_j the j-th (rank x d_in) component of the basis' ``v`` and U_j that of its ``u``; component
    0 is the mean. The task's scale is folded into its factors before the basis is fitted.

    Args:
        loadings_a: (k_in,). loadings_b: (k_out,).
        format: a float format for the loadings.
        rank: of the flat basis.
    """
    assert format in FLOAT_DTYPES, f"loadings are floats, not {format}"
    matrices = {"A": pack(loadings_a[None, :], format), "B": pack(loadings_b[None, :], format)}
    return StoredModule("flat", format, rank, matrices)


def _left(loadings: PackedMatrix, rank: int) -> torch.Tensor:
    """[1, loadings] kron I: (rank, (k + 1) * rank)."""
    values = unpack(loadings)
    mean = torch.ones(1, 1, device=values.device)
    identity = torch.eye(rank, device=values.device)
    return torch.kron(torch.cat([mean, values], dim=1), identity)


def pack_flat(u: torch.Tensor, v: torch.Tensor, spec: FlatSpec) -> FlatBasis:
    """The stacked rows as stored with this width and format."""
    rows_u, rows_v = (spec.k_out + 1) * spec.rank, (spec.k_in + 1) * spec.rank
    return FlatBasis(pack(u[:rows_u], spec.format), pack(v[:rows_v], spec.format), spec.rank)


def sides(segment: Segment, module: ModuleSpec) -> dict[str, tuple[int, int]]:
    """Side -> (rows, columns) of the matrices that a segment stores."""
    assert module.flat is not None
    return {"A": (1, module.flat.k_in), "B": (1, module.flat.k_out)}


def fault(segment: Segment, module: ModuleSpec) -> str | None:
    """What is wrong with a segment; None where nothing is."""
    if module.flat is None:
        return "flat, but the module has no flat basis"
    if segment.format not in FLOAT_DTYPES:
        return f"flat loadings are floating-point numbers, not {segment.format}"
    if segment.rank != module.flat.rank:
        return f"rank {segment.rank} is not the flat basis' {module.flat.rank}"
    return None


def sources(stored: StoredModule, basis: Basis | None) -> tuple[SideSource, SideSource]:
    """Sources of A (rank, d_in) and of B transposed (rank, d_out); the scale stands on B."""
    assert basis is not None
    return (
        SideSource(basis.v, _left(stored.matrices["A"], stored.rank), 1.0),
        SideSource(basis.u, _left(stored.matrices["B"], stored.rank), stored.scale),
    )


def shared_sides(module: ModuleSpec) -> Iterator[tuple[str, str, int, int]]:
    """(side, format, rows, columns) of the module's flat basis."""
    flat = module.flat
    if flat is not None:
        yield "flatU", flat.format, (flat.k_out + 1) * flat.rank, module.d_out
        yield "flatV", flat.format, (flat.k_in + 1) * flat.rank, module.d_in


def shared_fault(module: ModuleSpec) -> str | None:
    """What is wrong with the module's flat basis; None where nothing is."""
    flat = module.flat
    if flat is not None and (
        min(flat.rank, flat.k_in, flat.k_out) < 1
        or flat.format not in SHARED_FORMATS
        or rank_fault(flat.rank, module.d_in, module.d_out)
    ):
        return "flat basis"
    return None


def shared_rows(segment: Segment, module: ModuleSpec) -> tuple[str, int, int] | None:
    """(format, rows on B's side, rows on A's) of the components that a task multiplies with."""
    assert module.flat is not None
    flat = module.flat
    return flat.format, (flat.k_out + 1) * flat.rank, (flat.k_in + 1) * flat.rank


def shared(module: ModuleSpec, matrices: Mapping[str, PackedMatrix]) -> Basis | None:
    """The module's flat basis from its matrices by side; None where it has none."""
    if module.flat is None:
        return None
    return FlatBasis(matrices["flatU"], matrices["flatV"], module.flat.rank)
