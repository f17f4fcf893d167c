"""Adapters that name one layer differently, in one checkpoint and one real engine, next to PEFT.

A checkpoint that ``compress`` makes has one module for such a layer. One that is put together of two that
were made apart has two, each with a basis, as all had before names were put together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from engine_forks import run
from renamed_world import TASKS, World, backbone_world, combine, exact, generation_world

from vllm_vlora.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.engine

SCRIPT = """
import json, os, sys
from vllm import LLM, SamplingParams
from vllm_vlora import lora_request

def main():
    job = json.loads(sys.argv[1])
    options = {"runner": "pooling", "convert": "embed"} if job["pooling"] else {"max_logprobs": 256}
    llm = LLM(job["model"], enable_lora=True, max_loras=8, max_lora_rank=16, dtype="float32",
              enforce_eager=True, max_model_len=128, max_num_seqs=8, **options)
    prompt = {"prompt_token_ids": job["prompt"]}
    requests = [lora_request(checkpoint, task) for checkpoint, task in job["requests"]]
    prompts = [prompt] * len(requests)
    if job["pooling"]:
        answers = [o.outputs.embedding for o in llm.embed(prompts, lora_request=requests)]
    else:
        sampling = SamplingParams(max_tokens=1, logprobs=256)
        answers = []
        for output in llm.generate(prompts, sampling, lora_request=requests):
            (found,) = output.outputs[0].logprobs
            answers.append([found[token].logprob for token in range(256)])
    print("RESULT " + json.dumps(answers), flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module", params=[generation_world, backbone_world])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    world: World = request.param(tmp_path_factory.mktemp("renamed"))
    answers = list(world.reference.values())
    differences = [float((a - b).abs().max()) for a in answers for b in answers if a is not b]
    assert min(differences) > 0.05, "a task that answers as another one shows nothing"
    return world


def _serve(
    world: World, start: Path, late: Path
) -> tuple[dict[tuple[str, str], torch.Tensor], str]:
    """What an engine that starts with one checkpoint answers for every task of both, and its log."""
    from renamed_world import PROMPT

    requests = [(str(path), task) for path in (start, late) for task in TASKS]
    job = {
        "model": str(world.model),
        "pooling": world.names.new == "layers.",
        "prompt": PROMPT,
        "requests": requests,
    }
    _, output = run(SCRIPT, json.dumps(job), VLLM_VLORA_CHECKPOINT=str(start))
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output[-20_000:]
    answers = json.loads(lines[-1].removeprefix("RESULT "))
    return {key: torch.tensor(answer) for key, answer in zip(requests, answers)}, output


def _checkpoints(world: World) -> tuple[Path, Path]:
    """Every task in one checkpoint: with one name for each layer, and with two."""
    one, two = world.root / "one name", world.root / "two names"
    if not two.exists():
        exact(world, *TASKS).rename(one)
        new, old = ([t for t in TASKS if t.startswith(age)] for age in ("new", "old"))
        combine(two, exact(world, *new), exact(world, *old))
    return one, two


def _check(world: World, answers: dict[tuple[str, str], torch.Tensor]) -> None:
    for key, answer in answers.items():
        error = float((answer - world.reference[key[1]]).abs().max())
        assert error < 2e-3, key


def test_tasks_of_two_names_share_a_basis_and_run_direct(world: World) -> None:
    one, two = _checkpoints(world)
    assert len({module.name[:6] for module in Checkpoint.open(one).modules}) == 1
    answers, log = _serve(world, one, two)
    assert "4 of 4 tasks direct" in log
    _check(world, answers)


def test_a_second_basis_for_a_layer_is_an_obstacle_that_the_log_names(world: World) -> None:
    one, two = _checkpoints(world)
    answers, log = _serve(world, two, one)
    found = re.search(r"3 of 4 tasks direct.*1 materialized \((.*)\)", log)
    assert found, log[-5000:]
    assert found[1].startswith("'old-joint': module ")
    assert all(f"{prefix}0." in found[1] for prefix in (world.names.new, world.names.old))
    _check(world, answers)
