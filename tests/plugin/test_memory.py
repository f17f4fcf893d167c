"""The memory calculator: by hand, against the real resident tasks and direct path, and its errors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_vlora.checkpoint import manifest
from vllm_vlora.checkpoint.manifest import TaskRecord
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_index import IndexedTasks
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import ModelMismatchError, OptionError
from vllm_vlora.plugin import settings
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.layouts import LayerLayout, Run, SliceLayout
from vllm_vlora.plugin.memory import MODES, STOCK, MemoryPlan, direct_obstacle, plan_memory
from vllm_vlora.plugin.model_layers import (
    LayerSlice,
    ModelShape,
    module_slice,
    read_model_shape,
    targeted,
)
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.settings import DEFAULT_PEFT_SLOTS
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.spec import ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis
from vllm_vlora.tools.cli import plan as plan_command

Q, OUT, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "lm_head"
SHAPES = {Q: (64, 128), OUT: (128, 64), HEAD: (64, 192)}
K_IN, K_OUT = 4, 6
CONFIG = {"r": 8, "lora_alpha": 8, "rank_pattern": {"never_there": 12}}


def make_checkpoint(
    folder: Path,
    tasks: Iterable[str],
    basis: str = "nf4",
    configs: Mapping[str, dict[str, Any]] | None = None,
    extra: Mapping[str, dict[str, torch.Tensor]] | None = None,
) -> Checkpoint:
    """q_proj (128 x 64) joint, o_proj (64 x 128) private NF4, lm_head (192 x 64) private int8.

    Args:
        tasks: ``factors``, ``dense``, ``head``, or one of these and more behind a dash.
        configs, extra: of a task, in place of ``CONFIG`` and of nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def factors(rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        d_in, d_out = SHAPES[name]
        a = torch.randn(rank, d_in, generator=generator)
        return a, torch.randn(d_out, rank, generator=generator)

    v, u = (torch.linalg.qr(torch.randn(d, k, generator=generator))[0].T.contiguous()
            for d, k in ((64, K_IN), (128, K_OUT)))  # fmt: skip
    shared = Basis(pack(u, basis), pack(v, basis))
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    for name, (d_in, d_out) in SHAPES.items():
        writer.add_module(name, d_in, d_out, basis=shared if name == Q else None)
    left, right = unpack(shared.u), unpack(shared.v)
    made = {
        # Factors of 2 (6 + 4) = 20 elements; a dense core would have 24.
        "factors": {
            Q: encode_joint(*factors(2, Q), 1.0, left, right, "bfloat16"),
            OUT: encode_private(*factors(3, OUT), 1.0, "nf4"),
        },
        "dense": {Q: encode_joint(*factors(8, Q), 1.0, left, right, "bfloat16")},
        "head": {HEAD: encode_private(*factors(5, HEAD), 1.0, "int8")},
    }
    for task in tasks:
        writer.add_task(
            task, made[task.partition("-")[0]], original_nbytes=1000, error=0.0,
            adapter_config=dict((configs or {}).get(task, CONFIG)), extra=(extra or {}).get(task),
        )  # fmt: skip
    writer.finish("card")
    return Checkpoint.open(folder)


@pytest.fixture
def mixed(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "mixed", ["factors", "dense", "head"])


@pytest.fixture
def linear(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "linear", ["factors", "dense"])


def sizes(plan: MemoryPlan, mode: str) -> dict[str, int]:
    found = plan.mode(mode)
    names = ("slots", "bases", "cores", "factors", "table", "records", "buffers")
    values = {name: getattr(found, f"{name}_nbytes") for name in names}
    assert sum(values.values()) == found.total_nbytes
    return values


# --- very many tasks ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tp": 2, "narrow_rows": True, "memory": 100_000}])
def test_of_an_index_one_record_of_each_kind_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """And the plan is that of the same tasks in JSON."""
    plain = {"r": 8, "lora_alpha": 8}
    tasks = [f"{kind}-{n}" for n in range(20) for kind in ("factors", "dense", "head")]
    configs = dict.fromkeys(tasks, plain) | {
        "dense-7": {"r": 16, "lora_alpha": 8},
        "dense-8": {**plain, "rank_pattern": {"q_proj": 32}},
        "factors-9": {"lora_alpha": 8},
    }
    heads = {"factors-3": {"base_model.model.score.weight": torch.zeros(2, 4)}}
    plans, read = [], 0
    original = IndexedTasks._read_record

    def counted(self: IndexedTasks, task: str) -> TaskRecord:
        nonlocal read
        read += 1
        return original(self, task)

    monkeypatch.setattr(IndexedTasks, "_read_record", counted)
    for number, most in enumerate((1000, 1)):
        monkeypatch.setattr(manifest, "INDEXED_TASKS", most)
        found = make_checkpoint(tmp_path / f"ck{number}", tasks, configs=configs, extra=heads)
        assert isinstance(found.tasks, IndexedTasks) == bool(number)
        read = 0
        plans.append(plan_memory(found, max_loras=4, **options))
    assert plans[0] == plans[1]
    assert any("1 of the tasks carry heads" in line for line in plans[0].assumptions)
    assert "factors-3" in plans[0].not_direct
    assert read == 7, "three kinds, three other configs, and a head"


# --- by hand --------------------------------------------------------------------------------------


def test_one_device_by_hand(mixed: Checkpoint) -> None:
    plan = plan_memory(mixed, max_loras=4, peft_slots=2, max_num_batched_tokens=64)
    assert (plan.max_lora_rank, plan.slices, plan.tasks) == (8, 3, 3)
    widths = (64 + 128) + (128 + 64) + (64 + 192)
    slot = 8 * widths * 2
    # rank_pattern names 12, used or not, so stock vLLM wants slots of 16.
    stock = plan.mode(STOCK)
    assert (stock.slots, stock.slot_rank) == (4, 16)
    assert sizes(plan, STOCK)["slots"] == stock.total_nbytes == 4 * 16 * widths * 2
    assert stock.host_nbytes == 3 * 1000
    assert stock.switch_host_nbytes == 8 * (192 + 192) * 2
    assert stock.switch_device_nbytes == 16 * widths * 2 + stock.switch_host_nbytes
    rows = {64: 32 + 4, 128: 64 + 8}
    factors = 3 * (rows[128] + rows[64]) + 5 * ((64 + 4) + (192 + 4))
    packed = K_IN * rows[64] + K_OUT * rows[128]
    assert sizes(plan, "materialize") == {
        "slots": 4 * slot,
        "bases": packed,
        "cores": 4 * (2 + 4) * (K_IN + K_OUT),
        "factors": factors,
        "table": 0,
        "records": 0,
        "buffers": 0,
    }
    largest = 5 * ((64 + 4) + (192 + 4))  # the head's packed factors
    assert plan.mode("materialize").switch_device_nbytes == largest + slot
    assert sizes(plan, "auto") == {
        "slots": 2 * slot,
        "bases": 2 * (K_IN * 64 + K_OUT * 128),
        "cores": 2 * (24 + 24),
        "factors": factors,
        "table": 5 * 2 * 96,
        "records": 3 * 2 * 96,
        "buffers": 4 * (2 * 64 + 3 * ((4 + 4) + (4 + 1))) + 4 * (32 + 3 * 256),
    }
    auto = plan.mode("auto")
    assert (auto.direct_tasks, auto.materialized_tasks, auto.distinct_tasks) == (2, 1, 3)
    assert (auto.switch_host_nbytes, auto.switch_device_nbytes) == (0, largest + slot)
    assert plan.not_direct == {"head": "module lm_head is the output head"}
    assert plan.mode("direct").obstacle == (
        "task 'head' cannot run direct: module lm_head is the output head"
    )


def test_two_devices_hold_half_of_what_is_split(linear: Checkpoint) -> None:
    one, two = (plan_memory(linear, max_loras=4, tp=tp) for tp in (1, 2))
    # A of q_proj is whole, B halved; o_proj the other way; lm_head whole.
    widths = (64 + 64) + (64 + 64) + (64 + 192)
    assert two.mode(STOCK).slots_nbytes == 4 * 16 * widths * 2
    for name in ("bases", "cores", "factors"):
        assert sizes(one, "materialize")[name] == sizes(two, "materialize")[name]
    assert sizes(two, "direct")["bases"] == 2 * (K_IN * 64 + K_OUT * 64)
    assert sizes(two, "direct")["factors"] == 3 * (36 + 36)
    for name in ("cores", "table", "records", "buffers"):
        assert sizes(one, "direct")[name] == sizes(two, "direct")[name]
    assert sizes(one, "direct") == sizes(one, "auto")


def test_a_split_layer_alone_halves() -> None:
    item = LayerSlice("m.k_proj", 64, 128, "column", kv_heads=4)
    assert [item.widths(tp) for tp in (1, 2, 4, 8, 16)] == [
        (64, 128), (64, 64), (64, 32), (64, 32), (64, 32)
    ]  # fmt: skip
    assert LayerSlice("m.o_proj", 64, 128, "row").widths(4) == (16, 128)
    assert LayerSlice("lm_head", 64, 128, "whole").widths(4) == (64, 128)


@pytest.mark.parametrize("mode", [STOCK, *MODES])
def test_more_of_anything_never_takes_less(linear: Checkpoint, tmp_path: Path, mode: str) -> None:
    fewer = make_checkpoint(tmp_path / "fewer", ["dense"])
    base: dict[str, Any] = {"max_loras": 4, "peft_slots": 2, "max_lora_rank": 8}
    small = plan_memory(linear, **base).mode(mode).total_nbytes
    for more in ({"max_loras": 5}, {"max_lora_rank": 32}, {"dtype": "fp32"}):
        assert plan_memory(linear, **{**base, **more}).mode(mode).total_nbytes > small
    assert plan_memory(fewer, **base).mode(mode).total_nbytes <= small
    assert plan_memory(linear, **base, cpu=True).mode(mode).slots == (
        plan_memory(linear, **base).mode(mode).slots + (mode != STOCK)
    )


def test_what_fits_is_found_to_the_byte(mixed: Checkpoint) -> None:
    for mode in (STOCK, "materialize", "auto"):
        for count in (1, 2, 3):
            exact = plan_memory(mixed, max_loras=count).mode(mode).total_nbytes
            for memory, batch in ((exact, count), (exact - 1, count - 1)):
                fits = plan_memory(mixed, max_loras=9, memory=memory).mode(mode).fits
                assert fits is not None
                assert fits.batch_tasks == batch, (mode, count)
    plan = plan_memory(mixed, max_loras=2, memory=10**9)
    found = plan.mode("auto")
    assert found.fits is not None
    fixed = found.total_nbytes - found.tasks_nbytes
    assert found.fits.resident_tasks == (10**9 - fixed) * 3 // found.tasks_nbytes
    assert found.fits.batch_tasks == 3
    assert plan.mode("direct").fits is None


def test_only_some_slots_hold_materialized_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "heads"
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    writer.add_module(HEAD, 64, 192)
    stored = encode_private(torch.ones(1, 64), torch.ones(192, 1), 1.0, "float32")
    for number in range(5):
        writer.add_task(
            str(number), {HEAD: stored}, original_nbytes=1, error=0.0, adapter_config={}
        )
    writer.finish("card")
    plan = plan_memory(Checkpoint.open(folder), max_loras=4, peft_slots=2)
    assert [plan.mode(m).distinct_tasks for m in ("stock", "materialize", "auto")] == [4, 4, 2]


# --- against the real thing -----------------------------------------------------------------------


def test_defaults_and_modes_are_the_plugins() -> None:
    assert set(MODES) == set(settings.MODES)
    assert settings.Settings().slots == DEFAULT_PEFT_SLOTS
    assert inspect.signature(plan_command).parameters["peft_slots"].default == DEFAULT_PEFT_SLOTS


def test_materialize_is_what_the_store_holds(mixed: Checkpoint) -> None:
    store = ResidentStore(torch.device("cpu"), str, lambda *_: None)
    store.preload(mixed.path)
    found = plan_memory(mixed, max_loras=1).mode("materialize")
    assert store.nbytes == found.bases_nbytes + found.tasks_nbytes > 0


@pytest.mark.parametrize("room", [0, 20])
@pytest.mark.parametrize("basis", ["nf4", "nf4-dq", "int8", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_direct_is_what_the_direct_path_holds(
    tmp_path: Path, basis: str, packed: bool, tp: int, room: int
) -> None:
    checkpoint = make_checkpoint(tmp_path / "ckpt", ["factors", "dense"], basis)
    layouts = [_layout(module, tp) for module in checkpoint.modules if module.name != HEAD]
    path = DirectPath(
        checkpoint,
        layouts,
        str,
        slots=5,
        max_tokens=64,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        packed_basis=packed,
        basis_rows=room,
    )
    tasks = [path.make_task(checkpoint.load_task(task)) for task in checkpoint.tasks]
    plan = plan_memory(
        checkpoint,
        max_loras=5,
        tp=tp,
        packed_basis=packed,
        basis_rows=room,
        max_num_batched_tokens=64,
    )
    found, real = plan.mode("direct"), path.memory()
    assert (found.bases_nbytes, found.cores_nbytes, found.factors_nbytes) == (
        real.bases, real.cores, real.factors
    )  # fmt: skip
    assert found.table_nbytes == path.table.records.nbytes
    assert found.buffers_nbytes == path.routing.nbytes + path.table.codebook.nbytes
    assert found.records_nbytes == sum(t.records.nbytes for t in [*tasks, path.empty])


def _layout(module: ModuleSpec, tp: int) -> LayerLayout:
    """A layer of one slice on the first rank."""
    width_in, width_out = module_slice(module).widths(tp)
    part = SliceLayout(
        module.name,
        lambda slot: torch.empty(0),
        lambda slot: torch.empty(0),
        module.d_in,
        module.d_out,
        (Run(0, 0, width_in),),
        (Run(0, 0, width_out),),
    )
    return LayerLayout(module.name, (part,))


# --- which tasks run direct -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "representation", "reason"),
    [
        ("a.q_proj", "linear", "joint", None),
        ("a.q_proj", "linear", "private", None),
        ("a.q_proj", "linear", "flat", "module a.q_proj is stored flat"),
        ("a.lm_head", "linear", "private", "module a.lm_head is the output head"),
        ("lm_head", "linear", "private", "module lm_head is the output head"),
        ("a.lm_head.proj", "linear", "private", None),
        ("embed", "embedding", "private", "module embed is of kind embedding"),
        ("mlp.experts.12.w1", "linear", "joint", "module mlp.experts.12.w1 is of a fused expert"),
        ("mlp.shared_experts.up_proj", "linear", "private", None),
    ],
)
def test_what_cannot_run_direct(
    name: str, kind: str, representation: str, reason: str | None
) -> None:
    modules = [ModuleSpec("fine", 8, 8), ModuleSpec(name, 8, 8, kind)]
    segments = [Segment(0, "private", "nf4", 1), Segment(1, representation, "nf4", 1)]
    assert direct_obstacle(segments, modules) == reason


# --- the served model -----------------------------------------------------------------------------

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 200,
}


def model_file(folder: Path, **changes: Any) -> Path:
    config = {k: v for k, v in (TINY | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_layer_of_the_model_has_slots(mixed: Checkpoint, tmp_path: Path) -> None:
    shape = read_model_shape(model_file(tmp_path))
    plan = plan_memory(mixed, max_loras=3, tp=4, model=shape, max_lora_rank=8)
    q, kv, o = 64 + 32, 64 + 32, 32 + 64  # 2 KV heads of 32 on 4 ranks: one each
    gate, down = 64 + 24, 24 + 64
    layer = q + 2 * kv + o + 2 * gate + down
    assert plan.mode("materialize").slots_nbytes == 3 * 8 * 2 * (2 * layer + 2 * (64 + 200))
    assert plan.slices == 2 * 7 + 2
    assert plan.mode("auto").table_nbytes == 4 * 14 * 96
    assert plan.layers_from == str(tmp_path / "config.json")
    assert plan.assumptions == []


def test_classes_without_lora_on_heads_have_no_slots_for_them(tmp_path: Path) -> None:
    shape = read_model_shape(model_file(tmp_path, architectures=["MistralForCausalLM"]))
    assert len(shape.slices()) == 14
    llama = read_model_shape(model_file(tmp_path, head_dim=None, num_key_value_heads=None))
    assert (llama.head_dim, llama.kv_heads, len(llama.slices())) == (16, 4, 16)


def test_target_modules_narrow_as_vllm_does(linear: Checkpoint, tmp_path: Path) -> None:
    shape = read_model_shape(model_file(tmp_path))

    def leaves(*targets: str) -> set[str]:
        return {item.leaf for item in targeted(shape.slices(), targets)}

    # One fused layer: who targets q_proj gets slots for k_proj and v_proj.
    assert leaves("q_proj") == leaves("qkv_proj") == {"q_proj", "k_proj", "v_proj"}
    assert leaves("gate_up_proj", "o_proj") == {"gate_proj", "up_proj", "o_proj"}
    assert len(targeted(shape.slices(), ["model.layers.1.mlp.down_proj"])) == 1
    assert len(targeted(shape.slices(), None)) == 16
    plan = plan_memory(linear, max_loras=1, model=shape, target_modules=["q_proj", "o_proj"])
    assert plan.slices == 8
    with pytest.raises(ModelMismatchError, match=r"leave out .*o_proj.*'factors'"):
        plan_memory(linear, max_loras=1, model=shape, target_modules=["q_proj"])
    with pytest.raises(OptionError, match="'x_proj'"):
        plan_memory(linear, max_loras=1, model=shape, target_modules=["x_proj"])


def test_a_task_with_a_head_needs_a_slot(tmp_path: Path) -> None:
    folder = tmp_path / "heads"
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    writer.add_module(Q, 64, 128)
    stored = encode_private(torch.ones(1, 64), torch.ones(128, 1), 1.0, "float32")
    for name in ("score.weight", "model.embed_tokens.base_layer.weight"):
        extra = {name: torch.ones(3, 64)}
        writer.add_task(
            name, {Q: stored}, original_nbytes=1, error=0.0, adapter_config={}, extra=extra
        )
    writer.finish("card")
    plan = plan_memory(Checkpoint.open(folder), max_loras=4)
    assert plan.not_direct == {"score.weight": "it carries score.weight, which stands in a slot"}
    assert plan.assumptions[0].startswith("1 of the tasks carry heads")


def test_assumptions_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    stored = encode_private(torch.ones(1, 64), torch.ones(64, 1), 1.0, "float32")
    for name in ("l.k_proj", "l.c_attn"):
        writer.add_module(name, 64, 64)
    both = dict.fromkeys(("l.k_proj", "l.c_attn"), stored)
    writer.add_task("t", both, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    checkpoint = Checkpoint.open(folder)
    alone = plan_memory(checkpoint, max_loras=1)
    assert len(alone.assumptions) == 1
    assert "the checkpoint's modules alone" in alone.assumptions[0]
    split = plan_memory(checkpoint, max_loras=1, tp=2)
    assert "c_attn" in split.assumptions[2]
    assert "KV head" in split.assumptions[1]
    # c_attn is counted whole, k_proj's B halved.
    assert split.mode(STOCK).slots_nbytes == 2 * ((64 + 32) + (64 + 64))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_loras": 0}, "max_loras must be at least 1, got 0"),
        ({"tp": 0}, "tensor parallel size"),
        ({"tp": 3}, "tensor parallel size 3 does not divide d_out 128"),
        ({"peft_slots": 0}, "peft_slots"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"memory": -1}, "memory"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"max_lora_rank": 7}, "max_lora_rank 7 is none that vLLM takes"),
        ({"max_lora_rank": 1}, "rank 5, which max_lora_rank 1 does not hold; use 8 or more"),
    ],
)
def test_options_out_of_range(mixed: Checkpoint, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        plan_memory(mixed, **({"max_loras": 2} | options))
    assert "\n" not in str(caught.value)


def test_a_small_rank_stops_only_the_modes_that_need_slots(linear: Checkpoint) -> None:
    plan = plan_memory(linear, max_loras=2, max_lora_rank=1)
    assert "does not hold" in str(plan.mode("materialize").obstacle)
    assert plan.mode("materialize").total_nbytes == 0
    assert plan.mode("direct").obstacle is None
    assert plan.mode("auto").slot_rank == 1


def test_a_rank_beyond_vllms_is_said_of_stock(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    writer.add_module(Q, 64, 128)
    stored = encode_private(torch.ones(600, 64), torch.ones(128, 600), 1.0, "nf4")
    writer.add_task("t", {Q: stored}, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    plan = plan_memory(Checkpoint.open(folder), max_loras=1)
    assert "above 512" in str(plan.mode(STOCK).obstacle)
    assert "none that large" in str(plan.mode("materialize").obstacle)
    assert plan.mode("direct").direct_tasks == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_local_experts": 8}, "mixture of experts"),
    ],
)
def test_models_that_are_not_read(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_model_shape(model_file(tmp_path, **changes))


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        read_model_shape(tmp_path)
    for text, words in (("{", "not valid JSON"), ("[]", "no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(OptionError, match=words):
            read_model_shape(tmp_path / "config.json")


def test_a_checkpoint_of_another_model_is_refused(mixed: Checkpoint, tmp_path: Path) -> None:
    def plan(**changes: Any) -> MemoryPlan:
        return plan_memory(
            mixed, max_loras=1, model=read_model_shape(model_file(tmp_path, **changes))
        )

    assert plan().slices == 16
    # The checkpoint's head has 192 rows, the model's 200: padding. 100 is another vocabulary.
    for changes in ({"head_dim": 16}, {"vocab_size": 100}):
        with pytest.raises(ModelMismatchError, match="in the checkpoint and"):
            plan(**changes)
    with pytest.raises(ModelMismatchError, match="no LoRA layer for module lm_head"):
        plan(architectures=["Qwen2ForCausalLM"])


def test_query_heads_must_be_shared_out() -> None:
    shape = ModelShape("m", 64, 96, 1, heads=6, kv_heads=4, head_dim=16, vocab_size=9)
    with pytest.raises(OptionError, match="6 attention heads"):
        shape.check_tp(4)
    shape.check_tp(3)
    k_proj = next(item for item in shape.slices() if item.leaf == "k_proj")
    with pytest.raises(OptionError, match="4 KV heads"):
        k_proj.widths(3)
