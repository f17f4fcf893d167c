"""The vocabulary that an adapter was trained with, where it was resized, in the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.adapters.saved_tensors import saved_tensors
from vllm_vlora.errors import AdapterError
from vllm_vlora.model.heads import vocabulary_layers


def fit_vocabulary(model: Any, adapters: Sequence[Adapter]) -> None:
    """Give the model as many tokens as the adapters' embeddings have; the rows are the adapters' to fill.

    Raises:
        AdapterError: the adapters' embeddings are of different sizes, or a file lacks one that other
            tokens need.
    """
    layers, present = vocabulary_layers(model), tokens_of(model)
    sizes = {adapter.path: _tokens(adapter, layers) or present for adapter in adapters}
    wanted = max(sizes.values())
    if set(sizes.values()) == {present}:
        return
    if len(set(sizes.values())) > 1:
        named = " and ".join(f"{path} {tokens}" for path, tokens in sizes.items())
        raise AdapterError(f"vocabularies differ: {named} tokens; give the task's own original")
    for adapter in adapters:
        missing = _missing(adapter, layers)
        if missing:
            raise AdapterError(
                f"{adapter.path}: it was trained with {wanted} tokens, the model has {present}, and the "
                f"rows of {missing[0]} are not in its file; give the resized base model, or save the "
                "adapter with save_embedding_layers=True"
            )
    resize_vocabulary(model, wanted)


def tokens_of(model: Any) -> int:
    """Rows of the model's input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def resize_vocabulary(model: Any, tokens: int, *, mean: bool = False) -> None:
    """Resize embeddings and output to so many tokens, the same way every time.

    Args:
        mean: new rows are drawn around the mean of all, as transformers does by default.
    """
    # All devices are seeded, so all are put back.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        model.resize_token_embeddings(tokens, mean_resizing=mean)


def _tokens(adapter: Adapter, layers: Mapping[str, Any]) -> int | None:
    """Rows of the embeddings that the adapter names; None where it names none."""
    rows = {
        saved.key: adapter.extra[saved.key][1][0]
        for saved in saved_tensors(adapter.extra, adapter.config)
        if saved.name.removesuffix(".weight") in layers
    }
    for name, module in adapter.modules.items():
        if name in layers:
            rows[name] = module.d_in if module.kind == "embedding" else module.d_out
    if len(set(rows.values())) > 1:
        named = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise AdapterError(f"{adapter.path}: its vocabularies differ: {named}; save it again")
    return next(iter(rows.values()), None)


def _missing(adapter: Adapter, layers: Mapping[str, Any]) -> list[str]:
    """Embeddings and outputs whose weight an adapter's file does not bring, under no tied name either."""
    saved = {one.name: one for one in saved_tensors(adapter.extra, adapter.config)}
    base = {
        id(layer.weight)
        for name, layer in layers.items()
        if f"{name}.weight" in saved and not saved[f"{name}.weight"].whole
    }
    return [
        name
        for name, layer in layers.items()
        if f"{name}.weight" not in saved and id(layer.weight) not in base
    ]
