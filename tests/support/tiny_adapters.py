"""Tiny LoRA adapters, their PEFT folders and a model that they fit, for tests of the subspace API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_vlora.subspace.weights import LoRAWeights, save_adapter

SHAPES: dict[str, tuple[int, int]] = {"layers.0.q_proj": (12, 8), "layers.0.v_proj": (12, 6)}
"""Layer -> (d_in, d_out)."""
RANK, ALPHA = 2, 4


def tiny_config(rank: int = RANK, alpha: float = ALPHA, **options: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "org/base",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        **options,
    }


def tiny_weights(
    seed: int,
    *,
    rank: int = RANK,
    alpha: float = ALPHA,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    **options: Any,
) -> LoRAWeights:
    """One adapter; ``options`` are further entries of its config.

    ``spread`` below 1 makes adapters of different seeds resemble each other: each is
    ``(1 - spread)`` of a common adapter and ``spread`` of its own.
    """
    lora_a, lora_b = {}, {}
    own = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(12345)
    for name, (d_in, d_out) in shapes.items():
        a, b = (
            torch.randn(shape, generator=own) * spread
            + torch.randn(shape, generator=common) * (1 - spread)
            for shape in ((rank, d_in), (d_out, rank))
        )
        lora_a[name], lora_b[name] = a.to(dtype), (0.1 * b).to(dtype)
    return LoRAWeights(list(shapes), lora_a, lora_b, rank, tiny_config(rank, alpha, **options))


def tiny_adapters(count: int = 4, **options: Any) -> list[LoRAWeights]:
    """Adapters of different seeds, made as ``tiny_weights`` makes them."""
    return [tiny_weights(seed, **options) for seed in range(count)]


def save_tiny_adapters(folder: Path, adapters: list[LoRAWeights]) -> list[str]:
    """Write each as the PEFT folder ``folder/task_N``; returns the folders."""
    return [
        str(save_adapter(weights, folder / f"task_{place}"))
        for place, weights in enumerate(adapters)
    ]


def delta_w(weights: LoRAWeights, layer: str) -> torch.Tensor:
    """scale * B A of a layer, (d_out, d_in) float64."""
    return weights.scale(layer) * weights.lora_b[layer].double() @ weights.lora_a[layer].double()


class TinyBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(12, 8)
        self.v_proj = torch.nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.v_proj(x)], dim=-1)


class TinyModel(torch.nn.Module):
    """(B, 12) -> (B, 14), with the layers that the tiny adapters adapt."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = torch.nn.ModuleList([TinyBlock()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)
