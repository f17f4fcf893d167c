"""The direct path's kernels compiled ahead of time for real GPUs, without one: registers and spills."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from compile_kernels import TARGETS, KernelSource, compile_kernels

# Four warps on 65536 registers: 168 a thread leave three blocks on a multiprocessor; what has eight
# warps takes more tokens at a time.
MAX_REGISTERS = 168
# Sizes of qkv_proj in an 8-billion model: three slices with k = 64 each, private tasks up to rank 64.
SLICES, K, RANK = 3, 64, 64
DECODE, PREFILL = 64, 4096
CODES = {"float": "*bf16", "int8": "*i8", "nf4": "*u8", "nf4-dq": "*u8"}
SCALES = {"float": None, "int8": "*fp32", "nf4": "*fp32", "nf4-dq": "*u8"}
POINTERS = {
    "y_ptr": "*bf16",
    "x_ptr": "*bf16",
    "w_ptr": "*bf16",
    "z_ptr": "*fp32",
    "h_ptr": "*fp32",
    "book_ptr": "*fp32",
    "records_ptr": "*i64",
    "order_ptr": "*i32",
    "tiles_ptr": "*i32",
    "token_slots_ptr": "*i32",
}
# Arguments that a launch finds to be multiples of 16, beside pointers.
MULTIPLES = ("d_in", "part_cols", "x_stride", "y_stride", "w_stride", "z_stride", "codes_stride")

VARIANTS = {
    "shrink decode": ("shrink", DECODE, "float"),
    "shrink decode nf4-dq": ("shrink", DECODE, "nf4-dq"),
    "shrink prefill nf4": ("shrink", PREFILL, "nf4"),
    "core decode": ("core", DECODE, None),
    "core prefill": ("core", PREFILL, None),
    "expand decode": ("expand", DECODE, "float"),
    "expand decode int8": ("expand", DECODE, "int8"),
    "expand prefill": ("expand", PREFILL, "float"),
    "expand prefill nf4-dq": ("expand", PREFILL, "nf4-dq"),
    "private shrink decode": ("private shrink", DECODE, None),
    "private shrink prefill": ("private shrink", PREFILL, None),
    "private expand decode": ("private expand", DECODE, None),
    "private expand prefill": ("private expand", PREFILL, None),
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton to compile"
)


def kernel_sources() -> dict[str, KernelSource]:
    """What ``compile_kernels`` compiles, in a process of its own."""
    return {name: source(*variant) for name, variant in VARIANTS.items()}


def source(kind: str, tokens: int, format: str | None) -> KernelSource:
    import torch

    from vllm_vlora.triton_kernels import direct_kernel as joint
    from vllm_vlora.triton_kernels import private_kernel as private

    kernel, config = {
        "shrink": lambda: (
            joint._shrink_kernel,
            joint.shrink_config(tokens, format or "", torch.bfloat16),
        ),
        "core": lambda: (joint._core_kernel, joint.core_config(tokens, K, torch.bfloat16)),
        "expand": lambda: (
            joint._expand_kernel,
            joint.expand_config(tokens, K, format or "", torch.bfloat16),
        ),
        "private shrink": lambda: (
            private._shrink_kernel,
            private.shrink_config(tokens, RANK, torch.bfloat16),
        ),
        "private expand": lambda: (
            private._expand_kernel,
            private.expand_config(tokens, RANK, torch.bfloat16),
        ),
    }[kind]()
    options = {name: config.pop(name) for name in ("num_stages", "num_warps") if name in config}
    names = kernel.arg_names
    constants: dict[str, Any] = {name: v for name, v in config.items() if name in names}
    fixed = {"COUNT": SLICES, "ALIGNED": True, "FORMAT": format}
    fixed["PARTS"] = 16 if tokens == DECODE else 4
    constants |= {name: value for name, value in fixed.items() if name in names}
    types = _types(names, format)
    constants |= {name: None for name in names if name in types and types[name] is None}
    types = {name: type for name, type in types.items() if type is not None}
    aligned = [n for n in names if n in MULTIPLES or str(types.get(n)).startswith("*")]
    return KernelSource(kernel, types, constants, tuple(aligned), options)


def _types(names: list[str], format: str | None) -> dict[str, Any]:
    """Triton's type of each argument that is not one integer; None for an absent pointer."""
    types: dict[str, Any] = {name: POINTERS[name] for name in names if name in POINTERS}
    if format is not None:
        matrix = {
            "codes_ptr": CODES[format],
            "scales_ptr": SCALES[format],
            "ranges_ptr": "*fp32" if format == "nf4-dq" else None,
        }
        for name, type in matrix.items():
            if name in names:
                types[name] = type
            else:
                types[f"{name}s"] = ("*i32" if type is None else type,) * SLICES
    tuples = ("numbers", "starts", "widths", "k_ins", "k_outs", "z_starts", "w_starts", "y_starts")
    for name in (*tuples, "block_starts", "codes_strides", "scales_strides", "ranges_strides"):
        if name in names:
            types[name] = ("i32",) * SLICES
    return types


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return compile_kernels(__file__, tmp_path_factory.mktemp("compile"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_direct_compiles_without_spilling(
    compiled: dict[str, dict[str, int]], target: str, variant: str
) -> None:
    used = compiled[f"{target} {variant}"]
    assert used["spilled"] == 0, used
    assert 0 < used["registers"] <= MAX_REGISTERS, used
