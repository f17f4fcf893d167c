"""How one task's delta_W of one module is encoded, and how it becomes LoRA factors again.

| name    | stored once                                    | stored per task                       |
|---------|------------------------------------------------|---------------------------------------|
| private | nothing                                        | factors A, B, whole or truncated      |
| joint   | U (d_out x k_out), V (k_in x d_in), orthonormal | core U^T delta_W V^T, dense or factors |

Both decode to the same thing: two *side sources*, one for the slot's A (rank x d_in) and one for
its B transposed (rank x d_out), each ``scale * left @ matrix`` with an optional ``left``. Serving
and export know only side sources, so a further representation is an encoder and a branch in
``side_sources``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_vlora.checkpoint import Basis, StoredModule
from vllm_vlora.quantize import PackedMatrix, pack, unpack


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


def core_shape(rank: int, k_out: int, k_in: int) -> tuple[str, int, int]:
    """(form, rank, elements) of the core that ``encode_joint`` makes of a task of this rank."""
    kept = min(rank, k_out, k_in)
    if k_out * k_in < rank * (k_out + k_in):
        return "dense", kept, k_out * k_in
    return "factors", kept, kept * (k_out + k_in)


def dual_rows(packed: PackedMatrix) -> torch.Tensor:
    """Rows D with D M^T = 1 for the matrix M as packed: the transposed pseudo-inverse, float32.

    Quantised basis rows are not quite orthonormal. Projecting on their dual gives the least-squares
    core U^+ delta_W V^+ instead of U^T delta_W V^T, which loses less.
    """
    q, r = torch.linalg.qr(unpack(packed).double().T)
    return torch.linalg.solve_triangular(r, q.T, upper=True).float()


def encode_joint(
    a: torch.Tensor, b: torch.Tensor, scale: float, u_t: torch.Tensor, v: torch.Tensor, format: str
) -> StoredModule:
    """Store the core U^T (scale * B A) V^T on a shared basis, dense or as factors.

    Args:
        a: (r, d_in). b: (d_out, r). u_t: U transposed, (k_out, d_out). v: (k_in, d_in); both
            orthonormal by rows, and as they will be read back (after their own packing). A basis
            that packing has bent is replaced by its dual (``dual_rows``): the core is then the best
            one in the least-squares sense.
        format: a float format for the core.

    The core's own factors are U^T B scale (k_out x r) and A V^T (r x k_in); the dense core is kept
    instead where it is smaller (``core_shape``).
    """
    left = (b.T.float() @ u_t.T.float()) * scale  # (r, k_out): the core's B factor, transposed
    right = a.float() @ v.T.float()  # (r, k_in)
    form, rank, _ = core_shape(a.shape[0], u_t.shape[0], v.shape[0])
    if form == "dense":
        return StoredModule("joint", format, rank, {"C": pack(left.T @ right, format)}, core=form)
    # Balanced factors keep both within the range of a 16-bit format, whatever scale A and B had.
    right, left_t, _ = balanced_svd(right, left.T, 1.0)
    return StoredModule(
        "joint",
        format,
        rank,
        {"A": pack(right, format), "B": pack(left_t.T.contiguous(), format)},
        core=form,
    )


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
    assert stored.representation == "joint"
    assert basis is not None
    if stored.core == "dense":
        left_a, left_b = _split_core(unpack(stored.matrices["C"]), stored.rank)
    else:
        left_a, left_b = unpack(stored.matrices["A"]), unpack(stored.matrices["B"])
    return (
        SideSource(basis.v, left_a, 1.0),
        SideSource(basis.u, left_b, stored.scale),
    )


def decode(stored: StoredModule, basis: Basis | None) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA factors in float32 with delta_W = B A: A (rank, d_in), B (d_out, rank)."""
    source_a, source_b = side_sources(stored, basis)
    return source_a.to_dense(), source_b.to_dense().T.contiguous()


def _split_core(core: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """C (k_out, k_in) of numerical rank ``rank`` -> (rank, k_in) and (rank, k_out), balanced."""
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
    _, r_a = torch.linalg.qr(stacked_a.T)
    _, r_b = torch.linalg.qr(stacked_b)
    difference = (r_b @ r_a.T).square().sum()
    _, r_a = torch.linalg.qr(a_old.T)
    _, r_b = torch.linalg.qr(b_old)
    return float(difference), float((r_b @ r_a.T).square().sum())
