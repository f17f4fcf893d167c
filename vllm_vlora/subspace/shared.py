"""Many adapters as points of one subspace: fit, project, reconstruct, absorb, quantise, train, store."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_vlora.adapters.module_names import renamed
from vllm_vlora.adapters.peft_folder import Factors
from vllm_vlora.checkpoint.losses import is_worthless
from vllm_vlora.errors import OptionError
from vllm_vlora.snapshots import ref_name
from vllm_vlora.subspace.fitting import Choice, project_member, warn_of_few
from vllm_vlora.subspace.layers import PARAMETERS, FlatLayer, Layer
from vllm_vlora.subspace.members import (
    AnyAdapter,
    as_member,
    as_members,
    share_layers,
    warn_of_bases,
)
from vllm_vlora.subspace.refitting import FittedState
from vllm_vlora.subspace.rounding import (
    INT4,
    check_quantization,
    quantized_layer,
    quantized_loadings,
)
from vllm_vlora.subspace.sizes import CompressionStats, compression_stats, full_stack_stats
from vllm_vlora.subspace.storage import read_subspace, with_alpha, write_subspace
from vllm_vlora.subspace.tasks import (
    TaskOrigin,
    TaskProjection,
    TrainableParams,
    warn_of_losses,
    with_loadings,
)
from vllm_vlora.subspace.weights import LoRAWeights, of_new_factors, own_rank_options
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.wording import count_of, some_of

__all__ = ["CompressionStats", "SharedSubspace", "TaskOrigin", "TaskProjection"]

_STREAMED_COMPONENTS = 4
_MORE_VARIANCE = "give num_components, or a variance_threshold nearer to 1"


class SharedSubspace(FittedState):
    """Adapters of one base model as points of a shared subspace, in memory.

    ``flat`` (vlora's form, and the default) describes each layer's A and B by their mean and k principal
    components a side, and a task by k numbers a side. ``joint`` has bases U, V of each layer, and a core
    C for each task: delta_W = U C V, whatever the adapters' ranks. alpha / r is folded into B before
    anything is fitted. Build one with :meth:`from_adapters` or :meth:`load`.

    Attributes:
        layers: layer name -> what its tasks share (``FlatLayer`` or ``JointLayer``).
        tasks: task id -> its loadings; a plain dict, in the order in which tasks came. Its keys are the
            tasks' names, whatever a projection was called before.
        rank: the largest rank of the adapters.
        num_components: the k asked for, or the largest of the k that were chosen.
        adaptive_k, variance_threshold: how k is chosen again by :meth:`absorb`.

    Raises:
        OptionError: no layers, or layers of both kinds.

    Examples:
        >>> subspace = SharedSubspace.from_adapters(adapters, num_components=3)
        >>> subspace
        SharedSubspace(layers=2, k=3, rank=2, tasks=4, representation='flat')
        >>> weights = subspace.reconstruct("task_1")
        >>> torch.allclose(weights.lora_a["layers.0.q_proj"], adapters[1].lora_a["layers.0.q_proj"],
        ...                atol=1e-5)
        True
    """

    # --- building --------------------------------------------------------------------------------

    @classmethod
    def from_adapters(
        cls,
        adapters: Sequence[AnyAdapter],
        task_ids: Sequence[str] | None = None,
        variance_threshold: float = 0.6,
        num_components: int | None = None,
        adaptive_k: bool = False,
        *,
        representation: str = "flat",
        missing: str = "error",
    ) -> SharedSubspace:
        """Fit a subspace to adapters and project them onto it.

        Args:
            adapters: LoRAWeights, opened adapters, folders or Hub ids.
            task_ids: by default "task_0", "task_1", ...
            variance_threshold: without ``num_components``, k is the least number that holds this share of
                the variance on either side of every layer.
            num_components: k. Where there are fewer, all are kept, which loses nothing, with a warning;
                :meth:`absorb` then takes up to k with every adapter that comes. Flat has one less than
                adapters, for the mean is kept beside the components and N points span N - 1 directions
                about it (vlora counts an N-th of zero variance); a single adapter has one component.
                Joint has as many as the adapters' ranks together, or what a layer's size allows.
            adaptive_k: choose k by ``variance_threshold`` for each layer and side; ``num_components`` is
                then the most.
            representation: "flat" or "joint".
            missing: what is done where an adapter lacks a layer that another has: "error", "zero" (no
                update there) or "common" (leave the layer out, with a warning; what vlora does).

        Raises:
            AdapterError: an adapter cannot be read; flat, and ranks differ; or a layer is missing.
            OptionError: an option is out of range.
            TaskIdError: a task id twice, or one that is not allowed.

        Examples:
            >>> SharedSubspace.from_adapters(adapters, ["a", "b", "c", "d"], variance_threshold=1.0)
            SharedSubspace(layers=2, k=3, rank=2, tasks=4, representation='flat')
        """
        by_variance = adaptive_k or num_components is None
        choice = Choice(num_components, variance_threshold if by_variance else None, adaptive_k)
        members = share_layers(as_members(adapters, task_ids), missing)
        warn_of_bases([member.metadata for member in members], stacklevel=2)
        if num_components is not None and not adaptive_k:
            warn_of_few(members, representation, num_components, stacklevel=2)
        subspace = cls._fitted(members, representation, choice, exact=True)
        subspace.variance_threshold = variance_threshold
        if num_components is None:
            subspace._warn_of_losses(_MORE_VARIANCE, stacklevel=2)
        return subspace

    @classmethod
    def from_adapters_streaming(
        cls,
        adapter_paths: Sequence[str | Path],
        task_ids: Sequence[str] | None = None,
        num_components: int | None = None,
        *,
        representation: str = "flat",
        missing: str = "error",
    ) -> SharedSubspace:
        """Fit a subspace to adapters on disk, in memory that does not grow with their number.

        One layer is fitted at a time, from a few adapters at once, and read several times
        (``flat_basis``, ``shared_basis``). The result does not depend on the order of the adapters,
        as vlora's does.

        Args:
            adapter_paths: folders or Hub ids. task_ids: by default the folders' names.
            num_components: as of :meth:`from_adapters`; None is 4, or as many as there are.

        Raises:
            As :meth:`from_adapters`.

        Examples:
            >>> SharedSubspace.from_adapters_streaming(adapter_dirs, num_components=2).tasks["task_3"]
            TaskProjection(task_id='task_3', k=2, layers=2)
        """
        names = [ref_name(path) for path in adapter_paths] if task_ids is None else task_ids
        members = share_layers(as_members(adapter_paths, names), missing)
        warn_of_bases([member.metadata for member in members], stacklevel=2)
        choice = Choice(_STREAMED_COMPONENTS if num_components is None else num_components)
        if num_components is not None:
            warn_of_few(members, representation, num_components, stacklevel=2)
        subspace = cls._fitted(members, representation, choice, exact=False)
        if num_components is None:
            subspace._warn_of_losses("give a larger num_components", stacklevel=2)
        return subspace

    # --- tasks -----------------------------------------------------------------------------------

    def project(
        self,
        adapter: AnyAdapter,
        task_id: str,
        warn_threshold: float | None = None,
        *,
        missing: str | None = None,
    ) -> TaskProjection:
        """The point of the subspace that is nearest to an adapter; it is not added.

        Args:
            warn_threshold: warn where 1 - ||delta_W' - delta_W|| / ||delta_W|| is below this; by default
                where more than 5 % of the adapter's gain is predicted to be lost (``checkpoint.losses``).
            missing: as of :meth:`from_adapters`. A layer that the subspace lacks is an error unless it is
                "common". By default "zero" where some task of the subspace lacks a layer, else "error".

        Raises:
            AdapterError: shapes differ, flat and another rank, or layers are missing.
            TaskIdError: the id is not allowed.

        Examples:
            >>> projection = subspace.project(adapters[0], "again")
            >>> torch.allclose(projection.loadings_a["layers.0.q_proj"],
            ...                subspace.tasks["task_0"].loadings_a["layers.0.q_proj"], atol=1e-5)
            True
        """
        member = self._fitting_member(as_member(adapter, task_id), missing)
        projection = project_member(self.layers, member)
        projection.basis_id = self.basis_id
        self._warn_of_base(member, stacklevel=2)
        coverage = 1.0 - projection.origin.error
        if warn_threshold is None:
            advice = "absorb() the adapter to widen the basis"
            warn_of_losses([projection], self.representation, advice, stacklevel=2)
        elif coverage < warn_threshold:
            warnings.warn(
                f"the subspace holds {max(coverage, 0.0):.1%} of adapter {task_id!r}; absorb() it to "
                "widen the basis",
                stacklevel=2,
            )
        return projection

    def add_task(self, projection: TaskProjection, *, replace: bool = False) -> None:
        """Add a task.

        Args:
            replace: overwrite a task of that id.

        Raises:
            TaskIdError: the id is taken or not allowed.
            OptionError: loadings have another shape than the layers, or are not finite; or a basis was
                changed since the task was projected or blended.

        Examples:
            >>> subspace.add_task(subspace.project(adapters[0], "copy"))
            >>> "copy" in subspace.tasks
            True
        """
        validate_task_id(projection.task_id)
        if not replace:
            self._check_free(projection.task_id)
        self._warn_of_scale(projection.task_id, projection.origin.scale_known, stacklevel=2)
        self.tasks[projection.task_id] = self._placed(projection)

    def remove_task(self, task_id: str) -> None:
        """Take a task out; what the others share stays as it is.

        Raises:
            TaskNotFoundError: no such task.

        Examples:
            >>> subspace.remove_task("task_3")
            >>> list(subspace.tasks)
            ['task_0', 'task_1', 'task_2']
        """
        self._task(task_id)
        del self.tasks[task_id]

    def reconstruct(self, task_id: str) -> LoRAWeights:
        """A task as an adapter of scale 1: the subspace's own rank (flat) or its core's rank (joint).

        Nothing of it is the subspace's own, so that it may be changed in place. Its layers have the
        names that the task's adapter gave them.

        The adapter's config comes along with ranks and alphas that fit, its heads as they were. Where
        loadings require gradients the result is differentiable; a joint one then has rank k.

        Raises:
            TaskNotFoundError: no such task. OptionError: its loadings do not fit the layers.

        Examples:
            >>> subspace.reconstruct("task_0").scale("layers.0.q_proj")
            1.0
        """
        task = self._placed(self._task(task_id))
        names = [name for name in self.layers if name in task]
        # An adapter has a layer at least: a task that changes none has zeros in all of them.
        own = {renamed(name, task.origin.renamed): name for name in names or self.layers}
        factors = {
            layer: self._factors(name, task.at(name)) if names else _no_update(self.layers[name])
            for layer, name in own.items()
        }
        kinds = {layer: self.layers[name].kind for layer, name in own.items()}
        weights = LoRAWeights(
            list(factors),
            {name: a for name, (a, _) in factors.items()},
            {name: b for name, (_, b) in factors.items()},
            max((a.shape[0] for a, _ in factors.values()), default=0),
            kinds={layer: kind for layer, kind in kinds.items() if kind != "linear"},
            extra={name: tensor.clone() for name, tensor in task.origin.extra.items()},
            name=task_id,
        )
        metadata = {"peft_type": "LORA", "task_type": None, **deepcopy(dict(task.origin.metadata))}
        if not metadata.get("target_modules"):
            metadata["target_modules"] = list(factors)
        weights.metadata = of_new_factors({**metadata, **own_rank_options(weights)})
        return weights

    def absorb(
        self,
        new_adapter: AnyAdapter,
        new_task_id: str,
        *,
        originals: Mapping[str, AnyAdapter] | None = None,
        num_components: int | None = None,
        missing: str | None = None,
    ) -> None:
        """Fit the subspace anew to its tasks and one more adapter.

        Tasks are refitted as they are stored, so that each absorption may cost them something; those with
        an adapter in ``originals`` are refitted to it, and do not drift. A quantised subspace is so no
        more.

        Args:
            originals: task id -> its adapter. num_components: k from now on; by default as before.
            missing: as of :meth:`from_adapters`; by default as of :meth:`project`.

        Raises:
            TaskIdError: the id is taken or not allowed. TaskNotFoundError: an original of no task.
            AdapterError, OptionError: as :meth:`from_adapters`.

        Examples:
            >>> some = SharedSubspace.from_adapters(adapters[:3], num_components=2)
            >>> some.absorb(adapters[3], "new", num_components=3)
            >>> round(some.tasks["new"].origin.error, 4), len(some.tasks)
            (0.0, 4)
        """
        self._refit(new_adapter, new_task_id, originals or {}, num_components, missing)

    def absorb_incremental(
        self,
        new_adapter: AnyAdapter,
        new_task_id: str,
        *,
        num_components: int | None = None,
        missing: str | None = None,
    ) -> None:
        """Take an adapter in without touching all tasks' weights: :meth:`absorb` without originals.

        The fit is that of the stored tasks and the new adapter, done on their coordinates. Tasks lose
        what the components that are cut off held of them; ``origin.error`` of a task says how much at
        most.

        Args:
            As :meth:`absorb`.

        Raises:
            OptionError: the subspace is quantised. Others as :meth:`absorb`.

        Examples:
            >>> some = SharedSubspace.from_adapters(adapters[:3], num_components=2)
            >>> some.absorb_incremental(adapters[3], "new", num_components=3)
            >>> round(some.tasks["new"].origin.error, 4)
            0.0
        """
        self._grow(new_adapter, new_task_id, num_components, missing)

    # --- training --------------------------------------------------------------------------------

    def get_trainable_params(
        self,
        task_id: str,
        num_expand: int = 0,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Parameter]:
        """Float32 copies of a task's loadings, to be trained; :meth:`update_task` puts them back.

        Args:
            num_expand: widen every basis by so many random orthogonal directions first, which changes
                the subspace for good. No task changes by it: all get zeros there.
            generator: of the CPU, draws them; None is torch's own.

        Returns:
            Flat: "LAYER.loadings_a" (k_a,) and "LAYER.loadings_b" (k_b,). Joint: "LAYER.core"
            (k_out, k_in).

        Raises:
            TaskNotFoundError: no such task.
            OptionError: ``num_expand`` is negative or more than the layers allow, or a quantised subspace
                is to be expanded.

        Examples:
            >>> params = subspace.get_trainable_params("task_0")
            >>> sorted(params)[0], sum(p.numel() for p in params.values())
            ('layers.0.q_proj.loadings_a', 8)
        """
        self._task(task_id)
        if num_expand:
            self._expand(num_expand, generator)
        task = self._placed(self.tasks[task_id])
        names = PARAMETERS[self.representation]
        params = {
            f"{layer}.{name}": Parameter(tensor.detach().float().clone())
            for layer in self.layers
            if layer in task
            for name, tensor in zip(names, task.at(layer))
            if tensor is not None
        }
        return TrainableParams(params, self.basis_id)

    def update_task(self, task_id: str, params: Mapping[str, Tensor]) -> None:
        """Put trained parameters into a task, in the dtype of its layers.

        What was measured against the task's adapter is forgotten with it.

        Args:
            params: as :meth:`get_trainable_params` names them; all of the task's.

        Raises:
            TaskNotFoundError: no such task.
            OptionError: names, shapes or values do not fit, or a basis was changed since these very
                parameters were given out; the task is then as it was.

        Examples:
            >>> params = subspace.get_trainable_params("task_0")
            >>> subspace.update_task("task_0", {name: p + 1 for name, p in params.items()})
            >>> subspace.tasks["task_0"].origin.errors
            {}
        """
        task = self._task(task_id)
        if isinstance(params, TrainableParams):
            self._check_basis(task_id, params.basis_id)
        wanted = set(self.get_trainable_params(task_id))
        if wanted != set(params):
            odd = min(wanted ^ set(params))
            raise OptionError(
                f"parameter {odd!r} is missing or no parameter of task {task_id!r}; give those of "
                "get_trainable_params"
            )
        first = PARAMETERS[self.representation][0]
        trained = TaskProjection(
            task_id,
            {layer: params[f"{layer}.{first}"].detach().clone() for layer in task.loadings_a},
            {layer: params[f"{layer}.loadings_b"].detach().clone() for layer in task.loadings_b},
            replace(task.origin, errors={}, error=0.0),
        )
        self.tasks[task_id] = self._placed(trained)

    # --- smaller, elsewhere ----------------------------------------------------------------------

    def quantize(
        self,
        bits: int = 8,
        method: str = "symmetric",
        block_size: int = 64,
        quantize_loadings: bool = False,
        double_quant: bool = False,
    ) -> SharedSubspace:
        """Quantise what the tasks share, in place; the tasks' loadings are fitted to it again.

        "nf4" is our number format ``nf4`` (``nf4-dq`` with ``double_quant``), "symmetric" with 8 bits is
        ``int8``: every row of d_in or d_out numbers is packed by itself, means along with components, and
        so they are saved. "symmetric" with 4 bits rounds rows to 15 levels, which no format has: such a
        subspace is saved as floats. In memory everything is held unpacked as well.

        Args:
            bits: 8 or 4, of "symmetric". method: "symmetric" or "nf4".
            block_size: elements that share a scale; our NF4 has 64 and no other.
            quantize_loadings: the tasks' own numbers too. Cores are then saved packed; flat loadings,
                which are few, as floats.
            double_quant: store the scales of NF4 in 8 bits.

        Returns:
            The subspace itself.

        Raises:
            OptionError: quantised already, or an option that does not exist or fit.

        Examples:
            >>> subspace.quantize(method="nf4").quantization
            'nf4'
        """
        format = check_quantization(bits, method, block_size, double_quant)
        if self.quantization is not None:
            raise OptionError(
                f"the subspace is quantised already ({self.quantization}); quantise it once, from the "
                "original adapters"
            )
        layers = {name: quantized_layer(layer, format) for name, layer in self.layers.items()}
        tasks = {}
        for task_id in self.tasks:
            loadings = {
                name: layers[name].project(*self._factors(name, pair))
                for name, pair in self._loadings(task_id)
            }
            packed = {}
            if quantize_loadings:
                rounded = {n: quantized_loadings(pair, format) for n, pair in loadings.items()}
                loadings = {name: pair for name, (pair, _) in rounded.items()}
                packed = {n: core for n, (_, core) in rounded.items() if core is not None}
            tasks[task_id] = self._drifted(task_id, layers, loadings)
            tasks[task_id].packed_cores = packed
        self.layers, self.tasks = layers, tasks
        self._rounded = format if format == INT4 else None
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SharedSubspace:
        """Move everything, in place; a quantised basis is still saved as it was packed.

        Returns:
            The subspace itself.

        Raises:
            OptionError: no floating-point dtype.

        Examples:
            >>> subspace.to(dtype=torch.bfloat16).components_a["layers.0.q_proj"].dtype
            torch.bfloat16
        """
        moved = self._copy()
        moved.layers = {name: layer.to(device, dtype) for name, layer in self.layers.items()}
        # The bases are what they were, but for rounding.
        held = moved._basis_id = self._basis_id
        tasks = {task_id: moved._placed(task) for task_id, task in self.tasks.items()}
        self.layers, self.tasks = moved.layers, tasks
        self._basis_id = held
        return self

    def compression_stats(self) -> CompressionStats:
        """Sizes as they would be saved, against the adapters at 16 bits a weight.

        ``compression_ratio`` is bytes over bytes, everything counted: means, components, the tasks' own
        numbers and file headers (vlora counts numbers, those in 32 bits like those in 4).
        ``components_per_layer`` has (k of A's side, k of B's side).

        Raises:
            OptionError: a dtype that cannot be stored.

        Examples:
            >>> stats = subspace.compression_stats()
            >>> stats["components_per_layer"]["layers.0.q_proj"], stats["num_tasks"]
            ((2, 2), 4)
        """
        return compression_stats(self._stored())

    def full_stack_compression(
        self,
        base_model_params: int | None = None,
        base_model_bits: int = 16,
        quantized_bits: int = 4,
    ) -> dict[str, Any]:
        """Bytes of base model and adapters together, before and after.

        Args:
            base_model_params: weights of the base model; None reports the adapters only.
            base_model_bits, quantized_bits: bits a weight, before and after.

        Raises:
            OptionError: a number that is not positive.

        Examples:
            >>> stats = subspace.full_stack_compression(base_model_params=1_000_000_000)
            >>> round(stats["base_model"]["compression_ratio"], 1)
            4.0
        """
        return full_stack_stats(
            self.compression_stats(), base_model_params, base_model_bits, quantized_bits
        )

    # --- files -----------------------------------------------------------------------------------

    def save(
        self, path: str | Path, *, force: bool = False, allow_large_error: bool | None = None
    ) -> Path:
        """Write a checkpoint, atomically, that ``vllm serve`` and the command line take too.

        Args:
            force: replace a checkpoint at ``path``.
            allow_large_error: write tasks with a relative error above 1, which leaving them out would
                not lose. By default they are written, as vlora does, with a warning; False refuses them.

        Returns:
            The folder's absolute path.

        Raises:
            BudgetError: a task has a relative error above 1, and ``allow_large_error`` is False.
            OptionError: there are no tasks, or a dtype that cannot be stored (float64).
            OutputError: the folder exists and may not be replaced, or cannot be written.

        Examples:
            >>> SharedSubspace.load(subspace.save(folder / "subspace"))
            SharedSubspace(layers=2, k=2, rank=2, tasks=4, representation='flat')
        """
        for task_id, task in self.tasks.items():
            validate_task_id(task_id)
            self._placed(task)
        allowed = allow_large_error is not False
        written = write_subspace(path, self._stored(), force=force, allow_large_error=allowed)
        worthless = [task for task, held in self.tasks.items() if is_worthless(held.origin.error)]
        if worthless and allow_large_error is None:
            warnings.warn(
                f"saved, but worse than left out: {some_of(map(repr, worthless))}; absorb() the "
                "adapters, or remove_task() these",
                stacklevel=2,
            )
        return written

    def save_quantized(
        self,
        path: str | Path,
        block_size: int = 64,
        *,
        double_quant: bool = False,
        force: bool = False,
        allow_large_error: bool | None = None,
    ) -> Path:
        """Write a checkpoint in NF4, as ``quantize(method="nf4")`` and :meth:`save` would.

        The subspace stays as it is. One that is in that format already is saved as it is.

        Args:
            As :meth:`quantize` and :meth:`save`.

        Raises:
            OptionError: quantised otherwise, or a block size other than 64. Others as :meth:`save`.

        Examples:
            >>> SharedSubspace.load(subspace.save_quantized(folder / "small")).quantization
            'nf4'
        """
        format = check_quantization(8, "nf4", block_size, double_quant)
        if self.quantization == format:
            return self.save(path, force=force, allow_large_error=allow_large_error)
        smaller = self._copy().quantize(method="nf4", double_quant=double_quant)
        return smaller.save(path, force=force, allow_large_error=allow_large_error)

    @classmethod
    def load(cls, path: str | Path, *, lora_alpha: float | None = None) -> SharedSubspace:
        """Read a checkpoint of ours (a folder or a Hub id), or a folder that vlora wrote.

        Any checkpoint whose tasks are all flat or all joint on one basis can be read, also one that
        ``vllm-vlora compress`` wrote.

        Args:
            lora_alpha: that of all adapters, where their tasks have none, as vlora keeps none. Their
                updates become alpha / r times what is stored, and ``scales_known`` is true.

        Raises:
            CheckpointError: it cannot be read, is damaged, or has private or mixed tasks.
            OptionError: ``lora_alpha`` is no scale, or a task has its own.

        Examples:
            >>> SharedSubspace.load(joint.save(folder / "joint")).representation
            'joint'
        """
        stored = read_subspace(path)
        if lora_alpha is not None:
            stored = with_alpha(stored, lora_alpha)
        k = stored.asked.num_components
        return cls(
            stored.layers,
            stored.tasks,
            rank=stored.rank,
            num_components=k if isinstance(k, int) else None,
            adaptive_k=stored.asked.adaptive_k,
            variance_threshold=stored.asked.variance_threshold,
        )

    def _expand(self, count: int, generator: torch.Generator | None) -> None:
        if count < 0:
            raise OptionError(f"num_expand is {count}; give no negative number")
        if self.quantization is not None:
            raise OptionError("the subspace is quantised; expand it before quantize()")
        wider = {name: layer.expanded(count, generator) for name, layer in self.layers.items()}
        for name, layer in wider.items():
            if any(new - old < count for new, old in zip(layer.widths, self.layers[name].widths)):
                raise OptionError(
                    f"layer {name!r} has no room for {count_of(count, 'more direction')}; give a smaller "
                    "num_expand"
                )
        tasks = {
            task_id: with_loadings(
                task, {name: wider[name].widened(task.at(name)) for name in task.loadings_a}
            )
            for task_id, task in self.tasks.items()
        }
        self.layers, self.tasks = wider, tasks
        self.num_components += count


def _no_update(layer: Layer) -> Factors:
    rank = layer.rank if isinstance(layer, FlatLayer) else 1
    zeros = torch.zeros(rank, layer.d_in), torch.zeros(layer.d_out, rank)
    return zeros[0].to(layer.device, layer.dtype), zeros[1].to(layer.device, layer.dtype)
