"""What the tests of compilation stand on: launches are recorded as Triton would compile them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import compile_kernels
import pytest
import triton_record
from compile_kernels import (
    TARGETS,
    compile_launches,
    complaints,
    in_own_process,
    short_products,
    triton_version,
)
from places import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton to compile"
)


def record_some() -> dict[str, Any]:
    """Launches of a kernel whose arguments Triton specialises on, and of the compiled one."""
    import torch
    import triton
    import triton.language as tl
    from record_launches import recording

    @triton.jit(do_not_specialize=["count"])
    def double(ptr, count, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.arange(0, BLOCK) * stride
        live = tl.arange(0, BLOCK) < count
        tl.store(ptr + places, 2 * tl.load(ptr + places, mask=live), mask=live)

    x = torch.empty(100, dtype=torch.bfloat16, device="meta")
    with recording(TARGETS["sm_90"]) as found:
        found.label = "first"
        compiled = double[(2, 3)](x, 7, 32, BLOCK=16)
        found.label = "others"
        double[(1,)](x, 16, 48, BLOCK=16)  # A multiple of 16 too, and the count is not looked at.
        double[(1,)](x, 7, 1, BLOCK=16)
        double[(1,)](x, 7, 33, BLOCK=16, num_warps=8)
        double[(1,)](x[1:].float(), 7, 33, BLOCK=16)
        compiled[(5,)](x, 7, 32)
    with recording(TARGETS["sm_90"]) as again:
        double[(1,)](x, 7, 32, BLOCK=16)
    return {
        "variants": [
            [
                v.label,
                list(v.signature.values()),
                list(v.constants.values()),
                sorted(place[0] for place, found in v.attributes.items() if found),
                v.options.num_warps,
            ]
            for v in found.variants.values()
        ],
        "grids": [grid for _, grid in found.launches],
        "again": len(again.variants),
    }


def bound_launches() -> list[list[str]]:
    """Triton's keys of the same launches: those that it has looked at, and those of kept kernels."""
    import itertools

    import torch
    import triton
    import triton.language as tl
    from record_launches import recording

    from vllm_vlora.triton_kernels.launch import Launch

    @triton.jit(do_not_specialize=["count"])
    def double(ptr, count, stride, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.arange(0, COLS) * stride
        live = tl.arange(0, COLS) < count
        tl.store(ptr + places, 2 * tl.load(ptr + places, mask=live), mask=live)

    held = torch.empty(64)
    tensors = [held, held[4:], held[1:], held.half()]
    numbers = [1, 7, 8, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 8, 2**40, 2**40 + 1]
    found = []
    for kept in (False, True):
        with recording(TARGETS["sm_90"], kept) as recorded:
            launch = Launch(double, {"COLS": 16})
            # Strides are far below 2**31.
            for ptr, count, stride in itertools.product(tensors, numbers, numbers[:7]):
                launch((1, 1, 1), ptr=ptr, count=count, stride=stride)
        found.append(recorded.keys)
    return found


def launch_wrong(recording: Any) -> None:
    """One kernel that compiles and one that no compiler takes."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def right(ptr, VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(ptr, VALUE)

    @triton.jit
    def wrong(ptr):  # type: ignore[no-untyped-def]
        tl.store(ptr, tl.arange(0, 3))

    x = torch.empty(4, device="meta")
    for value in (1, 2):
        recording.label = f"value {value}"
        right[(1,)](x, value)
    wrong[(1,)](x)


def launch_products(recording: Any) -> None:
    """Products with an operand that is decoded from nibbles; the inner side is 16, and 32."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def product(x_ptr, codes_ptr, y_ptr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        rows, halves, cols = tl.arange(0, ROWS), tl.arange(0, 64), tl.arange(0, 128)
        tokens = tl.arange(0, 16)
        x = tl.load(x_ptr + tokens[:, None] * ROWS + rows[None, :])
        codes = tl.load(codes_ptr + rows[:, None] * 64 + halves[None, :])
        low, high = (codes & 15).to(tl.float16), (codes >> 4).to(tl.float16)
        y = tl.dot(x, tl.join(low, high).reshape(ROWS, 128))
        tl.store(y_ptr + tokens[:, None] * 128 + cols[None, :], y)

    x = torch.empty(16, 32, dtype=torch.float16, device="meta")
    codes = torch.empty(32, 64, dtype=torch.uint8, device="meta")
    y = torch.empty(16, 128, device="meta")
    for rows in (16, 32):
        recording.label = f"inner {rows}"
        product[(1,)](x, codes, y, ROWS=rows)


def test_a_variant_is_what_triton_looks_at(tmp_path: Path) -> None:
    found = in_own_process(__file__, "record_some", tmp_path)
    bf16, fp32 = ["*bf16", "i32", "i32", "constexpr"], ["*fp32", "i32", "i32", "constexpr"]
    one = ["*bf16", "i32", "constexpr", "constexpr"]
    assert found["variants"] == [
        ["first", bf16, [16], [0, 2], 4],
        ["others", one, [1, 16], [0], 4],
        ["others", bf16, [16], [0], 8],
        ["others", fp32, [16], [0], 4],
    ]
    assert found["grids"] == [[2, 3, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [5, 1, 1]]
    assert found["again"] == 1


def test_a_bound_launch_runs_what_triton_would_choose(tmp_path: Path) -> None:
    looked_at, kept = in_own_process(__file__, "bound_launches", tmp_path)
    assert len(looked_at) == 4 * 11 * 7
    assert len(set(looked_at)) == 3 * 2 * 3
    assert kept == looked_at


def test_what_does_not_compile_or_takes_too_much_is_reported(tmp_path: Path) -> None:
    rows = compile_launches(__file__, "launch_wrong", tmp_path, {"sm_90": TARGETS["sm_90"]})
    rows.sort(key=lambda row: (row["kernel"], row["label"]))
    wrong = [row for row in rows if "error" in row]
    assert [row["kernel"] for row in rows] == ["launches.right", "launches.right", "launches.wrong"]
    assert [row["label"] for row in rows] == ["value 1", "value 2", "value 2"]
    assert [row["kernel"] for row in wrong] == ["launches.wrong"]
    assert "power of 2" in wrong[0]["error"]
    assert len(complaints(rows)) == 1
    assert complaints(rows) == complaints(rows, held=False)


@pytest.mark.parametrize(
    ("inner", "width", "right"),
    [(16, 2, True), (16, 4, True), (16, 8, False), (32, 8, True), (64, 8, True)],
)
def test_a_product_that_is_shorter_than_its_layout_is_found(
    inner: int, width: int, right: bool
) -> None:
    left, other = (
        f"#ttg.dot_op<{{opIdx = {place}, parent = #mma, kWidth = {width}}}>>" for place in (0, 1)
    )
    types = f"tensor<16x{inner}xf16, {left} * tensor<{inner}x128xf16, {other}"
    line = f"%y = tt.dot %h, %b, %y_0, inputPrecision = tf32 : {types} -> tensor<16x128xf32, #mma>"
    wgmma = f"%y = ttng.warp_group_dot %h, %b, %y_0 {{isAsync = true}} : {types} -> tensor"
    for text in (line, wgmma):
        assert short_products(f"  {text}\n") == (
            [] if right else [f"tensor<16x{inner}xf16, {left}"]
        )


def test_products_of_nibbles_are_reported_where_the_compiler_is_wrong(tmp_path: Path) -> None:
    rows = compile_launches(__file__, "launch_products", tmp_path, {"sm_90": TARGETS["sm_90"]})
    found = {row["label"]: len(row["short"]) for row in rows}
    assert found == {"inner 16": triton_version().startswith("3.6."), "inner 32": 0}
    assert len(complaints(rows, held=False)) == found["inner 16"]


def row_of(**different: Any) -> dict[str, Any]:
    """What is found of a kernel that takes nothing."""
    row = {"target": "sm_90", "kernel": "some._kernel", "warps": 8, "registers": 0, "spilled": 0}
    return {**row, "shared": 0, "short": [], **different}


@pytest.mark.parametrize(
    ("warps", "registers", "spilled", "right"),
    [
        (4, 168, 0, True),
        (4, 169, 0, False),
        (8, 169, 0, False),
        (2, 240, 0, True),
        (2, 255, 4, False),
        (4, 128, 40, True),
        (4, 128, 44, False),
        (4, 129, 4, False),
    ],
)
def test_registers_and_spills_are_held(
    warps: int, registers: int, spilled: int, right: bool
) -> None:
    rows = [row_of(warps=warps, registers=registers, spilled=spilled)]
    assert (complaints(rows) == []) == right
    assert complaints(rows, held=False) == []
    assert (complaints(rows, allowed={"sm_90 some._kernel": 100}) == []) == (right and warps < 4)


@pytest.mark.parametrize(
    ("target", "most"),
    [("sm_80", 101376), ("sm_90", 232448), ("sm_100", 232448), ("gfx942", 65536)],
)
def test_a_kernel_has_the_shared_memory_of_a_device(target: str, most: int) -> None:
    rows = [row_of(target=target, shared=shared) for shared in (most, most + 1)]
    assert len(complaints(rows, held=False)) == 1
    assert complaints(rows[:1]) == []


def test_a_kernel_that_is_known_to_need_more_may_have_it() -> None:
    row = row_of(registers=200)
    assert complaints([row], allowed={"sm_90 some._kernel": 200}) == []
    assert complaints([row], allowed={"sm_80 some._kernel": 200}) != []


def test_a_record_of_other_versions_holds_until_a_kernel_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_record, "RECORD", tmp_path / "triton.passed")
    assert triton_record.main([]) == 1
    assert triton_record.main(["3.6.0", "3.8.0"]) == 0
    assert triton_record.main([]) == 0
    assert triton_record.RECORD.read_text().endswith(" 3.6.0 3.8.0\n")
    for folder in ("triton_kernels", "vllm_vlora"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(compile_kernels, "ROOT", tmp_path)
    assert triton_record.main([]) == 0
    with (tmp_path / "triton_kernels" / "device.py").open("a") as file:
        file.write("\n")
    assert triton_record.main([]) == 1
