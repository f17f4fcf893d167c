"""The rows of a batch, and a layer whose weights differ between them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.wording import count_of


class Batch:
    """What a model's forward is given while it runs: against it layers hold the tokens that they see.

    Attributes:
        rows: B, of the first argument with two dimensions; 0 outside the model's forward, as in an
            encoder that ``generate`` calls by itself, and where no argument is such a tensor.
        counts: what else of whole rows a layer may see: the first dimension of every other tensor, and
            of each the B * T of B rows of T tokens.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.counts: tuple[int, ...] = ()

    def install(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Watch the model's forward until the handles are removed."""
        return [
            model.register_forward_pre_hook(self._see, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        ]

    def repeats(self, x: torch.Tensor, rows: int) -> int:
        """How often each of ``rows`` tasks stands in ``x``: beams, windows and tokens repeat a row.

        Raises:
            ModelMismatchError: the layer sees no multiple of the rows, or a part of the batch's tokens.
        """
        count = x.shape[0]
        if count % rows:
            raise ModelMismatchError(
                f"a layer sees {count_of(count, 'row')} where {rows} tasks were set; "
                "give one task for each row of the batch, and a model whose first dimension is the batch"
            )
        # Tokens last: compiled code is compiled for every length that it is compared with. What has more
        # dimensions keeps rows together, as windows of an image do.
        if (
            x.ndim == 2
            and rows > 1
            and count
            and self.rows
            and count != self.rows
            and count not in self.counts
        ):
            raise ModelMismatchError(
                f"a layer sees {count} tokens, neither one a row nor all of the model's batch of "
                f"{self.rows} rows, as experts see some of the tokens, and nothing tells whose they are; "
                "use set_task"
            )
        return count // rows

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim > 1]
        self.rows = given[0].shape[0] if given else 0
        self.counts = tuple(count for x in given for count in (x.shape[0], x.shape[0] * x.shape[1]))

    def _forget(self, *_: Any) -> None:
        self.rows, self.counts = 0, ()


class RowLayer:
    """Takes the place of a layer's ``forward``: each row of its input is computed with its own weights.

    Args:
        layer: has no layers below it, and computes every row of its first argument for itself.
        variants: the layer's tensors by their names, complete, one for each kind of row.
        rows: the variant of each row. A batch of more rows repeats each of them.
        batch: what the model is given.
    """

    def __init__(
        self,
        layer: nn.Module,
        variants: Sequence[Mapping[str, torch.Tensor]],
        rows: Sequence[int],
        batch: Batch,
    ) -> None:
        self._batch = batch
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
        repeats = self._batch.repeats(input, self._count)
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
