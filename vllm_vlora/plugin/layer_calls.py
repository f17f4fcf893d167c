"""What a LoRA layer calls instead of its punica wrapper: punica, and the direct kernels beside it."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from vllm.platforms import current_platform

from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.triton_kernels.direct import DirectLayer, add_direct, begin_direct


class Kinds(NamedTuple):
    """Which kinds of adapters there are: those that stand in slots, and direct tasks."""

    stock: bool
    direct: bool


NOTHING = Kinds(stock=False, direct=False)
DIRECT_ONLY = Kinds(stock=False, direct=True)
EVERYTHING = Kinds(stock=True, direct=True)


class Batch(Protocol):
    """What a layer asks the manager about the batch in flight.

    Attributes:
        in_batch: what the batch holds.
        in_graph: what the batches hold that a CUDA graph captured now will be replayed for.
    """

    in_batch: Kinds
    in_graph: Kinds
    vlora_store: ResidentStore


class LayerPunica:
    """What a LoRA layer calls instead of its punica wrapper, which sees everything else.

    ``PunicaWrapperGPU`` is final, so this forwards instead of inheriting.
    """

    def __init__(self, manager: Batch, module: Any, layer: DirectLayer | None) -> None:
        self._inner = module.punica_wrapper
        self._manager = manager
        self._module = module
        self._layer = layer
        self._on_cpu = current_platform.is_cpu()
        number = next(_NUMBERS)
        _LAYERS[number] = self
        # A tensor is an input of a compiled graph, where an int would be a constant in it: then equal
        # layers would not share one graph, and a graph from vLLM's cache would address the layers of
        # the engine that saved it. On CPU, so that reading it waits for nothing.
        self.handle = torch.tensor([number], dtype=torch.int64, device="cpu")
        # The stream that it was begun on, and what is left of it.
        self._begun: tuple[torch.cuda.Stream, Callable[[torch.Tensor], None]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def begin(self, x: torch.Tensor) -> None:
        """In a graph, enqueue on another stream what needs x alone: it runs beside the base layer.

        Outside of graphs the host is what takes long, and another stream would add to that.
        """
        self._begun = None
        if not torch.cuda.is_current_stream_capturing() or not self._manager.in_graph.direct:
            return
        path = self._manager.vlora_store.direct
        assert path is not None
        assert self._layer is not None
        caller = torch.cuda.current_stream(x.device)
        side = _side_stream(caller)
        side.wait_stream(caller)
        with torch.cuda.stream(side):
            rows = x.reshape(-1, x.shape[-1])
            self._begun = side, begin_direct(rows, self._layer, path.table, path.routing)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        add_inputs: bool = True,
    ) -> None:
        """Add ordinary adapters' and direct tasks' updates to y in place.

        ``add_inputs`` is False where vLLM runs the update beside the base layer
        (VLLM_LORA_ENABLE_DUAL_STREAM): y is zeros then, and adding to them is writing.
        """
        assert scale == 1.0
        if torch.compiler.is_compiling():
            # One opaque call: nothing of what the batch holds is burnt into the compiled graph.
            torch.ops.vllm_vlora.add_lora_linear(y, x, self.handle)
        else:
            self.run(y, x)

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """The addition itself, of what the batch needs."""
        manager, module = self._manager, self._module
        # Launches that go into a CUDA graph, and not to the device, serve every batch of the graph.
        capturing = not self._on_cpu and torch.cuda.is_current_stream_capturing()
        kinds = manager.in_graph if capturing else manager.in_batch
        if kinds.stock:
            self._inner.add_lora_linear(
                y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, module.output_slices
            )
        if self._layer is None or not kinds.direct:
            return
        # What a capture that failed has begun is not for a batch that comes later.
        begun, self._begun = self._begun, None
        if begun is not None and capturing:
            side, finish = begun
            torch.cuda.current_stream(y.device).wait_stream(side)
            finish(y)
            return
        path = manager.vlora_store.direct
        assert path is not None
        add_direct(y, x, self._layer, path.table, path.routing)

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> Any:
        """Stock, but not for a batch on CPU that holds no ordinary adapter."""
        if self._manager.in_batch.stock or not self._on_cpu:
            return self._inner.add_lora_embedding(*args, **kwargs)
        # It gathers a slot's B once a token, also for tokens without an adapter.
        return None


def begin_ahead(module: Any, calls: LayerPunica) -> None:
    """Have a LoRA layer begin its direct update before its base layer runs."""
    apply = module.apply

    def apply_beside(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            torch.ops.vllm_vlora.begin_lora_linear(calls.handle, x)
        else:
            calls.begin(x)
        return apply(x, *args, **kwargs)

    module.apply = apply_beside


# A layer by the number in its handle. They are not kept alive: an engine that was shut down must be
# collected.
_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, LayerPunica] = weakref.WeakValueDictionary()


@torch.library.custom_op("vllm_vlora::add_lora_linear", mutates_args=("y",))
def _add_lora_linear(y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor) -> None:
    _LAYERS[int(handle.item())].run(y, x)


# The handle is said to be written, so that this is kept and stays before the addition, which reads it.
@torch.library.custom_op("vllm_vlora::begin_lora_linear", mutates_args=("handle",))
def _begin_lora_linear(handle: torch.Tensor, x: torch.Tensor) -> None:
    _LAYERS[int(handle.item())].begin(x)


@_begin_lora_linear.register_fake
def _begin_lora_linear_fake(handle: torch.Tensor, x: torch.Tensor) -> None:
    return None


@functools.cache
def _side_stream(caller: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream for what begins ahead of ``caller``'s work.

    One for each caller (vLLM runs shared experts on a stream beside the gate's): what is begun is memory
    of the side stream, which has it back once the caller has enqueued the rest. Only work that waits for
    the same caller may take it then.
    """
    return torch.cuda.Stream(caller.device)


@_add_lora_linear.register_fake
def _add_lora_linear_fake(y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor) -> None:
    return None
