"""The streaming fit against dense float64 references."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.fitting.shared_basis import fit_bases, fit_module, leading_directions

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


@pytest.mark.parametrize(("rows", "columns"), [(120, 300), (300, 120)])
@pytest.mark.parametrize("weakest", [0.3, 0.02, 0.0012, 5e-4])
def test_leading_directions_hold_what_float64_s_hold(
    rows: int, columns: int, weakest: float
) -> None:
    # Singular values from 1 down: Gram matrices in float32, nearly at their end, and in float64.
    generator = torch.Generator().manual_seed(7)
    left, right = (
        torch.linalg.qr(torch.randn(n, 120, generator=generator).double())[0]
        for n in (rows, columns)
    )
    sigma = torch.logspace(0, math.log10(weakest), 120, dtype=torch.float64)
    stacked = ((left * sigma) @ right.T).float()
    found = leading_directions([stacked[:50], stacked[50:]], 110)
    assert_orthonormal(found.T)
    held = (stacked.double() @ found.double()).square().sum(0).cumsum(0)
    most = torch.linalg.svdvals(stacked.double()).square().cumsum(0)
    left_out = most[-1] - most[:110]
    assert ((most[:110] - held) <= 1e-7 * most[-1] + 5e-3 * left_out).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wanted", [16, 20])
def test_untrained_adapters_among_others_leave_the_leading_directions(
    seed: int, wanted: int
) -> None:
    # LAPACK's float32 eigenvectors of a Gram matrix with such a block of zeros often do not converge.
    generator = torch.Generator().manual_seed(seed)
    first, last = (torch.randn(8, 256, generator=generator) for _ in range(2))
    found = leading_directions([first, torch.zeros(80, 256), last], wanted)
    assert found.shape == (256, wanted)
    assert_orthonormal(found.T)
    stacked = torch.cat([first, last]).double()
    held = stacked @ found.double()[:, :16]
    assert float(held.square().sum()) == pytest.approx(float(stacked.square().sum()), rel=1e-6)


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


def decaying_adapters(count: int, d_in: int, d_out: int, own: float, seed: int = 0) -> Adapters:
    """Rank 4: mixtures of 40 shared directions of falling weight, plus private noise."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, 41) ** -0.5

    def side(width: int) -> Callable[[], torch.Tensor]:
        shared = torch.linalg.qr(torch.randn(width, 40, generator=generator))[0].T
        return lambda: (
            (torch.randn(4, 40, generator=generator) * weights) @ shared
            + own * torch.randn(4, width, generator=generator) / width**0.5
        )

    a, b = side(d_in), side(d_out)
    return [(a(), b().T.contiguous(), 1.0) for _ in range(count)]


def dense_bases(adapters: Adapters, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    m_v = torch.stack([unit(x).T @ unit(x) for x in adapters]).sum(0)
    m_u = torch.stack([unit(x) @ unit(x).T for x in adapters]).sum(0)
    u, v = (torch.linalg.eigh(m)[1].flip(1)[:, :components] for m in (m_u, m_v))
    return u.T, v.T


@pytest.mark.parametrize(("own", "least"), [(0.5, 0.998), (1.0, 0.995), (4.0, 0.97)])
def test_three_passes_keep_what_the_exact_solution_keeps(own: float, least: float) -> None:
    adapters = decaying_adapters(60, 160, 140, own)
    best = captured(adapters, *dense_bases(adapters, 24))
    kept = [
        captured(adapters, *fit_bases(reader(adapters), 160, 140, 24, passes=passes))
        for passes in (1, 2, 3)
    ]
    assert kept[0] < kept[1] < kept[2] <= best * 1.001
    assert kept[2] > least * best


def test_both_blocks_keep_more_than_the_last_alone() -> None:
    """Against subspace iteration ended by Rayleigh-Ritz on the same products, in float64."""
    adapters = decaying_adapters(60, 160, 140, own=1.0)
    m_v = torch.stack([unit(x).T @ unit(x) for x in adapters]).sum(0)
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(160, 32, generator=generator))[0].double()
    for _ in range(3):
        q = torch.linalg.qr(m_v @ q)[0]
    ritz = q @ torch.linalg.eigh(q.T @ m_v @ q)[1].flip(1)[:, :24]
    v = fit_bases(reader(adapters), 160, 140, 24, passes=3)[1].double()
    assert torch.trace(v @ m_v @ v.T) > torch.trace(ritz.T @ m_v @ ritz)


