"""Long rows measured by a sample of their blocks: near what encoding loses, and never a promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.compression.encoding import encode_kept
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.fitting.whitening import FROBENIUS, Metric, Whitener
from vllm_vlora.planning import private_curves
from vllm_vlora.planning.number_formats import NARROW, TRELLIS
from vllm_vlora.planning.private_curves import Curve, measure_private
from vllm_vlora.quantize import as_stored, pack, unpack
from vllm_vlora.representations.decode import relative_error
from vllm_vlora.representations.factors import ScaledFactors

FORMATS = ("bfloat16", "int8", "nf4", "nf4-dq", NARROW)


def factors(
    kind: str, seed: int, rank: int = 6, d_in: int = 4096, d_out: int = 2300
) -> ScaledFactors:
    """Numbers of one size, with a dozen columns that are ten times as large, or of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=generator) * torch.logspace(0, -1.2, rank)[:, None]
    b = torch.randn(d_out, rank, generator=generator)
    if kind == "outliers":
        a[:, torch.randperm(d_in, generator=generator)[:12]] *= 10
    if kind == "many sizes":
        a *= torch.exp(0.7 * torch.randn(d_in, generator=generator))
    return a.bfloat16(), b.bfloat16(), 0.5


def outside_the_sample(cols: int) -> torch.Tensor:
    """The columns, block by block, that a sample of so many has not."""
    columns = torch.arange(cols)
    drawn = private_curves._sample_of(columns.float().view(1, 1, -1)).flatten().long()
    return columns[~torch.isin(columns, drawn)]


def losses(curve: Curve) -> list[float]:
    return [curve.loss(number) for number in range(curve.count)]


