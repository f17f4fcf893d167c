"""Synthetic adapters of one linear, as PEFT folders, whose spectrum falls like that of real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

MODULE = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Size:
    """A collection: ``adapters`` adapters of ``rank`` on one d_out x d_in linear."""

    d_in: int
    d_out: int
    adapters: int
    rank: int

    @property
    def adapter_nbytes(self) -> int:
        """Of one adapter's float32 factors."""
        return 4 * self.rank * (self.d_in + self.d_out)

    def __str__(self) -> str:
        return f"{self.d_in} -> {self.d_out}, {self.adapters} adapters"


@dataclass(frozen=True)
class Spectrum:
    """How much adapters share.

    The rows of A (and the columns of B, with directions of their own) are

        a_l = l^(-rank_decay / 2) (sum_j z_lj w_j s_j + own e_l),     w_j ~ j^(-decay), ||w|| = 1

    with ``shared`` orthonormal directions s_j common to all adapters, z standard normal and e_l a
    random vector of norm about one: neither low-rank together nor noise. Of delta_W about
    1 / (1 + own^2)^2 of the energy lies in the shared directions, spread over all of them.
    """

    shared: int = 192
    decay: float = 0.5
    own: float = 0.5
    rank_decay: float = 0.5
    seed: int = 0


def write_collection(folder: Path, size: Size, spectrum: Spectrum) -> list[Path]:
    """Write the PEFT folders, float32 as PEFT saves what it trained; returns them in order."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "synthetic",
        "r": size.rank,
        "lora_alpha": 2 * size.rank,
        "target_modules": [MODULE.rpartition(".")[2]],
        "bias": "none",
    }
    paths = []
    for number, (a, b) in enumerate(_factors(size, spectrum)):
        path = folder / f"adapter-{number:04d}"
        path.mkdir(parents=True)
        prefix = f"base_model.model.{MODULE}"
        tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        paths.append(path)
    return paths


def _factors(size: Size, spectrum: Spectrum) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(spectrum.seed)
    shared = min(spectrum.shared, size.d_in, size.d_out)
    directions = [
        torch.linalg.qr(torch.randn(d, shared, generator=generator))[0].T.contiguous()
        for d in (size.d_in, size.d_out)
    ]
    weights = torch.arange(1, shared + 1) ** -spectrum.decay
    weights /= weights.norm()
    levels = torch.arange(1, size.rank + 1)[:, None] ** (-spectrum.rank_decay / 2)
    for _ in range(size.adapters):
        sides = []
        for common in directions:
            width = common.shape[1]
            mixed = (torch.randn(size.rank, shared, generator=generator) * weights) @ common
            private = torch.randn(size.rank, width, generator=generator) / width**0.5
            sides.append(0.1 * levels * (mixed + spectrum.own * private))
        yield sides[0], sides[1].T.contiguous()


def describe(spectrum: Spectrum) -> dict[str, float]:
    """The generator's settings, for the report."""
    return asdict(spectrum)
