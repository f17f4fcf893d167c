"""A packed basis made orthonormal in a metric, and what of an update lies on it."""

from __future__ import annotations

import torch

from vllm_vlora.fitting.whitening import Metric
from vllm_vlora.quantize import PackedMatrix, unpack


class OrthonormalBasis:
    """The rows of a basis, orthonormalised in their order: S_out^T U = Q_u R_u, V S_in = R_v^T Q_v^T.

    Packing bends a basis, and a metric stretches it. With the rows in order, the leading columns of
    Q_u and Q_v span what the leading rows of the basis do.

    Args:
        u: U transposed, packed, (k_out, d_out). v: V, packed, (k_in, d_in).
        metric: of the module.
        dtype: of Q_u (d_out, k_out), Q_v (d_in, k_in) and R; float32 in half of the memory.
    """

    def __init__(
        self, u: PackedMatrix, v: PackedMatrix, metric: Metric, dtype: torch.dtype = torch.float64
    ) -> None:
        q_u, r_u = torch.linalg.qr(metric.b_t(unpack(u).double()).T)
        q_v, r_v = torch.linalg.qr(metric.a(unpack(v).double()).T)
        self.q_u, self.r_u = q_u.to(dtype), r_u.to(dtype)
        self.q_v, self.r_v = q_v.to(dtype), r_v.to(dtype)

    def sides(
        self, white_a: torch.Tensor, white_b_t: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (r, k_out) and (r, k_in) float64 of the core Q_u^T delta_W Q_v = left^T right.

        Args:
            white_a: A S_in (r, d_in). white_b_t: B^T S_out (r, d_out); both in this basis' dtype.
        """
        return (white_b_t @ self.q_u).double() * scale, (white_a @ self.q_v).double()
