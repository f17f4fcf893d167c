"""Slots of fused experts next to vLLM's own packing, slicing and set_lora; without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.plugin.experts import ExpertWriter, check_experts, expert_obstacle
from vllm_vlora.plugin.resident import ResidentTask
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.quantize import pack
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.stored import SideSource

EXPERTS, HIDDEN, INNER, MAX_RANK, SLOTS = 4, 24, 16, 8, 2
GATED = {"w1": (HIDDEN, INNER), "w2": (INNER, HIDDEN), "w3": (HIDDEN, INNER)}
"""Projection -> (d_in, d_out), in the order in which vLLM packs them."""
SCALES = {"w1": 0.75, "w2": 1.5, "w3": -2.0}
STACKS = ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked")


def make_layer(
    kind: type = FusedMoEWithLoRA,
    *,
    tp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    dp: int = 1,
    gated: bool = True,
    padding: int = 0,
    **options: bool,
) -> Any:
    """vLLM's layer with slots of its own making, full of NaN; ``tp`` and ``ep`` are (rank, ranks).

    Its constructor wants a model and a kernel; what it reads of them is put in place instead.
    """
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    inner = INNER // tp[1]
    layer.moe_config = SimpleNamespace(
        hidden_dim=HIDDEN + padding,
        hidden_dim_unpadded=HIDDEN,
        intermediate_size_per_partition=inner + padding,
        intermediate_size_per_partition_unpadded=inner,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS // ep[1],
        moe_parallel_config=SimpleNamespace(
            ep_rank=ep[0], ep_size=ep[1], use_ep=ep[1] > 1, dp_size=dp
        ),
    )
    layer.tp_rank, layer.tp_size = tp
    layer.device = torch.device("cpu")
    layer._w13_slices = 2 if gated else 1
    layer.enable_moe_shared_loras = False
    switches = {"fully_sharded_loras": False, "enable_moe_shared_loras": False} | options
    config = SimpleNamespace(
        max_loras=SLOTS, max_lora_rank=MAX_RANK, lora_dtype=torch.bfloat16, **switches
    )
    layer.create_lora_weights(SLOTS, config, SimpleNamespace(architectures=["GptOssForCausalLM"]))
    for stack in stacks(layer):
        stack.fill_(torch.nan)
    return layer


def stacks(layer: Any) -> list[torch.Tensor]:
    return [stack for name in STACKS for stack in getattr(layer, name)]


def names(layer: str = "l", gated: bool = True) -> list[str]:
    chosen = list(GATED)[: 3 if gated else 2]
    return [f"{layer}.experts.{expert}.{part}" for expert in range(EXPERTS) for part in chosen]


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def make_factors(seed: int, modules: list[str], ranks: dict[str, int]) -> Factors:
    """Module -> (A, B) in bfloat16, of its projection's rank."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in modules:
        part = name.rsplit(".", 1)[1]
        d_in, d_out = GATED[part]
        found[name] = (
            torch.randn(ranks[part], d_in, generator=generator).bfloat16(),
            torch.randn(d_out, ranks[part], generator=generator).bfloat16(),
        )
    return found


def make_task(name: str, factors: Factors) -> ResidentTask:
    sources = {
        module: (
            SideSource(pack(a, "bfloat16"), None, 1.0),
            SideSource(pack(b.T.contiguous(), "bfloat16"), None, SCALES[module.rsplit(".", 1)[1]]),
        )
        for module, (a, b) in factors.items()
    }
    return ResidentTask(name, name, MAX_RANK, sources, {})


def set_as_stock(layer: Any, slot: int, modules: list[str], factors: Factors, gated: bool) -> None:
    """What vLLM does with an adapter: pack its experts, take this rank's, set them."""
    loras: list[LoRALayerWeights | None] = []
    for name in modules:
        a, b = factors[name]
        scale = SCALES[name.rsplit(".", 1)[1]]
        loras.append(LoRALayerWeights(name, len(a), 1, a.clone(), b.clone(), scale))
        if not gated and name.endswith("w2"):
            loras.append(None)
    packed = PackedLoRALayerWeights.pack_moe(loras, "l", is_non_gated_moe=not gated).optimize()
    held = slice(
        layer.ep_rank * layer.local_num_experts, (layer.ep_rank + 1) * layer.local_num_experts
    )
    layer.set_lora(slot, [a[held] for a in packed.lora_a], [b[held] for b in packed.lora_b])


