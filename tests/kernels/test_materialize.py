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
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_vlora.narrow_rows import NARROW_FORMAT, narrow_matrix
from vllm_vlora.quantize import (
    FORMATS,
    PackedMatrix,
    pack,
    pack_narrow,
    pack_trellis,
    stack_rows,
    unpack,
)
from vllm_vlora.triton_kernels.materialize import (
    MaterializeJob,
    MaterializePlan,
    OutTable,
    materialize,
    materialize_reference,
    materialize_triton,
    plan_materialize,
)

BACKEND = os.environ.get("VLORA_TEST_MATERIALIZE", "reference")
DEVICE = "cuda" if BACKEND == "gpu" else "cpu"
# On a CPU materialize is the torch plan.
RUNNERS = [materialize_reference, materialize] if BACKEND == "reference" else [materialize_triton]
Runner = Callable[[Sequence[MaterializeJob]], None]
each_way = pytest.mark.parametrize("run_jobs", RUNNERS, ids=lambda runner: runner.__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative rounding of a store: half a unit in the last place, but Triton's interpreter cuts a
# float32 to bfloat16 instead of rounding it.
STORE_ERROR = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if BACKEND == "interpreter" else 2.0**-8,
}
SENTINEL = 42.0
LAYOUTS = ["rows", "transposed", "stepped", "slot", "transposed slot"]
# What a device may hold, some of it in no file.
HELD = (*FORMATS, NARROW_FORMAT)
FACTORS = [format for format in HELD if format not in ("float32", "float16")]


def make_plan(jobs: Sequence[MaterializeJob]) -> MaterializePlan:
    """The plan of the kernel, or of torch in the reference's process."""
    if BACKEND == "reference":
        return plan_materialize(jobs)
    from vllm_vlora.triton_kernels.materialize_kernel import KernelPlan

    return KernelPlan(jobs)


