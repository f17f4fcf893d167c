"""Fit the shared bases of one module to a stream of adapters, without ever forming a delta_W.

With W_i = delta_W_i / ||delta_W_i||_F, the bases sought are the leading eigenvectors of

    M_V = sum_i W_i^T W_i    (d_in x d_in)       M_U = sum_i W_i W_i^T    (d_out x d_out)

(the one-shot solution of *Compress then Serve*, Bruel-Gabrielsson et al., arXiv 2407.00066, which
matches their alternation closely). Neither matrix is formed: a pass over the adapters gives
``M Q`` for a thin Q from the factors alone, ``A^T (B^T B) (A Q)``. The last pass is turned into
ordered eigenvectors by the Nystroem formula ``M ~ Y (Q^T Y)^+ Y^T`` with ``Y = M Q`` (Tropp et al.,
*Fixed-rank approximation of a positive-semidefinite matrix from streaming data*, NeurIPS 2017),
which is never worse than Rayleigh-Ritz on the same Q and costs no further read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vllm_vlora.representations import balanced_svd

ScaledFactors = tuple[torch.Tensor, torch.Tensor, float]
ReadFactors = Callable[[], Iterator[ScaledFactors]]
"""Starts a new read of the adapters: yields (A (r, d_in), B (d_out, r), scale)."""


@dataclass(frozen=True)
class JointFit:
    """Bases of one module, ordered by falling energy.

    Attributes:
        u_t: U transposed, (k_out, d_out) float32, rows orthonormal.
        v: V, (k_in, d_in) float32, rows orthonormal.
        energy: (k_out, k_in) float64, the sum over adapters of the squared entries of the core
            U^T W_i V^T of each unit-normalised adapter. ``energy[:i, :j].sum()`` is what the first
            i and j components capture, of one per adapter.
    """

    u_t: torch.Tensor
    v: torch.Tensor
    energy: torch.Tensor


def fit_module(
    read: ReadFactors,
    d_in: int,
    d_out: int,
    num_components: int,
    *,
    passes: int = 2,
    oversample: int = 8,
    seed: int = 0,
) -> JointFit:
    """Fit the bases of one module and measure what each pair of components captures.

    Arguments are those of :func:`fit_bases`; the energies cost one more read.
    """
    u_t, v = fit_bases(
        read, d_in, d_out, num_components, passes=passes, oversample=oversample, seed=seed
    )
    energy = torch.zeros(u_t.shape[0], v.shape[0], dtype=torch.float64)
    for a, b, scale in read():
        normed = _unit_factors(a, b, scale)
        if normed is not None:
            a, b, norm = normed
            energy += ((u_t @ b) @ (a @ v.T)).double().square() / norm**2
    return JointFit(u_t, v, energy)


def fit_bases(
    read: ReadFactors,
    d_in: int,
    d_out: int,
    num_components: int,
    *,
    passes: int = 2,
    oversample: int = 8,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the bases of one module: (U transposed (k_out, d_out), V (k_in, d_in)), float32.

    Every adapter counts alike, whatever its norm; one whose delta_W is zero counts nothing. Where
    the ranks of all adapters together fit into ``num_components + oversample``, their stacked
    singular vectors give the bases exactly; otherwise randomised subspace iteration of ``passes``
    reads does, in 8 (d_in + d_out) (num_components + oversample) bytes and one adapter, whatever
    the number of adapters.

    Args:
        read: starts a read of the adapters. Called once or ``passes + 1`` times.
        d_in, d_out: columns and rows of delta_W.
        num_components: the k wanted; k_in = min(k, d_in, sum of ranks), k_out likewise, a rank
            counting at most min(d_in, d_out).
        passes: power iterations. oversample: further directions carried and dropped at the end.
        seed: of the random start.

    Raises:
        ValueError: ``num_components`` or ``passes`` below one, or no adapters.
    """
    if num_components < 1 or passes < 1:
        raise ValueError(
            f"num_components and passes must be positive, got {num_components} and {passes}"
        )
    width = num_components + oversample
    exact = _fit_exact(read, width)
    if exact is None:
        total_rank, u, v = _fit_streaming(read, d_in, d_out, width, passes, seed)
    else:
        total_rank, u, v = exact
    k_out, k_in = (min(num_components, d, total_rank) for d in (d_out, d_in))
    return u[:, :k_out].T.float().contiguous(), v[:, :k_in].T.float().contiguous()


