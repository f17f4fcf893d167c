"""Tensors that a task brings whole, such as heads and embeddings, in a model while the task is active."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from vllm_vlora.adapters.saved_tensors import SavedTensor, saved_tensors
from vllm_vlora.errors import ModelMismatchError, OptionError
from vllm_vlora.model.attaching import FLOATS
from vllm_vlora.model.row_layers import Batch, RowLayer

Heads: TypeAlias = Mapping[str, torch.Tensor]
"""Name in the model -> tensor. A weight that several layers share has a name in each of them."""

_NOTHING: Heads = {}
_ABSENT = object()


class Head(nn.Parameter):
    """A task's tensor in the place of a parameter of the model."""


class HeadSwitch:
    """Puts tasks' own tensors into a model and its original ones back.

    Nothing of the model is overwritten. A layer's parameter is exchanged for another while a task is
    shown, so that layers that share a weight are told apart, and afterwards the very original is put
    back. A head may have other rows (tokens, labels) than the model's: sizes that the model names follow.

    Args:
        model: the base model. batch: what it is given, where that is watched.

    Attributes:
        shown: what is shown now: one for all rows of a batch, one for each row, or none.
    """

    def __init__(self, model: nn.Module, batch: Batch | None = None) -> None:
        self._model = model
        self._batch = batch or Batch()
        self._originals: list[tuple[Any, str, Any]] = []
        self._hidden: dict[str, torch.Tensor] = {}
        self.shown: tuple[Heads, ...] = ()

    def find(
        self, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """What of the model a task's tensors replace; nothing is changed.

        Copies of weights that the model has itself are left out.

        Args:
            tensors: under PEFT's names, "base_model.model.score.weight".
            config: the task's ``adapter_config.json``: it tells which modules were saved whole.

        Raises:
            ModelMismatchError: the model has no such tensor, several that may be meant, or one of another
                shape or quantised; or the task has a part only of what belongs together.
        """
        if not tensors:
            return {}
        own = self._own()
        base: dict[str, torch.Tensor] = {}
        whole: dict[str, torch.Tensor] = {}
        for saved in saved_tensors(tensors, config):
            path, tensor = _match(saved, own), tensors[saved.key]
            self._check_fits(saved, tensor, path, own[path])
            if saved.whole:
                whole[path] = tensor
                continue
            for shared in _sharing(path, own):
                if not _is_copy(tensor, base.setdefault(shared, tensor)):
                    raise ModelMismatchError(
                        f"the task brings {saved.key} and other values for {shared}, which are one "
                        "weight in the model; load the base model untied, as it was trained"
                    )
        found = {path: t for path, t in base.items() if not _is_copy(t, own[path])} | whole
        self._check_rows(found, own)
        return found

    def show(self, rows: Sequence[Heads], *, private: bool = False) -> None:
        """Put these into the model, as ``find`` named them, and the originals of all others back.

        Args:
            rows: one for all rows of a batch, or one for each; empty for the model's own.
            private: copy the tensors, so that the model's weights may be written to.

        Raises:
            OptionError: heads that one batch cannot hold. Nothing is changed then.
        """
        rows = tuple(head or _NOTHING for head in rows) if any(rows) else ()
        if not private and [*map(id, rows)] == [*map(id, self.shown)]:
            return
        own = self._own()
        mixed = len({*map(id, rows)}) > 1
        # All that can fail is done before anything is changed.
        if mixed:
            changes = list(self._mixed(rows, own))
        else:
            changes = list(self._exchanged(rows[0], own, private)) if rows else []
        self._check_free(changes)
        self._put_back()
        for owner, name, value in changes:
            self._originals.append((owner, name, _current(owner, name)))
            setattr(owner, name, value)
        self._hidden = {} if mixed or not rows else {path: own[path] for path in rows[0]}
        self.shown = rows

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Do to the hidden originals what ``Module._apply`` did to the model's tensors."""
        for place, (owner, name, original) in enumerate(self._originals):
            if isinstance(original, nn.Parameter):
                original.data = fn(original.data)
            elif isinstance(original, torch.Tensor):
                self._originals[place] = owner, name, fn(original)

    def _own(self) -> dict[str, torch.Tensor]:
        """The model's own tensors, whatever is shown; a shared one under each of its names."""
        parameters = self._model.named_parameters(remove_duplicate=False)
        buffers = self._model.named_buffers(remove_duplicate=False)
        return {**dict(parameters), **dict(buffers), **self._hidden}

    def _check_free(self, changes: Sequence[tuple[Any, str, Any]]) -> None:
        """Another's heads would be taken for the model's own, and put back when they are gone."""
        ours = {(id(owner), name) for owner, name, _ in self._originals}
        layers = [owner for owner, _, _ in changes if isinstance(owner, nn.Module)]
        for layer, (name, shown) in ((one, item) for one in layers for item in _shown_in(one)):
            if (id(layer), name) not in ours and isinstance(shown, Head | RowLayer):
                raise OptionError(
                    "another VLoRAModel, or a training, has a task's head in this model; call its "
                    "clear_task() or detach() first"
                )

    def _put_back(self) -> None:
        for owner, name, original in reversed(self._originals):
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._originals, self._hidden, self.shown = [], {}, ()

    def _layer(self, path: str) -> nn.Module:
        return self._model.get_submodule(path.rpartition(".")[0])

    # --- what fits --------------------------------------------------------------------------------

    def _check_fits(
        self, saved: SavedTensor, tensor: torch.Tensor, path: str, own: torch.Tensor
    ) -> None:
        sized = isinstance(self._layer(path), nn.Linear | nn.Embedding)
        fits = tensor.shape[1:] == own.shape[1:] if sized else tensor.shape == own.shape
        if not fits or tensor.ndim != own.ndim:
            raise ModelMismatchError(
                f"the task brings {saved.key} of shape {tuple(tensor.shape)} and the model has "
                f"{tuple(own.shape)} there; give the base model that it was trained on"
            )
        if tensor.is_floating_point() and own.dtype not in FLOATS:
            # Values that are cast to a dtype of codes are other values.
            raise ModelMismatchError(
                f"the task brings {saved.key} and the model has it quantised, as "
                f"{str(own.dtype).removeprefix('torch.')}; load the base model without quantising it"
            )

    def _check_rows(self, found: Heads, own: Mapping[str, torch.Tensor]) -> None:
        """Refuse a part of what has one number of rows: weight and bias, embedding and output."""
        rows = {
            path: found.get(path, tensor).shape[0] for path, tensor in own.items() if tensor.ndim
        }
        for path in _resized(found, own):
            layer = path.rpartition(".")[0]
            together = [f"{layer}.{part}" for part in ("weight", "bias")]
            if path in self._vocabulary():
                together += self._vocabulary()
            for other in together:
                same_before = other in own and own[other].shape[:1] == own[path].shape[:1]
                if same_before and rows[other] != rows[path]:
                    raise ModelMismatchError(
                        f"the task brings {path} of {rows[path]} rows, and nothing for {other} of "
                        f"{rows[other]}; give the base model with its vocabulary resized to "
                        f"{rows[path]}, as it was trained"
                    )

    def _vocabulary(self) -> list[str]:
        return [f"{name}.weight" for name in vocabulary_layers(self._model)]

    # --- what is changed --------------------------------------------------------------------------

    def _exchanged(
        self, head: Heads, own: Mapping[str, torch.Tensor], private: bool
    ) -> Iterator[tuple[Any, str, Any]]:
        """(owner, attribute, value) for a head that all rows have."""
        # A weight that layers share is one for all of them again.
        placed: dict[tuple[int, int], torch.Tensor] = {}
        for path, tensor in head.items():
            key = id(tensor), id(own[path])
            if key not in placed:
                placed[key] = _placed(tensor, own[path], private)
            yield self._layer(path), path.rpartition(".")[2], placed[key]
        yield from self._sizes(head, own)

    def _mixed(
        self, rows: Sequence[Heads], own: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[Any, str, Any]]:
        """(owner, attribute, value) where rows have different heads: layers that tell rows apart."""
        distinct = list({id(head): head for head in rows}.values())
        numbers = {id(head): number for number, head in enumerate(distinct)}
        paths = dict.fromkeys(path for head in distinct for path in head)
        for layer in dict.fromkeys(path.rpartition(".")[0] for path in paths):
            module = self._model.get_submodule(layer)
            tensors = [_of_layer(layer, head, own) for head in distinct]
            if any(True for _ in module.children()):
                raise OptionError(
                    f"tasks bring tensors of {layer}, a {type(module).__name__} that rows cannot share; "
                    "use set_task"
                )
            outputs = {one["weight"].shape[0] for one in tensors if "weight" in one}
            if len(outputs) > 1 and not isinstance(module, nn.Embedding):
                raise OptionError(
                    f"tasks have {layer} of {sorted(outputs)} rows, whose outputs do not fit one batch; "
                    "use set_task"
                )
            chosen = [numbers[id(head)] for head in rows]
            yield module, "forward", RowLayer(module, tensors, chosen, self._batch)
        yield from self._sizes(distinct[-1], own)

    def _sizes(
        self, head: Heads, own: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[Any, str, Any]]:
        """Numbers of rows that layers, model and configuration name, of what has others now."""
        for path in _resized(head, own):
            layer, rows, before = self._layer(path), head[path].shape[0], own[path].shape[0]
            embeds = isinstance(layer, nn.Embedding)
            yield layer, "num_embeddings" if embeds else "out_features", rows
            config = getattr(self._model, "config", None)
            if config is None or not path.endswith(".weight"):
                continue
            if path in self._vocabulary():
                yield config.get_text_config(), "vocab_size", rows
                if "vocab_size" in vars(self._model):
                    yield self._model, "vocab_size", rows
            elif vars(self._model).get("num_labels") == before:
                yield self._model, "num_labels", rows
                yield config, "id2label", {label: f"LABEL_{label}" for label in range(rows)}
                yield config, "label2id", {f"LABEL_{label}": label for label in range(rows)}


def vocabulary_layers(model: Any) -> dict[str, nn.Module]:
    """Name -> layer of a model's input embedding and of its output, as far as it names them."""
    getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    layers = [getter() for getter in getters if getter is not None]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in layers if id(layer) in names}


