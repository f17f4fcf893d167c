"""Words that several messages share."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vlora.wording import count_of, some_of, without_secrets


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "none"),
        (["a"], "a"),
        (list("abcde"), "a, b, c, d, e"),
        (list("abcdef"), "a, b, c, d, e and 1 more"),
        (map(repr, range(12)), "0, 1, 2, 3, 4 and 7 more"),
    ],
)
def test_some_of_many(names: list[str], said: str) -> None:
    assert some_of(names) == said


def test_some_of_as_many_as_asked_for() -> None:
    assert some_of("abc", most=2) == "a, b and 1 more"


def test_counts() -> None:
    counted = [count_of(count, "task") for count in (0, 1, 2)]
    assert counted == ["0 tasks", "1 task", "2 tasks"]


PIN = "@sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("no URL: a@b?c=d", "no URL: a@b?c=d"),
        ("https://host/tasks.", "https://host/tasks."),
        ("https://me:key@host/t?sig=a'b: gone", "https://host/t?...: gone"),
        ("'https://host/t?sig=a%2Fb': gone", "'https://host/t?...': gone"),
        (f"https://u:p@host/t?sig=1;2&x=3{PIN}", f"https://host/t?...{PIN}"),
        (f"memory://tasks{PIN}", f"memory://tasks{PIN}"),
        (
            "abfs://box@one.dfs.core.windows.net/t?sig=x",
            "abfs://box@one.dfs.core.windows.net/t?...",
        ),
        ("abfss://box:key@one.dfs.core.windows.net/t", "abfss://one.dfs.core.windows.net/t"),
        ("s3://key:secret@bucket/t and HTTPS://h/x#frag", "s3://bucket/t and HTTPS://h/x?..."),
    ],
)
def test_urls_are_shown_without_what_may_be_keys(text: str, without: str) -> None:
    assert without_secrets(text) == without
    assert without_secrets(without) == without


@given(st.text(string.ascii_letters + string.digits + "%=&;,:'+-_.~!*()/?", min_size=1))
def test_nothing_of_a_query_is_left(rest: str) -> None:
    said = without_secrets(f"checkpoint https://host/t?sig=QQ{rest}QQ is gone")
    assert said == "checkpoint https://host/t?... is gone"
