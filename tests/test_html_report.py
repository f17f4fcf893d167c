"""The HTML report: it parses, opens without a network, escapes, and draws what the data says."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vlora.tools import plots
from vllm_vlora.tools.html_report import render_report

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=y>', "a&b", "Zürich 東京", "x" * 256)
_VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Elements with their attributes, and text; unbalanced elements are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str, kind: str | None = None) -> int:
        return sum(t == tag and kind in (None, a.get("class")) for t, a in self.elements)

    def find(self, tag: str, kind: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and a.get("class") == kind]


def make_task(name: str, recovered: float | None, **changes: Any) -> dict[str, Any]:
    modules = {
        f"model.layers.{layer}.self_attn.{kind}": 0.1 * (layer + 1)
        for layer in range(3)
        for kind in ("q_proj", "v_proj")
    }
    return {
        "task": name,
        "data": ["held<out>.jsonl"],
        "data_sha256": "ab" * 32,
        "examples": 20,
        "left_out": 1,
        "tokens": 200,
        "base_loss": 2.0,
        "adapter_loss": 1.0,
        "compressed_loss": 1.05,
        "recovered": recovered,
        "recovered_standard_error": 0.01,
        "recovered_interval": None if recovered is None else [recovered - 0.02, recovered + 0.02],
        "undefined_because": "no gain <here>" if recovered is None else None,
        "agreement": 0.97,
        "kl": 0.0123,
        "greedy": {"tokens": 7.5, "possible": 8.0, "exact": 0.9, "limit": 8},
        "error": 0.1,
        "errors_from": "original",
        "module_errors": {**modules, "lm_head": 0.4},
        "original": "/loras/x",
        "original_bytes": 1000,
        "bytes": 250,
        "ratio": 4.0,
        "stored_as": {"private nf4": 6},
        **changes,
    }


def make_report(**changes: Any) -> dict[str, Any]:
    fractions = (0.95, 0.9, None, 1.01, -0.2)
    tasks = [make_task(*pair, bytes=250 * 4**i) for i, pair in enumerate(zip(HOSTILE, fractions))]
    count = len(tasks)
    return {
        "checkpoint": "/ckpt/<b>",
        "base_model": "org/base&co",
        "bytes": 5000,
        "original_bytes": 20000,
        "basis_bytes": 0,
        "ratio": 4.0,
        "recovered": {
            "judged": 4,
            "mean": 0.665,
            "median": 0.925,
            "worst": -0.2,
            "worst_task": HOSTILE[4],
        },
        "tasks": tasks,
        "not_evaluated": ["other"],
        "spectra": [
            {
                "kind": kind,
                "modules": 15,
                "kept_rank": 2,
                "quantiles": {
                    "0.1": [0.6, 0.1, 0.0],
                    "0.5": [0.8, 0.2, 0.05],
                    "0.9": [0.9, 0.4, 0.1],
                },
            }
            for kind in ("q_proj", "v_proj", "<i>", "lm_head")
        ],
        "similarity": {
            "tasks": list(HOSTILE),
            "cosines": [[1.0 if i == j else -0.25 for i in range(count)] for j in range(count)],
        },
        "setting": {"command": "vllm-vlora evaluate '<x>'", "torch": "2.13.0"},
        "seconds": 12.3,
        **changes,
    }


def test_the_page_opens_without_a_network_and_runs_nothing() -> None:
    page = Page(render_report(make_report()))
    assert page.count("script") == page.count("link") == page.count("img") == page.count("i") == 0
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "href", "srcset", "action", "data", "xlink:href"), tag
            assert not name.startswith("on")
            assert "http:" not in (value or "")
            assert "https:" not in (value or "")
    policies = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    text = render_report(make_report())
    assert "url(" not in text
    assert "@import" not in text


def test_what_comes_from_outside_is_escaped() -> None:
    text = render_report(make_report())
    page = Page(text)
    assert "<script" not in text
    assert "<img" not in text
    shown = "".join(page.text)
    for name in HOSTILE:
        assert name in shown
    for wanted in (
        "/ckpt/<b>",
        "org/base&co",
        "held<out>.jsonl",
        "no gain <here>",
        "evaluate '<x>'",
    ):
        assert wanted in shown


def test_every_task_has_its_row_and_its_marks() -> None:
    page = Page(render_report(make_report()))
    assert page.count("svg") == 5
    # Four tasks are judged: a bar and a point each.
    assert page.count("rect", "mark") == page.count("circle", "mark") == 4
    # Heatmap: 2 kinds x 3 layers, lm_head, 11 of the legend; similarity: 5 x 5, the diagonal warm.
    assert page.count("rect", "heat") == 7 + 11 + 5
    assert page.count("rect", "cold") == 20
    assert page.count("path", "band") == page.count("path", "curve") == 4


def test_bars_are_as_long_as_their_values() -> None:
    rows = [plots.Bar("low", 0.25, (0.2, 0.3)), plots.Bar("high", 1.0, None)]
    bars = Page(plots.bars(rows)).find("rect", "mark")
    widths = [float(bar["width"] or 0) for bar in bars]
    assert widths[0] == pytest.approx(widths[1] / 4, abs=0.2)
    negative, positive = Page(
        plots.bars([plots.Bar("down", -0.5, None), plots.Bar("up", 0.5, None)])
    ).find("rect", "mark")
    assert float(negative["width"] or 0) == pytest.approx(float(positive["width"] or 0), abs=0.2)
    assert float(negative["x"] or 0) < float(positive["x"] or 0)


def test_cells_are_as_dark_as_their_values() -> None:
    cells = {("q", "0"): 0.1, ("q", "1"): 0.4, ("v", "1"): 0.0}
    found = Page(plots.heatmap(cells, ["q", "v"], ["0", "1"], "errors")).find("rect", "heat")
    assert [cell["fill-opacity"] for cell in found[:3]] == ["0.25", "1", "0"]


def test_points_stand_where_their_values_are() -> None:
    points = [plots.Point("a", 1e3, 0.5), plots.Point("b", 1e4, 0.75), plots.Point("c", 1e5, 1.0)]
    found = Page(plots.scatter(points, "bytes", "recovered")).find("circle", "mark")
    xs = [float(point["cx"] or 0) for point in found]
    ys = [float(point["cy"] or 0) for point in found]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[0] > ys[2]


def test_a_report_without_originals_says_so() -> None:
    tasks = [
        make_task(
            name,
            None,
            adapter_loss=None,
            agreement=None,
            kl=None,
            greedy=None,
            error=None,
            original=None,
            errors_from="checkpoint",
            undefined_because="no original given",
        )
        for name in HOSTILE
    ]
    nothing = {"judged": 0, "mean": None, "median": None, "worst": None, "worst_task": None}
    page = Page(
        render_report(make_report(tasks=tasks, spectra=[], similarity=None, recovered=nothing))
    )
    shown = "".join(page.text)
    assert shown.count("no recovered fraction: no original given") == 5
    assert "For 5 of 5 tasks as recorded at compression" in shown
    assert page.count("svg") == 1


def test_one_task_of_one_module_is_enough() -> None:
    task = make_task("only", 1.0, module_errors={"lm_head": None}, recovered_interval=None)
    page = Page(render_report(make_report(tasks=[task], similarity=None)))
    assert page.count("rect", "mark") == 1


def test_many_tasks_are_cut_and_it_says_so() -> None:
    tasks = [make_task(f"t{i}", i / 1000) for i in range(150)]
    cosines = [[0.5] * 100 for _ in range(100)]
    similarity = {"tasks": [f"t{i}" for i in range(100)], "cosines": cosines}
    text = render_report(make_report(tasks=tasks, similarity=similarity))
    shown = "".join(Page(text).text)
    assert "The worst 100 of 150 tasks are shown" in shown
    assert "The first 100 of 150 tasks are shown" in shown
    assert len(text) < 4_000_000


def test_the_same_data_makes_the_same_bytes() -> None:
    assert render_report(make_report()) == render_report(make_report())


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), count=st.integers(2, 10))
def test_ticks_are_round_and_inside(low: float, width: float, count: int) -> None:
    found = plots.ticks(low, low + width, count)
    assert 0 < len(found) <= 1.002 * count + 1
    slack = 1e-6 * (abs(low) + width)
    assert all(low - slack <= value <= low + width + slack for value in found)
    steps = {f"{second - first:.6g}" for first, second in itertools.pairwise(found)}
    for step in steps if abs(low) < 1e3 * width else ():
        digits = re.sub(r"e.*|[.0]", "", f"{float(step):.3e}".replace("-", ""))
        assert digits in ("1", "2", "5")
