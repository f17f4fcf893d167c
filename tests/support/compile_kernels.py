"""Compile Triton kernels ahead of time for real GPUs, without one, and read what they use.

A test file says what to compile in a function ``kernel_sources() -> dict[str, KernelSource]`` and
calls ``compile_kernels(__file__, folder)``. Compilation runs in a process of its own, which loads
that file again, since another test may have made Triton interpret.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "kernel-compile"
# Backend, architecture and threads of a warp, as GPUTarget takes them.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class KernelSource:
    """One specialisation of one kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        types: argument -> Triton's type, such as "*bf16"; an argument without one is "i32".
        constants: argument -> value, for the compile-time arguments, for absent pointers (None) and
            for integers that a launch specialises on (1).
        aligned: arguments that are multiples of 16, or pointers aligned to 16 bytes.
        options: Triton's options, such as num_warps and num_stages.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)


def compile_kernels(
    test_file: str, folder: Path, targets: dict[str, tuple[str, int | str, int]] = TARGETS
) -> dict[str, dict[str, int]]:
    """Compile what ``kernel_sources`` of a test file returns, for every target.

    What was found is kept in ``.cache/kernel-compile`` under a hash of all that it depends on, so that
    the same kernels are not compiled again.

    Args:
        test_file: path of a Python file that defines ``kernel_sources``.
        folder: for temporary files and Triton's cache.

    Returns:
        "target source" -> ``registers`` a thread, ``spilled`` (bytes, or registers on AMD) and
        ``shared`` (bytes of shared memory a program).
    """
    kept = CACHE / f"{_key(test_file, targets)}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    report = _compile_in_own_process(test_file, folder, targets)
    CACHE.mkdir(parents=True, exist_ok=True)
    # Moved in one step: a run that is ended here must not leave half a report.
    staged = kept.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps(report))
    staged.replace(kept)
    return report


def _key(test_file: str, targets: dict[str, tuple[str, int | str, int]]) -> str:
    """A hash of the kernels, of what they and their configurations come from, and of Triton."""
    sources = [*(ROOT / "triton_kernels").glob("*.py"), ROOT / "vllm_vlora" / "quantize.py"]
    key = hashlib.sha256(json.dumps([targets, version("triton")]).encode())
    for path in (Path(__file__), Path(test_file), *sorted(sources)):
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return key.hexdigest()[:32]


def _compile_in_own_process(
    test_file: str, folder: Path, targets: dict[str, tuple[str, int | str, int]]
) -> dict[str, dict[str, int]]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    arguments = json.dumps([test_file, str(folder), targets])
    command = [sys.executable, "-W", "ignore", __file__, arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def _compile_all(test_file: str, folder: str, targets: dict[str, list[Any]]) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget

    spec = importlib.util.spec_from_file_location("kernels_to_compile", test_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = {}
    # The test's module imported KernelSource from another copy of this file: duck typing only.
    for source_name, source in module.kernel_sources().items():
        for target_name, target in targets.items():
            used = _compile_one(source, GPUTarget(*target), Path(folder))
            report[f"{target_name} {source_name}"] = used
    return report


def _compile_one(source: KernelSource, target: Any, folder: Path) -> dict[str, int]:
    import triton
    from triton.compiler import ASTSource

    names = source.kernel.arg_names
    unknown = {*source.types, *source.constants, *source.aligned} - set(names)
    assert not unknown, f"the kernel has no arguments {sorted(unknown)}"
    signature = {
        name: "constexpr" if name in source.constants else source.types.get(name, "i32")
        for name in names
    }
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in source.aligned}
    ast = ASTSource(source.kernel, signature, dict(source.constants), attributes)
    kernel = triton.compile(ast, target=target, options=dict(source.options))
    return {"shared": kernel.metadata.shared, **_resources(kernel, target, folder)}


def _resources(kernel: Any, target: Any, folder: Path) -> dict[str, int]:
    if target.backend == "hip":
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        found = [_number(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"]) for name in names]
        return {"registers": found[0], "spilled": found[1] + found[2]}
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = folder / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"])
    found_target = re.search(r"\.target (\w+)", kernel.asm["ptx"])
    assert found_target is not None
    command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={found_target[1]}", str(ptx)]
    command += ["-o", f"{ptx}.o"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = _number(r"(\d+) bytes spill stores", report)
    spilled += _number(r"(\d+) bytes spill loads", report)
    return {"registers": _number(r"Used (\d+) registers", report), "spilled": spilled}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in the compiler's output"
    return int(found[1])


if __name__ == "__main__":
    print(json.dumps(_compile_all(*json.loads(sys.argv[1]))))
