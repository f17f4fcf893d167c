"""LoRA factors that are in memory, read by the rules that an adapter's folder is read by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from vllm_vlora.adapters.peft_config import check_config, rank_options
from vllm_vlora.adapters.peft_folder import (
    Factors,
    LoRAModule,
    check_targets,
    describe_module,
    sort_tensors,
)
from vllm_vlora.adapters.saved_tensors import is_base_copy
from vllm_vlora.adapters.tensor_names import PREFIX, parse_lora
from vllm_vlora.adapters.weights_files import StoredTensor
from vllm_vlora.errors import AdapterError
from vllm_vlora.representations.spec import fits_float32

LoRATensors: TypeAlias = Mapping[str, torch.Tensor] | Mapping[str, Sequence[torch.Tensor]]
"""PEFT's names -> tensors, as a state dict has them, or module -> (A [r, d_in], B [d_out, r])."""

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NO_FILE = Path()


def read_state_dict(
    tensors: LoRATensors, config: Any, alpha: float | None, where: str
) -> list[tuple[LoRAModule, Factors]]:
    """The modules of an adapter in memory, sorted by name, with (A [r, d_in], B [d_out, r]), unscaled.

    Values are not looked at. Copies of the base model's own weights are passed over, as everywhere.

    Args:
        tensors: the factors; on any device.
        config: PEFT's ``LoraConfig``, or what ``adapter_config.json`` holds; None with ``alpha``.
        alpha: of every module, whose scale is alpha / rank; None with ``config``.
        where: what is named in messages.

    Raises:
        AdapterError: they contradict each other, or are not plain LoRA; one line.
    """
    global _last
    if (config is None) == (alpha is None):
        raise AdapterError(f"{where}: give the adapter's alpha= or its config=, one of the two")
    flat = dict(_flat(tensors, where))
    options = _options(config, where) if alpha is None else _uniform(flat, alpha, where)
    shapes = {key: (tensor.dtype, tensor.shape) for key, tensor in flat.items()}
    last = _last
    if last is None or (last.options, last.shapes) != (_in_order(options), shapes):
        # A copy, since the caller may change what is in the mapping.
        options = deepcopy(options)
        _last = last = _Adapter(_in_order(options), shapes, _modules(shapes, options, where))
    return [(module, (flat[a], flat[b])) for module, a, b in last.modules]


class _Adapter(NamedTuple):
    """What is known of an adapter without its values.

    Attributes:
        options: PEFT's, by ``_in_order``. shapes: key -> dtype and shape.
        modules: with the keys of their A and B.
    """

    options: Mapping[str, Any]
    shapes: Mapping[str, tuple[torch.dtype, torch.Size]]
    modules: list[tuple[LoRAModule, str, str]]


# What was read last: a loop gives one adapter with other values again and again, and for an 8B model's
# to look at its names took a sixth of publishing it.
_last: _Adapter | None = None


def _in_order(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, mappings as lists: of patterns the first that matches counts, and == ignores order."""
    return {
        option: list(value.items()) if isinstance(value, Mapping) else value
        for option, value in options.items()
    }


def _modules(
    shapes: Mapping[str, tuple[torch.dtype, torch.Size]], options: Mapping[str, Any], where: str
) -> list[tuple[LoRAModule, str, str]]:
    """The modules, sorted by name, with the keys of their A and B."""
    check_config(options, where)
    header = {
        key: StoredTensor(_DTYPES.get(dtype, str(dtype)), tuple(shape), _NO_FILE, key)
        for key, (dtype, shape) in shapes.items()
    }
    pairs, whole = sort_tensors(header, options, where)
    for name in whole:
        if not is_base_copy(name):
            raise AdapterError(
                f"{where}: tensor {name!r} is no LoRA factor, and only these can be given from memory; "
                "leave it out, or serve the adapter from a checkpoint"
            )
    if not pairs:
        raise AdapterError(
            f"{where}: no LoRA tensors; name them as PEFT does, or give a module's A, B"
        )
    check_targets(options, {name: (pair.kind, pair.trained) for name, pair in pairs.items()}, where)
    return [
        (
            describe_module(name, pairs[name], options, where),
            pairs[name].sides["A"].key,
            pairs[name].sides["B"].key,
        )
        for name in sorted(pairs)
    ]


def _flat(tensors: LoRATensors, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under PEFT's name."""
    if not isinstance(tensors, Mapping):
        raise AdapterError(
            f"{where}: the tensors are {type(tensors).__name__}; give a mapping, as "
            "get_peft_model_state_dict makes it"
        )
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            yield name, _whole(value, name, where)
            continue
        sides = tuple(value) if isinstance(value, Sequence) else ()
        if len(sides) != 2 or not all(isinstance(side, torch.Tensor) for side in sides):
            raise AdapterError(
                f"{where}: {name!r} is {type(value).__name__}; give a tensor under PEFT's name, or a "
                "module's two factors (A, B)"
            )
        for side, tensor in zip("AB", sides):
            yield (
                f"{PREFIX}{name.removeprefix(PREFIX)}.lora_{side}.weight",
                _whole(tensor, name, where),
            )


def _whole(tensor: torch.Tensor, name: str, where: str) -> torch.Tensor:
    """A tensor that has all its values here."""
    if hasattr(tensor, "full_tensor") or tensor.is_meta:
        raise AdapterError(
            f"{where}: {name!r} is a part of a sharded tensor, or has no values here; gather it on all "
            "ranks first (full_tensor())"
        )
    return tensor.detach()


def _options(config: Any, where: str) -> dict[str, Any]:
    options = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(options, Mapping):
        raise AdapterError(
            f"{where}: config is {type(config).__name__}; give PEFT's LoraConfig, or a mapping of its "
            "options"
        )
    # What says nothing of another kind is LoRA: a caller writes r and lora_alpha.
    return {"peft_type": "LORA", **options}


def _uniform(tensors: Mapping[str, torch.Tensor], alpha: float, where: str) -> dict[str, Any]:
    """The config of an adapter whose modules all have one alpha, with the ranks that they have."""
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not fits_float32(alpha):
        # Python writes no integer of thousands of digits.
        shown = (
            "too large" if isinstance(alpha, int) and abs(alpha) >= 1 << 64 else f"{alpha!r:.100}"
        )
        raise AdapterError(f"{where}: alpha is {shown}; give a number that float32 holds")
    ranks = {
        lora.module: (max(len(tensor), 1), alpha)
        for key, tensor in tensors.items()
        if (lora := parse_lora(key)) is not None and lora.side == "A" and tensor.ndim
    }
    if not ranks:
        raise AdapterError(
            f"{where}: no LoRA tensors; name them as PEFT does, or give a module's A, B"
        )
    return {"peft_type": "LORA", **rank_options(ranks)}
