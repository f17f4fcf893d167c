"""``SharedSubspace`` against float64 references, PEFT, and its own promises."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_adapters import (
    SHAPES,
    TinyModel,
    delta_w,
    save_tiny_adapters,
    tiny_adapters,
    tiny_config,
    tiny_weights,
)

from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.errors import (
    AdapterError,
    OptionError,
    OutputError,
    TaskIdError,
    TaskNotFoundError,
    VLoRAError,
)
from vllm_vlora.merging.blending import blend_tasks
from vllm_vlora.model.router import TaskRouter
from vllm_vlora.model.training import SubspaceTrainer
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.subspace.layers import FlatLayer, JointLayer, round_rows
from vllm_vlora.subspace.pipeline import absorb_task, extract_adapter, init_subspace
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.tasks import TaskProjection
from vllm_vlora.subspace.weights import (
    LoRAWeights,
    load_adapter,
    load_adapter_from_hub,
    save_adapter,
)

Q, V = SHAPES
REPRESENTATIONS = pytest.mark.parametrize(("representation", "k"), [("flat", 3), ("joint", 8)])


def fitted(
    adapters: list[LoRAWeights], representation: str = "flat", k: int | None = None, **options: Any
) -> SharedSubspace:
    return SharedSubspace.from_adapters(
        adapters, num_components=k, representation=representation, **options
    )


def relative(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def task_error(subspace: SharedSubspace, task: str, weights: LoRAWeights) -> float:
    """||delta_W' - delta_W|| / ||delta_W|| over all layers, from dense float64 matrices."""
    made = subspace.reconstruct(task)
    lost = norm = 0.0
    for layer in weights.layer_names:
        wanted = delta_w(weights, layer)
        got = delta_w(made, layer) if layer in made.layer_names else torch.zeros_like(wanted)
        lost += float((got - wanted).square().sum())
        norm += float(wanted.square().sum())
    return (lost / norm) ** 0.5


def stacked(adapters: list[LoRAWeights], layer: str, side: str) -> torch.Tensor:
    """Flattened factors as vlora has them, alpha / r folded into B, (N, D) float64."""
    if side == "a":
        return torch.stack([w.lora_a[layer].double().flatten() for w in adapters])
    return torch.stack([(w.scale(layer) * w.lora_b[layer].double()).flatten() for w in adapters])


def all_factors(subspace: SharedSubspace, task: str) -> list[torch.Tensor]:
    made = subspace.reconstruct(task)
    return [*made.lora_a.values(), *made.lora_b.values()]


# --- fitting --------------------------------------------------------------------------------------


@REPRESENTATIONS
@pytest.mark.parametrize("rank", [2, 8])
def test_what_is_reconstructed_may_be_changed(representation: str, k: int, rank: int) -> None:
    """Whatever is done to it in place; a core of full rank has one of its factors from the basis."""
    adapters = tiny_adapters(rank=rank)
    adapters[0].extra["score.weight"] = torch.ones(2, 8)
    subspace = fitted(adapters, representation, k)
    before = {task: [t.clone() for t in all_factors(subspace, task)] for task in subspace.tasks}
    made = subspace.reconstruct("task_0")
    for tensor in (*made.lora_a.values(), *made.lora_b.values(), *made.extra.values()):
        tensor.mul_(2)
    made.metadata["target_modules"].clear()
    adapters[0].extra["score.weight"].zero_()
    for task, factors in before.items():
        assert all(map(torch.equal, all_factors(subspace, task), factors))
    again = subspace.reconstruct("task_0")
    assert torch.equal(again.extra["score.weight"], torch.ones(2, 8))
    assert again.metadata["target_modules"] == ["q_proj", "v_proj"]


@REPRESENTATIONS
def test_as_many_components_as_there_are_lose_nothing(representation: str, k: int) -> None:
    adapters = tiny_adapters()
    subspace = fitted(adapters, representation, k)
    for task, weights in zip(subspace.tasks, adapters):
        made = subspace.reconstruct(task)
        for layer in SHAPES:
            assert relative(delta_w(weights, layer), delta_w(made, layer)) < 1e-6
        assert subspace.tasks[task].origin.error < 1e-6
    assert subspace.num_components == k
    assert subspace.scales_known


@pytest.mark.parametrize("k", [1, 2])
def test_flat_components_are_those_of_the_centred_data(k: int) -> None:
    adapters = tiny_adapters(6, spread=0.4)
    subspace = fitted(adapters, k=k)
    for side, components, means, values in (
        ("a", subspace.components_a, subspace.means_a, subspace.singular_values_a),
        ("b", subspace.components_b, subspace.means_b, subspace.singular_values_b),
    ):
        for layer in SHAPES:
            data = stacked(adapters, layer, side)
            mean = data.mean(0)
            _, sigma, v = torch.linalg.svd(data - mean, full_matrices=False)
            assert torch.allclose(means[layer].double(), mean, atol=1e-6)
            assert torch.allclose(values[layer].double(), sigma[:k], rtol=1e-5)
            aligned = (components[layer].double() @ v[:k].T).abs()
            assert torch.allclose(aligned, torch.eye(k).double(), atol=1e-5)
            best = mean + (data - mean) @ v[:k].T @ v[:k]
            for place, task in enumerate(subspace.tasks):
                made = subspace.reconstruct(task)
                got = made.lora_a[layer] if side == "a" else made.lora_b[layer]
                assert torch.allclose(got.double().flatten(), best[place], atol=1e-5)


def test_joint_bases_are_the_leading_directions_and_cores_the_best_on_them() -> None:
    adapters = tiny_adapters(5, spread=0.5)
    subspace = fitted(adapters, "joint", 4)
    for layer in SHAPES:
        basis = subspace.layers[layer]
        assert isinstance(basis, JointLayer)
        updates = [delta_w(w, layer) for w in adapters]
        units = [update / update.norm() for update in updates]
        for ours, gram in (
            (basis.v.double(), sum(w.T @ w for w in units)),
            (basis.u.T.double(), sum(w @ w.T for w in units)),
        ):
            _, vectors = torch.linalg.eigh(gram)  # type: ignore[arg-type]
            leading = vectors.flip(1)[:, :4]
            assert torch.allclose(ours.T @ ours, leading @ leading.T, atol=1e-5)
        u, v = basis.u.double(), basis.v.double()
        for (task, projection), update in zip(subspace.tasks.items(), updates):
            best = u @ (u.T @ update @ v.T) @ v
            assert torch.allclose(delta_w(subspace.reconstruct(task), layer), best, atol=1e-6)
            assert torch.allclose(projection.cores[layer].double(), u.T @ update @ v.T, atol=1e-6)
        cores = [u.T @ w @ v.T for w in units]
        energy = torch.stack([core.square() / core.square().sum() for core in cores]).sum(0)
        assert torch.allclose(basis.singular_values_a.double(), energy.sum(0).sqrt(), rtol=1e-4)
        assert torch.allclose(basis.singular_values_b.double(), energy.sum(1).sqrt(), rtol=1e-4)


