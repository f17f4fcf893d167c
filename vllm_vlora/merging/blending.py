"""New tasks out of the tasks of one checkpoint or subspace: blends, negation, interpolation.

On one joint basis an update is linear in its core, delta_W_i = U C_i V, so that

    sum_i w_i delta_W_i = U (sum_i w_i C_i) V

is exact and costs as much as adding a few small matrices. Other tasks of a checkpoint have no common
core: their blend is stored privately, as stacked factors, which is exact too but takes the bytes of all.
Flat loadings cannot be blended: delta_W = B A is bilinear in them, and a sum of loadings is the
update of the summed factors, with a product of every A with every B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, overload

import torch

from vllm_vlora.adapters.module_names import renamed
from vllm_vlora.adapters.peft_folder import Factors
from vllm_vlora.checkpoint.losses import Losses
from vllm_vlora.checkpoint.manifest import TaskRecord
from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.checkpoint.successor import Successor, edited
from vllm_vlora.checkpoint.task_entry import common
from vllm_vlora.errors import OptionError, TaskIdError, TaskNotFoundError, VLoRAError
from vllm_vlora.merging.merging import (
    check_weight,
    common_config,
    common_extra,
    unscaled_config,
)
from vllm_vlora.quantize import FORMATS, SHARED_FORMATS, is_finite, unpack
from vllm_vlora.representations.decode import decode, relative_error
from vllm_vlora.representations.factors import balanced_svd, relative, squared_norm
from vllm_vlora.representations.joint import basis_rows, core_factors, encode_joint
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.spec import ModuleSpec
from vllm_vlora.representations.stored import Basis, StoredModule
from vllm_vlora.subspace.layers import JointLayer
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.tasks import TaskOrigin, TaskProjection, common_scale
from vllm_vlora.subspace.weights import LoRAWeights, described, exact_config
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.wording import some_of

# Singular values below this share of the largest task's norm are rounding: tasks share directions.
_NEGLIGIBLE = 1e-7

_Shared: TypeAlias = Mapping[tuple[str, str], Basis]
"""(module name, representation) -> what its tasks share."""


@dataclass(frozen=True)
class BlendedTask:
    """A task that a blend has written into a checkpoint.

    Attributes:
        representation: joint, private, or mixed.
        ranks: the smallest and the largest of its modules.
        nbytes: of its file, extra tensors left out.
        error: ||delta_W' - delta_W||_F / ||delta_W||_F of what was stored beside the exact blend of the
            tasks as the checkpoint holds them: rounding, and what a smaller rank lost.
        losses: what must be said of it.
        left_behind: tokenizer files and chat templates that not all of the tasks have alike, and that
            the blend therefore does not have.
    """

    path: Path
    task_id: str
    representation: str
    ranks: tuple[int, int]
    nbytes: int
    error: float
    losses: Losses
    left_behind: tuple[str, ...] = ()


@overload
def blend_tasks(
    source: SharedSubspace, weights: Mapping[str, float], task_id: str | None = None
) -> TaskProjection: ...


@overload
def blend_tasks(
    source: Checkpoint | str | Path,
    weights: Mapping[str, float],
    task_id: str | None = None,
    *,
    rank: int | None = None,
    format: str = "float32",
    replace: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    allow_large_error: bool = False,
) -> BlendedTask: ...


def blend_tasks(
    source: SharedSubspace | Checkpoint | str | Path,
    weights: Mapping[str, float],
    task_id: str | None = None,
    *,
    rank: int | None = None,
    format: str = "float32",
    replace: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    allow_large_error: bool = False,
) -> TaskProjection | BlendedTask:
    """A new task, the weighted sum of others: delta_W = sum_i w_i delta_W_i.

    Of a joint ``SharedSubspace`` it is returned, and not added: ``subspace.add_task`` does that. Into a
    checkpoint it is written; every file that was there stays as it is, byte for byte.

    Args:
        source: a joint subspace, or a checkpoint: opened, its folder, or a Hub id (with ``output``).
        weights: task id -> weight, of any sign. A task that lacks a layer adds nothing there.
        task_id: of the new task. Default: the sum as text, ``"0.6*a+0.4*b"``.
        rank: for a checkpoint: the most that a layer may have, at the price of an error. Default: what
            is exact.
        format: for a checkpoint: number format of what is stored; float32 loses nothing.
        replace: for a checkpoint: replace a task of that id.
        output, force: for a checkpoint: write another folder; replace a checkpoint there.
        allow_large_error: for a checkpoint: store a sum with a relative error above 1 too.

    Raises:
        TaskNotFoundError: no such task. TaskIdError: the new id is not allowed, or taken.
        OptionError: no weights, a weight that is no number, a flat subspace, or an option that does not
            go with the source, as trellis codes for joint tasks.
        AdapterError: two tasks have different heads.
        BudgetError: cut to the rank, or in the format, the sum would be worse than none.
        CheckpointError, OutputError: the checkpoint cannot be read or written.

    Examples:
        >>> mixed = blend_tasks(joint, {"task_0": 0.6, "task_1": 0.4}, "mixed")
        >>> joint.add_task(mixed)
        >>> parts = [w * joint.tasks[t].cores["layers.0.q_proj"]
        ...          for t, w in (("task_0", 0.6), ("task_1", 0.4))]
        >>> torch.allclose(joint.tasks["mixed"].cores["layers.0.q_proj"], sum(parts))
        True
    """
    chosen = _checked_weights(weights)
    name = validate_task_id(_formula(chosen) if task_id is None else task_id)
    if isinstance(source, SharedSubspace):
        if (
            (rank, format, output) != (None, "float32", None)
            or replace
            or force
            or allow_large_error
        ):
            raise OptionError(
                "rank, format, replace, output, force and allow_large_error are for checkpoints; a "
                "blend of a subspace is exact and only returned, add it with add_task"
            )
        return _blend_cores(source, chosen, name)
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank} is impossible; give a whole number above 0")
    if format not in FORMATS:
        raise OptionError(f"format {format!r} is unknown; give one of {', '.join(FORMATS)}")
    return _write_blend(
        source, chosen, name, rank, format, replace, output, force, allow_large_error
    )


@overload
def negate_task(
    source: SharedSubspace, task: str, task_id: str | None = None
) -> TaskProjection: ...


@overload
def negate_task(
    source: Checkpoint | str | Path, task: str, task_id: str | None = None, *, replace: bool = False
) -> BlendedTask: ...


def negate_task(
    source: SharedSubspace | Checkpoint | str | Path,
    task: str,
    task_id: str | None = None,
    *,
    replace: bool = False,
) -> TaskProjection | BlendedTask:
    """A new task with -delta_W, which takes away what the task adds; see :func:`blend_tasks`.

    Raises:
        As :func:`blend_tasks`.

    Examples:
        >>> less = negate_task(joint, "task_0", "not_task_0")
        >>> torch.equal(less.cores["layers.0.q_proj"], -joint.tasks["task_0"].cores["layers.0.q_proj"])
        True
    """
    if isinstance(source, SharedSubspace):
        _check_no_replace(replace)
        return blend_tasks(source, {task: -1.0}, task_id)
    return blend_tasks(source, {task: -1.0}, task_id, replace=replace)


@overload
def interpolate_tasks(
    source: SharedSubspace, task_a: str, task_b: str, t: float, task_id: str | None = None
) -> TaskProjection: ...


@overload
def interpolate_tasks(
    source: Checkpoint | str | Path,
    task_a: str,
    task_b: str,
    t: float,
    task_id: str | None = None,
    *,
    replace: bool = False,
) -> BlendedTask: ...


def interpolate_tasks(
    source: SharedSubspace | Checkpoint | str | Path,
    task_a: str,
    task_b: str,
    t: float,
    task_id: str | None = None,
    *,
    replace: bool = False,
) -> TaskProjection | BlendedTask:
    """A new task (1 - t) delta_W_a + t delta_W_b; see :func:`blend_tasks`.

    Args:
        t: 0 is task a, 1 task b; beyond is extrapolation.

    Raises:
        As :func:`blend_tasks`; OptionError for one and the same task.

    Examples:
        >>> half = interpolate_tasks(joint, "task_0", "task_1", 0.5, "between")
        >>> half.task_id
        'between'
    """
    if task_a == task_b:
        raise OptionError(f"task {task_a!r} is given twice; name two tasks to interpolate")
    weights = {task_a: 1.0 - t, task_b: t}
    if isinstance(source, SharedSubspace):
        _check_no_replace(replace)
        return blend_tasks(source, weights, task_id)
    return blend_tasks(source, weights, task_id, replace=replace)


def core_similarity(
    subspace: SharedSubspace, task_ids: Sequence[str] | None = None
) -> torch.Tensor:
    """Cosines of tasks' updates from their cores alone.

    <U C_i V, U C_j V> = <C_i, U^T U C_j V V^T>, which is <C_i, C_j> on an orthonormal basis.

    Args:
        subspace: a joint one. task_ids: default: all, in their order.

    Returns:
        (N, N) float32: what ``compute_similarity_matrix`` gives for the reconstructed tasks.

    Raises:
        OptionError: a flat subspace. TaskNotFoundError: no such task.

    Examples:
        >>> core_similarity(joint).shape
        torch.Size([4, 4])
    """
    from vllm_vlora.merging.analysis import cosines

    chosen = list(subspace.tasks) if task_ids is None else list(task_ids)
    _check_joint(subspace)
    tasks = [_projection(subspace, task_id) for task_id in chosen]
    products = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for name, layer in subspace.layers.items():
        assert isinstance(layer, JointLayer)
        having = [place for place, task in enumerate(tasks) if name in task]
        if having:
            cores = torch.stack([tasks[place].cores[name].detach() for place in having]).double()
            u, v = layer.u.double(), layer.v.double()
            turned = (u.T @ u) @ cores @ (v @ v.T)
            where = torch.tensor(having)
            products[where[:, None], where] += (cores.flatten(1) @ turned.flatten(1).T).cpu()
    return cosines(products).float()


def read_tasks(checkpoint: Checkpoint, task_ids: Sequence[str]) -> list[LoRAWeights]:
    """Tasks of a checkpoint as adapters in memory: float32 factors of scale 1, heads kept.

    Raises:
        TaskNotFoundError: no such task. CheckpointError: a file is damaged.

    Examples:
        >>> from vllm_vlora import Checkpoint
        >>> [first] = read_tasks(Checkpoint.open(checkpoint), ["task_0"])
        >>> first.layer_names
        ['layers.0.q_proj', 'layers.0.v_proj']
    """
    stored = [checkpoint.load_task(task_id) for task_id in task_ids]
    shared = checkpoint.shared_by(task_ids)
    kinds = {spec.name: spec.kind for spec in checkpoint.modules if spec.kind != "linear"}
    return [_decoded(task, shared, kinds, checkpoint.record(task.task_id)) for task in stored]


# --- a subspace -----------------------------------------------------------------------------------


def _blend_cores(
    subspace: SharedSubspace, weights: Mapping[str, float], task_id: str
) -> TaskProjection:
    _check_joint(subspace)
    cores: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for layer, core in _projection(subspace, name).cores.items():
            # Weights act in float32, so that 16-bit cores are rounded once.
            part = weight * core.float()
            cores[layer] = part if layer not in cores else cores[layer] + part
    ordered = {
        name: cores[name].to(layer.dtype)
        for name, layer in subspace.layers.items()
        if name in cores
    }
    origin = _origin(subspace, weights)
    return TaskProjection(task_id, ordered, {}, origin, basis_id=subspace.basis_id)


def _origin(subspace: SharedSubspace, weights: Mapping[str, float]) -> TaskOrigin:
    """Base model and heads are the tasks' own; errors are counted from the tasks as they are."""
    known = common_scale({name: subspace.tasks[name] for name in weights})
    tasks = [subspace.tasks[name] for name in weights]
    config = common_config(
        [task.origin.metadata for task in tasks], [task.loadings_a for task in tasks]
    )
    if known:
        config |= {"r": subspace.rank, "lora_alpha": subspace.rank}
    extra = common_extra(
        [task.origin.extra for task in tasks], [f"task {name!r}" for name in weights]
    )
    return TaskOrigin(
        config,
        extra,
        source=_formula(weights),
        scale_known=known,
        renamed=tasks[0].origin.renamed,
    )


