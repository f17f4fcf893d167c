"""The table in which kernels look up what codes stand for."""

from __future__ import annotations

import itertools

import torch

from vllm_vlora.narrow_rows import CODEBOOKS
from vllm_vlora.trellis_tables import TRELLIS_TABLES

TRELLIS_BOOK = 32
CODEBOOK = (
    *CODEBOOKS,
    *(0.0,) * (TRELLIS_BOOK - len(CODEBOOKS)),
    *itertools.chain.from_iterable(TRELLIS_TABLES.values()),
)
"""``narrow_rows.CODEBOOKS``, and from ``TRELLIS_BOOK`` on ``TRELLIS_TABLES``."""


def load_codebook(device: torch.device) -> torch.Tensor:
    """:data:`CODEBOOK`, float32 on a device; the host does not wait for a GPU."""
    book = torch.tensor(CODEBOOK, dtype=torch.float32, device="cpu")
    if device.type != "cuda":
        return book.to(device)
    # torch keeps the pinned memory until the copy is done.
    return book.pin_memory().to(device, non_blocking=True)
