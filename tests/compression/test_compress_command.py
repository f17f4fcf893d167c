"""compress with a model beside it: calibration from text, and sizes found by quality."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import write_tiny_llama
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.quality import compress_judged
from vllm_vlora.errors import OptionError
from vllm_vlora.evaluation.evaluator import EvaluationOptions, Evaluator
from vllm_vlora.evaluation.judge import SelfJudge, _is_clear, _spread
from vllm_vlora.fitting.calibration import Calibration
from vllm_vlora.snapshots import local_model
from vllm_vlora.tools.cli import app

TEXTS = {"count": "one two three four five", "greet": "hello, how do you do?"}
runner = CliRunner()


def invoke(*args: Any, code: int = 0) -> Any:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def train(model: Path, folder: Path, text: str, seed: int) -> None:
    """An adapter that knows one sentence by heart."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(text)["input_ids"]])
    optimizer = torch.optim.Adam(adapted.parameters(), lr=2e-2)
    for _ in range(60):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, adapters/TASK, data/TASK.jsonl and text.jsonl."""
    root = tmp_path_factory.mktemp("world")
    model = write_tiny_llama(root / "model")
    (root / "data").mkdir()
    for seed, (task, text) in enumerate(TEXTS.items()):
        train(model, root / "adapters" / task, text, seed)
        line = json.dumps({"text": text}) + "\n"
        (root / "data" / f"{task}.jsonl").write_text(line * 3)
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in TEXTS.values())
    )
    return root


def test_a_calibration_is_gathered_from_text_kept_and_taken_again(
    world: Path, tmp_path: Path
) -> None:
    command = ("compress", world / "adapters", "--ratio", 2, "--base", world / "model")
    command += ("--calibration", world / "text.jsonl", "--no-judge", "--json", "--force")
    command += ("-o", tmp_path / "ckpt")
    first = json.loads(invoke(*command).stdout)
    folder = world / "text.jsonl.calibration"
    assert Calibration.open(folder).source.base_model == str(world / "model")
    assert set(first["seen_errors"]) == set(TEXTS)
    assert first["chosen_by"] == "the error that the calibrated model sees"
    plain = [word for word in command if word != "--json"]
    said = invoke(*plain).stdout
    assert "as the calibrated model sees it" in " ".join(said.split())
    rows = [[cell.strip() for cell in re.split("[│┃]", line)] for line in said.splitlines()]
    header = next(row for row in rows if "Task" in row)
    for task, seen in first["seen_errors"].items():
        shown = next(row for row in rows if row[1:2] == [task])
        assert shown[header.index("Seen")] == f"{seen:.4f}"
    assert "`info` knows only the error of the weights" in said
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = json.loads(invoke(*command).stdout)
    assert again["seen_errors"] == first["seen_errors"]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    with (world / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "something else"}) + "\n")
    invoke(*command)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} != written


def test_every_task_keeps_what_was_asked_for(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    command = ("compress", world / "adapters", "-o", out, "--min-kept", 0.9)
    command += ("--base", world / "model", "--data", world / "data", "--json")
    data = json.loads(invoke(*command).stdout)
    assert data["kl_kept"].keys() == TEXTS.keys()
    assert min(data["kl_kept"].values()) >= 0.9
    # Judged again, by itself.
    evaluator = Evaluator(
        world / "model",
        {task: [world / "data" / f"{task}.jsonl"] for task in TEXTS},
        EvaluationOptions(greedy_tokens=0),
    )
    for task in TEXTS:
        invoke("export", out, task, "-o", tmp_path / task)
        compared = evaluator.compare(
            task, tmp_path / task, open_adapter(world / "adapters" / task).path
        )
        assert compared.kl_kept.value == pytest.approx(data["kl_kept"][task], abs=0.02)
    card = (out / "README.md").read_text()
    assert f"worst {min(data['kl_kept'].values()):.4f}" in card
    assert data["bytes"] < 0.6 * data["original_bytes"]


def test_the_model_judges_the_representations(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    command = ("compress", world / "adapters", "-o", out, "--ratio", 1.5)
    command += ("--base", world / "model", "--data", world / "data")
    data = json.loads(invoke(*command, "--json").stdout)
    judged = {c["representation"]: c["kl_kept"] for c in data["candidates"]}
    assert {"private", "joint"} <= judged.keys()
    assert data["original_bytes"] / data["bytes"] >= 1.5
    mean = sum(data["kl_kept"].values()) / len(data["kl_kept"])
    assert mean == max(judged.values())
    assert "KL kept" in invoke(*command, "--force").stdout


# --- the model as its own judge -------------------------------------------------------------------


def by_hand(world: Path, folder: Path | None) -> Any:
    """The model with scale * B A of a PEFT folder added to its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model")
    if folder is not None:
        adapter = open_adapter(folder)
        for name, (a, b) in adapter.iter_factors():
            weight = model.get_submodule(name).weight
            weight.data += adapter.modules[name].scale * b.float() @ a.float()
    return model.eval()


