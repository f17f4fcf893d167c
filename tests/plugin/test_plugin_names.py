"""Checkpoints and models that name one layer differently: who gets which basis, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plugin_world import CPU, activate_all, layouts

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.layouts import Run, SliceLayout
from vllm_vlora.plugin.memory import plan_memory
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.stored import Basis
from vllm_vlora.triton_kernels.direct import add_direct

NEW, OLD = "model.language_model.layers.0.q", "language_model.model.layers.0.q"
D_IN, D_OUT = 80, 256
# Task -> the modules that it has, by how each is stored.
TASKS = {
    "first": {NEW: "joint"},
    "later": {OLD: "joint"},
    "again": {NEW: "joint"},
    "own": {OLD: "private"},
}


def engine(name: str) -> str:
    """What the engine of ``plugin_world`` calls a module."""
    return name.rsplit(".", 1)[-1]


def build(folder: Path, tasks: dict[str, dict[str, str]] = TASKS) -> Checkpoint:
    """Both modules have a basis, of different numbers and widths."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    bases = {}
    for name, width in ((NEW, 3), (OLD, 5)):
        u, v = (
            torch.linalg.qr(torch.randn(size, width, generator=generator))[0].T.contiguous()
            for size in (D_OUT, D_IN)
        )
        bases[name] = u, v
        writer.add_module(name, D_IN, D_OUT, basis=Basis(pack(u, "float32"), pack(v, "float32")))
    for task, modules in tasks.items():
        stored = {}
        for name, kind in modules.items():
            a = torch.randn(2, D_IN, generator=generator)
            b = torch.randn(D_OUT, 2, generator=generator)
            if kind == "joint":
                stored[name] = encode_joint(a, b, 1.0, *bases[name], "float32")
            else:
                stored[name] = encode_private(a, b, 1.0, "float32")
        writer.add_task(task, stored, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return Checkpoint.open(folder)


def make_path(checkpoint: Checkpoint) -> DirectPath:
    return DirectPath(
        checkpoint, layouts(), engine, slots=4, max_tokens=16, device=CPU, dtype=torch.float32
    )


def test_a_layer_holds_the_basis_of_the_first_task_and_the_others_are_materialized(
    tmp_path: Path,
) -> None:
    checkpoint = build(tmp_path / "ckpt")
    path = make_path(checkpoint)
    basis = dict(checkpoint.bases())[NEW]
    part = path.layers["qkv"].slices[0]
    assert part.u is not None
    assert torch.equal(unpack(part.u), unpack(basis.u))
    assert (path.layers["qkv"].v.rows, part.k_in) == (3, 3)  # type: ignore[union-attr]
    obstacles = {task: path.obstacle(checkpoint, task) for task in checkpoint.tasks}
    later = obstacles.pop("later")
    assert obstacles == dict.fromkeys(["first", "again", "own"])
    assert later is not None
    assert later.startswith(f"module {OLD} is the same layer of the served model as {NEW}, ")


def test_the_tasks_that_run_direct_add_their_own_update(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ckpt")
    path = make_path(checkpoint)
    tasks = [task for task in checkpoint.tasks if path.obstacle(checkpoint, task) is None]
    activate_all(path, checkpoint, tasks).route(np.array([1, 2, 3, 0]))
    x = torch.randn(4, D_IN, generator=torch.Generator().manual_seed(3))
    layer = path.layers["qkv"]
    y = torch.zeros(4, layer.width)
    add_direct(y, x, layer, path.table, path.routing)
    bases = dict(checkpoint.bases())
    for row, task in enumerate(tasks):
        ((name, stored),) = checkpoint.load_task(task).modules.items()
        a, b = decode(stored, None if stored.is_private else bases[name])
        want = x[row].double() @ a.double().T @ b.double().T
        assert want.abs().max() > 0.1
        torch.testing.assert_close(y[row, :D_OUT].double(), want, rtol=1e-4, atol=1e-4)
    assert y[3].count_nonzero() == 0


def test_a_materialized_task_of_the_other_name_has_its_own_basis(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ckpt")
    store = ResidentStore(CPU, engine, lambda *_: None)
    store.preload(checkpoint.path, make_path)
    held = {task.task_id: task for task in store.tasks()}
    assert [task for task, found in held.items() if found.direct is None] == ["later"]
    (core,) = checkpoint.load_task("later").modules.values()
    basis = dict(checkpoint.bases())[OLD]
    a, b = (unpack(core.matrices[side]).double() for side in "AB")
    want = unpack(basis.u).double().T @ b.T @ a @ unpack(basis.v).double()
    source_a, source_b = held["later"].sources["q"]
    got = source_b.to_dense().double().T @ source_a.to_dense().double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_plan_counts_one_layer_and_says_who_is_materialized(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ckpt")
    plan = plan_memory(checkpoint, max_loras=4, dtype="float32", max_lora_rank=16)
    assert plan.slices == 1
    assert list(plan.not_direct) == ["later"]
    assert all(name in plan.not_direct["later"] for name in (NEW, OLD))
    direct = make_path(checkpoint).memory().bases
    packed = 4 * 5 * (D_IN + D_OUT)  # the basis of "later", held whole to materialize it
    assert plan.mode("auto").bases_nbytes == direct + packed


def test_one_task_with_two_names_for_a_layer_is_refused(tmp_path: Path) -> None:
    tasks = {"sound": {NEW: "private"}, "twice": {NEW: "private", OLD: "private"}}
    checkpoint = build(tmp_path / "ckpt", tasks)
    runs = ((Run(0, 0, D_IN),), (Run(0, 0, D_OUT),))
    layout = SliceLayout("q", lambda slot: torch.empty(0), lambda slot: torch.empty(0), D_IN, D_OUT,
                         *runs)  # fmt: skip
    writer = SlotWriter([layout], 16)
    writer.check(checkpoint, ["sound"], engine)
    with pytest.raises(
        ModelMismatchError, match=f"'twice' adapts the layer q .*{NEW} and as {OLD}"
    ):
        writer.check(checkpoint, ["sound", "twice"], engine)


def test_a_layer_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ckpt")
    with pytest.raises(ModelMismatchError, match=f"no LoRA layer for module {NEW}; "):
        SlotWriter([], 16).check(checkpoint, ["first"], engine)


# --- names of the engine ----------------------------------------------------------------------------

Q = "0.self_attn.q_proj"
# vLLM's own mappings: of Qwen2.5-VL and of LLaVA.
QWEN = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
LLAVA = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "lm_head.": "language_model.lm_head.",
}


def names(prefixes: dict[str, str] | None, *modules: str, pooling: bool = False) -> Any:
    pytest.importorskip("vllm")
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_vlora.plugin.layers import EngineNames

    mapper = None if prefixes is None else WeightsMapper(orig_to_new_prefix=prefixes)
    manager = SimpleNamespace(
        model=SimpleNamespace(hf_to_vllm_mapper=mapper),
        modules=dict.fromkeys(modules),
        packed_modules={
            name: [name.replace("qkv_proj", f"{part}_proj") for part in "qkv"]
            for name in modules
            if name.endswith("qkv_proj")
        },
        elsewhere={f"{modules[0].split('0')[0]}9.self_attn.q_proj": True},
        is_pooling_model=pooling,
    )
    return EngineNames(manager)


LANGUAGE = ("language_model.model.layers.0.self_attn.qkv_proj", "language_model.lm_head")


@pytest.mark.parametrize(
    ("found", "name", "want"),
    [
        (lambda: names(QWEN, *LANGUAGE), f"model.layers.{Q}", f"language_model.model.layers.{Q}"),
        (
            lambda: names(QWEN, *LANGUAGE),
            f"model.language_model.layers.{Q}",
            f"language_model.model.layers.{Q}",
        ),
        (lambda: names(QWEN, *LANGUAGE), "lm_head", "language_model.lm_head"),
        # What vLLM's mapping leads nowhere.
        (lambda: names(LLAVA, *LANGUAGE), f"model.layers.{Q}", f"language_model.model.layers.{Q}"),
        (lambda: names(LLAVA, *LANGUAGE), f"layers.{Q}", f"language_model.model.layers.{Q}"),
        (
            lambda: names(LLAVA, f"vision_tower.vision_model.encoder.layers.{Q}"),
            f"model.vision_tower.encoder.layers.{Q}",
            f"vision_tower.vision_model.encoder.layers.{Q}",
        ),
        (
            lambda: names(None, "model.layers.0.self_attn.qkv_proj"),
            f"layers.{Q}",
            f"model.layers.{Q}",
        ),
        # vLLM's rule for every pooling model, whatever the module.
        (
            lambda: names(None, "model.odd.0.dense", pooling=True),
            "odd.0.dense",
            "model.odd.0.dense",
        ),
        # A layer of another pipeline rank.
        (
            lambda: names(None, "model.layers.0.self_attn.qkv_proj"),
            "layers.9.self_attn.q_proj",
            "model.layers.9.self_attn.q_proj",
        ),
        # A layer of a bigger model: vLLM's name for it, which no layout has.
        (
            lambda: names(QWEN, *LANGUAGE),
            "model.layers.7.self_attn.q_proj",
            "language_model.model.layers.7.self_attn.q_proj",
        ),
        # One of a tower is none of the language model's.
        (lambda: names(LLAVA, *LANGUAGE), f"visual.layers.{Q}", f"visual.layers.{Q}"),
        # Fused names of other models are no layer's.
        (
            lambda: names(None, "model.layers.0.self_attn.qkv_proj"),
            "model.layers.0.self_attn.qkv_proj",
            "model.layers.0.self_attn.qkv_proj",
        ),
    ],
)
def test_what_the_engine_calls_a_module(found: Callable[[], Any], name: str, want: str) -> None:
    assert found()(name) == want


def test_a_name_that_fits_two_layers_of_the_engine_is_neither() -> None:
    both = names(None, f"model.layers.{Q}", f"language_model.model.layers.{Q}")
    assert both(f"layers.{Q}") == f"layers.{Q}"
    assert both(f"model.layers.{Q}") == f"model.layers.{Q}"
