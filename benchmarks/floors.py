"""How long each LoRA path must take at least: bytes and operations, and a device's rates.

Pure Python, so that any benchmark can print floors beside what it measured:
``floors.seconds(floors.direct_joint(layer, ...), device)``.

A cost counts every tensor once, read or written, as if caches were perfect within a kernel and empty
between kernels; what a kernel reads that another one wrote is counted twice. So kernels of that form
cannot be faster when their operands come from memory. Fused ones could, as they save the small
intermediates; and so could a repeated measurement whose operands stay in a large L2 cache.

Notation: T tokens, of ``tasks`` distinct tasks (at most T of them matter); a layer takes x (T x d_in) and
adds to y (T x sum of its slices' widths); s bytes an element of x and y; k components of a shared basis
on either side; rank of a task; slot_rank of vLLM's slots, to which stock kernels pad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

NF4_BLOCK = 64
SCALE_BLOCK = 256
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FORMATS = (*FLOAT_BYTES, "int8", "nf4", "nf4-dq", "nf4-narrow", "trellis")
# What vLLM accepts for --max-lora-rank.
SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
RECORD_BYTES = 12 * 8


@dataclass(frozen=True)
class Device:
    """Rates of a device: bytes/s of its memory, dense bf16 operations/s, bytes/s from the host."""

    name: str
    bandwidth: float
    flops: float
    pcie: float


# Datasheet peaks, which no kernel reaches: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM,
# HGX B200 and L4 (rates with sparsity halved), the Ada architecture whitepaper (RTX 4090, fp32
# accumulation), AMD's MI300X data sheet. PCIe: 16 lanes of the data sheet's generation in one direction.
DEVICES = {
    "a100-80": Device("A100 80GB SXM", 2.039e12, 312e12, 32e9),
    "h100": Device("H100 SXM", 3.35e12, 989e12, 64e9),
    "h200": Device("H200 SXM", 4.8e12, 989e12, 64e9),
    "b200": Device("B200 (HGX)", 8e12, 2250e12, 64e9),
    "mi300x": Device("MI300X", 5.3e12, 1307e12, 64e9),
    "l4": Device("L4", 300e9, 121e12, 32e9),
    "rtx4090": Device("RTX 4090", 1.008e12, 165e12, 32e9),
}


@dataclass(frozen=True)
class Layer:
    """A linear layer of vLLM's: x has ``d_in`` columns, each slice of y its width."""

    name: str
    d_in: int
    widths: tuple[int, ...]

    @property
    def d_out(self) -> int:
        """Columns of y."""
        return sum(self.widths)

    @property
    def spread(self) -> int:
        """Columns of A and of B transposed, over all slices: each slice has an A of its own."""
        return len(self.widths) * self.d_in + self.d_out


