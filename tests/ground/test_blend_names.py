"""Names of blends: read strictly, against whatever ids there are, with bounded work."""

from __future__ import annotations

import contextlib
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vlora.blend_names import (
    MAX_TERMS,
    Blend,
    Term,
    blend_text,
    parse_blend,
    weight_text,
)
from vllm_vlora.errors import BlendError

# Ids out of the very characters that blends are written with.
tricky_ids = st.text(st.sampled_from("ab+-*/. 12é"), min_size=1, max_size=8)
plain_ids = st.text(st.sampled_from("abcXYZ019_/. é"), min_size=1, max_size=12)
weights = st.decimals(min_value="0.000001", max_value=100, places=6).filter(lambda w: w > 0)


def terms(ids: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, Decimal, int]]]:
    term = st.tuples(ids, weights, st.sampled_from((1, -1)))
    return st.lists(term, min_size=1, max_size=MAX_TERMS, unique_by=lambda term: term[0])


def written(chosen: list[tuple[str, Decimal, int]]) -> str:
    text = "".join(f"{'+' if sign > 0 else '-'}{name}*{weight}" for name, weight, sign in chosen)
    return text.removeprefix("+")


def reads(text: str, known: set[str]) -> list[list[tuple[str, Decimal]]]:
    """Every way to read a text, by brute force and apart from the parser: [] for none."""
    found = []
    for sign, start in ((1, 0), (-1, 1)):
        if sign > 0 or text[:1] == "-":
            found += _reads(text[start:], sign, known)
    return found


def _reads(text: str, sign: int, known: set[str]) -> list[list[tuple[str, Decimal]]]:
    found = []
    for size in range(len(text), 0, -1):
        name, rest = text[:size], text[size:]
        if name not in known:
            continue
        for cut in range(len(rest) + 1):
            factor, tail = rest[:cut], rest[cut:]
            if factor and not _is_factor(factor):
                continue
            weight = Decimal(factor[1:] or 1) * sign
            if not tail:
                found.append([(name, weight)])
            elif tail[0] in "+-":
                others = _reads(tail[1:], 1 if tail[0] == "+" else -1, known)
                found += [[(name, weight), *other] for other in others]
    return found


def _is_factor(text: str) -> bool:
    whole, point, decimals = text[1:].partition(".")
    digits = all(c in "0123456789" for c in whole + decimals)
    sized = len(whole) <= 3 and len(decimals) <= 6 and bool(decimals) == bool(point)
    return text[0] == "*" and digits and sized and bool(whole or decimals)


@given(terms(plain_ids))
def test_what_is_written_is_read(chosen: list[tuple[str, Decimal, int]]) -> None:
    known = {name for name, _, _ in chosen}
    blend = parse_blend(written(chosen), known)
    assert [(t.task, t.weight) for t in blend] == [(n, s * w) for n, w, s in chosen]


@given(st.sets(tricky_ids, min_size=1, max_size=6), st.data())
def test_ids_of_operators_are_read_as_the_longest_that_fit(
    known: set[str], data: st.DataObject
) -> None:
    pieces = st.lists(st.sampled_from([*sorted(known), *"+-*", "*0.5"]), min_size=1, max_size=7)
    text = "".join(data.draw(pieces))
    if text in known:
        assert parse_blend(text, known) == (Term(text, Decimal(1)),)
        return
    # Brute force lists longer first ids before shorter ones, so the first is the one that is meant.
    expected = [read for read in reads(text, known) if len(read) <= MAX_TERMS][:1]
    names = [name for name, _ in expected[0]] if expected else []
    zero = expected and not all(weight for _, weight in expected[0])
    if not expected or zero or len(set(names)) < len(names):
        with pytest.raises(BlendError):
            parse_blend(text, known)
    else:
        assert [tuple(term) for term in parse_blend(text, known)] == expected[0]


