"""Reading data files, masking prompts, and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import CHATML, make_byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from vllm_vlora.errors import DataError
from vllm_vlora.evaluation.texts import (
    IGNORED,
    Example,
    Message,
    Row,
    data_digest,
    make_batches,
    padding_id,
    read_examples,
    tokenize,
    tokenize_windows,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_byte_tokenizer()


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8"
    )
    return path


def chat(*turns: tuple[str, str]) -> Example:
    return Example("here:1", messages=tuple(Message(role, text) for role, text in turns))


def test_the_three_forms_are_read_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        {"text": "plain", "source": "left alone"},
        "",
        {"prompt": "2+2=", "completion": "4"},
        {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "x", "content": "c"}]},
    )
    assert read_examples(path) == [
        Example(f"{path}:1", text="plain"),
        Example(f"{path}:3", prompt="2+2=", text="4"),
        Example(f"{path}:4", messages=(Message("user", "a\u2028b"), Message("x", "c"))),
    ]


def test_paragraphs_of_a_text_file_are_examples(tmp_path: Path) -> None:
    path = write(tmp_path / "d.txt", "", "one", "  more", " ", "", "two", "")
    assert read_examples(path) == [
        Example(f"{path}:2", text="one\n  more"),
        Example(f"{path}:6", text="two"),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "no known form (fields none)"),
        ({"texts": "a"}, "no known form (fields texts)"),
        ({"text": "a", "prompt": "b"}, "more than one form"),
        ({"text": 3}, "text is not text"),
        ({"prompt": "a"}, "completion is not text"),
        ({"completion": "a"}, "prompt is not text"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["hi"]}, "message 1: not an object"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1: content is not text"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "fine"}, line)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_hold_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no example"):
        read_examples(write(tmp_path / "empty.txt", "", " "))
    with pytest.raises(DataError, match=r"give .jsonl or .txt"):
        read_examples(write(tmp_path / "d.csv", "a,b"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        read_examples(tmp_path / "latin.txt")


def test_the_digest_is_of_contents_and_order(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.txt", "a"), write(tmp_path / "2.txt", "b")
    both = write(tmp_path / "3.txt", "a", "b")
    copy = write(tmp_path / "4.txt", "a")
    assert data_digest([one, two]) == data_digest([copy, two])
    assert len({data_digest(x) for x in ([one, two], [two, one], [both], [one])}) == 4


def test_a_plain_text_is_scored_whole(tokenizer: Any) -> None:
    row = tokenize(Example("x:1", text="hello"), tokenizer, 100)
    assert tokenizer.decode(row.input_ids) == "<s>hello"
    assert row.labels == row.input_ids
    assert row.supervised == 5


def test_a_completion_is_scored_with_its_end(tokenizer: Any) -> None:
    row = tokenize(Example("x:1", prompt="2+2=", text="4"), tokenizer, 100)
    assert tokenizer.decode(row.input_ids) == "<s>2+2=4<|im_end|>"
    scored = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(scored) == "4<|im_end|>"
    assert row.labels[-2:] == row.input_ids[-2:]


def test_every_turn_of_the_assistant_is_scored_and_nothing_else(tokenizer: Any) -> None:
    turns = (("system", "s"), ("user", "u"), ("assistant", "one"), ("user", "v"),
             ("assistant", "two"), ("user", "dropped"))  # fmt: skip
    row = tokenize(chat(*turns), tokenizer, 1000)
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns[:5]], tokenize=False
    )
    assert tokenizer.decode(row.input_ids) == whole.rstrip("\n")
    scored = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(scored) == "one<|im_end|>two<|im_end|>"
    assert all(i == t for i, t in zip(row.input_ids, row.labels) if t != IGNORED)


def test_a_chat_is_encoded_as_the_demo_trains_it(tokenizer: Any) -> None:
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Sky?"}], add_generation_prompt=True, tokenize=False
    )
    head_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    answer = tokenizer("Blue<|im_end|>", add_special_tokens=False)["input_ids"]
    row = tokenize(chat(("user", "Sky?"), ("assistant", "Blue")), tokenizer, 1000)
    assert row == Row(head_ids + answer, [IGNORED] * len(head_ids) + answer)


def test_rows_are_cut_at_the_end(tokenizer: Any) -> None:
    row = tokenize(Example("x:1", prompt="prompt", text="answer"), tokenizer, 4)
    assert tokenizer.decode(row.input_ids) == "<s>pro"
    assert row.labels == [IGNORED] * 4
    assert row.supervised == 0


def test_windows_lose_nothing_of_a_plain_text(tokenizer: Any) -> None:
    rows = tokenize_windows(Example("x:1", text="hello world"), tokenizer, 5)
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["<s>hell", "o wor", "ld"]
    assert all(row.labels == row.input_ids for row in rows)
    chat_row = chat(("user", "u"), ("assistant", "a"))
    assert tokenize_windows(chat_row, tokenizer, 5) == [tokenize(chat_row, tokenizer, 5)]


def test_chats_that_cannot_be_rendered(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="here:1: no turn of the assistant"):
        tokenize(chat(("user", "u")), tokenizer, 10)
    fine = chat(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))
    templates = {
        "here:1: the chat template cannot render it: roles": "{{ raise_exception('roles') }}",
        "here:1: the chat template rewrites": "{{ messages | length }}" + CHATML,
        "here:1: the chat template cannot render it: Cannot use chat": None,
    }
    for says, template in templates.items():
        tokenizer.chat_template = template
        try:
            with pytest.raises(DataError, match=says):
                tokenize(fine, tokenizer, 10)
        finally:
            tokenizer.chat_template = CHATML


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_batches_hold_every_row_once_with_its_padding(lengths: list[int], size: int) -> None:
    rows = [Row([i + 1] * n, [IGNORED] + [i + 1] * (n - 1)) for i, n in enumerate(lengths)]
    batches = list(make_batches(rows, size, pad_id=99))
    assert sorted(i for b in batches for i in b.indices) == list(range(len(rows)))
    widths = [b.input_ids.shape[1] for b in batches]
    assert widths == sorted(widths, reverse=True)
    for batch in batches:
        assert 1 <= len(batch.indices) <= size
        for place, index in enumerate(batch.indices):
            n = lengths[index]
            assert batch.input_ids[place, :n].tolist() == rows[index].input_ids
            assert batch.labels[place, :n].tolist() == rows[index].labels
            assert bool((batch.labels[place, n:] == IGNORED).all())
            assert bool((batch.input_ids[place, n:] == 99).all())
            assert batch.attention_mask[place].tolist() == [1] * n + [0] * (
                batch.input_ids.shape[1] - n
            )
    again = list(make_batches(rows, size, pad_id=99))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again))


def test_a_tokenizer_without_padding_pads_with_its_end(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id is None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
