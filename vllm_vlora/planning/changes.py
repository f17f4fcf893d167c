"""What other factors in place of its own change in an update, from small Gram matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_vlora.fitting.whitening import Metric


def by_rows(apply: Callable[[torch.Tensor], torch.Tensor], stack: torch.Tensor) -> torch.Tensor:
    """What works on rows, applied to those of a whole stack (n, r, d)."""
    return apply(stack.flatten(0, 1)).unflatten(0, stack.shape[:2])


Sides = tuple[torch.Tensor, ...]
"""A and B transposed, stacks of rows (n, r, d)."""


def grams_of(rows: Sides, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of the rows of (A, B transposed) with each other, in the metric; float64."""
    a, b_t = by_rows(metric.a, rows[0]), by_rows(metric.b_t, rows[1])
    return _product(a, a), _product(b_t, b_t)


def changes_of(rows: Sides, grams: Sides, stored: Sides, metric: Metric) -> Changes:
    """What storing makes of rank-one terms.

    Args:
        rows: A (n, r, d_in) and B transposed (n, r, d_out), float32. grams: ``grams_of`` them.
        stored: of the same shapes, or several of them one after another, (n, m r, d).
    """
    times = stored[0].shape[1] // rows[0].shape[1]
    products = []
    for side, whiten in enumerate((metric.a, metric.b_t)):
        own = rows[side]
        change = (stored[side].unflatten(1, (times, -1)) - own[:, None]).flatten(1, 2)
        change = by_rows(whiten, change)
        beside = _product(by_rows(whiten, own), change).repeat(1, times, 1)
        products.append((grams[side].repeat(1, times, times), beside, _product(change, change)))
    (a, a_e, e), (b, b_f, f) = products
    return Changes.of(a, b, a_e, b_f, e, f)


# Below this a sum of products may have lost some that float32 cannot hold.
_LEAST = 1e-30


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # Of long rows, wherever these are; what is small is worked on here.
    found = (left @ right.mT).cpu().double()
    lost = ~((found.abs() >= _LEAST) & found.isfinite())
    if bool(lost.any()):
        # But for rows of zeros, whose products are zero.
        lost &= (left.any(2)[:, :, None] & right.any(2)[:, None, :]).cpu()
        places = lost.any(2).any(1)
        at = places.to(left.device)
        found[places] = (left[at].double() @ right[at].double().mT).cpu()
    return found


class Changes(NamedTuple):
    """Rank-one terms t_i = b_i a_i^T, and what storing changes in each, D_i; (n, terms, terms) float64.

    Products of the small changes themselves, taken in float32, where a difference of the products of
    large rows would need float64.

    Attributes:
        terms: <t_i, t_j>. cross: <D_i, t_j>. inner: <D_i, D_j>.
    """

    terms: torch.Tensor
    cross: torch.Tensor
    inner: torch.Tensor

    @classmethod
    def of(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        a_e: torch.Tensor,
        b_f: torch.Tensor,
        e: torch.Tensor,
        f: torch.Tensor,
    ) -> Changes:
        """D_i = b_i e_i^T + f_i a_i^T + f_i e_i^T, from the products of rows a, b, e and f."""
        mixed = b_f * a_e.mT + b_f * e + f * a_e
        inner = b * e + f * a + f * e + mixed + mixed.mT
        return cls(a * b, b * a_e.mT + b_f.mT * a + b_f.mT * a_e.mT, inner)
