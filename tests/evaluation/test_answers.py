"""Questions, scores and reports of ``evaluate --metric``; the engine is in ``tests/engine``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import make_byte_tokenizer

from vllm_vlora.errors import DataError, OptionError
from vllm_vlora.evaluation.answers import (
    AnswersReport,
    judge_losses,
    judge_texts,
    read_questions,
    scorer,
)
from vllm_vlora.evaluation.texts import IGNORED


def write(folder: Path, *lines: Any) -> list[Path]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [path]


def test_a_question_is_what_stands_before_the_answer(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    files = write(
        tmp_path,
        {"prompt": "2 + 2 = ", "completion": "4", "references": ["four"]},
        {"messages": [{"role": role, "content": text} for role, text in chat]},
        {"prompt": "long " * 50, "completion": "x"},
    )
    (plain, turns), left_out = read_questions(files, tokenizer, "exact-match", 100)
    assert left_out == 1
    assert tokenizer.decode(plain.given, skip_special_tokens=True) == "2 + 2 = "
    assert plain.right == ("4", "four")
    said = tokenizer.decode(turns.given, skip_special_tokens=True)
    assert said == "<user>a<assistant>b<user>c<assistant>"
    assert turns.right == ("d",)
    [first], _ = read_questions(files, tokenizer, "loss", 100, most=1)
    scored = [t for t, label in zip(first.row.input_ids, first.row.labels) if label != IGNORED]
    assert tokenizer.decode(scored, skip_special_tokens=True) == "4"
    for most in (0, -1):
        with pytest.raises(OptionError, match=f"max_examples must be at least 1, got {most}"):
            read_questions(files, tokenizer, "loss", 100, most=most)
    with pytest.raises(DataError, match="at most 3 tokens"):
        read_questions(files, tokenizer, "exact-match", 3)
    with pytest.raises(DataError, match=r"jsonl:1: a plain text has no right answer"):
        read_questions(write(tmp_path, {"text": "only"}), tokenizer, "rouge-l", 100)
    bad = {"prompt": "a", "completion": "b", "references": "c"}
    with pytest.raises(DataError, match="references is not a list"):
        read_questions(write(tmp_path, bad), tokenizer, "rouge-l", 100)


def test_answers_are_scored_by_the_nearest_right_one() -> None:
    rouge, exact = scorer("rouge-l"), scorer("exact-match")
    # LCS "the cat sat" of 3 words: precision 3/5, recall 1; then 4/5 and 4/4.
    assert rouge("the cats sat down there", ["the cat sat"]) == pytest.approx(0.75)
    both = ["the cat sat", "the cat sat there"]
    assert rouge("the cats sat down there", both) == pytest.approx(8 / 9)
    assert rouge("nothing alike", both) == 0.0
    assert exact(" the  cat\nsat ", both) == 1.0
    assert exact("The cat sat", both) == 0.0
    with pytest.raises(
        OptionError, match="metric 'bleu' is unknown; give rouge-l, exact-match, loss"
    ):
        scorer("bleu")


def test_a_task_is_judged_relative_to_its_adapter(tmp_path: Path) -> None:
    files = write(tmp_path, *({"prompt": f"{i}?", "completion": str(i)} for i in range(4)))
    questions, left_out = read_questions(files, make_byte_tokenizer(), "exact-match", 100)
    exact = scorer("exact-match")
    asked = "t", questions, left_out, exact
    found = judge_texts(*asked, ["", "1", "", ""], ["0", "1", "2", "x"], ["0", "1", "x", "x"])
    assert (found.base, found.adapter, found.compressed) == (0.25, 0.75, 0.5)
    assert found.relative == pytest.approx(2 / 3)
    assert found.agreement == 0.75
    alone = judge_texts(*asked, [""] * 4, None, ["0", "1", "2", "3"])
    assert (alone.adapter, alone.relative, alone.agreement) == (None, None, None)
    hopeless = judge_texts(*asked, [""] * 4, ["x"] * 4, ["0", "x", "x", "x"])
    assert (hopeless.relative, hopeless.agreement) == (None, 0.75)
    report = AnswersReport("exact-match", "ckpt", "base", 4.0, (found, alone, hopeless))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["mean"]["relative"] == pytest.approx(2 / 3)
    assert data["mean"]["compressed"] == pytest.approx((0.5 + 1.0 + 0.25) / 3)
    assert data["worst"] == {"task": "t", "relative": pytest.approx(2 / 3)}


def test_a_loss_is_of_the_right_answers_tokens_and_less_is_better(tmp_path: Path) -> None:
    files = write(tmp_path, {"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": ""})
    questions, _ = read_questions(files, make_byte_tokenizer(), "loss", 100)

    def at(value: float) -> list[list[float]]:
        return [
            [value if label != IGNORED else -99.0 for label in question.row.labels]
            for question in questions
        ]

    found = judge_losses("t", questions, 0, at(-3.0), at(-0.5), at(-1.0))
    assert (found.base, found.adapter, found.compressed) == (3.0, 0.5, 1.0)
    assert (found.relative, found.agreement) == (0.5, None)
