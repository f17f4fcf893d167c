"""What a subspace takes, as it would be saved, against its adapters."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypedDict

from torch import Tensor

from vllm_vlora.errors import OptionError
from vllm_vlora.subspace.layers import FlatLayer, Layer
from vllm_vlora.subspace.storage import StoredSubspace, original_nbytes, stored_nbytes


class CompressionStats(TypedDict):
    """What :meth:`SharedSubspace.compression_stats` returns."""

    components_per_layer: dict[str, tuple[int, int]]
    total_params_compressed: int
    total_params_original: int
    total_bytes_compressed: int
    total_bytes_original: int
    compression_ratio: float
    num_tasks: int
    num_layers: int


def compression_stats(stored: StoredSubspace) -> CompressionStats:
    """Sizes of the files that saving makes, and of the adapters' LoRA weights at 16 bits each.

    Raises:
        OptionError: a dtype that cannot be stored.
    """
    layers, tasks = stored.layers, stored.tasks.values()
    original = sum(original_nbytes(layers, task, stored.rank) for task in tasks)
    nbytes = stored_nbytes(stored)
    own = sum(
        tensor.numel()
        for task in tasks
        for side in (task.loadings_a, task.loadings_b)
        for tensor in side.values()
    )
    return CompressionStats(
        components_per_layer={name: _side_widths(layer) for name, layer in layers.items()},
        total_params_compressed=own + sum(_shared_numbers(layer) for layer in layers.values()),
        total_params_original=original // 2,
        total_bytes_compressed=nbytes,
        total_bytes_original=original,
        compression_ratio=original / nbytes,
        num_tasks=len(stored.tasks),
        num_layers=len(layers),
    )


def full_stack_stats(
    stats: CompressionStats,
    base_model_params: int | None,
    base_model_bits: int,
    quantized_bits: int,
) -> dict[str, Any]:
    """Bytes of base model and adapters together, before and after.

    Raises:
        OptionError: a number that is not positive.
    """
    result: dict[str, Any] = {
        "adapter": stats,
        "adapter_bytes_compressed": stats["total_bytes_compressed"],
        "adapter_bytes_original": stats["total_bytes_original"],
    }
    if base_model_params is None:
        return result
    if min(base_model_params, base_model_bits, quantized_bits) <= 0:
        raise OptionError(
            f"base_model_params {base_model_params}, base_model_bits {base_model_bits} and "
            f"quantized_bits {quantized_bits} must be positive"
        )
    before = base_model_params * base_model_bits / 8
    after = base_model_params * quantized_bits / 8
    total_before = before + stats["total_bytes_original"]
    total_after = after + stats["total_bytes_compressed"]
    return result | {
        "base_model": {
            "params": base_model_params,
            "original_bytes": before,
            "quantized_bytes": after,
            "compression_ratio": before / after,
        },
        "total_original_bytes": total_before,
        "total_compressed_bytes": total_after,
        "total_compression_ratio": total_before / total_after,
    }


def _side_widths(layer: Layer) -> tuple[int, int]:
    """(k of A's side, k of B's side)."""
    first, second = layer.widths
    return (first, second) if isinstance(layer, FlatLayer) else (second, first)


def _shared_numbers(layer: Layer) -> int:
    held = (getattr(layer, field.name) for field in fields(layer) if "singular" not in field.name)
    return sum(value.numel() for value in held if isinstance(value, Tensor))
