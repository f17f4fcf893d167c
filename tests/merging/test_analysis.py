"""Similarity, clusters, differences, outliers and coverage, against dense float64 updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_adapters import SHAPES, delta_w, save_tiny_adapters, tiny_adapters, tiny_weights

from vllm_vlora.adapters import weights_files
from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.adapters.weights_files import open_weights
from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.merging import analysis
from vllm_vlora.merging.analysis import (
    adapter_diff,
    centroid_distances,
    compute_similarity_matrix,
    cosines,
    effective_rank,
    find_clusters,
    find_outliers,
    inner_products,
    singular_values,
    subspace_coverage,
    update_norm,
)
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.weights import LoRAWeights
from vllm_vlora.tensor_files import Stamp, TensorFile

MORE = {**SHAPES, "layers.1.q_proj": (12, 8)}


def mixed() -> list[LoRAWeights]:
    """Ranks, alphas and layers differ; the last one opposes the first."""
    first = tiny_weights(0, rank=2, alpha=8)
    opposed = LoRAWeights(
        first.layer_names,
        first.lora_a,
        {name: -0.5 * b for name, b in first.lora_b.items()},
        first.rank,
        first.metadata,
    )
    return [first, tiny_weights(1, rank=3, alpha=1, shapes=MORE), tiny_weights(2), opposed]


def flattened(weights: LoRAWeights) -> torch.Tensor:
    """All updates in one float64 vector; zeros for the layers it lacks."""
    return torch.cat(
        [
            delta_w(weights, name).flatten()
            if name in weights.lora_a
            else torch.zeros(shape[0] * shape[1], dtype=torch.float64)
            for name, shape in MORE.items()
        ]
    )


def refactored(weights: LoRAWeights, seed: int = 0) -> LoRAWeights:
    """The same updates with other factors, and another alpha that says so."""
    turn = torch.randn(weights.rank, weights.rank, generator=torch.Generator().manual_seed(seed))
    turn = (turn + 3 * torch.eye(weights.rank)).double()
    return LoRAWeights(
        weights.layer_names,
        {name: turn @ a.double() for name, a in weights.lora_a.items()},
        {name: b.double() @ turn.inverse() / 4 for name, b in weights.lora_b.items()},
        weights.rank,
        {**weights.metadata, "lora_alpha": 4 * weights.metadata["lora_alpha"]},
    )


# --- similarity -----------------------------------------------------------------------------------


def test_similarity_is_that_of_the_updates() -> None:
    adapters = mixed()
    rows = torch.stack([flattened(weights) for weights in adapters])
    unit = rows / rows.norm(dim=1, keepdim=True)
    found = compute_similarity_matrix(adapters)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), unit @ unit.T, atol=1e-6)
    assert float(found[0, 3]) == pytest.approx(-1.0, abs=1e-6)
    assert torch.equal(found.diagonal(), torch.ones(4))
    assert torch.equal(found, found.T)


def test_similarity_does_not_depend_on_the_factoring() -> None:
    """A copy in other factors has cosine 1; that of flattened factors is far from it."""
    [weights] = tiny_adapters(1)
    copy = refactored(weights)
    assert float(compute_similarity_matrix([weights, copy])[0, 1]) == pytest.approx(1.0, abs=1e-6)
    flat = [torch.cat([w.lora_a[n].flatten().double() for n in SHAPES]) for w in (weights, copy)]
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) < 0.95


@pytest.mark.parametrize("most", [0, 64])
def test_files_of_few_adapters_are_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    adapters = tiny_adapters(3)
    opened = [open_adapter(folder) for folder in save_tiny_adapters(tmp_path, adapters)]
    layers = sum(len(adapter.modules) for adapter in opened)
    asked: list[Path] = []

    def counted(path: Path, known: Stamp | None = None) -> TensorFile:
        asked.append(path)
        return open_weights(path, known)

    monkeypatch.setattr(analysis, "_OPEN_FILES", most)
    monkeypatch.setattr(weights_files, "open_weights", counted)
    assert torch.equal(inner_products(opened), inner_products(adapters))
    assert len(asked) == (3 if most else layers)


def test_opened_adapters_give_the_same(tmp_path: Path) -> None:
    adapters = mixed()
    opened = [open_adapter(folder) for folder in save_tiny_adapters(tmp_path, adapters)]
    assert torch.equal(inner_products(opened), inner_products(adapters))


def test_inner_products_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = mixed()
    rows = torch.stack([flattened(weights) for weights in adapters])
    monkeypatch.setattr("vllm_vlora.merging.analysis._ROWS_AT_ONCE", 2)
    products = inner_products(adapters)
    assert torch.allclose(products, rows @ rows.T, rtol=1e-6)
    distances = (rows - rows.mean(0)).norm(dim=1)
    assert torch.allclose(centroid_distances(products), distances, rtol=1e-5)


def test_an_update_of_zero_resembles_nothing() -> None:
    adapters = tiny_adapters(2)
    for b in adapters[1].lora_b.values():
        b.zero_()
    assert compute_similarity_matrix(adapters).tolist() == [[1.0, 0.0], [0.0, 1.0]]


# --- clusters -------------------------------------------------------------------------------------


def _families(generator: torch.Generator, sizes: tuple[int, ...]) -> torch.Tensor:
    """Cosines of unit vectors around a centre for each family."""
    centres = torch.linalg.qr(torch.randn(32, len(sizes), generator=generator)).Q.T
    rows = torch.cat(
        [
            centre + 0.05 * torch.randn(size, 32, generator=generator)
            for centre, size in zip(centres, sizes)
        ]
    )
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def test_families_are_found_whatever_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = _families(generator, (3, 2, 1))
    assert find_clusters(similarity, 0.8) == [[0, 1, 2], [3, 4], [5]]
    for _ in range(5):
        order = torch.randperm(6, generator=generator)
        found = find_clusters(similarity[order][:, order], 0.8)
        named = sorted(sorted(int(order[place]) for place in cluster) for cluster in found)
        assert named == [[0, 1, 2], [3, 4], [5]]


def test_the_closest_are_joined_first() -> None:
    """0-1 are at the threshold and 1-2 closer: a pass in the order given would join 0 with 1."""
    similarity = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.95], [0.2, 0.95, 1.0]])
    assert find_clusters(similarity, 0.9) == [[0], [1, 2]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(-0.5, 0.99))
def test_clusters_hold_what_they_promise(seed: int, count: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 3, generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True)
    similarity = rows @ rows.T
    clusters = find_clusters(similarity, threshold)
    assert sorted(itertools.chain(*clusters)) == list(range(count))
    for cluster in clusters:
        assert all(similarity[i, j] >= threshold - 1e-6 for i in cluster for j in cluster if i != j)
    for first, second in itertools.combinations(clusters, 2):
        assert min(float(similarity[i, j]) for i in first for j in second) < threshold + 1e-6


def test_clusters_at_the_ends() -> None:
    similarity = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert find_clusters(similarity, -1.0) == [[0, 1]]
    assert find_clusters(similarity, 1.0) == [[0], [1]]
    assert find_clusters(torch.ones(3, 3), 1.0) == [[0, 1, 2]]


# --- differences ----------------------------------------------------------------------------------


def test_diff_is_that_of_the_updates() -> None:
    first, second = mixed()[:2]
    found = adapter_diff(first, second)
    assert list(found) == sorted(MORE)
    for name in SHAPES:
        a, b = delta_w(first, name), delta_w(second, name)
        assert found[name]["l2_distance"] == pytest.approx(float((a - b).norm()), rel=1e-6)
        cosine = float((a * b).sum() / a.norm() / b.norm())
        assert found[name]["cosine_sim"] == pytest.approx(cosine, abs=1e-7)
    only = found["layers.1.q_proj"]
    assert only["l2_distance"] == pytest.approx(float(delta_w(second, "layers.1.q_proj").norm()))
    assert only["cosine_sim"] == 0.0


def test_diff_of_a_copy_in_other_factors_is_zero() -> None:
    [weights] = tiny_adapters(1)
    for found in adapter_diff(weights, refactored(weights)).values():
        assert found["l2_distance"] < 1e-5
        assert found["cosine_sim"] == pytest.approx(1.0, abs=1e-7)


def test_diff_of_zeros() -> None:
    zero = tiny_adapters(1)[0]
    for b in zero.lora_b.values():
        b.zero_()
    assert set(adapter_diff(zero, zero)["layers.0.q_proj"].values()) == {0.0, 1.0}
    assert adapter_diff(zero, tiny_weights(1))["layers.0.q_proj"]["cosine_sim"] == 0.0


# --- outliers -------------------------------------------------------------------------------------


def test_an_outlier_is_found_with_its_z_score() -> None:
    adapters = [tiny_weights(seed, spread=0.1) for seed in range(9)]
    adapters.insert(4, tiny_weights(99, alpha=40))
    rows = torch.stack([flattened(weights) for weights in adapters])
    distances = (rows - rows.mean(0)).norm(dim=1)
    scores = (distances - distances.mean()) / distances.std()
    [found] = find_outliers(adapters)
    assert found["index"] == 4
    assert found["distance"] == pytest.approx(float(distances[4]), rel=1e-5)
    assert found["z_score"] == pytest.approx(float(scores[4]), rel=1e-5)


def test_copies_have_no_outlier() -> None:
    adapters = [tiny_weights(0)] + [refactored(tiny_weights(0), seed) for seed in range(6)]
    assert find_outliers(adapters) == []


def test_a_threshold_that_cannot_be_exceeded_is_an_error() -> None:
    """The z-scores of five numbers stay below 1.79, so a threshold of 2 would always find nothing."""
    adapters = [tiny_weights(seed, spread=0.01) for seed in range(4)] + [tiny_weights(9, alpha=400)]
    with pytest.raises(OptionError, match=r"below 1\.78"):
        find_outliers(adapters)
    assert [found["index"] for found in find_outliers(adapters, 1.7)] == [4]


# --- coverage -------------------------------------------------------------------------------------


def test_coverage_of_a_joint_basis() -> None:
    adapters = tiny_adapters(4, spread=0.5)
    subspace = SharedSubspace.from_adapters(adapters[:3], num_components=3, representation="joint")
    found = subspace_coverage(subspace, adapters[3])
    for name, layer in subspace.layers.items():
        update = delta_w(adapters[3], name)
        u, v = layer.u.double(), layer.v.double()
        norm = float(update.norm())
        on_v, on_u = update @ v.T @ v, u @ u.T @ update
        both = u @ u.T @ update @ v.T @ v
        wanted = [1 - float((update - kept).norm()) / norm for kept in (on_v, on_u, both)]
        covered = found[name]
        keys = ("coverage_a", "coverage_b", "coverage")
        assert [covered[key] for key in keys] == pytest.approx(wanted, abs=1e-5)  # type: ignore[literal-required]
        assert covered["coverage_mean"] == pytest.approx(sum(wanted[:2]) / 2, abs=1e-5)
        assert 0 < wanted[2] < min(wanted[:2]) < 1


def test_coverage_of_a_flat_basis() -> None:
    adapters = tiny_adapters(4, spread=0.5)
    subspace = SharedSubspace.from_adapters(adapters[:3], num_components=2)
    own = subspace_coverage(subspace, adapters[0])
    new = subspace_coverage(subspace, adapters[3])
    for name, layer in subspace.layers.items():
        assert own[name]["coverage_a"] == pytest.approx(1.0, abs=1e-4)
        assert own[name]["coverage"] == pytest.approx(1.0, abs=1e-4)
        a, b = adapters[3].scaled(name)
        for key, row, mean, components in (
            ("coverage_a", a, layer.mean_a, layer.components_a),
            ("coverage_b", b.T, layer.mean_b, layer.components_b),
        ):
            centred = (row - mean).flatten().double()
            basis = components.flatten(1).double()
            lost = centred - torch.linalg.pinv(basis) @ (basis @ centred)
            wanted = 1 - float(lost.norm() / centred.norm())
            assert new[name][key] == pytest.approx(wanted, abs=1e-4)  # type: ignore[literal-required]
            assert 0 < wanted < 0.9


def test_coverage_of_an_opened_adapter(tmp_path: Path) -> None:
    adapters = tiny_adapters()
    subspace = SharedSubspace.from_adapters(adapters[:3], num_components=4, representation="joint")
    [path] = save_tiny_adapters(tmp_path, adapters[3:])
    assert subspace_coverage(subspace, open_adapter(path)) == subspace_coverage(
        subspace, adapters[3]
    )


def test_coverage_of_a_layer_that_the_subspace_lacks_is_zero() -> None:
    subspace = SharedSubspace.from_adapters(tiny_adapters(3), num_components=2)
    found = subspace_coverage(subspace, tiny_weights(7, shapes=MORE))
    assert set(found["layers.1.q_proj"].values()) == {0.0}


# --- pieces, bad input ----------------------------------------------------------------------------


def test_norms_and_effective_ranks() -> None:
    weights = tiny_weights(0, rank=3)
    name = "layers.0.q_proj"
    sigma = torch.linalg.svdvals(delta_w(weights, name))[:3]
    found = singular_values(*weights.scaled(name))
    assert torch.allclose(found, sigma, rtol=1e-5)
    assert update_norm(*weights.scaled(name)) == pytest.approx(float(sigma.norm()), rel=1e-6)
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(2)) == 0.0
    share = (sigma**2 / (sigma**2).sum()).tolist()
    wanted = math.exp(-sum(p * math.log(p) for p in share))
    assert effective_rank(found) == pytest.approx(wanted, rel=1e-5)


def test_cosines_of_rounding_stay_within_one() -> None:
    products = torch.tensor([[1.0, 1.0 + 1e-12], [1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert float(cosines(products).max()) == 1.0


CASES: list[tuple[str, Callable[[], object]]] = [
    (
        "1 adapter given; this needs at least 2",
        lambda: compute_similarity_matrix(tiny_adapters(1)),
    ),
    ("2 adapters given; this needs at least 3", lambda: find_outliers(tiny_adapters(2))),
    ("threshold -1 must be positive", lambda: find_outliers(tiny_adapters(3), -1)),
    ("threshold 1.5 is no cosine", lambda: find_clusters(torch.eye(2), 1.5)),
    ("shape [2, 3]", lambda: find_clusters(torch.ones(2, 3))),
    ("not finite and symmetric", lambda: find_clusters(torch.tensor([[1.0, 0.5], [0.1, 1.0]]))),
    ("not finite and symmetric", lambda: find_clusters(torch.full((2, 2), float("nan")))),
]


@pytest.mark.parametrize(("words", "call"), CASES)
def test_bad_input(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(OptionError) as caught:
        call()
    assert words in str(caught.value)


def test_layers_of_different_shapes() -> None:
    other = tiny_weights(1, shapes={"layers.0.q_proj": (10, 8)})
    for compare in (adapter_diff, lambda *pair: compute_similarity_matrix(pair)):
        with pytest.raises(AdapterError, match="8 x 12 in adapter 0 and 8 x 10 in adapter 1"):
            compare(tiny_weights(0), other)
