"""The distortion benchmark: its codes against published figures and every stream, and the program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import BENCHMARKS

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

from distortion.codes import (
    Trellis,
    entropy_coded,
    lloyd_max,
    lloyd_max_points,
    stored,
    stored_trellis,
)


def gaussian(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(5))


def lost(rows: torch.Tensor, values: torch.Tensor) -> float:
    return float((values - rows).square().sum() / rows.square().sum())


# Max, Quantizing for minimum distortion, 1960, table I: the least mean squared errors.
@pytest.mark.parametrize(("bits", "published"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_has_the_published_error(bits: int, published: float) -> None:
    rows = gaussian(64, 4096)
    values, taken = lloyd_max(rows, bits)
    assert lost(rows, values) == pytest.approx(published, rel=0.02)
    assert taken == bits + 16 / 4096


def test_lloyd_max_of_two_bits_has_the_published_values() -> None:
    expected = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])
    assert torch.allclose(lloyd_max_points(2), expected, atol=2e-3)


def test_a_trellis_is_a_stream_of_bits_and_its_encoder_finds_the_best() -> None:
    """Every stream of a short row, decoded bit by bit: none is nearer than the one found."""
    trellis = Trellis(2, 4, gaussian(1, 16)[0])
    rows = gaussian(3, 4)
    windows = trellis.encode(rows)
    streams = torch.arange(1 << (4 + 3 * 2))
    every = torch.stack([trellis.table[streams >> shift & 15] for shift in (6, 4, 2, 0)], dim=1)
    best = (every - rows[:, None]).square().sum(2).min(1).values
    found = (trellis.table[windows] - rows).square().sum(1)
    assert torch.allclose(found, best)
    # Each window begins with what the one before ended with.
    assert torch.equal(windows[:, 1:] >> 2, windows[:, :-1] & 3)


def test_a_trained_trellis_loses_less_than_scalars_and_no_more_than_can_be() -> None:
    rows = gaussian(8, 1024)
    values, bits = Trellis.trained(2, 6).coded(rows)
    assert 2 ** (-2 * bits) < lost(rows, values) < 0.8 * lost(rows, stored(rows, 2)[0])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_stored_trellis_codes_lose_nearly_as_little_as_a_table_of_their_own(bits: int) -> None:
    """One table serves the three widths."""
    rows = gaussian(16, 512)
    values, taken = stored_trellis(rows, bits)
    assert taken == 8 * (-(-(512 * bits + 8 - bits) // 8) + 4) / 512
    assert lost(rows, values) < 1.05 * lost(rows, Trellis.trained(bits, 8).coded(rows)[0])


def test_the_entropy_of_codes_is_below_their_bits() -> None:
    rows = gaussian(8, 4096)
    for bits in (2, 3, 4):
        values, nominal = stored(rows, bits)
        coded, least = entropy_coded(rows, bits)
        assert torch.equal(values, coded)
        assert nominal - 0.3 < least < nominal


def test_the_program_measures_gaussian_rows_and_the_demo_adapters(tmp_path: Path) -> None:
    written = tmp_path / "distortion.json"
    run = [sys.executable, BENCHMARKS / "run.py", "distortion", "--quick", "--json", written]
    shown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    cells = json.loads(written.read_text())["cells"]
    assert {cell["source"] for cell in cells} == {"Gaussian", "adapters"}
    assert all(cell["lost"] > cell["bound"] for cell in cells if cell["source"] == "Gaussian")
    assert shown.count("stored trellis") == 6
    assert shown.count("window 6") == 6
