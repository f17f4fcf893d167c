"""What a router sees of a text: how often which runs of a few bytes stand in it.

A text is folded (lower case, one blank for each stretch of white space, one blank around it), and every
run of 3, 4 and 5 bytes of its UTF-8 is counted in one of ``buckets`` places, which a hash of the run
says. A count c becomes log(1 + c) idf, with idf = log((1 + n) / (1 + d)) + 1 for a place that d of the n
texts trained on have, and the row is scaled to length 1.

No tokenizer, no language and no list of words is part of it, and it costs an API server some hundred
microseconds. A router is good for these very numbers, so they are never changed: others get another name
(``checkpoint.router_files.TEXT_FEATURES``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

BUCKETS = 1 << 14
MOST_CHARACTERS = 8192
"""Of a longer text only this much is looked at, half of it from each end."""
_SIZES = (3, 4, 5)
_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_SHIFT = np.uint64(33)


def counts(text: str, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The places that a text has, in order, and how often; int64 and float32."""
    if len(text) > MOST_CHARACTERS:
        text = text[: MOST_CHARACTERS // 2] + text[-MOST_CHARACTERS // 2 :]
    folded = f" {' '.join(text.lower().split())} ".encode(errors="replace")
    data = np.frombuffer(folded, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    runs = np.zeros(len(data), dtype=np.uint64)
    found = []
    for size in range(1, max(_SIZES) + 1):
        if size > len(data):
            break
        runs = runs[: len(data) - size + 1] * _PRIME + data[size - 1 :]
        if size in _SIZES:
            found.append(_spread(runs + np.uint64(size)) % np.uint64(buckets))
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    places, times = np.unique(np.concatenate(found), return_counts=True)
    return places.astype(np.int64), times.astype(np.float32)


def features(text: str, idf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of a text's features, and their values, which are float32 of length 1.

    Args:
        idf: (buckets) float32.
    """
    places, times = counts(text, len(idf))
    values = np.log1p(times) * idf[places]
    length = math.sqrt(float(values @ values))
    return places, values / np.float32(length or 1.0)


def inverse_frequencies(texts: Iterable[str], buckets: int) -> np.ndarray:
    """``idf`` of these texts."""
    having, total = np.zeros(buckets), 0
    for text in texts:
        having[counts(text, buckets)[0]] += 1
        total += 1
    return (np.log((1 + total) / (1 + having)) + 1).astype(np.float32)


class TextRows:
    """Rows of features, of which only what is not 0 is held.

    Args:
        texts: a row each. idf: (buckets) float32.
    """

    device = torch.device("cpu")

    def __init__(self, texts: Sequence[str], idf: np.ndarray) -> None:
        self._rows = [features(text, idf) for text in texts]
        self._buckets = len(idf)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, buckets) float32."""
        found = np.zeros((len(rows), self._buckets), dtype=np.float32)
        for row, number in zip(found, rows.tolist()):
            places, values = self._rows[number]
            row[places] = values
        return torch.from_numpy(found)


def _spread(runs: np.ndarray) -> np.ndarray:
    """The last steps of MurmurHash3, so that every bit of a run tells in the place."""
    runs ^= runs >> _SHIFT
    runs *= _MIX
    runs ^= runs >> _SHIFT
    return runs
