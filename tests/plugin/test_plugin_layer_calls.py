"""A layer's calls of punica: stock and direct updates of one batch."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plugin_world import activate_all, build, make_path

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.triton_kernels.direct import add_direct


@pytest.fixture(scope="module")
def layer_calls() -> Any:
    return importlib.import_module("vllm_vlora.plugin.layer_calls")


class Punica:
    """Adds 1 to y and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *rest: Any) -> None:
        self.calls.append("linear")
        assert rest == ("a", "b", 1.0, "slices")
        y += 1

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append("embedding")
        return "embedding"

    def anything_else(self) -> str:
        return "forwarded"


@dataclass
class Layer:
    """One layer's punica, a batch of three tokens of which two are a direct task's, and its update."""

    wrapper: Any
    punica: Punica
    manager: Any
    x: torch.Tensor
    update: torch.Tensor

    def add(self) -> torch.Tensor:
        y = torch.zeros(3, 80)
        self.wrapper.add_lora_linear(y, self.x, (), (), 1.0, (80,))
        return y


def make_punica(module: Any, checkpoint: Checkpoint, on_cpu: bool, direct: bool = True) -> Layer:
    path = make_path(checkpoint)
    activate_all(path, checkpoint, ["one"]).route(np.array([1, 0, 1]))
    manager = SimpleNamespace(
        vlora_store=SimpleNamespace(direct=path),
        in_batch=module.DIRECT_ONLY,
        in_graph=module.EVERYTHING,
    )
    inner = Punica()
    linear = SimpleNamespace(
        punica_wrapper=inner, lora_a_stacked="a", lora_b_stacked="b", output_slices="slices"
    )
    layer = path.layers["o_proj"]
    wrapper = module.LayerPunica(manager, linear, layer if direct else None)
    wrapper._on_cpu = on_cpu
    x, update = torch.randn(3, 96), torch.zeros(3, 80)
    add_direct(update, x, layer, path.table, path.routing)
    assert update.abs().amax() > 0.1
    return Layer(wrapper, inner, manager, x, update)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a CUDA graph is being captured, as far as a build of torch for CPU can tell."""
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    return state


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_a_layer_adds_stock_and_direct_updates(
    layer_calls: Any,
    tmp_path: Path,
    capturing: list[bool],
    on_cpu: bool,
    stock: bool,
    direct: bool,
) -> None:
    """What the batch lacks is left out; on a GPU punica does so by itself outside of linear layers."""
    layer = make_punica(layer_calls, build(tmp_path / "ck"), on_cpu)
    layer.manager.in_batch = layer_calls.Kinds(stock, direct)
    torch.testing.assert_close(layer.add(), float(stock) + layer.update * direct)
    assert layer.punica.calls == ["linear"] * stock
    got = layer.wrapper.add_lora_embedding(1, two=2)
    assert got == ("embedding" if stock or not on_cpu else None)
    assert layer.wrapper.anything_else() == "forwarded"
    with pytest.raises(AssertionError):
        layer.wrapper.add_lora_linear(torch.zeros(3, 80), layer.x, (), (), 2.0, (80,))


@pytest.mark.parametrize("captured", ["NOTHING", "DIRECT_ONLY", "EVERYTHING"])
@pytest.mark.parametrize("batch", ["NOTHING", "DIRECT_ONLY", "EVERYTHING"])
def test_a_graph_is_captured_with_what_its_batches_need(
    layer_calls: Any, tmp_path: Path, capturing: list[bool], captured: str, batch: str
) -> None:
    """Whatever the batch is that stands for them."""
    layer = make_punica(layer_calls, build(tmp_path / "ck"), on_cpu=False)
    layer.manager.in_batch = getattr(layer_calls, batch)
    layer.manager.in_graph = kinds = getattr(layer_calls, captured)
    capturing[0] = True
    torch.testing.assert_close(layer.add(), float(kinds.stock) + layer.update * kinds.direct)
    assert layer.punica.calls == ["linear"] * kinds.stock


def test_a_layer_without_direct_tasks_stays_stock(layer_calls: Any, tmp_path: Path) -> None:
    layer = make_punica(layer_calls, build(tmp_path / "ck"), on_cpu=True, direct=False)
    assert not layer.add().any()
    layer.manager.in_batch = layer_calls.EVERYTHING
    assert (layer.add() == 1).all()


@pytest.fixture
def own_calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of the module whose custom operator is the registered one, whoever imported it before."""
    monkeypatch.delitem(sys.modules, "vllm_vlora.plugin.layer_calls", raising=False)
    return importlib.import_module("vllm_vlora.plugin.layer_calls")


