"""The materialize kernel compiled ahead of time for real GPUs, without one: what its host code launches.

``make compat-triton`` runs this file with other versions of Triton.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
from compile_kernels import TARGETS, compile_launches, complaints, in_own_process, triton_version

H100 = {"sm_90": TARGETS["sm_90"]}
# What a version is known to need more of: registers by target and kernel.
ALLOWED: dict[str, dict[str, int]] = {}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton to compile"
)


# --- what is launched; runs in processes of its own -----------------------------------------------


def launch_slots(recording: Any) -> None:
    """A task into a slot of an 8-billion model: joint with a core of either dtype, and private."""
    import torch
    from engine_launches import Engine, run_materialize, run_unaligned

    for basis, core, rank in (
        ("float", torch.bfloat16, 16),
        ("int8", torch.float32, 16),
        ("nf4", torch.float32, 64),
        ("nf4-dq", torch.float32, 16),
        ("float", None, 16),
        ("nf4", None, 16),
        ("nf4-narrow", None, 16),
        ("trellis", None, 16),
    ):
        run_materialize(recording, Engine("llama-8b", k=64, basis=basis, rank=rank), core, rank)
    # Of fewer rows than a product takes at a time.
    run_materialize(recording, Engine("llama-8b", k=16, basis="nf4-dq"), torch.float32, 16)
    run_unaligned(recording)


def launch_engines(recording: Any) -> None:
    """Every way of storing a task, dtype and rank; models differ in nothing that is compiled."""
    import torch
    from engine_launches import Engine, run_materialize

    for dtype in (torch.bfloat16, torch.float16):
        for basis in ("float", "int8", "nf4", "nf4-dq"):
            for rank in (8, 16, 64):
                for k in (16, 64):
                    engine = Engine("llama-8b", 1, dtype, k, basis, rank)
                    for core in (None, dtype, torch.float32) if k == 64 else (dtype, torch.float32):
                        run_materialize(recording, engine, core, max(rank, 16))


def launch_tests(recording: Any) -> None:
    """The tests that run on a GPU. Without one their results are wrong, so what they find is ignored."""
    recording.label = "test_materialize.py"
    os.environ["VLORA_TEST_MATERIALIZE"] = "recorder"
    test_file = os.path.join(os.path.dirname(__file__), "test_materialize.py")
    options = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    ended = pytest.main([test_file, *options])
    assert ended == pytest.ExitCode.TESTS_FAILED
    assert len(recording.launches) > 50


def late_variants() -> dict[str, list[int]]:
    """Way of storing -> variants after the warm-up and after runs, and launches of both."""
    import torch
    from engine_launches import Engine, materialize_plan
    from record_launches import recording

    from vllm_vlora.triton_kernels.materialize import OutTable

    found: dict[str, list[int]] = {}
    for basis, core in (
        ("float", torch.bfloat16),
        ("nf4-dq", torch.float32),
        ("nf4", None),
        ("nf4-narrow", None),
        ("trellis", None),
    ):
        with recording(TARGETS["sm_90"]) as recorded:
            plan = materialize_plan(Engine("llama-8b", k=64, basis=basis), core, 16)
            plan.warm_up()
            before = [len(recorded.variants), len(recorded.launches)]
            plan.run()
            plan.run(OutTable([job.out for job in plan._jobs]))
        kinds, launches = before
        found[basis] = [kinds, len(recorded.variants), launches, len(recorded.launches)]
    return found


# --- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launches", "targets"),
    [
        ("launch_slots", TARGETS),
        pytest.param("launch_engines", H100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_materialize_compiles_without_spilling(
    launches: str, targets: dict[str, Any], tmp_path: Any
) -> None:
    rows = compile_launches(__file__, launches, tmp_path, targets)
    assert {row["target"] for row in rows} == set(targets)
    assert complaints(rows, allowed=ALLOWED.get(triton_version())) == []


def test_codes_are_looked_up_by_the_threads_that_load_them(tmp_path: Any) -> None:
    rows = compile_launches(__file__, "launch_slots", tmp_path, H100)
    private = [row for row in rows if "private" in row["label"]]
    assert len(private) >= 2 * 4
    assert [(row["label"], row["detours"]) for row in private if row["detours"]] == []
    # Selects between the values took up to 144 registers, a look-up takes its address.
    assert max(row["registers"] for row in private) <= 64


def test_the_first_write_compiles_nothing_that_the_warm_up_did_not(tmp_path: Any) -> None:
    found = in_own_process(__file__, "late_variants", tmp_path)
    assert len(found) == 5
    for basis, (warm, all_kinds, launched, ran) in found.items():
        assert (warm, launched) == (all_kinds, 0), basis
        assert ran == 2 * all_kinds >= 4, basis


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whatever_the_gpu_tests_launch_compiles(tmp_path: Any) -> None:
    """On sizes that no model has, more registers and spills are right, but slow."""
    assert (
        complaints(
            compile_launches(__file__, "launch_tests", tmp_path, H100, measured=False), held=False
        )
        == []
    )
