"""How one task's delta_W of one module is encoded, and how it becomes LoRA factors again.

| name    | stored once                                    | stored per task                       |
|---------|------------------------------------------------|---------------------------------------|
| private | nothing                                        | factors A, B, whole or truncated      |
| joint   | U (d_out x k_out), V (k_in x d_in), orthonormal | core U^T delta_W V^T, dense or factors |
| flat    | mean and components of the flattened A and B   | a loading for each component           |

All decode to the same thing: two *side sources*, one for the slot's A (rank x d_in) and one for
its B transposed (rank x d_out), each ``scale * left @ matrix`` with an optional ``left``. Serving
and export know only side sources. Each representation is one file; ``registry`` has them by name.
"""

from __future__ import annotations

import torch

from vllm_vlora.representations.factors import small_product
from vllm_vlora.representations.registry import side_sources
from vllm_vlora.representations.stored import Basis, StoredModule

# Above this part of the norm, rounding changes a difference by less than a millionth.
_SEEN = 1e-9


def decode(stored: StoredModule, basis: Basis | None) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA factors in float32 with delta_W = B A: A (rank, d_in), B (d_out, rank)."""
    source_a, source_b = side_sources(stored, basis)
    return source_a.to_dense(), source_b.to_dense().T.contiguous()


def relative_error(
    a: torch.Tensor, b: torch.Tensor, scale: float, stored: StoredModule, basis: Basis | None
) -> tuple[float, float]:
    """Measure what encoding lost, from factors alone (d_out x d_in is never formed).

    Returns:
        (||delta_W' - delta_W||_F^2, ||delta_W||_F^2) with delta_W = scale * B A. The difference is
        itself a product of stacked factors, [B', -B] [A'; A], so its norm comes from two small Gram
        matrices in float64; by QR decompositions where rounding would be seen in it.
    """
    a_new, b_new = decode(stored, basis)
    a_old, b_old = a.double(), b.double() * scale
    stacked_a = torch.cat([a_new.double(), a_old])
    stacked_b = torch.cat([b_new.double(), -b_old], dim=1)
    products = (stacked_a @ stacked_a.T) * (stacked_b.T @ stacked_b)
    rank = len(a_new)
    difference, norm = float(products.sum()), float(products[rank:, rank:].sum())
    if not (norm > 0 and difference > _SEEN * norm):
        difference = float(small_product(stacked_a, stacked_b).square().sum())
        norm = float(small_product(a_old, b_old).square().sum())
    return difference, norm
