"""How one task's delta_W of one module is encoded, and how it becomes LoRA factors again.

| name    | stored once                                    | stored per task                       |
|---------|------------------------------------------------|---------------------------------------|
| private | nothing                                        | factors A, B, whole or truncated      |
| joint   | U (d_out x k_out), V (k_in x d_in), orthonormal | core U^T delta_W V^T, dense or factors |
| flat    | mean and components of the flattened A and B   | a loading for each component           |

All decode to the same thing: two *side sources*, one for the slot's A (rank x d_in) and one for
its B transposed (rank x d_out), each ``scale * left @ matrix`` with an optional ``left``. Serving
and export know only side sources, so a further representation is an encoder and a branch in
``side_sources``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_vlora.checkpoint.reader import Basis, StoredModule
from vllm_vlora.quantize import (
    FLOAT_DTYPES,
    PackedMatrix,
    pack,
    pack_narrow,
    stack_rows,
    unpack,
)


@dataclass(frozen=True)
class SideSource:
    """``scale * left @ unpack(matrix)``, of shape (rank, d); ``left`` None means the identity."""

    matrix: PackedMatrix
    left: torch.Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        """Rows of the product."""
        return self.matrix.rows if self.left is None else self.left.shape[0]

    def to_dense(self) -> torch.Tensor:
        """The product in float32, (rank, d)."""
        dense = unpack(self.matrix)
        if self.left is not None:
            dense = self.left.to(dense.dtype) @ dense
        return dense if self.scale == 1.0 else dense * self.scale


def balanced_svd(
    a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of ``scale * B A`` without forming it: QR of both factors, then an r x r SVD.

    Args:
        a: (r, d_in). b: (d_out, r). scale: alpha / r, or as PEFT has it.

    Returns:
        (A', B', sigma) in float32 with delta_W = B' A', A' (q, d_in), B' (d_out, q), rows of A' and
        columns of B' orthogonal with norm sqrt(sigma), sigma descending; q = min(r, d_in, d_out). The
        first t rows and columns are the best rank-t approximation in the Frobenius norm
        (Eckart-Young), and balanced norms lose least when each is quantised by itself.
    """
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    left, sigma, right = torch.linalg.svd(scale * (r_b @ r_a.T))
    count = min(left.shape[0], right.shape[0])
    root = sigma[:count].sqrt()
    a_out = (root[:, None] * right[:count]) @ q_a.T
    b_out = (q_b @ left[:, :count]) * root
    return a_out.float(), b_out.float(), sigma[:count].float()


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
    weight_a: torch.Tensor | None = None,
    weight_b: torch.Tensor | None = None,
) -> StoredModule:
    """Store factors in nf4-dq, the first components with more bits: delta_W = scale * B A.

    Args:
        a: (r, d_in). b: (d_out, r), components in falling order of what they matter.
        bits: how many components have 4, 3 and 2 bits, in this order; they sum to r.
        weight_a: (d_in,), weight_b: (d_out,): see ``quantize.pack_narrow``.

    Raises:
        ValueError: as ``quantize.pack_narrow``.
    """
    assert sum(bits) == a.shape[0], f"bits {bits} for rank {a.shape[0]}"
    matrices = {
        "A": _pack_by_bits(a, bits, weight_a),
        "B": _pack_by_bits(b.T.contiguous(), bits, weight_b),
    }
    kept = bits if bits[1] or bits[2] else None
    return StoredModule("private", "nf4-dq", a.shape[0], matrices, scale, bits=kept)


