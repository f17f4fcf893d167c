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

from collections.abc import Sequence

import torch

from vllm_vlora.quantize import stack_rows, unpack
from vllm_vlora.representations.factors import CANCELLED, SEEN, small_product
from vllm_vlora.representations.registry import side_sources
from vllm_vlora.representations.stored import Basis, SideSource, StoredModule


def decode(stored: StoredModule, basis: Basis | None) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA factors in float32 with delta_W = B A: A (rank, d_in), B (d_out, rank)."""
    source_a, source_b = side_sources(stored, basis)
    return source_a.to_dense(), source_b.to_dense().T.contiguous()


def decode_together(
    stored: Sequence[StoredModule], basis: Basis
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``decode`` of several that stand on all rows of a basis, which is read once and not for each."""
    sources = zip(*(side_sources(one, basis) for one in stored))
    dense_a, dense_b_t = map(_dense_together, sources)
    return [(a, b_t.T.contiguous()) for a, b_t in zip(dense_a, dense_b_t)]


def _dense_together(sources: Sequence[SideSource]) -> list[torch.Tensor]:
    lefts = [source.left for source in sources if source.left is not None]
    rows = torch.cat(lefts) @ unpack(sources[0].matrix)
    parts = rows.split([len(left) for left in lefts])
    return [part * source.scale for part, source in zip(parts, sources)]


def relative_error(
    a: torch.Tensor, b: torch.Tensor, scale: float, stored: StoredModule, basis: Basis | None
) -> tuple[float, float]:
    """Measure what encoding lost, from factors alone; see :func:`decoded_error`."""
    return decoded_error(a, b, scale, *decode(stored, basis))


def decoded_error(
    a: torch.Tensor, b: torch.Tensor, scale: float, a_new: torch.Tensor, b_new: torch.Tensor
) -> tuple[float, float]:
    """What other factors in place of its own change in an update (d_out x d_in is never formed).

    Returns:
        (||delta_W' - delta_W||_F^2, ||delta_W||_F^2) with delta_W = scale * B A. The difference is
        itself a product of stacked factors, [B', -B] [A'; A], so its norm comes from two small Gram
        matrices in float64; by QR decompositions where rounding would be seen in it.
    """
    return _lost(a_new[None], b_new.T[None], a[None], b.T.double()[None] * scale)[0]


def relative_errors(
    a: torch.Tensor, b_t: torch.Tensor, scales: torch.Tensor, stored: Sequence[StoredModule]
) -> list[tuple[float, float]]:
    """``relative_error`` of many private modules of one shape and one format.

    Args:
        a: (n, r, d_in). b_t: B transposed, (n, r, d_out). scales: (n,) float64, of each B A.
    """
    a_new, b_new = (
        unpack(stack_rows([module.matrices[side] for module in stored])).unflatten(
            0, (len(stored), stored[0].rank)
        )
        for side in "AB"
    )
    kept = torch.tensor([module.scale for module in stored], device=b_new.device)
    return _lost(a_new, b_new * kept[:, None, None], a, b_t.double() * scales[:, None, None])


def _lost(
    a_new: torch.Tensor, b_new: torch.Tensor, a_old: torch.Tensor, b_old: torch.Tensor
) -> list[tuple[float, float]]:
    """What ``relative_error`` returns, of (n, rows, d) stacks of A and of B transposed."""
    rank = a_new.shape[1]
    stacked_a = torch.cat([a_new.double(), a_old.double()], dim=1)
    stacked_b = torch.cat([b_new.double(), -b_old], dim=1)
    products = (stacked_a @ stacked_a.mT) * (stacked_b @ stacked_b.mT)
    # Sums, and what they would be if none of the products were negative.
    parts = products, products.abs()
    sums = [part.sum((1, 2)).tolist() for part in parts]
    own_sums = [part[:, rank:, rank:].sum((1, 2)).tolist() for part in parts]
    found = []
    for place, (lost, terms, norm, own_terms) in enumerate(zip(*sums, *own_sums)):
        if not (lost > SEEN * terms and norm > SEEN * own_terms):
            both, old = stacked_b[place].T, stacked_b[place, rank:].T
            lost = float(small_product(stacked_a[place], both).square().sum())
            norm = float(small_product(stacked_a[place, rank:], old).square().sum())
        if norm <= CANCELLED * own_terms:
            # An update of zero, of which zeros lose nothing.
            norm, lost = 0.0, 0.0 if lost <= 2 * CANCELLED * own_terms else lost
        found.append((lost, norm))
    return found
