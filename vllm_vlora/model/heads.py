"""Tensors that a task brings whole, such as classifier heads, in the model's place while it is active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from vllm_vlora.errors import ModelMismatchError

_PEFT_PREFIX = "base_model.model."


class HeadSwitch:
    """Puts tasks' own tensors into a model and its original ones back.

    The model's tensors are overwritten in place; originals are copied when they are first replaced.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals: dict[str, torch.Tensor] = {}
        self.shown: Mapping[str, torch.Tensor] = {}

    def find(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors under the names that the model has for them; nothing is changed.

        Args:
            tensors: under PEFT's names, "base_model.model.score.weight".

        Raises:
            ModelMismatchError: the model has no such tensor, or one of another shape.
        """
        if not tensors:
            return {}
        own = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        found = {}
        for name, tensor in tensors.items():
            match = next((c for c in _candidates(name, own) if c in own), None)
            if match is None or own[match].shape != tensor.shape:
                state = "has none" if match is None else f"has {tuple(own[match].shape)} there"
                raise ModelMismatchError(
                    f"the task brings {name} of shape {tuple(tensor.shape)} and the model {state}; load "
                    "the base model with the task's head (the same number of labels)"
                )
            found[match] = tensor
        return found

    def show(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put these, as ``find`` named them, into the model, and the originals of all others back."""
        if not tensors and not self.shown:
            return
        own = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        with torch.no_grad():
            for name in self.shown:
                if name not in tensors:
                    own[name].copy_(self._originals[name])
            for name, tensor in tensors.items():
                if name not in self._originals:
                    self._originals[name] = own[name].detach().clone()
                own[name].copy_(tensor)
        self.shown = tensors


def _candidates(name: str, own: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Names that a tensor may have in the model: PEFT's without its prefix, longer, or shorter."""
    plain = name.removeprefix(_PEFT_PREFIX)
    yield plain
    yield from (found for found in own if found.endswith("." + plain))
    parts = plain.split(".")
    yield from (".".join(parts[start:]) for start in range(1, len(parts) - 1))
