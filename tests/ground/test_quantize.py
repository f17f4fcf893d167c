"""Packed matrices: the formats pinned by literal bytes, and their properties."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_vlora.quantize import (
    FORMATS,
    NARROW_CODES,
    NF4_CODEBOOK,
    NF4_THRESHOLDS,
    PackedMatrix,
    is_finite,
    narrow_codes,
    narrow_row_nbytes,
    nf4_scales,
    pack,
    pack_narrow,
    part_specs,
    row_nbytes,
    stack_rows,
    unpack,
    widen_codes,
)

FLOATS = ("float32", "float16", "bfloat16")
QUANTISED = ("int8", "nf4", "nf4-dq")


def random_matrix(rows: int, cols: int, seed: int, exponent: int = 0) -> torch.Tensor:
    """Normal values of magnitude 2**exponent, with a few exact zeros, zero blocks and zero rows."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    matrix[torch.rand(rows, cols, generator=generator) < 0.05] = 0.0
    for block in range(0, cols, 64):
        zeroed = torch.rand(rows, generator=generator) < 0.1
        matrix[zeroed, block : block + 64] = 0.0
    top = torch.finfo(torch.float32).max
    return (matrix * 2.0**exponent).clamp(-top, top).float()


shapes = {
    "rows": st.integers(0, 5),
    "cols": st.sampled_from([1, 2, 63, 64, 65, 127, 200, 64 * 256 + 3]),
    "seed": st.integers(0, 2**31 - 1),
}


# ---- the formats, byte by byte


def test_nf4_codebook_and_thresholds_are_those_of_bitsandbytes() -> None:
    codebook = struct.pack(">16f", *NF4_CODEBOOK).hex(" ", 4)
    assert codebook == (
        "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
        "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
    )
    thresholds = struct.pack(">15f", *NF4_THRESHOLDS).hex(" ", 4)
    assert thresholds == (
        "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
        "3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
    )
    for low, high, threshold in zip(NF4_CODEBOOK, NF4_CODEBOOK[1:], NF4_THRESHOLDS):
        assert threshold == pytest.approx((low + high) / 2, rel=1e-6)


def test_nf4_bytes() -> None:
    packed = pack(torch.tensor([[2.0 * value for value in NF4_CODEBOOK]]), "nf4")
    # The first value is in the high nibble; the padding of the block is the code of zero.
    assert bytes(packed.parts["codes"][0].tolist()).hex() == "0123456789abcdef" + "77" * 24
    assert packed.parts["scales"].tolist() == [[2.0]]
    assert unpack(packed).tolist() == [[2.0 * value for value in NF4_CODEBOOK]]


def test_nf4_code_at_and_just_above_each_threshold() -> None:
    at = torch.tensor(NF4_THRESHOLDS)
    above = torch.nextafter(at, torch.tensor(2.0))
    row = torch.cat([torch.tensor([1.0, -1.0]), torch.stack([at, above], dim=1).flatten()])
    codes = pack(row[None], "nf4").parts["codes"][0, :16].tolist()
    # At a threshold the lower code, above it the upper: the two share a byte.
    assert codes == [0xF0] + [code << 4 | (code + 1) for code in range(15)]


def test_int8_bytes() -> None:
    row = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.6, -3.4]])
    packed = pack(torch.cat([row, row / 4]), "int8")
    assert packed.parts["scales"].tolist() == [[1.0], [0.25]]
    # Halves are rounded to the even code.
    assert packed.parts["codes"].tolist() == [[127, -127, 0, 2, 2, 0, -2, 127, -3]] * 2
    assert packed.parts["codes"].dtype == torch.int8


def test_nf4_dq_bytes() -> None:
    row = torch.cat([torch.full((64,), size) for size in (1.0, -2.0, 3.0)])[None]
    packed = pack(row, "nf4-dq")
    assert bytes(packed.parts["codes"][0].tolist()) == b"\xff" * 32 + b"\x00" * 32 + b"\xff" * 32
    assert packed.parts["scale_codes"].tolist() == [[0, 128, 255]]
    # 2 / 255 cut to 16 significant bits.
    assert packed.parts["scale_range"].tolist() == [[[1.0, 0.00784301757812500]]]
    step = 0.00784301757812500
    assert nf4_scales(packed).tolist() == [[1.0, 1.0 + 128 * step, 1.0 + 255 * step]]


