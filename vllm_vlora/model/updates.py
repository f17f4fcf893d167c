"""How a task changes the layers of a model: low-rank updates that run without forming delta_W.

A layer's update is a chain of two to four factors,

    delta_W = U B A V          y += U (B (A (V x)))

V and U are a basis that many tasks share, absent for a task with factors of its own; A and B are the
task's. A dense core is A alone, a core in factor form is both. The scale alpha / r is folded in. A
mixture of tasks with other weights for every row of a batch is exact too (``MixedUpdate``): cores
on one basis are added up, factors are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from vllm_vlora.adapters.peft_config import lora_rank, lora_scale
from vllm_vlora.checkpoint.manifest import is_checkpoint
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import OptionError, TaskNotFoundError
from vllm_vlora.model.row_layers import Batch
from vllm_vlora.quantize import unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.joint import dense_keeps_rank, split_core
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule
from vllm_vlora.subspace.layers import JointLayer, Layer, Loadings
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.storage import adapter_rank
from vllm_vlora.subspace.weights import has_alpha
from vllm_vlora.wording import some_of


@dataclass(frozen=True)
class LowRankUpdate:
    """What one task adds to one linear or embedding layer: delta_W = U B A V.

    Attributes:
        a: (q, k_in), the task's first factor or its whole core; k_in is d_in without ``v``.
        b: (k_out, q), or None for the identity; k_out is d_out without ``u``.
        v: (k_in, d_in), a basis shared with other tasks, or None.
        u: (d_out, k_out), likewise.

    Examples:
        >>> from vllm_vlora.model.updates import updates_of
        >>> update = updates_of(joint, "task_0")["layers.0.q_proj"]
        >>> x = torch.ones(3, 12)
        >>> torch.allclose(update(x), x @ update.delta().T, atol=1e-5)
        True
    """

    a: torch.Tensor
    b: torch.Tensor | None = None
    v: torch.Tensor | None = None
    u: torch.Tensor | None = None

    @property
    def d_in(self) -> int:
        """Columns of delta_W."""
        return (self.a if self.v is None else self.v).shape[1]

    @property
    def d_out(self) -> int:
        """Rows of delta_W."""
        last = self.b if self.u is None else self.u
        return (self.a if last is None else last).shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """delta_W x for x (..., d_in), or the columns x (...) of delta_W where x is integer.

        Returns:
            (..., d_out), computed in the dtype of the first factor.
        """
        if self.v is None:
            h = _first(self.a, x)
        else:
            h = _first(self.v, x)
            h = F.linear(h, self.a.to(h))
        for factor in (self.b, self.u):
            if factor is not None:
                h = F.linear(h, factor.to(h))
        return h

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A (q, d_in), B (d_out, q)) in float32 with delta_W = B A and the smallest q at hand."""
        a, b = self.a.float(), None if self.b is None else self.b.float()
        if b is None and a.shape[0] > a.shape[1]:
            # A tall core goes to the left: q is the smaller of its sides.
            a, b = torch.eye(a.shape[1], device=a.device), a
        if self.v is not None:
            a = a @ self.v.float()
        if b is None:
            b = torch.eye(a.shape[0], device=a.device)
        return a, b if self.u is None else self.u.float() @ b

    def delta(self) -> torch.Tensor:
        """delta_W (d_out, d_in) in float32."""
        a, b = self.factors()
        return b @ a


class MixedUpdate:
    """Several tasks on one layer, with weights for every row: y_i += sum_t w_it delta_W_t x_i.

    Exact: tasks on one basis cost one product with V and one with U, whatever their number, since
    sum_t w_t U C_t V = U (sum_t w_t C_t) V; other tasks' factors are stacked and their middle scaled.

    Args:
        updates: one a task; None where the task leaves the layer as it is.
        weights: (rows, tasks). A batch of more rows repeats each of them, as beams and flattened
            tokens do: rows must be the first dimension of what the layer sees.
        batch: what the model is given, where that is watched.

    Examples:
        >>> from vllm_vlora.model.updates import MixedUpdate, updates_of
        >>> updates = [updates_of(joint, task)["layers.0.q_proj"] for task in ("task_0", "task_1")]
        >>> mixed = MixedUpdate(updates, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        >>> mixed(torch.ones(2, 12)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        updates: Sequence[LowRankUpdate | None],
        weights: torch.Tensor,
        batch: Batch | None = None,
    ) -> None:
        assert weights.ndim == 2
        assert weights.shape[1] == len(updates)
        self._batch = batch or Batch()
        self._weights = weights
        groups: dict[tuple[int, int], list[tuple[int, LowRankUpdate]]] = {}
        for column, update in enumerate(updates):
            if update is not None:
                groups.setdefault((id(update.v), id(update.u)), []).append((column, update))
        self._groups = [_Group.of(members) for members in groups.values()]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, ..., d_in), or (rows, ...) of indices, -> (rows, ..., d_out).

        Raises:
            ModelMismatchError: the layer sees a batch that is no multiple of the weights' rows, or a part
                of the model's.
        """
        repeats = self._batch.repeats(x, self._weights.shape[0])
        weights = self._weights.repeat_interleave(repeats, dim=0)
        total = self._groups[0](x, weights)
        for group in self._groups[1:]:
            total = total + group(x, weights)
        return total


