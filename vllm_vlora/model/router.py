"""A small network that chooses, or blends, tasks by what comes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from vllm_vlora.errors import OptionError, TaskNotFoundError
from vllm_vlora.quantize import is_finite
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.tasks import TaskOrigin, TaskProjection, common_scale
from vllm_vlora.wording import count_of, some_of

if TYPE_CHECKING:
    from vllm_vlora.model.vlora_model import VLoRAModel

ROUTED = "__routed__"
"""The task id of a blend of loadings."""


class FeatureRows(Protocol):
    """Features of many rows that do not exist all at once."""

    device: torch.device

    def __len__(self) -> int:
        """How many rows."""

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, input_dim) finite features, on the device."""


class TaskRouter(nn.Module):
    """Weights over tasks from features of the input: softmax(W_2 relu(W_1 x) / temperature).

    Each row of a batch gets weights of its own. ``blend`` runs a model with them, row by row, which is
    exact in every representation; ``fit`` learns them from labels, and a loss behind a blended model
    trains them as well.

    Args:
        input_dim: features of a row.
        num_tasks: tasks to choose from.
        hidden_dim: width of the hidden layer.
        task_ids: what the outputs mean; "task_0", "task_1", ... when None.
        temperature: above 1 the weights are more even, below 1 more decided.

    Raises:
        OptionError: a size below one, a temperature that is not positive, or task ids that are not
            ``num_tasks`` different ones.

    Examples:
        >>> router = TaskRouter(input_dim=6, num_tasks=4)
        >>> router(torch.ones(3, 6)).sum(dim=1).allclose(torch.ones(3))
        True
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        hidden_dim: int = 64,
        task_ids: Sequence[str] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        for name, size in (
            ("input_dim", input_dim),
            ("num_tasks", num_tasks),
            ("hidden_dim", hidden_dim),
        ):
            if size < 1:
                raise OptionError(f"{name} must be at least 1, got {size}")
        if not 0 < temperature < float("inf"):
            raise OptionError(f"temperature must be positive and finite, got {temperature}")
        ids = [f"task_{i}" for i in range(num_tasks)] if task_ids is None else list(task_ids)
        if len(ids) != num_tasks or len(set(ids)) != num_tasks:
            raise OptionError(f"task_ids must be {num_tasks} different ids, got {ids}")
        self.input_dim = input_dim
        self.num_tasks = num_tasks
        self.hidden_dim = hidden_dim
        self.task_ids = ids
        self.temperature = temperature
        self.net = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_tasks)
        )

    @classmethod
    def from_subspace(
        cls,
        subspace: SharedSubspace,
        input_dim: int,
        hidden_dim: int = 64,
        temperature: float = 1.0,
        init_from_loadings: bool = True,
    ) -> TaskRouter:
        """A router over all tasks of a subspace, sorted by id.

        Args:
            subspace: whose tasks are meant. input_dim, hidden_dim, temperature: as for the class.
            init_from_loadings: start with output weights whose correlations are the cosines of the
                tasks' loadings, so that tasks that do similar things start with similar weights. Before
                anything is learned no task is preferred.

        Raises:
            OptionError: the subspace has no tasks, or an argument is out of range.

        Examples:
            >>> TaskRouter.from_subspace(subspace, input_dim=6).task_ids
            ['task_0', 'task_1', 'task_2', 'task_3']
        """
        task_ids = sorted(subspace.tasks)
        router = cls(input_dim, len(task_ids), hidden_dim, task_ids, temperature)
        if init_from_loadings and len(task_ids) > 1:
            router._start_from(_loading_cosines([subspace.tasks[task] for task in task_ids]))
        return router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (rows, num_tasks), each row's sum 1, from features (rows, input_dim).

        Raises:
            OptionError: ``x`` has another shape.
        """
        return F.softmax(self._logits(x), dim=-1)

    def predict(self, x: torch.Tensor) -> list[str]:
        """The task with the greatest weight, for each row of features (rows, input_dim).

        Examples:
            >>> len(TaskRouter(input_dim=6, num_tasks=4).predict(torch.ones(3, 6)))
            3
        """
        with torch.no_grad():
            return [self.task_ids[i] for i in self._logits(x).argmax(dim=-1).tolist()]

    def blend(self, x: torch.Tensor, model: VLoRAModel) -> torch.Tensor:
        """Set a model to a blend of the router's tasks, each row of the next batch with its own weights.

        Args:
            x: (rows, input_dim), features of the rows that the model is going to see.
            model: a model with the router's tasks.

        Returns:
            The weights (rows, num_tasks). Gradients of what the model then computes flow to them.

        Raises:
            TaskNotFoundError, OptionError, ModelStateError: as ``VLoRAModel.set_blend``.

        Examples:
            >>> router = TaskRouter.from_subspace(joint, input_dim=12)
            >>> model = VLoRAModel(base_model, joint)
            >>> x = torch.ones(3, 12)
            >>> router.blend(x, model).shape, model(x).shape
            (torch.Size([3, 4]), torch.Size([3, 14]))
        """
        weights = self(x)
        model.set_blend(weights, self.task_ids)
        return weights

    def blend_loadings(self, x: torch.Tensor, subspace: SharedSubspace) -> TaskProjection:
        """One task for a whole batch: loadings blended with the batch's mean weights.

        This is vlora's blend. It is the same for every row, and for a flat subspace it is not the blend
        of the updates, which are products of two blended factors. On a joint basis it is, so that for
        one row it equals ``blend``.

        Args:
            x: (rows, input_dim). subspace: one with the router's tasks.

        Returns:
            A projection with the id "__routed__", not added to the subspace.

        Raises:
            TaskNotFoundError: the subspace lacks one of the router's tasks.

        Examples:
            >>> router = TaskRouter.from_subspace(joint, input_dim=6)
            >>> joint.add_task(router.blend_loadings(torch.ones(1, 6), joint))
            >>> joint.reconstruct("__routed__").layer_names == joint.layer_names
            True
        """
        missing = [task for task in self.task_ids if task not in subspace.tasks]
        if missing:
            raise TaskNotFoundError(
                f"the subspace has no task {missing[0]!r} of the router; make one with from_subspace"
            )
        weights = self(x).mean(dim=0)
        tasks = [subspace.tasks[task] for task in self.task_ids]
        known = common_scale(dict(zip(self.task_ids, tasks)))
        return TaskProjection(
            task_id=ROUTED,
            loadings_a=_blended([task.loadings_a for task in tasks], weights),
            loadings_b=_blended([task.loadings_b for task in tasks], weights),
            origin=TaskOrigin(scale_known=known),
            basis_id=subspace.basis_id,
        )

    def fit(
        self,
        x: torch.Tensor | FeatureRows,
        task_ids: Sequence[str],
        *,
        epochs: int = 100,
        lr: float = 1e-2,
        batch_size: int = 64,
        weight_decay: float = 0.0,
        seed: int = 0,
        advance: Callable[[int, int], object] | None = None,
    ) -> list[float]:
        """Learn which task each row belongs to: cross-entropy, with AdamW.

        Args:
            x: (rows, input_dim) features, or anything that makes them of rows as they are asked for.
                task_ids: the right task of each row.
            epochs: passes over the rows. lr, weight_decay: of AdamW. batch_size: rows a step.
            seed: draws the order of the rows. advance: called with (epochs done, all epochs).

        Returns:
            The mean loss of each epoch.

        Raises:
            OptionError: rows and ids differ in number, an id is none of the router's, an option is out of
                range, or the features are not finite.

        Examples:
            >>> router = TaskRouter(input_dim=6, num_tasks=4)
            >>> losses = router.fit(torch.eye(6)[:4], ["task_0", "task_1", "task_2", "task_3"])
            >>> losses[-1] < losses[0]
            True
        """
        labels = self._labels(x, task_ids)
        if epochs < 1 or batch_size < 1 or lr <= 0:
            raise OptionError(
                f"epochs, batch_size and lr must be positive, got {epochs}, {batch_size} and {lr}"
            )
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay)
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(x), generator=generator).split(batch_size):
                rows = rows.to(x.device)
                loss = F.cross_entropy(self._logits(x[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            losses.append(total / len(x))
            if advance is not None:
                advance(len(losses), epochs)
        return losses

    @property
    def num_params(self) -> int:
        """Numbers that the router learns."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 2 or x.shape[1] != self.input_dim:
            raise OptionError(
                f"features of shape {tuple(x.shape)} for a router of {self.input_dim}; give "
                "(rows, input_dim)"
            )
        logits: torch.Tensor = self.net(x)
        return logits / self.temperature

    def _labels(self, x: torch.Tensor | FeatureRows, task_ids: Sequence[str]) -> torch.Tensor:
        unknown = [task for task in task_ids if task not in self.task_ids]
        if unknown:
            raise OptionError(
                f"task {unknown[0]!r} is none of the router's: {some_of(self.task_ids)}"
            )
        if len(task_ids) != len(x) or not len(x):
            raise OptionError(
                f"{count_of(len(x), 'row')} of features and {count_of(len(task_ids), 'task')}; give one "
                "for each"
            )
        if isinstance(x, torch.Tensor) and not is_finite(x):
            raise OptionError("the features hold NaN or infinity; check what made them")
        return torch.tensor([self.task_ids.index(task) for task in task_ids], device=x.device)

    def _start_from(self, cosines: torch.Tensor) -> None:
        """Output weights of which each pair of rows correlates as two tasks do, at torch's usual size."""
        values, vectors = torch.linalg.eigh(cosines)
        root = vectors * values.clamp(min=0).sqrt()
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            start = torch.randn(len(root), self.hidden_dim) / (3 * self.hidden_dim) ** 0.5
            last.weight.copy_(root.to(start) @ start)
            last.bias.zero_()


def _loading_cosines(tasks: Sequence[TaskProjection]) -> torch.Tensor:
    """(tasks, tasks) float64: cosines of all loadings of two tasks, zero in a layer that is lacking."""
    gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for side in ("loadings_a", "loadings_b"):
        own: list[dict[str, torch.Tensor]] = [getattr(task, side) for task in tasks]
        for layer in sorted({layer for loadings in own for layer in loadings}):
            rows = _rows(own, layer).double().cpu()
            gram += rows @ rows.T
    norms = gram.diagonal().sqrt()
    # A task of zeros resembles itself only.
    cosines = gram / (norms[:, None] * norms).clamp(min=1e-300)
    cosines.fill_diagonal_(1.0)
    return cosines


def _rows(loadings: Sequence[dict[str, torch.Tensor]], layer: str) -> torch.Tensor:
    """(tasks, numbers): each task's loadings of a layer, flattened."""
    shape = next(own[layer] for own in loadings if layer in own)
    rows = [own[layer] if layer in own else torch.zeros_like(shape) for own in loadings]
    return torch.stack(rows).flatten(1)


def _blended(
    loadings: Sequence[dict[str, torch.Tensor]], weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    blended = {}
    for layer in dict.fromkeys(layer for own in loadings for layer in own):
        shape = next(own[layer] for own in loadings if layer in own).shape
        rows = _rows(loadings, layer)
        blended[layer] = (weights.to(rows) @ rows).reshape(shape)
    return blended
