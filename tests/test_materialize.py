"""The materialize operation against a float64 reference.

The same tests hold the torch reference, the Triton kernel in Triton's interpreter and, where there
is a GPU, the compiled kernel. Triton decides at import whether it interprets, so each backend other
than the reference runs in a pytest process of its own, which the last tests of this file start.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_vlora.quantize import FORMATS, PackedMatrix, pack, unpack
from vllm_vlora.triton_kernels.materialize import (
    MaterializeJob,
    materialize,
    materialize_reference,
    materialize_triton,
)

BACKEND = os.environ.get("VLORA_TEST_MATERIALIZE", "reference")
DEVICE = "cuda" if BACKEND == "gpu" else "cpu"
run_jobs = materialize_reference if BACKEND == "reference" else materialize_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative rounding of a store: half a unit in the last place, but Triton's interpreter cuts a
# float32 to bfloat16 instead of rounding it.
STORE_ERROR = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if BACKEND == "interpreter" else 2.0**-8,
}
SENTINEL = 42.0


def make_out(rows: int, cols: int, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, ...]:
    """A poisoned ``rows x cols`` view inside a larger buffer, and a mask of the bytes outside."""
    if layout == "transposed":
        buffer = torch.full((cols + 2, rows + 3), SENTINEL, dtype=dtype, device=DEVICE)
    elif layout == "stepped":
        buffer = torch.full((2 * rows + 3, 3 * cols + 2), SENTINEL, dtype=dtype, device=DEVICE)
    else:
        buffer = torch.full((rows + 2, cols + 3), SENTINEL, dtype=dtype, device=DEVICE)
    outside = torch.ones_like(buffer, dtype=torch.bool)

    def view(tensor: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return tensor[1 : 1 + cols, 2 : 2 + rows].t()
        if layout == "stepped":
            return tensor[1 : 1 + 2 * rows : 2, 2 : 2 + 3 * cols : 3]
        return tensor[1 : 1 + rows, 2 : 2 + cols]

    view(outside).fill_(False)
    out = view(buffer)
    out.fill_(float("nan"))
    return out, buffer, outside


def make_matrix(rows: int, cols: int, format: str, wide: bool) -> PackedMatrix:
    matrix = torch.randn(rows, cols, dtype=torch.float64)
    packed = pack(matrix.float(), format).to(DEVICE)
    if not wide or "values" not in packed.parts:
        return packed
    # A column slice of a wider tensor: rows are further apart than they are long.
    values = torch.full((rows, cols + 5), float("nan"), device=DEVICE).to(
        packed.parts["values"].dtype
    )
    values[:, 2 : 2 + cols] = packed.parts["values"]
    return PackedMatrix(format, rows, cols, {"values": values[:, 2 : 2 + cols]})


def assert_job_result(job: MaterializeJob) -> None:
    """``job.out`` within the rounding that the operation's definition allows."""
    matrix = unpack(job.matrix).double()[:, job.start : job.start + job.width]
    if job.left is None:
        product, magnitude, terms = matrix, matrix.abs(), 0
    else:
        left = job.left.double()
        product, magnitude = left @ matrix, left.abs() @ matrix.abs()
        terms = job.matrix.rows
    scale = torch.tensor(job.scale, dtype=torch.float32).double().item()
    expected = torch.zeros(job.out.shape, dtype=torch.float64, device=job.out.device)
    expected[: job.rank, : job.width] = scale * product
    bound = torch.zeros_like(expected)
    smallest = torch.finfo(job.out.dtype).smallest_normal * STORE_ERROR[job.out.dtype]
    bound[: job.rank, : job.width] = (
        (terms + 2) * 2.0**-24 * abs(scale) * magnitude
        + STORE_ERROR[job.out.dtype] * abs(scale) * product.abs() * (1 + 2.0**-10)
        + 2 * smallest
    )
    error = (job.out.double() - expected).abs()
    assert not torch.isnan(error).any()
    assert (error <= bound).all(), (error - bound).max()
    # The remainder of the slot is zero, not merely small.
    assert job.out[job.rank :].count_nonzero() == 0
    assert job.out[:, job.width :].count_nonzero() == 0


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    identity = draw(st.booleans())
    rank = draw(st.integers(1, 40))
    width = draw(st.integers(0, 300))
    start = draw(st.integers(0, 200))
    return {
        "format": draw(st.sampled_from(FORMATS)),
        "out_dtype": draw(st.sampled_from(DTYPES)),
        "left_dtype": None if identity else draw(st.sampled_from(DTYPES)),
        "rank": rank,
        "k": rank if identity else draw(st.integers(1, 70)),
        "start": start,
        "width": width,
        "d": start + width + draw(st.integers(0, 70)),
        "extra_rows": draw(st.sampled_from([0, 0, 1, 24])),
        "extra_cols": draw(st.sampled_from([0, 0, 1, 200])),
        "layout": draw(st.sampled_from(["rows", "transposed", "stepped"])),
        "wide": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 1.0, 0.3, -2.5, 0.0])),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }


def case(**changes: object) -> dict[str, object]:
    """A plain case: rank 16, no remainder, everything in float32."""
    plain: dict[str, object] = {
        "format": "float32",
        "out_dtype": torch.float32,
        "left_dtype": torch.float32,
        "rank": 16,
        "k": 32,
        "start": 0,
        "width": 128,
        "d": 128,
        "extra_rows": 0,
        "extra_cols": 0,
        "layout": "rows",
        "wide": False,
        "scale": 1.0,
        "seed": 0,
    }
    return plain | changes


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases())
@example(case=case())
@example(case=case(rank=1, k=1, width=1, d=1))
@example(case=case(left_dtype=torch.float16, format="float16", out_dtype=torch.float16))
@example(case=case(left_dtype=torch.bfloat16, format="bfloat16", out_dtype=torch.bfloat16))
@example(case=case(format="nf4", start=37, width=200, d=301, k=33, layout="transposed"))
@example(case=case(format="nf4-dq", start=37, width=100, d=64 * 257, left_dtype=None, k=16))
@example(case=case(format="nf4-dq", start=64 * 255 + 9, width=100, d=64 * 258, k=5))
@example(case=case(format="int8", rank=70, k=100, extra_rows=58, extra_cols=3))
def test_against_float64(case: dict[str, object]) -> None:
    assert_case(**case)  # type: ignore[arg-type]


def assert_case(
    format: str,
    out_dtype: torch.dtype,
    left_dtype: torch.dtype | None,
    rank: int,
    k: int,
    start: int,
    width: int,
    d: int,
    extra_rows: int,
    extra_cols: int,
    layout: str,
    wide: bool,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    out, buffer, outside = make_out(rank + extra_rows, width + extra_cols, out_dtype, layout)
    matrix = make_matrix(k, d, format, wide)
    left = None
    if left_dtype is not None:
        left = torch.randn(k, rank).to(DEVICE, left_dtype).t()
        left = left if wide else left.contiguous()
    job = MaterializeJob(out, matrix, left, scale, start, width)
    run_jobs([job])
    assert_job_result(job)
    assert (buffer[outside] == SENTINEL).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_identity_is_the_dequantised_matrix_bit_for_bit(
    format: str, out_dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    matrix = make_matrix(5, 200, format, wide=False)
    out = torch.full((5, 150), float("nan"), dtype=out_dtype, device=DEVICE)
    run_jobs([MaterializeJob(out, matrix, None, 1.0, 33, 150)])
    assert torch.equal(out, unpack(matrix)[:, 33:183].to(out_dtype))


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_an_unquantised_factor_reaches_a_slot_of_its_dtype_unchanged(format: str) -> None:
    torch.manual_seed(2)
    matrix = make_matrix(8, 100, format, wide=False)
    values = matrix.parts["values"]
    out = torch.full((8, 100), float("nan"), dtype=values.dtype, device=DEVICE)
    run_jobs([MaterializeJob(out, matrix, None, 1.0, 0, 100)])
    assert torch.equal(out, values)


def test_fewer_rows_of_a_packed_factor_are_a_smaller_rank() -> None:
    torch.manual_seed(3)
    matrix = make_matrix(8, 100, "nf4-dq", wide=False)
    out = torch.full((8, 100), float("nan"), device=DEVICE)
    run_jobs([MaterializeJob(out, matrix.row_slice(0, 3), None, 1.0, 0, 100)])
    assert torch.equal(out[:3], unpack(matrix)[:3])
    assert out[3:].count_nonzero() == 0


@pytest.mark.parametrize(("rank", "k", "width"), [(0, 5, 30), (4, 0, 30), (4, 5, 0), (0, 0, 0)])
def test_nothing_to_write_leaves_zeros(rank: int, k: int, width: int) -> None:
    out = torch.full((6, 40), float("nan"), device=DEVICE)
    matrix = make_matrix(k, 40, "int8", wide=False)
    run_jobs([MaterializeJob(out, matrix, torch.ones(rank, k, device=DEVICE), 1.0, 10, width)])
    assert out.count_nonzero() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_remainder_is_zero_even_beside_values_that_are_not_finite(bad: float) -> None:
    matrix = PackedMatrix("float32", 3, 40, {"values": torch.full((3, 40), bad, device=DEVICE)})
    for left in (torch.ones(2, 3, device=DEVICE), None):
        out = torch.full((6, 50), SENTINEL, device=DEVICE)
        job = MaterializeJob(out, matrix, left, 1.0, 5, 30)
        run_jobs([job])
        assert not out[: job.rank, :30].isfinite().any()
        assert out[job.rank :].count_nonzero() == 0
        assert out[:, 30:].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 7), (7, 0)])
def test_an_empty_slot_is_accepted(shape: tuple[int, int]) -> None:
    out = torch.empty(shape, device=DEVICE)
    matrix = make_matrix(3, 40, "nf4", wide=False)
    run_jobs([MaterializeJob(out, matrix, torch.ones(0, 3, device=DEVICE), 1.0, 0, 0)])


