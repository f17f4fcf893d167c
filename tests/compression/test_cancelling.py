"""Adapters B A = [B', -B] [A'; A], as PEFT writes of a conversion to LoRA: two large terms, one small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import check, dense, run

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter
from vllm_vlora.compression.encoding import encode_alike
from vllm_vlora.fitting.whitening import FROBENIUS, Metric, Whitener
from vllm_vlora.planning.private_curves import PrivateOption, measure_private
from vllm_vlora.representations.decode import decode, relative_error, relative_errors
from vllm_vlora.representations.factors import changes_nothing, squared_norm, stacked_svd
from vllm_vlora.representations.private import encode_private

D_OUT, D_IN, RANK = 96, 128, 8


def cancelling(change: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with a change of this share in each of the terms."""
    generator = torch.Generator().manual_seed(seed)
    b, db = (3 * torch.randn(D_OUT, RANK, generator=generator) for _ in range(2))
    a, da = (3 * torch.randn(RANK, D_IN, generator=generator) for _ in range(2))
    return torch.cat([a + change * da, a]), torch.cat([b + change * db, -b], dim=1)


def adapter(folder: Path, **modules: tuple[torch.Tensor, torch.Tensor]) -> Adapter:
    rank = len(next(iter(modules.values()))[0])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules)}
    write_adapter(folder, config, {f"l.{name}": found for name, found in modules.items()})
    return open_adapter(folder)


@pytest.mark.parametrize("change", [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("options", [{}, {"max_error": 1e-3}, {"max_error": 0.1}], ids=str)
def test_the_stated_error_is_the_true_one(
    tmp_path: Path, change: float, options: dict[str, Any]
) -> None:
    adapters = {f"t{n}": adapter(tmp_path / f"t{n}", q=cancelling(change, n)) for n in range(3)}
    report = run(adapters, tmp_path / "out", **options)
    check(tmp_path / "out", adapters, report)
    assert report.worst_error <= options.get("max_error", 1.0)


@pytest.mark.parametrize("metric", [FROBENIUS, Metric(Whitener.from_moment(torch.eye(D_IN)), None)])
def test_no_loss_is_planned_only_for_what_a_format_holds(metric: Metric) -> None:
    for change in (1e-3, 1e-6):
        a, b = cancelling(change)
        [own] = measure_private([(a, b, 1.0)], ["int8"], "float32", metric)[0].curves
        assert own.option(0).original
        assert own.option(0).loss > 0
    wide = a.bfloat16().float(), b.bfloat16().float(), 1.0
    [held] = measure_private([wide], ["bfloat16"], "float32", metric)[0].curves
    assert (held.option(0).original, held.option(0).loss) == (True, 0.0)


@pytest.mark.parametrize("change", [1e-3, 1e-5, 1e-6, 3e-7])
@pytest.mark.parametrize("format", ["int8", "bfloat16"])
def test_measured_errors_are_those_of_dense_matrices(change: float, format: str) -> None:
    a, b = cancelling(change)
    stored = encode_private(a, b, 0.5, format)
    new_a, new_b = decode(stored, None)
    whole = 0.5 * b.double() @ a.double()
    lost = float((new_b.double() @ new_a.double() - whole).square().sum())
    wanted = lost, float(whole.square().sum())
    scale = torch.tensor([0.5], dtype=torch.float64)
    assert relative_error(a, b, 0.5, stored, None) == pytest.approx(wanted, rel=1e-5)
    [together] = relative_errors(a[None], b.T[None], scale, [stored])
    assert together == pytest.approx(wanted, rel=1e-5)
    assert squared_norm(a, b, 0.5) == pytest.approx(wanted[1], rel=1e-5)
    assert float(stacked_svd(a[None], b.T[None], scale)[2]) == pytest.approx(wanted[1], rel=1e-5)


def test_terms_of_any_magnitude_that_do_not_cancel_are_no_rounding() -> None:
    """The first row of A is large, and B does not use it."""
    a = torch.tensor([[1e12, 0.0], [0.0, 1.0]])
    b = torch.tensor([[0.0, 1.0]])
    assert squared_norm(a, b, 2.0) == 4.0
    assert not changes_nothing(a, b, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_error": 0.1},
        {"ratio": 4.0},
        {"representation": "joint", "num_components": 24, "quantize": "none"},
        {"representation": "private", "quantize": "nf4"},
        {"representation": "private", "ratio": 8.0, "codes": "trellis"},
    ],
    ids=str,
)
@pytest.mark.parametrize("change", [0.0, 3e-8])
def test_what_cancels_altogether_is_an_update_of_zero(
    tmp_path: Path, options: dict[str, Any], change: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    adapters = {
        f"t{n}": adapter(
            tmp_path / f"t{n}",
            q=(
                torch.randn(RANK, D_IN, generator=generator),
                torch.randn(D_OUT, RANK, generator=generator),
            ),
        )
        for n in range(4)
    }
    a, b = cancelling(change)
    others = run(adapters, tmp_path / "without", **options)
    none = {"none": adapter(tmp_path / "none", q=(a, b))}
    report = run(adapters | none, tmp_path / "with", **options)
    errors = {task.task_id: task.error for task in report.tasks}
    assert errors.pop("none") == pytest.approx(0.0, abs=1e-9)
    assert max(errors.values()) <= max(others.worst_error * 1.5, options.get("max_error", 0.0))
    assert dense(none["none"], "l.q").norm() < 1e-3


def test_updates_of_zero_beside_others_are_encoded_as_such() -> None:
    a, b = cancelling(0.0)
    option = PrivateOption("nf4-dq", 16, True, 0, 1.0)
    noise = b + 2e-7 * torch.randn(b.shape, generator=torch.Generator().manual_seed(2))
    for stored, loss in encode_alike([(a, b, 1.0), (a, noise, 1.0)], [option] * 2, FROBENIUS):
        assert (stored.error, loss.lost) == (0.0, 0.0)
        new_a, new_b = decode(stored, None)
        assert float((stored.scale * new_b @ new_a).norm()) == 0.0
