"""Compile what the host code launches for real GPUs, without one, and read what the kernels use.

A test file has functions that launch, each taking a ``record_launches.Recording``; it calls
``compile_launches(__file__, name, folder)``. That runs in processes of their own, which load the file
again, since another test may have made Triton interpret.

``TRITON_UNDER_TEST`` names a folder with another Triton than the environment's, as
``pip install --target`` makes it; ``make compat-triton`` sets it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from places import BENCHMARKS, ROOT, SUPPORT, TESTS

CACHE = ROOT / ".cache" / "kernel-compile"
PROCESSES = 2
COMPILED = (
    "test_direct_compile.py",
    "test_direct_kernels.py",
    "test_kernel_compile.py",
    "test_materialize.py",
)
LAUNCHING = ("compile_kernels.py", "record_launches.py", "engine_launches.py")
Target = tuple[str, int | str, int]
# Backend, architecture and threads of a warp, as GPUTarget takes them.
TARGETS: dict[str, Target] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Four warps on 65536 registers: with 168 a thread three programs fit on a multiprocessor. What has eight
# warps takes more tokens at a time.
MAX_REGISTERS = 168
# With four programs in reach, ptxas puts some registers aside, outside of inner loops, of its own accord:
# with `maxnreg` it takes more of them and puts none aside. These are bytes of stores and loads.
EASY_REGISTERS = 128
MAX_SPILLED = 40
# Bytes of shared memory that a program can have; what takes more is not launched. NVIDIA: "Maximum
# amount of shared memory per thread block" in the CUDA C++ Programming Guide; 8.6 and 8.9 run the code of
# 8.0, whose own cards have 163 KiB. AMD: LDS in ROCm's hardware specifications.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
WARP = 32
UNDER_TEST = os.environ.get("TRITON_UNDER_TEST", "")


def triton_version() -> str:
    """The Triton that compiles: the folder's under test, or the environment's."""
    if not UNDER_TEST:
        return version("triton")
    found = [d.version for d in distributions(path=[UNDER_TEST]) if d.name == "triton"]
    assert found, f"no Triton in TRITON_UNDER_TEST={UNDER_TEST}"
    return found[0]


def compile_launches(
    test_file: str,
    name: str,
    folder: Path,
    targets: Mapping[str, Target] = TARGETS,
    measured: bool = True,
) -> list[dict[str, Any]]:
    """Compile every variant that a function of a test file launches, for every target.

    What was found is kept in ``.cache/kernel-compile`` under a hash of all that it depends on, so that
    the same kernels are not compiled again.

    Args:
        test_file: path of a Python file.
        name: of a function in it, which takes a ``Recording`` and launches kernels.
        folder: for Triton's cache.
        measured: find out what the kernels use where that is held; assembling them once more takes as
            long as compiling.

    Returns:
        For each target and variant ``target``, ``kernel``, ``label`` (what launches it), and either
        ``error``, or ``warps`` a program, ``registers`` a thread, ``spilled`` (bytes, or registers on
        AMD), ``shared`` (bytes of shared memory a program), ``short`` (products that are too short, see
        ``short_products``), ``detours`` (see there) and ``seconds`` that it took to compile.
    """
    kept = CACHE / f"{_key(test_file, name, targets, measured)}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    report = _start(["compile", test_file, name, dict(targets), measured], folder)
    CACHE.mkdir(parents=True, exist_ok=True)
    # Moved in one step: a run that is ended here must not leave half a report.
    staged = kept.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps(report))
    staged.replace(kept)
    return report


def complaints(
    rows: Sequence[dict[str, Any]],
    held: bool = True,
    allowed: Mapping[str, int] | None = None,
) -> list[str]:
    """What is wrong with a report, one line a variant.

    Args:
        held: whether registers and spills count (``is_held``).
        allowed: target and kernel -> registers where more are known to be needed.
    """
    found = []
    for row in rows:
        most = (allowed or {}).get(f"{row['target']} {row['kernel']}", MAX_REGISTERS)
        counts = held and is_held(row["target"])
        fits = "error" not in row and row["shared"] <= SHARED[row["target"]]
        if not fits or row["short"] or (counts and _takes_much(row, most)):
            found.append(" ".join(f"{name} {value};" for name, value in row.items()))
    return found


def short_products(ttgir: str) -> list[str]:
    """Operands of NVIDIA's matrix instructions that are shorter than their layout along the inner side.

    Four neighbouring threads hold ``kWidth`` elements each of a row of the left operand. With fewer than
    four times as many, Triton 3.6 leaves elements out and multiplies others twice (seen on an H200);
    3.9 chooses a narrower layout.
    """
    operand = r"tensor<\d+x(\d+)x\w+, #ttg\.dot_op<\{opIdx = 0, parent = #\w+, kWidth = (\d+)\}>>"
    found = re.findall(rf"= (?:tt\.dot|ttng\.warp_group_dot) .*?({operand})", ttgir)
    return [text for text, inner, width in found if int(inner) < 4 * int(width)]


def detours(ttgir: str) -> list[str]:
    """What is moved between threads before it is looked up, and tables that are copied value by value.

    Codes belong where they are looked up. With two axes or 16 bytes a thread Triton moves them through
    shared memory; in a loop with stages it copies each value looked up there (on an H100 the
    shrink of 64 tiles of 16 tokens took 103 us so).
    """
    moved = re.findall(r"ttg\.convert_layout [^:]*: (tensor<([\dx]+)xi(?:8|32|64),)", ttgir)
    copied = re.findall(
        r"ttg\.async_copy_global_to_local [^:]*: (tensor<[\dx]+x!tt\.ptr<f32>,)", ttgir
    )
    return copied + [text for text, shape in moved if math.prod(map(int, shape.split("x"))) >= WARP]


def is_held(target: str) -> bool:
    """Whether registers and spills count: with another Triton than the environment's on sm_90 alone."""
    return not UNDER_TEST or target == "sm_90"