def _projection(subspace: SharedSubspace, task_id: str) -> TaskProjection:
    if task_id not in subspace.tasks:
        known = some_of(subspace.tasks)
        raise TaskNotFoundError(f"no task {task_id!r} in the subspace; it has: {known}")
    return subspace.tasks[task_id]


def _check_joint(subspace: SharedSubspace) -> None:
    if not all(isinstance(layer, JointLayer) for layer in subspace.layers.values()):
        raise OptionError(
            f"tasks of a {subspace.representation} subspace have no cores that could be added up; "
            "merge subspace.reconstruct(task) of each with task_arithmetic, or fit with "
            "representation='joint'"
        )


def _check_no_replace(replace: bool) -> None:
    if replace:
        raise OptionError(
            "replace is for checkpoints; of a subspace the task is only returned, add it with "
            "add_task(task, replace=True)"
        )


# --- a checkpoint ---------------------------------------------------------------------------------


def _write_blend(
    source: Checkpoint | str | Path,
    weights: Mapping[str, float],
    task_id: str,
    rank: int | None,
    format: str,
    replacing: bool,
    output: str | Path | None,
    force: bool,
    allow_large_error: bool,
) -> BlendedTask:
    where = source.path if isinstance(source, Checkpoint) else source
    with edited(where, output, force=force) as (checkpoint, folder):
        if task_id in checkpoint.tasks and not replacing:
            raise TaskIdError(
                f"{checkpoint.path} has a task {task_id!r} already; give another id, or replace it "
                "(replace=True; --force of the command)"
            )
        blend = _Blend(checkpoint, weights, rank, format)
        writer = Successor(folder, checkpoint, allow_large_error=allow_large_error)
        writer.keep_bases()
        # A replaced task keeps its place in the list.
        for known in dict.fromkeys([*checkpoint.tasks, task_id]):
            if known == task_id:
                blend.write(writer, task_id)
            else:
                writer.copy_task(checkpoint, known)
        record = writer.tasks[task_id]
        writer.finish_edited()
    ranks = [segment.rank for segment in record.segments]
    return BlendedTask(
        Path(where if output is None else output),
        task_id,
        common(segment.representation for segment in record.segments),
        (min(ranks), max(ranks)),
        record.lora_nbytes,
        record.error,
        Losses.of({task_id: record}, writer.modules),
        blend.left_behind,
    )


