"""Singular values of updates, module by module and over a collection."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

SPECTRUM_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class ModuleFidelity:
    """One module of one task, as the checkpoint holds it, beside the original.

    Attributes:
        name: the module's path in the base model.
        error_squared: ||delta_W' - delta_W||_F^2.
        norm_squared: ||delta_W||_F^2.
        singular_values: of delta_W, descending.
    """

    name: str
    error_squared: float
    norm_squared: float
    singular_values: tuple[float, ...]

    @property
    def error(self) -> float | None:
        """||delta_W' - delta_W||_F / ||delta_W||_F; None where delta_W is zero and its copy is not."""
        return error_of(self.error_squared, self.norm_squared)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one kind of module over tasks and layers, each module's scaled to norm 1.

    Attributes:
        kind: last part of the modules' names ("q_proj").
        quantiles: for each of ``SPECTRUM_QUANTILES``, the value at place 1, 2, ...; a module of
            smaller rank has zeros there.
        kept_rank: median rank that the checkpoint keeps.
        modules: number of modules counted.
    """

    kind: str
    quantiles: tuple[tuple[float, ...], ...]
    kept_rank: float
    modules: int


@dataclass
class SpectrumCollector:
    """Gathers singular values task by task."""

    _values: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _ranks: dict[str, list[int]] = field(default_factory=dict)

    def add(self, modules: Sequence[ModuleFidelity], ranks: Mapping[str, int]) -> None:
        """Count a task's modules; ``ranks`` are those kept, by module name (absent: none)."""
        for module in modules:
            kind = module_kind(module.name)
            norm = math.sqrt(module.norm_squared) or 1.0
            values = torch.tensor(module.singular_values, dtype=torch.float32) / norm
            self._values.setdefault(kind, []).append(values)
            self._ranks.setdefault(kind, []).append(ranks.get(module.name, 0))

    def spectra(self) -> list[Spectrum]:
        """A spectrum for each kind of module, sorted by kind."""
        return [
            Spectrum(
                kind,
                quantile_rows(self._values[kind]),
                statistics.median(self._ranks[kind]),
                len(self._values[kind]),
            )
            for kind in sorted(self._values)
        ]


def quantile_rows(values: Sequence[torch.Tensor]) -> tuple[tuple[float, ...], ...]:
    """For each of ``SPECTRUM_QUANTILES``, that of all values at place 1, 2, ...; zeros fill the short."""
    table = torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)
    ordered = table.sort(dim=0).values
    return tuple(
        tuple(quantile(ordered[:, place], share) for place in range(table.shape[1]))
        for share in SPECTRUM_QUANTILES
    )


def module_kind(name: str) -> str:
    """The last part of a module's name that is no number: ``q_proj`` of ``...self_attn.q_proj``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else name


def quantile(ordered: torch.Tensor, share: float) -> float:
    """Linear between the neighbours of ordered values; ``share`` is between 0 and 1."""
    # torch.quantile refuses more than 2^24 elements and needs them all in one tensor anyway.
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def error_of(error_squared: float, norm_squared: float) -> float | None:
    """The root of their ratio; None where an update of zero did not stay zero."""
    if norm_squared == 0.0:
        return 0.0 if error_squared == 0.0 else None
    return math.sqrt(error_squared / norm_squared)
