"""Networks of routers that know nothing."""

from __future__ import annotations

import torch


def network(outputs: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A small one with random numbers, as a checkpoint keeps it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "idf": draw(64).abs(),
        "net.0.weight": draw(5, 64),
        "net.0.bias": draw(5),
        "net.2.weight": draw(outputs, 5),
        "net.2.bias": draw(outputs),
    }
