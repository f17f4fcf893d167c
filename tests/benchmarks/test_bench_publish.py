"""What the publish benchmark refuses, without an engine."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import publish
import run
from harness import WrongResultError
from serving.correctness import BFLOAT16_TIE, Answer

FOLDER = Answer([1, 2, 7], [{1: -0.2, 2: -2.0}, {2: -0.70, 3: -0.72}, {7: -0.1}])
# Parts where stock's folder hardly prefers one token to the other.
NEAR = Answer([1, 3, 9], [{1: -0.21, 2: -2.0}, {3: -0.70, 2: -0.71}, {9: -0.1}])
FAR = Answer([2, 3, 9], [{2: -0.1, 1: -2.5}, {3: -0.70, 2: -0.71}, {9: -0.1}])
# The same tokens, of weights that are much less sure of them.
UNSURE = Answer([1, 2, 7], [{1: -0.9, 2: -2.0}, {2: -0.70, 3: -0.72}, {7: -0.1}])


def test_near_ties_pass_on_a_gpu_alone() -> None:
    publish.compare(Namespace(gpu=True), NEAR, FOLDER)
    with pytest.raises(WrongResultError, match="from memory: token 1 is 3"):
        publish.compare(Namespace(gpu=False), NEAR, FOLDER)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("found", [FAR, UNSURE])
def test_another_answer_is_refused(found: Answer, gpu: bool) -> None:
    with pytest.raises(WrongResultError, match="the task from memory"):
        publish.compare(Namespace(gpu=gpu), found, FOLDER)


def test_each_place_is_kept_when_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, kept = tmp_path / "publish.json", []

    def in_another_process(function: Any, *_: Any) -> Any:
        if function is publish.probe_device:
            return {"type": "cpu", "name": "a CPU"}
        kept.append(list(json.loads(path.read_text())["samples"]) if path.exists() else [])
        return {"copy": {"wall": [0.5], "cpu": [0.5]}}

    monkeypatch.setattr(publish, "in_another_process", in_another_process)
    run.main(["publish", "--quick", "--json", str(path)])
    # The first made the model.
    assert kept == [[], [], ["in process"]]
    assert list(json.loads(path.read_text())["samples"]) == ["in process", "own process"]


@torch.no_grad()
def test_the_model_tells_a_task_from_none_by_more_than_a_near_tie(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    publish._make_model(tmp_path, layers=2)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    prompt = torch.arange(1, 41)[None]

    def logarithms() -> torch.Tensor:
        return model(prompt).logits[0].double().log_softmax(-1)

    sizes = publish.WIDTH, publish.INNER, publish.KEYS, publish.RANK
    factors = publish.factors(2, *sizes, seed=1)
    base = logarithms()
    for name, weight in model.named_parameters():
        left, right = (
            factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight")
            for side in "BA"
        )
        if left is not None and right is not None:
            weight += (left.float() @ right.float()).bfloat16()
    tokens = logarithms().argmax(-1)[:, None]
    task, rounded = logarithms().gather(1, tokens), model.float()(prompt).logits[0]
    # Every answer of eight tokens has one that the base model finds unlikely; rounding changes less.
    apart = (base.gather(1, tokens) - task).abs().flatten()
    assert all(part.max() > BFLOAT16_TIE for part in apart.split(8))
    rounded = rounded.double().log_softmax(-1).gather(1, tokens)
    assert (rounded - task).abs().max() < BFLOAT16_TIE / 2