def test_nf4_dq_scales_have_a_range_per_256() -> None:
    sizes = torch.cat([torch.linspace(1, 2, 256), torch.linspace(100, 101, 10)])
    row = sizes.repeat_interleave(64)[None]
    packed = pack(row, "nf4-dq")
    assert packed.parts["scale_range"].shape == (1, 2, 2)
    assert packed.parts["scale_range"][0, :, 0].tolist() == [1.0, 100.0]
    torch.testing.assert_close(nf4_scales(packed)[0], sizes, rtol=0, atol=0.5 / 255 * 1.02)


@pytest.mark.parametrize(
    ("format", "cols", "expected"),
    [
        ("float32", 65, 260),
        ("float16", 65, 130),
        ("bfloat16", 65, 130),
        ("int8", 65, 65 + 4),
        ("nf4", 65, 2 * 32 + 2 * 4),
        ("nf4-dq", 65, 2 * 32 + 2 * 1 + 8),
        ("nf4-dq", 64 * 257, 257 * 32 + 257 + 2 * 8),
    ],
)
def test_row_nbytes_counts_what_is_stored(format: str, cols: int, expected: int) -> None:
    assert row_nbytes(format, cols) == expected
    assert pack(torch.ones(3, cols), format).nbytes == 3 * expected


# ---- properties


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(**shapes, data=st.data())
def test_rows_are_packed_independently(
    format: str, rows: int, cols: int, seed: int, data: st.DataObject
) -> None:
    matrix = random_matrix(rows, cols, seed)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    whole = pack(matrix, format)
    piece = pack(matrix[start:stop], format)
    sliced = whole.row_slice(start, stop)
    assert (sliced.rows, sliced.cols) == (stop - start, cols)
    for name, part in sliced.parts.items():
        assert torch.equal(part, piece.parts[name])
    assert torch.equal(unpack(sliced), unpack(whole)[start:stop])


@pytest.mark.parametrize("format", FLOATS)
@settings(max_examples=25, deadline=None)
@given(**shapes)
def test_float_formats_round_trip_exactly(format: str, rows: int, cols: int, seed: int) -> None:
    matrix = random_matrix(rows, cols, seed).to(getattr(torch, format))
    packed = pack(matrix, format)
    assert torch.equal(unpack(packed, matrix.dtype), matrix)
    assert torch.equal(unpack(packed), matrix.float())


