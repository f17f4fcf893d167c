"""Adapters under the names that a loaded model has for their layers (``adapters.module_names``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vllm_vlora.adapters.module_names import find_name
from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.subspace.weights import LoRAWeights, save_adapter

_PREFIX = "base_model.model."


def under_model_names(folder: Path, layers: Iterable[str], scratch: Path) -> Path:
    """A PEFT folder that names layers as the model does: ``folder`` itself, or a copy at ``scratch``.

    PEFT leaves out, with no more than a warning, what it finds no layer of that name for.

    Args:
        layers: the model's. A module that none of them can be keeps its name.
        scratch: where a copy may be written; its parent exists.

    Raises:
        AdapterError: the adapter cannot be read.
    """
    adapter = open_adapter(folder)
    own = {name: name for name in layers}
    names = {name: find_name(name, own.get) or name for name in adapter.modules}
    if all(old == new for old, new in names.items()):
        return folder
    weights = LoRAWeights.from_adapter(adapter).under_names(
        {new: old for old, new in names.items()}
    )
    extra = {}
    for key, tensor in weights.extra.items():
        module, _, part = key.removeprefix(_PREFIX).rpartition(".")
        extra[f"{_PREFIX}{find_name(module, own.get) or module}.{part}"] = tensor
    return save_adapter(replace(weights, extra=extra), scratch)
