"""``evaluate --metric`` through one engine: base, originals and tasks against PEFT's own answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_forks import ENGINE_ENVIRONMENT
from engine_world import World, exact
from typer.testing import CliRunner

from vllm_vlora.tools.cli import app

pytestmark = pytest.mark.engine

TASKS = ("attention", "everything")
PROMPTS = ["w7 w30 w12", "w100 w5 w5 w61", "w44"]
NEW_TOKENS = 6


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def peft(world: World) -> dict[str, Any]:
    """Of each task what PEFT answers to the prompts, and the loss of that by PEFT and by the base."""
    from peft import PeftModel
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    base = LlamaForCausalLM.from_pretrained(world.model).eval()
    found: dict[str, Any] = {}
    for task in TASKS:
        model = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(world.model), world.adapters[task]
        ).eval()
        answers, losses = [], {"adapter": [], "base": []}
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                out = model.generate(
                    ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
                )
                answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
                end = tokenizer(answers[-1] + tokenizer.eos_token, add_special_tokens=False)
                row = torch.tensor([[*ids[0].tolist(), *end["input_ids"]]])
                for name, one in (("adapter", model), ("base", base)):
                    scores = one(row).logits[0].log_softmax(-1)
                    losses[name] += [
                        -float(scores[place - 1, row[0, place]])
                        for place in range(ids.shape[1], row.shape[1])
                    ]
        mean = {name: sum(values) / len(values) for name, values in losses.items()}
        found[task] = {"answers": answers, **mean}
    return found


@pytest.fixture(scope="module")
def data(peft: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout")
    for task, found in peft.items():
        lines = [
            {"prompt": prompt, "completion": answer}
            for prompt, answer in zip(PROMPTS, found["answers"], strict=True)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluate(world: World, checkpoint: Path, data: Path, metric: str, *more: str) -> Any:
    arguments = ["evaluate", str(checkpoint), "--base", str(world.model), "--data", str(data)]
    for task in TASKS:
        arguments += ["--adapter", f"{task}={world.adapters[task]}"]
    arguments += ["--metric", metric, "--max-length", "64", "--dtype", "float32", *more]
    return CliRunner().invoke(app, arguments)


def test_an_exact_checkpoint_answers_as_its_adapters(
    world: World, peft: dict[str, Any], data: Path
) -> None:
    length = ("--max-new-tokens", str(NEW_TOKENS))
    done = evaluate(world, exact(world, "private"), data, "rouge-l", *length, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert sorted(found["not_evaluated"]) == sorted(set(world.adapters) - set(TASKS))
    for task in found["tasks"]:
        # The right answers are what PEFT says; the base model says something else.
        assert (task["examples"], task["adapter"], task["compressed"]) == (3, 1.0, 1.0)
        assert (task["relative"], task["agreement"]) == (1.0, 1.0)
        assert task["base"] < 0.7


def test_losses_are_those_of_peft_and_what_is_lost_shows(
    world: World, peft: dict[str, Any], data: Path
) -> None:
    tasks = {task: world.adapters[task] for task in TASKS}
    cut = world.compress("cut", tasks, representation="private", ratio=6.0)
    done = evaluate(world, cut, data, "loss", "--json", "--fail-under", "0.999")
    # What lost more than a tenth of a percent fails the gate.
    assert done.exit_code == 1, done.output
    found = {task["task"]: task for task in json.loads(done.stdout)["tasks"]}
    for name, task in found.items():
        assert task["adapter"] == pytest.approx(peft[name]["adapter"], abs=2e-3)
        assert task["base"] == pytest.approx(peft[name]["base"], abs=2e-3)
        assert task["relative"] == pytest.approx(task["adapter"] / task["compressed"])
        assert abs(task["compressed"] - task["adapter"]) > 1e-3
