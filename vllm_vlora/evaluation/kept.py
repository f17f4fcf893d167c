"""A model as it was, whatever happened to it meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept(model: nn.Module, written: Iterable[str] = ()) -> Iterator[None]:
    """Run what wraps, replaces or resizes a model's layers, and put all of it back bit by bit.

    Layers, parameters, buffers, hooks, other attributes of the layers, and configurations are what they
    were, also after an exception. Nothing is copied but what ``written`` names.

    Args:
        model: the model; no part of it may be used from elsewhere meanwhile.
        written: names of parameters whose values may be overwritten in place; others may be replaced.
    """
    layers = list(model.modules())
    attributes = [(vars(layer), dict(vars(layer))) for layer in layers]
    # A layer's parameters, children and hooks are containers among its attributes.
    containers = [
        (value, value.copy())
        for _, before in attributes
        for value in before.values()
        if isinstance(value, dict | set)
    ]
    configs = [vars(layer.config) for layer in layers if hasattr(layer, "config")]
    states = [*attributes, *containers, *((config, dict(config)) for config in configs)]
    tensors = [*model.parameters(), *model.buffers()]
    values = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]
    own = dict(model.named_parameters(remove_duplicate=False))
    for parameter in {id(own[name]): own[name] for name in written if name in own}.values():
        parameter.data = parameter.data.clone()
    try:
        yield
    finally:
        for state, before in states:
            state.clear()
            state.update(before)
        for tensor, data, trained in values:
            tensor.data = data
            tensor.requires_grad_(trained)