def _takes_much(row: Mapping[str, Any], registers: int) -> bool:
    # As many programs of one or two warps fit with whatever registers they take.
    if row["warps"] >= 4 and row["registers"] > registers:
        return True
    return row["spilled"] > (MAX_SPILLED if row["registers"] <= EASY_REGISTERS else 0)


def in_own_process(test_file: str, name: str, folder: Path) -> Any:
    """What a function of a test file without arguments returns, where Triton does not interpret."""
    return _start(["call", test_file, name], folder)


def _key(test_file: str, name: str, targets: Mapping[str, Target], measured: bool) -> str:
    own = Path(test_file).read_text()
    what = [Path(test_file).name, own, name, dict(targets), measured]
    what += [triton_version(), source_hash()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def source_hash() -> str:
    """SHA-256 over the kernels and what launches and compiles them."""
    sources = [
        *(ROOT / "triton_kernels").glob("*.py"),
        *(ROOT / "vllm_vlora" / name for name in ("quantize.py", "narrow_rows.py")),
        BENCHMARKS / "floors.py",
        *(TESTS / "kernels" / name for name in COMPILED),
        *(SUPPORT / name for name in LAUNCHING),
    ]
    digest = hashlib.sha256()
    for path in sorted(sources, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _start(arguments: list[Any], folder: Path) -> Any:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        # Tests whose launches are recorded fail: nobody wants to see these failures again.
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    environment.pop("TRITON_INTERPRET", None)
    if UNDER_TEST:
        others = os.environ.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(UNDER_TEST).resolve()), others])
    result = folder / "result.json"
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(arguments), str(result)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(ended.stdout + ended.stderr)
    return json.loads(result.read_text())


# --- in the process of its own --------------------------------------------------------------------


def _load(test_file: str, name: str) -> Any:
    """A function of a test file; the kernels must be those whose sources are hashed."""
    found = importlib.util.find_spec("vllm_vlora")
    assert found is not None
    assert Path(str(found.origin)).is_relative_to(ROOT), f"not of this repository: {found.origin}"
    spec = importlib.util.spec_from_file_location("launches", test_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["launches"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _compile_all(
    test_file: str, name: str, targets: dict[str, Target], measured: bool
) -> list[dict[str, Any]]:
    """Shares of the targets' variants, in processes that are forked anew for each: what the host code
    keeps of one target must not stand for another."""
    import multiprocessing

    import triton

    found = Path(triton.__file__)
    assert not UNDER_TEST or found.is_relative_to(Path(UNDER_TEST).resolve()), found
    launch = _load(test_file, name)
    shares = PROCESSES if len(targets) < PROCESSES else 1
    global _compile_share

    def _compile_share(work: tuple[str, int]) -> list[dict[str, Any]]:
        target, share = work
        return _compile_target(launch, target, tuple(targets[target]), share, shares, measured)

    works = [(target, share) for target in targets for share in range(shares)]
    with multiprocessing.get_context("fork").Pool(PROCESSES, maxtasksperchild=1) as pool:
        reports = pool.map(_call_share, works, chunksize=1)
    return [row for report in reports for row in report]


def _call_share(work: tuple[str, int]) -> list[dict[str, Any]]:
    return _compile_share(work)


def _compile_target(
    launch: Any, target_name: str, target: Any, share: int, shares: int, measured: bool
) -> list[dict[str, Any]]:
    from record_launches import recording

    with recording(target) as found:
        launch(found)
    variants = list(found.variants.values())[share::shares]
    return [
        {
            "target": target_name,
            "kernel": variant.name,
            "label": variant.label,
            **_compile_one(variant, found.target, measured and is_held(target_name)),
        }
        for variant in variants
    ]


def _compile_one(variant: Any, target: Any, measured: bool) -> dict[str, Any]:
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    began = time.perf_counter()
    try:
        kernel = triton.compile(source, target=target, options=variant.options.__dict__)
    except Exception as error:  # noqa: BLE001 (whatever the compiler says, the test shows it)
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    return {
        "warps": variant.options.num_warps,
        "shared": kernel.metadata.shared,
        "short": short_products(kernel.asm["ttgir"]) if target.backend == "cuda" else [],
        "detours": detours(kernel.asm["ttgir"]) if target.backend == "cuda" else [],
        "seconds": round(time.perf_counter() - began, 1),
        **(_resources(kernel, target) if measured else {}),
    }


def _resources(kernel: Any, target: Any) -> dict[str, int]:
    if target.backend == "hip":
        # Scalar registers go to vector registers, and so not to memory.
        names = ("vgpr_count", "vgpr_spill_count")
        found = [_number(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"]) for name in names]
        return dict(zip(("registers", "spilled"), found))
    from triton.backends.nvidia.compiler import get_ptxas

    found_target = re.search(r"\.target (\w+)", kernel.asm["ptx"])
    assert found_target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={found_target[1]}", ptx.name]
        command += ["-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = _number(r"(\d+) bytes spill stores", report)
    spilled += _number(r"(\d+) bytes spill loads", report)
    return {"registers": _number(r"Used (\d+) registers", report), "spilled": spilled}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in the compiler's output"
    return int(found[1])


def _main(what: str, test_file: str, name: str, rest: Sequence[Any]) -> Any:
    return _compile_all(test_file, name, *rest) if what == "compile" else _load(test_file, name)()


if __name__ == "__main__":
    what, test_file, name, *rest = json.loads(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(_main(what, test_file, name, rest)))
