"""Fit the shared bases of one module to a stream of adapters, without ever forming a delta_W.

With W_i = delta_W_i / ||delta_W_i||_F, the bases sought are the leading eigenvectors of

    M_V = sum_i W_i^T W_i    (d_in x d_in)       M_U = sum_i W_i W_i^T    (d_out x d_out)

(the one-shot solution of *Compress then Serve*, Bruel-Gabrielsson et al., arXiv 2407.00066, which
matches their alternation closely). Neither matrix is formed: a pass over the adapters gives
``M Q`` for a thin Q from the factors alone, ``A^T (B^T B) (A Q)``, for the factors of several
adapters at once. The last two passes are turned into ordered eigenvectors together: with the blocks
``Q = [Q_1, Q_2]`` of a Krylov space (Musco and Musco, *Randomized block Krylov methods*, NeurIPS
2015) and ``Y = M Q``, by the Nystroem formula ``M ~ Y (Q^T Y)^+ Y^T`` (Tropp et al., *Fixed-rank
approximation of a positive-semidefinite matrix from streaming data*, NeurIPS 2017). Both blocks are
at hand anyway, so that this costs no read. The first block comes from a read of its own that does
no products: it adds the factors' rows with random signs into as many sums as Q has columns (a count
sketch: Clarkson and Woodruff, *Low rank approximation and regression in input sparsity time*, STOC
2013). That is worth about half a pass of products, for little more than the reading.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from vllm_vlora.representations.factors import (
    ReadFactors,
    ScaledFactors,
    gram_cholesky,
    row_gram,
)


@dataclass(frozen=True)
class JointFit:
    """Bases of one module, ordered by falling energy.

    Attributes:
        u_t: U transposed, (k_out, d_out) float32, rows orthonormal.
        v: V, (k_in, d_in) float32, rows orthonormal.
        energy: (k_out, k_in) float64, the sum over adapters of the squared entries of the core
            U^T W_i V^T of each unit-normalised adapter. ``energy[:i, :j].sum()`` is what the first
            i and j components capture, of one per adapter.
    """

    u_t: torch.Tensor
    v: torch.Tensor
    energy: torch.Tensor


def fit_module(
    read: ReadFactors,
    d_in: int,
    d_out: int,
    num_components: int,
    *,
    passes: int = 2,
    oversample: int = 8,
    seed: int = 0,
) -> JointFit:
    """Fit the bases of one module and measure what each pair of components captures.

    Arguments are those of :func:`fit_bases`; the energies cost one more read.
    """
    u_t, v = fit_bases(
        read, d_in, d_out, num_components, passes=passes, oversample=oversample, seed=seed
    )
    energy = torch.zeros(u_t.shape[0], v.shape[0], dtype=torch.float64, device=v.device)
    for a, b, scale in read():
        normed = _unit_factors(a, b, scale)
        if normed is not None:
            a, b, norm = normed
            energy += ((u_t @ b) @ (a @ v.T)).double().square() / norm**2
    return JointFit(u_t, v, energy)


def fit_bases(
    read: ReadFactors,
    d_in: int,
    d_out: int,
    num_components: int,
    *,
    passes: int = 2,
    oversample: int = 8,
    seed: int = 0,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the bases of one module: (U transposed (k_out, d_out), V (k_in, d_in)), float32.

    On the adapters' device. Every adapter counts alike, whatever its norm; one whose delta_W is zero
    counts nothing. Where the ranks of all adapters together fit into twice
    ``num_components + oversample``, their stacked singular vectors give the bases exactly; otherwise a
    randomised block Krylov method does, in about 24 (d_in + d_out) (num_components + oversample) bytes
    and one adapter, whatever the number of adapters, and as well in any order of them.

    Args:
        read: starts a read of the adapters. Called once or ``passes + 1`` times.
        d_in, d_out: columns and rows of delta_W.
        num_components: the k wanted; k_in = min(k, d_in, sum of ranks), k_out likewise, a rank
            counting at most min(d_in, d_out).
        passes: reads that multiply, which is nearly all the time. A third is worth it only where
            adapters share little. oversample: further directions carried and dropped at the end.
        seed: of the random start.
        keep: hold all adapters in memory, in float32, from the first read on, and read them once.

    Raises:
        ValueError: ``num_components`` or ``passes`` below one, or no adapters.
    """
    if num_components < 1 or passes < 1:
        raise ValueError(
            f"num_components and passes must be positive, got {num_components} and {passes}"
        )
    width = num_components + oversample
    adapters = iter(read())
    # As many rows as the two blocks of the streaming fit have.
    held, total_rank = _take(adapters, 2 * width)
    if not total_rank:
        raise ValueError("there are no adapters to fit")
    if total_rank <= 2 * width:
        u, v = _fit_exact(held, num_components)
    else:
        device = held[0][0].device
        first = chain(_drain(held), adapters)
        u, v = _fit_streaming(first, read, d_in, d_out, width, passes, seed, device, keep)
    k_out, k_in = (min(num_components, d, total_rank) for d in (d_out, d_in))
    return u[:, :k_out].T.float().contiguous(), v[:, :k_in].T.float().contiguous()


