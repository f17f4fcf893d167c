"""A PyTorch model that runs the tasks of a subspace or a checkpoint, and switches between them."""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import (
    ModelMismatchError,
    ModelStateError,
    OptionError,
    TaskNotFoundError,
)
from vllm_vlora.model.attaching import AdaptedLayer, Update, find_layers, place
from vllm_vlora.model.heads import Heads, HeadSwitch
from vllm_vlora.model.row_layers import Batch
from vllm_vlora.model.updates import LowRankUpdate, MixedUpdate, check_scaling, open_source
from vllm_vlora.quantize import is_finite
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.wording import count_of, some_of

_NO_HEADS: Heads = {}


@dataclass(frozen=True, eq=False)
class _Blend:
    """What ``set_blend`` was given."""

    weights: torch.Tensor
    task_ids: list[str]


_Active = str | tuple[str | None, ...] | _Blend | None


@dataclass(frozen=True)
class _Plan:
    """A task as the model runs it: an update for each layer, and tensors that it brings whole.

    ``state`` is the source's when it was made.
    """

    state: tuple[Any, ...]
    updates: list[LowRankUpdate | None]
    heads: dict[str, torch.Tensor]


class VLoRAModel(nn.Module):
    """A base model and the tasks of a subspace, one of which, or a mixture, is active at a time.

    Each adapted layer computes y = W x + delta_W x, delta_W x by its factors: with a shared basis as
    U (C (V x)), so that a task is one small core a layer and switching copies nothing. Hooks are
    installed once and read what is active. Gradients flow to the inputs, and to the weights of a blend.

    Layers are found by name, also where the model's names have one prefix more or less: ``nn.Linear``,
    ``nn.Embedding``, GPT-2's ``Conv1D``, the 4- and 8-bit layers of bitsandbytes, and other quantised
    layers (FP8, GPTQ, AWQ) with ``in_features`` and ``out_features``. Attributes that this class lacks,
    such as ``generate`` and ``config``, are the base model's. Modules that a task brings whole
    (classifier heads, embeddings, an output layer of more tokens) take the places of the model's while
    the task is active, as PEFT's do: layers that are tied to them keep the model's weight. Not
    thread-safe.

    Args:
        base_model: the model that the adapters were trained on; it keeps its weights.
        subspace: a SharedSubspace, a Checkpoint, or the path or Hub id of a checkpoint.
        scaling: factor on every update where the adapters' own scale is not known (checkpoints of
            vlora). Where it is known it is folded in, and a value that would change it is refused.
        lora_alpha: the same as alpha / rank; only one of both.
        compute_dtype: dtype of the updates; None for that of each layer's weight (of a quantised
            layer, the ``compute_dtype`` that it names, else float32).
        cached_tasks: tasks whose factors are kept ready; on a shared basis these are cores only.

    Raises:
        ModelMismatchError: the model lacks a layer of the subspace, or has it in another shape.
        OptionError: ``scaling`` or ``lora_alpha`` contradicts the adapters' own.
        CheckpointError: the checkpoint cannot be read.

    Examples:
        >>> model = VLoRAModel(base_model, joint)
        >>> model.set_task("task_1")
        >>> model(torch.ones(3, 12)).shape
        torch.Size([3, 14])
        >>> model
        VLoRAModel(tasks=4, active='task_1', layers=2)
    """

    base_model: nn.Module

    def __init__(
        self,
        base_model: nn.Module,
        subspace: SharedSubspace | Checkpoint | str | Path,
        scaling: float | None = None,
        lora_alpha: float | None = None,
        compute_dtype: torch.dtype | None = None,
        *,
        cached_tasks: int = 16,
    ) -> None:
        super().__init__()
        if cached_tasks < 1:
            raise OptionError(f"cached_tasks must be at least 1, got {cached_tasks}")
        self.base_model = base_model
        self._source = open_source(subspace)
        self.subspace = self._source.origin
        self.scaling = check_scaling(self._source, scaling, lora_alpha)
        self.compute_dtype = compute_dtype
        self._cached_tasks = cached_tasks
        self._layers = find_layers(base_model, self._source.layers, uncalled=True)
        self._batch = Batch()
        self._hooks = [layer.install() for layer in self._layers]
        self._hooks += self._batch.install(base_model)
        self._heads = HeadSwitch(base_model, self._batch)
        self._plans: OrderedDict[str, _Plan] = OrderedDict()
        self._bases: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._active: _Active = None
        self._moves = 0
        self._merged: str | None = None
        self._originals: list[tuple[AdaptedLayer, nn.Parameter, torch.Tensor]] = []
        self._guards: list[torch.utils.hooks.RemovableHandle] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with what is active added."""
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_model")
            if base is None:
                raise
            return getattr(base, name)

    # --- choosing what is active ------------------------------------------------------------------

    def set_task(self, task_id: str) -> None:
        """Make one task active for all rows of a batch.

        Raises:
            TaskNotFoundError: there is no such task.
            ModelMismatchError: it brings a head that the model has no place for.
            OptionError: another VLoRAModel, or a training, runs a task in this model.
            ModelStateError: a task is merged, the model was unloaded, the subspace has gained a layer of
                this task since the model was wrapped, or the task changes a layer that is never called.

        Examples:
            >>> model = VLoRAModel(base_model, subspace)
            >>> model.set_task("task_0")
            >>> model.active_task
            'task_0'
        """
        self._refuse_merged("switch tasks")
        plan = self._plan(task_id)
        self._activate(plan.updates, task_id, (plan.heads,))

    def set_tasks(self, task_ids: Sequence[str | None]) -> None:
        """Make one task active for each row of the batches to come; None is the base model.

        Rows are the first dimension of what each layer sees. A batch of a multiple of the rows, as
        beam search makes it, has each row's task repeated. A layer that sees neither the batch's rows nor
        all of its tokens, as experts of a mixture do, is refused when the model runs.

        Raises:
            TaskNotFoundError, OptionError, ModelStateError: an unknown task; no tasks, or some with
                heads of different sizes, whose outputs no batch can hold; another's task runs in this
                model; one is merged.

        Examples:
            >>> model = VLoRAModel(base_model, joint)
            >>> x = torch.ones(1, 12)
            >>> model.set_tasks(["task_0", None])
            >>> both = model(x.expand(2, 12))
            >>> model.set_task("task_0")
            >>> torch.allclose(both[:1], model(x), atol=1e-5)
            True
        """
        if not task_ids:
            raise OptionError(
                "set_tasks needs a task, or None, for each row of the batch; got none"
            )
        self._refuse_merged("switch tasks")
        names = list(dict.fromkeys(task for task in task_ids if task is not None))
        plans = {task: self._plan(task) for task in names}
        weights = torch.zeros(len(task_ids), len(names))
        for row, task in enumerate(task_ids):
            if task is not None:
                weights[row, names.index(task)] = 1.0
        heads = [_NO_HEADS if task is None else plans[task].heads for task in task_ids]
        self._activate(self._mixed(list(plans.values()), weights), tuple(task_ids), heads)

    def set_blend(self, weights: torch.Tensor, task_ids: Sequence[str] | None = None) -> None:
        """Make a weighted sum of tasks active, with other weights for each row of a batch.

            y_i = W x_i + sum_t weights[i, t] delta_W_t x_i

        This is exact for every representation. On a shared basis it costs one core for each row.

        Args:
            weights: (rows, tasks), any finite numbers; gradients flow to them. Rows as in ``set_tasks``.
            task_ids: the tasks that the columns mean; all of ``available_tasks`` when None.

        Raises:
            TaskNotFoundError, OptionError, ModelStateError: an unknown task; weights of another shape or
                not finite; another's task runs in this model; a task is merged.

        Examples:
            >>> model = VLoRAModel(base_model, joint)
            >>> model.set_blend(torch.tensor([[0.5, 0.5]]), ["task_0", "task_1"])
            >>> model(torch.ones(4, 12)).shape
            torch.Size([4, 14])
        """
        self._refuse_merged("switch tasks")
        names = self.available_tasks if task_ids is None else list(task_ids)
        if weights.ndim != 2 or weights.shape[1] != len(names) or not len(weights):
            raise OptionError(
                f"weights of shape {tuple(weights.shape)} for "
                f"{count_of(len(names), 'task')}; give (rows, tasks)"
            )
        if not is_finite(weights):
            raise OptionError("the weights hold NaN or infinity; check what made them")
        plans = [self._plan(task) for task in names]
        own_heads = [task for task, plan in zip(names, plans) if plan.heads]
        if own_heads:
            raise OptionError(
                f"task {own_heads[0]!r} has a head of its own, which cannot be blended; use set_task or "
                "set_tasks"
            )
        self._activate(self._mixed(plans, weights), _Blend(weights, names))

    def _mixed(self, plans: Sequence[_Plan], weights: torch.Tensor) -> list[Update | None]:
        mixed: list[Update | None] = []
        for place_, layer in enumerate(self._layers):
            own = [plan.updates[place_] for plan in plans]
            used = any(update is not None for update in own)
            mixed.append(MixedUpdate(own, weights.to(layer.device), self._batch) if used else None)
        return mixed

    def clear_task(self) -> None:
        """Make nothing active: the base model answers.

        Raises:
            ModelStateError: a task is merged.

        Examples:
            >>> model = VLoRAModel(base_model, subspace)
            >>> model.set_task("task_0")
            >>> model.clear_task()
            >>> model.active_task is None
            True
        """
        self._refuse_merged("clear the task")
        self._activate([None] * len(self._layers), None)

    @contextmanager
    def task(self, task_id: str | Sequence[str | None] | None) -> Iterator[VLoRAModel]:
        """Make a task, one task a row, or (None) the base model active inside a ``with``.

        What was active before is restored, unless a task is merged or the model unloaded by then.

        Raises:
            TaskNotFoundError, OptionError, ModelStateError: as ``set_task`` and ``set_tasks``.

        Examples:
            >>> model = VLoRAModel(base_model, subspace)
            >>> with model.task("task_2"):
            ...     y = model(torch.ones(1, 12))
            >>> model.active_task is None
            True
        """
        before, moves = self._state(), self._moves
        if task_id is None:
            self.clear_task()
        elif isinstance(task_id, str):
            self.set_task(task_id)
        else:
            self.set_tasks(task_id)
        try:
            yield self
        finally:
            if not (self.is_merged or self._is_unloaded):
                self._activate(*before)
                if self._moves != moves:
                    self.refresh()

    @property
    def active_task(self) -> str | None:
        """The task that is active, or merged; None for none, and for a mixture."""
        return self._active if isinstance(self._active, str) else None

    @property
    def active_tasks(self) -> tuple[str | None, ...] | None:
        """The tasks of ``set_tasks``, one a row; None where none were set."""
        return self._active if isinstance(self._active, tuple) else None

    @property
    def is_running(self) -> bool:
        """Whether anything is added to the base model now: a task, a mixture or a merged task."""
        return self.is_merged or any(layer.update is not None for layer in self._layers)

    @property
    def available_tasks(self) -> list[str]:
        """Every task that can be set, sorted.

        Examples:
            >>> VLoRAModel(base_model, subspace).available_tasks
            ['task_0', 'task_1', 'task_2', 'task_3']
        """
        return sorted(self._source.task_ids())

    def refresh(self) -> None:
        """Forget what was prepared, and prepare the active task, tasks or blend anew.

        Needed after a tensor of the subspace was changed in place, or the base model was moved other
        than through this object. A task or basis that was replaced is noticed when it is set.

        Raises:
            ModelStateError: a task is merged.
        """
        self._refuse_merged("refresh")
        active = self._active
        self._moved()
        if isinstance(active, str):
            self.set_task(active)
        elif isinstance(active, tuple):
            self.set_tasks(active)
        elif isinstance(active, _Blend):
            self.set_blend(active.weights, active.task_ids)
        else:
            self.clear_task()

    def _moved(self) -> None:
        """What was prepared, also what a ``with`` is going to restore, lies where the layers are not."""
        self._moves += 1
        self._forget()

    def _forget(self) -> None:
        self._plans.clear()
        self._bases.clear()

    def unload(self) -> nn.Module:
        """Take the hooks off, undo a merge, and return the base model as it was.

        No task can be set afterwards.

        Raises:
            ModelStateError: a layer got another weight while a task was merged. It keeps that; all else
                is as it was, and the hooks are off.

        Examples:
            >>> VLoRAModel(base_model, subspace).unload() is base_model
            True
        """
        exchanged, task_id = self._exchanged(), self._merged
        if task_id is not None:
            self._undo_merge()
        self.clear_task()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if exchanged:
            raise ModelStateError(
                f"{some_of(exchanged)} got another weight while task {task_id!r} was merged, and keeps "
                "it; all else is as it was"
            )
        return self.base_model

    @property
    def _is_unloaded(self) -> bool:
        return bool(self._layers) and not self._hooks

    # --- weights ----------------------------------------------------------------------------------

    def reconstruct_state_dict(self, task_id: str) -> dict[str, torch.Tensor]:
        """delta_W (d_out, d_in) in float32 of every layer that a task changes, without ``scaling``.

        Raises:
            TaskNotFoundError: there is no such task.

        Examples:
            >>> deltas = VLoRAModel(base_model, subspace).reconstruct_state_dict("task_0")
            >>> deltas["layers.0.q_proj"].shape
            torch.Size([8, 12])
        """
        self._source.check(task_id)
        return {name: u.delta() for name, u in self._source.updates(task_id).items()}

    def merge(self, task_id: str | None = None) -> None:
        """Add a task to the base model's weights, so that it runs without hooks.

        The original weights are kept beside, and ``unmerge`` puts these very bits back, as does a merge
        that fails half-way. Until then ``load_state_dict`` is refused, whose weights would be lost.

        Args:
            task_id: the task; the active one when None.

        Raises:
            OptionError: no task is given and none is active; or another VLoRAModel, or a training, runs a
                task in this model.
            TaskNotFoundError: there is no such task.
            ModelStateError: a task is merged already, a layer is quantised, the model was unloaded, or
                the subspace has gained a layer of this task since the model was wrapped.
            ModelMismatchError: a layer shares its weight with another one, which would change too.

        Examples:
            >>> model = VLoRAModel(base_model, subspace)
            >>> model.merge("task_0")
            >>> model.is_merged
            True
            >>> model.unmerge()
        """
        self._refuse_merged("merge")
        self._refuse_unloaded()
        task_id = self.active_task if task_id is None else task_id
        if task_id is None:
            raise OptionError("no task to merge; give one, or call set_task first")
        updates, heads = self._updates(task_id), self._own_heads(task_id)
        changed = [layer for layer in self._layers if layer.name in updates]
        for layer in changed:
            layer.refuse_beside_another()
        with self._kept_if_it_fails():
            # With its own head a layer may share its weight no longer, and without another's again.
            self._activate([None] * len(self._layers), None, (heads,), private=True)
            self._check_mergeable(changed)
            for layer in changed:
                weight = layer.module.weight
                assert isinstance(weight, nn.Parameter)
                self._originals.append((layer, weight, weight.detach().clone()))
                layer.merged_by = weakref.ref(self)
                # Not the factors that run, which have the layer's dtype.
                _add_to_weight(layer, weight, self._scaling(task_id) * updates[layer.name].delta())
        self._active = self._merged = task_id
        # The base model's own comes first, before anything is loaded; the others see a load of a part.
        names = {module: name for name, module in self.base_model.named_modules()}
        whole = _LoadGuard(task_id, [(f"{names[one.module]}.weight", one) for one in changed])
        parts = [(one.module, _LoadGuard(task_id, [("weight", one)])) for one in changed]
        for module, guard in ((self.base_model, whole), *parts):
            self._guards.append(module.register_load_state_dict_pre_hook(guard))

    def unmerge(self) -> None:
        """Put the original weights back, bit by bit; nothing is active then.

        Raises:
            ModelStateError: nothing is merged, or a layer got another weight meanwhile.
        """
        if self._merged is None:
            raise ModelStateError("the model is not merged, so there is nothing to unmerge")
        if exchanged := self._exchanged():
            raise ModelStateError(
                f"{some_of(exchanged)} got another weight while task {self._merged!r} was merged, so "
                "that it cannot be unmerged; unload() takes it out of the others"
            )
        self._undo_merge()
        self.clear_task()

    def _exchanged(self) -> list[str]:
        """The layers whose weight is no longer the one that was merged into."""
        return [
            f"layer {layer.name}"
            for layer, weight, _ in self._originals
            if layer.module.weight is not weight
        ]

    def _undo_merge(self) -> None:
        self._restore_weights()
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        self._merged = None

    def _restore_weights(self) -> None:
        with torch.no_grad():
            for layer, weight, original in self._originals:
                weight.copy_(original)
                layer.merged_by = None
        self._originals.clear()

    @property
    def is_merged(self) -> bool:
        """Whether a task is in the base model's weights."""
        return self._merged is not None

    @property
    def qlora_info(self) -> dict[str, Any]:
        """What is quantised in the base model.

        Returns:
            ``quantized``; ``method``, that of most layers ("nf4", "fp4" or "int8" of bitsandbytes, "fp8",
            "other" or None); ``num_quantized_layers`` and ``num_target_layers``, of the subspace's.

        Examples:
            >>> VLoRAModel(base_model, subspace).qlora_info["num_target_layers"]
            2
        """
        methods = [layer.quantized for layer in self._layers if layer.quantized]
        return {
            "quantized": bool(methods),
            "method": Counter(methods).most_common(1)[0][0] if methods else None,
            "num_quantized_layers": len(methods),
            "num_target_layers": len(self._layers),
        }

    def compile(self, **kwargs: Any) -> VLoRAModel:  # type: ignore[override]
        """Compile the base model in place with ``torch.compile``; hooks are compiled with it.

        Tasks of one shape (all dense cores on a shared basis, or one rank) share the compiled code;
        each further shape is compiled once.

        Args:
            kwargs: of ``torch.compile``.

        Returns:
            This object.
        """
        self.base_model.compile(**kwargs)
        return self

    def __repr__(self) -> str:
        mixed = isinstance(self._active, tuple | _Blend)
        active = "mixed" if mixed else self._active or "none"
        merged = " merged" if self.is_merged else ""
        return (
            f"VLoRAModel(tasks={len(self._source.task_ids())}, active={active!r}{merged}, "
            f"layers={len(self._layers)})"
        )

    # --- inside -----------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> VLoRAModel:
        # ``to``, ``half`` and the like come through here: what was prepared lies elsewhere now.
        super()._apply(fn, recurse)
        self._heads.move(fn)
        if self.is_merged:
            self._moved()
        else:
            self.refresh()
        return self

    def _activate(
        self,
        updates: Sequence[Update | None],
        active: _Active,
        heads: Sequence[Heads] = (),
        *,
        private: bool = False,
    ) -> None:
        for layer, update in zip(self._layers, updates):
            if update is not None:
                layer.refuse_beside_another()
        # Heads first: they may be refused, and then nothing has changed.
        self._heads.show(heads, private=private)
        for layer, update in zip(self._layers, updates):
            layer.update = update
        self._active = active

    def _state(self) -> tuple[list[Update | None], _Active, tuple[Heads, ...]]:
        return [layer.update for layer in self._layers], self._active, self._heads.shown

    @contextmanager
    def _kept_if_it_fails(self) -> Iterator[None]:
        before = self._state()
        try:
            yield
        except BaseException:
            # Also where a device has no room for a layer's delta_W, or the user gave up.
            self._restore_weights()
            self._activate(*before)
            raise

    def _plan(self, task_id: str) -> _Plan:
        """A task with its updates where the layers are; kept for the next time."""
        self._refuse_unloaded()
        self._source.check(task_id)
        state = self._source.state(task_id)
        known = self._plans.get(task_id)
        if known is not None and _same_objects(known.state, state):
            self._plans.move_to_end(task_id)
            return known
        if not all(self._is_current(*item) for item in self._plans.items()):
            # The subspace changed: other tasks, and the bases themselves, may have too.
            self._forget()
        updates = self._updates(task_id)
        plan = _Plan(
            state,
            [
                self._placed(layer, updates.get(layer.name), self._scaling(task_id))
                for layer in self._layers
            ],
            self._own_heads(task_id),
        )
        self._plans[task_id] = plan
        if len(self._plans) > self._cached_tasks:
            self._plans.popitem(last=False)
        return plan

    def _is_current(self, task_id: str, plan: _Plan) -> bool:
        try:
            self._source.check(task_id)
        except TaskNotFoundError:
            return False
        return _same_objects(plan.state, self._source.state(task_id))

    def _updates(self, task_id: str) -> dict[str, LowRankUpdate]:
        """The layers that a task changes, all of them layers that have a hook."""
        updates = self._source.updates(task_id)
        gained = updates.keys() - {layer.name for layer in self._layers}
        if gained:
            raise ModelStateError(
                f"task {task_id!r} changes {min(gained)}, which the subspace gained after the model was "
                "wrapped; call unload() and make a new VLoRAModel"
            )
        return updates

    def _own_heads(self, task_id: str) -> dict[str, torch.Tensor]:
        return self._heads.find(self._source.extra(task_id), self._source.config(task_id))

    def _scaling(self, task_id: str) -> float:
        """What a task's update is multiplied by: 1 where its own scale is folded in."""
        return 1.0 if self._source.scale_known(task_id) else self.scaling

    def _placed(
        self, layer: AdaptedLayer, update: LowRankUpdate | None, scaling: float
    ) -> LowRankUpdate | None:
        if update is None:
            return None
        # PEFT writes zeros for such a layer, since no gradient reaches it.
        if layer.reader is not None and update.delta().any():
            layer.refuse_to_run("use merge()")
        a = update.a if scaling == 1.0 else update.a * scaling
        return LowRankUpdate(
            place(a.detach(), layer, self.compute_dtype),
            None if update.b is None else place(update.b.detach(), layer, self.compute_dtype),
            self._placed_basis(layer, update.v),
            self._placed_basis(layer, update.u),
        )

    def _placed_basis(
        self, layer: AdaptedLayer, tensor: torch.Tensor | None
    ) -> torch.Tensor | None:
        """One copy of a basis for all its tasks: mixtures tell tasks on one basis by its identity."""
        if tensor is None:
            return None
        key = layer.name, id(tensor)
        if key not in self._bases:
            # The original is kept with it, since its id is the key.
            self._bases[key] = tensor, place(tensor.detach(), layer, self.compute_dtype)
        return self._bases[key][1]

    def _refuse_unloaded(self) -> None:
        if self._is_unloaded:
            raise ModelStateError(
                "the model was unloaded, so that no task reaches it; wrap it in a VLoRAModel again"
            )

    def _refuse_merged(self, what: str) -> None:
        if self._merged is not None:
            raise ModelStateError(
                f"task {self._merged!r} is merged into the weights; call unmerge() to {what}"
            )

    def _check_mergeable(self, layers: Sequence[AdaptedLayer]) -> None:
        for layer in layers:
            if layer.quantized or not isinstance(
                getattr(layer.module, "weight", None), nn.Parameter
            ):
                raise ModelStateError(
                    f"layer {layer.name} is quantised, or has no weight of its own, so that nothing can "
                    "be added to it; use set_task"
                )
        users = Counter(
            id(parameter)
            for module in self.base_model.modules()
            for parameter in module._parameters.values()
        )
        for layer in layers:
            if users[id(layer.module.weight)] > 1:
                raise ModelMismatchError(
                    f"layer {layer.name} shares its weight with another layer, which merging would "
                    "change too; use set_task"
                )


def _same_objects(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


@dataclass(eq=False)
class _LoadGuard:
    """Before ``load_state_dict``: ``unmerge`` would put the weights of before over what is loaded.

    Attributes:
        task_id: what is merged.
        layers: the name of each merged weight in the module that is guarded, and its layer.
    """

    task_id: str
    layers: list[tuple[str, AdaptedLayer]]

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
    ) -> None:
        if any(layer.is_merged and prefix + name in state_dict for name, layer in self.layers):
            raise ModelStateError(
                f"task {self.task_id!r} is merged into the weights; call unmerge() before "
                "load_state_dict()"
            )


def _add_to_weight(layer: AdaptedLayer, weight: nn.Parameter, delta: torch.Tensor) -> None:
    """W += delta_W, summed in float32 or what is wider, and rounded once."""
    delta = delta.to(weight.device)
    with torch.no_grad():
        # delta_W is float32, and torch adds in the wider of both dtypes.
        weight.copy_(weight + (delta.T if layer.transposed else delta))
