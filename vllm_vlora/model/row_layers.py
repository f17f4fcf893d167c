"""A layer whose weights differ between the rows of a batch."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.wording import count_of


def repeats_of(x: torch.Tensor, rows: int) -> int:
    """How often each of ``rows`` tasks stands in a batch: beams and flattened tokens repeat a row.

    Raises:
        ModelMismatchError: the layer sees a batch that is no multiple of the rows.
    """
    if x.shape[0] % rows:
        raise ModelMismatchError(
            f"a layer sees {count_of(x.shape[0], 'row')} where {rows} tasks were set; "
            "give one task for each row of the batch, and a model whose first dimension is the batch"
        )
    return x.shape[0] // rows


class RowLayer:
    """Takes the place of a layer's ``forward``: each row of its input is computed with its own weights.

    Args:
        layer: has no layers below it, and computes every row of its first argument for itself.
        variants: the layer's tensors by their names, complete, one for each kind of row.
        rows: the variant of each row. A batch of more rows repeats each of them.
    """

    def __init__(
        self,
        layer: nn.Module,
        variants: Sequence[Mapping[str, torch.Tensor]],
        rows: Sequence[int],
    ) -> None:
        self._count = len(rows)
        self._variants = [
            (
                _variant(layer, variants[number]),
                torch.tensor([i for i, n in enumerate(rows) if n == number]),
            )
            for number in dict.fromkeys(rows)
        ]

    def __call__(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the layer returns, (rows, ...)."""
        repeats = repeats_of(input, self._count)
        parts, places = [], []
        for variant, rows in self._variants:
            chosen = (rows[:, None] * repeats + torch.arange(repeats)).flatten().to(input.device)
            parts.append(variant(input[chosen], *args, **kwargs))
            places.append(chosen)
        return torch.cat(parts)[torch.cat(places).argsort()]


def _variant(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The same layer on other tensors, without hooks: these run around the layer itself."""
    made = copy.copy(layer)
    state = vars(made)
    state.pop("forward", None)
    state["_parameters"] = {
        n: tensors[n] if p is not None else p for n, p in layer._parameters.items()
    }
    state["_buffers"] = {n: tensors[n] if b is not None else b for n, b in layer._buffers.items()}
    state["_forward_hooks"], state["_forward_pre_hooks"] = OrderedDict(), OrderedDict()
    return made
