"""Foreign regular expressions: ``re``'s answers, in bounded time."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from vllm_vlora.adapters.patterns import EndPatterns, PatternError, Work, _parsed, _Walk, fullmatch
from vllm_vlora.adapters.peft_config import lora_rank


def means(key: str, name: str) -> bool:
    """Whether PEFT takes a key of ``rank_pattern`` to mean a module."""
    return EndPatterns([key]).first(name) is not None


_ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", r"\W", r"\S", "[ab]", "[^a]", "[a-b1]", "^", "$", r"\b", r"\B",
     r"\Z", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)", "(?!.*b)", "(?i:A)", "(?s:.)"]
)  # fmt: skip
_REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,1}?", "{2,}"])


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("({}{})".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, _REPEATS),
        st.builds("(?={})".format, inner),
        st.builds("{}{}".format, inner, inner),
    )


_PATTERNS = st.recursive(_ATOMS, _grown, max_leaves=6)
_NAMES = st.text("ab1.A\n", max_size=6)


@given(_PATTERNS, _NAMES)
def test_patterns_mean_what_re_takes_them_for(pattern: str, name: str) -> None:
    whole, end = re.fullmatch(pattern, name), re.match(rf"(.*\.)?({pattern})$", name)
    assert fullmatch(pattern, name) == (whole is not None)
    assert means(pattern, name) == (end is not None)
    # Also where the pattern is so simple that ``re`` was asked.
    assert (len(name) in _Walk(name).ends(_parsed(pattern)[0], {0})) == (whole is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        # Unsloth's.
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        r".*?(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj|q|v|k|o).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))",
        r"^(?!.*(?:visual|vision)).*(?:q_proj|v_proj)$",
        r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"model\.layers\.(?:[0-9]|1[0-9])\..*",
        r"(\w+\.)+q_proj",
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.17.self_attn.q_proj",
        "model.layers.3.mlp.down_proj",
        "model.visual.blocks.11.attn.qkv_proj",
        "base_model.model.model.layers.3.mlp.experts.117.down_proj",
    ],
)
def test_patterns_that_are_in_use(pattern: str, name: str) -> None:
    assert fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(.*)*b", "a*" * 30 + "b", "(a|a)" * 40 + "b", "(?:(?:a{1,9}){1,9}){1,9}b",
     "((a?){4000000000}){4000000000}b", "(?=(a+)+b)c", "(a*)*" * 20 + "b", "(?<!b)" * 500 + "(a|b|ab)*c"],
)  # fmt: skip
def test_patterns_that_backtrack_for_ever(pattern: str) -> None:
    began = time.monotonic()
    for ask in (fullmatch, means):
        with contextlib.suppress(PatternError):
            assert not ask(pattern, "a" * 60)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{99999999999999999999}", "(" * 5000 + ")" * 5000, "(a)\\1", "(?x)a", "(?L)", "a" * (1 << 19),
     "(?<=a*)b", "[b-a]", "(?:" * 300 + "a|b" + ")*" * 300],
)  # fmt: skip
def test_what_is_refused(pattern: str) -> None:
    for ask in (fullmatch, means):
        with pytest.raises(PatternError):
            ask(pattern, "aa.a")


_KEYS = st.one_of(
    st.text("ab.", min_size=1, max_size=4), st.text("ab.", max_size=4).map("^{}".format)
)


@settings(max_examples=400)
@given(
    st.lists(st.one_of(_KEYS, _KEYS, _PATTERNS), unique=True, max_size=6),
    st.text("ab.\n", max_size=6),
)
def test_the_first_key_that_means_a_module_counts(keys: list[str], name: str) -> None:
    assert EndPatterns(keys).first(name) == first_of_peft(keys, name)


def first_of_peft(keys: list[str], name: str) -> str | None:
    found = get_pattern_key(keys, name)
    # It returns the name where no key means it, which may also be a key that does not.
    return found if found in keys and re.match(rf"(.*\.)?({found})$", name) else None


def test_as_many_keys_as_modules() -> None:
    """All experts of a large model, each with its rank: their number squared would take minutes."""
    names = [f"model.layers.{n // 128}.mlp.experts.{n % 128}.up_proj" for n in range(6000)]
    patterns = EndPatterns([f"^{name}" if place % 3 else name for place, name in enumerate(names)])
    began = time.monotonic()
    assert all(patterns.first(name).removeprefix("^") == name for name in names)
    assert time.monotonic() - began < 5


def test_all_names_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = EndPatterns([f"(a|aa)*b{n}" for n in range(40)])
    work = Work()
    names = ["a" * 50 + str(n) for n in range(100_000)]
    monkeypatch.setattr(patterns._work, "_left", 100_000)
    monkeypatch.setattr(work, "_left", 100_000)
    with pytest.raises(PatternError, match="takes too long on so many names"):
        list(map(patterns.first, names))
    with pytest.raises(PatternError, match="takes too long on so many names"):
        [fullmatch("((a|aa)*)*b", name, work) for name in names]


def test_a_mapping_that_was_changed_is_prepared_anew() -> None:
    config = {"r": 2, "rank_pattern": {"a": 3, "b": 4}}
    assert lora_rank(config, "x.a") == 3
    del config["rank_pattern"]["a"]
    config["rank_pattern"]["c"] = 5
    assert [lora_rank(config, f"x.{name}") for name in "abc"] == [2, 4, 5]
