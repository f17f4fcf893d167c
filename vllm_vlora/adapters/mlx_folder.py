"""Adapters of mlx-lm (Apple's trainer), as PEFT would describe them.

A folder has ``adapters.safetensors`` and an ``adapter_config.json`` of mlx-lm's own. For y = W x it adds

    y + s (x lora_a) lora_b,    lora_a [d_in, r],  lora_b [r, d_out]

which is PEFT's s B A with A = lora_a^T and B = lora_b^T. Its config gives s as ``scale``; early versions
multiplied it with ``alpha`` / r where the config has an ``alpha``.

Source: ``mlx_lm.tuner.lora``, ``mlx_lm.tuner.utils.load_adapters``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_vlora.adapters.peft_config import CONFIG_FILE, check_extra_shape, rank_options
from vllm_vlora.adapters.tensor_names import PREFIX
from vllm_vlora.adapters.weights_files import StoredTensor, read_header
from vllm_vlora.errors import AdapterError
from vllm_vlora.representations.spec import fits_float32

MLX_WEIGHTS = "adapters.safetensors"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")
_SIDES = {"lora_a": "A", "lora_b": "B"}


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a config is mlx-lm's."""
    return "lora_parameters" in config and "peft_type" not in config


def as_peft(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """A config and tensors by PEFT's names, of a folder that mlx-lm wrote.

    Raises:
        AdapterError: no LoRA of linear modules, or the config lacks a number.
    """
    kind = config.get("fine_tune_type") or "lora"
    if kind != "lora" or config.get("use_dora"):
        raise AdapterError(
            f"{folder}: fine_tune_type is {kind!r}; only mlx-lm's 'lora' is W + s B A"
        )
    header = read_header(folder / MLX_WEIGHTS)
    if not header:
        raise AdapterError(f"{folder}: {MLX_WEIGHTS} holds no tensors; nothing to read")
    tensors: dict[str, StoredTensor] = {}
    ranks: dict[str, int] = {}
    for key, stored in header.items():
        module, _, leaf = key.rpartition(".")
        _check_tensor(module, leaf, stored, str(folder))
        side = _SIDES[leaf]
        flipped = replace(stored, shape=stored.shape[::-1], transposed=True)
        tensors[f"{PREFIX}{module}.lora_{side}.weight"] = flipped
        ranks[module] = stored.shape[1 if side == "A" else 0]
    scale = _scale(config["lora_parameters"], str(folder))
    options = rank_options({name: (rank, scale(rank) * rank) for name, rank in ranks.items()})
    translated = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "base_model_name_or_path": config.get("model"),
        "target_modules": sorted(ranks),
        **options,
    }
    return translated, tensors


def _check_tensor(module: str, leaf: str, stored: StoredTensor, where: str) -> None:
    if leaf not in _SIDES:
        raise AdapterError(f"{where}: tensor {stored.key!r} is none of LoRA's lora_a and lora_b")
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise AdapterError(
            f"{where}: {stored.key!r}: mlx-lm adapts the output layer along with an embedding that "
            "it is tied to, which PEFT's LoRA does not; train without the embedding"
        )
    if len(stored.shape) != 2:
        raise AdapterError(
            f"{where}: tensor {stored.key!r} has shape {list(stored.shape)}: LoRA of mlx-lm's fused "
            "experts is not supported; train without them"
        )
    check_extra_shape(stored.key, stored.shape, where)


def _scale(options: Any, where: str) -> Any:
    """rank -> s."""
    names = [name for name in ("scale", "alpha") if isinstance(options, dict) and name in options]
    values = [options[name] for name in names]
    for name, value in zip(names, values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not fits_float32(value):
            raise AdapterError(f"{where}: {name} of lora_parameters is {value!r}, no number")
    if "scale" not in names:
        raise AdapterError(f"{where}: lora_parameters of {CONFIG_FILE} has no scale; correct it")
    if "alpha" in names:
        scaled = values[0] * values[1]
        if not fits_float32(scaled):
            raise AdapterError(
                f"{where}: scale times alpha of lora_parameters is {scaled}, no number"
            )
        return lambda rank: scaled / rank
    return lambda rank: float(values[0])