def test_a_compiled_layer_looks_at_each_batch_anew(own_calls: Any, tmp_path: Path) -> None:
    layer = make_punica(own_calls, build(tmp_path / "ck"), on_cpu=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(3, 80)
        layer.wrapper.add_lora_linear(y, x, (), (), 1.0, (80,))
        return y * 2

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    layer.manager.in_batch = own_calls.NOTHING  # As in the run that the graph is traced in.
    assert not compiled(layer.x).any()
    layer.manager.in_batch = own_calls.DIRECT_ONLY
    torch.testing.assert_close(compiled(layer.x), layer.update * 2)
    layer.manager.in_batch = own_calls.EVERYTHING
    torch.testing.assert_close(compiled(layer.x), (layer.update + 1) * 2)


def addition(layer: Layer) -> Any:
    """What vLLM compiles of a layer: the base's output, and the updates added to it."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x @ WEIGHT
        layer.wrapper.add_lora_linear(y, x, (), (), 1.0, (80,))
        return y * 2

    return forward


WEIGHT = torch.randn(96, 80, generator=torch.Generator().manual_seed(1))


def compiled(layer: Layer, backend: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(addition(layer), backend=backend, fullgraph=True, dynamic=False)


def test_equal_layers_have_equal_graphs(own_calls: Any, tmp_path: Path) -> None:
    """vLLM compiles equal pieces of a model once; a constant of the layer would make them differ."""
    texts = []
    for number in range(2):
        layer = make_punica(own_calls, build(tmp_path / str(number)), on_cpu=True)

        def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            call = next(n for n in graph.graph.nodes if "add_lora_linear" in str(n.target))
            assert all(isinstance(argument, torch.fx.Node) for argument in call.args)
            texts.append(graph.print_readable(print_output=False))
            return graph.forward

        compiled(layer, keep)(layer.x)
    assert "add_lora_linear" in texts[0]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("first_is_gone", [False, True])
def test_a_graph_that_another_engine_compiled_reaches_this_ones_layer(
    own_calls: Any, tmp_path: Path, first_is_gone: bool
) -> None:
    saved: list[Any] = []

    def take_saved(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        saved.append(graph.forward)
        return saved[0]  # As from vLLM's cache, whose key does not tell the engines apart.

    first = make_punica(own_calls, build(tmp_path / "first", seed=1), on_cpu=True)
    second = make_punica(own_calls, build(tmp_path / "second", seed=2), on_cpu=True)
    want = (second.x @ WEIGHT + second.update) * 2
    run = compiled(first, take_saved)
    torch.testing.assert_close(run(first.x), (first.x @ WEIGHT + first.update) * 2)
    if first_is_gone:
        del first, run
        torch._dynamo.reset()
    torch.testing.assert_close(compiled(second, take_saved)(second.x), want)
    assert len(saved) == 2


def test_inductor_adds_in_place(own_calls: Any, tmp_path: Path) -> None:
    """The compiler that vLLM uses lowers the call, keeps its order, and reads its handle each time."""
    layer = make_punica(own_calls, build(tmp_path / "ck"), on_cpu=True)
    run = compiled(layer, "inductor")
    for stock in (False, True):
        layer.manager.in_batch = own_calls.Kinds(stock, direct=True)
        want = (layer.x @ WEIGHT + layer.update + stock) * 2
        torch.testing.assert_close(run(layer.x), want)


def test_a_layer_that_nobody_holds_is_not_kept_by_its_number(
    layer_calls: Any, tmp_path: Path
) -> None:
    layer = make_punica(layer_calls, build(tmp_path / "ck"), on_cpu=True)
    number = layer.wrapper.handle.item()
    assert layer_calls._LAYERS[number] is layer.wrapper
    del layer
    assert number not in layer_calls._LAYERS


# --- beside the base layer -------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A LoRA layer as vLLM has it: its base layer, and then the updates."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        self.punica_wrapper = wrapper
        self.register_buffer("weight", WEIGHT)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        y = x @ self.weight
        self.punica_wrapper.add_lora_linear(y, x, (), (), 1.0, (80,))
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply(x, None) * 2


class Streams:
    """Notes which streams are made, used and waited for; the first is the one that a step runs on."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.current = self.main = Stream("main", self)

    def make(self, device: torch.device) -> Stream:
        return Stream(f"beside {self.current.name}", self)


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, name: str, streams: Streams) -> None:
        self.name, self.streams = name, streams

    def wait_stream(self, other: Stream) -> None:
        self.streams.events.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.outer, self.streams.current = self.streams.current, self

    def __exit__(self, *error: object) -> None:
        self.streams.current = self.outer