@dataclass(frozen=True)
class _Group:
    """Tasks on one basis, or on none: ``cores`` (n, k_out, k_in), and factors stacked along q.

    ``core_columns`` (n,) and ``factor_columns`` (sum of q,) name each one's column of the weights.
    """

    v: torch.Tensor | None
    u: torch.Tensor | None
    cores: torch.Tensor | None
    core_columns: torch.Tensor
    a: torch.Tensor | None
    b: torch.Tensor | None
    factor_columns: torch.Tensor

    @classmethod
    def of(cls, members: Sequence[tuple[int, LowRankUpdate]]) -> _Group:
        first = members[0][1]
        dense = [(column, update.a) for column, update in members if update.b is None]
        pairs = [(c, update.a, update.b) for c, update in members if update.b is not None]
        assert not dense or first.v is not None, "a core without a basis"
        device = first.a.device
        owners = [column for column, a, _ in pairs for _ in range(a.shape[0])]
        return cls(
            first.v,
            first.u,
            torch.stack([a for _, a in dense]) if dense else None,
            torch.tensor([column for column, _ in dense], dtype=torch.long, device=device),
            torch.cat([a for _, a, _ in pairs]) if pairs else None,
            torch.cat([b for _, _, b in pairs], dim=1) if pairs else None,
            torch.tensor(owners, dtype=torch.long, device=device),
        )

    def __call__(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        h = x if self.v is None else _first(self.v, x)
        if self.cores is not None:
            parts.append(self._blended_cores(h, weights))
        if self.a is not None and self.b is not None:
            z = _first(self.a, h)
            own = weights[:, self.factor_columns].to(z)
            own = own.reshape(own.shape[0], *(1,) * (z.ndim - 2), own.shape[1])
            parts.append(F.linear(z * own, self.b.to(z)))
        out = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return out if self.u is None else F.linear(out, self.u.to(out))

    def _blended_cores(self, h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert self.cores is not None
        own = weights[:, self.core_columns].to(h)
        cores = torch.einsum("bn,noi->bio", own, self.cores.to(h))
        # The number is not -1, which torch cannot tell where there are no rows.
        flat = h.reshape(h.shape[0], math.prod(h.shape[1:-1]), h.shape[-1])
        return torch.bmm(flat, cores).reshape(*h.shape[:-1], cores.shape[-1])


def _first(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``factor`` applied to vectors, or its columns where ``x`` holds indices."""
    if x.is_floating_point():
        return F.linear(x.to(factor.dtype), factor)
    return F.embedding(x, factor.T)


# --- where updates come from ----------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedShape:
    """An adapted layer: delta_W is d_out x d_in; ``kind`` is "linear" or "embedding"."""

    d_in: int
    d_out: int
    kind: str = "linear"


class UpdateSource(Protocol):
    """What updates are made from: a ``SharedSubspace`` or a ``Checkpoint``.

    Attributes:
        layers: the adapted layers.
    """

    layers: dict[str, AdaptedShape]

    @property
    def origin(self) -> SharedSubspace | Checkpoint:
        """What this reads from."""

    @property
    def rank(self) -> int:
        """The largest of the adapters."""

    def scale_known(self, task_id: str) -> bool:
        """Whether a task's alpha / r is folded into its updates."""

    def task_ids(self) -> list[str]:
        """All tasks, as the source orders them."""

    def check(self, task_id: str) -> None:
        """Raise TaskNotFoundError if there is no such task."""

    def updates(self, task_id: str) -> dict[str, LowRankUpdate]:
        """The layers that a task changes; TaskNotFoundError if there is no such task."""

    def state(self, task_id: str) -> tuple[Any, ...]:
        """Objects whose identity says that ``updates`` would return the same as before."""

    def extra(self, task_id: str) -> Mapping[str, torch.Tensor]:
        """A task's tensors that are not LoRA, under PEFT's names: classifier heads and the like."""

    def config(self, task_id: str) -> Mapping[str, Any]:
        """A task's original ``adapter_config.json``; empty where it has none."""


def open_source(source: SharedSubspace | Checkpoint | str | Path) -> UpdateSource:
    """A source over a subspace, a checkpoint, or what the path or Hub id of either holds.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(source, SharedSubspace):
        return SubspaceSource(source)
    if isinstance(source, Checkpoint):
        return CheckpointSource(source)
    folder = Path(source).expanduser()
    if folder.is_dir() and not is_checkpoint(folder):
        # A checkpoint of vlora.
        return SubspaceSource(SharedSubspace.load(folder))
    return CheckpointSource(Checkpoint.open(source))


def check_scaling(source: UpdateSource, scaling: float | None, lora_alpha: float | None) -> float:
    """The factor that updates still need whose adapters' own scale is not known; 1 where all are.

    Those that are known are folded in, and need none.

    Args:
        scaling, lora_alpha: what the user gave; alpha means alpha / rank of the subspace.

    Raises:
        OptionError: both are given, or one that would change an adapter's own scale.
    """
    given = scaling if lora_alpha is None else lora_alpha
    if given is None:
        return 1.0
    if scaling is not None and lora_alpha is not None:
        raise OptionError("scaling and lora_alpha say the same thing; give one of them")
    if not math.isfinite(given):
        raise OptionError(f"scaling and lora_alpha must be finite, got {given}")
    name = "scaling" if lora_alpha is None else "lora_alpha"
    known = [task_id for task_id in source.task_ids() if source.scale_known(task_id)]
    configs = filter(None, map(source.config, known))
    own = {value for config in configs for value in _own(config, source, lora_alpha is None)}
    if any(not math.isclose(given, value, rel_tol=1e-6) for value in own):
        values = ", ".join(f"{value:g}" for value in sorted(own))
        raise OptionError(
            f"{name}={given:g}, but the adapters' own is {values} and is part of their updates already; "
            "leave it out"
        )
    if len(known) == len(source.task_ids()):
        return 1.0
    return given if lora_alpha is None else given / source.rank


def _own(config: Mapping[str, Any], source: UpdateSource, scales: bool) -> set[float]:
    """The scales of an adapter's layers, or their alphas."""
    both = (lora_scale(config, name, lora_rank(config, name)) for name in source.layers)
    return {scale if scales else alpha for alpha, scale in both}


def updates_of(source: SharedSubspace | Checkpoint, task_id: str) -> dict[str, LowRankUpdate]:
    """What a task does to each layer that it changes, its scale folded in.

    Of a checkpoint the bases are read each time; ``VLoRAModel`` keeps them.

    Args:
        source: any mixture of joint, flat and private tasks. task_id: one of them.

    Returns:
        Layer -> update; a layer that the task leaves alone is absent.

    Raises:
        TaskNotFoundError: there is no such task.
        CheckpointError: the checkpoint is damaged.

    Examples:
        >>> from vllm_vlora.model.updates import updates_of
        >>> sorted(updates_of(subspace, "task_0"))
        ['layers.0.q_proj', 'layers.0.v_proj']
    """
    return open_source(source).updates(task_id)


class SubspaceSource:
    """The updates of a subspace's tasks, as they are when they are asked for."""

    def __init__(self, subspace: SharedSubspace) -> None:
        self._subspace = subspace
        self.layers = {
            name: AdaptedShape(layer.d_in, layer.d_out, layer.kind)
            for name, layer in subspace.layers.items()
        }

    @property
    def origin(self) -> SharedSubspace:
        """The subspace."""
        return self._subspace

    @property
    def rank(self) -> int:
        """The largest of the adapters."""
        return self._subspace.rank

    def scale_known(self, task_id: str) -> bool:
        """Whether a task's alpha / r is folded in, which vlora leaves out."""
        return self._subspace.tasks[task_id].origin.scale_known

    def task_ids(self) -> list[str]:
        """All tasks, as the subspace orders them."""
        return list(self._subspace.tasks)

    def check(self, task_id: str) -> None:
        """Raise TaskNotFoundError if there is no such task."""
        if task_id not in self._subspace.tasks:
            known = some_of(self._subspace.tasks)
            raise TaskNotFoundError(f"the subspace has no task {task_id!r}; it has: {known}")

    def updates(self, task_id: str) -> dict[str, LowRankUpdate]:
        """The layers that a task changes.

        Raises:
            TaskNotFoundError: there is no such task.
        """
        self.check(task_id)
        projection = self._subspace.tasks[task_id]
        return {
            name: _layer_update(layer, projection.at(name))
            for name, layer in self._subspace.layers.items()
            if name in projection
        }

    def state(self, task_id: str) -> tuple[Any, ...]:
        """The task's loadings, what it came from, and all bases: each is replaced when it changes."""
        projection = self._subspace.tasks[task_id]
        return (
            *projection.loadings_a.values(),
            *projection.loadings_b.values(),
            projection.origin,
            *self._subspace.layers.values(),
        )

    def extra(self, task_id: str) -> Mapping[str, torch.Tensor]:
        """A task's tensors that are not LoRA."""
        return self._subspace.tasks[task_id].origin.extra

    def config(self, task_id: str) -> Mapping[str, Any]:
        """A task's original ``adapter_config.json``; empty of one that was made here."""
        return self._subspace.tasks[task_id].origin.metadata


def _layer_update(layer: Layer, loadings: Loadings) -> LowRankUpdate:
    if isinstance(layer, JointLayer):
        return LowRankUpdate(loadings[0], None, layer.v, layer.u)
    return LowRankUpdate(*layer.factors(loadings))


class CheckpointSource:
    """The updates of a checkpoint's tasks, in whatever representation each module is stored.

    Bases are unpacked once, to float32, and shared by all updates; a task is read when it is asked for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.layers = {m.name: AdaptedShape(m.d_in, m.d_out, m.kind) for m in checkpoint.modules}
        self._flat: dict[str, Basis] = {}
        self._joint: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cuts: dict[tuple[str, tuple[int, ...] | None], tuple[torch.Tensor, torch.Tensor]] = {}
        for name, _, basis in checkpoint.shared():
            if isinstance(basis, FlatBasis):
                self._flat[name] = basis
            else:
                self._joint[name] = unpack(basis.v), unpack(basis.u).T

    @property
    def origin(self) -> Checkpoint:
        """The checkpoint."""
        return self._checkpoint

    @property
    def rank(self) -> int:
        """The largest of the adapters."""
        records = self._checkpoint.tasks.values()
        return max(adapter_rank(self._checkpoint, record) for record in records)

    def scale_known(self, task_id: str) -> bool:
        """Whether a task's config gives its alpha; a subspace saves none where it knows none."""
        return has_alpha(self._checkpoint.record(task_id).adapter_config)

    def task_ids(self) -> list[str]:
        """All tasks, as the checkpoint orders them."""
        return list(self._checkpoint.tasks)

    def check(self, task_id: str) -> None:
        """Raise TaskNotFoundError if there is no such task."""
        self._checkpoint.record(task_id)

    def updates(self, task_id: str) -> dict[str, LowRankUpdate]:
        """The layers that a task changes; the task's file is read and checked.

        Raises:
            TaskNotFoundError, CheckpointError: no such task, or its file is damaged.
        """
        modules = self._checkpoint.load_task(task_id).modules
        return {name: self._update(name, stored) for name, stored in modules.items()}

    def state(self, task_id: str) -> tuple[Any, ...]:
        """Nothing: an opened checkpoint does not change."""
        return ()

    def extra(self, task_id: str) -> Mapping[str, torch.Tensor]:
        """A task's tensors that are not LoRA."""
        if not self._checkpoint.record(task_id).extra:
            return {}
        return self._checkpoint.load_task(task_id).extra

    def config(self, task_id: str) -> Mapping[str, Any]:
        """A task's original ``adapter_config.json``; empty where it has none."""
        return self._checkpoint.record(task_id).adapter_config or {}

    def _update(self, name: str, stored: StoredModule) -> LowRankUpdate:
        if not stored.is_joint:
            return LowRankUpdate(*decode(stored, self._flat.get(name)))
        v, u = self._basis(name, stored.rows)
        return LowRankUpdate(*_core_factors(stored), v, u)

    def _basis(
        self, name: str, rows: tuple[int, int, int, int] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a basis that a core stands on; the same tensors for all tasks that use them."""
        if (name, rows) not in self._cuts:
            v, u = self._joint[name]
            if rows is not None:
                u_start, u_stop, v_start, v_stop = rows
                v, u = v[v_start:v_stop], u[:, u_start:u_stop]
            self._cuts[name, rows] = v, u
        return self._cuts[name, rows]


def _core_factors(stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A joint task's core, scale folded in: (C, None), or (L_A, L_B) as factors."""
    if stored.core == "factors":
        return unpack(stored.matrices["A"]), stored.scale * unpack(stored.matrices["B"]).T
    core = unpack(stored.matrices["C"])
    if dense_keeps_rank(stored.format, stored.rank, core.shape):
        return stored.scale * core, None
    a, b = split_core(core, stored.rank)
    return a, stored.scale * b.T
