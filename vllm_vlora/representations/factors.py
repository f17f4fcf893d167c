"""The numbers of one update delta_W = scale * B A, from its factors alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


def balanced_svd(
    a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of ``scale * B A`` without forming it: QR of both factors, then an r x r SVD.

    Args:
        a: (r, d_in). b: (d_out, r). scale: alpha / r, or as PEFT has it.

    Returns:
        (A', B', sigma) with delta_W = B' A', A' (q, d_in) and B' (d_out, q) in float32, rows of A' and
        columns of B' orthogonal with norm sqrt(sigma), sigma descending, in float64, as products of
        float32 numbers may be beyond its range; q = min(r, d_in, d_out). The
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
    return a_out.float(), b_out.float(), sigma[:count]


# Below this ratio of a Gram matrix' eigenvalues, its rounding would reach the leading factors.
_SOUND = 1e-8


def stacked_svd(
    a: torch.Tensor, b_t: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``balanced_svd`` of many updates of one shape, by their Gram matrices in float64.

    Of well-conditioned factors, which nearly all are: others go through ``balanced_svd`` one by one. A
    tenth of the time of a QR decomposition of each, which reads its tall matrix rank times.

    Args:
        a: (n, r, d_in). b_t: B transposed, (n, r, d_out). scales: (n,) float64, of each B A.

    Returns:
        (A', B' transposed, norms): (n, q, d_in) and (n, q, d_out) float32; ||scale * B A||^2, (n,)
        float64.
    """
    wide_a, wide_b = a.double(), b_t.double()
    small = _Small.of(wide_a, wide_b)
    norms = small.norms * scales.square()
    sound = small.sound & (norms > 0)
    left, sigma, right = torch.linalg.svd(small.core * scales[:, None, None])
    root = sigma.sqrt()[:, :, None]
    svd_a = (root * right @ small.to_core_a @ wide_a).float()
    svd_b = (root * left.mT @ small.to_core_b @ wide_b).float()
    if not bool(sound.all()):
        count = min(a.shape[1], a.shape[2], b_t.shape[2])
        svd_a, svd_b = svd_a[:, :count], svd_b[:, :count]
        for place in torch.nonzero(~sound).flatten().tolist():
            one = a[place], b_t[place].T, float(scales[place])
            one_a, one_b, _ = balanced_svd(*one)
            svd_a[place], svd_b[place] = one_a, one_b.T
            # Only of such factors can the products in a norm cancel.
            norms[place] = squared_norm(*one)
    # NF4 rounds x and -x differently: a term has one sign, however many updates are taken at once.
    first = svd_a[:, :, :64]
    greatest = first.gather(2, first.abs().argmax(2, keepdim=True))
    signs = torch.where(greatest < 0, -1.0, 1.0)
    return svd_a.mul_(signs), svd_b.mul_(signs), norms


def stacked_singular_values(a: torch.Tensor, b_t: torch.Tensor) -> torch.Tensor:
    """(n, r) float64 singular values of each B A, descending; arguments as of ``stacked_svd``."""
    small = _Small.of(a.double(), b_t.double())
    values = torch.linalg.svdvals(small.core)
    for place in torch.nonzero(~small.sound).flatten().tolist():
        found = torch.linalg.svdvals(small_product(a[place].double(), b_t[place].double().T))
        values[place] = 0.0
        values[place, : len(found)] = found
    return values