def assert_same(ours: Any, stock: Any, slot: int) -> None:
    for mine, theirs in zip(stacks(ours), stacks(stock), strict=True):
        assert mine[slot].contiguous().view(torch.int16).equal(theirs[slot].view(torch.int16))
    assert int(ours.adapter_enabled[slot]) == int(stock.adapter_enabled[slot])


RANKS = [
    pytest.param({}, id="one rank"),
    *(pytest.param({"tp": (rank, 2)}, id=f"tensor parallel {rank} of 2") for rank in range(2)),
    *(pytest.param({"ep": (rank, 2)}, id=f"expert parallel {rank} of 2") for rank in range(2)),
    *(pytest.param({"ep": (rank, 4)}, id=f"expert parallel {rank} of 4") for rank in (0, 3)),
]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_slot_holds_what_stock_puts_there(ranks: dict[str, Any], gated: bool) -> None:
    ours, stock = make_layer(gated=gated, **ranks), make_layer(gated=gated, **ranks)
    modules = names(gated=gated)
    writer = ExpertWriter([(ours, modules)], MAX_RANK)
    # Through one slot: the second leaves rows of the first, which must become zero.
    for seed, sizes in enumerate(
        ({"w1": 8, "w2": 5, "w3": 8}, {"w1": 2, "w2": 6, "w3": 1}, {"w1": 8, "w2": 8, "w3": 8})
    ):
        factors = make_factors(seed, modules, sizes)
        writer.write(1, make_task(f"task {seed}", factors))
        set_as_stock(stock, 1, modules, factors, gated)
        assert_same(ours, stock, 1)
        assert int(ours.adapter_enabled[1]) == 1
    assert all(stack[0].isnan().all() for stack in stacks(ours)), "the other slot is not touched"


def test_each_layer_is_told_whether_a_slot_adapts_it() -> None:
    layers = [make_layer(), make_layer()]
    writer = ExpertWriter([(layer, names(str(n))) for n, layer in enumerate(layers)], MAX_RANK)
    sizes = {"w1": 3, "w2": 3, "w3": 3}
    both = make_task("both", make_factors(0, names("0") + names("1"), sizes))
    one = make_task("one", make_factors(1, ["1.experts.2.w2"], sizes))
    for task, expected in ((both, [1, 1]), (one, [0, 1]), (both, [1, 1])):
        assert writer.filled(task) == layers
        writer.write(0, task)
        assert [int(layer.adapter_enabled[0]) for layer in layers] == expected
    writer.write(0, one)
    assert not any(stack[0].any() for stack in stacks(layers[0]))
    adapted = layers[1].w2_lora_a_stacked[0][0]
    assert [bool(expert.any()) for expert in adapted] == [False, False, True, False]
    assert not any(stack[0].any() for stack in layers[1].w13_lora_a_stacked)


def test_a_task_without_experts_leaves_the_layers_to_vllm() -> None:
    layer, modules = make_layer(), names()
    writer = ExpertWriter([(layer, modules)], MAX_RANK)
    sizes = {"w1": 8, "w2": 8, "w3": 8}
    full = make_task("full", make_factors(0, modules, sizes))
    small = make_factors(1, modules, {"w1": 1, "w2": 1, "w3": 1})
    source = SideSource(pack(torch.ones(1, 8), "float32"), None, 1.0)
    plain = ResidentTask("plain", "plain", 1, {"q_proj": (source, source)}, {})
    assert writer.filled(plain) == []
    writer.write(1, full)
    layer.reset_lora(1)  # As the manager lets vLLM do for the layers that are not filled.
    writer.write(1, plain)
    assert not any(stack[1].any() for stack in stacks(layer))
    # Stock adapters write there too, unseen by the writer but for ``forget``.
    writer.write(1, make_task("small", small))
    set_as_stock(layer, 1, modules, make_factors(0, modules, sizes), gated=True)
    writer.forget(1)
    stock = make_layer()
    set_as_stock(stock, 1, modules, small, gated=True)
    writer.write(1, make_task("small", small))
    assert_same(layer, stock, 1)


