"""Fit a subspace to adapters, and again when one more comes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.representations.factors import ScaledFactors
from vllm_vlora.subspace.fitting import (
    Choice,
    check_fits,
    core_rank,
    difference,
    fit_layers,
    project_member,
    relative,
    take_in,
    warn_of_few,
    with_spectra,
)
from vllm_vlora.subspace.layers import FlatLayer, Layer, Loadings
from vllm_vlora.subspace.members import (
    MISSING,
    AnyAdapter,
    Member,
    as_member,
    named_alike,
    share_layers,
    warn_of_bases,
)
from vllm_vlora.subspace.state import SubspaceState
from vllm_vlora.subspace.tasks import TaskProjection, warn_of_losses, with_loadings
from vllm_vlora.subspace.weights import LayerShape, base_models
from vllm_vlora.wording import count_of, shown

if TYPE_CHECKING:
    from typing import Self


# A task whose error is this many times what it was before an absorption has lost by it.
_DRIFTED = 1.05


class FittedState(SubspaceState):
    """What ``SharedSubspace`` does to fit itself."""

    @classmethod
    def _fitted(
        cls, members: Sequence[Member], representation: str, choice: Choice, *, exact: bool
    ) -> Self:
        layers = fit_layers(members, representation, choice, exact=exact)
        tasks = {member.task_id: project_member(layers, member) for member in members}
        return cls(
            with_spectra(layers, tasks.values()),
            tasks,
            rank=max(shape.rank for member in members for shape in member.shapes.values()),
            num_components=choice.num_components if choice.threshold is None else None,
            adaptive_k=choice.adaptive,
        )

    def _refit(
        self,
        new_adapter: AnyAdapter,
        new_task_id: str,
        originals: Mapping[str, AnyAdapter],
        num_components: int | None,
        missing: str | None,
    ) -> None:
        """``SharedSubspace.absorb``."""
        self._check_free(new_task_id)
        before = dict(self.tasks)
        for task_id in originals:
            self._task(task_id)
        members = [
            as_member(originals[task_id], task_id)
            if task_id in originals
            else self._stored_member(task_id)
            for task_id in self.tasks
        ]
        newcomer = as_member(new_adapter, new_task_id)
        self._warn_of_scale(new_task_id, newcomer.has_scale, stacklevel=3)
        self._warn_of_base(newcomer, stacklevel=3)
        members = share_layers(
            [*members, newcomer],
            missing or self._missing_rule(),
            self.layers,
        )
        choice = self._choice(num_components)
        if num_components is not None:
            warn_of_few(members, self.representation, num_components, stacklevel=3)
        new = self._fitted(members, self.representation, choice, exact=True)
        for task_id, old in self.tasks.items():
            if task_id not in originals:
                moved = new.tasks[task_id]
                drift = moved.origin
                moved.origin = old.origin.drifted(drift.errors, drift.error)
        first = next(iter(self.layers.values()))
        self.layers = {n: layer.to(first.device, first.dtype) for n, layer in new.layers.items()}
        self.tasks = {task_id: self._placed(task) for task_id, task in new.tasks.items()}
        self._rounded = None
        self.rank = max(self.rank, new.rank)
        self.num_components = self._kept_components(num_components)
        self._warn_of_drifts(before, num_components)

    def _grow(
        self,
        new_adapter: AnyAdapter,
        new_task_id: str,
        num_components: int | None,
        missing: str | None,
    ) -> None:
        """``SharedSubspace.absorb_incremental``."""
        self._check_free(new_task_id)
        before = dict(self.tasks)
        if self.quantization is not None:
            raise OptionError("the subspace is quantised; absorb() it, or absorb before quantize()")
        choice = self._choice(num_components)
        member = as_member(new_adapter, new_task_id)
        self._warn_of_scale(new_task_id, member.has_scale, stacklevel=3)
        self._warn_of_base(member, stacklevel=3)
        rule = missing or self._missing_rule()
        member = self._fitting_member(member, rule, unknown_allowed=rule == "zero")
        grown = self._restricted(member) if rule == "common" else self._copy()
        tasks = {task_id: dict(grown._loadings(task_id)) for task_id in grown.tasks}
        for name, (a, b, scale) in member.read(list(member.shapes)):
            if name not in grown.layers:
                continue
            having = [task_id for task_id in tasks if name in tasks[task_id]]
            held = [tasks[task_id][name] for task_id in having]
            layer = grown.layers[name]
            check_fits(member, name, layer)
            grown.layers[name], found = take_in(layer, held, a, scale * b.float(), choice)
            for task_id, loadings in zip(having, found):
                tasks[task_id][name] = loadings
        fresh = [name for name in member.shapes if name not in grown.layers]
        if fresh:
            alone = replace(member, shapes={name: member.shapes[name] for name in fresh})
            added = fit_layers([alone], self.representation, choice, exact=True)
            first = next(iter(self.layers.values()))
            added = {n: layer.to(first.device, first.dtype) for n, layer in added.items()}
            grown.layers = dict(sorted({**grown.layers, **added}.items()))
        for task_id, moved in tasks.items():
            grown.tasks[task_id] = self._drifted(task_id, grown.layers, moved)
        grown.tasks[new_task_id] = project_member(grown.layers, member)
        self.layers, self.tasks = with_spectra(grown.layers, grown.tasks.values()), grown.tasks
        self.rank = max(self.rank, *(shape.rank for shape in member.shapes.values()))
        self.num_components = self._kept_components(num_components)
        self._warn_of_drifts(before, num_components)

    def _warn_of_base(self, newcomer: Member, stacklevel: int) -> None:
        """Say where an adapter names a base model that no task has."""
        held = [task.origin.metadata for task in self.tasks.values()]
        if set(base_models([newcomer.metadata])) - set(base_models(held)):
            warn_of_bases([*held, newcomer.metadata], stacklevel + 1)

    def _warn_of_losses(self, advice: str, stacklevel: int) -> None:
        warn_of_losses(self.tasks.values(), self.representation, advice, stacklevel + 1)

    def _warn_of_drifts(
        self, before: Mapping[str, TaskProjection], num_components: int | None
    ) -> None:
        """Name what an absorption that chose k by itself lost: the new task, and old ones, much more."""
        if num_components is not None:
            return
        lost = [
            task
            for name, task in self.tasks.items()
            if name not in before or task.origin.error > before[name].origin.error * _DRIFTED
        ]
        warn_of_losses(lost, self.representation, "give a larger num_components", stacklevel=4)

    def _stored_member(self, task_id: str) -> Member:
        """A task as it is stored, to be fitted again."""
        loadings = dict(self._loadings(task_id))
        shapes = {}
        for name, (first, _) in loadings.items():
            layer = self.layers[name]
            rank = layer.rank if isinstance(layer, FlatLayer) else core_rank(first)
            shapes[name] = LayerShape(layer.d_in, layer.d_out, rank, layer.kind)

        def read(names: Iterable[str]) -> Iterator[tuple[str, ScaledFactors]]:
            for name in names:
                a, b = self._factors(name, loadings[name])
                yield name, (a.detach().float().cpu(), b.detach().float().cpu(), 1.0)

        return Member(task_id, shapes, read, dict, {})

    def _drifted(
        self, task_id: str, layers: Mapping[str, Layer], loadings: Mapping[str, Loadings]
    ) -> TaskProjection:
        """A task of this subspace with these loadings on other layers, its errors grown by the move."""
        losses = {
            name: difference(self.layers[name].factors(pair), layers[name].factors(loadings[name]))
            for name, pair in self._loadings(task_id)
            if name in loadings
        }
        task = self.tasks[task_id]
        return with_loadings(task, loadings, task.origin.drifted(*relative(losses)))

    def _choice(self, num_components: int | None) -> Choice:
        if num_components is not None:
            return Choice(num_components)
        if self.adaptive_k:
            return Choice(None, self.variance_threshold, True)
        return Choice(self.num_components)

    def _kept_components(self, num_components: int | None) -> int:
        """The k to keep to: the one asked for, which fewer tasks than it needs may not yet have."""
        if self.adaptive_k and num_components is None:
            return max(layer.k for layer in self.layers.values())
        return num_components or self.num_components

    def _missing_rule(self) -> str:
        some = any(
            name not in task.loadings_a for task in self.tasks.values() for name in self.layers
        )
        return "zero" if some else "error"

    def _fitting_member(
        self, member: Member, missing: str | None, *, unknown_allowed: bool = False
    ) -> Member:
        """The adapter with the layers that the subspace has too, by the rule for missing ones."""
        [member] = named_alike([member], self.layers)
        rule = missing or self._missing_rule()
        if rule not in MISSING:
            raise OptionError(f"missing is {rule!r}; give one of {', '.join(MISSING)}")
        unknown = [name for name in member.shapes if name not in self.layers]
        lacking = [name for name in self.layers if name not in member.shapes]
        if lacking and rule == "error":
            raise AdapterError(
                f"task {member.task_id!r} lacks layer {lacking[0]!r} of the subspace; pass "
                'missing="zero" if it has no update there'
            )
        if unknown and rule != "common" and not unknown_allowed:
            raise AdapterError(
                f"task {member.task_id!r} has layer {unknown[0]!r}, which the subspace lacks; absorb() "
                'it with missing="zero", or pass missing="common" to leave such layers out'
            )
        if len(unknown) == len(member.shapes) and not unknown_allowed:
            raise AdapterError(
                f"task {member.task_id!r} has no layer in common with the subspace; use adapters of its "
                "base model"
            )
        if not unknown or unknown_allowed:
            return member
        warnings.warn(
            f"{count_of(len(unknown), 'layer')} of task {member.task_id!r} left out, "
            f"{shown(unknown[0])} among them",
            stacklevel=4,
        )
        return replace(member, shapes={n: s for n, s in member.shapes.items() if n in self.layers})

    def _restricted(self, member: Member) -> Self:
        """A copy with the layers that an adapter has too."""
        copy = self._copy()
        dropped = [name for name in self.layers if name not in member.shapes]
        if dropped:
            warnings.warn(
                f"{count_of(len(dropped), 'layer')} that the new adapter lacks left out, "
                f"{shown(dropped[0])} among them",
                stacklevel=4,
            )
        copy.layers = {n: layer for n, layer in self.layers.items() if n in member.shapes}
        copy.tasks = {
            task_id: with_loadings(
                task, {name: task.at(name) for name in copy.layers if name in task}
            )
            for task_id, task in self.tasks.items()
        }
        return copy
