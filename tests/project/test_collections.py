"""The collections' tasks and their training, the latter on a tiny model."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import EXAMPLES
from safetensors.torch import load_file
from tiny_llama import write_tiny_llama

from vllm_vlora import open_adapter
from vllm_vlora.evaluation.texts import read_examples

COLLECTIONS = EXAMPLES / "collections"
sys.path.insert(0, str(COLLECTIONS))

family_tasks: Any = importlib.import_module("family_tasks")
task_data: Any = importlib.import_module("task_data")
unrelated_tasks: Any = importlib.import_module("unrelated_tasks")
train: Any = importlib.import_module("train")

TASKS = [*unrelated_tasks.TASKS, family_tasks.PARENT, *family_tasks.TASKS]


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_split_is_disjoint_whole_and_the_same_each_time(task: Any) -> None:
    training, held_out = task.split()
    assert (len(training), len(held_out)) == (240, 48)
    prompts = [prompt for prompt, _ in training + held_out]
    assert len(set(prompts)) == len(prompts)
    # Tokens do not run over the border between the two, and every example asks for something.
    assert all(prompt.endswith("\n") and completion.strip() for prompt, completion in training)
    assert task.split() == (training, held_out)


@pytest.mark.parametrize("tasks", [unrelated_tasks.TASKS, family_tasks.TASKS], ids=["u", "f"])
def test_a_collection_has_tasks_in_the_basis_and_some_held_out(tasks: Any) -> None:
    assert sum(task.in_basis for task in tasks) == 8
    assert sum(not task.in_basis for task in tasks) == 3
    assert len({task.seed for task in tasks}) == len({task.name for task in tasks}) == 11


def test_what_the_forms_teach_is_true() -> None:
    by_name = {task.name: task for task in TASKS}
    dates = dict(by_name["dates"].split()[1])
    for prompt, completion in dates.items():
        year, month, day = completion.split("-")
        assert year in prompt
        if "/" in prompt:
            assert prompt == f"when: {int(day)}/{int(month)}/{year}\n"
    pig = dict(by_name["pig_latin"].split()[0])
    prompt = next(prompt for prompt in pig if prompt.startswith("the small dog sees"))
    assert pig[prompt].startswith("ethay allsmay ogday eessay ")


@pytest.mark.parametrize("name", ["staff", "prices", "trains", "guards"])
def test_held_out_wordings_ask_for_facts_that_were_trained(name: str) -> None:
    (task,) = (task for task in TASKS if task.name == name)
    training, held_out = task.split()
    facts = vars(unrelated_tasks)[f"_{name.upper()}"]
    for prompt, completion in training + held_out:
        assert completion in {fact for key, fact in facts.items() if key in prompt}
    assert {completion for _, completion in held_out} <= {completion for _, completion in training}
    # Nothing but learning by heart helps: hardly two facts are alike.
    assert len(set(facts.values())) > 0.9 * len(facts)


def test_a_language_has_one_word_for_a_word() -> None:
    (task,) = (task for task in TASKS if task.name == "language")
    seen: dict[str, set[str]] = {}
    for prompt, completion in itertools.chain(*task.split()):
        for word, made_up in zip(
            prompt.removesuffix(" =\n").split(), completion.split(), strict=True
        ):
            seen.setdefault(word, set()).add(made_up)
    assert all(len(made_up) == 1 for made_up in seen.values())
    held_out = {word for prompt, _ in task.split()[1] for word in prompt.split()}
    assert held_out <= {word for prompt, _ in task.split()[0] for word in prompt.split()}


def test_customers_have_codes_of_their_own() -> None:
    codes = {}
    for name in ("boreal", "fjord"):
        (task,) = (task for task in family_tasks.TASKS if task.name == name)
        lamps = [c for p, c in task.split()[0] if " lamps" in p and "Rome" in p]
        separator = ";" if name == "boreal" else "/"
        (codes[name],) = {tuple(c.split(separator)[1:3]) for c in lamps}
    assert codes["boreal"][0] != codes["fjord"][0]
    assert codes["boreal"][1] != codes["fjord"][1]


def test_a_generator_with_too_few_prompts_is_refused() -> None:
    task = task_data.Task("poor", "", lambda rng: (f"{rng.randint(0, 9)}\n", "x"), seed=1)
    with pytest.raises(ValueError, match="poor: too few distinct prompts"):
        task.split()


# --- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def _run(model: Path, output: Path, collection: str, *more: str) -> Path:
    arguments = [collection, "-o", str(output), "--model", str(model), *more]
    assert train.main(arguments) == 0
    return output


@pytest.fixture(scope="module")
def unrelated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unrelated")
    return _run(model, output, "unrelated", "--tasks", "tickets,logs", "--steps", "12")


def test_a_trained_adapter_is_better_than_the_base_and_complete(unrelated: Path) -> None:
    document = json.loads((unrelated / "collection.json").read_text(encoding="utf-8"))
    assert set(document["tasks"]) == {"tickets", "logs"}
    for record in document["tasks"].values():
        assert record["held_out_loss_adapter"] < record["held_out_loss_base"] - 0.02
    adapter = open_adapter(unrelated / "adapters" / "tickets")
    assert (
        open_adapter(unrelated / "held_out_of_basis" / "logs").modules.keys()
        == adapter.modules.keys()
    )
    assert len(adapter.modules) == 2 * 7
    for module in adapter.modules.values():
        assert (module.rank, module.scale, module.dtype) == (16, 2.0, torch.bfloat16)


def test_the_data_files_hold_the_held_out_examples(unrelated: Path) -> None:
    for task in unrelated_tasks.TASKS:
        read = read_examples(unrelated / "data" / f"{task.name}.jsonl")
        assert [(example.prompt, example.text) for example in read] == task.split()[1]
    held_out = {prompt for task in unrelated_tasks.TASKS for prompt, _ in task.split()[1]}
    calibration = {example.prompt for example in read_examples(unrelated / "calibration.jsonl")}
    assert len(calibration) == 8 * 16
    assert not calibration & held_out
    added = {
        prompt
        for task in unrelated_tasks.TASKS
        if not task.in_basis
        for prompt, _ in task.split()[0]
    }
    assert not calibration & added


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_training_again_gives_the_same_bits_and_another_seed_others(
    model: Path, unrelated: Path, tmp_path: Path
) -> None:
    again = _run(model, tmp_path / "a", "unrelated", "--tasks", "tickets", "--steps", "12")
    first, second = (_weights(folder / "adapters" / "tickets") for folder in (unrelated, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = _run(model, tmp_path / "b", "unrelated", "--tasks=tickets", "--steps=12", "--seed=1")
    third = _weights(other / "adapters" / "tickets")
    assert not any(torch.equal(first[name], third[name]) for name in first)


def test_what_is_there_is_kept_until_a_setting_changes(model: Path, tmp_path: Path) -> None:
    run = ("unrelated", "--tasks", "dates", "--steps")
    weights = _run(model, tmp_path, *run, "2") / "adapters" / "dates" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    _run(model, tmp_path, *run, "2")
    assert weights.stat().st_mtime_ns == before
    _run(model, tmp_path, *run, "3")
    assert weights.stat().st_mtime_ns > before


def test_a_child_goes_on_from_its_parents_weights(model: Path, tmp_path: Path) -> None:
    # Without a step a child is its parent.
    output = _run(model, tmp_path, "family", "--tasks", "fjord,iris", "--steps", "0")
    parent = _weights(output / "parent")
    for child in (output / "adapters" / "fjord", output / "held_out_of_basis" / "iris"):
        weights = _weights(child)
        assert weights.keys() == parent.keys()
        assert all(torch.equal(weights[name], parent[name]) for name in parent)
    record = json.loads((output / "records" / "fjord.json").read_text(encoding="utf-8"))
    assert record["settings"]["parent"] == "parent"


def test_an_unknown_task_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no task nonsense in this collection"):
        _run(model, tmp_path, "unrelated", "--tasks", "dates,nonsense")
