"""What the kernels share: device functions, and choices of a launch; needs Triton to import."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from vllm_vlora.triton_kernels.direct import TILE_SIZES, Routing

# Arguments and options of a launch, hashable.
Options = tuple[tuple[str, bool], ...]
PDL: Options = (("PDL", True), ("launch_pdl", True))
NO_PDL: Options = (("PDL", False),)
# What is left of an addition once its first launches are enqueued: those that write y.
Rest = Callable[[torch.Tensor], None]

# Up to this many tokens V's product is cut into parts of d_in, so that there are enough programs; a
# longer one is a plain product of matrices.
DECODE_TOKENS = 256
# Up to this many tokens a batch counts as decode, where most tokens are the only ones of their task:
# its tiles have at most 16 tokens. In longer ones they have at most 64. It is vLLM's largest default
# of --max-num-seqs.
SMALL_TILE_TOKENS = 1024
# A shorter batch, too, has tiles of up to 64 where each gets so many tokens.
_FULL_TILE = 32
_MAX_PARTS = 32
# Parts of d_in begin at multiples of this many columns; also two blocks of NF4.
PART_ALIGNMENT = 128


@triton.jit
def start_dependents(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next launch begin with what does not depend on this one (programmatic dependent launch)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the launch before this one, and so for all before it.

    Every program of a kernel that is launched so must call it before it ends or touches what another
    launch writes: when a grid has ended, the launch after it takes all before it for ended, too.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pick(values, place, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Element ``place`` of a tuple of kernel arguments.

    Slices differ in their sizes and addresses. As arguments these cost no memory read and no table
    that would have to be made before a capture; the compiler turns the choice into an index into the
    arguments.
    """
    chosen = values[0]
    for other in tl.static_range(1, COUNT):
        if place == other:
            chosen = values[other]
    return chosen


@triton.jit
def pick_block(block, starts, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(place of the slice, block within it) of a block counted over all slices."""
    place = 0
    for other in tl.static_range(1, COUNT):
        place += (block >= starts[other]).to(tl.int32)
    return place, block - pick(starts, place, COUNT)


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    left, right, total, LOW_PRECISION: tl.constexpr, TF32: tl.constexpr = False
):
    """``total + left @ right`` in float32.

    Args:
        LOW_PRECISION: operands are of one 16-bit dtype.
        TF32: else cut operands to 11 significant bits, which NVIDIA's tensor cores multiply.
    """
    if LOW_PRECISION:
        # Products of two 16-bit floats are exact in the float32 accumulator.
        total = tl.dot(left, right, total)
    elif TF32:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="tf32")
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def load_sum(pointers, part_stride, mask, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of PARTS tiles of numbers that lie ``part_stride`` apart, in a fixed order, in float32."""
    total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    # Four loads in flight: all of them would take more registers than there are.
    AT_ONCE: tl.constexpr = 4 if PARTS > 4 else PARTS
    for part in tl.static_range(1, AT_ONCE):
        total += tl.load(pointers + part * part_stride, mask=mask, other=0.0).to(tl.float32)
    for first in range(AT_ONCE, PARTS, AT_ONCE):
        for part in tl.static_range(AT_ONCE):
            places = pointers + (first + part) * part_stride
            total += tl.load(places, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def aligned(value, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same integer >= 0, of which ``ALIGNED`` promises that it is such a multiple.

    Loads of 16 bytes need that promise. ``tl.multiple_of`` would attach it to the argument of this
    function, where the compiler does not look; it does follow arithmetic.
    """
    if ALIGNED:
        value = value // MULTIPLE * MULTIPLE
    return value


@triton.jit
def aligned_pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """An address as a pointer to DTYPE; ``ALIGNED`` promises a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


_INTERPRETED = not isinstance(pick, triton.JITFunction)


def low_precision(dtype: torch.dtype) -> bool:
    """Whether products of this dtype go to the tensor cores as they are."""
    if dtype == torch.bfloat16 and _INTERPRETED:
        # The interpreter keeps bfloat16 as its bits and would multiply those.
        return False
    return dtype in (torch.float16, torch.bfloat16)


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``size``, within ``least`` and ``most``."""
    return min(max(1 << (max(size, 1) - 1).bit_length(), least), most)


def count_blocks(size: int, block: int) -> int:
    """How many blocks hold ``size``; on the host Triton's own function costs ten times a division."""
    return -(-size // block)


def choose_tiles(x: torch.Tensor, routing: Routing) -> tuple[int, int]:
    """(tokens that a tile has at most, how many tiles to launch for) in the batch at hand.

    A captured graph is replayed for other batches: there it is what their number of tokens may need.
    """
    tokens, small, large = x.shape[0], *TILE_SIZES
    if capturing(x):
        size = small if tokens <= SMALL_TILE_TOKENS else large
        return size, routing.max_tiles(tokens, size)
    full = routing.live_tiles[large] * _FULL_TILE <= routing.routed
    size = large if tokens > SMALL_TILE_TOKENS or (tokens > DECODE_TOKENS and full) else small
    return size, routing.live_tiles[size]


def capturing(x: torch.Tensor) -> bool:
    """Whether a launch on x now becomes part of a graph, which is replayed for other batches."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def on_amd(device: torch.device) -> bool:
    """Whether launches on a device are compiled for AMD's GPUs."""
    return device.type != "cpu" and _target().backend == "hip"


def _target() -> GPUTarget:
    return triton.runtime.driver.active.get_current_target()


def pdl_options(device: torch.device) -> Options:
    """The arguments of a launch that say whether it begins before the one ahead of it has ended.

    Not beside vLLM's own kernels that begin so: its shrink does not wait for what is ahead of it.
    """
    if device.type == "cpu" or os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0") != "0":
        return NO_PDL
    target = _target()
    on = target.backend == "cuda" and target.arch >= 90
    return PDL if on else NO_PDL


@dataclass(frozen=True)
class Chain:
    """How a part's first launch begins, those between, and those that write y: see ``pdl_options``."""

    first: Options
    middle: Options
    rest: Options


def cut_columns(cols: int, programs: int, least: int, wanted: int) -> tuple[int, int]:
    """(parts, columns a part) for a sum over ``cols`` columns.

    Parts are a power of two, few enough that each has ``least`` columns, and no more than it takes to
    make ``wanted`` of so many ``programs``.
    """
    parts = 1
    while parts < _MAX_PARTS and parts * programs < wanted and parts * least < cols:
        parts *= 2
    part_cols = count_blocks(count_blocks(cols, parts), PART_ALIGNMENT) * PART_ALIGNMENT
    return parts, part_cols