def _match(saved: SavedTensor, own: Mapping[str, torch.Tensor]) -> str:
    """The tensor's name in the model: as it is, longer at its front, or shorter there."""
    parts = saved.name.split(".")
    longer = [path for path in own if path.endswith("." + saved.name)]
    shorter = [".".join(parts[start:]) for start in range(1, len(parts) - 1)]
    found = [saved.name] if saved.name in own else longer or [p for p in shorter if p in own][:1]
    if len(found) != 1:
        state = f"has {found[0]} and {found[1]}" if found else "has none"
        raise ModelMismatchError(
            f"the task brings {saved.key} and the model {state}; give the base model that the task was "
            "trained on, with its head"
        )
    return found[0]


def _sharing(path: str, own: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in own.items() if tensor is own[path]]


def _is_copy(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    return tensor.shape == own.shape and torch.equal(tensor.to(own.device, own.dtype), own)


def _resized(head: Heads, own: Mapping[str, torch.Tensor]) -> list[str]:
    return [path for path, tensor in head.items() if tensor.shape != own[path].shape]


def _placed(tensor: torch.Tensor, original: torch.Tensor, private: bool = False) -> torch.Tensor:
    """A task's tensor where the original lies and in its dtype, a parameter where that is one."""
    placed = tensor.to(original.device, original.dtype, copy=private)
    if isinstance(original, nn.Parameter):
        return Head(placed, requires_grad=False)
    return placed


def _of_layer(layer: str, head: Heads, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of a layer by its own name, with those of a task in their places."""
    found = {}
    for path, original in own.items():
        if path.rpartition(".")[0] == layer:
            placed = _placed(head[path], original) if path in head else original
            found[path.rpartition(".")[2]] = placed
    return found


def _shown_in(layer: nn.Module) -> list[tuple[str, Any]]:
    return [("forward", vars(layer).get("forward")), *layer._parameters.items()]


def _current(owner: Any, name: str) -> Any:
    if isinstance(owner, nn.Module) and name == "forward":
        # The class has one, too, which an attribute of the layer hides.
        return vars(owner).get(name, _ABSENT)
    return getattr(owner, name)
