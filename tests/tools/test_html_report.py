"""The HTML report: it parses, opens without a network, escapes, and draws what the data says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

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


class Extent(NamedTuple):
    """The least corner of a shape, and its width."""

    x: float
    y: float
    width: float


def figures_of(page: str) -> list[ElementTree.Element]:
    """The figures, which must be XML."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def drawn(plot: plots.Plot) -> ElementTree.Element:
    return ElementTree.fromstring(plots.render_svg(plot))


def marks(figure: ElementTree.Element) -> list[ElementTree.Element]:
    """Shapes that say a value."""
    return [shape for shape in figure.iter() if shape.find("title") is not None]


def style(element: ElementTree.Element) -> dict[str, str]:
    pairs = (part.partition(":") for part in element.get("style", "").split(";") if part)
    return {name.strip(): value.strip() for name, _, value in pairs}


def darkness(cell: ElementTree.Element) -> float:
    found = style(cell)
    return 0.0 if found["fill"] == "none" else float(found.get("fill-opacity", 1))


def extent(path: ElementTree.Element) -> Extent:
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))]
    xs, ys = numbers[::2], numbers[1::2]
    return Extent(min(xs), min(ys), max(xs) - min(xs))


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
        "recovered_undefined_because": "no gain <here>" if recovered is None else None,
        "kl_kept": 0.9,
        "kl_kept_standard_error": 0.01,
        "kl_kept_interval": [0.88, 0.92],
        "kl_kept_undefined_because": None,
        "kl_base": 0.123,
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
        "tokenizer": "/loras/own<tokenizer>",
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
        "kl_kept": {
            "judged": 5,
            "mean": 0.9,
            "median": 0.9,
            "worst": 0.9,
            "worst_task": HOSTILE[0],
        },
        "recovered": {
            "judged": 4,
            "mean": 0.665,
            "median": 0.925,
            "worst": -0.2,
            "worst_task": HOSTILE[4],
        },
        "tasks": tasks,
        "losses": {
            "noted_above": 0.05,
            "above": {"loud <u>": 0.75},
            "lost_modules": {},
            "no_update": ["idle <u>"],
        },
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
            assert name not in ("src", "srcset", "action", "data", "xlink:href"), tag
            # Of shapes in the page itself.
            assert name != "href" or (value or "").startswith("#"), tag
            assert not name.startswith("on")
            assert "http:" not in (value or "")
            assert "https:" not in (value or "")
    policies = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
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
        "/loras/own<tokenizer>",
        "no gain <here>",
        "more than 5% of what the adapter gains: loud <u> 75%;",
        "No update, the LoRA weights are zero: idle <u>;",
        "evaluate '<x>'",
    ):
        assert wanted in shown


def test_every_task_has_its_row_and_its_marks() -> None:
    kept, bars, points, errors, spectra, similar = figures_of(render_report(make_report()))
    # Five tasks keep something: a bar and a point each. Four recover something.
    assert len(marks(kept)) == len(marks(points)) == 5
    assert len(marks(bars)) == 4
    # 2 kinds x 3 layers, lm_head; 5 x 5, the diagonal warm.
    assert len(marks(errors)) == 7
    assert [style(cell)["fill"] for cell in marks(similar)].count("var(--hot)") == 5
    assert [style(cell)["fill"] for cell in marks(similar)].count("var(--data)") == 20
    for kind in ("band", "curve", "limit"):
        assert len(spectra.findall(f".//g[@class='{kind}']")) == 4
    shown = ["".join(figure.itertext()) for figure in (bars, points, errors, similar, kept)]
    assert "a&b" not in shown[0]
    assert "a&b: 0.9000 (0.8800 to 0.9200)" in shown[4]
    for said, figure in (
        (f"{HOSTILE[0]}: 0.9500 (0.9300 to 0.9700)", shown[0]),
        (f"{HOSTILE[1]}: 1.00 kB, 0.9000", shown[1]),
        ("q_proj, layer 2: 0.3000", shown[2]),
        (f"{HOSTILE[3]}, {HOSTILE[4]}: -0.250", shown[3]),
    ):
        assert said in figure


def test_figures_take_the_colours_of_the_page() -> None:
    for figure in figures_of(render_report(make_report())):
        for element in figure.iter():
            for value in style(element).values():
                assert not value.startswith("#"), "no colour that is the same on a dark page"
        for text in figure.iter("text"):
            assert style(text)["fill"] in ("var(--ink)", "var(--quiet)")


