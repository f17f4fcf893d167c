"""Encode what a plan chose, and measure the errors of the numbers as they are stored."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_vlora.checkpoint import StoredModule
from vllm_vlora.collection import Progress
from vllm_vlora.measure import PrivateOption
from vllm_vlora.plan import Budget, Plan, joint_problem
from vllm_vlora.representations import (
    balanced_svd,
    dual_rows,
    encode_joint,
    encode_private,
    relative_error,
)
from vllm_vlora.scratch import CoreSpool, FittedBases
from vllm_vlora.survey import Survey

_ATTEMPTS = 8


class EncodedTask(NamedTuple):
    """A task's modules, in the adapter's order, and their ||W' - W||_F / ||W||_F together."""

    modules: dict[str, StoredModule]
    error: float


def encode_within(
    plan: Plan,
    survey: Survey,
    bases: FittedBases,
    budget: Budget,
    scratch: Path,
    progress: Progress,
) -> tuple[Plan, CoreSpool | None]:
    """Encode a joint plan's cores; the plan returned has measured losses in place of planned ones.

    Planned losses know the rounding of the cores only nearly. Where that breaks a promised error,
    the plan is made again for a slightly smaller one. Without cores no attempt kept the promise.
    """
    for attempt in range(_ATTEMPTS):
        folder = scratch / f"cores{attempt}"
        measured, cores = _encode_cores(plan, survey, bases, CoreSpool(folder), progress)
        if budget.loss is None:
            return measured, cores
        excess = float(measured.losses.max()) - budget.loss
        if excess <= 0:
            return measured, cores
        shutil.rmtree(folder)
        target = budget.loss - 2 ** (attempt + 1) * excess
        smaller = joint_problem(survey, plan.format).cheapest(target) if target > 0 else None
        if smaller is None:
            break
        plan = smaller
    return measured, None


def _encode_cores(
    plan: Plan, survey: Survey, bases: FittedBases, cores: CoreSpool, progress: Progress
) -> tuple[Plan, CoreSpool]:
    """The plan with measured losses, and the filled spool."""
    collection, weights = survey.collection, survey.weights
    losses = torch.zeros(len(collection.adapters), dtype=torch.float64)
    total = sum(len(collection.modules[name].tasks) for name in plan.joint)
    done = 0
    for name, (spec, core_format) in plan.joint.items():
        module = collection.modules[name]
        basis = bases.read(module, spec)
        dual_u, dual_v = dual_rows(basis.u), dual_rows(basis.v)
        for task, (a, b, scale) in zip(module.tasks, collection.read_module(module)):
            with collection.naming(task, name):
                stored = encode_joint(a, b, scale, dual_u, dual_v, core_format)
            lost, norm = relative_error(a, b, scale, stored, basis)
            cores.append(task, name, replace(stored, error=_relative(lost, norm)))
            losses[task] += lost * weights[task]
            done += 1
            progress("encode", done, total)
    for (task, _), option in plan.private.items():
        losses[task] += option.loss * weights[task]
    return replace(plan, losses=losses), cores


def encode_task(plan: Plan, survey: Survey, cores: CoreSpool | None, task: int) -> EncodedTask:
    """One task's cores, read back, and its private modules, encoded now."""
    names = list(survey.collection.adapters[task].modules)
    joint = cores.read(task) if cores else {}
    lost_total = norm_total = 0.0
    for name, stored in joint.items():
        norm = survey.norms[task, name]
        lost_total += stored.error**2 * norm
        norm_total += norm
    private, lost, norm = _encode_private(plan, survey, task, [n for n in names if n not in joint])
    modules = joint | private
    error = _relative(lost_total + lost, norm_total + norm)
    return EncodedTask({name: modules[name] for name in names}, error)


def _encode_private(
    plan: Plan, survey: Survey, task: int, names: Sequence[str]
) -> tuple[dict[str, StoredModule], float, float]:
    """Stored modules, and the sums of ||delta_W' - delta_W||_F^2 and of ||delta_W||_F^2."""
    encoded, lost_total, norm_total = {}, 0.0, 0.0
    for name, (a, b, scale) in survey.collection.read_task(task, names):
        option = plan.private[task, name]
        with survey.collection.naming(task, name):
            stored = _encode_option(a, b, scale, option)
        lost, norm = 0.0, survey.norms[task, name]
        # Zero is only ever planned where the stored numbers are the adapter's own.
        if not (option.original and option.loss == 0):
            lost, norm = relative_error(a, b, scale, stored, None)
        encoded[name] = replace(stored, error=_relative(lost, norm))
        lost_total += lost
        norm_total += norm
    return encoded, lost_total, norm_total


def _encode_option(
    a: torch.Tensor, b: torch.Tensor, scale: float, option: PrivateOption
) -> StoredModule:
    if option.original:
        return encode_private(a, b, scale, option.format)
    svd_a, svd_b, _ = balanced_svd(a, b, scale)
    return encode_private(svd_a[: option.rank], svd_b[:, : option.rank], 1.0, option.format)


def _relative(lost: float, norm: float) -> float:
    # A delta_W of zero is stored as zero, so there is nothing to divide.
    return math.sqrt(lost / norm) if norm > 0 else math.sqrt(lost)
