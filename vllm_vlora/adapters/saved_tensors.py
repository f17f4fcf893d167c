"""Tensors of an adapter that are not LoRA: what each is to the base model, by PEFT's rules.

An adapter's file holds, beside A and B, modules that were trained whole (``modules_to_save``, heads of a
task type) and copies of the base model's own weights. PEFT writes copies where LoRA is on an embedding or
the language-model head ("embed_tokens.base_layer.weight"), and where the vocabulary was resized. On
loading,

- a module that was saved whole takes that module's place and no other's: a layer that is tied to it
  keeps the base model's weight;
- any other tensor is loaded into the base model's own weight, and so into every layer that shares it.

Source: ``peft.utils.save_and_load`` and ``peft.utils.other.ModulesToSaveWrapper``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_vlora.adapters.peft_config import is_saved_module

_PREFIX = "base_model.model."
# What PEFT's wrappers put before the tensors of the layer that they wrap, besides ``modules_to_save``.
_ORIGINALS = ("base_layer", "original_module")
_DUPLICATE = "modules_to_save"


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that is not LoRA, and what it replaces.

    Attributes:
        key: its name in the adapter's file.
        name: of the tensor of the base model that it replaces, "model.embed_tokens.weight".
        whole: True for a module that was saved whole, which replaces this module's tensor alone; False
            for a tensor of the base model itself, which replaces it for every layer that shares it.
    """

    key: str
    name: str
    whole: bool


def saved_tensors(keys: Iterable[str], config: Mapping[str, Any]) -> list[SavedTensor]:
    """What the tensors of an adapter are that are not LoRA; those that PEFT ignores are left out.

    A file of a resized vocabulary has a module that was saved whole twice, once under
    "modules_to_save", from where PEFT does not read it.

    Args:
        keys: as ``Adapter.extra`` and a checkpoint's task have them.
        config: the adapter's ``adapter_config.json``.

    Examples:
        >>> keys = ["base_model.model.lm_head.base_layer.weight", "base_model.model.score.weight"]
        >>> for tensor in saved_tensors(keys, {"modules_to_save": ["score"]}):
        ...     print(tensor.name, tensor.whole)
        lm_head.weight False
        score.weight True
    """
    found = []
    for key in keys:
        name = key.removeprefix(_PREFIX)
        *path, last = name.split(".")
        if _DUPLICATE in path:
            continue
        original = is_base_copy(key)
        if original:
            name = ".".join([*(part for part in path if part not in _ORIGINALS), last])
        found.append(SavedTensor(key, name, not original and is_saved_module(key, config)))
    return found


def is_base_copy(key: str) -> bool:
    """Whether a tensor is a copy of the base model's weight under a layer that PEFT wrapped.

    Engines leave it out, as vLLM does: what it copies is in the base model.

    Examples:
        >>> is_base_copy("base_model.model.model.embed_tokens.base_layer.weight")
        True
        >>> is_base_copy("base_model.model.score.weight")
        False
    """
    return any(f".{part}." in key for part in _ORIGINALS)