@dataclass(frozen=True)
class Model:
    """A model's shape: its distinct linear layers, and how often each occurs."""

    name: str
    repeats: int
    layers: tuple[Layer, ...]

    def layer(self, name: str) -> Layer:
        """The layer of that name, or one slice of it by its module's name.

        Raises:
            KeyError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
            parts = _SLICES[layer.name]
            if name in parts:
                return Layer(name, layer.d_in, (layer.widths[parts.index(name)],))
        raise KeyError(name)

    def on_rank(self, ranks: int) -> Model:
        """What one of so many tensor-parallel ranks has: columns of y, or of x where y is summed up.

        Raises:
            ValueError: the ranks do not get equal parts.
        """
        layers = []
        for layer in self.layers:
            cut_in = layer.name in ("o_proj", "down_proj")
            if any(size % ranks for size in ((layer.d_in,) if cut_in else layer.widths)):
                raise ValueError(f"{self.name}: {layer.name} is not {ranks} equal parts")
            d_in = layer.d_in // ranks if cut_in else layer.d_in
            widths = layer.widths if cut_in else tuple(width // ranks for width in layer.widths)
            layers.append(replace(layer, d_in=d_in, widths=widths))
        return replace(self, layers=tuple(layers))


_SLICES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


def llama(name: str, layers: int, hidden: int, intermediate: int, kv_width: int) -> Model:
    """A Llama-like model whose k_proj and v_proj have ``kv_width`` rows each."""
    return Model(
        name,
        layers,
        (
            Layer("qkv_proj", hidden, (hidden, kv_width, kv_width)),
            Layer("o_proj", hidden, (hidden,)),
            Layer("gate_up_proj", hidden, (intermediate, intermediate)),
            Layer("down_proj", intermediate, (hidden,)),
        ),
    )


MODELS = {
    "llama-7b": llama("llama-7b", 32, 4096, 11008, 4096),
    "llama-8b": llama("llama-8b", 32, 4096, 14336, 1024),
    "llama-70b": llama("llama-70b", 80, 8192, 28672, 1024),
}


@dataclass(frozen=True)
class Cost:
    """What a path must move and compute.

    ``bytes`` within device memory, ``host_bytes`` from the host, ``flops`` (two a multiply-add),
    ``launches`` kernels, one after the other, whose programs wait for ``loads`` loads, each for the one
    before it. Of these, ``early_launches`` with ``early_loads`` need x alone: in an engine's graphs they
    run beside the base layer.
    """

    bytes: int = 0
    flops: int = 0
    host_bytes: int = 0
    launches: int = 0
    loads: int = 0
    early_launches: int = 0
    early_loads: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __mul__(self, count: int) -> Cost:
        return Cost(*(count * value for value in astuple(self)))


def _launched(*loads: int, early: int = 0) -> Cost:
    """Kernels by the loads that each waits for; so many of the first need x alone."""
    first = loads[:early]
    return Cost(0, 0, 0, len(loads), sum(loads), len(first), sum(first))


# Counted in the kernels' sources. Punica: the sums set to zero; then whose tokens, how many, from where,
# which, and x; in the expansion after these the sums, and y. Joint: x; then tile, record, core; then
# slot, record, w, y. Private: tile, rank, addresses, A; the same of B, and y.
_PUNICA = _launched(0, 5, 6)
_JOINT = _launched(1, 3, 4, early=2)
_PRIVATE = _launched(4, 5, early=1)


@dataclass(frozen=True)
class Work:
    """The parameters of a path; see the module.

    ``format``: of private factors and packed bases. ``core_itemsize``: of a core that materialize takes.
    """

    tokens: int = 1
    tasks: int = 1
    rank: int = 16
    slot_rank: int = 16
    k: int = 64
    format: str = "bfloat16"
    itemsize: int = 2
    core_itemsize: int = 4

    @property
    def distinct(self) -> int:
        """Tasks whose weights the batch touches."""
        return min(self.tasks, self.tokens)


def row_bytes(format: str, cols: int) -> int:
    """Bytes of one row of ``cols`` packed columns, as checkpoints store them.

    Of nf4-narrow and trellis the mean of four: a quarter of the rows has 4 bits, a quarter 3 and half 2.

    Raises:
        ValueError: an unknown format.
    """
    if format in FLOAT_BYTES:
        return FLOAT_BYTES[format] * cols
    if format == "int8":
        return cols + 4
    blocks = -(-cols // NF4_BLOCK)
    codes = blocks * NF4_BLOCK // 2
    if format == "nf4":
        return codes + 4 * blocks
    if format == "trellis":
        return sum(-(-(cols * bits + 8 - bits) // 8) for bits in (4, 3, 2, 2)) // 4 + 4
    if format == "nf4-narrow":
        codes -= codes * 5 // 16
    if format in ("nf4-dq", "nf4-narrow"):
        return codes + blocks + 8 * -(-blocks // SCALE_BLOCK)
    raise ValueError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")


def core_elements(rank: int, k: int) -> int:
    """Elements of a core over k and k components: dense, or as factors of its rank if smaller."""
    return min(k * k, 2 * rank * k)


def slot_rank(rank: int) -> int:
    """The smallest slot of vLLM's that holds ``rank``; ValueError above the largest."""
    for allowed in SLOT_RANKS:
        if allowed >= rank:
            return allowed
    raise ValueError(f"vLLM serves ranks up to {SLOT_RANKS[-1]}, got {rank}")


# --- the forward pass -----------------------------------------------------------------------------


def base_linear(layer: Layer, work: Work) -> Cost:
    """y = x W: the layer itself, in x's dtype."""
    weights = layer.d_in * layer.d_out
    activations = work.tokens * (layer.d_in + layer.d_out)
    return Cost(work.itemsize * (weights + activations), 2 * work.tokens * weights, 0, 1)


def _update(work: Work, layer: Layer, weights: int, inner_bytes: int, inner_flops: int) -> Cost:
    """x read, y read and written, weights read once, what lies between written and read."""
    activations = work.itemsize * work.tokens * (layer.d_in + 2 * layer.d_out)
    return Cost(activations + weights + inner_bytes, inner_flops)


def punica(layer: Layer, work: Work) -> Cost:
    """Stock vLLM: y += B A x from slots padded to ``slot_rank``, by way of zeroed float32 sums."""
    weights = work.distinct * work.slot_rank * layer.spread * work.itemsize
    between = 3 * 4 * work.tokens * work.slot_rank * len(layer.widths)
    flops = 2 * work.tokens * work.slot_rank * layer.spread
    return _update(work, layer, weights, between, flops) + _PUNICA


