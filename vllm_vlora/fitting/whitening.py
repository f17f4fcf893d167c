"""Measure errors as the model sees them: second moments of a module's inputs and output gradients.

With H = E[x x^T] over a module's inputs and G = E[g g^T] over the gradients at its outputs, an error
E of delta_W changes the output by ||E H^(1/2)||_F^2 on average, and the loss, to second order, by
about ||G^(1/2) E H^(1/2)||_F^2 (the Kronecker-factored curvature of Martens and Grosse, 2015,
arXiv 1503.05671). Any square root will do, so a factor S with S S^T = H takes the place of H^(1/2):
factors A S_in and S_out^T B are fitted, truncated and compared in the plain Frobenius norm, and
A S_in is taken back by S_in^-1. Without moments S is the identity and everything is Frobenius.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch


class Whitening(Protocol):
    """A square root S (d, d) of a damped moment, S S^T = H, that can be applied and undone.

    ``rows`` are (n, d); every result is (n, d) in their dtype.
    """

    def to(self, device: torch.device) -> Whitening:
        """The same on another device."""

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S."""

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S^-1."""

    def apply_transposed(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S^T."""


@dataclass(frozen=True)
class Whitener:
    """S = D^(1/2) W with W = I + Q^T (diag(roots) - I) Q, so that S S^T = D^(1/2) W W D^(1/2).

    A full moment, or a diagonal one with a few strong directions, has this form; ``apply`` and
    ``solve`` cost n d (p + 1) operations and never form d x d.

    Attributes:
        diagonal: the square roots of D, (d,) float32, all positive.
        q: (p, d) float32, rows orthonormal; p may be zero.
        roots: (p,) float32, all positive: the factor by which W stretches each row of q.
    """

    diagonal: torch.Tensor
    q: torch.Tensor
    roots: torch.Tensor

    def to(self, device: torch.device) -> Whitener:
        """The same on another device."""
        return Whitener(self.diagonal.to(device), self.q.to(device), self.roots.to(device))

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S, for rows (n, d); in the dtype of the rows."""
        return self._stretch(rows * self.diagonal.to(rows.dtype), self.roots)

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S^-1, for rows (n, d); in the dtype of the rows."""
        return self._stretch(rows, 1 / self.roots) / self.diagonal.to(rows.dtype)

    def apply_transposed(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S^T, for rows (n, d); in the dtype of the rows."""
        return self._stretch(rows, self.roots) * self.diagonal.to(rows.dtype)

    def _stretch(self, rows: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
        if not len(roots):
            return rows
        q = self.q.to(rows.dtype)
        return rows + ((rows @ q.T) * (roots - 1).to(rows.dtype)) @ q

    @classmethod
    def from_moment(cls, moment: torch.Tensor, damping: float = 1e-2) -> Whitener:
        """Of a full moment H (d, d), damped: H + damping * mean(diag H) * I.

        A direction that the text never showed would otherwise cost nothing, and an error in it could
        grow without limit.

        Raises:
            ValueError: not square, or damping not positive.
        """
        if moment.dim() != 2 or moment.shape[0] != moment.shape[1] or damping <= 0:
            raise ValueError(f"needs a square moment and a positive damping, got {moment.shape}")
        values, vectors = torch.linalg.eigh(moment.double())
        mean = max(float(values.clamp(min=0).mean()), 1e-30)
        # Only the shape matters: a moment of mean one keeps numbers near one in every module.
        roots = (values.clamp(min=0) / mean + damping).sqrt()
        return cls(torch.ones(len(values)), vectors.T.float().contiguous(), roots.float())

    @classmethod
    def from_directions(
        cls,
        directions: torch.Tensor,
        values: torch.Tensor,
        rest: torch.Tensor,
        damping: float = 1e-2,
    ) -> Whitener:
        """Of H = Q^T diag(values) Q + diag(rest), damped and scaled as in ``from_moment``; exact.

        With D = diag(rest) + damping * mean * I, H is D^(1/2) (I + M M^T) D^(1/2) for
        M = D^(-1/2) Q^T diag(values)^(1/2), and I + M M^T has the form of W W. Costs d p^2.

        Args:
            directions: Q (p, d); values (p,) and rest (d,) not negative.
            values: the moment along each direction.
            rest: the diagonal of what the directions leave.
            damping: positive.

        Raises:
            ValueError: shapes that do not fit, or damping not positive.
        """
        if directions.shape != (len(values), len(rest)) or damping <= 0:
            raise ValueError(f"{tuple(directions.shape)} directions, damping {damping}")
        values, rest = values.double().clamp(min=0), rest.double().clamp(min=0)
        strong = directions.double().T * values.sqrt()
        mean = max(float((strong.square().sum() + rest.sum()) / len(rest)), 1e-30)
        root = (rest / mean + damping).sqrt()
        q, stretch, _ = torch.linalg.svd(strong / (mean**0.5 * root[:, None]), full_matrices=False)
        return cls(root.float(), q.T.float().contiguous(), (1 + stretch.square()).sqrt().float())


@dataclass(frozen=True)
class TriangularWhitener:
    """S = L, the Cholesky factor of a full moment: twelve times cheaper than eigenvectors.

    Attributes:
        factor: (d, d) float32, lower triangular, its diagonal positive.
    """

    factor: torch.Tensor

    def to(self, device: torch.device) -> TriangularWhitener:
        """The same on another device."""
        return TriangularWhitener(self.factor.to(device))

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S, for rows (n, d); in the dtype of the rows."""
        return rows @ self.factor.to(rows.dtype)

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S^-1, for rows (n, d); in the dtype of the rows."""
        # Triangular systems are not solved in 16 bits.
        wide = torch.promote_types(rows.dtype, torch.float32)
        factor = self.factor.to(wide)
        solved = torch.linalg.solve_triangular(factor, rows.to(wide), upper=False, left=False)
        return solved.to(rows.dtype)

    def apply_transposed(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ S^T, for rows (n, d); in the dtype of the rows."""
        return rows @ self.factor.to(rows.dtype).T


def whiten(moment: torch.Tensor, damping: float = 1e-2) -> Whitening:
    """A square root of a full moment H (d, d), damped and scaled as in ``Whitener.from_moment``.

    By Cholesky; by eigenvectors where rounding has left a damped moment that is not definite.

    Raises:
        ValueError: not square, or damping not positive.
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1] or damping <= 0:
        raise ValueError(f"needs a square moment and a positive damping, got {moment.shape}")
    mean = max(float(moment.double().diagonal().mean()), 1e-30)
    damped = moment.double() / mean
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return Whitener.from_moment(moment, damping)
    return TriangularWhitener(factor.float())


@dataclass(frozen=True)
class Metric:
    """How errors of one module's delta_W are measured: ||S_out^T (delta_W' - delta_W) S_in||_F.

    Attributes:
        input, output: S_in and S_out; None is the identity.
        weight: factor of the squared norm, which makes modules comparable.
    """

    input: Whitening | None = None
    output: Whitening | None = None
    weight: float = 1.0

    def to(self, device: torch.device) -> Metric:
        """The same on another device; itself where nothing is to be moved."""
        if self.input is None and self.output is None:
            return self
        input, output = (side and side.to(device) for side in (self.input, self.output))
        return Metric(input, output, self.weight)

    def a(self, a: torch.Tensor) -> torch.Tensor:
        """A S_in for A (n, d_in); rows of V are whitened alike."""
        return a if self.input is None else self.input.apply(a)

    def b_t(self, b_t: torch.Tensor) -> torch.Tensor:
        """sqrt(weight) B^T S_out for B transposed (n, d_out); rows of U transposed alike."""
        white = b_t if self.output is None else self.output.apply(b_t)
        return white if self.weight == 1.0 else white * math.sqrt(self.weight)

    def factors(
        self, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A S_in (r, d_in) and sqrt(weight) B^T S_out (r, d_out) of a module's A and B (d_out, r)."""
        return self.a(a.to(dtype)), self.b_t(b.T.to(dtype))

    def unwhiten_a(self, a: torch.Tensor) -> torch.Tensor:
        """The A of which ``a`` is A S_in."""
        return a if self.input is None else self.input.solve(a)

    def unwhiten_b_t(self, b_t: torch.Tensor) -> torch.Tensor:
        """The B transposed of which ``b_t`` is sqrt(weight) B^T S_out."""
        plain = b_t if self.weight == 1.0 else b_t / math.sqrt(self.weight)
        return plain if self.output is None else self.output.solve(plain)


FROBENIUS = Metric()
"""No moments: the Frobenius norm."""
