"""The benchmark of routers, on texts that are told apart by their words."""

from __future__ import annotations

import random
import sys

import pytest
from places import BENCHMARKS

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

import routing

WORDS = {"a": "select from where count orders", "b": "bonjour je voudrais une pomme"}


def split(train: int, judge: int) -> routing.Split:
    rng = random.Random(0)
    return tuple(
        {n: [" ".join(rng.choices(w.split(), k=6)) for _ in range(count)] for n, w in WORDS.items()}
        for count in (train, judge)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["runs of 3 to 5 bytes", "words and pairs"])
def test_every_candidate_learns_what_is_plain(name: str) -> None:
    assert routing._accuracy(routing.candidates(None)[name], split(30, 10), 0) == 1.0
    wrong = split(30, 10)[0], dict(zip("ba", split(30, 10)[1].values()))
    assert routing._accuracy(routing.candidates(None)[name], wrong, 0) == 0.0


def test_parts_that_go_right_and_to_the_base() -> None:
    router = routing._trained("toy", split(40, 1))
    found = routing._routed(router, split(1, 20)[1], own=True)
    assert (found["right"], found["base"], found["right_above_threshold"]) == (1.0, 0.0, 1.0)
    other = {"x": ["0123456789", "9876543210"]}
    assert routing._routed(router, other, own=False).keys() == {"base"}
    costs = routing._costs(router)
    assert costs.keys() == set(routing.LENGTHS)
    assert all(cost > 0 for cost in costs.values())


def test_docstrings_are_cut_into_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PACKAGES", ("rich", "no_such_package"))
    train, judge = routing.docstrings(20, 10)
    assert (len(train["rich"]), len(judge["rich"])) == (20, 10)
    assert not set(train["rich"]) & set(judge["rich"])
    assert train.keys() == judge.keys() == {"rich"}
