"""``router``: what it trains, attaches, says and refuses; and what edits say of a router."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from edited_world import World
from typer.testing import CliRunner

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.evaluation.prompts import read_prompts
from vllm_vlora.tools.cli import app

WORDS = (
    "select from where count orders",
    "bonjour je voudrais une pomme",
    "def class return yield",
)


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return World.at(tmp_path / "world").checkpoint


def write_prompts(folder: Path, tasks: list[str], kinds: tuple[str, ...] = WORDS) -> Path:
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for task, words in zip(tasks, kinds):
        rows = [
            {"prompt": " ".join(rng.choices(words.split(), k=6)), "completion": "the same"}
            for _ in range(60)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_it_trains_attaches_shows_and_removes(checkpoint: Path, tmp_path: Path) -> None:
    tasks = list(Checkpoint.open(checkpoint).tasks)
    data = write_prompts(tmp_path / "prompts", tasks[:2])
    others = write_prompts(tmp_path / "more", ["x"], WORDS[2:]) / "x.jsonl"
    found = json.loads(
        invoke(
            "router", "train", checkpoint, "--data", data, "--others", others, "--held-out", 0.25,
            "--json",
        ).stdout
    )  # fmt: skip
    assert found["attached"] is True
    assert found["accuracy"] == 1.0
    assert [row["task"] for row in found["tasks"]] == [*tasks[:2], ""]
    for row in found["tasks"]:
        count = len(
            set(read_prompts([others if not row["task"] else data / f"{row['task']}.jsonl"]))
        )
        assert row["held_out"] == row["right"] == round(count / 4)
        assert row["trained"] == count - row["held_out"]
        assert row["taken_for"] == {row["task"]: row["held_out"]}
    assert found["unknown_tasks"] == tasks[2:]
    router = Checkpoint.open(checkpoint).router
    assert router is not None
    assert (router.tasks, router.others) == (tasks[:2], True)
    shown = json.loads(invoke("router", "show", checkpoint, "--json").stdout)
    assert shown["tasks"] == tasks[:2]
    assert [row["right"] for row in shown["measured"]] == [r["right"] for r in found["tasks"]]
    info = json.loads(invoke("info", checkpoint, "--json").stdout)["router"]
    assert info == {key: value for key, value in shown.items() if key != "checkpoint"}
    assert "model=auto, 2 tasks, 1.0000 of held-out" in invoke("info", checkpoint).stdout
    assert "(of no task)" in invoke("router", "show", checkpoint).stdout
    invoke("validate", checkpoint)
    assert shown["hidden_by"] is found["hidden_by"] is None
    invoke("alias", checkpoint, "auto", tasks[0])
    assert json.loads(invoke("router", "show", checkpoint, "--json").stdout)["hidden_by"] == "alias"
    assert "the alias that is called auto" in invoke("info", checkpoint).stdout
    invoke("router", "remove", checkpoint)
    assert json.loads(invoke("info", checkpoint, "--json").stdout)["router"] is None
    assert "has no router" in invoke("router", "show", checkpoint, code=2).stderr
    assert "has no router" in invoke("router", "remove", checkpoint, code=2).stderr


def test_it_says_what_answers_a_prompt(checkpoint: Path, tmp_path: Path) -> None:
    tasks = list(Checkpoint.open(checkpoint).tasks)
    data = write_prompts(tmp_path / "data", tasks[:2])
    others = write_prompts(tmp_path / "others", ["chats"], WORDS[2:]) / "chats.jsonl"
    assert "has no router" in invoke("router", "ask", checkpoint, "any", code=2).stderr
    invoke("router", "train", checkpoint, "--data", data, "--others", others)

    texts = ("count orders where", "une pomme je voudrais", "class def yield", "")
    found = json.loads(invoke("router", "ask", checkpoint, *texts, "--json").stdout)
    assert [row["model"] for row in found["prompts"]] == [*tasks[:2], None, None]
    for row, label in zip(found["prompts"][:3], [*tasks[:2], ""]):
        likeliest = row["likeliest"]
        assert likeliest[0]["task"] == label
        assert sum(one["weight"] for one in likeliest) == pytest.approx(1)
        assert row["confidence"] == likeliest[0]["weight"] > 0.9
    shown = invoke("router", "ask", checkpoint, *texts).stdout
    assert "the base model" in shown
    assert "(of no task)" in shown

    both = " ".join(texts[:2])
    asked = ("router", "ask", checkpoint, "-", "--blend", 2, "--threshold", 0.9, "--json")
    result = CliRunner().invoke(app, [str(arg) for arg in asked], input=both.encode() + b"\xff")
    (row,) = json.loads(result.stdout)["prompts"]
    assert row["prompt"] == both + "\ufffd"
    assert sorted(term[:-4] for term in row["model"].split("+")) == sorted(tasks[:2])
    result = CliRunner().invoke(
        app, ["router", "ask", str(checkpoint), both, "--threshold", "1", "--json"]
    )
    assert json.loads(result.stdout)["prompts"][0]["model"] is None


def test_a_gate_attaches_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Tasks that are asked in the same words cannot be told apart."""
    tasks = list(Checkpoint.open(checkpoint).tasks)
    data = write_prompts(tmp_path / "prompts", tasks[:2], (WORDS[0], WORDS[0]))
    before = Checkpoint.open(checkpoint).content_digest
    result = invoke("router", "train", checkpoint, "--data", data, "--fail-under", 0.9, code=1)
    assert "less than 0.9: nothing was attached" in " ".join(result.stderr.split())
    assert f"{tasks[0]}: taken for {tasks[1]} (" in result.stdout
    assert Checkpoint.open(checkpoint).content_digest == before