@pytest.mark.parametrize("format", QUANTISED)
@settings(max_examples=40, deadline=None)
@given(**shapes, exponent=st.integers(-149, 127))
@example(rows=4, cols=130, seed=0, exponent=127)
@example(rows=4, cols=130, seed=0, exponent=-149)
@example(rows=4, cols=130, seed=0, exponent=-140)
@example(rows=4, cols=130, seed=0, exponent=-126)
def test_error_bounds(format: str, rows: int, cols: int, seed: int, exponent: int) -> None:
    matrix = random_matrix(rows, cols, seed, exponent)
    back = unpack(pack(matrix, format))
    assert torch.isfinite(back).all()
    assert back[matrix == 0].count_nonzero() == 0

    matrix64 = matrix.double()
    blocks = torch.nn.functional.pad(matrix64, (0, -cols % 64)).unflatten(1, (-(-cols // 64), 64))
    amax = blocks.abs().amax(2)
    # Half of float32's smallest step, for every rounding that falls below the normal range.
    tiny = 2.0**-150
    if format == "int8":
        bound = (matrix64.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5) + 2 * 127 * tiny).expand(
            rows, cols
        )
    else:
        block_bound = amax * 0.15191 + tiny
        if format == "nf4-dq" and rows:
            groups = amax.split(256, dim=1)
            spread = [(group.amax(1) - group.amin(1))[:, None].expand_as(group) for group in groups]
            # Half a step, and the cut of the step to 16 bits; a step that underflows costs 255.
            block_bound += torch.cat(spread, 1) * (0.5 / 255 + 2.0**-15) + 2 * 255 * tiny
        bound = block_bound.repeat_interleave(64, dim=1)[:, :cols]
    assert ((back.double() - matrix64).abs() <= bound).all()


@settings(max_examples=25, deadline=None)
@given(**shapes, exponent=st.integers(-100, 100))
def test_dequantised_values_are_one_float32_product(
    rows: int, cols: int, seed: int, exponent: int
) -> None:
    packed = pack(random_matrix(rows, cols, seed, exponent), "nf4-dq")
    ranges = packed.parts["scale_range"].double().repeat_interleave(256, dim=1)
    codes = packed.parts["scale_codes"].double()
    product = codes * ranges[:, : codes.shape[1], 1]
    # The product is exact in float32, which makes a fused multiply-add and two operations agree.
    assert torch.equal(product.float().double(), product)
    scales = (ranges[:, : codes.shape[1], 0] + product).float()
    assert torch.equal(scales, nf4_scales(packed))

    nibbles = torch.stack([packed.parts["codes"] >> 4, packed.parts["codes"] & 15], 2)
    book = torch.tensor(NF4_CODEBOOK, dtype=torch.float64)
    values = book[nibbles.long()].flatten(1)
    exact = (values * scales.double().repeat_interleave(64, dim=1))[:, :cols]
    assert torch.equal(unpack(packed), exact.float())


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(cols=st.integers(1, 400), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_a_range_of_columns_is_that_of_the_whole(
    format: str, cols: int, seed: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, cols))
    stop = data.draw(st.integers(start, cols))
    packed = pack(random_matrix(3, cols, seed), format)
    assert torch.equal(unpack(packed, torch.float32, start, stop), unpack(packed)[:, start:stop])


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=30, deadline=None)
@given(**shapes, data=st.data())
def test_column_blocks_are_the_columns_from_a_multiple_of_64_on(
    format: str, rows: int, cols: int, seed: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, cols))
    stop = data.draw(st.integers(start, cols))
    packed = pack(random_matrix(rows, cols, seed), format)
    cut = packed.column_blocks(start, stop)
    first = start - start % 64
    assert (cut.rows, cut.cols) == (rows, stop - first)
    assert cut.format == ("nf4" if format == "nf4-dq" else format)
    assert torch.equal(unpack(cut), unpack(packed)[:, first:stop])
    assert torch.equal(
        unpack(cut, torch.float32, start - first, cut.cols),
        unpack(packed, torch.float32, start, stop),
    )
    # Kernels are given addresses: rows must lie one after another.
    assert all(part.is_contiguous() for part in cut.parts.values())


