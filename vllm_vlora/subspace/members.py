"""The adapters that a subspace is fitted to: in memory or on disk, and the layers they share."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from vllm_vlora.adapters.collection import other_bases
from vllm_vlora.adapters.module_names import (
    Layer,
    inverse,
    layer_shapes,
    renamed,
    shared_prefixes,
)
from vllm_vlora.adapters.peft_folder import Adapter, open_adapter
from vllm_vlora.errors import AdapterError, OptionError, TaskIdError
from vllm_vlora.representations.factors import ScaledFactors
from vllm_vlora.subspace.weights import (
    LayerShape,
    LoRAWeights,
    Update,
    base_models,
    has_alpha,
    shapes_of,
)
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.wording import count_of, shown

MISSING = ("error", "zero", "common")
AnyAdapter: TypeAlias = Update | str | Path


@dataclass(frozen=True)
class Member:
    """One adapter of a collection, under its task id; weights are read when asked for.

    ``read`` yields (layer, (A, B, scale)) for the named layers, in their order. ``renamed``: prefix of
    the layers' names -> what the adapter has in its place.
    """

    task_id: str
    shapes: Mapping[str, LayerShape]
    read: Callable[[Iterable[str]], Iterator[tuple[str, ScaledFactors]]]
    read_extra: Callable[[], Mapping[str, Tensor]]
    metadata: Mapping[str, Any]
    source: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_scale(self) -> bool:
        """Whether its config gives an alpha; without one its scales are 1."""
        return has_alpha(self.metadata)

    @property
    def original_nbytes(self) -> int:
        """Bytes of its LoRA weights at 16 bits each."""
        return 2 * sum(s.rank * (s.d_in + s.d_out) for s in self.shapes.values())


def as_member(adapter: AnyAdapter, task_id: str) -> Member:
    """An adapter under a task id.

    Raises:
        TaskIdError: the id is not allowed. AdapterError: the adapter cannot be opened.
    """
    validate_task_id(task_id)
    if isinstance(adapter, LoRAWeights):
        return _in_memory(adapter, task_id)
    opened = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    return _on_disk(opened, task_id, str(opened.path if isinstance(adapter, Adapter) else adapter))


def as_members(adapters: Sequence[AnyAdapter], task_ids: Sequence[str] | None) -> list[Member]:
    """Adapters under their task ids, by default ``task_0``, ``task_1``, ...

    Raises:
        AdapterError: there are none, or one cannot be opened.
        OptionError: not one id an adapter. TaskIdError: an id twice, or one that is not allowed.
    """
    if not adapters:
        raise AdapterError("there are no adapters; give at least one")
    names = [f"task_{i}" for i in range(len(adapters))] if task_ids is None else list(task_ids)
    if len(names) != len(adapters):
        raise OptionError(
            f"{count_of(len(names), 'task id')} for {count_of(len(adapters), 'adapter')}; give one "
            "id an adapter"
        )
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise TaskIdError(f"task id {name!r} is given twice; name each task once")
    return [as_member(adapter, name) for adapter, name in zip(adapters, names)]


def named_alike(
    members: Sequence[Member], known: Mapping[str, Layer] | None = None
) -> list[Member]:
    """The adapters with one name for each layer; ``known`` layers keep theirs (``module_names``)."""
    shapes = [layer_shapes(member.shapes) for member in members]
    found = shared_prefixes(shapes, layer_shapes(known or {}))
    return [
        _under_names(member, prefixes) if prefixes else member
        for member, prefixes in zip(members, found)
    ]


def _under_names(member: Member, prefixes: Mapping[str, str]) -> Member:
    new = {name: renamed(name, inverse(prefixes)) for name in member.shapes}

    def read(names: Iterable[str]) -> Iterator[tuple[str, ScaledFactors]]:
        for name, factors in member.read(renamed(name, prefixes) for name in names):
            yield new[name], factors

    shapes = {new[name]: shape for name, shape in member.shapes.items()}
    return replace(member, shapes=shapes, read=read, renamed=dict(prefixes))


def warn_of_bases(configs: Iterable[Mapping[str, Any]], stacklevel: int) -> None:
    """Say where adapters' configs name different base models.

    Args:
        stacklevel: as of ``warnings.warn`` in the caller.
    """
    bases = base_models(configs)
    if len(bases) > 1:
        advice = other_bases(bases, "fitted together", "fit them apart")
        warnings.warn(advice, stacklevel=stacklevel + 1)


def share_layers(
    members: Sequence[Member], missing: str, known: Mapping[str, Layer] | None = None
) -> list[Member]:
    """The adapters with the layers that a subspace of them has, each layer under one name.

    Args:
        known: layers whose names stay.
        missing: what is done where an adapter lacks a layer of another one. "error": AdapterError.
            "zero": it has no update there. "common": the layer is left out of all, with a warning.

    Raises:
        AdapterError: see ``missing``; no layer is common; or a layer's shapes differ.
        OptionError: ``missing`` is something else.
    """
    if missing not in MISSING:
        raise OptionError(f"missing is {missing!r}; give one of {', '.join(MISSING)}")
    members = named_alike(members, known)
    _check_shapes(members)
    names = list(dict.fromkeys(name for member in members for name in member.shapes))
    lacking = [(member, name) for name in names for member in members if name not in member.shapes]
    if not lacking or missing == "zero":
        return list(members)
    if missing == "error":
        member, name = lacking[0]
        raise AdapterError(
            f"task {member.task_id!r} lacks layer {name!r}, which another adapter has; pass "
            'missing="zero" (no update there) or missing="common" (leave the layer out)'
        )
    dropped = {name for _, name in lacking}
    common = [name for name in names if name not in dropped]
    if not common:
        raise AdapterError("the adapters have no layer in common; build apart what differs")
    warnings.warn(
        f"{count_of(len(dropped), 'layer')} that not every adapter has left out, "
        f"{shown(sorted(dropped)[0])} among them",
        stacklevel=4,
    )
    return [replace(m, shapes={name: m.shapes[name] for name in common}) for m in members]


def _check_shapes(members: Sequence[Member]) -> None:
    first: dict[str, Member] = {}
    for member in members:
        for name, shape in member.shapes.items():
            other = first.setdefault(name, member)
            known = other.shapes[name]
            if (known.d_in, known.d_out, known.kind) != (shape.d_in, shape.d_out, shape.kind):
                raise AdapterError(
                    f"layer {name!r} is a {known.d_out} x {known.d_in} {known.kind} in task "
                    f"{other.task_id!r} and a {shape.d_out} x {shape.d_in} {shape.kind} in task "
                    f"{member.task_id!r}; put together adapters of one base model only"
                )


def _in_memory(weights: LoRAWeights, task_id: str) -> Member:
    def read(names: Iterable[str]) -> Iterator[tuple[str, ScaledFactors]]:
        for name in names:
            a, b = weights.lora_a[name].detach(), weights.lora_b[name].detach()
            # Fits run on the CPU in float32.
            yield name, (a.float().cpu(), b.float().cpu(), weights.scale(name))

    def read_extra() -> Mapping[str, Tensor]:
        # Kept for good, while the adapter may be changed.
        return {name: tensor.detach().clone() for name, tensor in weights.extra.items()}

    metadata = deepcopy(weights.metadata)
    return Member(task_id, shapes_of(weights), read, read_extra, metadata)


def _on_disk(adapter: Adapter, task_id: str, source: str) -> Member:
    def read(names: Iterable[str]) -> Iterator[tuple[str, ScaledFactors]]:
        for name, (a, b) in adapter.iter_factors(names):
            yield name, (a, b, adapter.modules[name].scale)

    return Member(task_id, shapes_of(adapter), read, adapter.extra_tensors, adapter.config, source)