class _Blend:
    """The weighted sum of some tasks of a checkpoint, module by module."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Mapping[str, float],
        rank: int | None,
        format: str,
    ) -> None:
        self._checkpoint, self._weights = checkpoint, weights
        self._rank, self._format = rank, format
        self._tasks = [checkpoint.load_task(task_id) for task_id in weights]
        self._shared = checkpoint.shared_by(weights)
        # The first task's config and names: those of the model that the result is for.
        self._renamed = checkpoint.record(next(iter(weights))).renamed
        attached = [checkpoint.attachments.get(task_id, {}) for task_id in weights]
        self._companions = {
            name: ref
            for name, ref in attached[0].items()
            if all(files.get(name) == ref for files in attached)
        }
        names = {name for files in attached for name in files}
        self.left_behind = tuple(sorted(names - self._companions.keys()))

    def write(self, writer: Successor, task_id: str) -> None:
        """Encode every module of any of the tasks, with the error of its numbers as stored."""
        modules: dict[str, StoredModule] = {}
        original = 0
        lost = norm = 0.0
        for spec in self._checkpoint.modules:
            parts = [
                (weight, task.modules[spec.name])
                for weight, task in zip(self._weights.values(), self._tasks)
                if spec.name in task.modules
            ]
            if not parts:
                continue
            try:
                stored, (module_lost, module_norm) = self._module(spec, parts)
            except VLoRAError:
                raise
            except ValueError as error:
                raise OptionError(
                    f"task {task_id!r}, module {spec.name}: {error}, or give smaller weights"
                ) from error
            original += 2 * stored.rank * (spec.d_in + spec.d_out)
            modules[spec.name] = replace(stored, error=relative(module_lost, module_norm))
            lost, norm = lost + module_lost, norm + module_norm
        if len({renamed(name, self._renamed) for name in modules}) < len(modules):
            # Another task has layers under both names.
            self._renamed = {}
        writer.add_task(
            task_id,
            modules,
            original_nbytes=original,
            error=relative(lost, norm),
            adapter_config=self._config(modules),
            source=_formula(self._weights),
            extra=common_extra(
                [task.extra for task in self._tasks],
                [f"task {task.task_id!r}" for task in self._tasks],
            ),
            renamed=self._renamed,
        )
        writer.attachments.carry(task_id, self._checkpoint.path, self._companions)

    def _module(
        self, spec: ModuleSpec, parts: Sequence[tuple[float, StoredModule]]
    ) -> tuple[StoredModule, tuple[float, float]]:
        joint = self._shared.get((spec.name, "joint"))
        if all(stored.is_joint for _, stored in parts):
            assert joint is not None
            return self._core(spec, parts, joint)
        factors = [
            (weight, decode(stored, self._shared.get((spec.name, stored.representation))))
            for weight, stored in parts
        ]
        exact, short = _summed(factors)
        stored = encode_private(*self._cut(short), 1.0, self._format)
        return stored, relative_error(*exact, 1.0, stored, None)

    def _cut(self, factors: Factors) -> Factors:
        """The leading ``rank`` rows; all without one."""
        return factors[0][: self._rank], factors[1][:, : self._rank]

    def _core(
        self, spec: ModuleSpec, parts: Sequence[tuple[float, StoredModule]], basis: Basis
    ) -> tuple[StoredModule, tuple[float, float]]:
        """A core on the rows that hold all the tasks' own rows."""
        if self._format not in SHARED_FORMATS:
            raise OptionError(
                f"module {spec.name} is a core on a basis, which cannot be stored in {self._format} "
                "codes; give nf4-dq"
            )
        whole = (0, basis.u.rows, 0, basis.v.rows)
        own = [stored.rows or whole for _, stored in parts]
        hull = (
            min(rows[0] for rows in own),
            max(rows[1] for rows in own),
            min(rows[2] for rows in own),
            max(rows[3] for rows in own),
        )
        widths = hull[1] - hull[0], hull[3] - hull[2]
        factors = []
        for (weight, stored), rows in zip(parts, own):
            right, left = core_factors(stored)
            padded_a = torch.zeros(len(right), widths[1])
            padded_b = torch.zeros(widths[0], len(left))
            padded_a[:, rows[2] - hull[2] : rows[3] - hull[2]] = right
            padded_b[rows[0] - hull[0] : rows[1] - hull[0]] = stored.scale * left.T
            factors.append((weight, (padded_a, padded_b)))
        (a, b), short = _summed(factors)
        stored = encode_joint(
            *self._cut(short),
            1.0,
            torch.eye(widths[0]),
            torch.eye(widths[1]),
            self._format,
            rows=None if hull == whole else hull,
        )
        used = basis_rows(stored, basis)
        whole_a, whole_b = a @ unpack(used.v), unpack(used.u).T @ b
        return stored, relative_error(whole_a, whole_b, 1.0, stored, basis)

    def _config(self, modules: Mapping[str, StoredModule]) -> dict[str, object]:
        """A config of scale 1 with these ranks, otherwise like that of the first task."""
        configs = [self._checkpoint.record(task.task_id).adapter_config for task in self._tasks]
        config = common_config(configs, [task.modules for task in self._tasks])
        ranks = {renamed(name, self._renamed): m.rank for name, m in modules.items()}
        return described(config, {name: (rank, float(rank)) for name, rank in ranks.items()})


