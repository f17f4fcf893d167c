"""vLLM's layers of fused experts: their slots as plain descriptions, and who writes to them.

A layer holds the projections of all experts of a block. Each slice of it has one tensor for A,
(slots, experts of this rank, max rank, d_in), and one for B, (slots, experts, d_out, max rank). Gate
(w1), down (w2) and up (w3) of one expert are modules of an adapter, "experts.3.gate_proj". With expert
parallel a rank holds some of the experts whole, with tensor parallel its columns of all of them.

What it knows of vLLM's internals stands in ``seam_table``, and is checked on the same versions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.plugin.layouts import Run, SliceLayout, index_runs
from vllm_vlora.plugin.resident import ResidentTask
from vllm_vlora.plugin.slots import SlotWriter


def is_fused_moe(layer: Any) -> bool:
    """Whether the layer is one of fused experts, of whatever kind."""
    return isinstance(layer, FusedMoEWithLoRA)


def expert_stacks(layer: Any) -> list[torch.Tensor]:
    """Every tensor that holds slots of a layer of fused experts."""
    return [
        *layer.w13_lora_a_stacked,
        *layer.w13_lora_b_stacked,
        *layer.w2_lora_a_stacked,
        *layer.w2_lora_b_stacked,
    ]


def expert_obstacle(layer: Any, names: list[str]) -> str | None:
    """Why tasks cannot fill this layer's slots, and the way out; None when they can.

    Args:
        layer: a layer of fused experts.
        names: the adapters' modules that vLLM packs into it.
    """
    if isinstance(layer, FusedMoE3DWithLoRA):
        return (
            "vLLM holds gate and up of this model's experts as one factor; start it with "
            "--enable-mixed-moe-lora-format, which gives each its own"
        )
    if layer.enable_moe_shared_loras:
        return (
            "--enable-moe-shared-loras makes experts share factors; start vLLM without that option"
        )
    if layer.fully_sharded:
        return "--fully-sharded-loras cuts their ranks; start vLLM without that option"
    config = layer.moe_config
    padded = config.intermediate_size_per_partition != _inner_width(config)
    if padded and layer.tp_size > 1:
        return (
            "each tensor-parallel rank pads its share of them; start vLLM with "
            "--enable-expert-parallel or without tensor parallel"
        )
    parallel = config.moe_parallel_config
    if parallel.dp_size > 1:
        return (
            "data-parallel ranks send each other tokens with the numbers of their own slots, in which "
            "others have other adapters; start vLLM without --data-parallel-size"
        )
    if parallel.use_ep and layer.global_num_experts % parallel.ep_size:
        return (
            f"{layer.global_num_experts} experts do not divide among {parallel.ep_size} expert-parallel "
            "ranks; start vLLM with a number of ranks that divides them"
        )
    if len(set(names)) != layer.global_num_experts * _projections(layer):
        return (
            f"vLLM names {len(set(names))} modules for {layer.global_num_experts} experts, as with "
            "redundant experts; start it without --enable-eplb"
        )
    return None


def expert_layouts(layer: Any, names: list[str]) -> list[SliceLayout]:
    """Describe every projection of every expert; those of other ranks' experts have no runs.

    Args:
        layer: a layer without an obstacle.
        names: the adapters' modules that vLLM packs into it: gate, down and up of the first expert,
            then of the second; up and down where experts have no gate.
    """
    count = _projections(layer)
    first = layer.ep_rank * layer.local_num_experts
    projections = _describe_projections(layer)
    return [
        _expert_layout(names[expert * count + place], projection, expert - first)
        for expert in range(layer.global_num_experts)
        for place, projection in enumerate(projections)
    ]


@dataclass(frozen=True)
class _Projection:
    """One projection of all experts of a layer; sizes over all tensor-parallel ranks, unpadded."""

    a: torch.Tensor
    b: torch.Tensor
    d_in: int
    d_out: int
    runs_a: tuple[Run, ...]
    runs_b: tuple[Run, ...]


def _describe_projections(layer: Any) -> list[_Projection]:
    """In the order of vLLM's names: w1, w2 and, of experts with a gate, w3."""
    config = layer.moe_config
    hidden = config.hidden_dim_unpadded or config.hidden_dim
    inner = _inner_width(config) * layer.tp_size
    whole = (Run(0, 0, hidden),)
    # The layer itself says which columns of A and rows of B it keeps, by slicing their numbers.
    rows = index_runs(layer._slice_w13_b(torch.arange(inner).view(1, -1, 1)).reshape(-1))
    columns = index_runs(layer._slice_w2_a(torch.arange(inner).view(1, 1, -1)).reshape(-1))
    w13 = [
        _Projection(a, b, hidden, inner, whole, rows)
        for a, b in zip(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked)
    ]
    (a,), (b,) = layer.w2_lora_a_stacked, layer.w2_lora_b_stacked
    w2 = _Projection(a, b, inner, hidden, columns, whole)
    return [w13[0], w2, *w13[1:]]


