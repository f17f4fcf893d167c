"""One module of one task in memory, what tasks share, and the products they decode to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from vllm_vlora.quantize import PackedMatrix, unpack
from vllm_vlora.representations.kind import HasRepresentation


@dataclass(frozen=True)
class StoredModule(HasRepresentation):
    """One module of one task in memory: its segment's fields and its packed matrices by side.

    The matrices of a task with ``bits`` have room for 4 bits in every row, as ``pack_narrow`` and
    ``pack_trellis`` make them; only the file has fewer.
    """

    representation: str
    format: str
    rank: int
    matrices: Mapping[str, PackedMatrix]
    scale: float = 1.0
    error: float = 0.0
    core: str | None = None
    bits: tuple[int, int, int] | None = None
    rows: tuple[int, int, int, int] | None = None

    def cpu(self) -> StoredModule:
        """The same with its matrices on the CPU."""
        if all(matrix.device.type == "cpu" for matrix in self.matrices.values()):
            return self
        moved = {side: matrix.to("cpu") for side, matrix in self.matrices.items()}
        return replace(self, matrices=moved)

    @property
    def changes_nothing(self) -> bool:
        """Whether its own numbers make delta_W zero, whatever its tasks share; loadings never do."""
        return not self.is_flat and any(m.is_zero for m in self.matrices.values())


@dataclass(frozen=True)
class Basis:
    """A module's shared basis: ``u`` is U transposed (k_out x d_out), ``v`` is V (k_in x d_in)."""

    u: PackedMatrix
    v: PackedMatrix

    def to(self, device: torch.device) -> Basis:
        """The same on another device."""
        return replace(self, u=self.u.to(device), v=self.v.to(device))


@dataclass(frozen=True)
class FlatBasis(Basis):
    """What a module's ``flat`` tasks share, stacked as ``FlatSpec`` says.

    ``u`` is ((k_out + 1) * rank, d_out) and ``v`` ((k_in + 1) * rank, d_in).
    """

    rank: int

    @property
    def k_out(self) -> int:
        """Components of B transposed beside their mean."""
        return self.u.rows // self.rank - 1

    @property
    def k_in(self) -> int:
        """Components of A beside their mean."""
        return self.v.rows // self.rank - 1


@dataclass(frozen=True)
class SideSource:
    """``scale * left @ unpack(matrix)``, of shape (rank, d); ``left`` None means the identity."""

    matrix: PackedMatrix
    left: torch.Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        """Rows of the product."""
        return self.matrix.rows if self.left is None else self.left.shape[0]

    def to_dense(self) -> torch.Tensor:
        """The product in float32, (rank, d)."""
        dense = unpack(self.matrix)
        if self.left is not None:
            dense = self.left.to(dense.dtype) @ dense
        return dense if self.scale == 1.0 else dense * self.scale
