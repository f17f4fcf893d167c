"""Finding a subspace's layers in a PyTorch model, and adding updates to what they return."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_vlora.adapters.module_names import find_name
from vllm_vlora.errors import ModelMismatchError, ModelStateError, OptionError
from vllm_vlora.model.updates import AdaptedShape

Update = Callable[[torch.Tensor], torch.Tensor]

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Dtypes of values; a weight of any other holds codes, which mean nothing without their scales."""

_QUANTIZED_METHODS = {
    "Linear4bit": "nf4",
    "LinearNF4": "nf4",
    "LinearFP4": "fp4",
    "Linear8bitLt": "int8",
    "Embedding4bit": "nf4",
    "Embedding8bit": "int8",
}
"""Class of a quantised layer in bitsandbytes -> how its weight is stored."""


@dataclass(eq=False)
class AdaptedLayer:
    """A layer of the model whose output gets ``update`` added, as long as there is one.

    The hook is installed once and reads ``update`` at every call: switching a task is one assignment.

    Attributes:
        name: of the layer in the subspace. module: the layer. kind: "linear" or "embedding".
        reader: the module that reads the layer's weight and never calls the layer, so that hooks see
            nothing; None of any other layer.
        update: applied to the layer's input; None leaves the output as it is.
        merged_by: who put a task into the layer's weight, and will take it out again.
    """

    name: str
    module: nn.Module
    kind: str
    reader: nn.Module | None = None
    update: Update | None = None
    merged_by: weakref.ref[object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"merged_by": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedLayer:
        """A copy of the model alone is a base model of its own: nobody will take a task out of it."""
        made = memo[id(self)] = copy.copy(self)
        vars(made).update(copy.deepcopy(vars(made), memo))
        owner = self.merged_by and self.merged_by()
        twin = None if owner is None else memo.get(id(owner))
        made.merged_by = None if twin is None else weakref.ref(twin)
        return made

    def install(self) -> torch.utils.hooks.RemovableHandle:
        """Add the hook; the handle removes it."""
        return self.module.register_forward_hook(self._add, with_kwargs=True)

    def _add(
        self,
        module: nn.Module,
        args: tuple[torch.Tensor, ...],
        kwargs: dict[str, torch.Tensor],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        if self.update is None:
            return None
        added = self.update(args[0] if args else kwargs["input"])
        if self.kind == "embedding":
            # Gemma's embeddings scale what they return; PEFT scales the update alike.
            added = added * getattr(module, "embed_scale", 1.0)
        return output + added.to(output.dtype)

    def refuse_beside_another(self) -> None:
        """Raise OptionError if another's task runs in the layer, or is merged: both would add up."""
        owners = [getattr(hook, "__self__", None) for hook in self.module._forward_hooks.values()]
        for owner in owners:
            if isinstance(owner, AdaptedLayer) and owner is not self and owner.is_running:
                raise OptionError(
                    f"another VLoRAModel's or trainer's task runs in layer {self.name}; call its "
                    "clear_task(), unmerge() or detach(), or leave its attach(), first"
                )

    @property
    def is_running(self) -> bool:
        """Whether a task changes what the layer returns."""
        return self.is_merged or self.update is not None

    @property
    def is_merged(self) -> bool:
        """Whether a task is in the layer's weight, and will be taken out again."""
        return self.merged_by is not None and self.merged_by() is not None

    def refuse_to_run(self, instead: str) -> None:
        """Raise ModelStateError, with what to do ``instead``, if no update reaches the layer."""
        if self.reader is not None:
            raise ModelStateError(
                f"layer {self.name} is never called: its {type(self.reader).__name__} reads the weight, "
                f"and would not see a task that runs beside it; {instead}"
            )

    @property
    def device(self) -> torch.device:
        """Where the layer's tensors lie."""
        return self._stored.device

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in: its weight's dtype. Of a quantised layer the ``compute_dtype`` that
        it names; where it names none and stores codes float32, which loses nothing.
        """
        named = getattr(self.module, "compute_dtype", None)
        if self.quantized is not None and isinstance(named, torch.dtype):
            return named
        stored = self._stored.dtype
        return stored if stored in FLOATS else torch.float32

    @property
    def quantized(self) -> str | None:
        """ "nf4", "fp4" or "int8" for a layer of bitsandbytes, "fp8" or "other" for another one that
        stores no plain weight, else None.
        """
        stored = self._stored
        for kind in type(self.module).__mro__:
            if kind.__name__ in _QUANTIZED_METHODS:
                named = getattr(stored, "quant_type", None)
                return named if isinstance(named, str) else _QUANTIZED_METHODS[kind.__name__]
        if stored.dtype in FLOATS:
            # Those of torchao and quanto have the dtype of what they dequantise to.
            return "other" if is_traceable_wrapper_subclass(stored) else None
        return "fp8" if stored.is_floating_point() and stored.itemsize == 1 else "other"

    @property
    def _stored(self) -> torch.Tensor:
        """The weight. Where no parameter is called so, as in BitNet, GPTQ and AWQ, codes if there are."""
        weight = self.module._parameters.get("weight")
        if weight is not None:
            return weight
        tensors = [*self.module.parameters(), *self.module.buffers()]
        if not tensors:
            raise ModelMismatchError(
                f"layer {self.name} is a {type(self.module).__name__} without parameters and buffers, so "
                "that nothing says where it computes; give the plain base model"
            )
        return next((tensor for tensor in tensors if tensor.dtype not in FLOATS), tensors[0])

    @property
    def transposed(self) -> bool:
        """Whether the weight is (d_in, d_out): GPT-2's Conv1D and embeddings."""
        return self.kind == "embedding" or type(self.module).__name__ == "Conv1D"


def find_layers(
    model: nn.Module, shapes: Mapping[str, AdaptedShape], *, uncalled: bool = False
) -> list[AdaptedLayer]:
    """The layers of ``model`` that ``shapes`` names, in its order.

    Names may differ by one prefix on either side, as those of a model and of its inner model do
    ("model.layers.0.q_proj", "layers.0.q_proj"), or be those that the layers have in another model class
    (``adapters.module_names``).

    Args:
        uncalled: take layers, too, that the model never calls, since it reads their weight.

    Raises:
        ModelMismatchError: a layer is missing, is of another shape or no linear layer, or its name fits
            several parts of the model.
        OptionError: the model is compiled, and compiled code does not see hooks that come later; or a
            task runs in it already, or is merged, to which another would be added.
        ModelStateError: a layer is never called.
    """
    modules = dict(model.named_modules())
    if any(_is_compiled(module) for module in modules.values()):
        raise OptionError(
            "the model is compiled already and would not see the updates; wrap the plain model, then "
            "call compile() on what wraps it"
        )
    names = _match_names(list(shapes), modules)
    layers = []
    for name, shape in shapes.items():
        module = modules[names[name]]
        found = _layer_shape(module, shape.kind)
        if found is None:
            raise ModelMismatchError(
                f"layer {name} is a {type(module).__name__}, which has no {shape.kind} update; give the "
                "plain base model"
            )
        if found != (shape.d_in, shape.d_out):
            raise ModelMismatchError(
                f"layer {name} maps {found[0]} to {found[1]} in the model, {shape.d_in} to "
                f"{shape.d_out} in the subspace; give the base model that its adapters were trained on"
                + _resizing(shape, found)
            )
        layer = AdaptedLayer(name, module, shape.kind, _reader(names[name], modules))
        layer.refuse_beside_another()
        if not uncalled:
            layer.refuse_to_run("train a subspace without this layer")
        layers.append(layer)
    return layers


def _reader(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """What reads a layer's weight in its stead; a class with a forward of its own may call the layer."""
    parent, _, own = name.rpartition(".")
    owner = modules[parent]
    reads = own == "out_proj" and type(owner).forward is nn.MultiheadAttention.forward
    return owner if reads else None


def _resizing(shape: AdaptedShape, found: tuple[int, int]) -> str:
    """What to call where an embedding was adapted with more tokens than the model has."""
    if shape.kind != "embedding" or shape.d_out != found[1]:
        return ""
    return f", which has {shape.d_in} tokens: model.resize_token_embeddings({shape.d_in})"


def _match_names(names: list[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name in the subspace -> name in the model.

    By one change of prefix for all of them; where there is none, each by the names that the layer has in
    other model classes.
    """
    fitting, fewest = [], names
    for rename in _renamings(names, modules):
        missing = [name for name in names if rename(name) not in modules]
        if not missing:
            fitting.append({name: rename(name) for name in names})
        elif len(missing) < len(fewest):
            fewest = missing
    if not fitting:
        known = {name: name for name in modules}
        found = {name: find_name(name, known.get) for name in names}
        missing = [name for name, other in found.items() if other is None]
        if not missing:
            return {name: other for name, other in found.items() if other is not None}
        fewest = min(fewest, missing, key=len)
        raise ModelMismatchError(
            f"the model has no layer {fewest[0]}"
            + (f" ({len(fewest)} of {len(names)} are missing)" if len(fewest) > 1 else "")
            + "; give the base model that the adapters were trained on"
        )
    # The names as they are come first, and win.
    if len(fitting) > 1 and any(name != found for name, found in fitting[0].items()):
        raise ModelMismatchError(
            f"layer {names[0]} fits both {fitting[0][names[0]]} and {fitting[1][names[0]]}; give the "
            "part of the model that is meant"
        )
    return fitting[0]


def _renamings(
    names: list[str], modules: Mapping[str, nn.Module]
) -> Iterator[Callable[[str], str]]:
    """As they are; with a prefix that the model has more; without one that it lacks."""
    yield lambda name: name
    if not names:
        return
    for found in modules:
        if found.endswith("." + names[0]):
            more = found[: -len(names[0])]
            yield lambda name, more=more: more + name  # type: ignore[misc]
    parts = names[0].split(".")
    for count in range(1, len(parts)):
        less = ".".join(parts[:count]) + "."
        if all(name.startswith(less) for name in names):
            yield lambda name, less=less: name[len(less) :]  # type: ignore[misc]


def _is_compiled(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or type(module).__name__ == "OptimizedModule"


def _layer_shape(module: nn.Module, kind: str) -> tuple[int, int] | None:
    """(d_in, d_out) of a layer that takes an update of this kind, else None."""
    if kind == "embedding":
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
        return None
    # Quantised layers of other packages are known by these attributes and need no nn.Linear above them.
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if (
        isinstance(sizes[0], int)
        and isinstance(sizes[1], int)
        and not hasattr(module, "base_layer")
    ):
        return sizes[0], sizes[1]
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    return None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` gets a gradient inside; afterwards each is as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def place(tensor: torch.Tensor, layer: AdaptedLayer, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor where the layer computes, in ``dtype`` or the layer's own; itself if it is there."""
    return tensor.to(device=layer.device, dtype=dtype or layer.dtype)
