"""The direct path compiled ahead of time for real GPUs, without one: what its host code launches.

Nothing here knows the kernels: the launches are recorded from the host code itself, on layers of real
models. ``make compat-triton`` runs this file with other versions of Triton.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
from compile_kernels import (
    TARGETS,
    compile_launches,
    complaints,
    in_own_process,
)

H100 = {"sm_90": TARGETS["sm_90"]}
OTHERS = {name: target for name, target in TARGETS.items() if name not in H100}
# Long batches of rank 64, one program a multiprocessor and none of it spilled.
RANK_64 = {"sm_90 private_kernel._expand_kernel": 232, "sm_90 private_kernel._shrink_kernel": 255}
# Long batches of one task of that rank in trellis codes: so many bytes, beside 168 registers.
TRELLIS_64 = ("bfloat16 rank 64 trellis, Batch(tokens=257, tasks=1", "spilled 16;")
BASES = ("float", "int8", "nf4", "nf4-dq")
# What the private tasks of a checkpoint may be; a tensor-parallel rank may have to make nf4 of nf4-dq.
FORMATS = (
    ("float",),
    ("int8",),
    ("nf4",),
    ("nf4", "nf4-dq"),
    ("nf4-narrow",),
    ("trellis",),
    ("float", "int8", "nf4", "nf4-dq"),
)
# As many tasks as tokens, and many tokens of few tasks.
DECODE, PREFILL = (64, 64, 64), (4096, 8, 4096)
# Lengths of a batch on either side of every size at which a launch may change.
LENGTHS = (
    *(1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 64, 65, 100, 128, 200, 255, 256, 257, 300, 384, 511, 512),
    *(513, 709, 961, 1024, 1025, 1479, 2048, 3012, 4096, 8192),
)
# So many lengths that each remainder of 16 is among them, and each size at which d_in is cut otherwise.
MANY_LENGTHS = sorted({*LENGTHS, *range(1, 530, 3), *range(530, 8193, 61)})

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton to compile"
)


# --- what is launched; runs in processes of its own -----------------------------------------------


def launch_8b(recording: Any) -> None:
    """Decode and prefill of an 8-billion model: its layer of three slices, and its longest."""
    from engine_launches import EAGER, Batch, Engine, run_direct

    batches = [Batch(*DECODE), Batch(*PREFILL)]
    for basis in ("float", "nf4-dq"):
        engine, modules = Engine("llama-8b", k=64, basis=basis), ("qkv_proj", "down_proj")
        run_direct(recording, engine, batches, modules=modules, ways=[EAGER])
    for formats in FORMATS:
        engine = Engine("llama-8b", rank=16, formats=formats)
        run_direct(recording, engine, batches, modules=("qkv_proj",), ways=[EAGER])
    run_direct(
        recording, Engine("llama-8b", rank=16, formats=("nf4",)), batches, modules=("down_proj",)
    )


def launch_qkv(recording: Any) -> None:
    """The layer of three slices; the kernel for four formats has the bodies of each."""
    from engine_launches import EAGER, Batch, Engine, run_direct

    for engine in (
        *(Engine("llama-8b", k=64, basis=basis) for basis in ("float", "nf4-dq")),
        *(
            Engine("llama-8b", rank=16, formats=formats)
            for formats in (("nf4-narrow",), FORMATS[-1])
        ),
    ):
        batches = [Batch(*DECODE), Batch(*PREFILL)]
        run_direct(recording, engine, batches, modules=("qkv_proj",), ways=[EAGER])


def launch_engines(recording: Any) -> None:
    """Every length of a batch, for each way of storing on one model and the usual ones on all: also
    what the benchmarks launch. What begins ahead differs in the instructions of waiting alone."""
    import torch
    from engine_launches import EAGER, MODELS, Engine, batches, run_direct

    bf16, fp16 = torch.bfloat16, torch.float16
    for engine in (
        *(Engine("llama-8b", k=k) for k in (32, 64, 128)),
        *(Engine("llama-8b", k=64, basis=basis) for basis in BASES),
        *(
            Engine("llama-8b", rank=rank, formats=formats)
            for rank in (8, 16, 64)
            for formats in FORMATS
        ),
        *(
            engine
            for model in MODELS
            for parallel in (1, 4)
            for dtype in ((bf16, fp16) if model == "llama-8b" else (bf16,))
            for engine in (
                Engine(model, parallel, dtype, k=64),
                Engine(model, parallel, dtype, k=64, basis="nf4-dq"),
                Engine(model, parallel, dtype, rank=16, formats=("nf4",)),
            )
        ),
    ):
        run_direct(recording, engine, batches(LENGTHS), ways=[EAGER])


def launch_tests(recording: Any) -> None:
    """The tests that run on a GPU. Without one their results are wrong, so what they find is ignored."""
    from engine_launches import as_on_gpu

    recording.label = "test_direct_kernels.py"
    os.environ["VLORA_TEST_DIRECT"] = "recorder"
    with as_on_gpu():
        ended = pytest.main(
            [str(_beside("test_direct_kernels.py")), "-q", "-p", "no:cacheprovider"]
        )
    assert ended == pytest.ExitCode.TESTS_FAILED
    assert len(recording.launches) > 100


def _beside(name: str) -> str:
    return os.path.join(os.path.dirname(__file__), name)


def late_variants() -> dict[str, list[str]]:
    """Engine -> what compiles while it serves: with which batches."""
    from engine_launches import WAYS, Engine, batches, run_direct, run_warm_up
    from record_launches import recording

    late = {}
    for engine, ahead in (
        (Engine("llama-7b", rank=8), True),
        (Engine("llama-7b", rank=16, formats=("nf4",)), False),
        (Engine("llama-7b", k=64), False),
        (Engine("llama-70b", 4, k=64, rank=64), True),
    ):
        ways = [way for way in WAYS if ahead or not way.ahead]
        with recording(TARGETS["sm_90"]) as found:
            run_warm_up(found, engine, ahead)
            warm = len(found.variants)
            assert warm
            run_direct(found, engine, batches(MANY_LENGTHS), ways=ways)
        late[str(engine)] = [v.label for v in list(found.variants.values())[warm:]]
    return late


def layer_variants() -> dict[str, list[str]]:
    """Kernel -> what launches compile for the first block of a model, and for the others beside."""
    from engine_launches import Batch, Engine, run_direct
    from record_launches import recording

    engine = Engine("llama-7b", k=64, rank=16)
    with recording(TARGETS["sm_90"]) as found:
        run_direct(found, engine, [Batch(*DECODE)])
        first = len(found.variants)
        run_direct(found, engine, [Batch(*DECODE)], repeats=32)
    return {
        "first": [v.name for v in list(found.variants.values())[:first]],
        "others": [v.name for v in list(found.variants.values())[first:]],
    }


# --- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launches", "targets"), [("launch_qkv", OTHERS), ("launch_8b", H100)], ids=["qkv", "8b"]
)
def test_an_engine_s_kernels_compile_without_spilling(
    launches: str, targets: dict[str, Any], tmp_path: Any
) -> None:
    rows = compile_launches(__file__, launches, tmp_path, targets)
    assert {row["target"] for row in rows} == set(targets)
    assert len({row["kernel"] for row in rows}) >= 2
    assert complaints(rows) == []


def test_codes_are_looked_up_by_the_threads_that_load_them(tmp_path: Any) -> None:
    rows = compile_launches(__file__, "launch_8b", tmp_path, H100)
    packed = ("nf4,", "nf4+nf4-dq,", "nf4-narrow,", "trellis,")
    held = [row for row in rows if any(f"rank 16 {formats}" in row["label"] for formats in packed)]
    assert len(held) >= 4 * len(packed)
    found = [(row["kernel"], row["label"], row["detours"]) for row in held if row["detours"]]
    assert found == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whatever_engines_launch_compiles_without_spilling(tmp_path: Any) -> None:
    rows = compile_launches(__file__, "launch_engines", tmp_path, H100)
    found = complaints(rows, allowed=RANK_64)
    assert [line for line in found if not all(part in line for part in TRELLIS_64)] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whatever_the_gpu_tests_launch_compiles(tmp_path: Any) -> None:
    """On sizes that no model has, more registers and spills are right, but slow."""
    rows = compile_launches(__file__, "launch_tests", tmp_path, H100, measured=False)
    assert complaints(rows, held=False) == []


def test_no_batch_compiles_what_the_warm_up_did_not(tmp_path: Any) -> None:
    late = in_own_process(__file__, "late_variants", tmp_path)
    assert len(late) == 4
    assert not any(late.values()), {engine: labels[:5] for engine, labels in late.items()}


def test_the_blocks_of_a_model_share_their_kernels(tmp_path: Any) -> None:
    found = in_own_process(__file__, "layer_variants", tmp_path)
    assert found["first"]
    assert found["others"] == []