def test_tasks_that_are_seldom_found_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """Of two tasks that are asked in the same words one at least is right less than half the time."""
    tasks = list(Checkpoint.open(checkpoint).tasks)
    data = write_prompts(tmp_path / "prompts", tasks[:3], (WORDS[0], WORDS[0], WORDS[1]))
    command = ("router", "train", checkpoint, "--data", data)
    found = json.loads(invoke(*command, "--json").stdout)
    low = [row["task"] for row in found["tasks"] if row["accuracy"] < 0.5]
    assert low
    assert tasks[2] not in low
    for said in (
        invoke(*command),
        invoke("router", "show", checkpoint),
        invoke("info", checkpoint),
    ):
        (line,) = [x for x in said.stdout.splitlines() if x.startswith("Right less than half")]
        assert all(task in line for task in low)
        assert tasks[2] not in line


def test_edits_say_what_a_router_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    tasks = list(Checkpoint.open(checkpoint).tasks)
    data = write_prompts(tmp_path / "prompts", tasks[:2])
    said = invoke("router", "train", checkpoint, "--data", data).stdout
    assert f"The router never picks {', '.join(tasks[2:])}" in said
    said = invoke("remove", checkpoint, tasks[0]).stdout
    assert f"The router knows {tasks[0]}, gone since" in said
    removed = json.loads(invoke("remove", checkpoint, tasks[2], "--json").stdout)
    assert removed["router"]["gone_tasks"] == [tasks[0]]
    assert removed["router"]["unknown_tasks"] == tasks[3:]
    original = checkpoint.parent.parent / "adapters" / tasks[2]
    added = json.loads(invoke("add", checkpoint, original, "--json").stdout)
    assert tasks[2] in added["router"]["unknown_tasks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out", "1"], "held_out must be"),
        (["--held-out", "0", "--fail-under", "0.5"], "needs held-out prompts"),
        (["--others", "nowhere.txt"], "nowhere.txt"),
        (["--hidden", "0"], "hidden must be"),
        (["--hidden", "1025"], "hidden must be"),
        (["--epochs", "0"], "at least 1"),
        (["--seed", "9" * 30], "seed must be"),
        (["--fail-under", "nan"], "fail-under"),
    ],
)
def test_refused_options(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    tasks = list(Checkpoint.open(checkpoint).tasks)
    data = write_prompts(tmp_path / "prompts", tasks[:2])
    assert (
        message in invoke("router", "train", checkpoint, "--data", data, *arguments, code=2).stderr
    )


def test_refused_data(checkpoint: Path, tmp_path: Path) -> None:
    tasks = list(Checkpoint.open(checkpoint).tasks)
    data = write_prompts(tmp_path / "prompts", tasks[:1])
    assert "got texts of 1" in invoke("router", "train", checkpoint, "--data", data, code=2).stderr
    one = tmp_path / "one.txt"
    one.write_text("only this")
    said = invoke(
        "router", "train", checkpoint, "--data", data, "--data", f"{tasks[1]}={one}", code=2
    ).stderr
    assert "1 different prompt;" in said
    said = invoke("router", "train", checkpoint, "--data", f"nobody={one}", code=2).stderr
    assert "no task 'nobody'" in said
    said = invoke("router", "train", "org/name", "--data", data, code=2).stderr
    assert "is no folder" in said


def test_prompts_of_every_form(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "one"), ("assistant", "a"), ("user", "two")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = [
        chat,
        {"prompt": "p", "completion": "c"},
        {"prompt": "", "completion": "c"},
        {"text": "t"},
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts([file]) == ["one\ntwo", "p", "c", "t"]


def test_a_label_may_be_an_alias_and_a_blend_is_told_how_to_be_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    first, second, *others = Checkpoint.open(checkpoint).tasks
    write_prompts(tmp_path / "prompts", ["prod", second])
    invoke("alias", checkpoint, "prod", first)
    done = invoke("router", "train", checkpoint, "--data", tmp_path / "prompts", "--json")
    found = json.loads(done.stdout)
    assert sorted(row["task"] for row in found["tasks"]) == sorted(["prod", second])
    # The task behind an alias is one that prompts go to.
    assert found["unknown_tasks"] == others
    shown = json.loads(invoke("router", "show", checkpoint, "--json").stdout)
    assert (shown["unknown_tasks"], shown["gone_tasks"]) == (others, [])
    invoke("alias", checkpoint, "prod", "--remove")
    shown = json.loads(invoke("router", "show", checkpoint, "--json").stdout)
    assert (shown["unknown_tasks"], shown["gone_tasks"]) == ([first, *others], ["prod"])
    blend = f"{first}*0.5+{second}*0.5"
    before = Checkpoint.open(checkpoint).content_digest
    for label in (blend, "nobody"):
        data = f"{label}={tmp_path / 'prompts' / 'prod.jsonl'}"
        refused = invoke("router", "train", checkpoint, "--data", data, code=2)
        said = " ".join(refused.stderr.split())
        assert ("NAME --blend" in said) == (label == blend), said
    assert Checkpoint.open(checkpoint).content_digest == before
