"""vLLM's LoRA layers as plain descriptions: names, shapes, slots, what a tensor-parallel rank keeps.

What it knows of vLLM's internals stands in ``seam_table``, and is checked on the same versions.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.interfaces import supports_multimodal

from vllm_vlora.adapters.module_names import find_name
from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.plugin.experts import expert_stacks, is_fused_moe
from vllm_vlora.plugin.layouts import LayerLayout, Run, SliceLayout, View, index_runs


class EngineNames:
    """The served model's name of a module, by the adapters' name of it.

    By vLLM's own rules; where these lead to no layer of the model, by the other names that the layer has
    in other model classes, which vLLM's rules may not know (``adapters.module_names``).

    Args:
        manager: vLLM's, whose layers are all made when the first name is asked for.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._known: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """The engine's name; that of no layer where the model has none.

        Raises:
            ModelMismatchError: vLLM's rules leave the module out.
        """
        if name not in self._known:
            found = find_name(name, self._layer)
            self._known[name] = self._mapped(name) if found is None else found
        return self._known[name]

    def _layer(self, name: str) -> str | None:
        mapped = self._mapped(name)
        if mapped in self._modules:
            return mapped
        # Adapters of a bare backbone lack the prefix that vLLM's pooling models have.
        prefixed = f"model.{mapped}"
        return prefixed if self._manager.is_pooling_model and prefixed in self._modules else None

    def _mapped(self, name: str) -> str:
        try:
            mapped, _ = parse_fine_tuned_lora_name(
                f"base_model.model.{name}.lora_A.weight", self._mapper
            )
        except ValueError as error:
            raise ModelMismatchError(f"the served model has no module {name} ({error})") from error
        return mapped

    @functools.cached_property
    def _mapper(self) -> Any:
        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        if mapper is None:
            return None
        rename = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper
        return rename()

    @functools.cached_property
    def _modules(self) -> set[str]:
        packed = self._manager.packed_modules
        here = {part for name in self._manager.modules for part in packed.get(name, [name])}
        return here.union(self._manager.elsewhere)


def read_layouts(manager: Any) -> list[SliceLayout]:
    """Describe every slice of every LoRA layer of this rank but fused experts, see ``experts``."""
    layouts: list[SliceLayout] = []
    for module_name, layer in manager.modules.items():
        if is_fused_moe(layer) or _is_without_memory(layer):
            continue
        parts = manager.packed_modules.get(module_name, [module_name])
        if is_logits(layer):
            layouts.append(_logits_layout(parts[0], layer))
        elif is_embedding(layer):
            layouts.append(_embedding_layout(parts[0], layer))
        else:
            layouts += _linear_layouts(parts, layer)
    return layouts


def _stacks(layer: Any) -> list[torch.Tensor]:
    """The slots of a layer that is no fused experts."""
    stacks: list[torch.Tensor] = []
    for name in ("lora_a_stacked", "lora_b_stacked"):
        held = getattr(layer, name, ())
        stacks += [held] if isinstance(held, torch.Tensor) else list(held)
    return stacks


def _is_without_memory(layer: Any) -> bool:
    """Whether a layer is there by name alone, as the lm_head of a pooling model is in vLLM 0.28."""
    return any(stack.is_meta for stack in _stacks(layer))


def is_logits(layer: Any) -> bool:
    """Whether a LoRA layer is the one of lm_head."""
    return type(layer).__name__ == "LogitsProcessorWithLoRA"


def is_embedding(layer: Any) -> bool:
    """Whether a LoRA layer looks tokens up."""
    return type(layer).__name__ == "VocabParallelEmbeddingWithLoRA"


def read_direct_layouts(manager: Any) -> list[LayerLayout]:
    """The linear layers that may run direct: those of the language model, by vLLM's own classes.

    A classification head is one of them by its class, and is none: its rows are requests, not tokens.
    Nor is a router of experts that computes in float32. An encoder's rows, and those of attention to
    them, are not the batch's tokens. A module that vLLM cuts into several slices is one here: its columns
    of y lie side by side.
    """
    model = manager._vllm_config.model_config
    if model.is_encoder_decoder:
        return []
    wrapper, unserved = _language_wrapper(manager), read_unserved(manager)
    return [
        LayerLayout(name, _joined(_linear_layouts(manager.packed_modules.get(name, [name]), layer)))
        for name, layer in manager.modules.items()
        if isinstance(layer, BaseLinearLayerWithLoRA)
        and layer.punica_wrapper is wrapper
        and not is_full_head(layer)
        and name not in unserved
        and _dtype_of_output(layer, model.dtype) == model.dtype
    ]


def _dtype_of_output(layer: Any, usual: torch.dtype) -> torch.dtype:
    """A layer's own dtype, where it is made with one other than the model's (vLLM's ``GateLinear``)."""
    base = layer.base_layer
    return getattr(base, "out_dtype", None) or getattr(base, "params_dtype", None) or usual


def is_full_head(layer: Any) -> bool:
    """Whether it is a classification head, which an adapter may replace whole.

    It is never direct: it has a row for each request, and vLLM tells it which adapter each is of only as
    long as its punica wrapper is the model's own.
    """
    return hasattr(type(layer), "set_module_to_save")


def read_elsewhere(manager: Any) -> dict[str, bool]:
    """Modules of the other pipeline-parallel ranks -> whether they have a direct form there.

    Every rank of the pipeline must ask at the same point of its start.
    """
    group = get_pp_group()
    if group.world_size == 1:
        return {}
    slots = [*read_layouts(manager), *manager.experts.layouts]
    mine = dict.fromkeys((layout.name for layout in slots), False)
    for layer in read_direct_layouts(manager):
        mine.update((part.name, part.is_whole_run) for part in layer.slices)
    of_all: list[dict[str, bool]] = [{} for _ in range(group.world_size)]
    torch.distributed.all_gather_object(of_all, mine, group=group.cpu_group)
    merged = {name: form for theirs in of_all for name, form in theirs.items()}
    return {name: form for name, form in merged.items() if name not in mine}


def read_unserved(manager: Any) -> dict[str, str]:
    """Modules of which an adapter has no effect, or another one's -> why, and the way out.

    Stock vLLM gives them LoRA layers like any others and says nothing.
    """
    reasons: dict[int, str] = {}
    for module in manager.model.modules():
        if hasattr(module, "impl") and hasattr(module, "kv_b_proj"):
            reasons[id(module.kv_b_proj)] = _ABSORBED
        if type(module).__name__ == "MambaMixer":
            reasons |= {id(getattr(module, name)): _IN_PIECES for name in ("x_proj", "dt_proj")}
    towers = _towers_without_map(manager)
    found = {}
    for name, layer in manager.modules.items():
        # Other names of a layer lead to vLLM's wrapper of it or to the layer itself.
        known = (reasons.get(id(seen)) for seen in (layer, getattr(layer, "base_layer", None)))
        why = next(filter(None, known), None) or (_TOWER if name in towers else None)
        if why is not None:
            found[name] = why
    return found


# Multi-head latent attention multiplies kv_b_proj into its queries and outputs.
_ABSORBED = (
    "vLLM multiplies into latent attention (MLA) once, so that no adapter of it has an effect; start "
    "vLLM with VLLM_MLA_DISABLE=1, or leave"
)
_IN_PIECES = (
    "vLLM runs on prompts and on answers of a batch apart, each time with the adapters of the batch's "
    "first tokens; leave"
)
_TOWER = "lies outside of the language model, where vLLM knows no adapters in this model; leave"


def _towers_without_map(manager: Any) -> set[str]:
    """Modules outside of the language model where vLLM does not know that they are.

    It has one punica wrapper for all of such a model, whose rows are the language model's.
    """
    model = manager.model
    if manager.supports_mm or not bool(supports_multimodal(model)):
        return set()
    if manager._vllm_config.model_config.is_encoder_decoder:
        return set()  # Its encoder is part of what vLLM calls its language model.
    language: Any = model.get_language_model()
    inside = {id(module) for module in language.modules()}
    return {name for name, layer in manager.modules.items() if id(layer) not in inside}


def _language_wrapper(manager: Any) -> Any:
    """The punica wrapper of the language model; towers of multimodal models have their own."""
    key = DEFAULT_LANGUAGE_WRAPPER_KEY
    if manager.supports_mm:
        key = manager.mm_mapping.language_model[0]
    return manager.punica_wrapper_mapping[key]


def slot_nbytes(manager: Any) -> int:
    """Bytes of all slots of all LoRA layers of this rank."""
    stacks: list[torch.Tensor] = []
    for layer in manager.modules.values():
        stacks += expert_stacks(layer) if is_fused_moe(layer) else _stacks(layer)
    return sum(stack.nbytes for stack in stacks)


def _linear_layouts(names: list[str], layer: Any) -> list[SliceLayout]:
    stacks = list(zip(layer.lora_a_stacked, layer.lora_b_stacked))
    full = [_full_shape(layer, i, a.shape[3], b.shape[2]) for i, (a, b) in enumerate(stacks)]
    kept_a, kept_b = _kept_columns(layer, full)
    first_rows = _first_rows(layer, full)
    owners = _owners(names, [d_out for _, d_out in full])
    return [
        SliceLayout(
            name,
            functools.partial(_slot_rows, a),
            functools.partial(_slot_columns, b),
            d_in,
            d_out,
            index_runs(kept_a[i]),
            index_runs(kept_b[i] + start),
            first_row=first_rows[i],
        )
        for i, ((name, start, d_out), (a, b), (d_in, _)) in enumerate(zip(owners, stacks, full))
    ]


def _owners(names: list[str], widths: list[int]) -> list[tuple[str, int, int]]:
    """For each slice its module, the slice's first column in it, and the module's d_out.

    vLLM cuts some modules into several slices (Mamba's in_proj into five), each with the module's whole
    A and its own rows of B. Of two modules over more slices (in_proj_qkv and in_proj_z over four) the
    first has all but one, as in vLLM's ``expand_packed_lora``.
    """
    if len(names) > len(widths):
        # Nothing is known to do this; a checkpoint that adapts one of them is refused by name.
        names = [f"{names[0]}.slice_{i}" for i in range(len(widths))]
    spare = len(widths) - len(names)
    counts = [1 + spare, *[1] * (len(names) - 1)]
    owners, rest = [], iter(widths)
    for name, count in zip(names, counts):
        own = list(itertools.islice(rest, count))
        starts = itertools.accumulate(own, initial=0)
        owners += [(name, start, sum(own)) for start, _ in zip(starts, own)]
    return owners


def _joined(slices: list[SliceLayout]) -> tuple[SliceLayout, ...]:
    """Neighbouring slices of one module as one, whose views of slots are the first one's."""
    joined = []
    for _, group in itertools.groupby(slices, key=lambda part: part.name):
        parts = list(group)
        columns = [
            torch.arange(run.source, run.source + run.width) for p in parts for run in p.runs_b
        ]
        joined.append(replace(parts[0], runs_b=index_runs(torch.cat(columns))))
    return tuple(joined)


def _slot_rows(stack: torch.Tensor, slot: int) -> torch.Tensor:
    return stack[slot, 0]


def _slot_columns(stack: torch.Tensor, slot: int) -> torch.Tensor:
    return stack[slot, 0].T


def _full_shape(layer: Any, index: int, width_in: int, width_out: int) -> tuple[int, int]:
    """(d_in, d_out) of a slice over all tensor-parallel ranks."""
    if layer.tp_size == 1:
        return width_in, width_out
    base = layer.base_layer
    if type(layer).__name__.startswith("RowParallel"):
        return width_in * layer.tp_size, layer.output_size
    if type(layer).__name__.startswith("Replicated"):
        return width_in, width_out
    replicas = getattr(base, "num_kv_head_replicas", 1) if index > 0 else 1
    return width_in, width_out * layer.tp_size // replicas


def _kept_columns(
    layer: Any, full: list[tuple[int, int]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ask the layer itself which columns of A and rows of B it keeps, by slicing their numbers."""
    b = [torch.arange(d_out).view(-1, 1) for _, d_out in full]
    if layer.tp_size > 1:
        b = layer.slice_lora_b(b) if len(full) > 1 else [layer.slice_lora_b(b[0])]
    a = _sliced_a(layer, [torch.arange(d_in).expand(_rank(layer), d_in) for d_in, _ in full])
    return [t[0] for t in a], [t.reshape(-1) for t in b]


def _first_rows(layer: Any, full: list[tuple[int, int]]) -> list[int]:
    """The first row of A that the layer keeps of each slice, by slicing their numbers."""
    rows = torch.arange(_rank(layer)).view(-1, 1)
    return [int(t[0, 0]) for t in _sliced_a(layer, [rows.expand(-1, d_in) for d_in, _ in full])]


def _sliced_a(layer: Any, a: list[torch.Tensor]) -> list[torch.Tensor]:
    if layer.tp_size == 1:
        return a
    return layer.slice_lora_a(a) if len(a) > 1 else [layer.slice_lora_a(a[0])]


def _rank(layer: Any) -> int:
    """Ranks of a slot over all tensor-parallel ranks."""
    return layer.lora_b_stacked[0].shape[3]


def _logits_layout(name: str, layer: Any) -> SliceLayout:
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    return _whole_layout(name, functools.partial(_slot_rows, a), b, a.shape[3])


def _embedding_layout(name: str, layer: Any) -> SliceLayout:
    # vLLM keeps an embedding's A transposed, (vocabulary, rank), to look rows up.
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    return _whole_layout(name, lambda slot: a[slot].T, b, a.shape[1])


def _whole_layout(name: str, view_a: View, b: torch.Tensor, d_in: int) -> SliceLayout:
    """A layer that every rank holds whole and whose vocabulary may be padded."""
    d_out = b.shape[2]
    return SliceLayout(
        name,
        view_a,
        functools.partial(_slot_columns, b),
        d_in,
        d_out,
        (Run(0, 0, d_in),),
        (Run(0, 0, d_out),),
        at_most=True,
    )
