"""Whether tasks gain anything by sharing, found out on some modules before bases are fitted to all.

A basis costs as much to fit and measure as everything else together, and adapters that have nothing in
common gain nothing by it in any module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vllm_vlora.adapters.collection import Module
from vllm_vlora.planning.allocation import build_path
from vllm_vlora.planning.flat_curves import flat_nbytes, loadings_nbytes
from vllm_vlora.planning.number_formats import Formats
from vllm_vlora.planning.sharing import decide_sharing
from vllm_vlora.planning.survey import Survey

# Fewer modules than this many times the samples are all fitted at once.
_WORTH_IT = 2


def sample(modules: Sequence[Module]) -> list[Module]:
    """The first, the middle and the last module of each kind (name without numbers, and shape).

    All, where that is not far fewer.
    """
    kinds: dict[tuple[str, int, int], list[Module]] = {}
    for module in modules:
        last = module.name.rpartition(".")[2]
        kinds.setdefault((last, module.d_in, module.d_out), []).append(module)
    chosen = [
        found[place]
        for found in kinds.values()
        for place in sorted({0, len(found) // 2, len(found) - 1})
    ]
    return chosen if _WORTH_IT * len(chosen) <= len(modules) else list(modules)


def bases_can_pay(
    survey: Survey,
    formats: Formats,
    modules: Sequence[Module],
    parts: Sequence[float],
    shared_loss: float,
) -> bool:
    """Whether tasks would share a basis in any of these modules.

    Args:
        survey: has private curves and bases of these modules.
        parts: of the original size, the sizes that may be wanted. shared_loss: as of
            ``decide_sharing``.
    """
    size = sum(module.original_nbytes for module in modules)
    names = [module.name for module in modules]
    return any(
        decide_sharing(
            survey, formats, round(size * part), shared_loss=shared_loss, names=names
        ).sharers
        for part in parts
    )


def flat_can_pay(survey: Survey, modules: Iterable[Module], parts: Sequence[float]) -> bool:
    """Whether flat storage loses less than private storage of its size in any of these modules."""
    return any(
        _flat_pays(survey, module, parts) for module in modules if module.name in survey.flat
    )


def _flat_pays(survey: Survey, module: Module, parts: Sequence[float]) -> bool:
    chains = [
        [p for curve in survey.private[task, module.name].values() for p in curve.points(weight)]
        for task, weight in ((task, survey.weights[task]) for task in module.tasks)
    ]
    path = build_path(len(chains), chains.__getitem__)
    losses = [sum(chain[option][1] for chain, option in zip(chains, path.start))]
    for step in path.steps:
        losses.append(losses[-1] - step.gain)
    group = survey.flat[module.name]
    weights = torch.tensor([survey.weights[t] for t in group.tasks], dtype=torch.float64)
    for curve in group.curves.values():
        for spec, loss in zip(curve.specs, (weights @ curve.losses).tolist()):
            own = len(group.tasks) * loadings_nbytes(spec, curve.loadings_format)
            nbytes = flat_nbytes(spec, module.d_out, module.d_in) + own
            if nbytes > max(parts) * module.original_nbytes:
                continue
            room = nbytes - path.start_nbytes
            if room < 0:
                # Smaller than private storage can be: of use where so little may be wanted.
                if min(parts) * module.original_nbytes < path.start_nbytes:
                    return True
            elif loss < losses[int(np.searchsorted(path.totals, room, side="right"))]:
                return True
    return False