@REPRESENTATIONS
@pytest.mark.parametrize("options", [{"alpha": 7}, {"alpha": 16, "use_rslora": True}])
def test_updates_are_those_that_peft_adds(
    representation: str, k: int, options: dict[str, Any], tmp_path: Path
) -> None:
    adapters = tiny_adapters(**options)
    folders = save_tiny_adapters(tmp_path, adapters)
    subspace = init_subspace(folders, num_components=k, representation=representation)
    model = peft.PeftModel.from_pretrained(TinyModel(), folders[1])
    made = extract_adapter(subspace, "task_1", tmp_path / "made")
    again = peft.PeftModel.from_pretrained(TinyModel(), str(tmp_path / "made"))
    for layer in SHAPES:
        modules = (m.get_submodule(f"base_model.model.{layer}") for m in (model, again))
        wanted, exported = (m.get_delta_weight("default").detach() for m in modules)
        assert torch.allclose(wanted.double(), delta_w(made, layer), atol=1e-6)
        assert torch.allclose(wanted, exported, atol=1e-6)


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_errors_are_measured(representation: str) -> None:
    adapters = tiny_adapters(spread=0.5)
    subspace = fitted(adapters, representation, 2)
    for task, weights in zip(subspace.tasks, adapters):
        origin = subspace.tasks[task].origin
        assert origin.error == pytest.approx(task_error(subspace, task, weights), rel=1e-4)
        made = subspace.reconstruct(task)
        for layer in SHAPES:
            expected = relative(delta_w(weights, layer), delta_w(made, layer))
            assert origin.errors[layer] == pytest.approx(expected, rel=1e-4)


def test_mixed_ranks_are_refused_by_flat_and_normal_for_joint() -> None:
    adapters = [tiny_weights(0), tiny_weights(1, rank=4), tiny_weights(2, rank=1)]
    with pytest.raises(AdapterError, match=r"rank 2 in task 'a' and rank 4 in task 'b'.*joint"):
        fitted(adapters, k=1, task_ids=["a", "b", "c"])
    subspace = fitted(adapters, "joint", 7)
    assert subspace.rank == 4
    for (task, weights), rank in zip(zip(subspace.tasks, adapters), (2, 4, 1)):
        assert task_error(subspace, task, weights) < 1e-6
        assert subspace.reconstruct(task).rank == rank


def test_a_layer_may_have_a_rank_of_its_own_in_flat() -> None:
    def weights(seed: int) -> LoRAWeights:
        small, large = tiny_weights(seed), tiny_weights(seed, rank=3)
        return LoRAWeights(
            [Q, V],
            {Q: small.lora_a[Q], V: large.lora_a[V]},
            {Q: small.lora_b[Q], V: large.lora_b[V]},
            3,
            tiny_config(2, rank_pattern={"v_proj": 3}),
        )

    adapters = [weights(seed) for seed in range(4)]
    subspace = fitted(adapters, k=3)
    made = subspace.reconstruct("task_2")
    assert task_error(subspace, "task_2", adapters[2]) < 1e-6
    assert (made.lora_a[Q].shape[0], made.lora_a[V].shape[0], made.rank) == (2, 3, 3)
    assert made.scale(Q) == made.scale(V) == 1.0


# --- how many components --------------------------------------------------------------------------


@pytest.mark.parametrize(("representation", "most"), [("flat", 3), ("joint", 8)])
def test_where_there_are_fewer_components_than_asked_for_all_are_kept(
    representation: str, most: int
) -> None:
    adapters = tiny_adapters(6)
    with pytest.warns(UserWarning, match=f"num_components is 16, but there are only {most} "):
        subspace = fitted(adapters[:4], representation, 16)
    assert max(subspace.layers[Q].widths) == most
    # What was asked for holds for what comes.
    subspace.absorb(adapters[4], "task_4")
    subspace.absorb_incremental(adapters[5], "task_5")
    for task, weights in zip(subspace.tasks, adapters, strict=True):
        assert task_error(subspace, task, weights) < 1e-5
    with pytest.raises(OptionError, match="at least 1"):
        fitted(tiny_adapters(), representation, 0)


