"""Fit the flat representation of one module to a stream of adapters: principal components of factors.

Each adapter's A and scaled B, flattened, are one vector a side. A side is described by the mean of
these vectors and their leading principal components, an adapter by its k loadings a side (vlora, the
package vlora-dev). Unlike the bases of ``shared_basis.py`` this depends on how an adapter splits delta_W
into factors; it suits adapters fine-tuned from common factors, whose splits agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_vlora.fitting.shared_basis import KrylovSide, leading_directions
from vllm_vlora.representations.factors import ReadFactors, ScaledFactors

# Adapters multiplied at once. One at a time, the components would be read from memory for each.
_STACKED_ADAPTERS = 16


@dataclass(frozen=True)
class FlatFit:
    """Means and principal components of one module's factors, ordered by falling variance.

    The scale (alpha / r) is folded into B, adapters of a smaller rank are padded by zero rows of A
    and zero columns of B, and B is held transposed. Reconstructed from loadings l_A and l_B (k,):
    A = mean_a + sum_j l_A[j] components_a[j], B^T likewise, delta_W = B A.

    Attributes:
        mean_a: (rank, d_in) float32. components_a: (k, rank, d_in) float32, orthonormal as
            flattened vectors.
        mean_b: (rank, d_out) float32. components_b: (k, rank, d_out) float32, likewise.
    """

    mean_a: torch.Tensor
    components_a: torch.Tensor
    mean_b: torch.Tensor
    components_b: torch.Tensor


def fit_flat(
    read: ReadFactors,
    rank: int,
    d_in: int,
    d_out: int,
    num_components: int,
    *,
    passes: int = 3,
    oversample: int = 8,
    seed: int = 0,
) -> FlatFit:
    """Fit means and k = min(num_components, adapters - 1, rank d_in, rank d_out) components a side.

    Up to twice ``num_components + oversample`` adapters are held together and give the components
    exactly; more are streamed through the randomised block Krylov method of
    :mod:`vllm_vlora.fitting.shared_basis`, in about 24 rank (d_in + d_out) (num_components + oversample)
    bytes whatever their number.

    Args:
        read: starts a read of the adapters. Called once, or ``passes + 1`` times.
        rank: of the representation, at least that of every adapter.
        d_in, d_out: columns and rows of delta_W.
        num_components: the k wanted.
        passes: reads that multiply. oversample: further components carried and dropped at the end.
        seed: of the random start.

    Raises:
        ValueError: ``num_components`` or ``passes`` below one, an adapter of a higher rank, or no
            adapters.
    """
    if num_components < 1 or passes < 1:
        raise ValueError(
            f"num_components and passes must be positive, got {num_components} and {passes}"
        )
    width = num_components + oversample
    # As many as the two blocks of the streaming fit have.
    mean_a, mean_b, count, held = _read_means(read, rank, 2 * width)
    if held is not None:
        k = min(num_components, count - 1)
        a, b = (leading_directions([x], k) for x in _centred(held, rank, mean_a, mean_b))
    else:
        generator = torch.Generator().manual_seed(seed)
        side_a, side_b = (
            KrylovSide(
                _random_orthonormal(len(mean), min(width, len(mean)), generator).to(mean.device)
            )
            for mean in (mean_a, mean_b)
        )
        for remaining in range(passes - 1, -1, -1):
            _multiply(read, rank, mean_a, mean_b, side_a, side_b)
            if remaining:
                side_a.advance()
                side_b.advance()
        b, a = side_b.leading(), side_a.leading()
    k = min(num_components, count - 1, rank * d_in, rank * d_out)
    return FlatFit(
        mean_a.view(rank, d_in),
        a[:, :k].T.reshape(k, rank, d_in),
        mean_b.view(rank, d_out),
        b[:, :k].T.reshape(k, rank, d_out),
    )


def project_flat(
    fit: FlatFit, a: torch.Tensor, b_scaled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loadings (l_A (k,), l_B (k,)) float32 of the nearest point to an adapter on either side.

    Args:
        a: (r, d_in), with r at most the fit's rank. b_scaled: (d_out, r), times alpha / r.

    Raises:
        ValueError: the adapter's rank is higher than the fit's.
    """
    row_a, row_b = _flatten(a, b_scaled, 1.0, fit.mean_a.shape[0])
    return (
        fit.components_a.flatten(1) @ (row_a - fit.mean_a.flatten()),
        fit.components_b.flatten(1) @ (row_b - fit.mean_b.flatten()),
    )


def _random_orthonormal(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, cols, generator=generator))[0]


def _flatten(
    a: torch.Tensor, b: torch.Tensor, scale: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and scale * B^T, padded to ``rank`` rows and flattened; float32."""
    if a.shape[0] > rank:
        raise ValueError(f"an adapter has rank {a.shape[0]}, above the flat fit's {rank}")
    padding = (0, 0, 0, rank - a.shape[0])
    row_a = torch.nn.functional.pad(a.float(), padding).flatten()
    return row_a, torch.nn.functional.pad(scale * b.float().T, padding).flatten()


def _read_means(
    read: ReadFactors, rank: int, limit: int
) -> tuple[torch.Tensor, torch.Tensor, int, list[ScaledFactors] | None]:
    """Means of A and of B, the number of adapters, and the adapters if they are at most ``limit``."""
    sums: list[torch.Tensor] = []
    held: list[ScaledFactors] = []
    count = 0
    for adapter in read():
        rows = _flatten(*adapter, rank)
        sums = sums or [torch.zeros_like(row, dtype=torch.float64) for row in rows]
        for total, row in zip(sums, rows):
            total += row
        count += 1
        if count <= limit:
            held.append(adapter)
        else:
            held.clear()
    if not count:
        raise ValueError("there are no adapters to fit")
    mean_a, mean_b = ((total / count).float() for total in sums)
    return mean_a, mean_b, count, held if count <= limit else None


def _centred(
    adapters: list[ScaledFactors], rank: int, mean_a: torch.Tensor, mean_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapters less their means as rows: (n, rank d_in) and (n, rank d_out)."""
    rows_a, rows_b = zip(*(_flatten(*adapter, rank) for adapter in adapters))
    return torch.stack(rows_a).sub_(mean_a), torch.stack(rows_b).sub_(mean_b)


def _multiply(
    read: ReadFactors,
    rank: int,
    mean_a: torch.Tensor,
    mean_b: torch.Tensor,
    side_a: KrylovSide,
    side_b: KrylovSide,
) -> None:
    """Read all adapters once and add the product of the covariance with Q to both sides."""

    def add(adapters: list[ScaledFactors]) -> None:
        for side, rows in zip((side_a, side_b), _centred(adapters, rank, mean_a, mean_b)):
            side.y.addmm_(rows.T, rows @ side.q)

    adapters: list[ScaledFactors] = []
    for adapter in read():
        adapters.append(adapter)
        if len(adapters) == _STACKED_ADAPTERS:
            add(adapters)
            adapters = []
    if adapters:
        add(adapters)
