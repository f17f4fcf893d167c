"""The Triton kernels compiled ahead of time for real GPUs, without one: registers and spills.

Compilation runs in a process of its own, since another test may have made Triton interpret.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Format of the matrix, rank, k, dtype of left (None: identity), whether out is transposed.
VARIANTS = {
    "bfloat16 joint": ("bfloat16", 16, 64, "bfloat16", False),
    "int8 joint": ("int8", 16, 64, "float32", False),
    "nf4 joint": ("nf4", 64, 64, "float32", True),
    "nf4-dq joint": ("nf4-dq", 16, 64, "float32", False),
    "nf4 identity": ("nf4", 16, 16, None, True),
}
# Four warps on 65536 registers: 168 a thread leave three blocks on a multiprocessor.
MAX_REGISTERS = 168

COMPILE = r"""
import json, re, subprocess, sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_vlora.triton_kernels.materialize_kernel import _materialize_kernel, tile_config

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "int8": "*i8", "nf4": "*u8", "nf4-dq": "*u8"}
SCALES = {"int8": "*fp32", "nf4": "*fp32", "nf4-dq": "*u8"}


def source(format, rank, k, left, transposed):
    dtype = None if left is None else getattr(torch, left)
    constants = tile_config(rank, k, format, dtype)
    stages = constants.pop("num_stages")
    # What a launch specialises on: absent pointers, unit strides, alignment to 16 bytes.
    constants["out_stride_row" if transposed else "out_stride_col"] = 1
    constants["left_stride_col"] = 1
    types = {
        "out_ptr": "*bf16",
        "left_ptr": POINTERS.get(left),
        "codes_ptr": POINTERS[format],
        "scales_ptr": SCALES.get(format),
        "ranges_ptr": "*fp32" if format == "nf4-dq" else None,
        "scale": "fp32",
    }
    constants |= {name: None for name, type in types.items() if type is None}
    signature, attributes = {}, {}
    for index, name in enumerate(_materialize_kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or "stride" in name and name not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(_materialize_kernel, signature, constants, attributes), stages


def resources(kernel, target, folder):
    if target.backend == "hip":
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        found = [int(re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"])[1]) for name in names]
        return {"registers": found[0], "spilled": found[1] + found[2]}
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = Path(folder, "kernel.ptx")
    ptx.write_text(kernel.asm["ptx"])
    arch = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
    command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={arch}", ptx, "-o", f"{ptx}.o"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return {"registers": registers, "spilled": int(stores) + int(loads)}


targets, variants, folder = json.loads(sys.argv[1])
report = {}
for target_name, target in targets.items():
    for variant_name, variant in variants.items():
        ast, stages = source(*variant)
        target_object = GPUTarget(*target)
        kernel = triton.compile(ast, target=target_object, options={"num_stages": stages})
        report[f"{target_name} {variant_name}"] = resources(kernel, target_object, folder)
print(json.dumps(report))
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton to compile"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("compile")
    script = Path(folder, "compile_kernels.py")
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    arguments = json.dumps([TARGETS, VARIANTS, str(folder)])
    command = [sys.executable, "-W", "ignore", str(script), arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_materialize_compiles_without_spilling(
    compiled: dict[str, dict[str, int]], target: str, variant: str
) -> None:
    used = compiled[f"{target} {variant}"]
    assert used["spilled"] == 0, used
    assert 0 < used["registers"] <= MAX_REGISTERS, used
