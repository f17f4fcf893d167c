"""What the kernels share: device functions, and choices of a launch; needs Triton to import."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Up to this many tokens a batch counts as decode: tiles of 16 tokens, most of them of one, and d_in
# cut into parts so that there are enough programs. Longer ones have tiles of 64.
DECODE_TOKENS = 256
# Programs that a launch should have, where cutting d_in can give them. GPUs have 100 to 150
# multiprocessors, and every part costs a write and a read of its sums.
_WANTED_PROGRAMS = 96
_MAX_PARTS = 32
# Parts of d_in begin at multiples of this many columns; also two blocks of NF4.
PART_ALIGNMENT = 128


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
def multiply(left, right, total, LOW_PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + left @ right`` in float32; with LOW_PRECISION operands of one 16-bit dtype."""
    if LOW_PRECISION:
        # Products of two 16-bit floats are exact in the float32 accumulator.
        total = tl.dot(left, right, total)
    else:
        # "ieee": the default would round float32 operands to TF32.
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
    return min(max(triton.next_power_of_2(max(size, 1)), least), most)


def cut_columns(cols: int, programs: int, least: int) -> tuple[int, int]:
    """(parts, columns a part) for a sum over ``cols`` columns.

    Parts are a power of two, few enough that each has ``least`` columns, and no more than it takes to
    make enough of so many ``programs``.
    """
    parts = 1
    while parts < _MAX_PARTS and parts * programs < _WANTED_PROGRAMS and parts * least < cols:
        parts *= 2
    part_cols = triton.cdiv(triton.cdiv(cols, parts), PART_ALIGNMENT) * PART_ALIGNMENT
    return parts, part_cols
