"""``--codes trellis``: as many bytes as with NF4, and less lost."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from synthetic import check, family, run

from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.compression.encoding import encode_kept, encode_searched
from vllm_vlora.fitting.whitening import FROBENIUS, Metric, Whitener
from vllm_vlora.planning.number_formats import TRELLIS
from vllm_vlora.planning.private_curves import measure_private
from vllm_vlora.quantize import trellis_row_nbytes
from vllm_vlora.representations.decode import relative_error

SHAPES = {"model.layers.0.q_proj": (512, 384), "model.layers.0.v_proj": (512, 128)}


@pytest.mark.parametrize("representation", ["auto", "private"])
def test_less_is_lost_at_the_same_ratio(tmp_path: Path, representation: str) -> None:
    adapters = family(tmp_path / "in", 4, related=False, shapes=SHAPES)
    errors = {}
    for codes in ("nf4", "trellis"):
        report = run(
            adapters, tmp_path / codes, ratio=6, codes=codes, representation=representation
        )
        # Errors are those of the numbers as they are stored, and sizes those of the files.
        checkpoint = check(tmp_path / codes, adapters, report)
        assert report.ratio >= 6
        assert validate(tmp_path / codes) == []
        assert (checkpoint.config.format_version == 5) == (codes == "trellis")
        errors[codes] = math.sqrt(sum(task.error**2 for task in report.tasks))
    assert errors["trellis"] < 0.9 * errors["nf4"]


def test_the_same_input_gives_the_same_bytes_whatever_is_worked_on_together(
    tmp_path: Path,
) -> None:
    adapters = family(tmp_path / "in", 3, related=False, shapes=SHAPES)
    options = {"ratio": 8, "codes": "trellis", "representation": "private"}
    stored = []
    for executor in ("serial", "processes"):
        run(adapters, tmp_path / executor, executor=executor, jobs=2, **options)
        files = sorted((tmp_path / executor / "tasks").iterdir())
        stored.append([file.read_bytes() for file in files])
    assert stored[0] == stored[1]


def test_what_is_planned_is_nearly_what_is_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 400, generator=generator) * torch.logspace(0, -1, 6)[:, None]
    b = torch.randn(300, 6, generator=generator)
    turned = torch.linalg.qr(torch.randn(400, 400, generator=generator))[0]
    inputs = torch.randn(900, 400, generator=generator) * torch.logspace(0, -1, 400) @ turned
    seen = Metric(Whitener.from_moment(inputs.T @ inputs / 900), None)
    widths: Counter[int] = Counter()
    for metric in (FROBENIUS, seen):
        (curve,) = measure_private([(a, b, 0.5)], [TRELLIS], "float32", metric)[0].curves
        for number in range(0, curve.count, 3):
            option = curve.option(number)
            assert option.is_searched
            _, loss = encode_kept(a, b, 0.5, option, metric)
            assert option.loss == pytest.approx(loss.seen_lost, rel=0.12)
            n4, n3, n2 = option.bits or (option.rank, 0, 0)
            by_width = ((4, n4), (3, n3), (2, n2))
            widths.update(dict(by_width))
            assert option.nbytes == sum(
                count * trellis_row_nbytes(d, width)
                for d in (400, 300)
                for width, count in by_width
            )
    assert min(widths.values()) > 0


def test_updates_of_several_shapes_are_stored_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = [
        (
            torch.randn(rank, d_in, generator=generator),
            torch.randn(d_out, rank, generator=generator),
            s,
        )
        for rank, d_in, d_out, s in ((4, 64, 100, 1.0), (3, 100, 64, 0.5), (4, 64, 100, -2.0))
    ]
    options = []
    for number, one in enumerate(factors):
        (curve,) = measure_private([one], [TRELLIS], "float32")[0].curves
        options.append(curve.option(curve.count // (number + 1) - 1))
    together = encode_searched(factors, options, FROBENIUS)
    for one, option, (stored, loss) in zip(factors, options, together):
        alone, own = encode_kept(*one, option, FROBENIUS)
        assert loss == own
        assert stored.bits == alone.bits
        for side, matrix in stored.matrices.items():
            assert all(
                torch.equal(p, alone.matrices[side].parts[n]) for n, p in matrix.parts.items()
            )
        lost, norm = relative_error(*one, stored, None)
        assert stored.error == pytest.approx(math.sqrt(lost / norm))


def test_an_update_of_zero_stays_zero(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 2, related=False, shapes=SHAPES)
    adapters |= {
        "zero": family(tmp_path / "z", 1, related=False, shapes=SHAPES, zero=True)["task0"]
    }
    report = run(adapters, tmp_path / "out", ratio=6, codes="trellis", representation="private")
    checkpoint = check(tmp_path / "out", adapters, report)
    assert checkpoint.entry("zero").no_update
