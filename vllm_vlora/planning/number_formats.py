"""Which number formats a run tries, and what their labels mean for an adapter's dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_vlora.adapters.collection import Collection, Module
from vllm_vlora.quantize import FORMAT_OF_DTYPE, row_nbytes

NARROW = "narrow"
"""Label of NF4 whose bits are spread over the singular directions: 4, 3 or 2 a row."""
NARROW_FORMAT = "nf4-dq"
TRELLIS = "trellis"
"""Label of trellis codes whose bits are spread alike."""
OWN = "own"
"""Label for each module's own dtype, where the adapters have several."""

# Generous for the four entries by which an nf4-dq task file's header exceeds an nf4 one's.
_DOUBLE_QUANTIZE_HEADER = 2048


@dataclass(frozen=True)
class Formats:
    """The labels to try: number formats and ``own``.

    ``dtype`` is what was asked for in place of the adapters' own, and for the cores; ``spread`` the label
    whose bits are spread over the directions of private factors, where NF4 is tried.
    """

    labels: tuple[str, ...]
    dtype: str | None
    spread: str = NARROW

    def of(self, dtype: torch.dtype) -> list[str]:
        """The number format that each label means for factors of this dtype."""
        own = _own_format(dtype, self.dtype)
        return [own if label == OWN else label for label in self.labels]

    @property
    def private_labels(self) -> tuple[str, ...]:
        """The labels for private factors: few bits may also be spread over the directions."""
        return (*self.labels, self.spread) if NARROW_FORMAT in self.labels else self.labels

    def private_of(self, dtype: torch.dtype) -> list[str]:
        """What each label of ``private_labels`` means for factors of this dtype."""
        return self.of(dtype) + ([self.spread] if NARROW_FORMAT in self.labels else [])

    def cores(self, basis_format: str) -> list[str]:
        """The formats of cores to try on bases of this one: a float one, and quantised ones."""
        if self.dtype is not None:
            own = self.dtype
        else:
            own = "float32" if basis_format == "float32" else "bfloat16"
        quantised = [format for format in ("int8", NARROW_FORMAT) if format in self.labels]
        return [own, *quantised]


def formats_to_try(
    collection: Collection,
    quantize: str,
    dtype: str | None,
    double_quantize: bool,
    codes: str = "nf4",
) -> Formats:
    """The formats that ``quantize`` (auto, none, int8, nf4) and ``codes`` (nf4, trellis) allow.

    ``own`` is named for what it is where all modules agree on it.
    """
    modules = list(collection.modules.values())
    nf4 = _nf4_formats(modules, len(collection.adapters)) if double_quantize else ["nf4"]
    own = {_own_format(module.dtype, dtype) for module in modules}
    own_label = own.pop() if len(own) == 1 else OWN
    labels = {"none": [own_label], "int8": ["int8"], "nf4": nf4}.get(
        quantize, [own_label, "bfloat16", "int8", *nf4]
    )
    return Formats(tuple(dict.fromkeys(labels)), dtype, TRELLIS if codes == "trellis" else NARROW)


def _own_format(own: torch.dtype, wanted: str | None) -> str:
    return wanted or FORMAT_OF_DTYPE[own]


def _nf4_formats(modules: list[Module], num_tasks: int) -> list[str]:
    """The NF4 formats worth a try.

    Scales in 8 bits cost next to no error, but their file headers name two parts more a side:
    plain NF4 is only the smaller for tiny adapters or narrow matrices.
    """
    saved = sum(
        sum(module.ranks) * (row_nbytes("nf4", d) - row_nbytes("nf4-dq", d))
        for module in modules
        for d in (module.d_in, module.d_out)
    )
    return ["nf4-dq"] if saved > _DOUBLE_QUANTIZE_HEADER * num_tasks else ["nf4-dq", "nf4"]