def _pack_by_bits(
    rows: torch.Tensor, bits: tuple[int, int, int], weight: torch.Tensor | None
) -> PackedMatrix:
    four, three, two = rows.split(list(bits))
    parts = [pack(four, "nf4-dq"), pack_narrow(three, 3, weight), pack_narrow(two, 2, weight)]
    return stack_rows([part for part in parts if part.rows] or parts[:1])


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
        format: for the core, any of ``quantize.FORMATS``.
        rows: which rows of the module's U transposed and V ``u_t`` and ``v`` are, (u_start, u_stop,
            v_start, v_stop); None: all of them.
        factored: keep factors also where the dense core is smaller.

    The core's own factors are U^T B scale (k_out x r) and A V^T (r x k_in); the dense core is kept
    instead where it is smaller (``core_shape``).
    """
    left = (b.T.float() @ u_t.T.float()) * scale  # (r, k_out): the core's B factor, transposed
    right = a.float() @ v.T.float()  # (r, k_in)
    form, rank, _ = core_shape(a.shape[0], u_t.shape[0], v.shape[0], factored)
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


def side_sources(stored: StoredModule, basis: Basis | None) -> tuple[SideSource, SideSource]:
    """Sources of A (rank, d_in) and of B transposed (rank, d_out); the scale stands on B.

    vLLM folds alpha / r into B as well, so a private task in its own dtype, served in that dtype,
    materialises to the very bits that stock vLLM puts into its slots.
    """
    if stored.representation == "private":
        return (
            SideSource(stored.matrices["A"], None, 1.0),
            SideSource(stored.matrices["B"], None, stored.scale),
        )
    assert basis is not None
    if stored.representation == "flat":
        return (
            SideSource(basis.v, _flat_left(stored.matrices["A"], stored.rank), 1.0),
            SideSource(basis.u, _flat_left(stored.matrices["B"], stored.rank), stored.scale),
        )
    assert stored.representation == "joint"
    left_a, left_b = core_factors(stored)
    basis = basis_rows(stored, basis)
    return (
        SideSource(basis.v, left_a, 1.0),
        SideSource(basis.u, left_b, stored.scale),
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


def _flat_left(loadings: PackedMatrix, rank: int) -> torch.Tensor:
    """[1, loadings] kron I: (rank, (k + 1) * rank)."""
    values = unpack(loadings)
    mean = torch.ones(1, 1, device=values.device)
    identity = torch.eye(rank, device=values.device)
    return torch.kron(torch.cat([mean, values], dim=1), identity)


def decode(stored: StoredModule, basis: Basis | None) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA factors in float32 with delta_W = B A: A (rank, d_in), B (d_out, rank)."""
    source_a, source_b = side_sources(stored, basis)
    return source_a.to_dense(), source_b.to_dense().T.contiguous()


def dense_keeps_rank(format: str, rank: int, shape: Sequence[int]) -> bool:
    """Whether a dense core of this shape, as it reads back, has its task's rank.

    Quantising adds to a core of lower rank something in every direction. What lies beyond the rank is
    no part of the task (``split_core``).
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


def relative_error(
    a: torch.Tensor, b: torch.Tensor, scale: float, stored: StoredModule, basis: Basis | None
) -> tuple[float, float]:
    """Measure what encoding lost, from factors alone (d_out x d_in is never formed).

    Returns:
        (||delta_W' - delta_W||_F^2, ||delta_W||_F^2) with delta_W = scale * B A. The difference is
        itself a product of stacked factors, [B', -B] [A'; A], so its norm comes from two small Gram
        matrices in float64 without cancellation between large numbers.
    """
    a_new, b_new = decode(stored, basis)
    a_old, b_old = a.double(), b.double() * scale
    stacked_a = torch.cat([a_new.double(), a_old])
    stacked_b = torch.cat([b_new.double(), -b_old], dim=1)
    difference = small_product(stacked_a, stacked_b).square().sum()
    return float(difference), float(small_product(a_old, b_old).square().sum())


def small_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A matrix of at most (r, r) with the singular values of B A: A (r, d_in), B (d_out, r)."""
    r_a = torch.linalg.qr(a.T, mode="r").R
    r_b = torch.linalg.qr(b, mode="r").R
    return r_b @ r_a.T
