"""``joint``: a core on a basis that tasks share, dense or as a pair of factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from vllm_vlora.quantize import FLOAT_DTYPES, SHARED_FORMATS, PackedMatrix, pack, unpack
from vllm_vlora.representations.factors import balanced_svd, gram_cholesky
from vllm_vlora.representations.spec import ModuleSpec, Segment, core_widths
from vllm_vlora.representations.stored import Basis, SideSource, StoredModule

ROWS_FAULT = "rows of a basis, which only joint segments of a module with a basis use"


def core_shape(rank: int, k_out: int, k_in: int, factored: bool = False) -> tuple[str, int, int]:
    """(form, rank, elements) of the core that ``encode_joint`` makes of a task of this rank.

    ``factored`` keeps factors also where the dense core is smaller.
    """
    kept = min(rank, k_out, k_in)
    if not factored and k_out * k_in < rank * (k_out + k_in):
        return "dense", kept, k_out * k_in
    return "factors", kept, kept * (k_out + k_in)


def dual_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows D with D M^T = 1 for the matrix M of these rows: the transposed pseudo-inverse, float32.

    Quantised basis rows are not quite orthonormal. Projecting on their dual gives the least-squares
    core U^+ delta_W V^+ instead of U^T delta_W V^T, which loses less.
    """
    factor = gram_cholesky(rows)
    if factor is not None:
        return torch.cholesky_solve(rows.double(), factor).float()
    q, r = torch.linalg.qr(rows.double().T)
    return torch.linalg.solve_triangular(r, q.T, upper=True).float()


def encode_joint(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    u_t: torch.Tensor,
    v: torch.Tensor,
    format: str,
    rows: tuple[int, int, int, int] | None = None,
    factored: bool = False,
) -> StoredModule:
    """Store the core U^T (scale * B A) V^T on a shared basis, dense or as factors.

    Args:
        a: (r, d_in). b: (d_out, r). u_t: U transposed, (k_out, d_out). v: (k_in, d_in); both
            orthonormal by rows, and as they will be read back (after their own packing). A basis
            that packing has bent is replaced by its dual (``dual_rows``): the core is then the best
            one in the least-squares sense.
        format: for the core, any of ``quantize.SHARED_FORMATS``.
        rows: which rows of the module's U transposed and V ``u_t`` and ``v`` are, (u_start, u_stop,
            v_start, v_stop); None: all of them.
        factored: keep factors also where the dense core is smaller.

    The core's own factors are U^T B scale (k_out x r) and A V^T (r x k_in); the dense core is kept
    instead where it is smaller (``core_shape``).
    """
    left, right = (b.T.float() @ u_t.T.float()) * scale, a.float() @ v.T.float()
    return encode_core(left, right, format, rows, factored)


def encode_core(
    left: torch.Tensor,
    right: torch.Tensor,
    format: str,
    rows: tuple[int, int, int, int] | None = None,
    factored: bool = False,
) -> StoredModule:
    """``encode_joint`` from the core's factors: B's, transposed (r, k_out), and A's (r, k_in)."""
    form, rank, _ = core_shape(len(left), left.shape[1], right.shape[1], factored)
    if form == "dense":
        core = pack(left.T @ right, format)
        return StoredModule("joint", format, rank, {"C": core}, core=form, rows=rows)
    # Balanced factors keep both within the range of a 16-bit format, whatever scale A and B had.
    right, left_t, _ = balanced_svd(right, left.T, 1.0)
    return StoredModule(
        "joint",
        format,
        rank,
        {"A": pack(right, format), "B": pack(left_t.T.contiguous(), format)},
        core=form,
        rows=rows,
    )


def core_factors(stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor]:
    """A joint core as (rank, k_in) and (rank, k_out), the scale left out: C = second^T first."""
    if stored.core == "dense":
        return split_core(unpack(stored.matrices["C"]), stored.rank)
    return unpack(stored.matrices["A"]), unpack(stored.matrices["B"])


