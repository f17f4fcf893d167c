"""Whether tasks gain anything by sharing, found out on some modules before bases are fitted to all.

A basis costs as much to fit and measure as everything else together, and adapters that have nothing in
common gain nothing by it in any module.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_vlora.adapters.collection import Module
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