def _fit_exact(read: ReadFactors, limit: int) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """(sum of ranks, U, V) from the stacked singular vectors; None if there are more than limit.

    Besides being cheaper this avoids the squares in M, which in floating point lose every direction
    weaker than the square root of the machine precision.
    """
    rows_a, rows_b, total_rank = [], [], 0
    for a, b, scale in read():
        rank = _effective_rank(a, b)
        total_rank += rank
        if total_rank > limit:
            return None
        normed = _unit_factors(a, b, scale)
        if normed is None:
            rows_a.append(torch.zeros(rank, a.shape[1], dtype=torch.float64))
            rows_b.append(torch.zeros(rank, b.shape[0], dtype=torch.float64))
            continue
        right, left, sigma = balanced_svd(normed[0], normed[1], 1.0 / normed[2])
        root = sigma.double().sqrt()
        rows_a.append(root[:, None] * right.double())
        rows_b.append((left.double() * root).T)
    if not total_rank:
        raise ValueError("there are no adapters to fit")
    return total_rank, _leading_directions(rows_b), _leading_directions(rows_a)


def _leading_directions(rows: list[torch.Tensor]) -> torch.Tensor:
    """Right singular vectors of the stacked rows as columns, by falling singular value."""
    q, r = torch.linalg.qr(torch.cat(rows).T)
    left, _, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ left


def _fit_streaming(
    read: ReadFactors, d_in: int, d_out: int, width: int, passes: int, seed: int
) -> tuple[int, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q_v = _random_orthonormal(d_in, min(width, d_in), generator)
    q_u = _random_orthonormal(d_out, min(width, d_out), generator)
    for left in range(passes - 1, -1, -1):
        y_v, y_u, total_rank = torch.zeros_like(q_v), torch.zeros_like(q_u), 0
        for a, b, scale in read():
            total_rank += _effective_rank(a, b)
            normed = _unit_factors(a, b, scale)
            if normed is None:
                continue
            a, b, norm = normed
            gram_b, gram_a = (b.T @ b) / norm**2, (a @ a.T) / norm**2
            y_v.addmm_(a.T, gram_b @ (a @ q_v))
            y_u.addmm_(b, gram_a @ (b.T @ q_u))
        if left:
            q_v, q_u = torch.linalg.qr(y_v)[0], torch.linalg.qr(y_u)[0]
    return total_rank, _nystroem(q_u, y_u), _nystroem(q_v, y_v)


def _random_orthonormal(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, cols, generator=generator))[0]


def _nystroem(q: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Ordered eigenvectors (columns) of Y (Q^T Y)^+ Y^T, for Y = M Q with M semidefinite."""
    q, y = q.double(), y.double()
    # Y is a float32 sum: eigenvalues below its rounding error are noise and must not be divided by.
    # The shift lifts them to a known positive floor, which also keeps a zero M well-defined.
    shift = max(float(torch.linalg.norm(y)) * torch.finfo(torch.float32).eps, 1e-30)
    y = y + shift * q
    inner = q.T @ y
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    root = vectors / values.clamp(min=shift).sqrt()
    basis, r = torch.linalg.qr(y @ root)
    left, _, _ = torch.linalg.svd(r)
    return basis @ left


def _effective_rank(a: torch.Tensor, b: torch.Tensor) -> int:
    return min(a.shape[0], a.shape[1], b.shape[0])


def _unit_factors(
    a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """(A / ||A||, B / ||B||, norm of their product), float32; None where scale * B A is zero.

    The scale cancels in a unit-normalised delta_W; normalising the factors first keeps their Gram
    matrices within float32 whatever their magnitude.
    """
    a, b = a.float(), b.float()
    norm_a, norm_b = float(torch.linalg.norm(a)), float(torch.linalg.norm(b))
    if scale == 0 or norm_a == 0 or norm_b == 0:
        return None
    a, b = a / norm_a, b / norm_b
    wide_a, wide_b = a.double(), b.double()
    gram = (wide_b.T @ wide_b) * (wide_a @ wide_a.T)
    norm = math.sqrt(max(float(gram.sum()), 0.0))
    # Factors of norm one whose product is below rounding cancel: there is no direction to learn.
    if norm < 1e-7:
        return None
    return a, b, norm