@torch.no_grad()
def log_p(model: Any, ids: list[int]) -> torch.Tensor:
    """Of every token after the first: (tokens, vocabulary)."""
    return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def errors_from(values: torch.Tensor, expected: torch.Tensor) -> float:
    """By how many standard errors the mean of values is from what is expected of it."""
    gap = values - expected
    return float(gap.mean() / (gap.std() / len(gap) ** 0.5))


def test_the_model_writes_at_temperature_one_with_the_adapter(world: Path, tmp_path: Path) -> None:
    """Of what an adapter writes, -log p is its entropy on average, and log p / p_base its KL."""
    evaluator = Evaluator(world / "model", {}, EvaluationOptions(greedy_tokens=0))
    # Larger, so that what it writes is far from what the base writes.
    greet = open_adapter(world / "adapters" / "greet")
    larger = ((name, (a, 4 * b)) for name, (a, b) in greet.iter_factors())
    folder = write_adapter(tmp_path / "greet", greet.config, larger)
    rows = evaluator.sample(folder, 1500, 24)
    assert sum(row.supervised for row in rows) >= 1400
    assert all(row.labels == row.input_ids for row in rows)
    adapted, base = by_hand(world, folder), by_hand(world, None)
    ours = [log_p(adapted, row.input_ids) for row in rows]
    theirs = torch.cat([log_p(base, row.input_ids) for row in rows])
    chosen = torch.tensor([token for row in rows for token in row.input_ids[1:]])[:, None]
    p = torch.cat(ours)
    written, other = (found.gather(1, chosen)[:, 0] for found in (p, theirs))
    assert abs(errors_from(-written, -(p.exp() * p).sum(1))) < 4
    divergence = (p.exp() * (p - theirs)).sum(1)
    assert abs(errors_from(written - other, divergence)) < 4
    assert errors_from(written - other, torch.zeros(())) > 3
    assert evaluator.sample(folder, 100, 24) == evaluator.sample(folder, 100, 24)


def test_distances_of_several_forms_are_those_by_hand(world: Path) -> None:
    evaluator = Evaluator(world / "model", {}, EvaluationOptions(greedy_tokens=0))
    count, greet = world / "adapters" / "count", world / "adapters" / "greet"
    rows = evaluator.sample(greet, 60, 16)
    found = evaluator.distances(rows, greet, [count, greet])
    models = [by_hand(world, folder) for folder in (greet, None, count)]
    for number, row in enumerate(rows):
        theirs, base, ours = (log_p(model, row.input_ids) for model in models)
        for measured, other in ((found[0].base, base), (found[0].compressed, ours)):
            expected = float((theirs.exp() * (theirs - other)).sum())
            assert float(measured[number]) == pytest.approx(expected, rel=1e-3)
    assert float(found[1].compressed.sum()) == pytest.approx(0, abs=1e-4)


