"""The materialize kernel compiled ahead of time for real GPUs, without one: registers and spills."""

from __future__ import annotations

import importlib.util

import pytest
from compile_kernels import TARGETS, KernelSource, compile_kernels

# Format of the matrix, rank, k, dtype of left (None: identity), in which direction out lies, whether
# everything is aligned.
VARIANTS = {
    "bfloat16 joint": ("bfloat16", 16, 64, "bfloat16", "rows", True),
    "int8 joint": ("int8", 16, 64, "float32", "rows", True),
    "nf4 joint": ("nf4", 64, 64, "float32", "columns", True),
    "nf4-dq joint": ("nf4-dq", 16, 64, "float32", "rows", True),
    "bfloat16 identity": ("bfloat16", 16, 16, None, "rows", True),
    "nf4 identity": ("nf4", 16, 16, None, "columns", True),
    "unaligned identity": ("nf4-dq", 16, 16, None, "columns", False),
    "unaligned joint": ("bfloat16", 64, 64, "bfloat16", "any", False),
}
# Four warps on 65536 registers: 168 a thread leave three blocks on a multiprocessor.
MAX_REGISTERS = 168

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton to compile"
)


def kernel_sources() -> dict[str, KernelSource]:
    """What ``compile_kernels`` compiles, in a process of its own."""
    return {name: source(*variant) for name, variant in VARIANTS.items()}


def source(
    format: str, rank: int, k: int, left: str | None, order: str, aligned: bool
) -> KernelSource:
    import torch

    from vllm_vlora.quantize import FLOAT_DTYPES, part_specs
    from vllm_vlora.triton_kernels.materialize_kernel import (
        Kind,
        _materialize_kernel,
        kernel_constants,
    )

    parts = [dtype for dtype, _ in part_specs(format, 64).values()]
    kind = Kind(
        out=torch.bfloat16,
        order=order,
        left=None if left is None else getattr(torch, left),
        format="float" if format in FLOAT_DTYPES else format,
        codes=parts[0],
        scales=parts[1] if len(parts) > 1 else torch.float32,
    )
    constants = kernel_constants(kind, rank, k, aligned, aligned)
    stages = constants.pop("num_stages")
    types = {"jobs_ptr": "*i64", "outs_ptr": "*i64", "tiles_ptr": "*i32"}
    return KernelSource(_materialize_kernel, types, constants, tuple(types), {"num_stages": stages})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return compile_kernels(__file__, tmp_path_factory.mktemp("compile"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_materialize_compiles_without_spilling(
    compiled: dict[str, dict[str, int]], target: str, variant: str
) -> None:
    used = compiled[f"{target} {variant}"]
    assert used["spilled"] == 0, used
    assert 0 < used["registers"] <= MAX_REGISTERS, used
