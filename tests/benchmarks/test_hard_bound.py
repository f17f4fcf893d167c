"""How the bytes of an ideal code are shared out, held against trying everything."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from places import BENCHMARKS

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

from fidelity.hard.bound import Directions, bits, distortions, through_channel, water_filled


@pytest.mark.parametrize(
    ("energy", "d_in", "d_out"), [(1.0, 64, 64), (0.3, 96, 32), (0.01, 8, 500)]
)
@pytest.mark.parametrize("price", [1e-7, 1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("gap", [0, 0.33])
def test_no_other_distortions_of_a_direction_cost_less(
    energy: float, d_in: int, d_out: int, price: float, gap: float
) -> None:
    grid = torch.cat([torch.logspace(-6, 0, 400, dtype=torch.float64)])
    p, q = torch.meshgrid(grid, grid, indexing="ij")
    least = energy * (1 - (1 - p) * (1 - q)) + price * bits(p, q, d_in, d_out, gap)
    energies = torch.tensor([energy], dtype=torch.float64)
    p, q = distortions(energies, d_in, d_out, price, gap)
    ours = energies * (1 - (1 - p) * (1 - q)) + price * bits(p, q, d_in, d_out, gap)
    assert float(ours) <= float(least.min()) * (1 + 1e-12)
    assert float(ours) == pytest.approx(float(least.min()), rel=0.01)


def test_the_budget_is_spent_and_what_is_not_worth_it_left_out() -> None:
    energies = torch.logspace(0, -6, 300, dtype=torch.float64)
    a, b = torch.zeros(300, 48), torch.zeros(80, 300)
    (found,) = water_filled([Directions("t", "m", a, b, energies)], 20_000.0)
    p, q = found
    # A direction comes with all the bits that it is worth, or not at all.
    assert 19_900 < float(bits(p, q, 48, 80).sum()) <= 20_000
    stored = p < 1
    assert torch.equal(stored, q < 1)
    count = int(stored.sum())
    assert 0 < count < 300
    assert bool(stored[:count].all())
    # Equal slopes: a bit more lowers the error by as much wherever something is stored.
    slopes = (p * (1 - q) * energies)[:count]
    assert slopes.tolist() == pytest.approx([float(slopes[0])] * count)


def test_a_channel_loses_what_it_is_to_lose() -> None:
    rows = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(1)) * 5
    lost = torch.tensor([0.0, 0.25, 1.0])
    found = through_channel(rows, lost, torch.Generator().manual_seed(2))
    apart = (found - rows).square().sum(1) / rows.square().sum(1)
    assert apart.tolist() == pytest.approx(lost.tolist(), abs=0.01)
    # As a decoder that is worth its bits answers: of R bits a number the mutual information.
    cosine = (found[1] * rows[1]).sum() / found[1].norm() / rows[1].norm()
    assert -0.5 * math.log2(1 - float(cosine) ** 2) == pytest.approx(1.0, abs=0.01)
    assert float(found[2].abs().max()) == 0