def test_the_model_judges_the_representations_without_data(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    command = ("compress", world / "adapters", "-o", out, "--ratio", 1.5, "--json", "--force")
    data = json.loads(invoke(*command, "--judge").stdout)
    judged = {c["representation"]: c["kl_kept"] for c in data["candidates"]}
    assert {"private", "joint"} <= judged.keys()
    assert sum(data["kl_kept"].values()) / 2 == max(judged.values())
    said = "KL kept on 256 tokens that the model wrote with each of 2 of 2 adapters"
    assert data["chosen_by"] == said
    assert f"Chosen by {said}" in (out / "README.md").read_text()
    # What was judged is what was written.
    again = SelfJudge(opened(world), world / "model", True, lambda *_: None)
    assert again([out])[0] == pytest.approx(data["kl_kept"], abs=1e-6)
    # What little is kept is named, whatever the error of the weights had led to expect.
    hard = (
        "compress",
        world / "adapters",
        "-o",
        out,
        "--ratio",
        4.4,
        "--allow-large-error",
        "--force",
    )
    kept = json.loads(invoke(*hard, "--judge", "--json").stdout)["kl_kept"]
    low = sorted((value, task) for task, value in kept.items() if value < 0.95)
    assert low
    shown = " ".join(invoke(*hard, "--judge").output.split())
    assert f"lose more than 5%: {low[0][1]} ({low[0][0]:.4f})" in shown
    plain = json.loads(invoke(*command, "--no-judge").stdout)
    assert plain["chosen_by"] == "the error of the weights"
    assert "kl_kept" not in plain


def opened(world: Path) -> dict[str, Any]:
    return {task: open_adapter(world / "adapters" / task) for task in TEXTS}


def test_judging_that_would_take_longer_than_measuring_is_left_out(
    world: Path, tmp_path: Path
) -> None:
    jury = SelfJudge(opened(world), world / "model", False, lambda *_: None)
    assert "--judge asks it all the same" in str(jury.declines(4, 1e-9))
    assert jury.declines(4, 3600.0) is None
    assert SelfJudge(opened(world), world / "model", True, print).declines(4, 1e-9) is None


def test_a_model_that_cannot_be_asked_is_said_and_the_error_chooses(
    world: Path, tmp_path: Path
) -> None:
    model = write_tiny_llama(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    jury = SelfJudge(opened(world), model, False, lambda *_: None)
    report = compress_judged(opened(world), tmp_path / "ckpt", jury, CompressOptions(ratio=1.5))
    assert "the error of the weights; the base model cannot be asked" in report.chosen_by
    assert report.kl_kept == {}
    with pytest.raises(OptionError):
        SelfJudge(opened(world), model, True, lambda *_: None)([tmp_path / "ckpt"])


def test_a_model_that_is_not_here_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert local_model("org/never-here") is None
    assert local_model("/no/such/folder") is None
    (tmp_path / "config.json").write_text("{}")
    assert local_model(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert local_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("ahead", "clear"),
    [([0.1, 0.11, 0.09, 0.1], True), ([0.1, -0.02, 0.05, 0.2], False), ([0.1, 0.1, 0.1], False)],
)
def test_judging_ends_where_one_form_is_ahead_in_every_task(
    ahead: list[float], clear: bool
) -> None:
    tasks = [f"t{number}" for number in range(len(ahead))]
    first = dict(zip(tasks, (0.9 + 0.01 * number for number in range(len(ahead)))))
    second = {task: first[task] - gap for task, gap in zip(tasks, ahead)}
    assert _is_clear([first, second]) == clear
    assert _is_clear([second, first]) == clear
    third = {
        task: value + 0.001 * (-1) ** place for place, (task, value) in enumerate(first.items())
    }
    assert not _is_clear([first, second, third])
    unknown = [kept | {"t0": None} for kept in (first, second)]
    assert not _is_clear(unknown)


def test_the_first_tasks_that_are_judged_stand_far_apart() -> None:
    tasks = [f"t{number:02}" for number in range(16)]
    order = _spread(tasks)
    assert sorted(order) == tasks
    assert sorted(order[:4]) == ["t00", "t04", "t08", "t12"]
    assert _spread(["only"]) == ["only"]


def test_what_does_not_go_together_is_one_line(world: Path, tmp_path: Path) -> None:
    command = ("compress", world / "adapters", "-o", tmp_path / "x")
    assert "--base" in invoke(*command, "--base", "m", code=2).stderr
    assert "--base is for" in invoke(*command, "--base", "m", "--no-judge", code=2).stderr
    assert "--data, or it" in invoke(*command, "--judge", "--data", world / "data", code=2).stderr
    alone = (*command, "--judge", "--representation", "joint")
    assert "leave out --representation" in invoke(*alone, code=2).stderr
    partly = (*command, "--min-kept", 0.9, "--data", f"count={world / 'data' / 'count.jsonl'}")
    assert "'greet' has none" in invoke(*partly, "--base", world / "model", code=2).stderr
    both = (*command, "--min-kept", 0.9, "--ratio", 3, "--data", world / "data")
    assert "leave out" in invoke(*both, "--base", world / "model", code=2).stderr
    assert not (tmp_path / "x").exists()