def test_a_k_that_nobody_gave_is_not_silent_about_what_it_loses(tmp_path: Path) -> None:
    adapters = tiny_adapters(6)
    lost = r"Predicted to lose more than 5% .*: task_\d \d+%.*; give"
    with pytest.warns(UserWarning, match=lost + " num_components, or a variance_threshold"):
        fitted(adapters)
    folders = save_tiny_adapters(tmp_path, adapters)
    with pytest.warns(UserWarning, match=lost + " a larger num_components"):
        SharedSubspace.from_adapters_streaming(folders)
    for absorb in ("absorb", "absorb_incremental"):
        subspace = fitted(adapters[:4], k=3)
        with pytest.warns(UserWarning, match=lost + " a larger num_components") as caught:
            getattr(subspace, absorb)(adapters[4], "task_4")
        assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    with pytest.warns(UserWarning, match=r": new \d+%; absorb\(\) the adapter"):
        fitted(adapters[:4], k=3).project(adapters[5], "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = fitted(adapters, variance_threshold=1.0)
        whole.project(adapters[0], "again")
        fitted(adapters, k=2)
        fitted(adapters[:4], k=3).absorb(adapters[4], "new", num_components=3)


@pytest.mark.parametrize("representation", ["flat", "joint"])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_the_variance_threshold_chooses_the_least_k(representation: str, threshold: float) -> None:
    adapters = tiny_adapters(6, spread=0.5)
    full = fitted(adapters, representation, 5 if representation == "flat" else 12)
    chosen = fitted(adapters, representation, variance_threshold=threshold)
    own = fitted(adapters, representation, variance_threshold=threshold, adaptive_k=True)
    needed = {}
    for layer in SHAPES:
        for side, values in (
            ("a", full.singular_values_a[layer]),
            ("b", full.singular_values_b[layer]),
        ):
            shares = values.double().square().cumsum(0) / values.double().square().sum()
            needed[layer, side] = int((shares < threshold - 1e-6).sum()) + 1
    assert chosen.num_components == max(needed.values())
    widths = own.compression_stats()["components_per_layer"]
    assert {(n, s): k for n, pair in widths.items() for s, k in zip("ab", pair)} == needed
    assert own.adaptive_k
    assert own.num_components == max(needed.values())


def test_num_components_is_the_most_that_adaptive_k_takes() -> None:
    subspace = fitted(tiny_adapters(6), k=2, adaptive_k=True, variance_threshold=0.99)
    assert subspace.num_components == 2


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(OptionError, match="variance_threshold"):
        fitted(tiny_adapters(), variance_threshold=threshold)


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_one_adapter_is_a_subspace_too(representation: str, tmp_path: Path) -> None:
    weights = tiny_weights(0)
    subspace = fitted([weights], representation, 1 if representation == "flat" else 2)
    assert task_error(subspace, "task_0", weights) < 1e-6
    again = SharedSubspace.load(subspace.save(tmp_path / "one"))
    assert task_error(again, "task_0", weights) < 1e-6


@REPRESENTATIONS
def test_adapters_without_an_update_and_copies_are_normal_input(
    representation: str, k: int, tmp_path: Path
) -> None:
    fresh = tiny_weights(3)
    fresh.lora_b = {name: torch.zeros_like(b) for name, b in fresh.lora_b.items()}
    adapters = [tiny_weights(0), tiny_weights(0), fresh, tiny_weights(1)]
    subspace = fitted(adapters, representation, k)
    for kept in (subspace, SharedSubspace.load(subspace.save(tmp_path / "out"))):
        for task, weights in zip(kept.tasks, adapters):
            for layer in SHAPES:
                made = delta_w(kept.reconstruct(task), layer)
                assert torch.allclose(made, delta_w(weights, layer), atol=1e-5)


def untrained(weights: LoRAWeights, *layers: str) -> LoRAWeights:
    """With B zero in these layers, as it is before training."""
    for layer in layers:
        weights.lora_b[layer] = torch.zeros_like(weights.lora_b[layer])
    return weights


@pytest.mark.parametrize("zero", [[Q, V], [V]])
@REPRESENTATIONS
def test_an_update_of_zero_stays_one(
    representation: str, k: int, zero: list[str], tmp_path: Path
) -> None:
    """Also where the nearest point that flat components hold is another: it was stored, as exact."""
    adapters = [*tiny_adapters(5), untrained(tiny_weights(5), *zero)]
    subspace = fitted(adapters, representation, k)
    again = SharedSubspace.load(subspace.save(tmp_path / "out"))
    projected = fitted(adapters[:5], representation, k)
    projected.add_task(projected.project(adapters[5], "task_5", warn_threshold=0.0))
    absorbed = fitted(adapters[:5], representation, k)
    absorbed.absorb_incremental(adapters[5], "task_5", num_components=k)
    # What is absorbed later leaves it alone.
    absorbed.absorb(tiny_weights(6), "later", num_components=k)
    rounded = SharedSubspace.load(tmp_path / "out").to(dtype=torch.bfloat16)
    for kept in (subspace, again, projected, absorbed, rounded):
        made = kept.reconstruct("task_5")
        for layer in zero:
            assert layer not in made.layer_names or not delta_w(made, layer).any()
        saved = Checkpoint.open(kept.save(tmp_path / "saved", force=True, allow_large_error=True))
        exported = load_adapter(export_task(saved, "task_5", tmp_path / "adapter", force=True))
        for layer in set(zero) & set(exported.layer_names):
            assert not delta_w(exported, layer).any()
    for kept in (subspace, again):
        lost = task_error(kept, "task_5", adapters[5]) if V not in zero or Q not in zero else 0.0
        assert kept.tasks["task_5"].origin.error == pytest.approx(lost, abs=1e-5)
    model = VLoRAModel(TinyModel(), again)
    model.set_task("task_5")
    if Q in zero:
        assert torch.equal(model(torch.ones(3, 12)), TinyModel()(torch.ones(3, 12)))
        assert again.compression_stats()["num_tasks"] == 6


def test_flat_tasks_that_change_nothing_are_read(tmp_path: Path) -> None:
    """``compress`` gives them the scale zero, whatever scale the others have."""
    adapters = [*tiny_adapters(3), untrained(tiny_weights(3), Q, V), untrained(tiny_weights(4), Q)]
    folders = save_tiny_adapters(tmp_path, adapters)
    named = {Path(folder).name: open_adapter(folder) for folder in folders}
    options = CompressOptions(representation="flat", num_components=4)
    compress(named, tmp_path / "out", options)
    subspace = SharedSubspace.load(tmp_path / "out")
    assert not any(delta_w(subspace.reconstruct("task_3"), layer).any() for layer in SHAPES)
    for task, weights in zip(subspace.tasks, adapters):
        made = subspace.reconstruct(task)
        for layer in made.layer_names:
            assert torch.allclose(delta_w(made, layer), delta_w(weights, layer), atol=1e-5)


def test_a_task_that_changes_no_layer_is_not_trained() -> None:
    subspace = fitted([*tiny_adapters(4), untrained(tiny_weights(4), Q, V)], k=2)
    with pytest.raises(OptionError, match="orthogonal_init"):
        SubspaceTrainer(subspace, "task_4")


# --- streaming ------------------------------------------------------------------------------------


@REPRESENTATIONS
def test_streaming_gives_the_same_as_all_at_once(
    representation: str, k: int, tmp_path: Path
) -> None:
    adapters = tiny_adapters(12, spread=0.3)
    folders = save_tiny_adapters(tmp_path, adapters)
    k = k // 2
    streamed = SharedSubspace.from_adapters_streaming(
        folders, num_components=k, representation=representation
    )
    whole = fitted(adapters, representation, k)
    assert list(streamed.tasks) == [Path(folder).name for folder in folders]
    for task, weights in zip(whole.tasks, adapters):
        ours, theirs = (task_error(s, task, weights) for s in (streamed, whole))
        # Twelve adapters take the randomised method for flat; it is as good as exact here.
        assert ours == pytest.approx(theirs, abs=2e-3)


def test_streaming_does_not_depend_on_the_order(tmp_path: Path) -> None:
    adapters = tiny_adapters(14, spread=0.3)
    folders = save_tiny_adapters(tmp_path, adapters)
    forth = SharedSubspace.from_adapters_streaming(folders, num_components=3)
    back = SharedSubspace.from_adapters_streaming(folders[::-1], num_components=3)
    for task, weights in zip(forth.tasks, adapters):
        assert forth.tasks[task].origin.error == pytest.approx(
            back.tasks[task].origin.error, abs=5e-3
        )
        assert task_error(forth, task, weights) < 0.9


def test_streaming_takes_as_many_components_as_there_are_by_default(tmp_path: Path) -> None:
    folders = save_tiny_adapters(tmp_path, tiny_adapters(7))
    stream = SharedSubspace.from_adapters_streaming
    assert stream(folders).num_components == 4
    assert stream(folders[:3]).layers[Q].widths == (2, 2)
    with pytest.warns(UserWarning, match="there are only 2"):
        assert stream(folders[:3], num_components=4).layers[Q].widths == (2, 2)


# --- what bad input gets --------------------------------------------------------------------------


def test_a_missing_layer_is_an_error_or_no_update_or_left_out() -> None:
    whole, part = tiny_weights(0), tiny_weights(1, shapes={Q: SHAPES[Q]})
    others = [tiny_weights(2), tiny_weights(3)]
    adapters, ids = [whole, part, *others], ["whole", "part", "c", "d"]
    with pytest.raises(AdapterError, match=rf"task 'part' lacks layer '{V}'"):
        fitted(adapters, k=2, task_ids=ids)
    subspace = fitted(adapters, k=3, task_ids=ids, missing="zero")
    assert V not in subspace.tasks["part"]
    assert subspace.reconstruct("part").layer_names == [Q]
    for task, weights in zip(ids, adapters):
        assert task_error(subspace, task, weights) < 1e-6
    with pytest.warns(UserWarning, match="left out"):
        common = fitted(adapters, k=3, task_ids=ids, missing="common")
    assert common.layer_names == [Q]
    with pytest.raises(OptionError, match="missing is 'skip'"):
        fitted(adapters, k=2, missing="skip")
    foreign = tiny_weights(4, shapes={"other": (12, 8)})
    with pytest.raises(AdapterError, match="no layer in common"):
        fitted([whole, foreign], k=1, missing="common")


def test_a_layer_that_one_task_alone_has_is_kept(tmp_path: Path) -> None:
    adapters = [
        tiny_weights(0),
        tiny_weights(1, shapes={Q: SHAPES[Q]}),
        tiny_weights(2, shapes={Q: SHAPES[Q]}),
    ]
    subspace = fitted(adapters, k=2, missing="zero")
    assert task_error(subspace, "task_0", adapters[0]) < 1e-6
    again = SharedSubspace.load(subspace.save(tmp_path / "subspace"))
    assert task_error(again, "task_0", adapters[0]) < 1e-6


def test_shapes_that_contradict_each_other_are_refused() -> None:
    other = tiny_weights(1, shapes={Q: (12, 9), V: (12, 6)})
    with pytest.raises(
        AdapterError, match=rf"'{Q}' is a 8 x 12 linear in task 'task_0' and a 9 x 12"
    ):
        fitted([tiny_weights(0), other], k=1)
    subspace = fitted(tiny_adapters(), "joint", 4)
    with pytest.raises(AdapterError, match="9 x 12 in task 'new' and 8 x 12 in the subspace"):
        subspace.project(other, "new")


def test_adapters_of_other_base_models_are_named(tmp_path: Path) -> None:
    other = tiny_weights(3, base_model_name_or_path="org/other")
    folders = save_tiny_adapters(tmp_path, [*tiny_adapters(3), other])
    calls: list[Callable[[], object]] = [
        lambda: fitted([*tiny_adapters(3), other], k=2),
        lambda: SharedSubspace.from_adapters_streaming(folders, num_components=2),
        lambda: subspace.project(other, "new", warn_threshold=-9.0),
        lambda: subspace.absorb(other, "absorbed", num_components=2),
        lambda: again.absorb_incremental(folders[3], "absorbed", num_components=2),
    ]
    subspace, again = fitted(tiny_adapters(3), k=2), fitted(tiny_adapters(3), k=2)
    for call in calls:
        with pytest.warns(
            UserWarning, match="different base models: org/base, org/other"
        ) as warned:
            call()
        assert [found.filename for found in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Said once, and an adapter that names none is of any.
        subspace.absorb_incremental(other, "another", num_components=2)
        unnamed = tiny_weights(5, base_model_name_or_path=None)
        subspace.project(unnamed, "unnamed", warn_threshold=-9.0)
        fitted([*tiny_adapters(2), unnamed], k=2)


def test_task_ids_are_checked() -> None:
    adapters = tiny_adapters(2)
    with pytest.raises(TaskIdError, match="'a' is given twice"):
        fitted(adapters, k=1, task_ids=["a", "a"])
    with pytest.raises(OptionError, match="1 task id for 2 adapters"):
        fitted(adapters, k=1, task_ids=["a"])
    with pytest.raises(TaskIdError, match="empty"):
        fitted(adapters, k=1, task_ids=["a", ""])
    with pytest.raises(AdapterError, match="no adapters"):
        fitted([], k=1)
    with pytest.raises(OptionError, match="representation is 'private'"):
        fitted(adapters, "private", 1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fitted(adapters, k=1, num_component=3)


def test_errors_are_caught_as_in_code_written_for_vlora() -> None:
    subspace = fitted(tiny_adapters(), k=2)
    with pytest.raises(KeyError) as missing:
        subspace.reconstruct("nobody")
    assert str(missing.value) == (
        "the subspace has no task 'nobody'; it has: task_0, task_1, task_2, task_3"
    )
    assert isinstance(missing.value, TaskNotFoundError)
    for call in (lambda: subspace.quantize(bits=5), lambda: fitted([tiny_weights(0)], k=0)):
        with pytest.raises(ValueError, match=r"bits|num_components") as error:
            call()
        assert isinstance(error.value, VLoRAError)
    with pytest.raises(ValueError, match="task_0") as taken:
        subspace.absorb(tiny_weights(5), "task_0")
    assert isinstance(taken.value, TaskIdError)


# --- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_projecting_finds_the_nearest_point(representation: str) -> None:
    subspace = fitted(tiny_adapters(), representation, 3)
    new = tiny_weights(77)
    projection = subspace.project(new, "new")
    assert "new" not in subspace.tasks
    subspace.add_task(projection)
    assert projection.origin.error == pytest.approx(task_error(subspace, "new", new), rel=1e-4)
    for layer, basis in subspace.layers.items():
        if isinstance(basis, FlatLayer):
            for side in "ab":
                data = stacked([new], layer, side)[0]
                rows = getattr(subspace, f"components_{side}")[layer].double()
                mean = getattr(subspace, f"means_{side}")[layer].double()
                found = getattr(projection, f"loadings_{side}")[layer].double()
                best = torch.linalg.lstsq(rows.T, (data - mean)[:, None]).solution[:, 0]
                assert torch.allclose(found, best, atol=1e-5)
        else:
            lost = delta_w(subspace.reconstruct("new"), layer) - delta_w(new, layer)
            assert float((basis.u.T.double() @ lost @ basis.v.T.double()).abs().max()) < 1e-6


def test_a_poor_projection_is_warned_of() -> None:
    subspace = fitted(tiny_adapters(), k=2)
    with pytest.warns(UserWarning, match=r"holds \d+\.\d% of adapter 'new'; absorb"):
        subspace.project(tiny_weights(77), "new", warn_threshold=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(tiny_adapters(), k=3).project(tiny_weights(0), "known", warn_threshold=0.99)


def test_what_does_not_fit_the_subspace_is_not_projected() -> None:
    subspace = fitted(tiny_adapters(), k=2)
    with pytest.raises(AdapterError, match=r"rank 4 in task 'new', and the flat subspace holds"):
        subspace.project(tiny_weights(9, rank=4), "new")
    part = tiny_weights(9, shapes={Q: SHAPES[Q]})
    with pytest.raises(AdapterError, match="'new' lacks layer"):
        subspace.project(part, "new")
    assert list(subspace.project(part, "new", missing="zero").loadings_a) == [Q]
    more = tiny_weights(9, shapes={**SHAPES, "o_proj": (4, 4)})
    with pytest.raises(AdapterError, match="'o_proj', which the subspace lacks"):
        subspace.project(more, "new", missing="zero")
    with pytest.warns(UserWarning, match="o_proj"):
        kept = subspace.project(more, "new", missing="common")
    assert sorted(kept.loadings_a) == sorted(SHAPES)
    with pytest.raises(AdapterError, match="no layer in common"):
        subspace.project(tiny_weights(9, shapes={"x": (4, 4)}), "new", missing="common")


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_tasks_are_added_replaced_and_removed(representation: str) -> None:
    subspace = fitted(tiny_adapters(), representation, 2)
    projection = subspace.project(tiny_weights(8), "task_0")
    with pytest.raises(TaskIdError, match="'task_0' exists"):
        subspace.add_task(projection)
    subspace.add_task(projection, replace=True)
    assert torch.equal(subspace.tasks["task_0"].loadings_a[Q], projection.loadings_a[Q])
    subspace.remove_task("task_0")
    assert list(subspace.tasks) == ["task_1", "task_2", "task_3"]
    with pytest.raises(TaskNotFoundError, match="'task_0'"):
        subspace.remove_task("task_0")
    wrong = TaskProjection("x", {Q: torch.zeros(7)}, {Q: torch.zeros(7)})
    with pytest.raises(OptionError, match="loadings have the shapes"):
        subspace.add_task(wrong)
    with pytest.raises(OptionError, match="'other', which the subspace lacks"):
        subspace.add_task(TaskProjection("x", {"other": torch.zeros(2)}, {}))
    bad = subspace.project(tiny_weights(8), "x")
    bad.loadings_a[Q] = bad.loadings_a[Q] * float("nan")
    with pytest.raises(OptionError, match="NaN"):
        subspace.add_task(bad)


CHANGES: dict[str, Callable[[SharedSubspace, LoRAWeights], object]] = {
    "absorb": lambda subspace, new: subspace.absorb(new, "new"),
    "absorb_incremental": lambda subspace, new: subspace.absorb_incremental(new, "new"),
    "quantize": lambda subspace, _: subspace.quantize(),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", CHANGES)
@REPRESENTATIONS
def test_loadings_of_a_basis_that_was_changed_are_refused(
    representation: str, k: int, how: str
) -> None:
    """Their shapes are the same, and what they mean is another update."""
    adapters = tiny_adapters(6)
    subspace = fitted(adapters[:4], representation, k)
    held = [
        subspace.project(adapters[5], "late"),
        TaskRouter.from_subspace(subspace, 4).blend_loadings(torch.ones(1, 4), subspace),
    ]
    if representation == "joint":
        held.append(blend_tasks(subspace, {"task_0": 0.5, "task_1": 0.5}, "blend"))
    params = subspace.get_trainable_params("task_0")
    trainer = SubspaceTrainer(subspace, "task_0")
    CHANGES[how](subspace, adapters[4])
    before = all_factors(subspace, "task_0")
    for projection in held:
        with pytest.raises(OptionError, match=f"'{projection.task_id}'.* again"):
            subspace.add_task(projection)
    subspace.tasks["by hand"] = held[0]
    with pytest.raises(OptionError, match="again"):
        subspace.reconstruct("by hand")
    with pytest.raises(OptionError, match=r"'task_0'.* again"):
        subspace.update_task("task_0", params)
    with pytest.raises(OptionError, match=r"'task_0'.* again"):
        trainer.write_back()
    assert all(map(torch.equal, all_factors(subspace, "task_0"), before))
    subspace.add_task(subspace.project(adapters[5], "late"))
    subspace.update_task("task_0", subspace.get_trainable_params("task_0"))


@REPRESENTATIONS
def test_loadings_stay_good_where_the_basis_stays(
    representation: str, k: int, tmp_path: Path
) -> None:
    """In memory or saved and read again, and in another dtype."""
    adapters = tiny_adapters(5)
    subspace = fitted(adapters[:4], representation, k)
    projection = subspace.project(adapters[4], "late", warn_threshold=0.0)
    again = SharedSubspace.load(subspace.save(tmp_path / "out"))
    again.add_task(projection)
    params = again.get_trainable_params("late")
    again.to(dtype=torch.bfloat16).update_task("late", params)
    again.remove_task("late")
    again.add_task(projection)


def test_a_task_set_by_hand_is_reconstructed() -> None:
    subspace = fitted(tiny_adapters(), "joint", 8)
    first, second = subspace.tasks["task_0"], subspace.tasks["task_1"]
    mixed = {n: 0.3 * first.cores[n] + 0.7 * second.cores[n] for n in SHAPES}
    subspace.tasks["__routed__"] = TaskProjection("__routed__", mixed, {})
    wanted = 0.3 * delta_w(tiny_weights(0), Q) + 0.7 * delta_w(tiny_weights(1), Q)
    assert relative(wanted, delta_w(subspace.reconstruct("__routed__"), Q)) < 1e-6


@REPRESENTATIONS
def test_what_an_adapter_has_beside_its_factors_comes_along(representation: str, k: int) -> None:
    head = {"base_model.model.score.weight": torch.arange(6.0)}
    adapters = []
    for seed in range(4):
        plain = tiny_weights(seed, task_type="CAUSAL_LM", modules_to_save=["score"])
        adapters.append(
            LoRAWeights(
                plain.layer_names,
                plain.lora_a,
                plain.lora_b,
                2,
                plain.metadata,
                {V: "embedding"},
                {name: seed * tensor for name, tensor in head.items()},
            )
        )
    made = fitted(adapters, representation, k).reconstruct("task_3")
    assert made.metadata["base_model_name_or_path"] == "org/base"
    assert made.metadata["target_modules"] == ["q_proj", "v_proj"]
    assert made.metadata["task_type"] == "CAUSAL_LM"
    assert made.metadata["r"] == made.metadata["lora_alpha"] == 2
    assert made.kinds == {V: "embedding"}
    assert torch.equal(made.extra["base_model.model.score.weight"], 3 * torch.arange(6.0))


def test_vlora_layouts_are_its_own() -> None:
    adapters = tiny_adapters()
    subspace = fitted(adapters, k=3)
    task = subspace.tasks["task_2"]
    for layer, (d_in, d_out) in SHAPES.items():
        a = subspace.means_a[layer] + task.loadings_a[layer] @ subspace.components_a[layer]
        b = subspace.means_b[layer] + task.loadings_b[layer] @ subspace.components_b[layer]
        assert torch.allclose(a.view(2, d_in), adapters[2].lora_a[layer], atol=1e-5)
        assert torch.allclose(b.view(d_out, 2), 2 * adapters[2].lora_b[layer], atol=1e-5)
    with pytest.raises(OptionError, match="joint"):
        _ = fitted(adapters, "joint", 4).components_a
    with pytest.raises(OptionError, match="flat"):
        _ = task.cores


# --- absorbing ------------------------------------------------------------------------------------

ABSORB = pytest.mark.parametrize("method", ["absorb", "absorb_incremental"])


@ABSORB
@pytest.mark.parametrize(("representation", "before", "after"), [("flat", 2, 3), ("joint", 6, 8)])
def test_absorbing_with_room_loses_nothing(
    method: str, representation: str, before: int, after: int
) -> None:
    adapters = tiny_adapters()
    subspace = fitted(adapters[:3], representation, before)
    getattr(subspace, method)(adapters[3], "task_3", num_components=after)
    assert subspace.num_components == after
    for task, weights in zip(subspace.tasks, adapters):
        assert task_error(subspace, task, weights) < 1e-5
        assert subspace.tasks[task].origin.error < 1e-5


@pytest.mark.parametrize("representation", ["flat", "joint"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_absorbing_incrementally_is_absorbing(representation: str, adaptive: bool) -> None:
    adapters = tiny_adapters(6, spread=0.5)

    def absorbed(method: str) -> SharedSubspace:
        k = None if adaptive else 3
        subspace = fitted(
            adapters[:4], representation, k, adaptive_k=adaptive, variance_threshold=0.8
        )
        for place in (4, 5):
            getattr(subspace, method)(adapters[place], f"task_{place}")
        return subspace

    whole, grown = absorbed("absorb"), absorbed("absorb_incremental")
    assert whole.num_components == grown.num_components
    for task, weights in zip(whole.tasks, adapters):
        for ours, theirs in zip(all_factors(grown, task), all_factors(whole, task)):
            if representation == "flat":
                assert torch.allclose(ours, theirs, atol=2e-4)
        for layer in SHAPES:
            ours, theirs = (delta_w(s.reconstruct(task), layer) for s in (grown, whole))
            assert torch.allclose(ours, theirs, atol=2e-4)
        for subspace in (whole, grown):
            bound = subspace.tasks[task].origin.error
            assert task_error(subspace, task, weights) <= bound * (1 + 1e-4) + 1e-6
    for layer in SHAPES:
        for side in "ab":
            ours, theirs = (getattr(s, f"singular_values_{side}")[layer] for s in (grown, whole))
            assert torch.allclose(ours, theirs, atol=2e-2)


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_tasks_refitted_to_their_originals_do_not_drift(representation: str) -> None:
    adapters = tiny_adapters(6, spread=0.5)
    originals = {f"task_{i}": weights for i, weights in enumerate(adapters)}
    subspace = fitted(adapters[:4], representation, 2)
    for place in (4, 5):
        known = {task: originals[task] for task in subspace.tasks}
        subspace.absorb(adapters[place], f"task_{place}", originals=known)
    afresh = fitted(adapters, representation, 2)
    for task in afresh.tasks:
        assert subspace.tasks[task].origin.error == pytest.approx(
            afresh.tasks[task].origin.error, rel=1e-3
        )
    with pytest.raises(TaskNotFoundError, match="'nobody'"):
        subspace.absorb(tiny_weights(9), "x", originals={"nobody": adapters[0]})


@ABSORB
def test_absorbing_follows_the_rule_for_missing_layers(method: str) -> None:
    part = tiny_weights(8, shapes={Q: SHAPES[Q]})
    more = tiny_weights(9, shapes={**SHAPES, "o_proj": (4, 4)})

    def absorb(weights: LoRAWeights, **options: Any) -> SharedSubspace:
        subspace = fitted(tiny_adapters(3), k=2)
        getattr(subspace, method)(weights, "new", num_components=3, **options)
        return subspace

    for weights in (part, more):
        with pytest.raises(AdapterError, match="layer"):
            absorb(weights)
        grown = absorb(weights, missing="zero")
        assert task_error(grown, "new", weights) < 1e-5
        assert task_error(grown, "task_0", tiny_weights(0)) < 1e-5
    assert grown.layer_names == sorted([*SHAPES, "o_proj"])
    with pytest.warns(UserWarning, match="left out"):
        assert absorb(part, missing="common").layer_names == [Q]
    with pytest.raises(TaskIdError, match="exists"):
        getattr(grown, method)(tiny_weights(1), "task_0")
    with pytest.raises(AdapterError, match="rank"):
        absorb(tiny_weights(3, rank=3))


def test_a_quantised_subspace_is_refitted_and_not_grown() -> None:
    subspace = fitted(tiny_adapters(3), k=2).quantize()
    with pytest.raises(OptionError, match="quantised"):
        subspace.absorb_incremental(tiny_weights(3), "task_3")
    subspace.absorb(tiny_weights(3), "task_3")
    assert subspace.quantization is None


def test_absorbing_keeps_dtype_and_origins() -> None:
    subspace = fitted(tiny_adapters(3), "joint", 6).to(dtype=torch.bfloat16)
    for method in ("absorb", "absorb_incremental"):
        getattr(subspace, method)(tiny_weights(3), method)
        assert {layer.dtype for layer in subspace.layers.values()} == {torch.bfloat16}
        assert subspace.tasks["task_1"].loadings_a[Q].dtype == torch.bfloat16
        assert subspace.tasks["task_1"].origin.metadata == tiny_config()
        assert task_error(subspace, "task_1", tiny_weights(1)) < 0.6


def test_the_pipeline_goes_from_folders_to_folders(tmp_path: Path) -> None:
    adapters = tiny_adapters()
    folders = save_tiny_adapters(tmp_path, adapters)
    subspace = init_subspace(folders[:3], ["a", "b", "c"], num_components=2)
    assert subspace.tasks["a"].origin.source == folders[0]
    absorb_task(subspace, folders[3], "d")
    weights = extract_adapter(subspace, "d", tmp_path / "d")
    assert torch.equal(load_adapter(tmp_path / "d").lora_a[Q], weights.lora_a[Q])
    with pytest.raises(OutputError, match=r"force|exists"):
        extract_adapter(subspace, "d", tmp_path / "d")
    extract_adapter(subspace, "a", tmp_path / "d", force=True)
    opened = SharedSubspace.from_adapters([open_adapter(f) for f in folders], num_components=3)
    assert task_error(opened, "task_2", adapters[2]) < 1e-6


@REPRESENTATIONS
def test_an_extracted_adapter_is_of_new_factors_for_peft_too(
    representation: str, k: int, tmp_path: Path
) -> None:
    """As an exported one: "orthogonal" begins with no odd rank, and there is no bias."""
    options = {"init_lora_weights": "orthogonal", "bias": "lora_only"}
    subspace = fitted(tiny_adapters(rank=3, **options), representation, k)
    extract_adapter(subspace, "task_1", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["bias"]) == (True, "none")
    peft.PeftModel.from_pretrained(TinyModel(), str(tmp_path / "out"))
    assert "eva_config" not in config


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_loadings_are_trained_and_put_back(representation: str) -> None:
    subspace = fitted(tiny_adapters(), representation, 3)
    before = all_factors(subspace, "task_1")
    params = subspace.get_trainable_params("task_0")
    names = {"flat": ("loadings_a", "loadings_b"), "joint": ("core",)}[representation]
    assert set(params) == {f"{layer}.{name}" for layer in SHAPES for name in names}
    pair = [params[f"{Q}.{name}"] for name in names]
    loadings = (pair[0], pair[1] if len(pair) > 1 else None)
    a, b = subspace.layers[Q].factors(loadings)
    (b @ a).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in pair)
    untouched = subspace.tasks["task_0"].loadings_a[Q].clone()
    with torch.no_grad():
        pair[0].add_(1.0)
    assert torch.equal(subspace.tasks["task_0"].loadings_a[Q], untouched)
    subspace.update_task("task_0", params)
    assert torch.allclose(subspace.tasks["task_0"].loadings_a[Q], untouched + 1)
    assert subspace.tasks["task_0"].origin.error == 0.0
    assert subspace.tasks["task_0"].origin.metadata["lora_alpha"] == 4
    assert all(torch.equal(x, y) for x, y in zip(before, all_factors(subspace, "task_1")))
    with pytest.raises(OptionError, match="is missing or no parameter"):
        subspace.update_task("task_0", {**params, "odd": pair[0]})
    with pytest.raises(TaskNotFoundError):
        subspace.get_trainable_params("nobody")


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_expanding_leaves_every_task_as_it_is(representation: str) -> None:
    subspace = fitted(tiny_adapters(), representation, 2)
    before = {task: subspace.reconstruct(task) for task in subspace.tasks}
    old = subspace.layers[Q]
    params = subspace.get_trainable_params("task_0", num_expand=3)
    assert subspace.num_components == 5
    for task, weights in before.items():
        for name in SHAPES:
            after = delta_w(subspace.reconstruct(task), name)
            assert torch.allclose(delta_w(weights, name), after, atol=1e-6)
    layer = subspace.layers[Q]
    if isinstance(layer, FlatLayer) and isinstance(old, FlatLayer):
        rows = layer.components_a.flatten(1)
        assert torch.equal(layer.components_a[:2], old.components_a)
        assert params[f"{Q}.loadings_b"].shape == (5,)
    else:
        assert isinstance(layer, JointLayer)
        rows = layer.v
        assert params[f"{Q}.core"].shape == (5, 5)
    assert torch.allclose(rows @ rows.T, torch.eye(5), atol=1e-5)
    with pytest.raises(OptionError, match="room"):
        subspace.get_trainable_params("task_0", num_expand=50)
    with pytest.raises(OptionError, match="negative"):
        subspace.get_trainable_params("task_0", num_expand=-1)
    with pytest.raises(OptionError, match="quantised"):
        subspace.quantize().get_trainable_params("task_0", num_expand=1)


def test_a_blend_that_requires_gradients_is_reconstructed_with_them() -> None:
    for representation in ("flat", "joint"):
        subspace = fitted(tiny_adapters(), representation, 3)
        weight = torch.tensor(0.5, requires_grad=True)
        task = subspace.tasks["task_0"]
        subspace.tasks["blend"] = TaskProjection(
            "blend",
            {n: weight * t for n, t in task.loadings_a.items()},
            {n: weight * t for n, t in task.loadings_b.items()},
        )
        made = subspace.reconstruct("blend")
        (made.lora_b[Q] @ made.lora_a[Q]).sum().backward()
        assert weight.grad is not None
        assert float(weight.grad) != 0.0


# --- quantising -----------------------------------------------------------------------------------

WIDE = {"q": (130, 70), "v": (64, 128)}


def wide_adapters(count: int = 5) -> list[LoRAWeights]:
    return tiny_adapters(count, shapes=WIDE, rank=4, spread=0.3, target_modules=["q", "v"])


@pytest.mark.parametrize("representation", ["flat", "joint"])
@pytest.mark.parametrize(
    ("options", "format", "limit"),
    [
        ({"bits": 8}, "int8", 0.02),
        ({"bits": 4}, "int4", 0.35),
        ({"method": "nf4"}, "nf4", 0.25),
        ({"method": "nf4", "double_quant": True}, "nf4-dq", 0.25),
    ],
)
@pytest.mark.parametrize("loadings", [False, True])
def test_quantising(
    representation: str, options: dict[str, Any], format: str, limit: float, loadings: bool
) -> None:
    adapters = wide_adapters()
    subspace = fitted(adapters, representation, 4 if representation == "flat" else 20)
    assert subspace.quantize(**options, quantize_loadings=loadings) is subspace
    assert subspace.quantization == format
    for task, weights in zip(subspace.tasks, adapters):
        error = task_error(subspace, task, weights)
        assert 1e-4 < error < limit * (1.6 if loadings else 1)
        if not loadings:
            assert error <= subspace.tasks[task].origin.error * (1 + 1e-3)
    for again in ({}, {"method": "nf4"}):
        with pytest.raises(OptionError, match=f"already .{format}"):
            subspace.quantize(**again)


def test_rows_on_a_grid_of_four_bits() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows[1] = 0
    rounded = round_rows(rows, 4)
    for row, got in zip(rows, rounded):
        step = float(row.abs().max()) / 7
        assert len(got.unique()) <= 15
        assert float((row - got).abs().max()) <= step / 2 + 1e-6
        if step:
            assert torch.allclose(got / step, (got / step).round(), atol=1e-4)


def test_loadings_are_fitted_to_the_quantised_basis() -> None:
    adapters = wide_adapters()
    subspace = fitted(adapters, "joint", 20)
    cores = {task: dict(p.cores) for task, p in subspace.tasks.items()}
    subspace.quantize(method="nf4")
    refitted = [task_error(subspace, task, w) for task, w in zip(cores, adapters)]
    for task, kept in cores.items():
        subspace.tasks[task] = TaskProjection(task, kept, {})
    stale = [task_error(subspace, task, w) for task, w in zip(cores, adapters)]
    assert all(new < 0.99 * old for new, old in zip(refitted, stale))


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_what_is_refused_leaves_the_subspace_as_it_was(representation: str) -> None:
    subspace = fitted(tiny_adapters(), representation, 2)
    good = subspace.tasks["task_3"]
    subspace.tasks["task_3"] = TaskProjection("task_3", {Q: torch.ones(7, 7)}, {})
    layers, tasks = dict(subspace.layers), dict(subspace.tasks)
    for change in (
        lambda: subspace.quantize(),
        lambda: subspace.to(dtype=torch.bfloat16),
        lambda: subspace.get_trainable_params("task_3"),
        lambda: subspace.absorb(tiny_weights(7), "new"),
        lambda: subspace.absorb_incremental(tiny_weights(7), "new"),
    ):
        with pytest.raises(OptionError, match="'task_3'"):
            change()
        assert subspace.quantization is None
        assert (subspace.layers, subspace.tasks) == (layers, tasks)
    subspace.tasks["task_3"] = good
    assert subspace.quantize().to(dtype=torch.bfloat16).quantization == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"method": "fp4"}, "method is 'fp4'"),
        ({"method": "nf4", "block_size": 32}, "blocks of 64"),
        ({"double_quant": True}, "double_quant is for"),
    ],
)
def test_quantising_with_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    subspace = fitted(tiny_adapters(), k=2)
    with pytest.raises(OptionError, match=message):
        subspace.quantize(**options)
    assert subspace.quantization is None


# --- elsewhere, sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_moving_moves_everything(representation: str) -> None:
    subspace = fitted(tiny_adapters(), representation, 2)
    assert subspace.to(dtype=torch.float16) is subspace
    task = subspace.tasks["task_0"]
    tensors = [*subspace.reconstruct("task_0").lora_a.values(), *task.loadings_a.values()]
    assert {t.dtype for t in tensors} == {torch.float16}
    subspace.add_task(subspace.project(tiny_weights(5), "new"))
    assert subspace.tasks["new"].loadings_a[Q].dtype == torch.float16
    with pytest.raises(OptionError, match="floating-point"):
        subspace.to(dtype=torch.int8)


@pytest.mark.parametrize("representation", ["flat", "joint"])
@pytest.mark.parametrize("quantised", [False, True])
def test_sizes_are_those_of_the_files(representation: str, quantised: bool, tmp_path: Path) -> None:
    adapters = wide_adapters()
    subspace = fitted(adapters, representation, 4)
    if quantised:
        subspace.quantize(method="nf4", quantize_loadings=True)
    path = subspace.save(tmp_path / "out")
    files = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    stats = subspace.compression_stats()
    assert stats["total_bytes_compressed"] == files
    weights = sum(t.numel() for w in adapters for t in (*w.lora_a.values(), *w.lora_b.values()))
    assert stats["total_bytes_original"] == 2 * weights
    assert stats["total_params_original"] == weights
    assert stats["compression_ratio"] == pytest.approx(2 * weights / files)
    assert (stats["num_tasks"], stats["num_layers"]) == (5, 2)
    assert stats["components_per_layer"] == {"q": (4, 4), "v": (4, 4)}
    shared = (
        5 * 4 * (130 + 70 + 64 + 128) if representation == "flat" else 4 * (130 + 70 + 64 + 128)
    )
    own = 5 * 2 * (8 if representation == "flat" else 16)
    assert stats["total_params_compressed"] == shared + own


def test_the_full_stack() -> None:
    subspace = fitted(tiny_adapters(), k=2)
    stats = subspace.compression_stats()
    assert subspace.full_stack_compression() == {
        "adapter": stats,
        "adapter_bytes_compressed": stats["total_bytes_compressed"],
        "adapter_bytes_original": stats["total_bytes_original"],
    }
    full = subspace.full_stack_compression(7_000_000_000)
    assert full["base_model"] == {
        "params": 7_000_000_000,
        "original_bytes": 14e9,
        "quantized_bytes": 3.5e9,
        "compression_ratio": 4.0,
    }
    assert full["total_original_bytes"] == 14e9 + stats["total_bytes_original"]
    assert full["total_compression_ratio"] == pytest.approx(
        full["total_original_bytes"] / full["total_compressed_bytes"]
    )
    with pytest.raises(OptionError, match="positive"):
        subspace.full_stack_compression(7, quantized_bits=0)


# --- adapters in memory ---------------------------------------------------------------------------


def test_an_adapter_goes_to_disk_and_back(tmp_path: Path) -> None:
    weights = tiny_weights(0, dtype=torch.bfloat16)
    weights.extra["base_model.model.score.weight"] = torch.ones(3)
    weights.metadata["modules_to_save"] = {"score"}
    again = load_adapter(save_adapter(weights, tmp_path / "a"))
    assert again.layer_names == weights.layer_names
    assert all(torch.equal(again.lora_b[n], weights.lora_b[n]) for n in SHAPES)
    assert again.metadata == {**tiny_config(), "modules_to_save": ["score"]}
    assert torch.equal(again.extra["base_model.model.score.weight"], torch.ones(3))
    with pytest.raises(OutputError):
        save_adapter(weights, tmp_path / "a")


def _without_metadata() -> LoRAWeights:
    weights = tiny_weights(0)
    weights.metadata = {}
    return weights


def _mixed(**options: Any) -> LoRAWeights:
    """A short name that is the end of a longer one, and ranks that no pattern describes."""
    shapes = {"layers.0.q_proj": 2, "layers.0.v_proj": 2, "wide.layers.0.q_proj": 4, "q_proj": 4}
    a = {name: torch.randn(rank, 6) for name, rank in shapes.items()}
    b = {name: torch.randn(5, rank) for name, rank in shapes.items()}
    return LoRAWeights(list(shapes), a, b, 4, tiny_config(8, **options) if options else {})


@pytest.mark.parametrize(
    "make",
    [
        _without_metadata,
        _mixed,
        lambda: _mixed(alpha=16),
        lambda: _mixed(alpha=16, use_rslora=True),
        lambda: _mixed(alpha=16, alpha_pattern={"v_proj": 3}),
        lambda: tiny_weights(0, target_modules=["k_proj"]),
        lambda: tiny_weights(0, layers_to_transform=[7]),
        lambda: tiny_weights(0, exclude_modules=["v_proj"]),
        lambda: tiny_weights(0, target_modules=r".*\.(k|q)_proj"),
        lambda: tiny_weights(0, target_modules=r".*\.(v|q)_proj"),
        lambda: tiny_weights(0, target_modules="all-linear"),
    ],
)
def test_a_saved_config_gives_the_scales_of_the_weights(
    make: Callable[[], LoRAWeights], tmp_path: Path
) -> None:
    weights = make()
    again = load_adapter(save_adapter(weights, tmp_path / "a"))
    assert {n: again.scale(n) for n in weights.layer_names} == pytest.approx(
        {n: weights.scale(n) for n in weights.layer_names}
    )
    if set(weights.layer_names) == set(SHAPES):
        model = peft.PeftModel.from_pretrained(TinyModel(), str(tmp_path / "a"))
        for layer in SHAPES:
            module = model.get_submodule(f"base_model.model.{layer}")
            got = module.get_delta_weight("default").detach().double()
            assert torch.allclose(got, delta_w(weights, layer), atol=1e-6)


def test_the_scale_of_an_adapter_without_alpha_is_one() -> None:
    weights = _without_metadata()
    assert weights.scale(Q) == 1.0
    assert not fitted([weights, tiny_weights(1)], k=1).scales_known
    a, b = tiny_weights(0, dtype=torch.float16).scaled(Q)
    assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
    assert torch.allclose(b, 2 * tiny_weights(0, dtype=torch.float16).lora_b[Q].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_names": []}, "no layers"),
        ({"layer_names": [Q, Q]}, "named twice"),
        ({"layer_names": [Q]}, "which layer_names lacks"),
        ({"layer_names": [Q, V, "x"]}, "'x' has no lora_a"),
        ({"rank": 3}, "give rank=2"),
        ({"kinds": {Q: "conv"}}, "kinds has"),
        ({"lora_a": {Q: torch.ones(3, 12), V: torch.ones(2, 12)}}, "whose ranks differ"),
        ({"lora_a": {Q: torch.ones(12), V: torch.ones(2, 12)}}, "not two matrices"),
        ({"lora_a": {Q: torch.ones(2, 12).int(), V: torch.ones(2, 12)}}, "give floats"),
        ({"extra": {"head": torch.tensor([float("inf")])}}, "NaN or infinite"),
    ],
)
def test_an_adapter_that_contradicts_itself_is_refused(
    change: dict[str, Any], message: str
) -> None:
    good = tiny_weights(0)
    parts = {
        "layer_names": good.layer_names,
        "lora_a": good.lora_a,
        "lora_b": good.lora_b,
        "rank": 2,
    }
    with pytest.raises(AdapterError, match=message):
        LoRAWeights(**{**parts, **change})


def test_values_that_are_not_finite_never_get_in() -> None:
    weights = tiny_weights(0)
    weights.lora_b[V][0, 0] = float("nan")
    with pytest.raises(AdapterError, match=rf"lora_B of layer '{V}' holds NaN"):
        LoRAWeights(weights.layer_names, weights.lora_a, weights.lora_b, 2)


def test_a_revision_of_the_hub_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = save_tiny_adapters(tmp_path, tiny_adapters(1))
    asked: list[tuple[str, str | None]] = []

    def download(repo: str, revision: str | None = None, **_: Any) -> str:
        asked.append((repo, revision))
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_adapter_from_hub("org/tiny", revision="v2").rank == 2
    assert load_adapter_from_hub("org/tiny").layer_names == list(SHAPES)
    assert asked == [("org/tiny", "v2"), ("org/tiny", None)]


def test_adapters_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(tmp_path / "none")
    with pytest.raises(AdapterError, match="not a Hub id"):
        load_adapter_from_hub("no id", revision="main")
    doubled = tiny_weights(0, dtype=torch.float64)
    with pytest.raises(AdapterError, match="float64"):
        save_adapter(doubled, tmp_path / "double")
    odd = tiny_weights(0)
    odd.metadata["callback"] = print
    with pytest.raises(AdapterError, match="metadata is not JSON"):
        save_adapter(odd, tmp_path / "odd")
    folder = write_adapter(
        tmp_path / "plain", tiny_config(), {Q: (torch.ones(2, 12), torch.ones(8, 2))}
    )
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 4
    assert load_adapter(folder).layer_names == [Q]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
    ],
)
def test_a_layer_that_the_config_leaves_out_is_named_in_full(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """As of a merge, whose config is the first adapter's and whose layers are those of all."""
    names = ["model.layers.0.q_proj", "lm_head"]
    factors = {name: torch.ones(2, 2) for name in names}
    weights = LoRAWeights(names, factors, factors, 2, {"r": 2, "lora_alpha": 2} | config)
    path = save_adapter(weights, tmp_path / "out")
    assert load_adapter(path).layer_names == sorted(names)
    written = json.loads((path / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(names)
    assert not written["exclude_modules"]
