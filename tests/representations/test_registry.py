"""Every representation through the registry: what it stores, shares, checks and decodes to."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import pytest
import torch

from vllm_vlora.quantize import pack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.flat import encode_flat, pack_flat
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_narrow, encode_private
from vllm_vlora.representations.registry import (
    REPRESENTATIONS,
    Representation,
    segment_fault,
    segment_sides,
    shared_fault,
    shared_of,
    shared_rows,
    shared_sides,
    side_sources,
)
from vllm_vlora.representations.spec import BasisSpec, FlatSpec, ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule

D_IN, D_OUT, RANK, SCALE = 70, 40, 4, 1.5
SPEC = ModuleSpec(
    "q_proj",
    D_IN,
    D_OUT,
    basis=BasisSpec(6, 7, "float32"),
    flat=FlatSpec(RANK, 2, 3, "float32"),
)
FUNCTIONS = [
    name
    for name, value in vars(Representation).items()
    if inspect.isfunction(value) and name[0] != "_"
]


@dataclass(frozen=True)
class Case:
    """Something stored, what its tasks share, and delta_W (d_out, d_in) in float64."""

    stored: StoredModule
    basis: Basis | None
    delta: torch.Tensor


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def private() -> Case:
    a, b = draw(RANK, D_IN), draw(D_OUT, RANK)
    stored = encode_private(a, b, SCALE, "float32")
    return Case(stored, None, SCALE * b.double() @ a.double())


def joint(form: str) -> Case:
    """An update that lies on the basis, so that its core is exact."""
    u = torch.linalg.qr(draw(D_OUT, 6))[0]
    v = torch.linalg.qr(draw(D_IN, 7))[0].T.contiguous()
    rank = 1 if form == "factors" else RANK
    a, b = draw(rank, 7) @ v, u @ draw(6, rank)
    basis = Basis(pack(u.T.contiguous(), "float32"), pack(v, "float32"))
    stored = encode_joint(a, b, SCALE, u.T, v, "float32")
    assert stored.core == form
    return Case(stored, basis, SCALE * b.double() @ a.double())


def flat() -> Case:
    """A and B as sums of components, written out."""
    u, v = draw(3, RANK, D_OUT), draw(4, RANK, D_IN)
    of_a, of_b = draw(3), draw(2)
    basis = pack_flat(u.reshape(-1, D_OUT), v.reshape(-1, D_IN), SPEC.flat)  # type: ignore[arg-type]
    a = v[0].double() + sum(x.double() * part.double() for x, part in zip(of_a, v[1:]))
    b_t = u[0].double() + sum(x.double() * part.double() for x, part in zip(of_b, u[1:]))
    return Case(encode_flat(of_a, of_b, "float32", RANK), basis, b_t.T @ a)


CASES = {
    "private": private(),
    "joint, dense": joint("dense"),
    "joint, factors": joint("factors"),
    "flat": flat(),
}


def segment_of(stored: StoredModule) -> Segment:
    return Segment(
        0, stored.representation, stored.format, stored.rank, core=stored.core, bits=stored.bits
    )


def test_every_representation_has_every_function_with_the_parameters_of_the_protocol() -> None:
    assert {case.stored.representation for case in CASES.values()} == set(REPRESENTATIONS)
    assert len(FUNCTIONS) == 7
    for name, kind in REPRESENTATIONS.items():
        for function in FUNCTIONS:
            wanted = list(inspect.signature(getattr(Representation, function)).parameters)
            found = list(inspect.signature(getattr(kind, function)).parameters)
            assert found == wanted[1:], f"{name}.{function}"


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_what_is_stored_decodes_to_the_update(case: Case) -> None:
    a, b = decode(case.stored, case.basis)
    assert a.shape == (case.stored.rank, D_IN)
    assert b.shape == (D_OUT, case.stored.rank)
    torch.testing.assert_close(b.double() @ a.double(), case.delta, rtol=1e-5, atol=1e-4)
    sources = side_sources(case.stored, case.basis)
    assert [source.rank for source in sources] == [case.stored.rank] * 2


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_sides_are_those_of_the_matrices(case: Case) -> None:
    segment = segment_of(case.stored)
    assert segment_fault(segment, SPEC) is None
    found = {side: (m.rows, m.cols) for side, m in case.stored.matrices.items()}
    assert segment_sides(segment, SPEC) == found
    kind = (segment.is_private, segment.is_joint, segment.is_flat)
    assert kind == (case.stored.is_private, case.stored.is_joint, case.stored.is_flat)
    assert sum(kind) == 1


def test_what_is_shared_comes_back_by_representation() -> None:
    sides = {side: (rows, cols) for side, _, rows, cols in shared_sides(SPEC)}
    assert sides == {
        "U": (6, D_OUT),
        "V": (7, D_IN),
        "flatU": (3 * RANK, D_OUT),
        "flatV": (4 * RANK, D_IN),
    }
    packed = {side: pack(draw(*shape), "float32") for side, shape in sides.items()}
    found = dict(shared_of(SPEC, {side: dict(m.parts) for side, m in packed.items()}))
    assert list(found) == ["joint", "flat"]
    assert [type(basis) for basis in found.values()] == [Basis, FlatBasis]
    for basis, (u, v) in zip(found.values(), (("U", "V"), ("flatU", "flatV"))):
        assert torch.equal(basis.u.parts["values"], packed[u].parts["values"])
        assert torch.equal(basis.v.parts["values"], packed[v].parts["values"])
    bare = replace_spec(basis=None, flat=None)
    assert list(shared_sides(bare)) == []
    assert list(shared_of(bare, {})) == []


def replace_spec(**changes: object) -> ModuleSpec:
    fields = {"basis": SPEC.basis, "flat": SPEC.flat, **changes}
    return ModuleSpec("q_proj", D_IN, D_OUT, **fields)  # type: ignore[arg-type]


def test_rows_that_a_task_multiplies_with() -> None:
    wanted = {
        "private": None,
        "joint, dense": ("float32", 6, 7),
        "joint, factors": ("float32", 6, 7),
        "flat": ("float32", 3 * RANK, 4 * RANK),
    }
    for name, case in CASES.items():
        assert shared_rows(segment_of(case.stored), SPEC) == wanted[name]


@pytest.mark.parametrize(
    ("segment", "spec", "wrong"),
    [
        (Segment(0, "sparse", "int8", 4), SPEC, "unknown representation 'sparse'"),
        (Segment(0, "private", "int3", 4), SPEC, "unknown number format 'int3'"),
        (Segment(0, "private", "int8", 0), SPEC, "rank must be positive"),
        (Segment(0, "private", "int8", 4, float("nan")), SPEC, "scale is not finite"),
        # Its square, which errors are measured with, is no double any more.
        (Segment(0, "private", "int8", 4, 1e200), SPEC, "scale is not finite in float32"),
        (Segment(0, "private", "int8", 4, bits=(4, 0, 0)), SPEC, "bits by row"),
        (Segment(0, "joint", "nf4-dq", 4, core="dense", bits=(4, 0, 0)), SPEC, "bits by row"),
        (Segment(0, "private", "nf4-dq", 4, bits=(1, 1, 1)), SPEC, "do not sum to the rank 4"),
        (Segment(0, "private", "int8", 4, rows=(0, 1, 0, 1)), SPEC, "rows of a basis"),
        (Segment(0, "flat", "float32", 4, rows=(0, 1, 0, 1)), SPEC, "rows of a basis"),
        (Segment(0, "joint", "int8", 4, core="dense"), replace_spec(basis=None), "has no basis"),
        (
            Segment(0, "joint", "int8", 4, core="dense", rows=(0, 1, 0, 1)),
            replace_spec(basis=None),
            "rows of a basis",
        ),
        (Segment(0, "joint", "int8", 4, core="dense", rows=(0, 7, 0, 1)), SPEC, "not within"),
        (Segment(0, "joint", "int8", 4, core="tall"), SPEC, "unknown core form 'tall'"),
        (Segment(0, "joint", "int8", 7, core="dense"), SPEC, "rank 7 exceeds the core"),
        (Segment(0, "flat", "float32", 4), replace_spec(flat=None), "has no flat basis"),
        (Segment(0, "flat", "int8", 4), SPEC, "floating-point numbers, not int8"),
        (Segment(0, "flat", "float32", 5), SPEC, "rank 5 is not the flat basis' 4"),
    ],
)
def test_each_fault_of_a_segment_is_named(segment: Segment, spec: ModuleSpec, wrong: str) -> None:
    fault = segment_fault(segment, spec)
    assert fault is not None
    assert wrong in fault


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        (SPEC, None),
        (replace_spec(basis=BasisSpec(0, 3, "int8")), "basis"),
        (replace_spec(basis=BasisSpec(3, D_IN + 1, "int8")), "basis"),
        (replace_spec(basis=BasisSpec(3, 3, "int3")), "basis"),
        (replace_spec(flat=FlatSpec(0, 1, 1, "int8")), "flat basis"),
        (replace_spec(flat=FlatSpec(4, 1, 1, "int3")), "flat basis"),
    ],
)
def test_each_fault_of_what_is_shared_is_named(spec: ModuleSpec, wrong: str | None) -> None:
    assert shared_fault(spec) == wrong


def test_narrow_rows_name_their_bits_only_where_there_are_fewer_than_four() -> None:
    a, b = draw(RANK, D_IN), draw(D_OUT, RANK)
    assert encode_narrow(a, b, SCALE, (4, 0, 0)).bits is None
    narrow = encode_narrow(a, b, SCALE, (2, 1, 1))
    assert narrow.bits == (2, 1, 1)
    assert segment_fault(segment_of(narrow), SPEC) is None
    assert segment_fault(segment_of(replace(narrow, rank=5)), SPEC) is not None
