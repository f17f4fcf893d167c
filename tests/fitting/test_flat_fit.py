"""The flat fit against exact principal components in float64."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch

from vllm_vlora.fitting.flat_basis import FlatFit, fit_flat, project_flat

Adapters = list[tuple[torch.Tensor, torch.Tensor, float]]
Factors = tuple[torch.Tensor, torch.Tensor, float]

RANK, D_IN, D_OUT = 4, 12, 10


def related_adapters(count: int, ranks: tuple[int, ...] = (RANK,), seed: int = 0) -> Adapters:
    """A common parent, 20 shared directions of falling weight, and a little of their own."""
    generator = torch.Generator().manual_seed(seed)

    def side(width: int) -> Callable[[int], torch.Tensor]:
        parent = torch.randn(RANK, width, generator=generator)
        shared = torch.randn(20, RANK, width, generator=generator)
        weights = torch.arange(1, 21) ** -1.0

        def draw(rank: int) -> torch.Tensor:
            mixed = torch.einsum(
                "k,krd->rd", torch.randn(20, generator=generator) * weights, shared
            )
            own = 0.05 * torch.randn(RANK, width, generator=generator)
            return (parent + mixed + own)[:rank]

        return draw

    a, b = side(D_IN), side(D_OUT)
    chosen = [ranks[i % len(ranks)] for i in range(count)]
    return [(a(r), b(r).T.contiguous(), 0.5 + i % 3) for i, r in enumerate(chosen)]


def reader(adapters: Adapters) -> Callable[[], Iterator[Factors]]:
    return lambda: iter(adapters)


def rows(adapters: Adapters) -> tuple[torch.Tensor, torch.Tensor]:
    """Flattened A and scaled B^T in float64, zeros under smaller ranks."""
    flat_a = torch.zeros(len(adapters), RANK, D_IN, dtype=torch.float64)
    flat_b = torch.zeros(len(adapters), RANK, D_OUT, dtype=torch.float64)
    for i, (a, b, scale) in enumerate(adapters):
        flat_a[i, : a.shape[0]] = a.double()
        flat_b[i, : a.shape[0]] = scale * b.double().T
    return flat_a.flatten(1), flat_b.flatten(1)


def explained(x: torch.Tensor, components: torch.Tensor) -> float:
    centred = x - x.mean(0)
    return float((centred @ components.double().flatten(1).T).square().sum())


def assert_orthonormal(components: torch.Tensor) -> None:
    flat = components.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), atol=3e-6, rtol=0)


@pytest.mark.parametrize("ranks", [(RANK,), (RANK, 1, 3)])
def test_few_adapters_give_exact_components(ranks: tuple[int, ...]) -> None:
    adapters = related_adapters(12, ranks)
    fit = fit_flat(reader(adapters), RANK, D_IN, D_OUT, 6)
    for x, mean, components in zip(
        rows(adapters), (fit.mean_a, fit.mean_b), (fit.components_a, fit.components_b)
    ):
        torch.testing.assert_close(mean.double().flatten(), x.mean(0), atol=1e-6, rtol=1e-6)
        exact = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:6]
        same = (components.double().flatten(1) * exact).sum(1).abs()
        torch.testing.assert_close(same, torch.ones_like(same), atol=1e-5, rtol=0)
        assert_orthonormal(components)


def test_many_adapters_are_streamed_and_keep_what_exact_components_do() -> None:
    adapters, reads = related_adapters(90, (RANK, 2)), 0

    def read() -> Iterator[Factors]:
        nonlocal reads
        reads += 1
        yield from adapters

    fit = fit_flat(read, RANK, D_IN, D_OUT, 6, oversample=4)
    assert reads == 4
    for x, mean, components in zip(
        rows(adapters), (fit.mean_a, fit.mean_b), (fit.components_a, fit.components_b)
    ):
        torch.testing.assert_close(mean.double().flatten(), x.mean(0), atol=1e-6, rtol=1e-6)
        exact = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:6]
        assert explained(x, components) > 0.999 * explained(x, exact)
        assert_orthonormal(components)
        falling = ((x - x.mean(0)) @ components.double().flatten(1).T).square().sum(0)
        assert (falling[:-1] > falling[1:] * 0.99).all()


def rebuilt(fit: FlatFit, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    l_a, l_b = project_flat(fit, a, b)
    return (
        fit.mean_a + torch.einsum("k,krd->rd", l_a, fit.components_a),
        (fit.mean_b + torch.einsum("k,krd->rd", l_b, fit.components_b)).T,
    )


def test_loadings_rebuild_every_adapter_when_there_are_enough_components() -> None:
    adapters = related_adapters(8, (RANK, 3))
    fit = fit_flat(reader(adapters), RANK, D_IN, D_OUT, 7)
    for a, b, scale in adapters:
        a_hat, b_hat = rebuilt(fit, a, scale * b)
        torch.testing.assert_close(b_hat @ a_hat, scale * b @ a, atol=2e-5, rtol=1e-4)


def test_loadings_are_the_nearest_point() -> None:
    adapters = related_adapters(30)
    fit = fit_flat(reader(adapters), RANK, D_IN, D_OUT, 5)
    a, b, scale = related_adapters(31, seed=7)[-1]
    residual_a = a - rebuilt(fit, a, scale * b)[0]
    assert residual_a.norm() > 0.1
    assert (fit.components_a.flatten(1) @ residual_a.flatten()).abs().max() < 1e-5


@pytest.mark.parametrize("count", [1, 2, 40])
def test_equal_adapters_are_their_mean(count: int) -> None:
    adapter = related_adapters(1)[0]
    fit = fit_flat(reader([adapter] * count), RANK, D_IN, D_OUT, 3)
    assert fit.components_a.shape == (min(3, count - 1), RANK, D_IN)
    assert fit.components_b.shape == (min(3, count - 1), RANK, D_OUT)
    assert_orthonormal(fit.components_a)
    a_hat, b_hat = rebuilt(fit, adapter[0], adapter[2] * adapter[1])
    torch.testing.assert_close(b_hat @ a_hat, adapter[2] * adapter[1] @ adapter[0])


def test_the_seed_decides() -> None:
    adapters = related_adapters(60)
    first, again, other = (
        fit_flat(reader(adapters), RANK, D_IN, D_OUT, 5, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.components_a, again.components_a)
    assert torch.equal(first.components_b, again.components_b)
    assert not torch.equal(first.components_a, other.components_a)


def test_bad_arguments_are_refused() -> None:
    adapters = related_adapters(3)
    with pytest.raises(ValueError, match="positive"):
        fit_flat(reader(adapters), RANK, D_IN, D_OUT, 0)
    with pytest.raises(ValueError, match="no adapters"):
        fit_flat(reader([]), RANK, D_IN, D_OUT, 2)
    with pytest.raises(ValueError, match="rank 4, above the flat fit's 3"):
        fit_flat(reader(adapters), 3, D_IN, D_OUT, 2)


def test_memory_does_not_grow_with_the_adapters() -> None:
    """The peak of a process of its own, for 400 adapters that together take 105 MB."""
    script = textwrap.dedent("""
        import torch
        from vllm_vlora.fitting.flat_basis import fit_flat

        def status(key):
            line = next(x for x in open("/proc/self/status") if x.startswith(key))
            return int(line.split()[1]) * 1024

        def read(count, d_in, d_out):
            for seed in range(count):
                generator = torch.Generator().manual_seed(seed)
                a, b = (torch.randn(16, d, generator=generator) for d in (d_in, d_out))
                yield a, b.T.contiguous(), 1.0

        torch.set_num_threads(1)
        fit_flat(lambda: read(40, 16, 16), 16, 16, 16, 4)  # what the libraries take at first use
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # resets the peak
        fit_flat(lambda: read(400, 1024, 3072), 16, 1024, 3072, 8, passes=2)
        print(status("VmHWM") - before)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24 * 16 * (1024 + 3072) * 16 + 35e6