def _expert_layout(name: str, projection: _Projection, expert: int) -> SliceLayout:
    """The projection of the ``expert``-th expert of this rank, or of one that it does not hold."""
    held = 0 <= expert < projection.a.shape[1]
    return SliceLayout(
        name,
        functools.partial(_rows, projection.a, expert),
        functools.partial(_columns, projection.b, expert),
        projection.d_in,
        projection.d_out,
        projection.runs_a if held else (),
        projection.runs_b if held else (),
    )


def _rows(stack: torch.Tensor, expert: int, slot: int) -> torch.Tensor:
    return stack[slot, expert]


def _columns(stack: torch.Tensor, expert: int, slot: int) -> torch.Tensor:
    return stack[slot, expert].T


def _projections(layer: Any) -> int:
    """Modules of one expert."""
    return len(layer.w13_lora_a_stacked) + len(layer.w2_lora_a_stacked)


def _inner_width(config: Any) -> int:
    """Columns between up and down that a tensor-parallel rank has of each expert, without padding."""
    return config.intermediate_size_per_partition_unpadded or config.intermediate_size_per_partition


@dataclass
class ExpertWriter:
    """Writes the experts of tasks into slots, and says to each layer whether a slot adapts it.

    For a task without experts vLLM resets the layers, five tensors each, where this would have to go
    through every expert of each.

    Attributes:
        layers: layers of fused experts whose slots tasks can fill, and the modules of each.
        layouts: every expert, those of other ranks among them.
        max_rank: of the slots.
    """

    layers: list[tuple[Any, list[str]]]
    max_rank: int
    layouts: list[SliceLayout] = field(init=False)
    _writer: SlotWriter = field(init=False)
    _layer_of: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.layouts = [
            layout for layer, names in self.layers for layout in expert_layouts(layer, names)
        ]
        self._writer = SlotWriter([part for part in self.layouts if part.runs_a], self.max_rank)
        self._layer_of = {
            name: place for place, (_, names) in enumerate(self.layers) for name in names
        }

    def filled(self, task: ResidentTask) -> list[Any]:
        """The layers that a task's ``write`` fills; vLLM must reset the slot of the others."""
        return [layer for layer, _ in self.layers] if self._adapted(task) else []

    def prepare(self, task: ResidentTask) -> None:
        """Arrange a task's writes now, which its first ``write`` would do otherwise."""
        if self._adapted(task):
            self._writer.prepare(task)

    def write(self, slot: int, task: ResidentTask) -> None:
        """Fill the slot of every layer with a task's experts, where it has any.

        Where it has none vLLM has made the slot zero, so what is known of it stays an upper bound.
        """
        adapted = self._adapted(task)
        if not adapted:
            return
        self._writer.write(slot, task)
        for place, (layer, _) in enumerate(self.layers):
            layer.adapter_enabled[slot] = int(place in adapted)

    def _adapted(self, task: ResidentTask) -> set[int]:
        return {self._layer_of[name] for name in task.sources if name in self._layer_of}

    def forget(self, slot: int) -> None:
        """Take back what is known of a slot's content: stock code has written to it."""
        self._writer.forget(slot)

    def drop(self, path: str) -> None:
        """Let go of what is kept for a task's writes, if anything is."""
        self._writer.drop(path)


def make_expert_writer(
    modules: Mapping[str, Any], packed: Mapping[str, list[str]], max_rank: int
) -> ExpertWriter:
    """The writer over those layers of a model that have no obstacle.

    Args:
        modules: every LoRA layer of the model by its name.
        packed: the adapters' modules that vLLM packs into a layer, by the layer's name.
        max_rank: of the slots.
    """
    layers = [
        (layer, packed.get(name, []))
        for name, layer in modules.items()
        if is_fused_moe(layer) and expert_obstacle(layer, packed.get(name, [])) is None
    ]
    return ExpertWriter(layers, max_rank)


def check_experts(
    modules: Mapping[str, Any],
    packed: Mapping[str, list[str]],
    checkpoint: Checkpoint,
    task_ids: Iterable[str],
    engine_name: Callable[[str], str],
    placement: str,
) -> None:
    """Raise ModelMismatchError, with the way out, when a task adapts experts that it cannot fill.

    ``placement``: how vLLM gives experts to expert-parallel ranks.
    """

    def obstacle(name: str, layer: Any) -> str | None:
        if placement != "linear" and layer.moe_config.moe_parallel_config.use_ep:
            return f"start vLLM without --expert-placement-strategy {placement}"
        return expert_obstacle(layer, packed.get(name, []))

    obstacles = {
        f"{name}.": why
        for name, layer in modules.items()
        if is_fused_moe(layer) and (why := obstacle(name, layer))
    }
    if not obstacles:
        return
    used = {part.module for task in task_ids for part in checkpoint.record(task).segments}
    for module in (checkpoint.modules[index].name for index in sorted(used)):
        for layer, why in obstacles.items():
            if engine_name(module).startswith(layer):
                raise ModelMismatchError(f"{checkpoint.path}: experts as {module}: {why}")