def _summed(parts: Sequence[tuple[float, Factors]]) -> tuple[Factors, Factors]:
    """sum_i w_i B_i A_i as stacked factors, and in the fewest rows that hold it, at least one.

    Of parts that cancel only rounding is left, which counts as zero.

    Raises:
        ValueError: it is beyond float32.
    """
    a = torch.cat([factors[0].float() for _, factors in parts])
    b = torch.cat([weight * factors[1].float() for weight, factors in parts], dim=1)
    if not is_finite(b):
        raise ValueError("the weighted sum holds values too large for float32")
    largest = max(squared_norm(*factors, weight) for weight, factors in parts) ** 0.5
    short_a, short_b, sigma = balanced_svd(a, b, 1.0)
    kept = int((sigma > _NEGLIGIBLE * largest).sum())
    if kept == 0:
        return (a, torch.zeros_like(b)), (short_a[:1] * 0, short_b[:, :1] * 0)
    return (a, b), (short_a[:kept], short_b[:, :kept])


def _decoded(
    task: StoredTask,
    shared: _Shared,
    kinds: Mapping[str, str],
    record: TaskRecord,
) -> LoRAWeights:
    own = {name: record.own_name(name) for name in task.modules}
    factors = {
        own[name]: decode(stored, shared.get((name, stored.representation)))
        for name, stored in task.modules.items()
    }
    weights = LoRAWeights(
        list(factors),
        {name: a for name, (a, _) in factors.items()},
        {name: b for name, (_, b) in factors.items()},
        max(len(a) for a, _ in factors.values()),
        unscaled_config(record.adapter_config),
        {own[name]: kind for name, kind in kinds.items() if name in own},
        dict(task.extra),
    )
    weights.metadata = exact_config(weights)
    return weights


def _checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    if not weights:
        raise OptionError("no tasks given; name at least one with its weight")
    for task_id, weight in weights.items():
        if isinstance(weight, bool):
            raise OptionError(f"weight {weight!r} of task {task_id!r} is no number; give one")
        check_weight(weight, f" of task {task_id!r}")
    return {task_id: float(weight) for task_id, weight in weights.items()}


def _formula(weights: Mapping[str, float]) -> str:
    """ "0.6*a+0.4*b" """
    text = "+".join(f"{weight:g}*{task_id}" for task_id, weight in weights.items())
    return text.replace("+-", "-")
