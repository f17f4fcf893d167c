"""Foreign regular expressions: ``re``'s answers, in bounded time."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vlora.adapters.patterns import PatternError, fullmatch, match_end

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
    assert fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)
    assert match_end(pattern, name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


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
    for ask in (fullmatch, match_end):
        with contextlib.suppress(PatternError):
            assert not ask(pattern, "a" * 60)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{99999999999999999999}", "(" * 5000 + ")" * 5000, "(a)\\1", "(?x)a", "(?L)", "a" * (1 << 19),
     "(?<=a*)b", "[b-a]", "(?:" * 300 + "a|b" + ")*" * 300],
)  # fmt: skip
def test_what_is_refused(pattern: str) -> None:
    for ask in (fullmatch, match_end):
        with pytest.raises(PatternError):
            ask(pattern, "aa.a")
