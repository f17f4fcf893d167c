"""Trellis codes against a decoder of whole numbers, exhaustive search, and literal bytes."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch

from vllm_vlora.quantize import (
    PackedMatrix,
    pack,
    pack_trellis,
    row_nbytes,
    stack_rows,
    stored_code_nbytes,
    stored_streams,
    trellis_parts_of,
    trellis_row_nbytes,
    unpack,
)
from vllm_vlora.trellis import (
    TRELLIS_WIDTHS,
    encode_windows,
    join_windows,
    stream_nbytes,
)
from vllm_vlora.trellis_tables import TRELLIS_TABLES

# What each width may lose of Gaussian rows: the bounds 2^(-2 bits) are .0039, .0156 and .0625.
MOST_LOST = {4: 0.0061, 3: 0.0218, 2: 0.0793}


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def values_of(packed: PackedMatrix) -> torch.Tensor:
    """Each row's stream as one whole number, of which element t's window begins at bit t * width."""
    rows = []
    for codes, (width,), (scale,) in zip(
        packed.parts["codes"].tolist(),
        packed.parts["widths"].tolist(),
        packed.parts["scales"].numpy(),
    ):
        stream = int.from_bytes(bytes(codes), "little")
        windows = [(stream >> (t * width)) & 255 for t in range(packed.cols)]
        table = TRELLIS_TABLES[width]
        rows.append([np.float32(table[window]) * scale for window in windows])
    return torch.tensor(np.array(rows, dtype=np.float32).reshape(packed.rows, packed.cols))


def test_the_tables_never_change() -> None:
    assert list(TRELLIS_TABLES) == [4, 3, 2]
    parts = np.array(list(TRELLIS_TABLES.values())) * 256
    assert parts.shape == (3, 256)
    assert (parts == parts.astype(np.int16)).all()
    assert (parts[:, 0] > 0).all()
    digest = hashlib.sha256(parts.astype("<i2").tobytes()).hexdigest()
    assert digest == "1b4002db4dd96e6c7c587e2899e1e722b4ec1107f3635efa2a1e2414dc03f083"


@pytest.mark.parametrize(
    ("width", "codes"), [(4, "ad35ede3f409"), (3, "94cc347335"), (2, "44914400")]
)
def test_literal_bytes(width: int, codes: str) -> None:
    row = torch.tensor([[0.5, -1.0, 0.25, 2.0, -0.125, 1.5, -2.0, 0.0, 0.75, -0.5, 1.0]])
    packed = pack_trellis(row, width)
    assert packed.parts["widths"].tolist() == [[width]]
    assert stored_streams(packed.parts["codes"], 11, width).numpy().tobytes().hex() == codes
    assert torch.equal(unpack(packed), values_of(packed))


@pytest.mark.parametrize("cols", [1, 2, 7, 8, 63, 64, 65, 200])
@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_a_value_is_found_at_its_bit(width: int, cols: int) -> None:
    packed = pack_trellis(gaussian(5, cols, seed=cols), width)
    expected = values_of(packed)
    assert torch.equal(unpack(packed), expected)
    for start, stop in itertools.combinations(sorted({0, cols // 3, cols // 2, cols}), 2):
        assert torch.equal(unpack(packed, start=start, stop=stop), expected[:, start:stop])


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_no_stream_is_nearer(width: int) -> None:
    cols = {4: 3, 3: 3, 2: 4}[width]
    units = gaussian(40, cols)
    bits = 8 + (cols - 1) * width
    streams = torch.arange(1 << bits)
    table = torch.tensor(TRELLIS_TABLES[width], dtype=torch.float64)
    windows = (streams[:, None] >> (width * torch.arange(cols))) & 255
    best = [(table[windows] - row).square().sum(1).min() for row in units.double()]
    found = (table[encode_windows(units, width).long()] - units.double()).square().sum(1)
    # Numbers are compared as the nearest of 64 levels a unit.
    assert (found <= torch.stack(best) + 0.02 * cols).all()
    assert found.mean() <= torch.stack(best).mean() * 1.03


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_what_gaussian_rows_lose(width: int) -> None:
    rows = gaussian(256, 512, seed=1)
    lost = (unpack(pack_trellis(rows, width)) - rows).square().sum() / rows.square().sum()
    assert 2.0 ** (-2 * width) < lost < MOST_LOST[width]


def test_the_scale_is_that_of_least_squares() -> None:
    rows = gaussian(6, 300).double() * 10.0 ** torch.arange(-3, 3)[:, None]
    stored = unpack(pack_trellis(rows, 2)).double()
    assert torch.allclose((stored * rows).sum(1), stored.square().sum(1), rtol=1e-6)


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_zeros_huge_and_tiny_rows(width: int) -> None:
    rows = torch.stack([torch.zeros(70), torch.ones(70), gaussian(1, 70)[0]])
    rows = torch.cat([rows, rows[1:] * 2.0**125, rows[1:] * 2.0**-100])
    stored = unpack(pack_trellis(rows, width))
    assert stored.isfinite().all()
    assert not stored[0].any()
    assert not stored[0].signbit().any()
    # A row's codes do not depend on its scale.
    assert torch.equal(stored[3:5] * 2.0**-125, stored[1:3])
    assert torch.equal(stored[5:7] * 2.0**100, stored[1:3])


def test_a_row_with_values_beyond_float32_is_refused() -> None:
    largest = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match="too large for trellis"):
        pack_trellis(torch.full((1, 9), largest), 2)


def test_rows_of_several_widths_are_those_of_each() -> None:
    rows = gaussian(9, 100)
    widths = torch.tensor([4, 2, 3, 3, 4, 2, 2, 3, 4])
    packed = pack_trellis(rows, widths)
    stored = unpack(packed)
    for place, width in enumerate(widths.tolist()):
        alone = pack_trellis(rows[place : place + 1], width)
        assert torch.equal(stored[place : place + 1], unpack(alone))
        assert torch.equal(packed.parts["codes"][place : place + 1], alone.parts["codes"])


@pytest.mark.parametrize("stop", [64, 130, 200])
@pytest.mark.parametrize("start", [0, 64, 100])
def test_columns_are_cut_at_whole_bytes(start: int, stop: int) -> None:
    packed = stack_rows([pack_trellis(gaussian(3, 200, seed=w), w) for w in TRELLIS_WIDTHS])
    if start > stop:
        return
    cut = packed.column_blocks(start, stop)
    first = start // 64 * 64
    assert torch.equal(unpack(cut), unpack(packed)[:, first:stop])
    assert torch.equal(values_of(cut), unpack(cut))


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
@pytest.mark.parametrize("cols", [1, 3, 64, 577])
def test_what_lies_on_disk_is_the_stream(cols: int, width: int) -> None:
    packed = pack_trellis(gaussian(4, cols), width)
    streams = stored_streams(packed.parts["codes"], cols, width)
    assert streams.shape[1] == -(-(cols * width + 8 - width) // 8) == stream_nbytes(cols, width)
    assert stored_code_nbytes("trellis", cols, width) == streams.shape[1]
    assert trellis_row_nbytes(cols, width) == streams.shape[1] + 4 < row_nbytes("trellis", cols)
    again = trellis_parts_of(streams.clone(), cols, width)
    assert all(torch.equal(part, packed.parts[name]) for name, part in again.items())


def test_windows_of_a_stream_are_joined_without_their_overlap() -> None:
    windows = torch.tensor([[0b10110001, 0b01011011, 0b11100101]], dtype=torch.uint8)
    # Each further window adds its two highest bits.
    windows[0, 1] = (0b01 << 6) | (0b10110001 >> 2)
    windows[0, 2] = (0b11 << 6) | (int(windows[0, 1]) >> 2)
    assert join_windows(windows, 2).tolist() == [[0b10110001, 0b1101]]


@pytest.mark.parametrize("width", [1, 5, 8])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match="trellis rows have 4, 3 or 2 bits"):
        pack_trellis(gaussian(2, 8), width)
    with pytest.raises(ValueError, match="trellis rows have 4, 3 or 2 bits"):
        pack_trellis(gaussian(2, 8), torch.tensor([4, width]))


def test_a_float_matrix_packs_with_four_bits() -> None:
    rows = gaussian(3, 80)
    four, plain = pack_trellis(rows, 4), pack(rows.double(), "trellis")
    assert all(torch.equal(part, plain.parts[name]) for name, part in four.parts.items())


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 5), (5, 0)):
        packed = pack_trellis(torch.empty(shape), 3)
        assert unpack(packed).shape == shape
        assert packed.is_zero
