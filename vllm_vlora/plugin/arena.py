"""Device memory of tasks: taken from the device once, given out and taken back in blocks.

It is all there before vLLM measures what is left for its KV cache, so that a task that comes later can
neither find the device full nor fill it.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import torch

# Bytes between the starts of two blocks: what the widest loads of a GPU are aligned to, and then some.
ALIGNMENT = 256
# Bytes that are taken at once while it grows: a quarter of what it has, within these. A larger block gets
# a chunk of its own.
LEAST_CHUNK, MOST_CHUNK = 1 << 20, 64 << 20


def aligned(nbytes: int) -> int:
    """Bytes that a block of so many takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class Block:
    """Memory that was given out: ``memory`` is uint8, of the length asked for, rounded up."""

    memory: torch.Tensor
    chunk: int
    start: int


class Arena:
    """Chunks of a device's memory, of which blocks are given out, the tightest hole first.

    Args:
        device: where they are.
        limit: bytes of all chunks.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._limit = device, limit
        self._chunks: list[torch.Tensor] = []
        # (bytes, chunk, start), in that order.
        self._holes: list[tuple[int, int, int]] = []
        self.used = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.nbytes for chunk in self._chunks)

    @property
    def largest(self) -> int:
        """Bytes of the largest block that it could ever give."""
        return max((chunk.nbytes for chunk in self._chunks), default=0)

    def grow(self, nbytes: int) -> bool:
        """Take a chunk of so many bytes from the device; False where the limit forbids it."""
        nbytes = aligned(nbytes)
        if self.nbytes + nbytes > self._limit:
            return False
        if nbytes:
            chunk = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            if chunk.device.type == "cpu":
                chunk.zero_()  # Until it is written to, the memory is not taken.
            self._chunks.append(chunk)
            insort(self._holes, (nbytes, len(self._chunks) - 1, 0))
        return True

    def seal(self, nbytes: int) -> None:
        """Take so many bytes more, beside the limit, in one chunk: the last."""
        self._limit = self.nbytes + aligned(nbytes)
        self.grow(nbytes)

    def allocate(self, nbytes: int) -> Block | None:
        """A block, or None where no hole is large enough."""
        size = aligned(nbytes)
        for place, (hole, chunk, start) in enumerate(self._holes):
            if hole >= size:
                del self._holes[place]
                if hole > size:
                    insort(self._holes, (hole - size, chunk, start + size))
                self.used += size
                return Block(self._chunks[chunk][start : start + size], chunk, start)
        return None

    def allocate_growing(self, nbytes: int) -> Block | None:
        """A block, for which it may grow; None where the limit forbids it."""
        found = self.allocate(nbytes)
        if found is None:
            left = (self._limit - self.nbytes) // ALIGNMENT * ALIGNMENT
            chunk = min(MOST_CHUNK, max(LEAST_CHUNK, self.nbytes // 4), left)
            if self.grow(max(aligned(nbytes), chunk)):
                return self.allocate(nbytes)
        return found

    def free(self, block: Block) -> None:
        """Take a block back; the holes beside it become one with it."""
        size, start = block.memory.nbytes, block.start
        self.used -= size
        for hole in [hole for hole in self._holes if hole[1] == block.chunk]:
            if hole[2] + hole[0] == start or start + size == hole[2]:
                self._holes.remove(hole)
                start, size = min(start, hole[2]), size + hole[0]
        insort(self._holes, (size, block.chunk, start))
