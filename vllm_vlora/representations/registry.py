"""The representations by name: what each stores, checks and decodes to.

A representation is a module with the functions of ``Representation`` and an encoder; a further one is
a file beside these, a row here, and its curve in ``planning``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from vllm_vlora.quantize import FORMATS, SHARED_FORMATS, PackedMatrix
from vllm_vlora.representations import flat, joint, private
from vllm_vlora.representations.spec import ModuleSpec, Segment, fits_float32, rank_fault
from vllm_vlora.representations.stored import Basis, SideSource, StoredModule


class Representation(Protocol):
    """How one module of one task is stored.

    Functions that take a segment are asked only of segments of this representation.
    """

    def sides(self, segment: Segment, module: ModuleSpec) -> dict[str, tuple[int, int]]:
        """Side -> (rows, columns) of the matrices that a segment stores."""

    def fault(self, segment: Segment, module: ModuleSpec) -> str | None:
        """What is wrong with a segment; None where nothing is."""

    def sources(self, stored: StoredModule, basis: Basis | None) -> tuple[SideSource, SideSource]:
        """Sources of A (rank, d_in) and of B transposed (rank, d_out); the scale stands on B."""

    def shared_sides(self, module: ModuleSpec) -> Iterator[tuple[str, str, int, int]]:
        """(side, format, rows, columns) of the matrices that a module's tasks share."""

    def shared_fault(self, module: ModuleSpec) -> str | None:
        """What is wrong with what a module's tasks share; None where nothing is."""

    def shared_rows(self, segment: Segment, module: ModuleSpec) -> tuple[str, int, int] | None:
        """(format, rows on B's side, rows on A's) of what a task multiplies with beside its own."""

    def shared(self, module: ModuleSpec, matrices: Mapping[str, PackedMatrix]) -> Basis | None:
        """What a module's tasks share, from its matrices by side; None where they share nothing."""


# In the order in which what tasks share stands in the basis files.
REPRESENTATIONS: dict[str, Representation] = {"joint": joint, "private": private, "flat": flat}
# The representations that have a field of the segment, and what is said of the others.
_OWN_FIELDS = {"bits": ("private", private.BITS_FAULT), "rows": ("joint", joint.ROWS_FAULT)}


def segment_sides(segment: Segment, module: ModuleSpec) -> dict[str, tuple[int, int]]:
    """Side -> (rows, columns) of the matrices that a segment stores."""
    return REPRESENTATIONS[segment.representation].sides(segment, module)


def segment_fault(segment: Segment, module: ModuleSpec) -> str | None:
    """What is wrong with a segment; None where nothing is."""
    if segment.representation not in REPRESENTATIONS:
        return f"unknown representation {segment.representation!r}; upgrade vllm-vlora"
    if segment.format not in FORMATS:
        return f"unknown number format {segment.format!r}; upgrade vllm-vlora"
    if not segment.is_private and segment.format not in SHARED_FORMATS:
        return f"number format {segment.format!r}, which only private segments have"
    if segment.rank < 1:
        return f"rank must be positive, got {segment.rank}"
    wrong = rank_fault(segment.rank, module.d_in, module.d_out)
    if wrong:
        return wrong
    if not fits_float32(segment.scale):
        return f"scale is not finite in float32 ({segment.scale})"
    for field, (owner, fault) in _OWN_FIELDS.items():
        if getattr(segment, field) is not None and segment.representation != owner:
            return fault
    return REPRESENTATIONS[segment.representation].fault(segment, module)


def shared_sides(module: ModuleSpec) -> Iterator[tuple[str, str, int, int]]:
    """(side, format, rows, columns) of the matrices that a module's tasks share."""
    for representation in REPRESENTATIONS.values():
        yield from representation.shared_sides(module)


def shared_fault(module: ModuleSpec) -> str | None:
    """What is wrong with what a module's tasks share; None where nothing is."""
    faults = (kind.shared_fault(module) for kind in REPRESENTATIONS.values())
    return next(filter(None, faults), None)


def shared_rows(segment: Segment, module: ModuleSpec) -> tuple[str, int, int] | None:
    """(format, rows on B's side, rows on A's) of what a segment multiplies with beside its own."""
    return REPRESENTATIONS[segment.representation].shared_rows(segment, module)


def shared_of(
    module: ModuleSpec, parts: Mapping[str, dict[str, torch.Tensor]]
) -> Iterator[tuple[str, Basis]]:
    """(representation, what the module's tasks of it share) from packed parts by side.

    Args:
        parts: side -> part of its number format -> tensor, of every side of ``shared_sides``.
    """
    matrices = {
        side: PackedMatrix(format, rows, cols, parts[side])
        for side, format, rows, cols in shared_sides(module)
    }
    for name, representation in REPRESENTATIONS.items():
        basis = representation.shared(module, matrices)
        if basis is not None:
            yield name, basis


def side_sources(stored: StoredModule, basis: Basis | None) -> tuple[SideSource, SideSource]:
    """Sources of A (rank, d_in) and of B transposed (rank, d_out); the scale stands on B.

    vLLM folds alpha / r into B as well, so a private task in its own dtype, served in that dtype,
    materialises to the very bits that stock vLLM puts into its slots.
    """
    return REPRESENTATIONS[stored.representation].sources(stored, basis)