def test_padded_layers_take_the_models_own_width() -> None:
    ours, stock, modules = make_layer(padding=8), make_layer(padding=8), names()
    for stack in stacks(ours) + stacks(stock):
        stack.zero_()  # Nobody writes to the padding, which vLLM makes zero.
    writer = ExpertWriter([(ours, modules)], MAX_RANK)
    factors = make_factors(0, modules, {"w1": 8, "w2": 5, "w3": 8})
    writer.write(0, make_task("task", factors))
    set_as_stock(stock, 0, modules, factors, gated=True)
    assert_same(ours, stock, 0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FusedMoE3DWithLoRA, {}, "start it with --enable-mixed-moe-lora-format"),
        (FusedMoEWithLoRA, {"enable_moe_shared_loras": True}, "without that option"),
        (FusedMoEWithLoRA, {"fully_sharded_loras": True}, "--fully-sharded-loras"),
        (FusedMoEWithLoRA, {"padding": 8, "tp": (0, 2)}, "--enable-expert-parallel"),
        (FusedMoEWithLoRA, {"dp": 2}, "without --data-parallel-size"),
    ],
    ids=["gate and up in one", "shared factors", "sharded ranks", "padded shares", "data parallel"],
)
def test_what_cannot_be_filled_is_refused_with_the_way_out(
    tmp_path: Path, kind: type, options: dict[str, Any], message: str
) -> None:
    layer, modules = make_layer(kind, **options), names()
    reason = expert_obstacle(layer, modules)
    assert reason is not None
    assert message in reason
    checkpoint = make_checkpoint(tmp_path / "ck")
    held = {"l.experts": layer, "q_proj": torch.nn.Identity()}
    packed = {"l.experts": modules}
    with pytest.raises(ModelMismatchError, match=r"l\.experts\.3\.w2"):
        check_experts(held, packed, checkpoint, ["experts"], str, "linear")
    check_experts(held, packed, checkpoint, ["attention"], str, "linear")
    check_experts({"l.experts": make_layer()}, packed, checkpoint, ["experts"], str, "round_robin")
    shared = {"l.experts": make_layer(ep=(0, 2))}
    check_experts(shared, packed, checkpoint, ["experts"], str, "linear")
    with pytest.raises(ModelMismatchError, match="without --expert-placement-strategy round_robin"):
        check_experts(shared, packed, checkpoint, ["experts"], str, "round_robin")


def test_redundant_experts_are_refused() -> None:
    assert "--enable-eplb" in str(expert_obstacle(make_layer(), [*names(), "l.experts.4.w1"]))
    assert expert_obstacle(make_layer(), names()) is None


def make_checkpoint(folder: Path, d_in: int = INNER) -> Checkpoint:
    """One task of an expert's down, another of attention alone."""
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    writer.add_module("l.experts.3.w2", d_in, HIDDEN)
    writer.add_module("q_proj", 8, 8)
    for task, (module, width_in, width_out) in {
        "experts": ("l.experts.3.w2", d_in, HIDDEN),
        "attention": ("q_proj", 8, 8),
    }.items():
        stored = encode_private(torch.ones(1, width_in), torch.ones(width_out, 1), 1.0, "float32")
        writer.add_task(task, {module: stored}, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("ep", [(0, 2), (1, 2)], ids=["another rank's expert", "this rank's"])
def test_every_rank_checks_every_expert(tmp_path: Path, ep: tuple[int, int]) -> None:
    experts = ExpertWriter([(make_layer(ep=ep), names())], MAX_RANK)
    writer = SlotWriter([], MAX_RANK, experts.layouts)
    writer.check(make_checkpoint(tmp_path / "fits"), ["experts"], str)
    with pytest.raises(ModelMismatchError, match=r"l\.experts\.3\.w2 is 24 x 20 .* 24 x 16"):
        writer.check(make_checkpoint(tmp_path / "wide", 20), ["experts"], str)


def test_experts_that_do_not_divide_among_ranks_are_refused() -> None:
    """vLLM gives the first ranks one more; their places are then not a rank's multiple."""
    reason = expert_obstacle(make_layer(ep=(1, 3)), names())
    assert reason is not None
    assert "4 experts do not divide among 3 expert-parallel ranks" in reason
