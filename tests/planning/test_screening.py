"""Bases are fitted to all modules where sharing pays in some, and the plan is that of trying them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from synthetic import check, family, run

from vllm_vlora.adapters.collection import Collection, Module
from vllm_vlora.checkpoint.report import CompressReport
from vllm_vlora.planning import survey
from vllm_vlora.planning.screening import sample

# Enough modules for a sample; two kinds.
SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(8)
    for name, shape in {"q_proj": (96, 80), "v_proj": (64, 40)}.items()
}


def compressed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, related: bool, ratio: float
) -> tuple[CompressReport, int]:
    """The report, and to how many modules bases were fitted over all tasks."""
    adapters = family(folder / "in", 5, related=related, shapes=SHAPES)
    fitted: set[str] = set()
    group = survey.Surveyor._group

    def counted(self: survey.Surveyor, module: Module, tasks: Sequence[int], *rest: object):  # type: ignore[no-untyped-def]
        fitted.update([module.name] if len(tasks) == 5 else [])
        return group(self, module, tasks, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(survey.Surveyor, "_group", counted)
    report = run(adapters, folder / "out", ratio=ratio, executor="serial")
    check(folder / "out", adapters, report)
    return report, len(fitted)


def test_the_sample_is_of_every_kind(tmp_path: Path) -> None:
    modules = list(Collection(family(tmp_path, 2, related=False, shapes=SHAPES)).modules.values())
    chosen = [module.name for module in sample(modules)]
    assert sorted(chosen) == [
        f"model.layers.{layer}.{name}" for layer in (0, 4, 7) for name in ("q_proj", "v_proj")
    ]
    assert sample(modules[:8]) == modules[:8]


@pytest.mark.parametrize("ratio", [4.0, 8.0])
@pytest.mark.parametrize("related", [True, False])
def test_the_plan_is_that_of_trying_every_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, related: bool, ratio: float
) -> None:
    report, fitted = compressed(tmp_path / "sampled", monkeypatch, related, ratio)
    assert fitted == (16 if related else 6)
    monkeypatch.setattr("vllm_vlora.compression.candidates.sample", list)
    whole, fitted = compressed(tmp_path / "all", monkeypatch, related, ratio)
    assert fitted == 16
    assert (report.representation, report.nbytes) == (whole.representation, whole.nbytes)
    assert report.mean_error == pytest.approx(whole.mean_error, rel=1e-6)
    assert related or report.representation == "private"
