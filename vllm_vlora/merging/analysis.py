"""How adapters relate to each other: similarity, groups, differences, outliers, coverage.

Everything is measured on the updates delta_W = s B A themselves. Factors are not unique: (G A, B G^-1) is
the same update for every invertible G, so two copies of one adapter may have unrelated factors.

Inner products need no d_out x d_in matrix:

    <delta_W_i, delta_W_j> = tr(A_i^T B_i^T B_j A_j) = sum((B_i^T B_j) * (A_i A_j^T))

Modules that one of two adapters does not have count as zero there.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, TypedDict

import torch

from vllm_vlora.adapters.peft_folder import Adapter, Factors
from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.quantize import is_finite
from vllm_vlora.representations.factors import small_product, stacked_singular_values
from vllm_vlora.subspace.layers import FlatLayer, JointLayer
from vllm_vlora.subspace.weights import Update, called, in_memory, under_shared_names
from vllm_vlora.wording import count_of

if TYPE_CHECKING:
    from vllm_vlora.subspace.shared import SharedSubspace

# Rows of stacked factors that are held in float64 at a time.
_ROWS_AT_ONCE = 1024
# Adapters whose files stay open while all of their layers are read.
_OPEN_FILES = 64


class LayerDifference(TypedDict):
    """``l2_distance``: ||delta_W_a - delta_W_b||_F of one layer; ``cosine_sim``: their cosine."""

    l2_distance: float
    cosine_sim: float


class Coverage(TypedDict):
    """What a basis holds of one layer of an adapter; see :func:`subspace_coverage`."""

    coverage_a: float
    coverage_b: float
    coverage_mean: float
    coverage: float


class Outlier(TypedDict):
    """``index`` of the adapter, its ``distance`` from the centroid and that as a ``z_score``."""

    index: int
    distance: float
    z_score: float


def compute_similarity_matrix(adapters: Sequence[Update]) -> torch.Tensor:
    """Cosines between the adapters' updates, all layers together.

    vlora takes the cosine of the flattened factors, which depends on how an update happens to be
    factored and leaves alpha out.

    Args:
        adapters: at least two; ranks, alphas and layers may differ. Opened adapters are read module
            by module, so a large collection need not fit into memory.

    Returns:
        (N, N) float32, symmetric, ones on the diagonal. An adapter whose update is zero has 0 beside.

    Raises:
        OptionError: fewer than two adapters.
        AdapterError: a layer has different shapes in two of them.

    Examples:
        >>> similarity = compute_similarity_matrix(adapters)
        >>> similarity.shape
        torch.Size([4, 4])
        >>> bool(torch.equal(similarity, similarity.T))
        True
    """
    _check_count(adapters, 2)
    return cosines(inner_products(adapters)).float()


def find_clusters(similarity_matrix: torch.Tensor, threshold: float = 0.9) -> list[list[int]]:
    """Groups in which every two adapters have at least the cosine ``threshold``.

    Complete linkage: the two groups whose least similar members are most similar are joined, as long
    as these reach the threshold. The order of the adapters does not matter, unless similarities are
    exactly equal; in vlora's greedy pass it does.

    Args:
        similarity_matrix: (N, N), symmetric.
        threshold: -1 to 1.

    Returns:
        Lists of indices, ascending; every adapter is in one of them.

    Raises:
        OptionError: not a symmetric matrix of finite numbers, or an impossible threshold.

    Examples:
        >>> find_clusters(torch.tensor([[1.0, 0.2, 0.95], [0.2, 1.0, 0.1], [0.95, 0.1, 1.0]]))
        [[0, 2], [1]]
    """
    between = _checked_similarity(similarity_matrix, threshold)
    between.fill_diagonal_(-math.inf)
    groups = {place: [place] for place in range(len(between))}
    while len(groups) > 1:
        best = int(between.argmax())
        i, j = sorted(divmod(best, len(between)))
        if not float(between[i, j]) >= threshold:
            break
        groups[i] = sorted(groups[i] + groups.pop(j))
        least = torch.minimum(between[i], between[j])
        least[i] = -math.inf
        between[i], between[:, i] = least, least
        between[j], between[:, j] = -math.inf, -math.inf
    return sorted(groups.values())


def adapter_diff(adapter_a: Update, adapter_b: Update) -> dict[str, LayerDifference]:
    """Distance and cosine of two adapters' updates, layer by layer.

    Every layer of either adapter is listed; vlora leaves out what only one of them has. A layer that
    one lacks is at the other's norm, with cosine 0; two zero updates have cosine 1.

    Returns:
        Layer name -> ``{"l2_distance": ||delta_W_a - delta_W_b||_F, "cosine_sim": ...}``, by name.

    Raises:
        AdapterError: a layer has different shapes in the two.

    Examples:
        >>> diff = adapter_diff(adapters[0], adapters[1])
        >>> sorted(diff)
        ['layers.0.q_proj', 'layers.0.v_proj']
        >>> adapter_diff(adapters[0], adapters[0])["layers.0.q_proj"]["cosine_sim"]
        1.0
    """
    return {
        name: _difference(*(dict(pairs).get(place) for place in (0, 1)))
        for name, pairs in by_layer([adapter_a, adapter_b])
    }


def subspace_coverage(subspace: SharedSubspace, adapter: Update) -> dict[str, Coverage]:
    """How much of an adapter a subspace can hold, layer by layer.

    For each side 1 - ||what is lost|| / ||all||: 1 says that nothing is lost. For ``joint``, side a is
    delta_W on the rows V, side b delta_W on the columns U. For ``flat``, sides are A and B around
    their means, as in vlora; here B has its scale. ``coverage`` is that of delta_W once it is projected.

    Returns:
        Layer name -> ``{"coverage_a", "coverage_b", "coverage_mean", "coverage"}``. A layer of the
        adapter that the subspace lacks has 0; vlora leaves it out.

    Raises:
        AdapterError: a layer has another shape in the subspace, or a flat one another rank.

    Examples:
        >>> covered = subspace_coverage(joint, adapters[0])["layers.0.q_proj"]
        >>> 0 <= covered["coverage"] <= covered["coverage_a"] <= 1
        True
    """
    found: dict[str, Coverage] = {}
    [alike] = under_shared_names(in_memory([adapter]), subspace.layers)
    for name in sorted(alike.layer_names):
        layer = subspace.layers.get(name)
        if layer is None:
            found[name] = Coverage(coverage_a=0.0, coverage_b=0.0, coverage_mean=0.0, coverage=0.0)
            continue
        a, b = alike.scaled(name)
        a, b = a.to(layer.device), b.to(layer.device)
        if isinstance(layer, FlatLayer):
            side_a, side_b = _flat_coverage(layer, a, b)
        else:
            side_a, side_b = _joint_coverage(layer, a, b)
        kept_a, kept_b = layer.factors(layer.project(a, b))
        lost = (
            torch.cat([kept_a.double(), a.double()]),
            torch.cat([kept_b.double(), -b.double()], dim=1),
        )
        found[name] = Coverage(
            coverage_a=side_a,
            coverage_b=side_b,
            coverage_mean=(side_a + side_b) / 2,
            coverage=_kept(update_norm(*lost), update_norm(a, b)),
        )
    return found


def find_outliers(adapters: Sequence[Update], threshold: float = 2.0) -> list[Outlier]:
    """Adapters that lie unusually far from the mean of all updates.

    z_i = (d_i - mean(d)) / std(d) with d_i = ||delta_W_i - mean delta_W||_F over all layers; those with
    z > ``threshold`` are listed. Of N numbers none can have a z-score above (N - 1) / sqrt(N), which is
    below 2 up to five adapters: vlora then finds nothing, whatever the adapters are.

    Returns:
        ``{"index", "distance", "z_score"}`` of each outlier, by index; none where all distances agree.

    Raises:
        OptionError: a threshold that is not positive, or that so few adapters cannot exceed.
        AdapterError: a layer has different shapes in two of them.

    Examples:
        >>> [found["index"] for found in find_outliers(adapters, threshold=1.4)]
        [2]
    """
    count = len(adapters)
    _check_count(adapters, 3)
    if not threshold > 0:
        raise OptionError(f"threshold {threshold} must be positive; 2.0 is usual")
    most = (count - 1) / math.sqrt(count)
    if threshold >= most:
        raise OptionError(
            f"of {count} adapters none can be {threshold:g} standard deviations away; give a "
            f"threshold below {math.floor(most * 100) / 100:g}, or more adapters"
        )
    return outliers_of(inner_products(adapters), threshold)


def outliers_of(products: torch.Tensor, threshold: float = 2.0) -> list[Outlier]:
    """``find_outliers`` from (N, N) inner products of at least three adapters."""
    distances = centroid_distances(products)
    spread, middle = float(distances.std()), float(distances.mean())
    if spread <= 1e-7 * max(middle, 1e-30):
        return []
    scores = ((distances - middle) / spread).tolist()
    return [
        Outlier(index=place, distance=float(distances[place]), z_score=score)
        for place, score in enumerate(scores)
        if score > threshold
    ]


# --- pieces for other reports ---------------------------------------------------------------------


def inner_products(adapters: Sequence[Update]) -> torch.Tensor:
    """(N, N) float64 inner products of the adapters' updates, all layers together.

    Memory: of one layer, all factors in float32 and 1024 rows of them in float64.

    Raises:
        AdapterError: a layer has different shapes in two adapters.
    """
    products = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for _, pairs in by_layer(adapters):
        add_products(products, pairs)
    return (products + products.T) / 2


def add_products(products: torch.Tensor, pairs: Sequence[tuple[int, Factors]]) -> None:
    """Add one layer's inner products to (N, N) float64 sums; half of the sum with its transpose."""
    owners = torch.tensor([place for place, (a, _) in pairs for _ in range(len(a))])
    rows_a = torch.cat([a for _, (a, _) in pairs])
    rows_b = torch.cat([b.T for _, (_, b) in pairs])
    parts = list(zip(*(whole.split(_ROWS_AT_ONCE) for whole in (owners, rows_a, rows_b))))
    for place, (own, a, b) in enumerate(parts):
        for other, other_a, other_b in parts[: place + 1]:
            gram = _row_products(a, other_a) * _row_products(b, other_b)
            by_column = torch.zeros(len(own), len(products), dtype=torch.float64)
            by_column.index_add_(1, other, gram)
            # Of two parts' products the mirror image is left out.
            products.index_add_(0, own, by_column, alpha=1 if other is own else 2)