@given(terms(plain_ids), st.randoms())
def test_the_name_of_a_blend_does_not_depend_on_its_order(
    chosen: list[tuple[str, Decimal, int]], random: object
) -> None:
    known = {name for name, _, _ in chosen}
    blend = parse_blend(written(chosen), known)
    shuffled = list(blend)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert blend_text(tuple(shuffled)) == blend_text(blend)
    assert set(parse_blend(blend_text(blend), known)) == set(blend)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sql", [("sql", "1")]),
        ("sql*0.7+french*0.3", [("sql", "0.7"), ("french", "0.3")]),
        ("sql-french", [("sql", "1"), ("french", "-1")]),
        ("-french*.5", [("french", "-0.5")]),
        ("sql*100+a-b*2", [("sql", "100"), ("a-b", "2")]),
        ("a-b-sql", [("a-b", "1"), ("sql", "-1")]),
        ("org/task v2*0.5+sql", [("org/task v2", "0.5"), ("sql", "1")]),
        # "a-b" is longer than "a", but then "c" would be none.
        ("a-b-c", [("a", "1"), ("b-c", "-1")]),
    ],
)
def test_examples(text: str, expected: list[tuple[str, str]]) -> None:
    known = {"sql", "french", "a", "a-b", "b-c", "org/task v2"}
    blend = parse_blend(text, known)
    assert [(term.task, weight_text(term.weight)) for term in blend] == expected


def test_an_id_that_looks_like_a_blend_is_a_task() -> None:
    assert parse_blend("sql*2", {"sql", "sql*2"}) == (Term("sql*2", Decimal(1)),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nothing", "no task is called"),
        ("", "no task is called"),
        ("sql+nothing", r"'\+nothing' is none"),
        ("sql*nan+french", r"'\*nan\+french' is none"),
        ("sql**2", r"'\*\*2' is none"),
        ("sql*0.0000001", r"'\*0.0000001' is none"),
        ("sql+", "is no blend"),
        ("+sql", "no task is called"),
        ("sql++french", "is no blend"),
        ("sql + french", "no task is called"),
        ("sql*1e3", "is no blend"),
        ("sql*-1", "is no blend"),
        ("sql*٣", "is no blend"),
        ("sql*1234", "is no blend"),
        ("sql*0.1234567", "is no blend"),
        ("sql*0", "weight 0"),
        ("sql*100.1", "weight 100.1"),
        ("sql+sql", "twice"),
        ("+".join(f"t{n}" for n in range(9)), "at most 8"),
        ("sql" + "+sql" * 300, "at most 1024"),
        ("x" * 5000, "at most 1024"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    known = {"sql", "french", *(f"t{n}" for n in range(9))}
    with pytest.raises(BlendError, match=reason) as caught:
        parse_blend(text, known)
    assert len(str(caught.value)) < 400


def test_weights_have_one_form() -> None:
    for text in ("0.30", ".3", "00.3", "0.300000"):
        [term] = parse_blend(f"a*{text}", {"a"})
        assert (weight_text(term.weight), term.weight) == ("0.3", Decimal("0.3"))
    assert weight_text(Decimal("1E+2")) == "100"
    assert blend_text((Term("b", Decimal(1)), Term("a", Decimal("-0.50")))) == "b-a*0.5"


@pytest.mark.parametrize(
    "text", ["-" * 64, "a-" * 60 + "!", "a*" * 60, "-a" * 60 + "*", "a-b+" * 30 + "?", "q" * 10**6]
)
def test_hostile_names_take_bounded_work(text: str) -> None:
    known = {"-" * n for n in range(1, 60)} | {"a", "b", "a-b"} | {"a-" * n for n in range(1, 60)}
    started = time.perf_counter()
    for _ in range(10):
        with contextlib.suppress(BlendError):
            parse_blend(text, known)
    assert (time.perf_counter() - started) / 10 < 0.05


def test_a_blend_is_hashable() -> None:
    blend: Blend = parse_blend("a+b", {"a", "b"})
    assert {blend: 1}[parse_blend("a+b", {"b", "a"})] == 1
