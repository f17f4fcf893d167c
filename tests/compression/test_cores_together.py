"""Cores that are projected and measured several at once, against projections in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm_vlora.compression.encoding import CoreProjection, decoded_loss
from vllm_vlora.fitting.whitening import FROBENIUS
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.decode import decode, decode_together
from vllm_vlora.representations.stored import Basis


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_tasks_of_several_ranks_are_what_they_are_one_by_one(format: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    basis = Basis(pack(random(30, 50), "float32"), pack(random(40, 70), "float32"))
    u, v = (unpack(side).double() for side in (basis.u, basis.v))
    left, right = torch.linalg.pinv(u) @ u, torch.linalg.pinv(v) @ v
    factors = [(random(r, 70), random(50, r), s) for r, s in ((3, 0.5), (7, 2.0), (5, -1.0))]
    stored = list(CoreProjection(basis, FROBENIUS, format).together(factors))
    stored[2] = replace(stored[2], scale=0.0)
    decoded = decode_together(stored, basis)
    for place, ((a, b, scale), (new_a, new_b)) in enumerate(zip(factors, decoded)):
        one_a, one_b = decode(stored[place], basis)
        torch.testing.assert_close(new_b @ new_a, one_b @ one_a, rtol=1e-4, atol=1e-4)
        delta = scale * b.double() @ a.double()
        nearest = left @ delta @ right if place < 2 else torch.zeros_like(delta)
        off = float((new_b.double() @ new_a.double() - nearest).norm() / delta.norm())
        assert off < (1e-5 if format == "float32" else 0.02)
        loss = decoded_loss(a, b, scale, new_a, new_b, FROBENIUS)
        lost = float((new_b.double() @ new_a.double() - delta).square().sum())
        assert loss.lost == pytest.approx(lost, rel=1e-9)
        assert loss.norm == pytest.approx(float(delta.square().sum()), rel=1e-9)
