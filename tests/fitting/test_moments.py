"""Streamed moments against float64 products of all rows at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.fitting.moments import (
    FullMoment,
    FullSum,
    LowRankMoment,
    SketchSum,
    new_sum,
)

CPU = torch.device("cpu")


def streamed(total: FullSum | SketchSum, rows: torch.Tensor, parts: int) -> torch.Tensor:
    for part in rows.float().chunk(parts):
        total.add(part)
    return total.moment(len(rows)).dense()


def decaying_rows(count: int, width: int, power: float) -> torch.Tensor:
    """Rows whose moment has eigenvalues near 1 / i^power, in directions drawn at random."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    scales = torch.arange(1, width + 1, dtype=torch.float64) ** (-power / 2)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scales @ q


@pytest.mark.parametrize("width", [1, 7, 256, 600])
def test_a_full_moment_is_the_mean_outer_product(width: int) -> None:
    rows = torch.randn(50, width, dtype=torch.float64)
    moment = streamed(FullSum(width, CPU), rows, 4)
    torch.testing.assert_close(moment, rows.T @ rows / 50, rtol=1e-5, atol=1e-5)
    assert torch.equal(moment, moment.T)


@settings(deadline=None, max_examples=20)
@given(st.integers(70, 130), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_rows_of_few_dimensions_are_kept_whole(
    width: int, rank: int, parts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, rank, generator=generator) @ torch.randn(
        rank, width, generator=generator
    )
    wanted = rows.double().T @ rows.double() / 200
    found = streamed(SketchSum(width, 12, CPU), rows, parts)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_a_sketch_is_nearly_the_best_of_its_size() -> None:
    rows = decaying_rows(4000, 300, 1.5)
    total = SketchSum(300, 16, CPU)
    streamed(total, rows, 8)
    moment = total.moment(len(rows))
    wanted = rows.T @ rows / len(rows)
    q = moment.directions.double()
    torch.testing.assert_close(q @ q.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
    best = torch.linalg.eigvalsh(wanted).flip(0)
    torch.testing.assert_close(moment.values.double(), best[:16], rtol=0.2, atol=0)
    # The diagonal is exact, and the directions leave little more than the best ones would.
    torch.testing.assert_close(moment.dense().diagonal(), wanted.diagonal(), rtol=1e-4, atol=1e-6)
    left = wanted - (q.T * moment.values.double()) @ q
    assert float(torch.linalg.matrix_norm(left)) < 1.2 * float(best[16:].norm())
    # Nothing is overestimated: that is what keeps the diagonal from being negative.
    assert float(torch.linalg.eigvalsh(left)[0]) > -1e-4 * float(best[0])
    assert float(moment.rest.min()) >= 0


def test_a_sketch_of_every_direction_is_exact() -> None:
    rows = decaying_rows(500, 40, 1.0)
    found = streamed(SketchSum(40, 40, CPU), rows, 3)
    torch.testing.assert_close(found, rows.T @ rows / 500, rtol=0, atol=1e-5)


def test_no_rows_make_a_moment_of_zeros() -> None:
    for total in (FullSum(100, CPU), SketchSum(100, 8, CPU)):
        moment = total.moment(5)
        assert float(moment.dense().abs().max()) == 0
        assert moment.mean == 0


def test_the_order_of_the_parts_does_not_matter() -> None:
    rows = decaying_rows(300, 90, 1.0)
    one = streamed(SketchSum(90, 10, CPU), rows, 1)
    many = streamed(SketchSum(90, 10, CPU), rows.flip(0), 7)
    torch.testing.assert_close(one, many, rtol=0, atol=1e-4)


def test_width_chooses_the_form() -> None:
    narrow = new_sum(64, 64, 8, CPU).moment(1)
    wide = new_sum(65, 64, 8, CPU).moment(1)
    assert isinstance(narrow, FullMoment)
    assert isinstance(wide, LowRankMoment)


def test_the_mean_is_that_of_the_diagonal() -> None:
    rows = decaying_rows(200, 80, 1.0)
    for total in (FullSum(80, CPU), SketchSum(80, 5, CPU)):
        streamed(total, rows, 2)
        mean = total.moment(len(rows)).mean
        assert mean == pytest.approx(float(rows.square().mean()), rel=1e-5)
