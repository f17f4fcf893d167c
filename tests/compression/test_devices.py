"""What compresses on a device: nothing is mixed with what is elsewhere, and the numbers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from other_device import other_device
from synthetic import SHAPES, calibration_of, family

from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.errors import OptionError
from vllm_vlora.planning import survey
from vllm_vlora.planning.executors import device_of


@pytest.mark.parametrize(
    ("calibrated", "options"),
    [
        (True, {"ratio": 4.2}),
        (False, {"ratio": 2.5, "representation": "joint", "quantize": "nf4"}),
        # Too few components for an exact fit of so many ranks.
        (True, {"num_components": 4, "quantize": "int8"}),
        (False, {"ratio": 2.0, "representation": "flat"}),
    ],
)
def test_a_device_gives_what_the_cpu_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: bool, options: dict[str, Any]
) -> None:
    adapters = family(tmp_path / "in", 6, related=True, shapes=dict([*SHAPES.items()][:1]))
    if calibrated:
        options = options | {"calibration": str(calibration_of(tmp_path / "calibration"))}
    chosen = CompressOptions(device="cpu", executor="serial", **options)
    expected = compress(adapters, tmp_path / "cpu", chosen)
    with other_device() as there:
        monkeypatch.setattr(survey, "device_of", {"auto": there.device}.__getitem__)
        chosen = CompressOptions(executor="serial", **options)
        report = compress(adapters, tmp_path / "there", chosen)
    assert there.operations > 500
    assert report.representation == expected.representation
    assert [task.nbytes for task in report.tasks] == [task.nbytes for task in expected.tasks]
    for task, other in zip(report.tasks, expected.tasks):
        assert task.error == pytest.approx(other.error, rel=1e-4)


def test_the_device_of_these_tests_refuses_what_a_gpu_refuses() -> None:
    with other_device() as mode:
        there = torch.arange(6.0).view(2, 3).to(mode.device)
        assert there.device == torch.zeros(2, device=mode.device).device == mode.device
        assert (there @ there.T).tolist() == [[5.0, 14.0], [14.0, 50.0]]
        assert there[torch.tensor([1])].cpu().tolist() == [[3.0, 4.0, 5.0]]
        there[0].mul_(2)
        assert (there * torch.tensor(2.0)).sum().item() == 36.0
        with pytest.raises(RuntimeError, match="one is on cpu"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="one is on cpu"):
            torch.ones(3).add_(there[0])


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match=r"^device cuda: torch finds no CUDA device here"):
        CompressOptions(device="cuda")
    with pytest.raises(OptionError, match=r"^unknown device 'gpu'; use one of auto, cpu, cuda$"):
        CompressOptions(device="gpu")


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert device_of("auto") == torch.device(kind)
        assert device_of("cpu") == torch.device("cpu")