def test_ids_stand_once_in_a_page() -> None:
    ids = [a["id"] for _, a in Page(render_report(make_report())).elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_bars_are_as_long_as_their_values() -> None:
    bars = plots.Bars("t", "c", ["low", "high"], [0.25, 1.0], [(0.2, 0.3), None])
    low, high = map(extent, marks(drawn(bars)))
    assert low.width == pytest.approx(high.width / 4, abs=0.2)
    bars = plots.Bars("t", "c", ["down", "up"], [-0.5, 0.5])
    negative, positive = map(extent, marks(drawn(bars)))
    assert negative.width == pytest.approx(positive.width, abs=0.2)
    assert negative.x < positive.x
    assert negative.y < positive.y


def test_cells_are_as_dark_as_their_values() -> None:
    cells = {("q", "0"): 0.1, ("q", "1"): 0.4, ("v", "1"): 0.0}
    found = marks(drawn(plots.Heatmap("t", "c", cells, ["q", "v"], ["0", "1"], "errors")))
    assert [darkness(cell) for cell in found] == pytest.approx([0.25, 1, 0], abs=0.005)
    first, second, third = map(extent, found)
    assert first.y == second.y < third.y
    assert first.x < second.x == third.x


def test_cosines_are_warm_above_zero_and_cold_below() -> None:
    plot = plots.Similarities("t", "c", ["a", "b"], [[1.0, -0.5], [0.0, 0.25]])
    found = marks(drawn(plot))
    fills = [style(cell)["fill"] for cell in found]
    assert fills == ["var(--hot)", "var(--data)", "none", "var(--hot)"]
    assert [darkness(cell) for cell in found] == pytest.approx([1, 0.5, 0, 0.25], abs=0.01)


def test_points_stand_where_their_values_are() -> None:
    values = [0.5, 0.75, 1.0]
    plot = plots.Sizes("t", "c", ["a", "b", "c"], [1000, 10000, 100000], values, "bytes", "kept")
    found = marks(drawn(plot))
    xs = [float(point.get("x", "")) for point in found]
    ys = [float(point.get("y", "")) for point in found]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[0] > ys[2]


def test_sizes_that_are_all_one_have_an_axis() -> None:
    text = plots.render_svg(plots.Sizes("t", "c", ["a", "b"], [500, 500], [1.0, 1.0], "b", "kept"))
    assert "500 B" in text


def test_a_label_of_any_characters_is_drawn() -> None:
    """What mathematics would be, what XML cannot hold, and what is too long to be shown whole."""
    odd = ["$x^2$", "$\\frac", "a\ufffeb", "layers.0." + "x" * 60 + ".q_proj"]
    figure = drawn(plots.Bars("t", "c", odd, [1.0] * 4))
    labels = [text.text or "" for text in figure.iter("text")]
    assert {"$x^2$", "$\\frac", "a\\ufffeb"} <= set(labels)
    [cut] = [label for label in labels if label.startswith("layers.0.")]
    assert cut.endswith(".q_proj")
    assert len(cut) < 45
    assert f"{odd[3]}: 1.0000" in "".join(figure.itertext())


def test_a_user_s_own_settings_of_matplotlib_change_nothing() -> None:
    import matplotlib

    plot = plots.Bars("t", "c", ["a"], [1.0])
    before = plots.render_svg(plot)
    with matplotlib.rc_context({"axes.facecolor": "black", "svg.fonttype": "path"}):
        assert plots.render_svg(plot) == before


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
            kl_kept=None,
            kl_kept_interval=None,
            kl_kept_undefined_because="no original given",
            recovered_undefined_because="no original given",
        )
        for name in HOSTILE
    ]
    nothing = {"judged": 0, "mean": None, "median": None, "worst": None, "worst_task": None}
    page = Page(
        render_report(
            make_report(
                tasks=tasks, spectra=[], similarity=None, recovered=nothing, kl_kept=nothing
            )
        )
    )
    shown = "".join(page.text)
    assert shown.count("KL kept and Recovered unknown: no original given") == 5
    assert "For 5 of 5 tasks as recorded at compression" in shown
    assert page.count("svg") == 1


def test_one_task_of_one_module_is_enough() -> None:
    task = make_task("only", 1.0, module_errors={"lm_head": None}, recovered_interval=None)
    bars = figures_of(render_report(make_report(tasks=[task], similarity=None)))[0]
    assert len(marks(bars)) == 1


def test_many_tasks_are_cut_and_it_says_so() -> None:
    tasks = [make_task(f"t{i}", i / 1000) for i in range(150)]
    cosines = [[0.5] * 100 for _ in range(100)]
    similarity = {"tasks": [f"t{i}" for i in range(100)], "cosines": cosines}
    text = render_report(make_report(tasks=tasks, similarity=similarity))
    shown = "".join(Page(text).text)
    assert "The worst 100 of 150 tasks are shown" in shown
    assert "The first 100 of 150 tasks are shown" in shown
    [image] = [a for t, a in Page(text).elements if t == "image"]
    assert (image["href"] or "").startswith("data:image/png;base64,")
    assert len(text) < 600_000


def test_the_same_data_makes_the_same_bytes() -> None:
    assert render_report(make_report()) == render_report(make_report())