def make_out(rows: int, cols: int, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, ...]:
    """A poisoned ``rows x cols`` view inside a larger buffer, and a mask of the bytes outside."""
    if layout == "transposed":
        buffer = torch.full((cols + 2, rows + 3), SENTINEL, dtype=dtype, device=DEVICE)
    elif layout == "slot":
        buffer = torch.full((2, rows, cols), SENTINEL, dtype=dtype, device=DEVICE)
    elif layout == "transposed slot":
        buffer = torch.full((2, cols, rows), SENTINEL, dtype=dtype, device=DEVICE)
    elif layout == "stepped":
        buffer = torch.full((2 * rows + 3, 3 * cols + 2), SENTINEL, dtype=dtype, device=DEVICE)
    else:
        buffer = torch.full((rows + 2, cols + 3), SENTINEL, dtype=dtype, device=DEVICE)
    outside = torch.ones_like(buffer, dtype=torch.bool)

    def view(tensor: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return tensor[1 : 1 + cols, 2 : 2 + rows].t()
        if layout == "slot":
            return tensor[1]
        if layout == "transposed slot":
            return tensor[1].t()
        if layout == "stepped":
            return tensor[1 : 1 + 2 * rows : 2, 2 : 2 + 3 * cols : 3]
        return tensor[1 : 1 + rows, 2 : 2 + cols]

    view(outside).fill_(False)
    out = view(buffer)
    out.fill_(float("nan"))
    return out, buffer, outside


def make_matrix(rows: int, cols: int, format: str, wide: bool) -> PackedMatrix:
    matrix = torch.randn(rows, cols, dtype=torch.float64)
    if format in (NARROW_FORMAT, "trellis"):
        return make_narrow(matrix.float(), format)
    packed = pack(matrix.float(), format).to(DEVICE)
    if not wide or "values" not in packed.parts:
        return packed
    # A column slice of a wider tensor: rows are further apart than they are long.
    values = torch.full((rows, cols + 5), float("nan"), device=DEVICE).to(
        packed.parts["values"].dtype
    )
    values[:, 2 : 2 + cols] = packed.parts["values"]
    return PackedMatrix(format, rows, cols, {"values": values[:, 2 : 2 + cols]})


def make_narrow(matrix: torch.Tensor, format: str) -> PackedMatrix:
    """A third of the rows with 4 bits, and about as many with 3."""
    rows = len(matrix)
    counts = (rows // 3, -(-rows // 3), rows - rows // 3 - -(-rows // 3))
    four, three, two = matrix.split(counts)
    if format == "trellis":
        parts = [pack_trellis(four, 4), pack_trellis(three, 3), pack_trellis(two, 2)]
        return stack_rows(parts).to(DEVICE)
    whole = stack_rows([pack(four, "nf4-dq"), pack_narrow(three, 3), pack_narrow(two, 2)])
    return narrow_matrix(whole, counts).to(DEVICE)


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
    exact = 2.0**-24
    if BACKEND == "gpu" and job.left is not None and job.out.dtype != torch.float32:
        # TF32: both operands may be cut to 11 significant bits.
        exact = 2.0**-9 / (terms + 2)
    bound = torch.zeros_like(expected)
    smallest = torch.finfo(job.out.dtype).smallest_normal * STORE_ERROR[job.out.dtype]
    bound[: job.rank, : job.width] = (
        (terms + 2) * exact * abs(scale) * magnitude
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
        "format": draw(st.sampled_from(HELD)),
        "out_dtype": draw(st.sampled_from(DTYPES)),
        "left_dtype": None if identity else draw(st.sampled_from(DTYPES)),
        "rank": rank,
        "k": rank if identity else draw(st.integers(1, 70)),
        "start": start,
        "width": width,
        "d": start + width + draw(st.integers(0, 70)),
        "extra_rows": draw(st.sampled_from([0, 0, 1, 24])),
        "extra_cols": draw(st.sampled_from([0, 0, 1, 200])),
        "layout": draw(st.sampled_from(LAYOUTS)),
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
@example(case=case(format=NARROW_FORMAT, start=64 * 255 + 9, width=100, d=64 * 258, k=5))
@example(case=case(format=NARROW_FORMAT, left_dtype=None, k=16, layout="transposed slot"))
@example(case=case(format="trellis", start=37, width=100, d=301, k=33, layout="transposed"))
@example(case=case(format="trellis", left_dtype=None, k=16, layout="slot", scale=0.3))
@example(case=case(format="nf4", start=64, width=192, d=320, k=33, layout="transposed slot"))
@example(case=case(format=NARROW_FORMAT, start=8, width=96, d=128, k=33, left_dtype=torch.float16))
@example(case=case(format="trellis", start=8, width=96, d=128, k=70, left_dtype=torch.bfloat16))
@example(case=case(format="nf4-dq", k=10, left_dtype=torch.bfloat16, out_dtype=torch.bfloat16))
@example(case=case(format="int8", rank=70, k=100, extra_rows=58, extra_cols=3))
@example(case=case(format="nf4", left_dtype=None, rank=7, k=7, layout="transposed slot", scale=2.0))
@example(case=case(format="nf4-dq", left_dtype=None, k=16, layout="slot", scale=2.0**-140))
@example(case=case(format="int8", left_dtype=None, k=16, layout="transposed slot", scale=0.25))
@each_way
def test_against_float64(run_jobs: Runner, case: dict[str, object]) -> None:
    assert_case(run_jobs, **case)  # type: ignore[arg-type]


def assert_case(
    run_jobs: Runner,
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


@pytest.mark.parametrize("format", HELD)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
@each_way
def test_identity_is_the_dequantised_matrix_bit_for_bit(
    run_jobs: Runner, format: str, out_dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    matrix = make_matrix(5, 200, format, wide=False)
    out = torch.full((5, 150), float("nan"), dtype=out_dtype, device=DEVICE)
    run_jobs([MaterializeJob(out, matrix, None, 1.0, 33, 150)])
    assert torch.equal(out, unpack(matrix)[:, 33:183].to(out_dtype))


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
@each_way
def test_an_unquantised_factor_reaches_a_slot_of_its_dtype_unchanged(
    run_jobs: Runner, format: str
) -> None:
    torch.manual_seed(2)
    matrix = make_matrix(8, 100, format, wide=False)
    values = matrix.parts["values"]
    out = torch.full((8, 100), float("nan"), dtype=values.dtype, device=DEVICE)
    run_jobs([MaterializeJob(out, matrix, None, 1.0, 0, 100)])
    assert torch.equal(out, values)


@each_way
@pytest.mark.parametrize("format", ["nf4-dq", NARROW_FORMAT, "trellis"])
def test_fewer_rows_of_a_packed_factor_are_a_smaller_rank(run_jobs: Runner, format: str) -> None:
    torch.manual_seed(3)
    matrix = make_matrix(8, 100, format, wide=False)
    out = torch.full((8, 100), float("nan"), device=DEVICE)
    run_jobs([MaterializeJob(out, matrix.row_slice(0, 3), None, 1.0, 0, 100)])
    assert torch.equal(out[:3], unpack(matrix)[:3])
    assert out[3:].count_nonzero() == 0


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize(("rank", "k", "width"), [(0, 5, 30), (4, 0, 30), (4, 5, 0), (0, 0, 0)])
@each_way
def test_nothing_to_write_leaves_zeros(
    run_jobs: Runner, rank: int, k: int, width: int, others: bool
) -> None:
    out = torch.full((6, 40), float("nan"), device=DEVICE)
    matrix = make_matrix(k, 40, "int8", wide=False)
    jobs = [MaterializeJob(out, matrix, torch.ones(rank, k, device=DEVICE), 1.0, 10, width)]
    if others:
        # Whose launch it joins.
        job = MaterializeJob(out.clone(), make_matrix(6, 40, "nf4", wide=False), None, 1.0, 0, 40)
        jobs.append(job)
    run_jobs(jobs)
    assert out.count_nonzero() == 0
    for job in jobs[1:]:
        assert_job_result(job)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_way
def test_the_remainder_is_zero_even_beside_values_that_are_not_finite(
    run_jobs: Runner, bad: float
) -> None:
    matrix = PackedMatrix("float32", 3, 40, {"values": torch.full((3, 40), bad, device=DEVICE)})
    for left in (torch.ones(2, 3, device=DEVICE), None):
        out = torch.full((6, 50), SENTINEL, device=DEVICE)
        job = MaterializeJob(out, matrix, left, 1.0, 5, 30)
        run_jobs([job])
        assert not out[: job.rank, :30].isfinite().any()
        assert out[job.rank :].count_nonzero() == 0
        assert out[:, 30:].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 7), (7, 0)])
@each_way
def test_an_empty_slot_is_accepted(run_jobs: Runner, shape: tuple[int, int]) -> None:
    out = torch.empty(shape, device=DEVICE)
    matrix = make_matrix(3, 40, "nf4", wide=False)
    run_jobs([MaterializeJob(out, matrix, torch.ones(0, 3, device=DEVICE), 1.0, 0, 0)])


@each_way
def test_jobs_of_one_call_are_independent(run_jobs: Runner) -> None:
    torch.manual_seed(4)
    jobs = []
    for index, format in enumerate(HELD):
        rank, k, d = 1 + index, 3 + 5 * index, 40 + 30 * index
        matrix = make_matrix(k, d, format, wide=False)
        left = torch.randn(rank, k, device=DEVICE)
        out, _, _ = make_out(rank + index, d, torch.float32, "transposed")
        jobs.append(MaterializeJob(out, matrix, left, 0.5, 0, d))
    run_jobs(jobs)
    for job in jobs:
        assert_job_result(job)
    run_jobs([])


def jobs_of_a_task(
    formats: Sequence[str], ranks: Sequence[int], shift: int
) -> list[MaterializeJob]:
    """A and transposed B of modules of these formats and ranks; every third joint, the last zeroed."""
    jobs = []
    for index, (format, rank) in enumerate(zip(formats, ranks)):
        for layout in ("slot", "transposed slot"):
            width = 96 + 32 * index
            out, _, _ = make_out(16, width + shift, torch.bfloat16, layout)
            k = 24 if index % 3 == 2 else rank
            matrix = make_matrix(k, width + 64, format, wide=False)
            left = torch.randn(rank, k).to(DEVICE, torch.bfloat16) if index % 3 == 2 else None
            jobs.append(MaterializeJob(out, matrix, left, 2.0, 8 * index + shift, width))
    return [*jobs, MaterializeJob.zero(make_out(16, 70, torch.bfloat16, "transposed slot")[0])]


@each_way
def test_several_tasks_of_mixed_formats_in_one_call(run_jobs: Runner) -> None:
    torch.manual_seed(7)
    jobs = jobs_of_a_task(["nf4", "int8", "bfloat16", "nf4"], [16, 8, 4, 0], 0)
    jobs += jobs_of_a_task(["bfloat16", "nf4-dq", "nf4", "float16"], [3, 16, 8, 16], 5)
    jobs.reverse()
    run_jobs(jobs)
    for job in jobs:
        assert_job_result(job)


@pytest.mark.parametrize("format", FACTORS)
def test_a_plan_runs_for_any_slot(format: str) -> None:
    torch.manual_seed(8)
    stacks = [torch.full((4, 1, 16, 192), SENTINEL, device=DEVICE),
              torch.full((4, 1, 128, 16), SENTINEL, device=DEVICE)]  # fmt: skip

    def views(slot: int) -> list[torch.Tensor]:
        return [stacks[0][slot, 0], stacks[1][slot, 0].T]

    matrices = [make_matrix(8, 192, format, wide=False), make_matrix(8, 128, format, wide=False)]
    jobs = [
        MaterializeJob(view[:8], matrix, None, 0.5, 0, matrix.cols)
        for view, matrix in zip(views(0), matrices)
    ]
    plan = make_plan(jobs)
    tables = {slot: OutTable(views(slot)) for slot in (1, 3)}
    for slot in (1, 3, 1):
        plan.run(tables[slot])
    for slot in (1, 3):
        for view, matrix in zip(views(slot), matrices):
            assert torch.equal(view[:8], unpack(matrix) * 0.5)
            assert (view[8:] == SENTINEL).all(), "rows that are not the job's were touched"
    for slot in (0, 2):
        assert all((view == SENTINEL).all() for view in views(slot)), "another slot was touched"


UNFIT = {
    "1 tensors for 2 jobs": lambda out: [out],
    "tensor 1 is torch.float16": lambda out: [out, out.half()],
    "tensor 1 is torch.float32 .3, 64.": lambda out: [out, out[:3]],
    "tensor 1 .* with strides .1, 8.": lambda out: [out, torch.empty(64, 8, device=DEVICE).T],
}


@pytest.mark.parametrize("message", UNFIT)
def test_a_plan_refuses_tensors_that_do_not_fit(message: str) -> None:
    out = torch.full((8, 64), SENTINEL, device=DEVICE)
    matrix = make_matrix(8, 64, "nf4", wide=False)
    plan = make_plan([MaterializeJob(out, matrix, None, 1.0, 0, 64)] * 2)
    with pytest.raises(ValueError, match=message):
        plan.run(OutTable(UNFIT[message](out)))
    assert (out == SENTINEL).all()


@each_way
def test_running_twice_gives_the_same_bits(run_jobs: Runner) -> None:
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


@pytest.mark.parametrize("op", [materialize, materialize_reference, materialize_triton])
def test_jobs_on_two_devices_are_refused(op: Runner) -> None:
    jobs = [MaterializeJob.zero(torch.empty(2, 8, device=device)) for device in ("cpu", "meta")]
    with pytest.raises(ValueError, match="must be on one device, these are on cpu, meta"):
        op(jobs)


if BACKEND == "interpreter":

    def test_a_private_task_takes_two_launches_whatever_its_ranks() -> None:
        from vllm_vlora.triton_kernels.materialize_kernel import KernelPlan

        jobs = []
        for rank in (16, 4, 1):
            for layout in ("slot", "transposed slot"):
                matrix = make_matrix(rank, 128, "nf4", wide=False)
                out = make_out(rank, 128, torch.bfloat16, layout)[0]
                jobs.append(MaterializeJob(out, matrix, None, 1.0, 0, 128))
                jobs.append(MaterializeJob.zero(make_out(16, 128, torch.bfloat16, layout)[0]))
        # An out of one row is contiguous both ways and goes with the As.
        assert len(KernelPlan(jobs).launches) == 2
        assert KernelPlan([]).launches == []

    def test_what_the_compiler_is_told_of_alignment_is_true_of_every_job() -> None:
        from vllm_vlora.triton_kernels.materialize_kernel import ALIGNMENT, FIELDS, KernelPlan

        torch.manual_seed(9)
        jobs = jobs_of_a_task(["nf4", "int8", "bfloat16"], [16, 8, 4], 0)
        promised = set()
        for odd in (None, *range(len(jobs))):
            chosen = jobs if odd is None else [*jobs, shifted(jobs[odd])]
            for launch in KernelPlan(chosen).launches:
                rows = [
                    dict(zip(FIELDS, row)) for row in launch.jobs.view(-1, len(FIELDS)).tolist()
                ]
                constants = launch.constants
                along = "rows" if constants["ORDER"] == "columns" else "cols"
                across = "cols" if constants["ORDER"] == "columns" else "rows"
                for row in rows:
                    if constants["ALIGNED_OUT"]:
                        out = chosen[row["place"]].out
                        assert out.data_ptr() % 16 == 0
                        assert row[f"n_{along}"] % ALIGNMENT == 0
                        assert row[f"out_stride_{across[:3]}"] % ALIGNMENT == 0
                    if constants["ALIGNED_IN"] and row["rank"] > 0:
                        assert row["codes"] % 16 == 0
                        sizes = (row["start"], row["width"], row["codes_stride"])
                        assert all(size % ALIGNMENT == 0 for size in sizes)
                promised.add((odd is None, constants["ALIGNED_IN"], constants["ALIGNED_OUT"]))
        assert promised >= {(True, True, True), (False, False, True), (False, False, False)}

    def test_a_slot_that_is_less_aligned_than_the_planned_one_gets_a_weaker_promise(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from vllm_vlora.triton_kernels import materialize_kernel

        buffer = torch.full((600,), SENTINEL, dtype=torch.float16, device=DEVICE)
        views = [buffer.as_strided((2, 128), (128, 1), 260 * slot) for slot in range(2)]
        assert [view.data_ptr() % 16 for view in views] == [0, 8]
        matrix = make_matrix(2, 128, "int8", wide=False)
        plan = materialize_kernel.KernelPlan([MaterializeJob(views[0], matrix, None, 1.0, 0, 128)])
        kernel, promised = materialize_kernel._materialize_kernel, []

        class Recorder:
            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                def launch(*arguments: object, **constants: object) -> None:
                    promised.append(constants["ALIGNED_OUT"])
                    kernel[grid](*arguments, **constants)

                return launch

        monkeypatch.setattr(materialize_kernel, "_materialize_kernel", Recorder())
        for view in views:
            plan.run(OutTable([view]))
            assert torch.equal(view, unpack(matrix).half())
        assert promised == [True, False]

    def shifted(job: MaterializeJob) -> MaterializeJob:
        """The same job one column further, read and written."""
        out = job.out[:, 1:]
        return MaterializeJob(out, job.matrix, job.left, job.scale, job.start + 1, job.width - 1)

    def test_the_kernel_refuses_parts_that_are_not_contiguous_along_rows() -> None:
        values = torch.ones(50, 5).t()
        matrix = PackedMatrix("float32", 5, 50, {"values": values})
        with pytest.raises(ValueError, match="contiguous along its rows"):
            materialize_triton([MaterializeJob(torch.empty(5, 50), matrix, None, 1.0, 0, 50)])


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

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("out_dtype", DTYPES)
    @pytest.mark.parametrize("scale", [1.0, 2.0, 0.3, 2.0**-140])
    def test_the_plan_writes_private_factors_to_the_reference_s_bits(
        format: str, out_dtype: torch.dtype, scale: float
    ) -> None:
        torch.manual_seed(6)
        for layout, start, width in (("slot", 0, 192), ("transposed slot", 0, 192),
                                     ("transposed", 64, 128), ("transposed", 37, 100)):  # fmt: skip
            matrix = make_matrix(5, 300, format, wide=False)
            outs = []
            for runner in RUNNERS:
                for packed in (matrix, matrix.by_columns()):
                    outs.append(make_out(8, 200, out_dtype, layout)[0])
                    runner([MaterializeJob(outs[-1], packed, None, scale, start, width)])
            assert all(torch.equal(out, outs[0]) for out in outs)

    def test_scratch_memory_made_in_inference_mode_serves_outside_of_it() -> None:
        matrix = make_matrix(4, 64, "nf4", wide=False)
        outs = [torch.full((4, 64), float("nan"), dtype=torch.bfloat16) for _ in range(2)]

        def run() -> None:  # In a thread, whose scratch is new.
            plans = [
                plan_materialize([MaterializeJob(out, matrix, None, 1.0, 0, 64)]) for out in outs
            ]
            with torch.inference_mode():
                plans[0].run()
            plans[1].run()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
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