def cosines(products: torch.Tensor) -> torch.Tensor:
    """(N, N) cosines of inner products; 0 beside an update of zero, 1 on the diagonal."""
    norms = products.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms == 0, 1.0, norms)
    found = (products / norms.outer(norms)).clamp(-1.0, 1.0)
    return found.fill_diagonal_(1.0)


def centroid_distances(products: torch.Tensor) -> torch.Tensor:
    """(N,) distances of the updates from their mean, from their inner products."""
    squares = products.diagonal() - 2 * products.mean(dim=1) + products.mean()
    return squares.clamp(min=0).sqrt()


def singular_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(r,) float64 singular values of B A, descending, by QR; A (r, d_in), B (d_out, r)."""
    return torch.linalg.svdvals(small_product(a.double(), b.double()))


def update_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """||B A||_F, exact also where the product all but cancels."""
    return float(singular_values(a, b).square().sum().sqrt())


def layer_singular_values(
    pairs: Sequence[tuple[int, Factors]],
) -> Iterator[tuple[int, torch.Tensor]]:
    """(place, (r,) float64 singular values, descending) of one layer of each adapter, by rank."""
    by_rank: dict[int, list[tuple[int, Factors]]] = {}
    for pair in pairs:
        by_rank.setdefault(len(pair[1][0]), []).append(pair)
    for alike in by_rank.values():
        a = torch.stack([a for _, (a, _) in alike])
        b_t = torch.stack([b.T for _, (_, b) in alike])
        yield from zip([place for place, _ in alike], stacked_singular_values(a, b_t))


def effective_rank(sigma: torch.Tensor) -> float:
    """exp of the entropy of sigma^2 / sum sigma^2: how many directions share the energy; 0 for zero.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007 (there of sigma itself).
    """
    energy = sigma.double().square()
    total = float(energy.sum())
    if total == 0:
        return 0.0
    share = energy / total
    return math.exp(float(torch.special.entr(share).sum()))


def scaled_layers(
    adapter: Update, names: Sequence[str] | None = None
) -> Generator[tuple[str, Factors], None, None]:
    """Yield (layer name, (A, s B)) in float32, of these layers, or of all by name."""
    if isinstance(adapter, Adapter):
        for name, (a, b) in adapter.iter_factors(names or sorted(adapter.modules)):
            yield name, (a.float(), b.float() * adapter.modules[name].scale)
    else:
        for name in names or sorted(adapter.layer_names):
            yield name, adapter.scaled(name)


def by_layer(adapters: Sequence[Update]) -> Iterator[tuple[str, list[tuple[int, Factors]]]]:
    """Yield (layer name, [(adapter's place, (A, s B) in float32)]) for every layer of any adapter."""
    adapters = under_shared_names(adapters)
    owned = [
        {*(adapter.modules if isinstance(adapter, Adapter) else adapter.layer_names)}
        for adapter in adapters
    ]
    few = len(adapters) <= _OPEN_FILES
    with ExitStack() as files:
        # Of few adapters each is opened once, and not once a layer.
        reads = [files.enter_context(closing(scaled_layers(a))) if few else None for a in adapters]
        for name in sorted(set().union(*owned)):
            pairs = []
            for place, (adapter, read) in enumerate(zip(adapters, reads)):
                if name in owned[place]:
                    a, b = next(scaled_layers(adapter, [name]) if read is None else read)[1]
                    pairs.append((place, (a.cpu(), b.cpu())))
            _check_shapes(name, pairs, adapters)
            yield name, pairs


def _check_shapes(
    name: str, pairs: Sequence[tuple[int, Factors]], adapters: Sequence[Update]
) -> None:
    first, (a, b) = pairs[0]
    for place, (other_a, other_b) in pairs[1:]:
        if (other_b.shape[0], other_a.shape[1]) != (b.shape[0], a.shape[1]):
            raise AdapterError(
                f"layer {name} is {b.shape[0]} x {a.shape[1]} in {called(adapters[first], first)} and "
                f"{other_b.shape[0]} x {other_a.shape[1]} in {called(adapters[place], place)}; compare "
                "adapters of one base model only"
            )


def _check_count(adapters: Sequence[Update], least: int) -> None:
    if len(adapters) < least:
        raise OptionError(
            f"{count_of(len(adapters), 'adapter')} given; this needs at least {least}"
        )


def _checked_similarity(matrix: torch.Tensor, threshold: float) -> torch.Tensor:
    if not -1 <= threshold <= 1:
        raise OptionError(f"threshold {threshold} is no cosine; give one from -1 to 1")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise OptionError(
            f"similarity_matrix has shape {list(matrix.shape)}; give the square matrix of "
            "compute_similarity_matrix"
        )
    between = matrix.detach().to("cpu", torch.float64, copy=True)
    if not is_finite(between) or not torch.allclose(between, between.T, atol=1e-5):
        raise OptionError(
            "similarity_matrix is not finite and symmetric; give that of compute_similarity_matrix"
        )
    return (between + between.T) / 2


def _difference(a: Factors | None, b: Factors | None) -> LayerDifference:
    if a is None or b is None:
        there = a or b
        assert there is not None
        norm = update_norm(*there)
        return LayerDifference(l2_distance=norm, cosine_sim=float(norm == 0))
    both = torch.cat([a[0], b[0]]).double(), torch.cat([a[1], -b[1]], dim=1).double()
    norms = update_norm(*a), update_norm(*b)
    product = float(((a[1].double().T @ b[1].double()) * (a[0].double() @ b[0].double().T)).sum())
    return LayerDifference(l2_distance=update_norm(*both), cosine_sim=_cosine(product, norms))


def _cosine(product: float, norms: tuple[float, float]) -> float:
    if 0.0 in norms:
        return float(norms[0] == norms[1])
    cosine = product / (norms[0] * norms[1])
    # Of one and the same update rounding leaves a little less than 1, or more.
    return 1.0 if cosine > 1 - 1e-12 else max(cosine, -1.0)


def _row_products(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Float64 products of rows with others, which may be the same."""
    wide = rows.double()
    return wide @ (wide if others is rows else others.double()).T


def _flat_coverage(layer: FlatLayer, a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    loadings_a, loadings_b = layer.project(a, b)
    assert loadings_b is not None
    sides = (
        (a - layer.mean_a, loadings_a, layer.components_a),
        (b.T - layer.mean_b, loadings_b, layer.components_b),
    )
    kept = []
    for row, loadings, components in sides:
        lost = row.double() - torch.tensordot(loadings.double(), components.double(), 1)
        kept.append(_kept(float(lost.norm()), float(row.double().norm())))
    return kept[0], kept[1]


def _joint_coverage(layer: JointLayer, a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    a, b = a.double(), b.double()
    whole = update_norm(a, b)
    # Rows of a quantised basis are not quite orthonormal.
    rows = torch.linalg.qr(layer.v.double().T).Q
    columns = torch.linalg.qr(layer.u.double()).Q
    lost_a = update_norm(a - (a @ rows) @ rows.T, b)
    lost_b = update_norm(a, b - columns @ (columns.T @ b))
    return _kept(lost_a, whole), _kept(lost_b, whole)


def _kept(lost: float, whole: float) -> float:
    """0 to 1; all of nothing is kept."""
    return 1.0 if whole == 0 else max(1.0 - lost / whole, 0.0)
