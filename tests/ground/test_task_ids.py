"""Task ids: which are allowed, and that no two of them ever share a file name."""

from __future__ import annotations

import re
import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_vlora.errors import TaskIdError
from vllm_vlora.task_ids import encode_task_id, validate_task_id, validate_task_ids

PORTABLE = re.compile(r"[a-z0-9_~-][a-z0-9_.~-]{0,119}")
WINDOWS_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")

task_ids = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=256
)
# Ids whose escapes, digests and truncation are most likely to meet.
tricky_ids = st.text(st.sampled_from("aA~.-_/é2e6con1"), min_size=1, max_size=130)


def decode(encoded: str) -> str:
    """The inverse of the escaping, written independently of it: it proves injectivity."""
    data = re.sub(rb"~([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), encoded.encode())
    return data.decode()


@given(task_ids | tricky_ids)
@example("CON")
@example("con.x")
@example("com1")
@example("...")
@example("-rf")
@example("a.")
@example("a ")
@example("~")
def test_encoding_is_portable_and_reversible(task_id: str) -> None:
    encoded = encode_task_id(task_id)
    assert PORTABLE.fullmatch(encoded)
    assert not encoded.endswith(".")
    assert not WINDOWS_RESERVED.fullmatch(encoded)
    assert not WINDOWS_RESERVED.fullmatch(encoded + ".safetensors")
    if "~~" not in encoded:
        assert decode(encoded) == task_id


@given(st.lists(task_ids | tricky_ids, unique=True, max_size=30))
def test_encoding_is_injective_without_case(ids: list[str]) -> None:
    assert len({encode_task_id(task_id).lower() for task_id in ids}) == len(ids)


@given(tricky_ids, tricky_ids)
def test_pairs_of_tricky_ids_do_not_collide(left: str, right: str) -> None:
    assert (encode_task_id(left) == encode_task_id(right)) == (left == right)


@given(task_ids)
def test_an_encoded_name_used_as_a_task_id_does_not_collide(task_id: str) -> None:
    encoded = encode_task_id(task_id)
    if encoded != task_id:
        assert encode_task_id(encoded) != encoded


@pytest.mark.parametrize(
    ("task_id", "encoded"),
    [
        ("summarize-fr_v2.1", "summarize-fr_v2.1"),
        ("a/b", "a~2fb"),
        ("a_b", "a_b"),
        ("A", "~41"),
        ("a", "a"),
        ("ü", "~c3~bc"),
        ("../../etc/x", "~2e.~2f..~2fetc~2fx"),
        ("CON", "~43~4f~4e"),
        ("con", "~63on"),
        ("nul.tar", "~6eul.tar"),
        ("console", "console"),
        ("trailing.", "trailing~2e"),
        ("trailing ", "trailing~20"),
        (".hidden", "~2ehidden"),
        ("-o", "~2do"),
    ],
)
def test_known_encodings(task_id: str, encoded: str) -> None:
    assert encode_task_id(task_id) == encoded


def test_normal_forms_are_distinct_tasks() -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert encode_task_id(composed) != encode_task_id(decomposed)


@pytest.mark.parametrize("length", [120, 121, 200, 256])
@pytest.mark.parametrize("character", ["a", "A", "ü", "😀"])
def test_long_ids_that_differ_at_the_end_stay_distinct(length: int, character: str) -> None:
    left, right = character * length, character * (length - 1) + "b"
    names = {encode_task_id(left), encode_task_id(right)}
    assert len(names) == 2
    assert all(PORTABLE.fullmatch(name) for name in names)


@pytest.mark.parametrize(
    ("task_id", "said"),
    [
        ("", "empty"),
        ("x" * 300, "300 characters"),
        ("a\nb", "U+000A"),
        ("a\x00b", "U+0000"),
        ("a\x7f", "U+007F"),
        ("a\x9b", "U+009B"),
        ("a\u2028b", "U+2028"),
        ("\ud800", "U+D800"),
        (7, "not text"),
    ],
)
def test_bad_ids_are_refused_in_one_line(task_id: str, said: str) -> None:
    for function in (validate_task_id, encode_task_id):
        with pytest.raises(TaskIdError) as caught:
            function(task_id)
        message = str(caught.value)
        assert said in message
        assert message.isprintable()
        assert message.isascii()


@given(task_ids)
def test_valid_ids_come_back_unchanged(task_id: str) -> None:
    assert validate_task_id(task_id) == task_id


def test_forbidden_are_the_characters_of_these_categories() -> None:
    categories = {"Cc", "Cs", "Zl", "Zp"}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        try:
            validate_task_id(character)
            refused = False
        except TaskIdError:
            refused = True
        assert refused == (unicodedata.category(character) in categories), hex(code)


@pytest.mark.parametrize("wrong", ["", "a\nb", "\ud800", "x" * 257])
def test_many_ids_are_held_to_the_rules_of_one(wrong: str) -> None:
    validate_task_ids(["a", "\u00fc", "y" * 256])
    with pytest.raises(TaskIdError) as one:
        validate_task_id(wrong)
    with pytest.raises(TaskIdError) as many:
        validate_task_ids(["a", wrong, "b"])
    assert str(one.value) == str(many.value)