class _Small(NamedTuple):
    """Matrices (n, r, r) with the singular values of B A, and what takes A and B to them.

    Attributes:
        core: Q_b^T (B A) Q_a. to_core_a, to_core_b: T with orthonormal rows T A and T B^T.
        norms: ||B A||^2. sound: where Gram matrices say all that with float64's precision, nearly;
            elsewhere the others mean nothing.
    """

    core: torch.Tensor
    to_core_a: torch.Tensor
    to_core_b: torch.Tensor
    norms: torch.Tensor
    sound: torch.Tensor

    @classmethod
    def of(cls, a: torch.Tensor, b_t: torch.Tensor) -> _Small:
        gram_a, gram_b = a @ a.mT, b_t @ b_t.mT
        norms = (gram_a * gram_b).sum((1, 2)).clamp(min=0)
        (values_a, vectors_a), (values_b, vectors_b) = map(torch.linalg.eigh, (gram_a, gram_b))
        small = torch.tensor(a.shape[1] <= min(a.shape[2], b_t.shape[2]), device=a.device)
        sound = small.expand(len(a))
        for values in (values_a, values_b):
            sound = sound & (values[:, 0] > _SOUND * values[:, -1])
        roots_a, roots_b = (
            torch.where(sound[:, None], values, 1.0).sqrt() for values in (values_a, values_b)
        )
        core = roots_b[:, :, None] * (vectors_b.mT @ vectors_a) * roots_a[:, None, :]
        to_a = (vectors_a / roots_a[:, None, :]).mT
        return cls(core, to_a, (vectors_b / roots_b[:, None, :]).mT, norms, sound)


def small_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A matrix of at most (r, r) with the singular values of B A: A (r, d_in), B (d_out, r)."""
    r_a = torch.linalg.qr(a.T, mode="r").R
    r_b = torch.linalg.qr(b, mode="r").R
    return r_b @ r_a.T


# Of a Gram matrix what is above the diagonal is not multiplied, but for blocks of so many rows; and as
# many columns are converted at once.
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 256, 2048


def row_gram(rows: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """rows @ rows^T of a matrix with long rows, float64; products of each few columns in ``dtype``."""
    count = len(rows)
    gram = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    for part in rows.split(_COLUMNS_AT_ONCE, dim=1):
        wide = part.to(dtype)
        for start in range(0, count, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, count)
            gram[start:stop, :stop] += wide[start:stop] @ wide[:stop].T
    return gram.tril() + gram.tril(-1).T


# Up to this ratio of the pivots a Gram matrix is worth its smaller time.
_EVEN = 1e-3


def gram_cholesky(rows: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor | None:
    """L with L L^T = rows rows^T, of rows that are nearly orthonormal, as packing leaves them; else None.

    A quarter of the time of a QR decomposition, which is for all others.

    Args:
        rows: (n, d). dtype: of the products of single elements.

    Returns:
        (n, n) float64.
    """
    factor, failed = torch.linalg.cholesky_ex(row_gram(rows, dtype))
    pivots = factor.diagonal()
    if int(failed) or not float(pivots.min()) > _EVEN * float(pivots.max()):
        return None
    return factor


ScaledFactors = tuple[torch.Tensor, torch.Tensor, float]


ReadFactors = Callable[[], Iterator[ScaledFactors]]
"""Starts a new read of the adapters: yields (A (r, d_in), B (d_out, r), scale)."""


# Where less than this share of a sum of products is left of it, rounding is seen in what is left.
SEEN = 1e-9
# And what is left of ||B A||^2 below this share is rounding of float32 factors: the terms cancel.
CANCELLED = 1e-14


def product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """||B A||_F^2 in float64 from the factors' Gram matrices; by QR where their products cancel."""
    return _norm_and_terms(a, b)[0]


def squared_norm(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    """||scale * B A||_F^2 of an update, float64; zero where its terms cancel but for their rounding."""
    norm, terms = _norm_and_terms(a, b)
    return 0.0 if norm <= CANCELLED * terms else norm * scale**2


def _norm_and_terms(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """||B A||^2, and the sum that it would have if none of its products were negative."""
    a, b = a.double(), b.double()
    products = (b.T @ b) * (a @ a.T)
    norm, terms = float(products.sum()), float(products.abs().sum())
    if terms > 0 and norm <= SEEN * terms:
        norm = float(small_product(a, b).square().sum())
    return norm, terms


def changes_nothing(a: torch.Tensor, b: torch.Tensor, scale: float) -> bool:
    """Whether delta_W = scale * B A is zero: of an adapter before its training, or whose terms cancel."""
    return scale == 0 or squared_norm(a, b, 1.0) == 0


def relative(lost: float, norm: float) -> float:
    """sqrt(lost / norm), of squared norms."""
    # A delta_W of zero is stored as zero, so there is nothing to divide.
    return math.sqrt(lost / norm) if norm > 0 else math.sqrt(lost)