def basis_rows(stored: StoredModule, basis: Basis) -> Basis:
    """The part of a module's basis that a joint core stands on, as views."""
    if stored.rows is None:
        return basis
    u_start, u_stop, v_start, v_stop = stored.rows
    return Basis(basis.u.row_slice(u_start, u_stop), basis.v.row_slice(v_start, v_stop))


def dense_keeps_rank(format: str, rank: int, shape: Sequence[int]) -> bool:
    """Whether a dense core of this shape, as it reads back, has its task's rank.

    Quantising adds to a core of lower rank something in every direction. What lies beyond the rank is
    no part of the task (``split_core``). Rounding to 16 bits does so too, by so little that a cut core,
    which an engine rounds again, is no nearer.
    """
    return format in FLOAT_DTYPES or rank == min(shape)


def split_core(core: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """C (k_out, k_in) -> balanced (rank, k_in) and (rank, k_out).

    Without its quantisation, C has rank ``rank`` at most. What quantising it added lies in all
    directions, and those beyond ``rank`` are left out.
    """
    left, sigma, right = torch.linalg.svd(core.double(), full_matrices=False)
    root = sigma[:rank].sqrt()
    a = root[:, None] * right[:rank]
    b = (left[:, :rank] * root).T
    return a.float().contiguous(), b.float().contiguous()


def sides(segment: Segment, module: ModuleSpec) -> dict[str, tuple[int, int]]:
    """Side -> (rows, columns) of the matrices that a segment stores."""
    assert module.basis is not None
    k_out, k_in = core_widths(segment, module.basis)
    if segment.core == "dense":
        return {"C": (k_out, k_in)}
    return {"A": (segment.rank, k_in), "B": (segment.rank, k_out)}


def fault(segment: Segment, module: ModuleSpec) -> str | None:
    """What is wrong with a segment; None where nothing is."""
    if module.basis is None:
        return "joint, but the module has no basis" if segment.rows is None else ROWS_FAULT
    if segment.rows is not None:
        u_start, u_stop, v_start, v_stop = segment.rows
        k_out, k_in = module.basis.k_out, module.basis.k_in
        if not (0 <= u_start < u_stop <= k_out and 0 <= v_start < v_stop <= k_in):
            return f"rows {list(segment.rows)} are not within the basis ({k_out}, {k_in})"
    if segment.core not in ("factors", "dense"):
        return f"unknown core form {segment.core!r}"
    if segment.core == "dense" and segment.rank > min(core_widths(segment, module.basis)):
        return f"rank {segment.rank} exceeds the core"
    return None


def sources(stored: StoredModule, basis: Basis | None) -> tuple[SideSource, SideSource]:
    """Sources of A (rank, d_in) and of B transposed (rank, d_out); the scale stands on B."""
    assert basis is not None
    left_a, left_b = core_factors(stored)
    basis = basis_rows(stored, basis)
    return SideSource(basis.v, left_a, 1.0), SideSource(basis.u, left_b, stored.scale)


def shared_sides(module: ModuleSpec) -> Iterator[tuple[str, str, int, int]]:
    """(side, format, rows, columns) of the module's basis."""
    basis = module.basis
    if basis is not None:
        yield "U", basis.format, basis.k_out, module.d_out
        yield "V", basis.format, basis.k_in, module.d_in


def shared_fault(module: ModuleSpec) -> str | None:
    """What is wrong with the module's basis; None where nothing is."""
    basis = module.basis
    if basis is not None and (
        not 1 <= basis.k_in <= module.d_in
        or not 1 <= basis.k_out <= module.d_out
        or basis.format not in SHARED_FORMATS
    ):
        return "basis"
    return None


def shared_rows(segment: Segment, module: ModuleSpec) -> tuple[str, int, int] | None:
    """(format, rows on B's side, rows on A's) of the basis that a task multiplies with."""
    assert module.basis is not None
    return (module.basis.format, *core_widths(segment, module.basis))


def shared(module: ModuleSpec, matrices: Mapping[str, PackedMatrix]) -> Basis | None:
    """The module's basis from its matrices by side; None where it has none."""
    return None if module.basis is None else Basis(matrices["U"], matrices["V"])