def _take(adapters: Iterator[ScaledFactors], limit: int) -> tuple[deque[ScaledFactors], int]:
    """The first adapters, until there are no more or their ranks together are above ``limit``."""
    held: deque[ScaledFactors] = deque()
    total_rank = 0
    for a, b, scale in adapters:
        held.append((a, b, scale))
        total_rank += _effective_rank(a, b)
        if total_rank > limit:
            break
    return held, total_rank


def _drain(held: deque[ScaledFactors]) -> Iterator[ScaledFactors]:
    while held:
        yield held.popleft()


def _fit_exact(adapters: Iterable[ScaledFactors], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U and V from the stacked rows of all; ``most`` are wanted of each."""
    rows_a, rows_b = zip(*(_weighted_rows(*adapter) for adapter in adapters))
    return leading_directions(rows_b, most), leading_directions(rows_a, most)


def _weighted_rows(
    a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows R with R^T R = W^T W, (r, d_in), and such with R^T R = W W^T, (r, d_out); float32.

    R = (B^T B)^(1/2) A, and alike for the other side: there is no need to decompose W.
    """
    unit_a, unit_b = torch.empty(a.shape, device=a.device), torch.empty(b.shape, device=b.device)
    grams = _normalise(a, b, scale, unit_a, unit_b)
    if grams is None:
        return unit_a.zero_(), unit_b.zero_().T
    gram_a, gram_b, norm = grams
    return _root(gram_b) @ unit_a / norm, _root(gram_a) @ unit_b.T / norm


def _root(gram: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a Gram matrix."""
    values, vectors = torch.linalg.eigh(gram.double())
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()


# From this many on, both ways, a Gram matrix' eigenvectors cost a fraction of a QR decomposition.
_MANY = 64
# Directions whose part of the energy is below this are not told from rounding by a Gram matrix. In
# float32 all takes half the time; with directions of 5e-6, what a basis leaves out grew by 0.14 %.
_WEAK = {torch.float32: 3e-6, torch.float64: 1e-8}


def leading_directions(rows: Sequence[torch.Tensor], most: int | None = None) -> torch.Tensor:
    """Right singular vectors of the stacked rows as columns, by falling singular value.

    Args:
        rows: matrices (n_i, d), float32. most: how many are wanted.

    Returns:
        (d, n) float32 with n = min(most, d, sum of n_i), orthonormal also where rows depend on each
        other.
    """
    stacked = torch.cat(tuple(rows))
    count = min(*stacked.shape, len(stacked) if most is None else most)
    found = _by_gram(stacked, count) if min(stacked.shape) >= _MANY else None
    if found is not None:
        return found
    q, r = torch.linalg.qr(stacked.double().T)
    left, _, _ = torch.linalg.svd(r, full_matrices=False)
    return (q @ left)[:, :count].float()


def _by_gram(stacked: torch.Tensor, count: int) -> torch.Tensor | None:
    """``leading_directions`` by eigenvectors of the smaller Gram matrix; None if it says too little."""
    short = stacked if stacked.shape[0] <= stacked.shape[1] else stacked.T
    for dtype, weak in _WEAK.items():
        try:
            values, vectors = torch.linalg.eigh(row_gram(short, dtype).to(dtype))
        except torch.linalg.LinAlgError:
            # In float32 where many rows are zero, as of untrained adapters.
            continue
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        if float(values[-1]) > weak * float(values[0]):
            break
    else:
        return None
    rows = vectors.T.float()
    if short is stacked:
        rows = (vectors * values.rsqrt()).float().T @ stacked
    # Rounding bends weak directions towards strong ones; these stay as they are.
    factor = gram_cholesky(rows, torch.float32)
    if factor is None:
        return None
    return torch.linalg.solve_triangular(factor.float(), rows, upper=False).T


def _fit_streaming(
    first: Iterable[ScaledFactors],
    read: ReadFactors,
    d_in: int,
    d_out: int,
    width: int,
    passes: int,
    seed: int,
    device: torch.device,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """U and V; ``first`` is a read already begun."""
    stacks: Iterable[_Stack] = _stacks(first, d_in, d_out, device, keep)
    kept = list(stacks) if keep else None
    right, left = _sketch(kept or stacks, d_in, d_out, width, seed, device)
    for remaining in range(passes - 1, -1, -1):
        for stack in kept or _stacks(read(), d_in, d_out, device):
            stack.multiply(right, left)
        if remaining:
            right.advance()
            left.advance()
    return left.leading(), right.leading()


def _sketch(
    stacks: Iterable[_Stack],
    d_in: int,
    d_out: int,
    width: int,
    seed: int,
    device: torch.device,
) -> tuple[KrylovSide, KrylovSide]:
    """Right and left side, each with an orthonormal basis of a count sketch as its first block."""
    generator = torch.Generator().manual_seed(seed)
    sums_a = torch.zeros(min(width, d_in), d_in, device=device).T
    sums_b = torch.zeros(d_out, min(width, d_out), device=device)
    for stack in stacks:
        stack.scatter(sums_a, sums_b, generator)
    return KrylovSide(torch.linalg.qr(sums_a)[0]), KrylovSide(torch.linalg.qr(sums_b)[0])


class KrylovSide:
    """A semidefinite M (d x d) that is known by its products with a thin Q, and its eigenvectors.

    Between two calls of :meth:`advance` the caller adds M Q to ``y``; after the last pass
    :meth:`leading` ends the iteration.

    Attributes:
        q: (d, width) float32, columns orthonormal.
        y: (d, width) float32, zero before a pass and M Q after it.
    """

    def __init__(self, q: torch.Tensor) -> None:
        self.q, self.y = q, torch.zeros_like(q)
        # Of the block before q, call it P: (P^T M P, R) with M P = Q R.
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    def advance(self) -> None:
        """Take the next block of the Krylov space, an orthonormal basis of M Q, for the next pass."""
        inner = _symmetric(self.q.T @ self.y)
        self.q, r = torch.linalg.qr(self.y)
        self._before = inner, r.double()
        self.y.zero_()

    def leading(self) -> torch.Tensor:
        """Ordered eigenvectors (columns) of the Nystroem approximation of M; gives up q and y.

        All blocks lie in the span of Z R = [Q, Y], so that what is d x d becomes at most 2 width
        wide, and columns are orthonormal also where M has fewer directions than they are.
        """
        inner, width = _symmetric(self.q.T @ self.y), self.q.shape[1]
        both = torch.cat([self.q, self.y], dim=1)
        del self.q, self.y
        z, r = torch.linalg.qr(both)
        del both
        image = r[:, width:].double()
        if self._before is not None:
            inner_before, r_before = self._before
            image = torch.cat([r[:, :width].double() @ r_before, image], dim=1)
            # Q^T M P = Q^T Q R, and its transpose is P^T M Q.
            inner = torch.cat(
                [torch.cat([inner_before, r_before.T], 1), torch.cat([r_before, inner], 1)]
            )
        values, vectors = torch.linalg.eigh(inner)
        # Y is a float32 sum: eigenvalues below its rounding error are noise, not to be divided by.
        floor = float(torch.linalg.norm(image)) * torch.finfo(torch.float32).eps
        inverse_root = torch.where(values > floor, values, math.inf).rsqrt()
        order = torch.linalg.svd(image @ (vectors * inverse_root))[0]
        return z @ order[:, :width].float()


def _symmetric(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return (x + x.T) / 2


# Stacked factors of rank 16 multiply twice as fast as one adapter's; more rows gain little and take
# 4 (d_in + d_out) bytes each.
_STACKED_ROWS = 128


def _stacks(
    adapters: Iterable[ScaledFactors],
    d_in: int,
    d_out: int,
    device: torch.device,
    keep: bool = False,
) -> Iterator[_Stack]:
    """All adapters, as many at once as fit; what is yielded is filled anew afterwards, or kept."""
    rows = _STACKED_ROWS
    stack = _Stack(d_in, d_out, rows, device)
    for a, b, scale in adapters:
        rank = a.shape[0]
        if not stack.has_room(rank):
            yield stack
            if keep or rank > rows:
                rows = max(rows, rank)
                stack = _Stack(d_in, d_out, rows, device)
            else:
                stack.clear()
        stack.push(a, b, scale)
    yield stack


class _Stack:
    """Unit-normalised factors of some adapters side by side, in buffers that are used again."""

    def __init__(self, d_in: int, d_out: int, rows: int, device: torch.device) -> None:
        self._a = torch.empty(rows, d_in, device=device)
        self._b = torch.empty(d_out, rows, device=device)
        self._grams: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        self._used = 0

    def has_room(self, rank: int) -> bool:
        """Whether another adapter of this rank fits in."""
        return self._used + rank <= self._a.shape[0]

    def push(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """Add an adapter, unless its delta_W is zero."""
        rows = slice(self._used, self._used + a.shape[0])
        grams = _normalise(a, b, scale, self._a[rows], self._b[:, rows])
        if grams is not None:
            gram_a, gram_b, norm = grams
            self._grams.append((rows, gram_a / norm**2, gram_b / norm**2))
            self._used = rows.stop

    def clear(self) -> None:
        """Forget all adapters."""
        self._grams.clear()
        self._used = 0

    def multiply(self, right: KrylovSide, left: KrylovSide) -> None:
        """Add A^T (B^T B) (A Q_V) and B (A A^T) (B^T Q_U) of all adapters."""
        a, b = self._a[: self._used], self._b[:, : self._used]
        a_q, b_q = a @ right.q, b.T @ left.q
        for rows, gram_a, gram_b in self._grams:
            a_q[rows] = gram_b @ a_q[rows]
            b_q[rows] = gram_a @ b_q[rows]
        right.y.addmm_(a.T, a_q)
        left.y.addmm_(b, b_q)

    def scatter(
        self, sums_a: torch.Tensor, sums_b: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Add every row of A to a column of ``sums_a`` (d_in, n), and of B to ``sums_b`` (d_out, m).

        With random signs, and weighed by the norm of its partner in B A.
        """
        partners_of_a = [gram_b for _, _, gram_b in self._grams]
        partners_of_b = [gram_a for _, gram_a, _ in self._grams]
        for partners, source, sums in (
            (partners_of_a, self._a.T, sums_a),
            (partners_of_b, self._b, sums_b),
        ):
            # Drawn on the CPU, so that they are the same for every device.
            signs = torch.randint(0, 2, (self._used,), generator=generator) * 2 - 1
            squares = torch.cat([sums.new_empty(0), *(gram.diagonal() for gram in partners)])
            weights = squares.sqrt() * signs.to(squares.device)
            begin, shift = 0, int(torch.randint(0, sums.shape[1], (), generator=generator))
            while begin < self._used:
                place = (begin + shift) % sums.shape[1]
                end = min(self._used, begin + sums.shape[1] - place)
                part = sums[:, place : place + end - begin]
                part.addcmul_(source[:, begin:end], weights[begin:end])
                begin = end


def _effective_rank(a: torch.Tensor, b: torch.Tensor) -> int:
    return min(a.shape[0], a.shape[1], b.shape[0])


def _unit_factors(
    a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """(A / ||A||, B / ||B||, norm of their product), float32; None where scale * B A is zero."""
    unit_a = torch.empty(a.shape, device=a.device)
    unit_b = torch.empty(b.shape, device=b.device)
    grams = _normalise(a, b, scale, unit_a, unit_b)
    return None if grams is None else (unit_a, unit_b, grams[2])


def _normalise(
    a: torch.Tensor, b: torch.Tensor, scale: float, out_a: torch.Tensor, out_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Write A / ||A|| and B / ||B||; return A A^T and B^T B of these (float32) and ||B A||.

    The scale cancels in a unit-normalised delta_W; normalising the factors first keeps their Gram
    matrices within float32 whatever their magnitude. None where scale * B A is zero.
    """
    a, b = a.float(), b.float()
    norm_a, norm_b = _norm(a), _norm(b)
    if scale == 0 or norm_a == 0 or norm_b == 0:
        return None
    torch.div(a, norm_a, out=out_a)
    torch.div(b, norm_b, out=out_b)
    gram_a, gram_b = out_a @ out_a.T, out_b.T @ out_b
    squared = float((gram_a.double() * gram_b).sum())
    if squared < _CANCELLING:
        wide_a, wide_b = out_a.double(), out_b.double()
        squared = float(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum())
    # Factors of norm one whose product is below rounding cancel: there is no direction to learn.
    if squared < 1e-14:
        return None
    return gram_a, gram_b, math.sqrt(squared)


def _norm(rows: torch.Tensor) -> float:
    found = float(torch.linalg.norm(rows))
    # Further out, squares are beyond float32's range.
    if 1e-15 < found < 1e15:
        return found
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))


# Gram matrices in float32 give ||B A||^2 to about 1e-6; where less than this is left of the factors'
# norm of one, float64 is worth its five-fold time.
_CANCELLING = 1e-2
