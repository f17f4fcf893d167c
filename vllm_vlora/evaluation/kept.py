"""A model as it was, whatever happened to it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


class _State:
    """What a model consists of at one time; nothing is copied."""

    def __init__(self, model: nn.Module) -> None:
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
        self._states = [*attributes, *containers, *((config, dict(config)) for config in configs)]
        tensors = [*model.parameters(), *model.buffers()]
        self._values = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]

    def restore(self) -> None:
        """Put it back."""
        for state, before in self._states:
            state.clear()
            state.update(before)
        for tensor, data, trained in self._values:
            tensor.data = data
            tensor.requires_grad_(trained)


@contextmanager
def kept(
    model: nn.Module, written: Iterable[str] = ()
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Run what wraps, replaces or resizes a model's layers, and put all of it back bit by bit.

    Layers, parameters, buffers, hooks, other attributes of the layers, and configurations are what they
    were, also after an exception. Nothing is copied but what ``written`` names.

    Yields a function: within the context that it returns the model is as it was, and after it what was
    made of it meanwhile.

    Args:
        model: the model; no part of it may be used from elsewhere meanwhile.
        written: names of parameters whose values may be overwritten in place; others may be replaced.
    """
    before = _State(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    for parameter in {id(own[name]): own[name] for name in written if name in own}.values():
        parameter.data = parameter.data.clone()

    @contextmanager
    def as_it_was() -> Iterator[None]:
        now = _State(model)
        before.restore()
        try:
            yield
        finally:
            now.restore()

    try:
        yield as_it_was
    finally:
        before.restore()
