"""The streaming fit against dense float64 references."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.fit import fit_bases, fit_module

Adapters = list[tuple[torch.Tensor, torch.Tensor, float]]


def random_adapters(
    ranks: list[int], d_in: int, d_out: int, seed: int = 0, common: int = 0
) -> Adapters:
    """Random factors; with ``common``, each is mostly a mixture of that many shared directions."""
    generator = torch.Generator().manual_seed(seed)
    shared_a = torch.randn(max(common, 1), d_in, generator=generator)
    shared_b = torch.randn(d_out, max(common, 1), generator=generator)
    adapters = []
    for number, rank in enumerate(ranks):
        a = torch.randn(rank, d_in, generator=generator)
        b = torch.randn(d_out, rank, generator=generator)
        if common:
            a = torch.randn(rank, common, generator=generator) @ shared_a + 0.1 * a
            b = shared_b @ torch.randn(common, rank, generator=generator) + 0.1 * b
        adapters.append((a, b, 10.0 ** (number - len(ranks) // 2)))
    return adapters


def reader(adapters: Adapters) -> Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor, float]]]:
    return lambda: iter(adapters)


def unit(adapter: tuple[torch.Tensor, torch.Tensor, float]) -> torch.Tensor:
    a, b, scale = adapter
    delta = scale * b.double() @ a.double()
    norm = torch.linalg.norm(delta)
    return delta / norm if norm > 0 else delta


def captured(adapters: Adapters, u_t: torch.Tensor, v: torch.Tensor) -> float:
    u_t, v = u_t.double(), v.double()
    return sum(float((u_t @ unit(x) @ v.T).square().sum()) for x in adapters)


def assert_orthonormal(rows: torch.Tensor) -> None:
    torch.testing.assert_close(rows @ rows.T, torch.eye(rows.shape[0]), atol=2e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    d_in=st.integers(1, 24),
    d_out=st.integers(1, 24),
    seed=st.integers(0, 1000),
)
def test_exact_when_components_cover_all_ranks(
    ranks: list[int], d_in: int, d_out: int, seed: int
) -> None:
    adapters = random_adapters(ranks, d_in, d_out, seed)
    fit = fit_module(reader(adapters), d_in, d_out, sum(ranks))
    total = sum(min(rank, d_in, d_out) for rank in ranks)
    assert fit.v.shape == (min(total, d_in), d_in)
    assert fit.u_t.shape == (min(total, d_out), d_out)
    assert_orthonormal(fit.u_t)
    assert_orthonormal(fit.v)
    for adapter in adapters:
        delta = unit(adapter).float()
        projected = fit.u_t.T @ (fit.u_t @ delta @ fit.v.T) @ fit.v
        assert torch.linalg.norm(projected - delta) < 2e-6


def test_exact_also_for_directions_that_squaring_would_lose() -> None:
    # One adapter with singular values from 1 down to 1e-5: their squares span ten decades.
    generator = torch.Generator().manual_seed(3)
    q_a = torch.linalg.qr(torch.randn(40, 6, generator=generator))[0]
    q_b = torch.linalg.qr(torch.randn(30, 6, generator=generator))[0]
    a = torch.logspace(0, -5, 6)[:, None] * q_a.T
    fit = fit_module(reader([(a, q_b, 1.0)]), 40, 30, 6)
    residual = q_a - fit.v.T @ (fit.v @ q_a)
    assert residual.abs().max() < 2e-3  # also for the weakest direction
    assert fit.energy.sum() == pytest.approx(1.0, abs=1e-6)


def test_energy_equals_dense_reference_and_falls() -> None:
    adapters = random_adapters([4, 2, 8, 3, 5], 30, 26, common=3)
    fit = fit_module(reader(adapters), 30, 26, 10)
    expected = sum((fit.u_t.double() @ unit(x) @ fit.v.double().T).square() for x in adapters)
    torch.testing.assert_close(fit.energy, expected, atol=1e-6, rtol=1e-5)
    rows, cols = fit.energy.sum(dim=1), fit.energy.sum(dim=0)
    assert (rows[:3] >= rows[1:4] * 0.99).all()
    assert (cols[:3] >= cols[1:4] * 0.99).all()
    assert float(fit.energy.sum()) <= len(adapters) * (1 + 1e-6)


@pytest.mark.parametrize("common", [0, 4])
def test_streaming_captures_what_the_dense_eigenvectors_do(common: int) -> None:
    adapters = random_adapters([4] * 20, 48, 40, seed=1, common=common)
    components = 12
    fit = fit_module(reader(adapters), 48, 40, components, passes=3)
    m_v = sum(unit(x).T @ unit(x) for x in adapters)
    m_u = sum(unit(x) @ unit(x).T for x in adapters)
    assert isinstance(m_v, torch.Tensor)
    assert isinstance(m_u, torch.Tensor)
    dense_v = torch.linalg.eigh(m_v)[1].flip(1)[:, :components].T
    dense_u = torch.linalg.eigh(m_u)[1].flip(1)[:, :components].T
    best = captured(adapters, dense_u, dense_v)
    assert captured(adapters, fit.u_t, fit.v) > 0.98 * best
    assert_orthonormal(fit.u_t)
    assert_orthonormal(fit.v)


def test_streaming_with_full_width_loses_nothing() -> None:
    adapters = random_adapters([6] * 10, 16, 20, seed=2)
    fit = fit_module(reader(adapters), 16, 20, 20)
    assert float(fit.energy.sum()) == pytest.approx(len(adapters), rel=1e-5)


@pytest.mark.parametrize("components", [2, 30])
def test_untrained_adapters_are_harmless(components: int) -> None:
    zero = (torch.randn(4, 12), torch.zeros(10, 4), 2.0)
    trained = random_adapters([4], 12, 10)
    for adapters in ([zero], [zero, *trained, zero]):
        fit = fit_module(reader(adapters), 12, 10, components)
        assert torch.isfinite(fit.energy).all()
        assert_orthonormal(fit.u_t)
        assert_orthonormal(fit.v)
    if components == 30:
        assert float(fit.energy.sum()) == pytest.approx(1.0, rel=1e-5)


def test_scale_and_magnitude_do_not_matter() -> None:
    adapters = random_adapters([3] * 6, 20, 18, seed=4)
    scaled = [(a * 1e-12, b * 1e15, -s) for a, b, s in adapters]
    first = fit_module(reader(adapters), 20, 18, 5)
    second = fit_module(reader(scaled), 20, 18, 5)
    torch.testing.assert_close(first.energy, second.energy, atol=1e-4, rtol=1e-3)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        fit_bases(reader(random_adapters([2], 8, 8)), 8, 8, 0)
    with pytest.raises(ValueError, match="no adapters"):
        fit_bases(reader([]), 8, 8, 2)