def direct_joint(layer: Layer, work: Work) -> Cost:
    """y += U C V x: V and U read once whatever the number of tasks, a core a distinct task."""
    slices, core = len(layer.widths), core_elements(work.rank, work.k)
    weights = (work.k * layer.spread + work.distinct * slices * core) * work.itemsize
    between = 2 * 2 * work.tokens * slices * work.k * work.itemsize
    flops = 2 * work.tokens * (work.k * layer.spread + slices * core)
    return _update(work, layer, weights, between, flops) + _JOINT


def direct_private(layer: Layer, work: Work) -> Cost:
    """y += B A x from packed factors at their own rank, dequantised in registers."""
    packed = len(layer.widths) * row_bytes(work.format, layer.d_in)
    packed += sum(row_bytes(work.format, width) for width in layer.widths)
    weights = work.distinct * work.rank * packed
    between = 2 * work.tokens * len(layer.widths) * work.rank * work.itemsize
    flops = 2 * work.tokens * work.rank * layer.spread
    return _update(work, layer, weights, between, flops) + _PRIVATE


# --- making a task ready --------------------------------------------------------------------------


def materialize_private(layer: Layer, work: Work) -> Cost:
    """Packed factors read, A and B of a slot written whole; one launch for all layers of a task."""
    packed = len(layer.widths) * row_bytes(work.format, layer.d_in)
    packed += sum(row_bytes(work.format, width) for width in layer.widths)
    written = work.slot_rank * layer.spread * work.itemsize
    return Cost(work.rank * packed + written)


def materialize_joint(layer: Layer, work: Work) -> Cost:
    """A = L_A V and B^T = L_B^T U^T into a slot: packed bases and cores read."""
    packed = len(layer.widths) * row_bytes(work.format, layer.d_in)
    packed += sum(row_bytes(work.format, width) for width in layer.widths)
    cores = 2 * work.core_itemsize * len(layer.widths) * work.rank * work.k
    written = work.slot_rank * layer.spread * work.itemsize
    return Cost(work.k * packed + cores + written, 2 * work.rank * work.k * layer.spread)


def activate_stock(layer: Layer, work: Work) -> Cost:
    """Stock vLLM: the slot set to zero, then A and B copied from the host."""
    copied = work.rank * layer.spread * work.itemsize
    zeroed = work.slot_rank * layer.spread * work.itemsize
    return Cost(zeroed + copied, 0, copied, 4 * len(layer.widths))


def activate_direct(layer: Layer, work: Work) -> Cost:
    """The task's records copied into the slot table; one copy for all layers."""
    return Cost(2 * RECORD_BYTES * len(layer.widths))


Path = Callable[[Layer, Work], Cost]
FORWARD: dict[str, Path] = {
    "base": base_linear,
    "punica": punica,
    "direct-joint": direct_joint,
    "direct-private": direct_private,
}
READY: dict[str, Path] = {
    "activate-stock": activate_stock,
    "materialize-private": materialize_private,
    "materialize-joint": materialize_joint,
    "activate-direct": activate_direct,
}
# Paths that handle all layers of a task in one launch.
ONE_LAUNCH = frozenset({"materialize-private", "materialize-joint", "activate-direct"})
USES_FORMAT = frozenset({"direct-private", "materialize-private", "materialize-joint"})
PATHS = FORWARD | READY


def model_cost(op: str, model: Model, work: Work) -> Cost:
    """The cost of a path over all layers of a model; KeyError for an unknown one."""
    total = sum((PATHS[op](layer, work) for layer in model.layers), Cost()) * model.repeats
    return total + Cost(launches=1) if op in ONE_LAUNCH else total


def limits(cost: Cost, device: Device) -> dict[str, float]:
    """Seconds that each of the device's resources is busy; the largest one is the floor."""
    return {
        "memory": cost.bytes / device.bandwidth,
        "compute": cost.flops / device.flops,
        "pcie": cost.host_bytes / device.pcie,
    }


def seconds(
    cost: Cost, device: Device, launch: float = 0.0, load: float = 0.0, *, beside: bool = False
) -> float:
    """max(bytes / bandwidth, flops / rate, host bytes / PCIe rate), and seconds of waiting.

    Args:
        launch, load: seconds for each launch and each of the loads that wait for each other.
        beside: what runs beside the base layer is waited for by nobody.
    """
    launches = cost.launches - (cost.early_launches if beside else 0)
    loads = cost.loads - (cost.early_loads if beside else 0)
    return max(limits(cost, device).values()) + launches * launch + loads * load


def bound(cost: Cost, device: Device) -> str:
    """The resource that sets the floor."""
    found = limits(cost, device)
    return max(found, key=lambda name: found[name])


def formats_of(op: str, formats: Sequence[str]) -> Sequence[str]:
    """The formats that make a difference to a path; one otherwise."""
    return formats if op in USES_FORMAT else formats[:1]