@pytest.mark.parametrize("format", FORMATS)
def test_column_blocks_do_not_keep_the_whole_matrix_alive(format: str) -> None:
    packed = pack(random_matrix(5, 300, seed=2), format)
    cut = packed.column_blocks(130, 190)
    held = sum(part.untyped_storage().nbytes() for part in cut.parts.values())
    assert held == cut.nbytes == 5 * row_nbytes(cut.format, 62)
    expected = unpack(packed)[:, 128:190].clone()
    whole = packed.column_blocks(0, 300)
    for part in packed.parts.values():
        part.zero_()
    assert torch.equal(unpack(cut), expected)
    assert torch.equal(unpack(whole, torch.float32, 128, 190), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unpack_rounds_once_to_the_asked_dtype(format: str, dtype: torch.dtype) -> None:
    packed = pack(random_matrix(4, 200, seed=7), format)
    assert torch.equal(unpack(packed, dtype), unpack(packed).to(dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_packing_in_chunks_is_packing_at_once(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(7, 70, seed=3)
    at_once = pack(matrix, format)
    monkeypatch.setattr("vllm_vlora.quantize._CHUNK_ELEMENTS", 150)
    in_chunks = pack(matrix, format)
    for name, part in at_once.parts.items():
        assert torch.equal(part, in_chunks.parts[name])


@pytest.mark.parametrize("format", FORMATS)
def test_any_strides_and_float_dtypes_are_packed_alike(format: str) -> None:
    matrix = random_matrix(6, 100, seed=5).bfloat16()
    expected = unpack(pack(matrix.float(), format))
    for variant in (matrix, matrix.double(), matrix.t().contiguous().t()):
        assert torch.equal(unpack(pack(variant, format)), expected)
    assert torch.equal(unpack(pack(matrix.requires_grad_(), format)), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_moving_keeps_the_values(format: str) -> None:
    packed = pack(random_matrix(3, 70, seed=1), format)
    assert packed.to("meta").device == torch.device("meta")
    assert packed.to("cpu").parts.keys() == packed.parts.keys()
    assert packed.device == torch.device("cpu")


# ---- refusals


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(format: str, bad: float) -> None:
    matrix = torch.ones(3, 5)
    matrix[2, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        pack(matrix, format)


@pytest.mark.parametrize(
    ("format", "value"), [("float16", 1e6), ("bfloat16", 3.4028e38), ("int8", 1e39), ("nf4", 1e39)]
)
def test_values_too_large_for_the_format_are_refused(format: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"too large for {format}"):
        pack(torch.full((2, 3), value, dtype=torch.float64), format)


def test_bfloat16_too_large_for_float16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"too large for float16 \(largest magnitude 999424\)"):
        pack(torch.full((2, 3), 1e6, dtype=torch.bfloat16), "float16")


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown format 'fp4'"):
        pack(torch.ones(2, 2), "fp4")
    with pytest.raises(ValueError, match="unknown format 'fp4'"):
        row_nbytes("fp4", 8)
    with pytest.raises(ValueError, match="2-D floating-point"):
        pack(torch.ones(2, 2, dtype=torch.int32), "nf4")
    with pytest.raises(ValueError, match="2-D floating-point"):
        pack(torch.ones(4), "nf4")
    packed = pack(torch.ones(2, 70), "nf4")
    with pytest.raises(ValueError, match="rows 1:3"):
        packed.row_slice(1, 3)
    with pytest.raises(ValueError, match="columns 0:71"):
        unpack(packed, torch.float32, 0, 71)
    for start, stop in ((0, 71), (-1, 3), (5, 4)):
        with pytest.raises(ValueError, match=f"columns {start}:{stop} are not within 0:70"):
            packed.column_blocks(start, stop)
    with pytest.raises(ValueError, match="columns"):
        part_specs("nf4", -1)


def test_parts_that_contradict_the_format_are_refused() -> None:
    parts = pack(torch.ones(2, 70), "nf4").parts
    with pytest.raises(ValueError, match="has the parts"):
        PackedMatrix("nf4", 2, 70, {"codes": parts["codes"]})
    with pytest.raises(ValueError, match="part 'scales' of a 2 x 70"):
        PackedMatrix("nf4", 2, 70, parts | {"scales": parts["scales"].double()})
    with pytest.raises(ValueError, match="part 'codes' of a 3 x 70"):
        PackedMatrix("nf4", 3, 70, parts)
    with pytest.raises(ValueError, match="move them to one device"):
        PackedMatrix("nf4", 2, 70, parts | {"scales": parts["scales"].to("meta")})


# ---- narrow rows


def narrow_shapes() -> dict[str, st.SearchStrategy[int]]:
    return {**shapes, "bits": st.sampled_from([2, 3])}


def codes_of(packed: PackedMatrix) -> torch.Tensor:
    codes = packed.parts["codes"]
    return torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        # Places 0 1 2 3, then 3 2 1 0, then zeros: two bits each, the earlier the higher.
        (2, "04bf fb40" + "00" * 28, "1be4" + "00" * 14),
        # Places 0 to 7: upper bits 00 00 01 01 10 10 11 11, lowest ones 0 1 0 1 0 1 0 1.
        (3, "0135 7adf" + "00" * 28, "05af" + "00" * 14 + "55" + "00" * 7),
        # The last element of a block is in the lowest bits.
        (3, "00" * 31 + "0f", "00" * 15 + "03" + "00" * 7 + "01"),
        (2, "00" * 31 + "04" + "ff" * 32, "00" * 15 + "01" + "ff" * 16),
    ],
)
def test_narrow_bytes(bits: int, codes: str, expected: str) -> None:
    wide = torch.tensor(list(bytes.fromhex(codes)), dtype=torch.uint8)
    narrow = narrow_codes(wide, bits)
    assert bytes(narrow.tolist()).hex() == expected
    assert torch.equal(widen_codes(narrow, bits), wide)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3]),
    rows=st.integers(0, 3),
    blocks=st.integers(0, 5),
    seed=st.integers(0, 2**31 - 1),
)
def test_narrow_codes_round_trip(bits: int, rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(NARROW_CODES[bits], dtype=torch.uint8)
    picks = torch.randint(len(allowed), (rows, blocks * 32, 2), generator=generator)
    wide = (allowed[picks[..., 0]] << 4) | allowed[picks[..., 1]]
    narrow = narrow_codes(wide, bits)
    assert narrow.shape == (rows, blocks * 8 * bits)
    assert torch.equal(widen_codes(narrow, bits), wide)
    # Blocks are narrowed one by one, so that flat tensors of many rows are widened at once.
    assert torch.equal(widen_codes(narrow.flatten(), bits), wide.flatten())


@settings(max_examples=40, deadline=None)
@given(**narrow_shapes(), exponent=st.integers(-149, 127))
@example(rows=4, cols=130, seed=0, bits=2, exponent=127)
@example(rows=4, cols=130, seed=0, bits=3, exponent=-149)
def test_narrow_rows_are_rows_of_nf4_dq(
    rows: int, cols: int, seed: int, bits: int, exponent: int
) -> None:
    matrix = random_matrix(rows, cols, seed, exponent)
    packed = pack_narrow(matrix, bits)
    assert packed.format == "nf4-dq"
    assert set(codes_of(packed).flatten().tolist()) <= set(NARROW_CODES[bits])
    back = unpack(packed).double()
    assert torch.isfinite(back).all()
    blocks = torch.nn.functional.pad(matrix, (0, -cols % 64)).unflatten(1, (-(-cols // 64), 64))
    empty = (blocks == 0).all(2).repeat_interleave(64, dim=1)[:, :cols]
    assert back[empty].count_nonzero() == 0
    assert not torch.signbit(back[empty]).any()
    # No worse than all zeros: the least-squares scale of any codes never is. A scale in 8 bits between
    # the least and the greatest of a row of zero blocks and others may cost a little of that.
    lost = (back - matrix.double()).square().sum(1)
    whole = matrix.double().square().sum(1)
    if exponent > -120:
        assert (lost <= 1.001 * whole).all()
    stored = narrow_codes(packed.parts["codes"], bits).numel()
    others = sum(packed.parts[part].nbytes for part in ("scale_codes", "scale_range"))
    assert stored + others == rows * narrow_row_nbytes(cols, bits)
    assert narrow_row_nbytes(cols, 4) == row_nbytes("nf4-dq", cols)


@pytest.mark.parametrize("bits", [*FORMATS, 2, 3])
@pytest.mark.parametrize("cols", [128, 130])
def test_parts_lie_without_gaps_whatever_the_matrix(bits: str | int, cols: int) -> None:
    """They are written as they are, also of a matrix that a solver left column by column."""
    rows = random_matrix(6, cols, seed=7)
    columns = rows.T.contiguous().T
    assert not columns.is_contiguous()
    packed, wanted = (
        pack(m, bits) if isinstance(bits, str) else pack_narrow(m, bits) for m in (columns, rows)
    )
    for name, part in packed.parts.items():
        assert part.is_contiguous(), name
        assert torch.equal(part, wanted.parts[name]), name


@settings(max_examples=25, deadline=None)
@given(**narrow_shapes(), data=st.data())
def test_narrow_rows_are_packed_independently(
    rows: int, cols: int, seed: int, bits: int, data: st.DataObject
) -> None:
    matrix = random_matrix(rows, cols, seed)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    whole, piece = pack_narrow(matrix, bits), pack_narrow(matrix[start:stop], bits)
    for name, part in whole.row_slice(start, stop).parts.items():
        assert torch.equal(part, piece.parts[name])


@pytest.mark.parametrize("bits", [2, 3])
def test_packing_narrow_rows_in_chunks_is_packing_at_once(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = random_matrix(7, 70, seed=3)
    at_once = pack_narrow(matrix, bits)
    monkeypatch.setattr("vllm_vlora.quantize._CHUNK_ELEMENTS", 150)
    in_chunks = pack_narrow(matrix, bits)
    for name, part in at_once.parts.items():
        assert torch.equal(part, in_chunks.parts[name])


def best_by_search(block: torch.Tensor, bits: int) -> float:
    """The least squared error of a block over 4000 scales, in float64."""
    book = torch.tensor(NF4_CODEBOOK, dtype=torch.float64)[list(NARROW_CODES[bits])]
    scales = torch.linspace(0.2, 3.5, 4000, dtype=torch.float64)[:, None, None] * block.abs().max()
    errors = (block[None, :, None] - scales * book).square().amin(2)
    return float(errors.sum(1).min())


@pytest.mark.parametrize("bits", [2, 3])
def test_the_scale_search_finds_nearly_the_best_scales(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    # One block a row: the 8-bit scale is exact, so the search alone is judged.
    matrix = torch.randn(60, 64, generator=generator)
    lost = (unpack(pack_narrow(matrix, bits)) - matrix).double().square().sum()
    best = sum(best_by_search(row.double(), bits) for row in matrix)
    assert best * 0.999 <= lost <= best * 1.03


@pytest.mark.parametrize(("bits", "expected"), [(4, 0.00848), (3, 0.0314), (2, 0.1121)])
@pytest.mark.parametrize("cols", [576, 4096])
def test_what_normal_rows_lose(bits: int, expected: float, cols: int) -> None:
    matrix = torch.randn(2**18 // cols, cols, generator=torch.Generator().manual_seed(cols))
    packed = pack(matrix, "nf4-dq") if bits == 4 else pack_narrow(matrix, bits)
    lost = (unpack(packed) - matrix).square().sum() / matrix.square().sum()
    assert float(lost) == pytest.approx(expected, rel=0.02)


def test_rows_are_stacked_as_packed() -> None:
    matrix = random_matrix(6, 130, seed=4)
    parts = [pack(matrix[:2], "nf4-dq"), pack_narrow(matrix[2:3], 3), pack_narrow(matrix[3:], 2)]
    stacked = stack_rows(parts)
    assert (stacked.rows, stacked.cols, stacked.format) == (6, 130, "nf4-dq")
    assert torch.equal(unpack(stacked), torch.cat([unpack(part) for part in parts]))
    for wrong in ([], [parts[0], pack(matrix, "nf4")], [parts[0], pack(matrix[:, 1:], "nf4-dq")]):
        with pytest.raises(ValueError, match="stack_rows needs matrices of one format"):
            stack_rows(wrong)


def test_bad_input_for_narrow_rows_is_refused() -> None:
    ones = torch.ones(2, 5)
    with pytest.raises(ValueError, match="3 or 2 bits, got 4"):
        pack_narrow(ones, 4)
    with pytest.raises(ValueError, match="2-D floating-point"):
        pack_narrow(ones[0], 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        pack_narrow(ones * torch.nan, 2)
    with pytest.raises(ValueError, match="too large"):
        pack_narrow(ones.double() * 1e39, 3)
    with pytest.raises(ValueError, match="not those of rows with 2 bits"):
        narrow_codes(pack(torch.randn(2, 64), "nf4").parts["codes"], 2)


@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_knows_that_it_is_zero(format: str) -> None:
    matrix = torch.zeros(3, 300)
    assert pack(matrix, format).is_zero
    matrix[2, 299] = -1e-4
    packed = pack(matrix, format)
    assert not packed.is_zero
    assert unpack(packed).any()


# ---- what is finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_finite_or_not_as_torch_says(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wanted = torch.isfinite(patterns).tolist()
    assert [is_finite(value) for value in patterns] == wanted
    # Among others of either sign.
    assert is_finite(patterns[torch.isfinite(patterns)])
    for place in (~torch.isfinite(patterns)).nonzero()[::97, 0]:
        assert not is_finite(torch.stack([patterns[0], patterns[place], patterns[-(2**15)]]))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("rows", [1, 3, 3000])
@pytest.mark.parametrize("negative", [False, True])
def test_one_value_that_is_not_finite_is_found_anywhere(
    dtype: torch.dtype, rows: int, negative: bool
) -> None:
    if dtype.itemsize > 1:
        least, greatest = torch.finfo(dtype).min, torch.finfo(dtype).max
    else:
        least, greatest = -1.0, 1.0
    matrix = torch.full((rows, 500), least if negative else greatest, dtype=torch.float64)
    assert is_finite(matrix.to(dtype))
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for row, col in ((0, 0), (rows - 1, 499), (rows // 2, 250)):
            spoiled = matrix.clone()
            spoiled[row, col] = value
            for shown in (spoiled, spoiled.T, spoiled[:, col : col + 1]):
                assert not is_finite(shown.to(dtype))
    whole = matrix.to(dtype)
    for shown in (whole[:, ::2], whole.T, whole[:0], torch.tensor(1.0, dtype=dtype)):
        assert is_finite(shown)
