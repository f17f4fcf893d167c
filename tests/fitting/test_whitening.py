"""Square roots of moments: S S^T is the damped moment, and what is applied can be undone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.fitting.whitening import (
    FROBENIUS,
    Metric,
    TriangularWhitener,
    Whitener,
    Whitening,
    whiten,
)


def random_moment(width: int, rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x.T @ x * (torch.rand(1, generator=generator, dtype=torch.float64) * 100 / rows)


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    width = len(moment)
    return moment / moment.diagonal().mean() + damping * torch.eye(width, dtype=torch.float64)


def check_square_root(
    root: Whitening, wanted: torch.Tensor, rows: torch.Tensor, tolerance: float = 1e-5
) -> None:
    """S S^T is ``wanted``; ``solve`` undoes ``apply``; ``apply_transposed`` multiplies by S^T."""
    identity = torch.eye(len(wanted), dtype=torch.float64)
    s = root.apply(identity)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(s @ s.T, wanted, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(root.apply_transposed(identity), s.T, rtol=0, atol=1e-9)
    condition = float(torch.linalg.cond(wanted)) ** 0.5
    torch.testing.assert_close(
        root.solve(root.apply(rows)),
        rows,
        rtol=0,
        atol=tolerance * condition * float(rows.abs().max()),
    )
    torch.testing.assert_close(root.apply(rows), rows @ s, rtol=1e-6, atol=1e-6)


shapes = st.tuples(st.integers(1, 24), st.integers(1, 40), st.integers(0, 10**6))
dampings = st.sampled_from([1e-3, 1e-2, 1.0])


@settings(deadline=None)
@given(shapes, dampings)
def test_both_roots_of_a_full_moment(shape: tuple[int, int, int], damping: float) -> None:
    moment = random_moment(*shape)
    rows = random_moment(len(moment), 3, 1)[:3]
    for root in (whiten(moment, damping), Whitener.from_moment(moment, damping)):
        check_square_root(root, damped(moment, damping), rows)


@settings(deadline=None)
@given(shapes, st.integers(0, 8), dampings)
def test_the_root_of_directions_and_a_diagonal(
    shape: tuple[int, int, int], directions: int, damping: float
) -> None:
    width, _, seed = shape
    directions = min(directions, width)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:directions]
    values = torch.rand(directions, generator=generator) * 50
    rest = torch.rand(width, generator=generator)
    moment = (q.T * values).double() @ q.double() + torch.diag(rest.double())
    root = Whitener.from_directions(q, values, rest, damping)
    check_square_root(root, damped(moment, damping), moment[:3])


def test_a_moment_of_nothing_leaves_shapes_alone() -> None:
    rows = torch.randn(2, 4)
    for root in (
        whiten(torch.zeros(4, 4), 0.25),
        Whitener.from_directions(torch.zeros(0, 4), torch.zeros(0), torch.zeros(4), 0.25),
    ):
        torch.testing.assert_close(root.apply(rows), rows / 2)


def test_a_moment_that_rounding_left_indefinite_still_has_a_root() -> None:
    moment = torch.diag(torch.tensor([4.0, 1.0, -1e-6]))
    root = whiten(moment, 1e-9)
    assert isinstance(root, Whitener)
    assert isinstance(whiten(moment, 1e-2), TriangularWhitener)
    rows = torch.randn(2, 3)
    torch.testing.assert_close(root.solve(root.apply(rows)), rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_keep_their_dtype(dtype: torch.dtype) -> None:
    moment = random_moment(8, 20, 0)
    for root in (whiten(moment), Whitener.from_moment(moment)):
        rows = torch.ones(2, 8, dtype=dtype)
        for result in (root.apply(rows), root.solve(rows), root.apply_transposed(rows)):
            assert result.dtype == dtype


@pytest.mark.parametrize("make", [whiten, Whitener.from_moment])
def test_what_is_no_moment_is_refused(make: object) -> None:
    assert callable(make)
    for moment, damping in ((torch.zeros(2, 3), 0.1), (torch.eye(2), 0.0)):
        with pytest.raises(ValueError, match="positive damping"):
            make(moment, damping)
    with pytest.raises(ValueError, match="directions"):
        Whitener.from_directions(torch.zeros(2, 3), torch.zeros(1), torch.zeros(3), 0.1)


def test_a_metric_whitens_each_side_and_takes_it_back() -> None:
    metric = Metric(whiten(random_moment(6, 9, 0)), whiten(random_moment(5, 9, 1)))
    a, b_t = torch.randn(2, 6).double(), torch.randn(2, 5).double()
    torch.testing.assert_close(metric.unwhiten_a(metric.a(a)), a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metric.unwhiten_b_t(metric.b_t(b_t)), b_t, rtol=1e-5, atol=1e-5)
    assert FROBENIUS.a(a) is a
    assert FROBENIUS.unwhiten_b_t(b_t) is b_t


@settings(deadline=None)
@given(shapes)
def test_the_norm_is_the_change_of_the_output(shape: tuple[int, int, int]) -> None:
    width, count, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    error = torch.randn(3, width, generator=generator, dtype=torch.float64)
    moment = x.T @ x / count
    change = (x @ error.T).square().sum(1).mean()
    norm = whiten(moment, 1e-7).apply(error).square().sum() * moment.diagonal().mean()
    torch.testing.assert_close(norm, change, rtol=1e-4, atol=1e-5)