@pytest.fixture
def beside(
    own_calls: Any, tmp_path: Path, capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> tuple[Layer, Linear, Streams]:
    """A layer whose direct update begins ahead, on streams that only note what is asked of them."""
    streams = Streams()
    layer = make_punica(own_calls, build(tmp_path / "ck"), on_cpu=False)
    layer.manager.in_graph = own_calls.DIRECT_ONLY

    def begin(x: torch.Tensor, *rest: Any) -> Any:
        streams.events.append(f"begun on {streams.current.name}")
        kept = x.clone()

        def finish(y: torch.Tensor) -> None:
            streams.events.append(f"finished on {streams.current.name}")
            add_direct(y, kept, *rest)

        return finish

    monkeypatch.setattr(own_calls, "begin_direct", begin)
    monkeypatch.setattr(torch.cuda, "Stream", streams.make)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    module = Linear(layer.wrapper)
    own_calls.begin_ahead(module, layer.wrapper)
    capturing[0] = True
    return layer, module, streams


def ahead(caller: str = "main") -> list[str]:
    return [
        f"beside {caller} waits for {caller}",
        f"begun on beside {caller}",
        f"{caller} waits for beside {caller}",
        f"finished on {caller}",
    ]


def test_a_graph_has_the_update_begin_beside_the_base_layer(
    beside: tuple[Layer, Linear, Streams], capturing: list[bool], own_calls: Any
) -> None:
    layer, module, streams = beside
    want = (layer.x @ WEIGHT + layer.update) * 2
    torch.testing.assert_close(module(layer.x), want)
    assert streams.events == ahead()
    # Outside of graphs, and in graphs without direct tasks, the layer is as it was.
    streams.events.clear()
    capturing[0] = False
    torch.testing.assert_close(module(layer.x), want)
    capturing[0], layer.manager.in_graph = True, own_calls.NOTHING
    torch.testing.assert_close(module(layer.x), layer.x @ WEIGHT * 2)
    assert streams.events == []


def test_what_runs_on_another_stream_begins_on_another(
    beside: tuple[Layer, Linear, Streams],
) -> None:
    """vLLM runs shared experts beside the gate. What was begun for them is memory of the stream that it
    was begun on: one for both callers would give it to the gate while the experts still read it."""
    layer, module, streams = beside
    want = (layer.x @ WEIGHT + layer.update) * 2
    experts = Stream("experts", streams)
    for _ in range(2):
        streams.events.clear()
        with experts:
            torch.testing.assert_close(module(layer.x), want)
        torch.testing.assert_close(module(layer.x), want)
        assert streams.events == ahead("experts") + ahead()


def test_what_was_begun_is_used_once(
    beside: tuple[Layer, Linear, Streams], capturing: list[bool]
) -> None:
    """A base layer that fails leaves nothing for the next call, which has another x."""
    layer, module, _ = beside
    layer.wrapper.begin(layer.x * 3)
    torch.testing.assert_close(module(layer.x), (layer.x @ WEIGHT + layer.update) * 2)
    assert layer.wrapper._begun is None
    # Nor for a batch that is not captured.
    layer.wrapper.begin(layer.x * 3)
    capturing[0] = False
    torch.testing.assert_close(module(layer.x), (layer.x @ WEIGHT + layer.update) * 2)
    assert layer.wrapper._begun is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_layer_begins_before_its_base_layer(
    beside: tuple[Layer, Linear, Streams], own_calls: Any, backend: str
) -> None:
    """The operator is neither dropped, though nothing uses a result of it, nor moved behind."""
    layer, module, streams = beside
    torch._dynamo.reset()
    run = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        streams.events.clear()
        torch.testing.assert_close(run(layer.x), (layer.x @ WEIGHT + layer.update) * 2)
        assert streams.events == ahead()
    assert layer.wrapper.handle.item() in own_calls._LAYERS
