"""What the manifest says of a module, of what its tasks share, and of one task's part (a segment)."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from vllm_vlora.representations.kind import HasRepresentation

Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A count or a number of bytes, within what JSON's readers agree on."""
_USUAL_RANK = 1024
_FLOAT32_MAX = float.fromhex("0x1.fffffep127")


def rank_fault(rank: int, d_in: int, d_out: int) -> str | None:
    """What is wrong with a rank; None where nothing is.

    Of factors much is computed that is (rank, rank), which a few bytes may not make large: for a layer of
    one input and one output a rank of 60,000 takes 480 kB, and its square 29 GB. A rank above both sides
    of a layer adds nothing; it is allowed as far as it costs little.
    """
    most = max(d_in, d_out, _USUAL_RANK)
    return (
        f"rank {rank} is above {most}, which no update of {d_out} x {d_in} has"
        if rank > most
        else None
    )


def fits_float32(value: float) -> bool:
    """Whether a number, whole ones of any size too, is finite and stays so in float32, as scales must."""
    return -_FLOAT32_MAX <= value <= _FLOAT32_MAX


class BasisSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shared basis of one module: U (d_out x k_out) and V (k_in x d_in), orthonormal."""

    k_out: Size
    k_in: Size
    format: str


class FlatSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one module's ``flat`` tasks share: the principal components of their flattened factors.

    ``flatU`` holds the mean and ``k_out`` components of B transposed (rank x d_out), ``flatV`` the
    mean and ``k_in`` components of A (rank x d_in): ``(k + 1) * rank`` rows, component by component,
    the mean first. After vlora, whose representation it is.
    """

    rank: Size
    k_out: Size
    k_in: Size
    format: str


class ModuleSpec(msgspec.Struct, forbid_unknown_fields=True):
    """A module of the base model that some task adapts; delta_W is d_out x d_in."""

    name: str
    d_in: Size
    d_out: Size
    kind: str = "linear"
    basis: BasisSpec | None = None
    flat: FlatSpec | None = None


class Segment(HasRepresentation, msgspec.Struct, forbid_unknown_fields=True):
    """How one module of one task is stored.

    ``private``: delta_W = scale * B A, side A (rank x d_in), side B transposed (rank x d_out).
    ``joint``, core ``factors``: delta_W = scale * U L_B L_A V, side A is L_A (rank x k_in), side B
    is L_B transposed (rank x k_out). ``joint``, core ``dense``: side C is the core (k_out x k_in),
    whose rank is ``rank``. ``flat``: side A holds k_in loadings and side B k_out, one row each;
    A = mean + sum_j A_j * component j of flatV, and B transposed alike from flatU. ``error`` is the
    measured ||delta_W' - delta_W||_F / ||delta_W||_F.

    ``bits`` (private, nf4-dq or trellis): how many rows of each side have 4, 3 and 2 bits, in this
    order; None is 4 bits for all. ``rows`` (joint): (u_start, u_stop, v_start, v_stop), the rows of U
    transposed and of V that the core stands on; None is all of them.
    """

    module: int
    representation: str
    format: str
    rank: int
    scale: float = 1.0
    error: float = 0.0
    core: str | None = None
    bits: tuple[int, int, int] | None = None
    rows: tuple[int, int, int, int] | None = None

    @property
    def has_narrow_rows(self) -> bool:
        """Whether some rows are NF4 of 3 or 2 bits, which a device may hold as such."""
        return self.format == "nf4-dq" and self.bits is not None


def core_widths(segment: Segment, basis: BasisSpec) -> tuple[int, int]:
    """(k_out, k_in) of a joint segment's core: how many rows of each side of the basis it uses."""
    if segment.rows is None:
        return basis.k_out, basis.k_in
    u_start, u_stop, v_start, v_stop = segment.rows
    return u_stop - u_start, v_stop - v_start
