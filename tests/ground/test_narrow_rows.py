"""Rows of 4, 3 and 2 bits as a device holds them: pinned by literal bytes, and their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vlora.narrow_rows import (
    BOOK_OF_2,
    BOOK_OF_3,
    CODEBOOKS,
    NarrowCodes,
    NarrowMatrix,
    narrow_matrix,
    narrow_nbytes,
    planes_of,
)
from vllm_vlora.quantize import (
    NF4_CODEBOOK,
    PackedMatrix,
    narrow_codes,
    narrow_places,
    narrow_row_nbytes,
    pack,
    pack_narrow,
    stack_rows,
    stored_places,
    unpack,
)

Bits = tuple[int, int, int]


def wide_and_narrow(bits: Bits, cols: int, seed: int = 0) -> tuple[PackedMatrix, NarrowMatrix]:
    """The same random matrix with 4 bits a code and with as many as its rows need."""
    matrix = torch.randn(sum(bits), cols, generator=torch.Generator().manual_seed(seed))
    four, three, two = matrix.split(list(bits))
    wide = stack_rows([pack(four, "nf4-dq"), pack_narrow(three, 3), pack_narrow(two, 2)])
    return wide, narrow_matrix(wide, bits)


def test_the_bytes_of_a_block() -> None:
    """Element k's place is k % 16, of 8 and of 4 codes k % 8 and k % 4: one after another."""
    places = (torch.arange(64) % 16).to(torch.uint8)[None]
    # Elements 0 to 7 have the lowest two bits 0, 1, 2, 3, 0, .. at bits 0, 4, 8 ..; 8 to 15 two above.
    word = sum((k % 4) << (4 * (k % 8) + 2 * (k // 8)) for k in range(16))
    third = sum(((k >> 2) & 1) << (4 * (k % 4) + k // 4) for k in range(16))
    fourth = sum((k >> 3) << (4 * (k % 4) + k // 4) for k in range(16))
    assert (f"{word:08x}", f"{third:04x}", f"{fourth:04x}") == ("fa50fa50", "aaaa", "cccc")
    unit = {4: ("50fa50fa", "aaaa", "cccc"), 3: ("50fa50fa", "aaaa", ""), 2: ("50fa50fa", "", "")}
    for bits, (low, middle, top) in unit.items():
        block = planes_of(places % (1 << bits), bits)
        found = "".join(bytes(plane[0].tolist()).hex() for plane in block)
        assert found == 4 * low + 4 * middle + 4 * top


def test_planes_follow_each_other_from_rows_with_more_bits_on() -> None:
    wide, narrow = wide_and_narrow((1, 1, 1), 64)
    four, three, two = (
        planes_of(narrow_places(row, bits), bits)
        for bits, row in zip((4, 3, 2), wide.parts["codes"])
    )
    assert [len(planes) for planes in (four, three, two)] == [3, 2, 1]
    pieces = [four[0], three[0], two[0], four[1], three[1], four[2]]
    assert torch.equal(narrow.parts["codes"], torch.cat([piece.flatten() for piece in pieces]))
    assert [tuple(plane.shape) for plane in narrow.planes()] == [(3, 16), (2, 8), (1, 8)]


def test_the_codebooks_are_those_of_the_rows() -> None:
    assert CODEBOOKS[:BOOK_OF_3] == NF4_CODEBOOK
    for start, bits in ((BOOK_OF_3, 3), (BOOK_OF_2, 2)):
        book = torch.tensor(CODEBOOKS[start : start + (1 << bits)])
        # One block that holds every place, under a scale of 1.
        row = pack_narrow(book.repeat(64 // len(book))[None], bits)
        places = narrow_places(row.parts["codes"], bits)[0].int()
        assert places.tolist() == list(range(len(book))) * (64 // len(book))
    assert len(CODEBOOKS) == BOOK_OF_2 + 4


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Bits, int, int]:
    bits = draw(st.tuples(*[st.integers(0, 3)] * 3))
    cols = draw(st.sampled_from([1, 63, 64, 65, 130, 64 * 256 + 3, 64 * 512]))
    return bits, cols, draw(st.integers(0, 2**31 - 1))


@settings(max_examples=40, deadline=None)
@given(case=matrices(), data=st.data())
def test_values_are_those_of_four_bits(case: tuple[Bits, int, int], data: st.DataObject) -> None:
    bits, cols, seed = case
    wide, narrow = wide_and_narrow(bits, cols, seed)
    again = narrow.widened()
    assert again.format == "nf4-dq"
    assert all(torch.equal(again.parts[name], part) for name, part in wide.parts.items())
    start = data.draw(st.integers(0, cols))
    stop = data.draw(st.integers(start, cols))
    whole = unpack(wide)
    assert torch.equal(unpack(narrow, torch.float32, start, stop), whole[:, start:stop])
    # As unpack(cut): columns from the block in which the cut begins.
    first = start // 64 * 64
    cut = narrow.column_blocks(start, stop)
    assert torch.equal(unpack(cut), whole[:, first : max(stop, first)])
    again = cut.column_blocks(cut.cols // 2, cut.cols)
    assert torch.equal(unpack(again), unpack(cut)[:, cut.cols // 2 // 64 * 64 :])
    row = data.draw(st.integers(0, sum(bits)))
    end = data.draw(st.integers(row, sum(bits)))
    assert torch.equal(unpack(narrow.row_slice(row, end)), whole[row:end])


@pytest.mark.parametrize("cols", [64, 130, 64 * 257])
def test_bytes_are_those_of_the_file(cols: int) -> None:
    _, narrow = wide_and_narrow((2, 1, 3), cols)
    rows = [narrow_row_nbytes(cols, bits) for bits in (4, 3, 2)]
    assert narrow.nbytes == 2 * rows[0] + rows[1] + 3 * rows[2] == narrow_nbytes((2, 1, 3), cols)
    blocks = -(-cols // 64)
    assert narrow.parts["codes"].numel() == blocks * (2 * 32 + 24 + 3 * 16)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_places_are_read_from_a_file_s_codes(bits: int) -> None:
    matrix = torch.randn(3, 200, generator=torch.Generator().manual_seed(bits))
    codes = (pack(matrix, "nf4-dq") if bits == 4 else pack_narrow(matrix, bits)).parts["codes"]
    stored = codes if bits == 4 else narrow_codes(codes, bits)
    assert torch.equal(stored_places(stored.flatten(), bits), narrow_places(codes, bits))


def test_the_codes_of_many_matrices_lie_in_one_tensor() -> None:
    """Each where 16 bytes may be read at once."""
    codes, found = NarrowCodes(), {}
    for name, bits in (("one", (1, 1, 1)), ("two", (0, 1, 0)), ("three", (0, 0, 2))):
        wide, narrow = wide_and_narrow(bits, 64)
        split = zip((4, 3, 2), wide.parts["codes"].split(list(bits)))
        blocks = [planes_of(narrow_places(part, width), width) for width, part in split]
        codes.add(blocks, lambda taken, name=name: found.update({name: taken}))
        found[name + " alone"] = narrow.parts["codes"]
    assert "one" not in found
    codes.place()
    for name in ("one", "two", "three"):
        assert torch.equal(found[name], found[name + " alone"])
        assert found[name].storage_offset() % 16 == 0
    assert len({found[name].untyped_storage().data_ptr() for name in ("one", "two", "three")}) == 1


def test_what_is_no_such_matrix_is_refused() -> None:
    wide, narrow = wide_and_narrow((1, 1, 1), 64)
    with pytest.raises(ValueError, match="only rows of nf4-dq can be narrow, these are nf4"):
        narrow_matrix(pack(torch.ones(1, 64), "nf4"), (1, 0, 0))
    with pytest.raises(ValueError, match="not those of rows with 2 bits"):
        narrow_matrix(wide, (0, 0, 3))
    with pytest.raises(ValueError, match="a 3 x 64 nf4-narrow matrix"):
        NarrowMatrix("nf4-narrow", 3, 64, narrow.parts, (2, 1, 0))
    with pytest.raises(ValueError, match="as nf4-dq"):
        NarrowMatrix("nf4-dq", 3, 64, narrow.parts, (1, 1, 1))
    with pytest.raises(ValueError, match="rows 1:4"):
        narrow.row_slice(1, 4)
    with pytest.raises(ValueError, match="columns 3:65"):
        narrow.column_blocks(3, 65)
