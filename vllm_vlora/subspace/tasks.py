"""One task of a subspace: its loadings, and what is known of the adapter that it came from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from vllm_vlora.checkpoint.losses import Losses, describe_losses, predicted_loss
from vllm_vlora.errors import OptionError
from vllm_vlora.quantize import PackedMatrix
from vllm_vlora.subspace.layers import Loadings
from vllm_vlora.wording import shown


@dataclass(frozen=True)
class TaskOrigin:
    """What a task's adapter was, beside its factors.

    Attributes:
        metadata: its ``adapter_config.json``; {} for a task that was made here.
        extra: its tensors that are not LoRA.
        errors: layer -> ||delta_W' - delta_W|| / ||delta_W||; where the adapter was no longer at hand
            when something changed, an upper bound. error: the same over all layers.
        original_nbytes: its LoRA weights at 16 bits each; 0 for a task that was made here.
        source: where it was read from.
        scale_known: whether its config gave an alpha.
        renamed: prefix of the layers' names -> what the adapter has in its place.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    original_nbytes: int = 0
    source: str = ""
    scale_known: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)

    def drifted(self, drifts: Mapping[str, float], drift: float) -> TaskOrigin:
        """After the stored task moved by these relative distances: errors add up at most.

        Layers that are not among ``drifts`` were left out of the task.

        The stored task's norm is at most (1 + error) times the adapter's.
        """
        errors = {
            layer: error + drifts[layer] * (1 + error)
            for layer, error in self.errors.items()
            if layer in drifts
        }
        return replace(self, errors=errors, error=self.error + drift * (1 + self.error))


def common_scale(tasks: Mapping[str, TaskProjection]) -> bool:
    """Whether the scales of tasks that become one are known.

    Raises:
        OptionError: of some they are, and of others not: no factor is right for their sum.
    """
    known = {task.origin.scale_known: name for name, task in tasks.items()}
    if len(known) > 1:
        raise OptionError(
            f"the scale of task {known[True]!r} is known and that of {known[False]!r} is not, so that "
            "their mixture has none; read the latter with SharedSubspace.load(path, lora_alpha=...)"
        )
    return True in known


@dataclass(eq=False)
class TaskProjection:
    """One task in a subspace.

    Attributes:
        task_id: its name.
        loadings_a: flat: layer -> (k_a,). joint: layer -> core C (k_out, k_in).
        loadings_b: flat: layer -> (k_b,). joint: {}.
        origin: what its adapter was; the default for a task that was made here.
        packed_cores: joint: cores as they are stored, where they were quantised.
        basis_id: of the subspace's bases that the loadings are on, as its ``basis_id`` was; "" where
            nobody said.

    A layer without an entry is one that the task does not adapt.

    Examples:
        >>> subspace.tasks["task_0"]
        TaskProjection(task_id='task_0', k=2, layers=2)
        >>> "layers.0.q_proj" in subspace.tasks["task_0"]
        True
    """

    task_id: str
    loadings_a: dict[str, Tensor]
    loadings_b: dict[str, Tensor]
    origin: TaskOrigin = field(default_factory=TaskOrigin)
    packed_cores: dict[str, PackedMatrix] = field(default_factory=dict)
    basis_id: str = ""

    def __contains__(self, layer: object) -> bool:
        return layer in self.loadings_a

    def __repr__(self) -> str:
        k = max((max(t.shape) for t in self.loadings_a.values()), default=0)
        return f"TaskProjection(task_id={self.task_id!r}, k={k}, layers={len(self.loadings_a)})"

    def at(self, layer: str) -> Loadings:
        """The loadings of a layer: (loadings_a, loadings_b), or (core, None) of a joint task.

        Raises:
            KeyError: the task does not adapt the layer.
        """
        return self.loadings_a[layer], self.loadings_b.get(layer)

    @property
    def cores(self) -> dict[str, Tensor]:
        """Layer -> core C (k_out, k_in) of a joint task, with delta_W = U C V.

        Raises:
            OptionError: the task is flat.

        Examples:
            >>> joint.tasks["task_0"].cores["layers.0.q_proj"].shape
            torch.Size([4, 4])
        """
        if self.loadings_b:
            raise OptionError(f"task {self.task_id!r} is flat and has no cores; see loadings_a")
        return self.loadings_a


class TrainableParams(dict[str, Parameter]):
    """A task's parameters by name, and the bases that they are loadings on (``basis_id``)."""

    def __init__(self, params: Mapping[str, Parameter], basis_id: str) -> None:
        super().__init__(params)
        self.basis_id = basis_id


def warn_of_losses(
    tasks: Iterable[TaskProjection], representation: str, advice: str, stacklevel: int
) -> None:
    """Name the tasks that are predicted to lose much of what their adapters gain, if there are any.

    Args:
        advice: what keeps more. stacklevel: as of ``warnings.warn`` in the caller.
    """
    predicted = {t.task_id: predicted_loss(t.origin.error, representation) for t in tasks}
    for line in describe_losses(Losses.measured(predicted, {}, []).to_dict(), advice):
        warnings.warn(shown(line), stacklevel=stacklevel + 1)


def with_loadings(
    task: TaskProjection, loadings: Mapping[str, Loadings], origin: TaskOrigin | None = None
) -> TaskProjection:
    """The task with other loadings."""
    return TaskProjection(
        task.task_id,
        {layer: first for layer, (first, _) in loadings.items()},
        {layer: second for layer, (_, second) in loadings.items() if second is not None},
        task.origin if origin is None else origin,
    )