def test_order_and_stacking_do_not_matter() -> None:
    # Two families, of which the second comes last and is small; ranks above a stack's rows.
    adapters = decaying_adapters(30, 200, 180, 0.3) + decaying_adapters(6, 200, 180, 0.3, seed=1)
    wide = random_adapters([150], 200, 180, seed=5)
    sorted_ = [*adapters, *wide]
    mixed = [*wide, *(sorted_[i] for i in torch.randperm(36).tolist())]
    first, second = (fit_module(reader(x), 200, 180, 16, passes=3) for x in (sorted_, mixed))
    torch.testing.assert_close(first.energy.sum(), second.energy.sum(), rtol=2e-3, atol=0)
    again = fit_module(reader(sorted_), 200, 180, 16, passes=3)
    assert torch.equal(first.v, again.v)
    assert torch.equal(first.u_t, again.u_t)


@pytest.mark.parametrize(("ranks", "reads"), [([4] * 3, 1), ([4] * 20, 3)])
def test_how_often_the_adapters_are_read(ranks: list[int], reads: int) -> None:
    adapters, starts = random_adapters(ranks, 40, 30), 0

    def read() -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        nonlocal starts
        starts += 1
        yield from adapters

    fit_bases(read, 40, 30, 8)
    assert starts == reads


def test_adapters_that_are_kept_are_read_once_and_give_the_same_bits() -> None:
    # One that is wider than a stack among them, and one of zero.
    adapters = random_adapters([4] * 40 + [150] + [7] * 40, 200, 180)
    adapters[3] = (adapters[3][0], torch.zeros_like(adapters[3][1]), 1.0)
    starts = 0

    def read() -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        nonlocal starts
        starts += 1
        yield from adapters

    kept = fit_bases(read, 200, 180, 16, keep=True)
    assert starts == 1
    again = fit_bases(read, 200, 180, 16)
    assert starts == 4
    assert torch.equal(kept[0], again[0])
    assert torch.equal(kept[1], again[1])


def test_memory_does_not_grow_with_the_adapters() -> None:
    """The peak of a process of its own, for 500 adapters that together take 98 MB."""
    script = textwrap.dedent("""
        import torch
        from vllm_vlora.fitting.shared_basis import fit_bases

        def status(key):
            line = next(x for x in open("/proc/self/status") if x.startswith(key))
            return int(line.split()[1]) * 1024

        def read(count, d_in, d_out):
            for seed in range(count):
                generator = torch.Generator().manual_seed(seed)
                a, b = (torch.randn(8, d, generator=generator) for d in (d_in, d_out))
                yield a, b.T.contiguous(), 1.0

        torch.set_num_threads(1)
        fit_bases(lambda: read(40, 64, 64), 64, 64, 8)  # what the libraries take at first use
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # resets the peak
        fit_bases(lambda: read(500, 2048, 4096), 2048, 4096, 40, passes=1)
        print(status("VmHWM") - before)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24 * (2048 + 4096) * 48 + 12e6


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


@pytest.mark.parametrize(("size_a", "size_b"), [(1e-12, 1e15), (1e-25, 1e-25), (1e20, 1e20)])
def test_scale_and_magnitude_do_not_matter(size_a: float, size_b: float) -> None:
    adapters = random_adapters([3] * 6, 20, 18, seed=4)
    scaled = [(a * size_a, b * size_b, -s) for a, b, s in adapters]
    first = fit_module(reader(adapters), 20, 18, 5)
    second = fit_module(reader(scaled), 20, 18, 5)
    torch.testing.assert_close(first.energy, second.energy, atol=1e-4, rtol=1e-3)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        fit_bases(reader(random_adapters([2], 8, 8)), 8, 8, 0)
    with pytest.raises(ValueError, match="no adapters"):
        fit_bases(reader([]), 8, 8, 2)
