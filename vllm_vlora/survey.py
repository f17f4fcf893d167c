"""Passes over the whole collection that measure what every way of storing it would lose.

A pass reads the adapters and keeps numbers only; fitted bases wait on disk.
"""

from __future__ import annotations

from collections.abc import Collection as Names
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from vllm_vlora.collection import Collection, Module, Progress
from vllm_vlora.fit import fit_bases
from vllm_vlora.formats import FORMAT_OF_DTYPE, Formats
from vllm_vlora.manifest import BasisSpec
from vllm_vlora.measure import (
    JointCurve,
    JointMeter,
    PrivateCurve,
    component_grid,
    joint_losses,
    joint_nbytes,
    measure_private,
    squared_norm,
)
from vllm_vlora.quantize import pack
from vllm_vlora.scratch import FittedBases

# Fits are made somewhat wider than a module's even share of the budget, since a module that gains
# more per byte than the others gets more than its share.
_SHARE_SLACK = 4


@dataclass(frozen=True)
class Survey:
    """What the passes found out.

    Attributes:
        norms: (task number, module name) -> ||delta_W||_F^2.
        private: (task number, module name) -> format label -> curve.
        joint: module name -> format label -> curve, of the modules that have a basis fitted.
    """

    collection: Collection
    norms: Mapping[tuple[int, str], float]
    private: Mapping[tuple[int, str], Mapping[str, PrivateCurve]]
    joint: Mapping[str, Mapping[str, JointCurve]] = field(default_factory=dict)

    @cached_property
    def weights(self) -> list[float]:
        """1 / ||delta_W||_F^2 of each task, so that every task counts alike."""
        totals = [0.0] * len(self.collection.adapters)
        for (task, _), norm in self.norms.items():
            totals[task] += norm
        return [1 / total if total > 0 else 0.0 for total in totals]


def survey_private(
    collection: Collection, formats: Formats, skip: Names[str], progress: Progress
) -> Survey:
    """Measure every rank and format of every task's modules, but those named in ``skip``."""
    norms, private = {}, {}
    wanted = [[name for name in a.modules if name not in skip] for a in collection.adapters]
    total, done = sum(len(names) for names in wanted), 0
    for task, names in enumerate(wanted):
        for name, (a, b, scale) in collection.read_task(task, names):
            dtype = collection.adapters[task].modules[name].dtype
            by_label = formats.of(dtype)
            distinct = list(dict.fromkeys(by_label))
            with collection.naming(task, name):
                curves = measure_private(a, b, scale, distinct, FORMAT_OF_DTYPE[dtype])
            by_format = dict(zip(distinct, curves))
            private[task, name] = {
                label: by_format[format] for label, format in zip(formats.labels, by_label)
            }
            norms[task, name] = squared_norm(a, b, scale)
            done += 1
            progress("measure", done, total)
    return Survey(collection, norms, private)


def survey_joint(
    survey: Survey,
    modules: Sequence[Module],
    formats: Formats,
    bases: FittedBases,
    *,
    num_components: int | None,
    byte_limit: int | None,
    seed: int,
    progress: Progress,
) -> Survey:
    """Fit a basis to every module, as wide as it could be wanted, and measure every width.

    Args:
        survey: of the private ways, which the result contains.
        bases: keeps what was fitted.
        num_components: the only width to measure; None measures all.
        byte_limit: of all files together, which bounds the width; None for no limit.
    """
    collection, norms, joint = survey.collection, dict(survey.norms), {}
    for done, module in enumerate(modules):
        progress("fit", done, len(modules))
        most = min(max(module.d_in, module.d_out), module.total_rank)
        if num_components is not None:
            most = min(most, num_components)
        elif byte_limit is not None:
            share = byte_limit * module.original_nbytes / collection.original_nbytes
            most = _most_components(module, formats, most, share * _SHARE_SLACK)
        u_t, v = fit_bases(
            lambda module=module: collection.read_module(module),  # type: ignore[misc]
            module.d_in,
            module.d_out,
            most,
            seed=seed,
        )
        bases.save(module, u_t, v)
        most = min(most, max(u_t.shape[0], v.shape[0]))
        grid = component_grid(most) if num_components is None else [most]
        module_norms, joint[module.name] = _measure_joint(collection, module, formats, u_t, v, grid)
        norms.update({(task, module.name): n for task, n in zip(module.tasks, module_norms)})
    progress("fit", len(modules), len(modules))
    return replace(survey, norms=norms, joint=joint)


def _most_components(module: Module, formats: Formats, most: int, share: float) -> int:
    """The most components, up to ``most``, that take ``share`` bytes in the smallest format."""

    def least_nbytes(components: int) -> int:
        k_out, k_in = min(components, module.d_out), min(components, module.d_in)
        return min(
            joint_nbytes(
                BasisSpec(k_out, k_in, format),
                module.d_out,
                module.d_in,
                module.ranks,
                formats.core(format),
            )
            for format in formats.of(module.dtype)
        )

    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if least_nbytes(middle) <= share:
            low = middle
        else:
            high = middle - 1
    return low


def _measure_joint(
    collection: Collection,
    module: Module,
    formats: Formats,
    u_t: torch.Tensor,
    v: torch.Tensor,
    grid: list[int],
) -> tuple[list[float], dict[str, JointCurve]]:
    """||delta_W||_F^2 of every task of the module, and format label -> curve."""
    by_label = formats.of(module.dtype)
    meters = [JointMeter(pack(u_t, format), pack(v, format), grid) for format in by_label]
    losses = torch.zeros(len(meters), len(module.tasks), len(grid), dtype=torch.float64)
    norms = []
    for place, (a, b, scale) in enumerate(collection.read_module(module)):
        norm = squared_norm(a, b, scale)
        norms.append(norm)
        for number, (format, meter) in enumerate(zip(by_label, meters)):
            captured = meter.captured(a, b, scale)
            losses[number, place] = joint_losses(captured, norm, formats.core(format))
    k_out, k_in = u_t.shape[0], v.shape[0]
    return norms, {
        label: JointCurve(
            [BasisSpec(min(k, k_out), min(k, k_in), format) for k in grid],
            formats.core(format),
            table,
        )
        for label, format, table in zip(formats.labels, by_label, losses)
    }
