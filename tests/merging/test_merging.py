"""Merging adapters: against float64 sums, and against PEFT's add_weighted_adapter on real models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapters import (
    SHAPES,
    TinyModel,
    delta_w,
    save_tiny_adapters,
    tiny_adapters,
    tiny_weights,
)

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter
from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.merging import merging
from vllm_vlora.merging.merging import (
    MERGE_METHODS,
    MergedWeights,
    dare_mask,
    dare_merge,
    task_arithmetic,
    ties_merge,
)
from vllm_vlora.subspace.weights import LoRAWeights, load_adapter, save_adapter

LAYERS = list(SHAPES)
# One alpha each, none equal to the rank.
ALPHAS = (4, 16, 1)


def unequal(count: int = 3, rank: int = 2) -> list[LoRAWeights]:
    """Adapters of one rank with different alphas."""
    return [tiny_weights(seed, rank=rank, alpha=ALPHAS[seed]) for seed in range(count)]


def total(adapters: Sequence[LoRAWeights], weights: Sequence[float], layer: str) -> torch.Tensor:
    parts = [w * delta_w(a, layer) for a, w in zip(adapters, weights) if layer in a.lora_a]
    return torch.stack(parts).sum(0)


def close(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((actual.double() - wanted.double()).norm()) <= tolerance * float(wanted.norm())


# --- the weighted sum -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [0.7, 0.3, -0.5]])
def test_the_sum_is_exact(weights: list[float] | None) -> None:
    adapters = unequal()
    merged = task_arithmetic(adapters, weights)
    assert merged.rank == 6
    assert merged.truncation_error == 0.0
    for layer in LAYERS:
        assert merged.scale(layer) == 1.0
        assert close(delta_w(merged, layer), total(adapters, weights or [1 / 3] * 3, layer))


def test_mixed_ranks_and_layers() -> None:
    """What an adapter lacks is zero there; the sum of ranks is cut to the shape where it exceeds it."""
    extra = {"layers.1.q_proj": (12, 8)}
    adapters = [
        tiny_weights(0, rank=2, alpha=3),
        tiny_weights(1, rank=5, alpha=7, use_rslora=True),
        tiny_weights(2, rank=3, shapes={**SHAPES, **extra}),
    ]
    merged = task_arithmetic(adapters, [1.0, 2.0, -1.0])
    assert {layer: len(merged.lora_a[layer]) for layer in merged.layer_names} == {
        "layers.0.q_proj": 8,
        "layers.0.v_proj": 6,
        "layers.1.q_proj": 3,
    }
    for layer in merged.layer_names:
        assert close(delta_w(merged, layer), total(adapters, [1.0, 2.0, -1.0], layer))
    assert merged.truncation_error == 0.0


def test_a_smaller_rank_is_the_best_one_and_says_what_it_lost() -> None:
    adapters = unequal()
    merged = task_arithmetic(adapters, [1.0, 1.0, 1.0], rank=3)
    lost = whole = 0.0
    for layer in LAYERS:
        wanted = total(adapters, [1.0] * 3, layer)
        left, sigma, right = torch.linalg.svd(wanted, full_matrices=False)
        assert close(delta_w(merged, layer), left[:, :3] * sigma[:3] @ right[:3])
        share = float(sigma[3:].norm() / sigma.norm())
        assert merged.truncation_errors[layer] == pytest.approx(share, rel=1e-4)
        lost += float(sigma[3:].square().sum())
        whole += float(sigma.square().sum())
    assert merged.truncation_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert merged.rank == 3


def test_factors_do_not_matter() -> None:
    """Another factoring of the same updates merges to the same update; averaged factors would not."""
    adapters = unequal()
    turn = torch.randn(2, 2, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(2)
    turned = [
        LoRAWeights(
            w.layer_names,
            {n: turn @ a for n, a in w.lora_a.items()},
            {n: b @ turn.inverse() for n, b in w.lora_b.items()},
            w.rank,
            w.metadata,
        )
        for w in adapters[:1]
    ] + adapters[1:]
    for method in (task_arithmetic, ties_merge):
        first, second = method(adapters), method(turned)
        for layer in LAYERS:
            assert close(delta_w(first, layer), delta_w(second, layer), 1e-4)


def test_a_merge_is_a_peft_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    adapters = [tiny_weights(0, rank=2, alpha=8), tiny_weights(1, rank=3, alpha=1)]
    merged = task_arithmetic(adapters, [0.25, 0.75])
    save_adapter(merged, tmp_path / "merged")
    again = load_adapter(tmp_path / "merged")
    model, x = TinyModel(), torch.randn(5, 12)
    base = model(x)
    with torch.no_grad():
        answer = PeftModel.from_pretrained(model, str(tmp_path / "merged"))(x)
    added = torch.cat([x @ total(adapters, [0.25, 0.75], n).float().T for n in LAYERS], dim=1)
    assert torch.allclose(answer, base + added, atol=1e-5)
    assert all(again.scale(layer) == 1.0 for layer in LAYERS)
    assert again.metadata["base_model_name_or_path"] == "org/base"


def test_a_merge_of_different_layers_adapts_them_all(tmp_path: Path) -> None:
    """The first adapter's targets would select its own layer only."""
    from peft import PeftModel

    adapters = [
        tiny_weights(0, shapes={name: SHAPES[name]}, target_modules=[name.rpartition(".")[2]])
        for name in LAYERS
    ]
    merged = task_arithmetic(adapters, [1.0, 2.0])
    folder = save_adapter(merged, tmp_path / "merged")
    assert set(load_adapter(folder).layer_names) == set(LAYERS)
    model = PeftModel.from_pretrained(TinyModel(), str(folder))
    modules = dict(model.base_model.model.named_modules())
    for name, adapter, weight in zip(LAYERS, adapters, (1.0, 2.0)):
        found = modules[name].get_delta_weight("default")
        assert close(found, weight * delta_w(adapter, name))


