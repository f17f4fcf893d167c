"""The numbers of one update delta_W = scale * B A, from its factors alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch


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


def small_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A matrix of at most (r, r) with the singular values of B A: A (r, d_in), B (d_out, r)."""
    r_a = torch.linalg.qr(a.T, mode="r").R
    r_b = torch.linalg.qr(b, mode="r").R
    return r_b @ r_a.T


ScaledFactors = tuple[torch.Tensor, torch.Tensor, float]


ReadFactors = Callable[[], Iterator[ScaledFactors]]
"""Starts a new read of the adapters: yields (A (r, d_in), B (d_out, r), scale)."""


def squared_norm(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    """||scale * B A||_F^2 in float64 from the factors' Gram matrices."""
    a, b = a.double(), b.double()
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0) * scale**2


def changes_nothing(a: torch.Tensor, b: torch.Tensor, scale: float) -> bool:
    """Whether delta_W = scale * B A is zero since a part of it is: of an adapter before its training."""
    return scale == 0 or not bool(b.any()) or not bool(a.any())


def relative(lost: float, norm: float) -> float:
    """sqrt(lost / norm), of squared norms."""
    # A delta_W of zero is stored as zero, so there is nothing to divide.
    return math.sqrt(lost / norm) if norm > 0 else math.sqrt(lost)
