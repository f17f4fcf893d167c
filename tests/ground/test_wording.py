"""Words that several messages share."""

from __future__ import annotations

import pytest

from vllm_vlora.wording import count_of, some_of


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
