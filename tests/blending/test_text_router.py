"""What a router sees of text, what it says of it, and that it learns to tell tasks apart."""

from __future__ import annotations

import math
import random
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
import torch

from vllm_vlora.blend_names import Term, blend_text
from vllm_vlora.blending.prompt_features import (
    MOST_CHARACTERS,
    TextRows,
    counts,
    features,
    inverse_frequencies,
)
from vllm_vlora.blending.text_router import RoutePolicy, TextRouter, _blend
from vllm_vlora.errors import DataError, OptionError
from vllm_vlora.model.router import TaskRouter
from vllm_vlora.model.text_routing import OTHERS, RouterOptions, train_text_router

MASK = (1 << 64) - 1


def place(run: bytes, buckets: int) -> int:
    """By whole numbers of any size, as the docstring has it."""
    value = 0
    for byte in run:
        value = (value * 0x100000001B3 + byte + 1) & MASK
    value = (value + len(run)) & MASK
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD & MASK
    value ^= value >> 33
    return value % buckets


@pytest.mark.parametrize("text", ["Select  1\nFROM t", "ÄÖ 東京", "a", "", "   ", "x" * 40])
def test_runs_of_bytes_are_counted_where_their_hash_says(text: str) -> None:
    folded = f" {' '.join(text.lower().split())} ".encode()
    wanted = Counter(
        place(folded[start : start + size], 997)
        for size in (3, 4, 5)
        for start in range(len(folded) - size + 1)
    )
    places, times = counts(text, 997)
    assert dict(zip(places.tolist(), times.tolist())) == wanted


def test_the_features_are_pinned() -> None:
    """A router that was trained by one version is asked by every later one."""
    places, times = counts("hi", 1 << 14)
    assert places.tolist() == sorted(place(run, 1 << 14) for run in (b" hi", b"hi ", b" hi "))
    assert places.tolist() == [3116, 8198, 9863]
    assert times.tolist() == [1.0, 1.0, 1.0]


def test_values_are_log_counts_times_idf_of_length_one() -> None:
    texts = ["aaaa", "aaab", "zzz"]
    idf = inverse_frequencies(texts, 64)
    for bucket in range(64):
        having = sum(bucket in counts(text, 64)[0] for text in texts)
        assert idf[bucket] == pytest.approx(math.log(4 / (1 + having)) + 1)
    places, values = features("aaaa", idf)
    raw = np.log1p(counts("aaaa", 64)[1]) * idf[places]
    assert values == pytest.approx(raw / np.linalg.norm(raw))
    dense = TextRows(texts, idf)[torch.tensor([2, 0])]
    assert dense[1, places].numpy() == pytest.approx(values)
    assert dense.norm(dim=1).numpy() == pytest.approx([1, 1])


def test_of_long_text_both_ends_are_seen() -> None:
    middle = "m" * 10 * MOST_CHARACTERS
    one = counts("begin " + middle + " end", 1 << 14)
    other = counts("begin " + middle + middle + " end", 1 << 14)
    assert one[0].tolist() == other[0].tolist()
    assert set(counts("begin", 1 << 14)[0]) & set(one[0])
    assert set(counts(" end", 1 << 14)[0]) <= set(one[0])


def test_lone_surrogates_are_text_too() -> None:
    assert len(counts("\ud800 abc", 1 << 14)[0]) > 3


# --- asking ---------------------------------------------------------------------------------------


def texts_of(words: str, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(words.split(), k=7)) for _ in range(count)]


SQL = "select from where count orders customers table rows having average"
FRENCH = "bonjour je voudrais une pomme avec vous merci beaucoup demain"
CODE = "def class return import lambda yield async await tuple None"


@pytest.fixture(scope="module")
def trained() -> object:
    texts = {"sql": texts_of(SQL, 60, 1), "french": texts_of(FRENCH, 60, 2)}
    return train_text_router({**texts, OTHERS: texts_of(CODE, 60, 3)})


def router_of(trained) -> TextRouter:  # type: ignore[no-untyped-def]
    return TextRouter(trained.tasks, trained.temperature, trained.weights)


def test_the_weights_are_those_of_the_task_router(trained) -> None:  # type: ignore[no-untyped-def]
    labels = [*trained.tasks, OTHERS]
    judge = TaskRouter(1 << 14, 3, 64, labels, temperature=trained.temperature)
    judge.load_state_dict({n: t for n, t in trained.weights.items() if n != "idf"})
    asked = ["select rows from table", "merci", "", "zzz", "def f(): return None"]
    rows = TextRows(asked, trained.weights["idf"].numpy())[torch.arange(len(asked))]
    found = np.array([router_of(trained).weights(text) for text in asked])
    np.testing.assert_allclose(found, judge(rows).detach().numpy(), atol=1e-5)


