"""vLLM's LoRA layers as we describe them: what is written to their slots next to what stock writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugin_world import build

from vllm_vlora.errors import ModelMismatchError
from vllm_vlora.plugin.layouts import LayerLayout, Run
from vllm_vlora.plugin.resident import ResidentTask
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.quantize import pack
from vllm_vlora.representations.stored import SideSource

RANK, WIDTH = 4, 6
# Mamba-2's in_proj: z, x, B, C, dt; and what a gated delta net makes of in_proj_qkv and in_proj_z.
MAMBA, GATED = (8, 8, 4, 4, 2), (8, 8, 4, 6)


def make_layer(kind: str, sizes: tuple[int, ...], tp_rank: int, tp_size: int) -> Any:
    """A layer of vLLM's own class as it is after ``create_lora_weights``, with two slots."""
    from vllm.lora import layers

    cls = getattr(layers, kind)
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    layer.base_layer = SimpleNamespace(output_sizes=list(sizes))
    layer.tp_rank, layer.tp_size = tp_rank, tp_size
    layer.output_sizes, layer.n_slices = sizes, len(sizes)
    layer.output_slices = tuple(size // tp_size for size in sizes)
    layer.output_ids = (tp_rank,) * len(sizes)
    layer.lora_a_stacked = tuple(torch.zeros(2, 1, RANK, WIDTH) for _ in sizes)
    layer.lora_b_stacked = tuple(torch.zeros(2, 1, n, RANK) for n in layer.output_slices)
    return layer


def make_factors(d_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(RANK, WIDTH), torch.randn(d_out, RANK)


def write_ours(layer: Any, names: list[str], factors: dict[str, Any]) -> None:
    from vllm_vlora.plugin.layers import _linear_layouts

    layouts = _linear_layouts(names, layer)
    for layout in layouts:
        if layout.name in factors:
            a, b = factors[layout.name]
            assert (layout.d_out, layout.d_in) == (len(b), a.shape[1])
    sources = {
        name: tuple(SideSource(pack(m, "float32"), None, 1.0) for m in (a, b.T.contiguous()))
        for name, (a, b) in factors.items()
    }
    SlotWriter(layouts, RANK).write(1, ResidentTask("task", "path", RANK, sources, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        ("MergedColumnParallelLinearVariableSliceWithLoRA", MAMBA, ["in_proj"]),
        ("MergedColumnParallelLinearWithLoRA", GATED, ["in_proj_qkv", "in_proj_z"]),
    ],
)
def test_modules_that_vllm_cuts_into_slices_fill_them_as_stock_does(
    kind: str, sizes: tuple[int, ...], names: list[str], tp_rank: int, tp_size: int
) -> None:
    torch.manual_seed(0)
    layer = make_layer(kind, sizes, tp_rank, tp_size)
    widths = [sum(sizes)] if len(names) == 1 else [sum(sizes[:-1]), sizes[-1]]
    factors = {name: make_factors(width) for name, width in zip(names, widths)}
    a, b = ([pair[side] for pair in factors.values()] for side in (0, 1))
    layer.set_lora(0, *((a[0], b[0]) if len(names) == 1 else (a, b)))
    write_ours(layer, names, factors)
    for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
        assert stack[0].count_nonzero()
        assert stack[1].equal(stack[0])


def test_one_of_two_modules_over_more_slices_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    for name, width in (("in_proj_qkv", sum(GATED[:-1])), ("in_proj_z", GATED[-1])):
        layer = make_layer("MergedColumnParallelLinearWithLoRA", GATED, 0, 1)
        write_ours(layer, ["in_proj_qkv", "in_proj_z"], {name: make_factors(width)})
        filled = [bool(stack[1].count_nonzero()) for stack in layer.lora_b_stacked]
        assert filled == [name != "in_proj_z"] * 3 + [name == "in_proj_z"]


@pytest.mark.parametrize(("tp_size", "whole"), [(1, True), (2, False)])
def test_a_module_of_several_slices_may_run_direct_where_it_is_in_one_piece(
    tp_size: int, whole: bool
) -> None:
    from vllm_vlora.plugin.layers import _joined, _linear_layouts

    layer = make_layer("MergedColumnParallelLinearVariableSliceWithLoRA", MAMBA, 0, tp_size)
    (part,) = LayerLayout("layer", _joined(_linear_layouts(["in_proj"], layer))).slices
    assert (part.name, part.d_out, part.is_whole_run) == ("in_proj", 26, whole)
    if whole:
        assert part.runs_b == (Run(0, 0, 26),)
    assert sum(run.width for run in part.runs_b) == 26 // tp_size
    layer = make_layer("MergedColumnParallelLinearWithLoRA", GATED, 0, 1)
    parts = _joined(_linear_layouts(["in_proj_qkv", "in_proj_z"], layer))
    assert [part.runs_b for part in parts] == [(Run(0, 0, 20),), (Run(0, 0, 6),)]


class Latent(torch.nn.Module):
    """What tells multi-head latent attention from a plain layer with a kv_b_proj."""

    def __init__(self, kv_b_proj: torch.nn.Module, absorbs: bool) -> None:
        super().__init__()
        self.kv_b_proj = kv_b_proj
        if absorbs:
            self.impl = object()


class Wrapped(torch.nn.Module):
    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def served(model: Any, modules: dict[str, Any], **options: Any) -> SimpleNamespace:
    """A manager of vLLM's, of a model of float32, as far as it is read here."""
    config = SimpleNamespace(is_encoder_decoder=False, dtype=torch.float32)
    vars(config).update(options)
    wrapper = object()
    for layer in modules.values():
        layer.punica_wrapper = wrapper
    return SimpleNamespace(
        model=model,
        modules=modules,
        packed_modules={},
        supports_mm=False,
        punica_wrapper_mapping={"language_model": wrapper},
        _vllm_config=SimpleNamespace(model_config=config),
    )


@pytest.mark.parametrize("alias", ["the wrapper", "the layer itself"])
def test_what_latent_attention_reads_once_is_refused(tmp_path: Any, alias: str) -> None:
    """vLLM makes its layer's other names the wrapper; both are known, lest one becomes the other."""
    from vllm_vlora.plugin.layers import read_unserved
    from vllm_vlora.plugin.manager import _check_unserved

    wrapped, other = Wrapped(torch.nn.Linear(2, 2)), Wrapped(torch.nn.Linear(2, 2))
    seen = wrapped if alias == "the wrapper" else wrapped.base_layer
    model = torch.nn.ModuleList([Latent(seen, True), Latent(other, False), wrapped])
    manager = served(model, {"kv_b_proj": wrapped, "o_proj": other})
    unserved = read_unserved(manager)
    assert list(unserved) == ["kv_b_proj"]
    assert read_unserved(served(model[1], manager.modules)) == {}

    checkpoint = build(tmp_path / "checkpoint", {"task": {"o": ("private", 1)}})
    _check_unserved(checkpoint, "task", unserved, str)
    with pytest.raises(ModelMismatchError, match=r"'task' adapts o, .*start vLLM with VLLM_MLA_"):
        _check_unserved(checkpoint, "task", unserved, lambda name: "kv_b_proj")


class MambaMixer(torch.nn.Module):
    """What tells vLLM's layer of Mamba-1, whose x_proj and dt_proj see a part of the rows."""

    def __init__(self, **layers: torch.nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def test_what_vllm_runs_on_a_part_of_the_rows_is_refused_and_never_direct(tmp_path: Any) -> None:
    from vllm_vlora.plugin.layers import read_direct_layouts
    from vllm_vlora.plugin.manager import _check_unserved

    layers = {name: one_slice() for name in ("in_proj", "x_proj", "dt_proj")}
    manager = served(MambaMixer(**layers), dict(layers))
    assert [layout.name for layout in read_direct_layouts(manager)] == ["in_proj"]
    checkpoint = build(tmp_path / "checkpoint", {"task": {"o": ("private", 1)}})
    from vllm_vlora.plugin.layers import read_unserved

    for name in ("x_proj", "dt_proj"):
        with pytest.raises(ModelMismatchError, match=r"'task' adapts o, .*apart, .*leave the task"):
            _check_unserved(checkpoint, "task", read_unserved(manager), lambda _, to=name: to)


def one_slice() -> Any:
    return make_layer("MergedColumnParallelLinearWithLoRA", (4,), 0, 1)


def test_a_router_of_experts_that_computes_in_float32_is_never_direct() -> None:
    """vLLM gives ``GateLinear`` a LoRA layer: x is of 16 bits and y is not."""
    from vllm_vlora.plugin.layers import read_direct_layouts

    layers = {name: one_slice() for name in ("proj", "made", "asked", "same")}
    layers["made"].base_layer.params_dtype = torch.float32
    layers["asked"].base_layer.params_dtype = torch.bfloat16
    layers["asked"].base_layer.out_dtype = torch.float32
    layers["same"].base_layer.out_dtype = None
    layers["same"].base_layer.params_dtype = torch.bfloat16
    manager = served(torch.nn.ModuleDict(layers), dict(layers), dtype=torch.bfloat16)
    assert [layout.name for layout in read_direct_layouts(manager)] == ["proj", "same"]


class ImageModel(torch.nn.Module):
    """A model with a tower, of which vLLM has no map: no ``get_mm_mapping``."""

    supports_multimodal = True

    def __init__(self, tower: torch.nn.Module, language: torch.nn.Module) -> None:
        super().__init__()
        self.tower, self.language = torch.nn.ModuleList([tower]), torch.nn.ModuleList([language])

    def get_language_model(self) -> torch.nn.Module:
        return self.language


def test_a_tower_without_a_map_of_its_adapters_is_refused_and_never_direct() -> None:
    from vllm_vlora.plugin.layers import read_direct_layouts, read_unserved

    layers = {"tower.0": one_slice(), "language.0": one_slice()}
    manager = served(ImageModel(*layers.values()), layers)
    assert list(read_unserved(manager)) == ["tower.0"]
    assert "knows no adapters" in read_unserved(manager)["tower.0"]
    assert [layout.name for layout in read_direct_layouts(manager)] == ["language.0"]
    # With a map vLLM has a wrapper for each part.
    manager.supports_mm = True
    assert read_unserved(manager) == {}


def test_nothing_is_direct_whose_rows_may_be_an_encoders() -> None:
    from vllm_vlora.plugin.layers import read_direct_layouts, read_unserved

    layers = {"tower.0": one_slice(), "language.0": one_slice()}
    manager = served(ImageModel(*layers.values()), layers, is_encoder_decoder=True)
    assert read_direct_layouts(manager) == []
    assert read_unserved(manager) == {}, "as stock vLLM serves it"


def test_a_classification_head_is_never_direct() -> None:
    """It has a row for each request; another punica wrapper would keep vLLM from telling it whose."""
    from vllm.lora.layers import ClassificationHeadWithLoRA

    from vllm_vlora.plugin.layers import read_direct_layouts

    name = "MergedColumnParallelLinearWithLoRA"
    layers = {"score": ClassificationHeadWithLoRA, "proj": None}
    modules = {}
    for module, cls in layers.items():
        layer = make_layer(name, (4,), 0, 1)
        if cls is not None:
            layer.__class__ = cls
        modules[module] = layer
    manager = served(torch.nn.ModuleDict(), modules)
    assert [layout.name for layout in read_direct_layouts(manager)] == ["proj"]
