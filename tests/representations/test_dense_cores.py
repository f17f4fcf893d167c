"""Dense cores: what multiplies with one and what has its factors agree, but for 16-bit rounding."""

from __future__ import annotations

import pytest
import torch

from vllm_vlora.quantize import unpack
from vllm_vlora.representations.joint import core_factors, encode_core


@pytest.mark.parametrize(
    ("format", "most"), [("float32", 1e-6), ("bfloat16", 2.0**-8), ("float16", 2.0**-11)]
)
@pytest.mark.parametrize(("rank", "width"), [(8, 12), (16, 31)])
def test_a_core_and_its_factors_differ_by_rounding_at_most(
    format: str, most: float, rank: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(rank, width, generator=generator) for _ in range(2))
    stored = encode_core(left, right, format)
    assert (stored.core, stored.rank) == ("dense", rank)
    whole = unpack(stored.matrices["C"]).double()
    a, b = core_factors(stored)
    difference = b.double().T @ a.double() - whole
    assert float(difference.norm()) <= most * float(whole.norm())
    # The factors are the nearer ones to the adapter, and what is stated of it is theirs.
    exact = left.double().T @ right.double()
    if format != "float32":
        assert (b.double().T @ a.double() - exact).norm() < (whole - exact).norm()
