"""Training a task inside a subspace: its loadings or cores only, the bases and the model stay.

A task of a joint subspace is k_out x k_in numbers a layer, of a flat one k_a + k_b. What is learned can
never leave the span of the bases; ``num_expand`` widens them by random orthogonal directions first.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_vlora.errors import OptionError, TaskNotFoundError
from vllm_vlora.model.attaching import AdaptedLayer, Update, find_layers, frozen, place
from vllm_vlora.model.heads import HeadSwitch
from vllm_vlora.model.updates import AdaptedShape, LowRankUpdate
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.quantize import is_finite
from vllm_vlora.subspace.layers import FlatLayer
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.tasks import TaskProjection


def orthogonal_init(
    subspace: SharedSubspace,
    task_id: str,
    scale: float = 0.01,
    *,
    replace: bool = False,
) -> TaskProjection:
    """Add a task that hardly changes the model, to be trained.

    Joint: the core of each layer is ``scale`` times a random matrix with orthonormal rows or columns,
    so that ||delta_W||_2 = scale. Flat, after vlora: loadings of A are normal with deviation ``scale``,
    those of B zero; the task then starts at the mean of all tasks, since a flat basis has no zero.

    Args:
        subspace: gets the task, in all of its layers. task_id: its name.
        scale: size of the start, not negative; 0 is allowed, and of a joint task the base model itself.
        replace: overwrite a task of that name.

    Returns:
        The task's projection, as it stands in the subspace.

    Raises:
        OptionError: ``scale`` is negative or not finite.
        TaskIdError: the name cannot be a task's, or is taken.

    Examples:
        >>> start = orthogonal_init(joint, "new")
        >>> start.loadings_a["layers.0.q_proj"].norm(2).item() < 0.1
        True
    """
    if not 0 <= scale < float("inf"):
        raise OptionError(f"scale must be a finite number of at least 0, got {scale}")
    loadings_a: dict[str, torch.Tensor] = {}
    loadings_b: dict[str, torch.Tensor] = {}
    for name, layer in subspace.layers.items():
        shape_a, shape_b = layer.shapes
        if shape_b is None:
            start = torch.nn.init.orthogonal_(torch.empty(shape_a)) * scale
        else:
            start = torch.randn(shape_a) * scale
            loadings_b[name] = torch.zeros(shape_b, device=layer.device, dtype=layer.dtype)
        loadings_a[name] = start.to(device=layer.device, dtype=layer.dtype)
    projection = TaskProjection(task_id=task_id, loadings_a=loadings_a, loadings_b=loadings_b)
    subspace.add_task(projection, replace=replace)
    return subspace.tasks[task_id]


class SubspaceTrainer:
    """Trains one task's loadings or cores, float32 copies of them, with any loss and optimiser.

    The model must run with these very copies, or the loss cannot know of them: run it inside
    ``attach``. (In vlora nothing connects the trainer with the model; a loss of the bare model trains
    nothing there, and says nothing. Here ``step`` refuses it.)

    Args:
        subspace: has the task already (``orthogonal_init``, ``project``, ``absorb``).
        task_id: the task to train.
        lr: learning rate.
        num_expand: orthogonal directions to add to each side of each basis first, drawn from the
            task's name. Other tasks get zeros there and stay what they are.
        optimizer_cls: class of the optimiser. optimizer_kwargs: its further arguments.

    Attributes:
        params: "LAYER.core", or "LAYER.loadings_a" and "LAYER.loadings_b" -> what is trained.
        optimizer: over all of them. step_count: steps taken.

    Raises:
        TaskNotFoundError: the subspace has no such task.
        OptionError: ``lr`` is not positive, ``num_expand`` negative or more than there is room for.

    Examples:
        >>> start = orthogonal_init(joint, "new")
        >>> trainer = SubspaceTrainer(joint, "new", lr=0.05)
        >>> with trainer.attach(base_model) as model:
        ...     losses = [trainer.step((model(torch.ones(2, 12)) - 1).square().mean()) for _ in range(20)]
        >>> trainer.write_back()
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        subspace: SharedSubspace,
        task_id: str,
        lr: float = 1e-3,
        num_expand: int = 0,
        optimizer_cls: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if task_id not in subspace.tasks:
            raise TaskNotFoundError(
                f"the subspace has no task {task_id!r}; make it with orthogonal_init() or project() first"
            )
        if not 0 < lr < float("inf"):
            raise OptionError(f"lr must be positive and finite, got {lr}")
        self.subspace = subspace
        self.task_id = task_id
        self.params = subspace.get_trainable_params(task_id)
        if not self.params:
            raise OptionError(
                f"task {task_id!r} changes no layer, so that there is nothing to train; make one with "
                "orthogonal_init()"
            )
        arguments = {**(optimizer_kwargs or {}), "lr": lr}
        # Tried before the subspace is expanded, which is for good.
        self.optimizer = optimizer_cls(list(self.params.values()), **arguments)
        if num_expand:
            # The same directions whenever the same subspace is expanded for the same task: a run that is
            # resumed in another process means the same by its numbers.
            drawing = torch.Generator().manual_seed(zlib.crc32(task_id.encode()))
            self.params = subspace.get_trainable_params(task_id, num_expand, generator=drawing)
            self.optimizer = optimizer_cls(list(self.params.values()), **arguments)
        self.step_count = 0

    @contextmanager
    def attach(self, model: nn.Module, *, freeze: bool = True) -> Iterator[nn.Module]:
        """Run a model with the task as it is being trained, inside a ``with``.

        Heads that the task has already are in the model meanwhile; they are not trained.

        Args:
            model: the base model, or a VLoRAModel with no task active. Layers are found as it finds them.
                A task without a scale of its own runs with the VLoRAModel's, and of a base model with 1,
                which a warning says.
            freeze: let no parameter of the model get a gradient meanwhile.

        Yields:
            The model.

        Raises:
            ModelMismatchError: the model lacks a layer of the task, or has it in another shape.
            OptionError: the model is a VLoRAModel that runs a task already.
        """
        layers = self.layers_in(model)
        heads = self.show_heads(model)
        hooks = [layer.install() for layer in layers]
        try:
            with frozen(model) if freeze else _as_it_is():
                yield model
        finally:
            for hook in hooks:
                hook.remove()
            heads.show(())

    def step(self, loss: torch.Tensor) -> float:
        """One step on a scalar loss; returns its value.

        Raises:
            OptionError: the loss does not depend on the task, is not finite, or is no scalar.
        """
        if loss.numel() != 1:
            raise OptionError(f"the loss has the shape {tuple(loss.shape)}; give its mean")
        if not is_finite(loss):
            raise OptionError(f"the loss is {loss.item()}; lower lr, or look at the batch")
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        if all(parameter.grad is None for parameter in self.params.values()):
            raise OptionError(
                "the loss does not depend on the task; run the model inside `with trainer.attach(model)`"
            )
        self.optimizer.step()
        self.step_count += 1
        return loss.item()

    def write_back(self) -> None:
        """Put what was learned into the subspace, in the dtype of its layers; until then it is unchanged.

        Raises:
            OptionError: a value is NaN or infinite, or a basis was changed since the trainer was made;
                the task in the subspace stays as it was.
            TaskNotFoundError: the task was removed meanwhile.
        """
        self.subspace.update_task(self.task_id, self.params)

    def layers_in(self, model: nn.Module) -> list[AdaptedLayer]:
        """The task's layers in a model, with their updates; ``install`` lets them run.

        Raises:
            ModelMismatchError, OptionError: as ``attach``.
        """
        if isinstance(model, VLoRAModel) and model.is_running:
            raise OptionError("the model runs a task already; call clear_task() or unmerge() first")
        scaling = self._scaling_in(model)
        layers = find_layers(model, self.layer_shapes())
        for layer in layers:
            layer.update = self._update_of(layer, scaling)
        return layers

    def show_heads(self, model: nn.Module) -> HeadSwitch:
        """Put what the task brings whole into a model, untrained; ``show(())`` takes it out again.

        Raises:
            ModelMismatchError: the model has no place for it.
        """
        origin = self.subspace.tasks[self.task_id].origin
        heads = HeadSwitch(model)
        heads.show([heads.find(origin.extra, origin.metadata)])
        return heads

    def layer_shapes(self) -> dict[str, AdaptedShape]:
        """The layers that the task has."""
        layers = self.subspace.layers
        names = dict.fromkeys(key.rpartition(".")[0] for key in self.params)
        return {n: AdaptedShape(layers[n].d_in, layers[n].d_out, layers[n].kind) for n in names}

    def own_params(self, layer: str) -> dict[str, nn.Parameter]:
        """The parameters of one layer: "core", or "loadings_a" and "loadings_b"."""
        return {
            key[len(layer) + 1 :]: parameter
            for key, parameter in self.params.items()
            if key.rpartition(".")[0] == layer
        }

    def _scaling_in(self, model: nn.Module) -> float:
        """What the update is multiplied by: what ``VLoRAModel`` multiplies it by once it is trained."""
        if self.subspace.tasks[self.task_id].origin.scale_known:
            return 1.0
        if isinstance(model, VLoRAModel):
            return model.scaling
        warnings.warn(
            f"task {self.task_id!r} has no scale of its own and trains at scale 1; to train at another, "
            "give attach() the VLoRAModel(..., lora_alpha=...) that will run it, or read the subspace "
            "with SharedSubspace.load(path, lora_alpha=...)",
            stacklevel=5,
        )
        return 1.0

    def _update_of(self, layer: AdaptedLayer, scaling: float) -> Update:
        """What a layer's output gets, by the parameters as they are when it is called."""
        shared, own = self.subspace.layers[layer.name], self.own_params(layer.name)
        if isinstance(shared, FlatLayer):
            update: Update = _FlatUpdate(shared.to(layer.device, torch.float32), own)
        else:
            v, u = (place(side, layer, None) for side in (shared.v, shared.u))
            update = LowRankUpdate(own["core"], None, v, u)
        return update if scaling == 1.0 else _ScaledUpdate(update, scaling)

    @property
    def num_trainable_params(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.params.values())

    def __repr__(self) -> str:
        return (
            f"SubspaceTrainer(task={self.task_id!r}, params={self.num_trainable_params}, "
            f"steps={self.step_count})"
        )


@dataclass(frozen=True)
class _FlatUpdate:
    """A flat task under training: its factors are made anew from the loadings at every call."""

    layer: FlatLayer
    own: Mapping[str, nn.Parameter]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        loadings = (self.own[name].to(self.layer.device) for name in ("loadings_a", "loadings_b"))
        a, b = self.layer.factors(tuple(loadings))  # type: ignore[arg-type]
        return LowRankUpdate(a, b)(x)


@dataclass(frozen=True)
class _ScaledUpdate:
    """The update of a task whose own scale is not known, with the scale that the model gives it."""

    update: Update
    scaling: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaling * self.update(x)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