def test_it_learns_and_says_how_well(trained) -> None:  # type: ignore[no-untyped-def]
    assert (trained.tasks, trained.others) == (["sql", "french"], True)
    assert trained.accuracy == 1.0
    assert {task: m.held_out for task, m in trained.measured.items()} == {
        "sql": 12, "french": 12, OTHERS: 12,
    }  # fmt: skip
    assert {task: m.trained for task, m in trained.measured.items()} == dict.fromkeys(
        ("sql", "french", OTHERS), 48
    )
    assert trained.confusion["sql"] == {"sql": 12}
    router, tasks = router_of(trained), {"sql", "french"}
    for words, task in ((SQL, "sql"), (FRENCH, "french")):
        for text in texts_of(words, 20, 9):
            pick = router.pick(text, tasks, RoutePolicy())
            assert pick.blend == (Term(task, Decimal(1)),)
            assert pick.confidence > 0.5
    for text in texts_of(CODE, 20, 9):
        assert router.pick(text, tasks, RoutePolicy(threshold=0.0)).blend is None


def test_what_it_cannot_tell_apart_is_not_routed() -> None:
    """Two tasks with prompts of one kind: held-out text shows it, and lowers the weights."""
    texts = {name: texts_of(SQL, 80, seed) for seed, name in enumerate("abcd")}
    trained = train_text_router(texts)
    assert trained.accuracy is not None
    assert trained.accuracy < 0.6
    assert trained.temperature > 1.5
    router = router_of(trained)
    picks = [router.pick(t, set(texts), RoutePolicy()).blend for t in texts_of(SQL, 40, 77)]
    assert sum(pick is None for pick in picks) > 30


def test_text_of_nothing_or_of_a_task_that_is_gone_is_the_base_models(trained) -> None:  # type: ignore[no-untyped-def]
    router = router_of(trained)
    assert router.pick("  \n", {"sql", "french"}, RoutePolicy()).blend is None
    assert router.pick("select from table", {"french"}, RoutePolicy(3, 0.0)).blend is None


def test_a_prompt_of_two_tasks_becomes_a_blend(trained) -> None:  # type: ignore[no-untyped-def]
    router = router_of(trained)
    text = "select count from where customers bonjour je voudrais une pomme"
    weights = dict(zip(["sql", "french"], router.weights(text)))
    assert min(weights.values()) > 0.2, "the text is to be of both"
    pick = router.pick(text, {"sql", "french"}, RoutePolicy(terms=2))
    assert pick.blend is not None
    assert pick.confidence == pytest.approx(sum(weights.values()))
    assert {term.task for term in pick.blend} == {"sql", "french"}
    for term in pick.blend:
        share = weights[term.task] / sum(weights.values())
        assert float(term.weight) == pytest.approx(share, abs=0.1)
    assert len(router.pick(text, {"sql", "french"}, RoutePolicy(1, 0.0)).blend or ()) == 1


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ([("a", 0.6), ("b", 0.3)], "a*0.7+b*0.3"),
        ([("a", 0.97), ("b", 0.03)], "a"),
        ([("a", 0.4), ("b", 0.3), ("c", 0.3)], "a*0.4+b*0.3+c*0.3"),
        ([("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 3)], "a*0.4+b*0.3+c*0.3"),
        ([("a", 0.2)], "a"),
    ],
)
def test_weights_of_a_blend_add_up_to_one_in_tenths(
    chosen: list[tuple[str, float]], name: str
) -> None:
    blend = _blend(chosen)
    assert blend_text(blend) == name
    assert sum(term.weight for term in blend) == 1


# --- refused --------------------------------------------------------------------------------------


def test_what_cannot_be_trained_on_is_refused() -> None:
    with pytest.raises(OptionError, match="got texts of 1"):
        train_text_router({"a": ["x y z", "u v w"]})
    with pytest.raises(DataError, match="task 'b': 1 different prompt;"):
        train_text_router({"a": ["x y z", "u v w"], "b": ["same", "same", " "]})
    for options in ({"held_out": 1.0}, {"held_out": float("nan")}, {"hidden": 0}, {"epochs": 0}):
        with pytest.raises(OptionError):
            RouterOptions(**options)  # type: ignore[arg-type]


def test_a_text_is_not_trained_on_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train_text_router({"a": ["one", "two"] * 30, "b": ["three", "four"] * 30})
    assert {m.trained + m.held_out for m in trained.measured.values()} == {2}


def test_training_is_repeatable() -> None:
    texts = {"sql": texts_of(SQL, 20, 1), "french": texts_of(FRENCH, 20, 2)}
    one, other = train_text_router(texts), train_text_router(texts)
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert one.temperature == other.temperature
