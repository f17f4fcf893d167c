"""Rows of trellis codes without the search for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_vlora.quantize import PackedMatrix, part_specs
from vllm_vlora.trellis import TRELLIS_WIDTHS


def mixed_rows(rank: int) -> tuple[int, int, int]:
    """How many rows of a task have 4, 3 and 2 bits: a quarter, a quarter and half."""
    return rank // 4, rank // 4, rank - rank // 4 * 2


def random_trellis(like: torch.Tensor, counts: Sequence[int]) -> PackedMatrix:
    """A matrix as wide as ``like`` and with scales of its rows, in trellis codes of random streams.

    Every stream is one of some row, and to find those of given numbers takes a microsecond a number.

    Args:
        like: ``[rows, cols]``.
        counts: how many rows of each task have 4, 3 and 2 bits; their sum divides the rows.
    """
    rows, cols = like.shape
    parts = {
        name: torch.randint(256, (rows, *shape), dtype=dtype, device=like.device)
        if dtype == torch.uint8
        else like.to(dtype).std(dim=1, keepdim=True)
        for name, (dtype, shape) in part_specs("trellis", cols).items()
    }
    widths = torch.tensor(TRELLIS_WIDTHS, dtype=torch.uint8, device=like.device)
    of_task = widths.repeat_interleave(torch.tensor(counts, device=like.device))
    parts["widths"] = of_task.repeat(rows // len(of_task))[:, None]
    return PackedMatrix("trellis", rows, cols, parts)