def test_jobs_of_one_call_are_independent() -> None:
    torch.manual_seed(4)
    jobs = []
    for index, format in enumerate(FORMATS):
        rank, k, d = 1 + index, 3 + 5 * index, 40 + 30 * index
        matrix = make_matrix(k, d, format, wide=False)
        left = torch.randn(rank, k, device=DEVICE)
        out, _, _ = make_out(rank + index, d, torch.float32, "transposed")
        jobs.append(MaterializeJob(out, matrix, left, 0.5, 0, d))
    run_jobs(jobs)
    for job in jobs:
        assert_job_result(job)
    run_jobs([])


def test_running_twice_gives_the_same_bits() -> None:
    torch.manual_seed(5)
    matrix = make_matrix(40, 300, "nf4", wide=False)
    left = torch.randn(9, 40, device=DEVICE)
    results = []
    for poison in (float("nan"), 1e30):
        out = torch.full((16, 300), poison, device=DEVICE)
        run_jobs([MaterializeJob(out, matrix, left, 1.0, 0, 300)])
        results.append(out)
    assert torch.equal(*results)


REFUSED = {
    "out must be a 2-D": {"out": torch.empty(2, 3, 4)},
    "out must be a 2-D float32": {"out": torch.empty(4, 40, dtype=torch.float64)},
    "stride of zero": {"out": torch.empty(4, 1).expand(4, 40)},
    "left must be a 2-D": {"left": torch.ones(5)},
    "left must be a 2-D float32": {"left": torch.ones(3, 5, dtype=torch.float64)},
    "left has 6 columns, the matrix 5 rows": {"left": torch.ones(3, 6)},
    "left is on meta, out on cpu": {"left": torch.ones(3, 5, device="meta")},
    "the matrix is on meta": {"matrix": pack(torch.ones(5, 50), "nf4").to("meta")},
    "9 rows do not fit the 4 rows": {"left": torch.ones(9, 5)},
    "5 rows do not fit the 4 rows": {"left": None},
    "a width of 41 does not fit the 40": {"width": 41, "start": 0},
    "a width of -1 does not fit": {"width": -1},
    "columns 21:51 are not within the 50": {"start": 21},
    "columns -1:29 are not within": {"start": -1},
    "the scale must be finite": {"scale": float("nan")},
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("op", [materialize, materialize_reference, materialize_triton])
def test_a_bad_job_is_refused_before_anything_is_written(message: str, op: object) -> None:
    fields = {
        "out": torch.full((4, 40), SENTINEL),
        "matrix": pack(torch.ones(5, 50), "nf4"),
        "left": torch.ones(3, 5),
        "scale": 1.0,
        "start": 7,
        "width": 30,
    }
    good = MaterializeJob(**fields)  # type: ignore[arg-type]
    bad = MaterializeJob(**(fields | REFUSED[message]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        op([good, bad])  # type: ignore[operator]
    assert (good.out == SENTINEL).all()


if BACKEND == "interpreter":

    def test_the_kernel_refuses_parts_that_are_not_contiguous_along_rows() -> None:
        values = torch.ones(50, 5).t()
        matrix = PackedMatrix("float32", 5, 50, {"values": values})
        with pytest.raises(ValueError, match="contiguous along its rows"):
            run_jobs([MaterializeJob(torch.empty(5, 50), matrix, None, 1.0, 0, 50)])


if BACKEND == "reference":

    def run_in_own_process(backend: str, interpret: str) -> None:
        environment = os.environ | {
            "VLORA_TEST_MATERIALIZE": backend,
            "TRITON_INTERPRET": interpret,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
    def test_triton_kernel_in_the_interpreter() -> None:
        run_in_own_process("interpreter", "1")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_triton_kernel_on_the_gpu() -> None:
        run_in_own_process("gpu", "0")

    def test_materialize_on_the_cpu_is_the_reference() -> None:
        torch.manual_seed(6)
        matrix = make_matrix(33, 200, "nf4", wide=False)
        left = torch.randn(9, 33)
        outs = [torch.full((16, 120), float("nan")) for _ in range(2)]
        materialize([MaterializeJob(outs[0], matrix, left, 0.5, 40, 100)])
        materialize_reference([MaterializeJob(outs[1], matrix, left, 0.5, 40, 100)])
        assert torch.equal(*outs)

    def test_the_reference_runs_without_triton() -> None:
        script = """
import sys
sys.modules["triton"] = None
import torch
from vllm_vlora.quantize import pack
from vllm_vlora.triton_kernels.materialize import MaterializeJob, materialize, materialize_triton
job = MaterializeJob(torch.empty(2, 6), pack(torch.eye(2, 6), "int8"), None, 1.0, 0, 6)
materialize([job])
assert torch.equal(job.out, torch.eye(2, 6))
try:
    materialize_triton([job])
except ImportError:
    print("refused")
"""
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "refused\n"

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_no_autograd_graph_reaches_the_slot(requires_grad: bool) -> None:
        left = torch.ones(2, 3, requires_grad=requires_grad)
        out = torch.empty(2, 5)
        materialize([MaterializeJob(out, pack(torch.ones(3, 5), "float32"), left, 1.0, 0, 5)])
        assert not out.requires_grad
        assert torch.equal(out, torch.full((2, 5), 3.0))
