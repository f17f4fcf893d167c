"""Subspaces in checkpoints: exact, whole, and taken by everything else that reads one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import DATA
from safetensors.torch import load_file
from tiny_adapters import (
    SHAPES,
    delta_w,
    save_tiny_adapters,
    tiny_adapters,
    tiny_config,
    tiny_weights,
)

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.atomic import publish_folder
from vllm_vlora.checkpoint.export import export_all, export_task
from vllm_vlora.checkpoint.hub import pull_checkpoint
from vllm_vlora.checkpoint.own_files import checkpoint_files
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import CheckpointError, OptionError, OutputError
from vllm_vlora.model.training import orthogonal_init
from vllm_vlora.plugin.memory import plan_memory
from vllm_vlora.quantize import pack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.flat import encode_flat
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule
from vllm_vlora.subspace.layers import FlatLayer
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.tasks import TaskProjection
from vllm_vlora.subspace.weights import LoRAWeights, load_adapter

Q, V = SHAPES
SEEDS = DATA / "seeds"
REPRESENTATIONS = pytest.mark.parametrize(("representation", "k"), [("flat", 3), ("joint", 8)])


def fitted(representation: str = "flat", k: int = 2, **options: Any) -> SharedSubspace:
    return SharedSubspace.from_adapters(
        tiny_adapters(**options), num_components=k, representation=representation
    )


def tensors(subspace: SharedSubspace) -> dict[str, torch.Tensor]:
    """Every number of a subspace, under a name."""
    found = {}
    for name, layer in subspace.layers.items():
        shared = (
            ("mean_a", "components_a", "mean_b", "components_b")
            if isinstance(layer, FlatLayer)
            else ("u", "v")
        )
        found |= {f"{name}.{field}": getattr(layer, field) for field in shared}
    for task_id, task in subspace.tasks.items():
        for side in ("loadings_a", "loadings_b"):
            found |= {f"{task_id}.{n}.{side}": t for n, t in getattr(task, side).items()}
    return found


def assert_same(one: SharedSubspace, other: SharedSubspace) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# --- round trips ----------------------------------------------------------------------------------


@REPRESENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_comes_back_bit_for_bit(
    representation: str, k: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    subspace = fitted(representation, k).to(dtype=dtype)
    path = subspace.save(tmp_path / "subspace")
    again = SharedSubspace.load(path)
    assert_same(subspace, again)
    assert repr(again) == repr(subspace)
    assert again.layer_names == subspace.layer_names
    for layer in SHAPES:
        for side in ("singular_values_a", "singular_values_b"):
            ours, theirs = (getattr(s, side)[layer] for s in (subspace, again))
            assert torch.allclose(ours, theirs, rtol=1e-2 if dtype != torch.float32 else 1e-5)
    for task_id, task in subspace.tasks.items():
        assert again.tasks[task_id].origin == task.origin
    assert validate(path) == []


@REPRESENTATIONS
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("loadings", [False, True])
def test_nf4_is_the_same_in_memory_and_on_disk(
    representation: str, k: int, double_quant: bool, loadings: bool, tmp_path: Path
) -> None:
    wide = {"shapes": {"q": (130, 70), "v": (64, 128)}, "target_modules": ["q", "v"]}
    subspace = fitted(representation, k, **wide)
    quantised = fitted(representation, k, **wide).quantize(
        method="nf4", double_quant=double_quant, quantize_loadings=loadings
    )
    path = quantised.save(tmp_path / "quantised")
    again = SharedSubspace.load(path)
    assert_same(quantised, again)
    assert again.quantization == ("nf4-dq" if double_quant else "nf4")
    assert validate(path) == []
    twice = SharedSubspace.load(again.save(tmp_path / "twice"))
    assert_same(quantised, twice)
    with pytest.raises(OptionError, match="already"):
        again.quantize()
    if not loadings:
        before = {name: tensor.clone() for name, tensor in tensors(subspace).items()}
        direct = subspace.save_quantized(tmp_path / "direct", double_quant=double_quant)
        assert_same(SharedSubspace.load(direct), again)
        assert all(torch.equal(t, before[name]) for name, t in tensors(subspace).items())
        assert subspace.quantization is None


@REPRESENTATIONS
@pytest.mark.parametrize("bits", [8, 4])
def test_symmetric_numbers_come_back(
    representation: str, k: int, bits: int, tmp_path: Path
) -> None:
    subspace = fitted(representation, k).quantize(bits=bits, quantize_loadings=True)
    again = SharedSubspace.load(subspace.save(tmp_path / "out"))
    assert_same(subspace, again)
    assert again.quantization == ("int8" if bits == 8 else None)


def test_a_quantised_basis_is_saved_as_packed_whatever_dtype_it_is_used_in(tmp_path: Path) -> None:
    subspace = fitted("joint", 4).quantize(method="nf4")
    wanted = {name: layer.basis().u.parts for name, layer in subspace.layers.items()}
    again = SharedSubspace.load(subspace.to(dtype=torch.bfloat16).save(tmp_path / "out"))
    for name, parts in wanted.items():
        found = again.layers[name].basis().u.parts
        assert all(torch.equal(parts[part], found[part]) for part in parts)


def test_a_core_that_was_changed_after_quantising_is_saved_as_it_is(tmp_path: Path) -> None:
    subspace = fitted("joint", 4).quantize(method="nf4", quantize_loadings=True)
    params = subspace.get_trainable_params("task_1")
    subspace.update_task("task_1", {name: p + 0.01 for name, p in params.items()})
    assert_same(subspace, SharedSubspace.load(subspace.save(tmp_path / "out")))


def test_nf4_takes_a_fraction_of_the_bytes(tmp_path: Path) -> None:
    shapes = {"q": (512, 512)}
    subspace = fitted("flat", 3, shapes=shapes, rank=8, target_modules=["q"])
    whole = subspace.compression_stats()["total_bytes_compressed"]
    small = subspace.save_quantized(tmp_path / "small")
    files = sum(file.stat().st_size for file in small.rglob("*.safetensors"))
    assert 6.5 < whole / files < 8


# --- everything else that reads checkpoints -------------------------------------------------------


@REPRESENTATIONS
def test_the_checkpoint_is_like_any_other(representation: str, k: int, tmp_path: Path) -> None:
    subspace = fitted(representation, k, alpha=6)
    path = subspace.save(tmp_path / "subspace")
    checkpoint = Checkpoint.open(path)
    assert checkpoint.base_model == "org/base"
    assert list(checkpoint.tasks) == list(subspace.tasks)
    assert checkpoint.max_rank == 2
    assert checkpoint.original_nbytes == 4 * 2 * 2 * (12 + 8 + 12 + 6)
    assert checkpoint.record("task_0").adapter_config == tiny_config(alpha=6)
    for task_id, folder in export_all(checkpoint, checkpoint.tasks, tmp_path / "all").items():
        exported, seed = load_adapter(folder), int(task_id[-1])
        for layer in SHAPES:
            wanted = delta_w(tiny_weights(seed, alpha=6), layer)
            assert torch.allclose(delta_w(exported, layer), wanted, atol=1e-5)
    names = sorted(entry.name for entry in path.iterdir())
    assert names == ["README.md", "basis.safetensors", "tasks", "tasks.json", "vlora_config.json"]
    assert "org/base" in (path / "README.md").read_text()
    assert plan_memory(checkpoint, max_loras=2).max_lora_rank == 8


@pytest.mark.parametrize("representation", ["flat", "joint", "factored"])
def test_what_compress_wrote_is_read(representation: str, tmp_path: Path) -> None:
    folders = save_tiny_adapters(tmp_path, tiny_adapters(6, spread=0.3))
    adapters = {Path(folder).name: open_adapter(folder) for folder in folders}
    options = CompressOptions(representation=representation, ratio=1.0)
    compress(adapters, tmp_path / "out", options)
    checkpoint = Checkpoint.open(tmp_path / "out")
    subspace = SharedSubspace.load(tmp_path / "out")
    for task_id in adapters:
        exported = load_adapter(
            export_task(checkpoint, task_id, tmp_path / f"x{task_id}", dtype=torch.float32)
        )
        for layer in SHAPES:
            made = delta_w(subspace.reconstruct(task_id), layer)
            assert torch.allclose(made, delta_w(exported, layer), atol=2e-2 * float(made.norm()))
        record = checkpoint.record(task_id)
        assert subspace.tasks[task_id].origin.error == record.error


def test_private_tasks_are_no_subspace(tmp_path: Path) -> None:
    folders = save_tiny_adapters(tmp_path, tiny_adapters())
    adapters = {Path(folder).name: open_adapter(folder) for folder in folders}
    compress(adapters, tmp_path / "out", CompressOptions(representation="private", ratio=0.5))
    with pytest.raises(CheckpointError, match=r"task 'task_0' is stored privately.*VLoRAModel"):
        SharedSubspace.load(tmp_path / "out")


def write_by_hand(
    folder: Path, bases: dict[str, Basis | FlatBasis], tasks: dict[str, dict[str, StoredModule]]
) -> Path:
    """A checkpoint of any make; modules are 12 x 8."""
    with publish_folder(folder, force=False, owned=checkpoint_files) as temporary:
        writer = CheckpointWriter(temporary, None)
        for name, basis in bases.items():
            if isinstance(basis, FlatBasis):
                writer.add_module(name, 12, 8, flat=basis)
            else:
                writer.add_module(name, 12, 8, basis=basis)
        for task_id, modules in tasks.items():
            writer.add_task(task_id, modules, original_nbytes=1, error=0.0, adapter_config={})
        writer.finish("")
    return folder


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


JOINT = Basis(pack(normal(1, 4, 8), "float32"), pack(normal(2, 5, 12), "float32"))
FLAT = FlatBasis(pack(normal(3, 3 * 2, 8), "float32"), pack(normal(4, 4 * 2, 12), "float32"), 2)


def core(shape: tuple[int, int], rank: int, form: str, **options: Any) -> StoredModule:
    """A joint module: its core is that of ``core_of``."""
    right, left = normal(5, rank, shape[1]), normal(6, rank, shape[0])
    matrices = (
        {"A": pack(right, "float32"), "B": pack(left, "float32")}
        if form == "factors"
        else {"C": pack(left.T @ right, "float32")}
    )
    return StoredModule("joint", "float32", rank, matrices, core=form, **options)


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_cores_of_every_form_are_read(form: str, tmp_path: Path) -> None:
    whole = core((4, 5), 2, form, scale=0.5)
    older = core((2, 3), 2, form, rows=(0, 2, 0, 3))
    path = write_by_hand(tmp_path / "x", {"m": JOINT}, {"whole": {"m": whole}, "old": {"m": older}})
    subspace = SharedSubspace.load(path)
    for task_id, stored in (("whole", whole), ("old", older)):
        a, b = decode(stored, JOINT)
        assert torch.allclose(
            delta_w(subspace.reconstruct(task_id), "m"), b.double() @ a.double(), atol=1e-4
        )
    assert validate(subspace.save(tmp_path / "again")) != []  # This basis is not orthonormal.


def test_flat_tasks_of_one_scale_are_read(tmp_path: Path) -> None:
    tasks = {
        f"task_{seed}": {
            "m": replace(encode_flat(normal(seed, 3), normal(seed + 9, 2), "float32", 2), scale=1.5)
        }
        for seed in range(3)
    }
    subspace = SharedSubspace.load(write_by_hand(tmp_path / "x", {"m": FLAT}, tasks))
    assert subspace.layers["m"].widths == (3, 2)
    for task_id, modules in tasks.items():
        a, b = decode(modules["m"], FLAT)
        made = subspace.reconstruct(task_id)
        assert torch.allclose(delta_w(made, "m"), b.double() @ a.double(), atol=1e-5)
    tasks["task_1"] = {"m": replace(tasks["task_1"]["m"], scale=2.0)}
    path = write_by_hand(tmp_path / "y", {"m": FLAT}, tasks)
    with pytest.raises(CheckpointError, match="several scales in layer m"):
        SharedSubspace.load(path)


def test_mixed_and_clustered_tasks_are_no_subspace(tmp_path: Path) -> None:
    flat = encode_flat(normal(0, 3), normal(1, 2), "float32", 2)
    mixed = {"a": {"m": core((4, 5), 2, "dense")}, "b": {"n": flat}}
    path = write_by_hand(tmp_path / "mixed", {"m": JOINT, "n": FLAT}, mixed)
    with pytest.raises(CheckpointError, match="some tasks are flat and some joint"):
        SharedSubspace.load(path)
    clustered = {"a": {"m": core((2, 3), 2, "dense", rows=(2, 4, 0, 3))}}
    path = write_by_hand(tmp_path / "clustered", {"m": JOINT}, clustered)
    with pytest.raises(CheckpointError, match="basis of a cluster"):
        SharedSubspace.load(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a vllm-vlora checkpoint"):
        SharedSubspace.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        SharedSubspace.load(tmp_path / "nowhere")
    path = fitted().save(tmp_path / "damaged")
    data = bytearray((path / "basis.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "basis.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        SharedSubspace.load(path)


# --- saving ---------------------------------------------------------------------------------------


def test_ids_that_collide_as_file_names_do_not_collide(tmp_path: Path) -> None:
    ids = ["a/b", "a_b", "A_B", "../x", "ü" * 100, "con", "__routed__"]
    adapters = tiny_adapters(len(ids))
    subspace = SharedSubspace.from_adapters(adapters, ids, num_components=6)
    path = subspace.save(tmp_path / "subspace")
    assert len(list((path / "tasks").iterdir())) == len(ids)
    again = SharedSubspace.load(path)
    assert list(again.tasks) == ids
    for task_id, weights in zip(ids, adapters):
        made = again.reconstruct(task_id)
        assert torch.allclose(delta_w(made, Q), delta_w(weights, Q), atol=1e-5)


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    subspace = fitted()
    path = subspace.save(tmp_path / "subspace")
    with pytest.raises(OutputError):
        subspace.save(path)
    subspace.remove_task("task_0")
    subspace.save(path, force=True)
    assert list(SharedSubspace.load(path).tasks) == ["task_1", "task_2", "task_3"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError):
        subspace.save(tmp_path / "mine", force=True)


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    subspace = fitted()
    with pytest.raises(OptionError, match=r"float64 cannot be stored|which cannot be stored"):
        subspace.to(dtype=torch.float64).save(tmp_path / "out")
    subspace.to(dtype=torch.float32)
    subspace.tasks["odd"] = TaskProjection("odd", {Q: torch.zeros(9)}, {Q: torch.zeros(9)})
    with pytest.raises(OptionError, match="'odd'"):
        subspace.save(tmp_path / "out")
    for task_id in list(subspace.tasks):
        subspace.remove_task(task_id)
    with pytest.raises(OptionError, match="no tasks"):
        subspace.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@REPRESENTATIONS
def test_heads_kinds_and_missing_layers_travel(representation: str, k: int, tmp_path: Path) -> None:
    name = "base_model.model.score.weight"
    adapters = []
    for seed in range(4):
        plain = tiny_weights(seed, modules_to_save=["score"])
        layers = [Q] if seed == 0 else [Q, V]
        adapters.append(
            LoRAWeights(
                layers,
                {n: plain.lora_a[n] for n in layers},
                {n: plain.lora_b[n] for n in layers},
                2,
                plain.metadata,
                {Q: "embedding"},
                {name: torch.full((2, 3), float(seed))},
            )
        )
    subspace = SharedSubspace.from_adapters(
        adapters, num_components=k, representation=representation, missing="zero"
    )
    path = subspace.save(tmp_path / "out")
    again = SharedSubspace.load(path)
    assert_same(subspace, again)
    assert V not in again.tasks["task_0"]
    assert again.reconstruct("task_1").kinds == {Q: "embedding"}
    assert torch.equal(again.reconstruct("task_3").extra[name], torch.full((2, 3), 3.0))
    exported = open_adapter(export_task(Checkpoint.open(path), "task_2", tmp_path / "task_2"))
    assert exported.modules[Q].kind == "embedding"
    assert torch.equal(exported.extra_tensors()[name], torch.full((2, 3), 2.0))


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_a_task_made_here_is_saved_with_a_config_of_its_own(
    representation: str, tmp_path: Path
) -> None:
    subspace = fitted(representation, 3)
    params = subspace.get_trainable_params("task_0")
    subspace.add_task(
        TaskProjection(
            "trained",
            {n: torch.ones_like(t) for n, t in subspace.tasks["task_0"].loadings_a.items()},
            {n: torch.ones_like(t) for n, t in subspace.tasks["task_0"].loadings_b.items()},
        )
    )
    path = subspace.save(tmp_path / "out")
    again = SharedSubspace.load(path)
    assert again.scales_known
    assert again.tasks["trained"].origin.metadata["base_model_name_or_path"] == "org/base"
    exported = load_adapter(export_task(Checkpoint.open(path), "trained", tmp_path / "trained"))
    for layer in SHAPES:
        wanted = delta_w(subspace.reconstruct("trained"), layer)
        assert torch.allclose(delta_w(exported, layer), wanted, atol=1e-5)
    assert params.keys() == again.get_trainable_params("trained").keys()


def test_tasks_are_saved_under_the_names_that_they_have_in_the_dict(tmp_path: Path) -> None:
    """As vlora saves them; what a projection was called before does not matter."""
    subspace = fitted("joint", 4)
    subspace.tasks["copy"] = subspace.tasks["task_0"]
    subspace.tasks["renamed"] = subspace.tasks.pop("task_1")
    again = SharedSubspace.load(subspace.save(tmp_path / "out"))
    assert list(again.tasks) == list(subspace.tasks)
    for task_id, task in subspace.tasks.items():
        assert again.tasks[task_id].task_id == task_id
        for layer in SHAPES:
            assert torch.equal(again.tasks[task_id].cores[layer], task.cores[layer])


def test_adapters_without_alpha_are_known_as_such_again(tmp_path: Path) -> None:
    adapters = tiny_adapters(3)
    del adapters[1].metadata["lora_alpha"]
    subspace = SharedSubspace.from_adapters(adapters, num_components=2)
    again = SharedSubspace.load(subspace.save(tmp_path / "out"))
    assert not again.scales_known
    assert [task.origin.scale_known for task in again.tasks.values()] == [True, False, True]


ASKED = [
    {"num_components": 16},
    {"adaptive_k": True, "variance_threshold": 0.9},
    {"num_components": 3, "adaptive_k": True, "variance_threshold": 0.999},
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_how_k_is_chosen_is_the_same_after_saving(
    representation: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    """vlora's quickstart in two sessions: what an absorption loses does not depend on it."""
    adapters = tiny_adapters(6)
    subspace = SharedSubspace.from_adapters(adapters[:4], representation=representation, **asked)
    path = subspace.save(tmp_path / "out")
    pull_checkpoint(str(path), tmp_path / "pulled")
    subspace_of = SharedSubspace.load
    loaded = [subspace_of(path), subspace_of(tmp_path / "pulled")]
    remove_tasks(path, ["task_0"], output=tmp_path / "edited")
    loaded.append(subspace_of(tmp_path / "edited"))
    for name in ("num_components", "adaptive_k", "variance_threshold"):
        for again in loaded:
            assert getattr(again, name) == getattr(subspace, name), name
    for new, weights in (("task_4", adapters[4]), ("task_5", adapters[5])):
        subspace.absorb(weights, new)
        loaded[0].absorb(weights, new)
    assert loaded[0].tasks["task_5"].origin.error == pytest.approx(
        subspace.tasks["task_5"].origin.error, abs=1e-5
    )
    # Another checkpoint in its place is chosen for by itself.
    fitted("flat", 2).save(path, force=True)
    assert subspace_of(path).num_components == 2
    assert not (path / "components.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        '{"version": 2}',
        '{"version": 1, "num_components": 0}',
        '{"version": 1, "variance_threshold": 1.5}',
        '{"version": 1, "k": 3}',
        "[",
    ],
)
def test_a_damaged_choice_of_k_is_refused(content: str, tmp_path: Path) -> None:
    path = fitted("flat", 2).save(tmp_path / "out")
    (path / "components.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"components\.json"):
        SharedSubspace.load(path)


def test_how_vlora_chose_k_is_read() -> None:
    subspace = SharedSubspace.load(SEEDS / "vlora-1.0.0-adaptive-nf4")
    assert (subspace.num_components, subspace.adaptive_k) == (3, True)
    assert subspace.variance_threshold == 0.8


def test_a_loaded_subspace_goes_on(tmp_path: Path) -> None:
    adapters = tiny_adapters(5, spread=0.4)
    for representation, before, after in (("flat", 3, 4), ("joint", 8, 10)):
        subspace = SharedSubspace.from_adapters(
            adapters[:4], num_components=before, representation=representation
        )
        again = SharedSubspace.load(subspace.save(tmp_path / representation))
        again.absorb_incremental(adapters[4], "task_4", num_components=after)
        for task_id, weights in zip(again.tasks, adapters):
            assert torch.allclose(
                delta_w(again.reconstruct(task_id), V), delta_w(weights, V), atol=1e-5
            )


# --- vlora ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["vlora-0.3.0-float", "vlora-1.0.0-float", "vlora-1.0.0-nf4", "vlora-1.0.0-adaptive-nf4"],
)
def test_folders_that_vlora_wrote_are_read(name: str, tmp_path: Path) -> None:
    subspace = SharedSubspace.load(SEEDS / name)
    meta = json.loads((SEEDS / name / "subspace_meta.json").read_text())
    assert list(subspace.tasks) == meta["task_ids"]
    assert not subspace.scales_known
    expected = load_file(SEEDS / f"{name}.expected.safetensors")
    again = SharedSubspace.load(subspace.save(tmp_path / "ours"))
    assert_same(subspace, again)
    for key, wanted in expected.items():
        task_id, _, rest = key.partition("::")
        layer, _, side = rest.rpartition(".")
        made = again.reconstruct(task_id)
        got = made.lora_a[layer] if side == "A" else made.lora_b[layer]
        assert torch.allclose(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("saved", [False, True])
def test_the_alpha_that_vlora_did_not_keep_is_given(saved: bool, tmp_path: Path) -> None:
    """Of rank 4: what is added later with its own alpha then has the same measure as the rest."""
    folder = SEEDS / "vlora-1.0.0-float"
    plain = SharedSubspace.load(folder)
    source = plain.save(tmp_path / "ours") if saved else folder
    subspace = SharedSubspace.load(source, lora_alpha=32)
    assert subspace.scales_known
    layer = subspace.layer_names[0]
    for task_id in plain.tasks:
        wanted = 8 * delta_w(plain.reconstruct(task_id), layer)
        assert torch.allclose(delta_w(subspace.reconstruct(task_id), layer), wanted, rtol=1e-4)
    for values, old in zip(
        subspace.singular_values_b.values(), plain.singular_values_b.values(), strict=True
    ):
        assert torch.allclose(values, 8 * old, rtol=1e-4)
    [first, *_] = plain.tasks
    weights = plain.reconstruct(first)
    weights.metadata["lora_alpha"] = 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subspace.absorb(weights, "again")
    assert torch.allclose(
        delta_w(subspace.reconstruct("again"), layer),
        delta_w(subspace.reconstruct(first), layer),
        atol=1e-5,
    )
    assert SharedSubspace.load(subspace.save(tmp_path / "known")).scales_known


def test_cores_get_the_alpha_that_was_not_kept(tmp_path: Path) -> None:
    adapters = tiny_adapters(3, rank=2)
    for weights in adapters:
        del weights.metadata["lora_alpha"]
    subspace = SharedSubspace.from_adapters(adapters, num_components=6, representation="joint")
    again = SharedSubspace.load(subspace.save(tmp_path / "out"), lora_alpha=5)
    for task_id, weights in zip(again.tasks, adapters):
        assert torch.allclose(
            delta_w(again.reconstruct(task_id), V), 2.5 * delta_w(weights, V), atol=1e-5
        )


def test_an_alpha_that_is_known_or_none_is_not_given(tmp_path: Path) -> None:
    path = fitted("flat", 3).save(tmp_path / "out")
    with pytest.raises(OptionError, match="leave lora_alpha out"):
        SharedSubspace.load(path, lora_alpha=8)
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="lora_alpha"):
            SharedSubspace.load(SEEDS / "vlora-1.0.0-float", lora_alpha=alpha)


ADDING: dict[str, Callable[[SharedSubspace, LoRAWeights], object]] = {
    "add_task": lambda held, new: held.add_task(held.project(new, "new", warn_threshold=0.0)),
    "absorb": lambda held, new: held.absorb(new, "new"),
    "absorb_incremental": lambda held, new: held.absorb_incremental(new, "new"),
    "orthogonal_init": lambda held, _: orthogonal_init(held, "new"),
}


@pytest.mark.parametrize("how", ADDING)
def test_a_task_of_another_measure_than_the_rest_is_warned_of(how: str) -> None:
    subspace = SharedSubspace.load(SEEDS / "vlora-1.0.0-float")
    weights = subspace.reconstruct(next(iter(subspace.tasks)))
    weights.metadata["lora_alpha"] = 32
    with pytest.warns(UserWarning, match=r"load.*lora_alpha") as warned:
        ADDING[how](subspace, weights)
    if how != "orthogonal_init":
        assert warned[0].filename == __file__
    # Of unknown scale, as the others.
    del weights.metadata["lora_alpha"]
    fresh = SharedSubspace.load(SEEDS / "vlora-1.0.0-float")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.add_task(fresh.project(weights, "new"))