# --- against PEFT ---------------------------------------------------------------------------------


def peft_merge(
    folder: Path, adapters: list[LoRAWeights], weights: list[float], kind: str, **options: Any
) -> dict[str, torch.Tensor]:
    """delta_W of every layer after PEFT's add_weighted_adapter."""
    from peft import PeftModel

    folders = save_tiny_adapters(folder, adapters)
    model = PeftModel.from_pretrained(TinyModel(), folders[0], adapter_name="n0")
    for place, path in enumerate(folders[1:], 1):
        model.load_adapter(path, adapter_name=f"n{place}")
    names = [f"n{place}" for place in range(len(adapters))]
    model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
    modules = dict(model.base_model.model.named_modules())
    return {name: modules[name].get_delta_weight("merged").detach() for name in LAYERS}


def agree(merged: MergedWeights, theirs: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    for layer in LAYERS:
        assert float(theirs[layer].norm()) > 0
        assert close(delta_w(merged, layer), theirs[layer], tolerance), layer


WEIGHTS = [0.7, -0.4, 1.3]


def test_the_sum_is_pefts_cat(tmp_path: Path) -> None:
    adapters = [tiny_weights(s, rank=r, alpha=ALPHAS[s]) for s, r in enumerate((2, 3, 1))]
    agree(task_arithmetic(adapters, WEIGHTS), peft_merge(tmp_path, adapters, WEIGHTS, "cat"))


@pytest.mark.parametrize("rank", [1, 4])
def test_a_cut_sum_is_pefts_svd(tmp_path: Path, rank: int) -> None:
    adapters = unequal()
    theirs = peft_merge(tmp_path, adapters, WEIGHTS, "svd", svd_rank=rank)
    agree(task_arithmetic(adapters, WEIGHTS, rank=rank), theirs)


@pytest.mark.parametrize("vote", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_pefts_ties_svd(tmp_path: Path, density: float, vote: str) -> None:
    adapters = unequal()
    theirs = peft_merge(
        tmp_path,
        adapters,
        WEIGHTS,
        "ties_svd",
        density=density,
        majority_sign_method=vote,
        svd_rank=4,
    )
    merged = ties_merge(adapters, density, WEIGHTS, rank=4, majority_sign_method=vote)
    agree(merged, theirs)
    assert 0 < merged.truncation_error < 1


@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_ties_in_factors_is_pefts_ties(tmp_path: Path, vote: str) -> None:
    adapters = unequal()
    theirs = peft_merge(tmp_path, adapters, WEIGHTS, "ties", density=0.5, majority_sign_method=vote)
    merged = ties_merge(adapters, 0.5, WEIGHTS, space="factors", majority_sign_method=vote)
    agree(merged, theirs)
    assert merged.truncation_error == 0.0


def _with_our_masks(monkeypatch: pytest.MonkeyPatch, seed: int, sides: str, count: int) -> None:
    """PEFT draws its masks layer by layer, for A before B, adapter by adapter: hand it ours."""
    masks = [
        (layer, side, place) for layer in LAYERS for side in sides for place in range(count)
    ].__iter__()

    def mask(probabilities: torch.Tensor) -> torch.Tensor:
        layer, side, place = next(masks)
        kept = float(probabilities.flatten()[0])
        return dare_mask(seed, layer, side, place, probabilities.shape, kept)

    monkeypatch.setattr("peft.utils.merge_utils.torch.bernoulli", mask)


@pytest.mark.parametrize(
    ("space", "kind"), [("weights", "dare_linear_svd"), ("factors", "dare_linear")]
)
def test_dare_is_pefts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str, kind: str
) -> None:
    adapters = unequal()
    _with_our_masks(monkeypatch, 7, "W" if space == "weights" else "AB", len(adapters))
    options = {"svd_rank": 4} if space == "weights" else {}
    theirs = peft_merge(tmp_path, adapters, WEIGHTS, kind, density=0.75, **options)
    rank = {"rank": 4} if space == "weights" else {}
    agree(dare_merge(adapters, 0.25, WEIGHTS, seed=7, space=space, **rank), theirs)


# --- TIES -----------------------------------------------------------------------------------------


def _rank_one(values: torch.Tensor) -> LoRAWeights:
    """An adapter of one 1 x n layer whose update is ``values``."""
    return LoRAWeights(["x"], {"x": values[None, :]}, {"x": torch.ones(1, 1)}, 1)


def test_ties_by_hand() -> None:
    """Trim to the two largest, elect the sign of the sum, average what agrees with it."""
    adapters = [
        _rank_one(torch.tensor([4.0, -3.0, 1.0, 0.5])),
        _rank_one(torch.tensor([2.0, 5.0, 0.1, -1.0])),
        _rank_one(torch.tensor([-1.0, 0.3, 6.0, -8.0])),
    ]
    merged = ties_merge(adapters, density=0.5)
    wanted = torch.tensor([[3.0, 5.0, 6.0, -8.0]])
    assert torch.allclose(delta_w(merged, "x").float(), wanted, atol=1e-5)
    assert merged.truncation_error < 1e-6


def test_ties_votes_by_number_or_by_value() -> None:
    adapters = [_rank_one(torch.tensor([value, 1.0])) for value in (9.0, -1.0, -2.0)]
    by_value = delta_w(ties_merge(adapters, 1.0), "x")
    by_number = delta_w(ties_merge(adapters, 1.0, majority_sign_method="frequency"), "x")
    assert float(by_value[0, 0]) == pytest.approx(9.0)
    assert float(by_number[0, 0]) == pytest.approx(-1.5)


def test_ties_of_copies_is_the_copy() -> None:
    """vlora would divide by the number of adapters twice and return a third of it."""
    [adapter] = unequal(1)
    merged = ties_merge([adapter] * 3, density=1.0)
    for layer in LAYERS:
        assert close(delta_w(merged, layer), delta_w(adapter, layer))


# --- DARE -----------------------------------------------------------------------------------------


def test_dare_without_dropping_is_the_sum() -> None:
    adapters = unequal()
    merged = dare_merge(adapters, 0.0, WEIGHTS, seed=1, rank=6)
    for layer in LAYERS:
        assert close(delta_w(merged, layer), total(adapters, WEIGHTS, layer))


def test_dare_drops_its_share_and_rescales() -> None:
    values = torch.ones(40_000)
    merged = dare_merge([_rank_one(values)], 0.3, [1.0], seed=3)
    row = delta_w(merged, "x")[0]
    assert float((row.abs() > 0.5).double().mean()) == pytest.approx(0.7, abs=0.01)
    assert float(row.max()) == pytest.approx(1 / 0.7, rel=1e-5)
    assert float(row.mean()) == pytest.approx(1.0, abs=0.02)


def test_dare_is_seeded_by_layer_and_place() -> None:
    adapters = unequal()
    state = torch.get_rng_state()
    first, second, third = (dare_merge(adapters, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"
    assert torch.equal(first.lora_a[LAYERS[0]], second.lora_a[LAYERS[0]])
    assert not torch.equal(first.lora_a[LAYERS[0]], third.lora_a[LAYERS[0]])
    # A layer's masks do not depend on which others there are.
    shapes = {LAYERS[1]: SHAPES[LAYERS[1]]}
    alone = [
        LoRAWeights(
            list(shapes),
            {n: w.lora_a[n] for n in shapes},
            {n: w.lora_b[n] for n in shapes},
            w.rank,
            w.metadata,
        )
        for w in adapters
    ]
    assert torch.equal(dare_merge(alone, seed=5).lora_a[LAYERS[1]], first.lora_a[LAYERS[1]])
    # Two adapters of one list have different masks.
    masks = [dare_mask(5, "x", "W", place, (8, 8), 0.5) for place in range(2)]
    assert not torch.equal(*masks)


def test_dare_without_a_seed_follows_torchs() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        results.append(dare_merge(unequal()))
    assert results[0].seed == results[1].seed is not None
    assert torch.equal(results[0].lora_a[LAYERS[0]], results[1].lora_a[LAYERS[0]])
    again = dare_merge(unequal(), seed=results[0].seed)
    assert torch.equal(again.lora_b[LAYERS[0]], results[0].lora_b[LAYERS[0]])


# --- large layers ---------------------------------------------------------------------------------


def test_large_layers_are_cut_by_power_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(90, 30, generator=generator) @ torch.randn(30, 120, generator=generator)
    matrix += 0.5 * torch.randn(90, 120, generator=generator)
    exact = merging._cut_dense(matrix, 20)
    monkeypatch.setattr(merging, "_MOST_EXACT", 10)
    found = merging._cut_dense(matrix, 20)
    sigma = torch.linalg.svdvals(matrix.double())
    assert exact.lost == pytest.approx(float(sigma[20:].square().sum()), rel=1e-4)
    assert exact.lost * (1 - 1e-6) <= found.lost <= 1.001 * exact.lost
    left = float((matrix - found.b @ found.a).double().square().sum())
    assert found.lost == pytest.approx(left, rel=1e-3)


# --- heads, kinds, bad input ----------------------------------------------------------------------


def _with_head(weights: LoRAWeights, head: torch.Tensor) -> LoRAWeights:
    metadata = {**weights.metadata, "modules_to_save": ["score"]}
    key = "base_model.model.score.weight"
    return LoRAWeights(
        weights.layer_names, weights.lora_a, weights.lora_b, weights.rank, metadata, {}, {key: head}
    )


def test_one_head_travels_and_two_are_refused() -> None:
    plain, other = unequal(2)
    head = torch.randn(3, 14)
    merged = task_arithmetic([plain, _with_head(other, head)])
    assert torch.equal(merged.extra["base_model.model.score.weight"], head)
    assert merged.metadata["modules_to_save"] == ["score"]
    same = task_arithmetic([_with_head(plain, head), _with_head(other, head.clone())])
    assert list(same.extra) == list(merged.extra)
    with pytest.raises(AdapterError, match="heads cannot be merged"):
        task_arithmetic([_with_head(plain, head), _with_head(other, -head)])


def test_heads_are_compared_as_they_lie() -> None:
    plain, other = unequal(2)
    head = torch.randn(3, 14).to(torch.float8_e4m3fn)
    same = task_arithmetic([_with_head(plain, head), _with_head(other, head.clone())])
    assert torch.equal(
        same.extra["base_model.model.score.weight"].view(torch.uint8), head.view(torch.uint8)
    )
    for wrong in (head.float(), (-head.float()).to(head.dtype)):
        with pytest.raises(AdapterError, match="heads cannot be merged"):
            task_arithmetic([_with_head(plain, head), _with_head(other, wrong)])


def test_a_merge_is_of_new_factors_for_peft_too(tmp_path: Path) -> None:
    """Literally PEFT's own reader: "orthogonal" begins with no odd rank."""
    options = {"init_lora_weights": "orthogonal", "bias": "lora_only"}
    adapters = tiny_adapters(3, **options)
    for rank in (3, 2):
        folder = save_adapter(task_arithmetic(adapters, rank=rank), tmp_path / f"{rank}")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["init_lora_weights"], config["bias"]) == (True, "none")
    own = json.loads(
        (save_adapter(adapters[0], tmp_path / "own") / "adapter_config.json").read_text()
    )
    assert {name: own[name] for name in options} == options, "what is as it was keeps its words"


@pytest.mark.parametrize("merge", [task_arithmetic, ties_merge, dare_merge])
def test_opened_adapters_are_merged_as_loaded_ones(
    merge: Callable[..., MergedWeights], tmp_path: Path
) -> None:
    """In their places, whichever of them are opened and whichever in memory."""
    loaded = [load_adapter(path) for path in save_tiny_adapters(tmp_path, unequal())]
    opened = [open_adapter(tmp_path / f"task_{place}") for place in range(3)]
    options: dict[str, Any] = {"weights": [1.0, 0.25, -0.5]}
    if merge is dare_merge:
        options["seed"] = 3
    wanted = merge(loaded, **options)
    if merge is task_arithmetic:
        for layer in LAYERS:
            assert close(delta_w(wanted, layer), total(unequal(), options["weights"], layer))
    for mixed in ([opened[0], *loaded[1:]], [*loaded[:2], opened[2]], opened):
        merged = merge(mixed, **options)
        assert merged.metadata == wanted.metadata
        for layer in LAYERS:
            assert torch.equal(merged.lora_a[layer], wanted.lora_a[layer])
            assert torch.equal(merged.lora_b[layer], wanted.lora_b[layer])


def test_adapters_of_other_base_models_are_named() -> None:
    adapters = [tiny_weights(0), tiny_weights(1, base_model_name_or_path="org/other")]
    for method in MERGE_METHODS.values():
        with pytest.warns(UserWarning, match="org/base, org/other; merged as org/base's"):
            method(adapters)


def test_embeddings_stay_embeddings() -> None:
    shapes = {"embed_tokens": (50, 12)}
    adapters = [tiny_weights(seed, shapes=shapes) for seed in range(2)]
    for adapter in adapters:
        adapter.kinds["embed_tokens"] = "embedding"
    for method in MERGE_METHODS.values():
        assert method(adapters).kinds == {"embed_tokens": "embedding"}
    adapters[1].kinds.clear()
    with pytest.raises(AdapterError, match="linear in adapter 1 and embedding in adapter 0"):
        task_arithmetic(adapters)


CASES: list[tuple[str, Callable[[], object]]] = [
    ("no adapters", lambda: task_arithmetic([])),
    ("2 weights for 3 adapters", lambda: task_arithmetic(unequal(), [0.5, 0.5])),
    ("weight nan does not fit", lambda: task_arithmetic(unequal(2), [0.5, float("nan")])),
    ("weight 1e+300 does not fit", lambda: ties_merge(unequal(2), weights=[1e300, 1.0])),
    ("rank 0", lambda: task_arithmetic(unequal(), rank=0)),
    ("density 0", lambda: ties_merge(unequal(), density=0)),
    ("density 1.5", lambda: ties_merge(unequal(), density=1.5)),
    ("majority_sign_method 'most'", lambda: ties_merge(unequal(), majority_sign_method="most")),
    ("space 'logits'", lambda: ties_merge(unequal(), space="logits")),
    ("in factors the rank", lambda: ties_merge(unequal(), space="factors", rank=4)),
    ("drop_rate 1", lambda: dare_merge(unequal(), drop_rate=1.0)),
    ("drop_rate -0.1", lambda: dare_merge(unequal(), drop_rate=-0.1)),
]


@pytest.mark.parametrize(("words", "call"), CASES, ids=[words for words, _ in CASES])
def test_bad_options(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(OptionError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapters_that_do_not_fit_are_called_by_their_names(tmp_path: Path) -> None:
    def saved(name: str, weights: LoRAWeights) -> Adapter:
        return open_adapter(save_adapter(weights, tmp_path / name))

    sql = saved("sql", tiny_weights(0))
    wide = saved("fr", tiny_weights(1, shapes={"layers.0.q_proj": (12, 9)}))
    for adapters in ([sql, wide], [LoRAWeights.from_adapter(adapter) for adapter in (sql, wide)]):
        with pytest.raises(
            AdapterError, match="8 x 12 in adapter 'sql' and 9 x 12 in adapter 'fr'"
        ):
            task_arithmetic(adapters)
    with pytest.raises(AdapterError, match="rank 2 in adapter 'sql' and 3 in adapter 'de'"):
        ties_merge([sql, saved("de", tiny_weights(1, rank=3))], space="factors")
    heads = []
    for number in range(2):
        weights = tiny_weights(number)
        weights.extra["score.weight"] = torch.full((2, 12), float(number))
        weights.name = f"task{number}"
        heads.append(weights)
    with pytest.raises(AdapterError, match=r"score\.weight of adapter 'task1' differs"):
        task_arithmetic(heads)


def test_adapters_that_do_not_fit() -> None:
    other = tiny_weights(1, shapes={"layers.0.q_proj": (12, 9)})
    with pytest.raises(AdapterError, match="8 x 12 in adapter 0 and 9 x 12 in adapter 1"):
        task_arithmetic([*unequal(1), other])
    with pytest.raises(AdapterError, match="rank 2 in adapter 0 and 3 in adapter 1"):
        ties_merge([tiny_weights(0), tiny_weights(1, rank=3)], space="factors")


def _of_size(size: float) -> list[LoRAWeights]:
    """Adapters whose factors are so large each."""
    adapters = unequal()
    for adapter in adapters:
        for factor in (*adapter.lora_a.values(), *adapter.lora_b.values()):
            factor.mul_(size)
    return adapters


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_a_cut_of_updates_beyond_float32_says_what_it_lost(size: float) -> None:
    adapters = _of_size(size)
    merged = task_arithmetic(adapters, [1.0] * 3, rank=3)
    for layer in LAYERS:
        wanted = total(adapters, [1.0] * 3, layer)
        error = float((delta_w(merged, layer) - wanted).norm() / wanted.norm())
        assert error > 0.01
        assert merged.truncation_errors[layer] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("size", [1e-25, 1e20])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_an_update_beyond_float32_is_not_formed(size: float, method: str) -> None:
    with pytest.raises(
        AdapterError, match=r"layer layers.0.q_proj of adapter 0 has an update beyond"
    ):
        MERGE_METHODS[method](_of_size(size))


@pytest.mark.parametrize("method", list(MERGE_METHODS))
def test_weights_that_lead_beyond_float32_are_named(method: str) -> None:
    with pytest.raises(AdapterError, match="too large for float32; give smaller weights"):
        MERGE_METHODS[method](_of_size(1e18), weights=[1e30] * 3)


def test_zero_updates_merge_to_zero() -> None:
    adapters = tiny_adapters(2)
    for adapter in adapters:
        for b in adapter.lora_b.values():
            b.zero_()
    for method in MERGE_METHODS.values():
        merged = method(adapters)
        assert merged.truncation_error == 0.0
        assert all(float(delta_w(merged, layer).norm()) == 0 for layer in LAYERS)
