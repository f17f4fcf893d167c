"""The table in which kernels look up what codes stand for."""

from __future__ import annotations

import itertools

from vllm_vlora.narrow_rows import CODEBOOKS
from vllm_vlora.trellis_tables import TRELLIS_TABLES

TRELLIS_BOOK = 32
CODEBOOK = (
    *CODEBOOKS,
    *(0.0,) * (TRELLIS_BOOK - len(CODEBOOKS)),
    *itertools.chain.from_iterable(TRELLIS_TABLES.values()),
)
"""``narrow_rows.CODEBOOKS``, and from ``TRELLIS_BOOK`` on ``TRELLIS_TABLES``."""