@pytest.mark.parametrize("kind", ["one size", "outliers", "many sizes"])
def test_expected_losses_are_near_what_encoding_loses(kind: str) -> None:
    given = [factors(kind, seed) for seed in range(3)]
    found = measure_private(given, FORMATS, "bfloat16", sampled=True)
    for (a, b, scale), (curves, norm) in zip(given, found):
        assert norm == pytest.approx(float((scale * b.double() @ a.double()).square().sum()))
        for format, curve in zip(FORMATS, curves):
            # A row's greatest number lies in one block, and what int8 loses goes by it.
            near = 0.3 if format == "int8" else 0.15
            for number in {0, 1, curve.count // 2, curve.count - 1}:
                option = curve.option(number)
                stored, _ = encode_kept(a, b, scale, option, FROBENIUS)
                lost, _ = relative_error(a, b, scale, stored, None)
                assert option.loss == pytest.approx(lost, rel=near, abs=1e-5 * norm), (
                    format,
                    option,
                )


def test_the_sample_is_far_less_than_the_whole() -> None:
    whole, sampled = (
        measure_private([factors("many sizes", 1)], [NARROW], "bfloat16", sampled=s)[0].curves[0]
        for s in (False, True)
    )
    assert losses(whole) != losses(sampled)


def test_a_row_whose_numbers_lie_in_few_blocks_is_measured_as_a_whole() -> None:
    """As of one part of a fused layer; its neighbour is sampled all the same."""
    even = factors("one size", 1)
    a, b, scale = factors("one size", 2)
    b[:, 3] = 0
    b[192:320, 3] = 1.5
    whole = measure_private([(a, b, scale)], FORMATS, "bfloat16")[0]
    together = measure_private([even, (a, b, scale)], FORMATS, "bfloat16", sampled=True)
    for curve, other in zip(whole.curves, together[1].curves, strict=True):
        assert losses(curve) == pytest.approx(losses(other), rel=1e-6, abs=1e-9 * whole.norm)
    alone = measure_private([even], FORMATS, "bfloat16", sampled=True)[0]
    for curve, other in zip(alone.curves, together[0].curves, strict=True):
        assert losses(curve) == pytest.approx(losses(other), rel=1e-6, abs=1e-9 * alone.norm)


def test_where_there_is_nothing_to_spare_all_columns_are_measured() -> None:
    short = factors("one size", 3, d_in=2000, d_out=96)
    gradients = torch.randn(200, 96, generator=torch.Generator().manual_seed(5))
    metric = Metric(None, Whitener.from_moment(gradients.T @ gradients / 200))
    for given, by in ((short, FROBENIUS), (factors("one size", 3, d_out=96), metric)):
        whole, sampled = (
            measure_private([given], ["int8", NARROW, TRELLIS], "bfloat16", by, sampled=s)[0]
            for s in (False, True)
        )
        for curve, other in zip(whole.curves, sampled.curves, strict=True):
            assert losses(curve) == losses(other)


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_rows_whose_squares_float32_cannot_hold_are_measured_as_a_whole(size: float) -> None:
    a, b, scale = factors("one size", 3)
    given = [(a.float() * size, b.float(), scale)]
    whole, sampled = (
        measure_private(given, ["int8"], "float32", sampled=s)[0].curves[0] for s in (False, True)
    )
    assert losses(sampled) == losses(whole)


def test_rows_of_zeros_lose_nothing() -> None:
    a, b, scale = factors("one size", 4)
    b.zero_()
    found = measure_private([(a, b, scale)], FORMATS, "bfloat16", sampled=True)[0]
    assert all(loss == 0 for curve in found.curves for loss in losses(curve))


def test_what_a_format_holds_exactly_it_holds_in_a_sample() -> None:
    """Numbers of bfloat16 in an adapter of float32; and where only the sample's are such, it loses."""
    a, b, scale = factors("one size", 8)
    wide = a.float(), b.float(), scale
    own = measure_private([wide], ["bfloat16"], "float32", sampled=True)[0].curves[0].option(0)
    assert (own.original, own.loss) == (True, 0.0)
    generator = torch.Generator().manual_seed(8)
    signs = torch.randint(0, 2, (6, 4096), generator=generator) * 2.0 - 1
    sizes = torch.ones(4096)
    sizes[outside_the_sample(4096)] = torch.tensor([1.2, 0.748]).repeat(1536)
    a, b = signs * sizes, torch.randn(96, 6, generator=generator).bfloat16().float()
    assert private_curves._is_even(a[None])
    own = measure_private([(a, b, 1.0)], ["bfloat16"], "float32", sampled=True)[0].curves[0]
    assert own.option(0).loss > 0


def test_directions_that_lie_in_few_blocks_are_measured_as_a_whole() -> None:
    """The rows are even, and their differences are not."""
    generator = torch.Generator().manual_seed(9)
    common = torch.randn(4096, generator=generator)
    a = common.repeat(6, 1) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])[:, None]
    for number, block in enumerate(outside_the_sample(4096).view(-1, 64)[:6]):
        a[number, block] += 0.44 * 8 * torch.randn(64, generator=generator)
    assert private_curves._is_even(a[None])
    given = [(a, torch.randn(96, 6, generator=generator), 1.0)]
    whole, sampled = (
        measure_private(given, ["int8"], "float32", sampled=s)[0].curves[0] for s in (False, True)
    )
    assert losses(sampled) == losses(whole)


def test_int8_columns_of_longer_rows_have_their_scale() -> None:
    matrix = torch.randn(5, 900, generator=torch.Generator().manual_seed(6))
    matrix[:, 700] = 9.0
    whole = unpack(pack(matrix, "int8"))
    assert torch.equal(as_stored(matrix, "int8"), whole)
    amax = matrix.abs().amax(dim=1, keepdim=True)
    assert torch.equal(as_stored(matrix[:, :128], "int8", amax), whole[:, :128])


def test_a_promised_error_is_kept_with_long_rows(tmp_path: Path) -> None:
    """Where a few columns lose most, which a sample may not have."""
    adapters = {}
    for number in range(4):
        a, b, _ = factors("one size", number, d_out=96)
        a[:, 700 * number : 700 * number + 3] *= 20
        config = {"peft_type": "LORA", "r": 6, "lora_alpha": 6, "target_modules": ["q_proj"]}
        write_adapter(tmp_path / f"a{number}", config, {"model.layers.0.q_proj": (a, b)})
        adapters[f"t{number}"] = open_adapter(tmp_path / f"a{number}")
    for error in (0.1, 0.15, 0.2, 0.3):
        options = CompressOptions(max_error=error)
        report = compress(adapters, tmp_path / f"c{error}", options)
        assert report.worst_error <= error
