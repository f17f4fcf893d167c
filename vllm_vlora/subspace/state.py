"""What a subspace holds, and the checks that every operation on it makes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from vllm_vlora.adapters.peft_folder import Factors
from vllm_vlora.checkpoint.components import Asked
from vllm_vlora.errors import OptionError, TaskIdError, TaskNotFoundError
from vllm_vlora.quantize import is_finite
from vllm_vlora.representations.joint import split_core
from vllm_vlora.subspace.fitting import core_rank
from vllm_vlora.subspace.layers import FlatLayer, JointLayer, Layer, Loadings, basis_id
from vllm_vlora.subspace.storage import StoredSubspace, representation
from vllm_vlora.subspace.tasks import TaskProjection, with_loadings
from vllm_vlora.wording import some_of

if TYPE_CHECKING:
    from typing import Self

_VARIANCE_THRESHOLD = 0.6


class SubspaceState:
    """Layers, tasks, and how k is chosen again; see ``SharedSubspace``, which is made of it.

    Raises:
        OptionError: no layers, or layers of both kinds.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        tasks: Mapping[str, TaskProjection] | None = None,
        *,
        rank: int,
        num_components: int | None = None,
        adaptive_k: bool = False,
        variance_threshold: float | None = None,
    ) -> None:
        if len({type(layer) for layer in layers.values()}) != 1:
            raise OptionError("a subspace has layers, all of them flat or all of them joint")
        self.layers = dict(layers)
        self.tasks = dict(tasks or {})
        self.rank = rank
        self.num_components = num_components or max(layer.k for layer in layers.values())
        self.adaptive_k = adaptive_k
        self.variance_threshold = variance_threshold or _VARIANCE_THRESHOLD
        self._rounded: str | None = None

    def __repr__(self) -> str:
        return (
            f"SharedSubspace(layers={len(self.layers)}, k={self.num_components}, rank={self.rank}, "
            f"tasks={len(self.tasks)}, representation={self.representation!r})"
        )

    @property
    def layers(self) -> dict[str, Layer]:
        """Layer name -> what its tasks share; assigned anew whenever a basis changes."""
        return self._layers

    @layers.setter
    def layers(self, layers: dict[str, Layer]) -> None:
        self._layers = layers
        self._basis_id: str | None = None

    @property
    def basis_id(self) -> str:
        """What tells the bases from others of their shapes: loadings on them mean nothing on others."""
        if self._basis_id is None:
            self._basis_id = basis_id(self.layers)
        return self._basis_id

    @property
    def layer_names(self) -> list[str]:
        """The layers, sorted by name."""
        return list(self.layers)

    @property
    def representation(self) -> str:
        """``flat`` or ``joint``."""
        return representation(next(iter(self.layers.values())))

    @property
    def scales_known(self) -> bool:
        """Whether every adapter's config gave an alpha, so that delta_W is that of PEFT."""
        return all(task.origin.scale_known for task in self.tasks.values())

    @property
    def quantization(self) -> str | None:
        """The number format of the components (``nf4``, ``nf4-dq``, ``int8``), ``int4``, or None."""
        packed = {layer.format for layer in self.layers.values() if layer.packed is not None}
        return next(iter(packed), self._rounded)

    @property
    def components_a(self) -> dict[str, Tensor]:
        """Flat: layer -> (k, rank d_in), components of the flattened A, as vlora has them.

        Raises:
            OptionError: the subspace is joint.
        """
        return {name: layer.components_a.flatten(1) for name, layer in self._flat_layers().items()}

    @property
    def components_b(self) -> dict[str, Tensor]:
        """Flat: layer -> (k, d_out rank), components of the flattened B, as vlora has them.

        Raises:
            OptionError: the subspace is joint.
        """
        return {n: layer.components_b.mT.flatten(1) for n, layer in self._flat_layers().items()}

    @property
    def means_a(self) -> dict[str, Tensor]:
        """Flat: layer -> (rank d_in,), the mean of the flattened A.

        Raises:
            OptionError: the subspace is joint.
        """
        return {name: layer.mean_a.flatten() for name, layer in self._flat_layers().items()}

    @property
    def means_b(self) -> dict[str, Tensor]:
        """Flat: layer -> (d_out rank,), the mean of the flattened B.

        Raises:
            OptionError: the subspace is joint.
        """
        return {name: layer.mean_b.mT.flatten() for name, layer in self._flat_layers().items()}

    @property
    def singular_values_a(self) -> dict[str, Tensor]:
        """Layer -> (k,), those of A's side (``FlatLayer``, ``JointLayer``)."""
        return {name: layer.singular_values_a for name, layer in self.layers.items()}

    @property
    def singular_values_b(self) -> dict[str, Tensor]:
        """Layer -> (k,), those of B's side."""
        return {name: layer.singular_values_b for name, layer in self.layers.items()}

    def _stored(self) -> StoredSubspace:
        return StoredSubspace(self.layers, self.tasks, self.rank, self._asked())

    def _asked(self) -> Asked:
        """How k is chosen again, as far as the layers and the defaults do not say it."""
        found = max(layer.k for layer in self.layers.values())
        threshold = self.variance_threshold
        return Asked(
            num_components=None if self.num_components == found else self.num_components,
            adaptive_k=self.adaptive_k,
            variance_threshold=None if threshold == _VARIANCE_THRESHOLD else threshold,
        )

    def _copy(self) -> Self:
        copy = type(self)(
            self.layers,
            self.tasks,
            rank=self.rank,
            num_components=self.num_components,
            adaptive_k=self.adaptive_k,
            variance_threshold=self.variance_threshold,
        )
        copy._rounded = self._rounded
        return copy

    def _flat_layers(self) -> dict[str, FlatLayer]:
        flat = {name: la for name, la in self.layers.items() if isinstance(la, FlatLayer)}
        if not flat:
            raise OptionError(
                "a joint subspace has no components of factors; see layers[name].u, .v"
            )
        return flat

    def _task(self, task_id: str) -> TaskProjection:
        if task_id not in self.tasks:
            known = some_of(self.tasks)
            raise TaskNotFoundError(f"the subspace has no task {task_id!r}; it has: {known}")
        return self.tasks[task_id]

    def _warn_of_scale(self, task_id: str, known: bool, stacklevel: int) -> None:
        """Say where the first task that has its alpha / r comes to tasks without theirs.

        Args:
            stacklevel: as of ``warnings.warn`` in the caller.
        """
        if known and self.tasks and not any(t.origin.scale_known for t in self.tasks.values()):
            warnings.warn(
                f"task {task_id!r} has its alpha / r, and none of the subspace's tasks has one, as vlora "
                "keeps none: VLoRAModel's lora_alpha multiplies the others alone. To fit all of them to "
                "scale, read them with SharedSubspace.load(path, lora_alpha=...)",
                stacklevel=stacklevel + 1,
            )

    def _check_free(self, task_id: str) -> None:
        if task_id in self.tasks:
            raise TaskIdError(
                f"task {task_id!r} exists; remove_task() it first, or choose another id"
            )

    def _check_basis(self, task_id: str, basis_id: str) -> None:
        """Refuse loadings on bases that were changed since, whose shapes may be the same.

        Raises:
            OptionError: they were.
        """
        if basis_id and basis_id != self.basis_id:
            raise OptionError(
                f"task {task_id!r}: its loadings are on other bases than the subspace has now; project, "
                "blend or train the task again"
            )

    def _placed(self, task: TaskProjection) -> TaskProjection:
        """The task with its loadings checked, on the layers' devices and in their dtypes."""
        self._check_basis(task.task_id, task.basis_id)
        loadings: dict[str, Loadings] = {}
        for name in task.loadings_a:
            layer = self.layers.get(name)
            if layer is None:
                raise OptionError(
                    f"task {task.task_id!r} has layer {name!r}, which the subspace lacks; leave it out"
                )
            pair = task.at(name)
            shapes = tuple(None if t is None else tuple(t.shape) for t in pair)
            if shapes != layer.shapes:
                raise OptionError(
                    f"task {task.task_id!r}, layer {name!r}: loadings have the shapes {shapes}, the "
                    f"subspace's {layer.shapes}; project the task again"
                )
            for tensor in pair:
                if tensor is not None and not is_finite(tensor):
                    raise OptionError(
                        f"task {task.task_id!r}, layer {name!r}: loadings are NaN or infinite"
                    )
            first, second = (None if t is None else t.to(layer.device, layer.dtype) for t in pair)
            assert first is not None
            loadings[name] = first, second
        placed = with_loadings(task, loadings)
        placed.packed_cores = task.packed_cores
        return placed

    def _loadings(self, task_id: str) -> Iterator[tuple[str, Loadings]]:
        task = self._placed(self.tasks[task_id])
        return ((name, task.at(name)) for name in self.layers if name in task)

    def _factors(self, name: str, loadings: Loadings) -> Factors:
        """Factors of the least rank that a joint core has, unless gradients must pass."""
        layer, core = self.layers[name], loadings[0]
        if isinstance(layer, JointLayer) and not core.requires_grad:
            rank = core_rank(core)
            if rank < min(core.shape):
                right, left_t = (t.to(core) for t in split_core(core, rank))
                return right @ layer.v, layer.u @ left_t.T
        return layer.factors(loadings)
