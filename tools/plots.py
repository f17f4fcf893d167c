"""Figures of the HTML pages and PNG files, drawn by matplotlib.

A figure is drawn once, in the colours of a light page. In a page it is an ``<svg>`` whose text can be
searched, whose colours are the style sheet's, light or dark, and whose marks say their values when
pointed at. Equal data gives equal bytes.
"""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from vllm_vlora.errors import OptionError
from vllm_vlora.wording import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import FigureBase

# The light page's colours, by the names of the style sheet's variables.
COLOURS = {
    "ink": "#1b1f24",
    "line": "#d5dae0",
    "quiet": "#5b6570",
    "data": "#2f6db5",
    "hot": "#b5432f",
}
_INK, _LINE, _QUIET, _DATA, _HOT = COLOURS.values()
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_FONT = "DejaVu Sans"
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    # A task may be called "$x$".
    "text.parse_math": False,
    "font.family": _FONT,
    "font.size": 8,
    "figure.titlesize": 10,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.bottom": False,
    "ytick.left": False,
    "text.color": _INK,
    "axes.titlecolor": _INK,
    "axes.labelcolor": _QUIET,
    "axes.edgecolor": _QUIET,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "grid.color": _LINE,
}
_WIDTH = 7.9
_DPI = 150
_ALPHA = 0.75
# More rows and columns than these are an image without names.
_MOST_NAMED = 40
_MOST_COLUMN_NAMES = 24
_LABEL_CHARACTERS = 40
# Kinds of marks, which become classes in the page.
_KINDS = ("mark", "band", "curve", "limit")
_NUMBER = re.compile(r"\d+\.\d{3,}")
_COLOUR = re.compile("#[0-9a-f]{6}")


class Band(NamedTuple):
    """A line with the spread around it, at 1, 2, ...; ``mark`` is a place on the x axis."""

    label: str
    low: Sequence[float]
    middle: Sequence[float]
    high: Sequence[float]
    mark: float


@dataclass(frozen=True)
class Plot(ABC):
    """What is drawn, under a title and over a caption."""

    title: str
    caption: str

    @property
    @abstractmethod
    def height(self) -> float:
        """Inches."""

    @abstractmethod
    def draw(self, canvas: FigureBase) -> list[str]:
        """Draw on an empty canvas; returns what each mark says when pointed at, in drawing order."""


@dataclass(frozen=True)
class Bars(Plot):
    """A value for each label, in the order given, with the interval around it where one is known.

    A line stands at ``limit``.
    """

    labels: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[Sequence[float] | None] = field(default=())
    limit: float = 0.0

    @property
    def height(self) -> float:
        return 0.6 + 0.2 * len(self.labels)

    def draw(self, canvas: FigureBase) -> list[str]:
        axes = canvas.subplots()
        places = range(len(self.labels))
        for bar in axes.barh(places, self.values, height=0.6, color=_DATA, alpha=_ALPHA):
            bar.set_gid("mark")
        titles = [f"{label}: {value:.4f}" for label, value in zip(self.labels, self.values)]
        for place, interval in enumerate(self.intervals):
            if interval is not None:
                axes.plot(interval, (place, place), color=_INK, linewidth=1)
                titles[place] += f" ({interval[0]:.4f} to {interval[1]:.4f})"
        axes.axvline(self.limit, color=_QUIET, linewidth=1)
        _name_rows(axes, self.labels)
        for place, value in enumerate(self.values):
            across = axes.get_yaxis_transform()
            axes.text(1.01, place, f"{value:.4f}", transform=across, va="center", color=_QUIET)
        axes.set_ylim(len(self.labels) - 0.5, -0.5)
        axes.grid(axis="x")
        return titles


@dataclass(frozen=True)
class Sizes(Plot):
    """A point for each label over a logarithmic axis of bytes, which must be positive."""

    labels: Sequence[str]
    nbytes: Sequence[int]
    values: Sequence[float]
    x_label: str
    y_label: str

    @property
    def height(self) -> float:
        return 3.3

    def draw(self, canvas: FigureBase) -> list[str]:
        from matplotlib.ticker import LogLocator

        axes = canvas.subplots()
        axes.scatter(self.nbytes, self.values, s=20, color=_DATA, alpha=_ALPHA, gid="mark")
        axes.axhline(1.0, color=_QUIET, linewidth=1)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.xaxis.set_major_formatter(lambda value, _: _size(value))
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        axes.grid()
        rows = zip(self.labels, self.nbytes, self.values)
        return [f"{label}: {_size(size)}, {value:.4f}" for label, size, value in rows]


@dataclass(frozen=True)
class Heatmap(Plot):
    """Cells by (row, column), the greatest the darkest; absent cells stay empty."""

    cells: Mapping[tuple[str, str], float]
    rows: Sequence[str]
    columns: Sequence[str]
    label: str

    @property
    def height(self) -> float:
        return 1.0 + 0.25 * len(self.rows)

    def draw(self, canvas: FigureBase) -> list[str]:
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        axes = canvas.subplots()
        colours = LinearSegmentedColormap.from_list("errors", [(_HOT, 0.0), (_HOT, 1.0)])
        scale = Normalize(0, max(self.cells.values(), default=0.0) or 1.0)
        places = [
            (self.columns.index(column), self.rows.index(row), value)
            for (row, column), value in self.cells.items()
        ]
        _draw_cells(axes, places, colours, scale)
        _name_rows(axes, self.rows)
        every = max(1, math.ceil(len(self.columns) / _MOST_COLUMN_NAMES))
        axes.set_xticks(range(0, len(self.columns), every), self.columns[::every])
        axes.set_xlim(-0.5, len(self.columns) - 0.5)
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_xlabel("layer")
        _draw_legend(canvas, axes, colours, scale, self.label)
        return [
            f"{row}, layer {column}: {value:.4f}" for (row, column), value in self.cells.items()
        ]


@dataclass(frozen=True)
class Similarities(Plot):
    """A square of cosines in [-1, 1]: warm above zero, cold below; rows and columns as given."""

    labels: Sequence[str]
    cosines: Sequence[Sequence[float]]

    @property
    def _named(self) -> bool:
        return len(self.labels) <= _MOST_NAMED

    @property
    def height(self) -> float:
        longest = max(len(_short(label)) for label in self.labels)
        return 0.6 + 0.2 * len(self.labels) + 0.07 * longest if self._named else 6.5

    def draw(self, canvas: FigureBase) -> list[str]:
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        axes = canvas.subplots()
        stops = [(0.0, (_DATA, 1.0)), (0.5, (_DATA, 0.0)), (0.5, (_HOT, 0.0)), (1.0, (_HOT, 1.0))]
        # Odd, so that zero has a colour of its own: none.
        colours = LinearSegmentedColormap.from_list("cosines", stops, N=257)
        scale = Normalize(-1, 1)
        titles = []
        if self._named:
            cells = [(x, y, v) for y, row in enumerate(self.cosines) for x, v in enumerate(row)]
            _draw_cells(axes, cells, colours, scale)
            titles = [f"{self.labels[y]}, {self.labels[x]}: {v:.3f}" for x, y, v in cells]
            _name_rows(axes, self.labels)
            axes.set_xticks(
                range(len(self.labels)), [_short(label) for label in self.labels], rotation=90
            )
            axes.set_xlim(-0.5, len(self.labels) - 0.5)
            axes.set_ylim(len(self.labels) - 0.5, -0.5)
            axes.set_aspect("equal")
        else:
            axes.imshow(self.cosines, cmap=colours, norm=scale, interpolation="none")
            axes.set(xticks=[], yticks=[])
        _draw_legend(canvas, axes, colours, scale, "cosine")
        return titles


@dataclass(frozen=True)
class Spectra(Plot):
    """Small panels, one a kind of module: median line, spread band, kept rank as an upright line."""

    panels: Sequence[Band]

    @property
    def height(self) -> float:
        return 1.7 * self._rows

    @property
    def _rows(self) -> int:
        return max(1, math.ceil(len(self.panels) / 3))

    def draw(self, canvas: FigureBase) -> list[str]:
        from matplotlib.ticker import MaxNLocator

        grid = canvas.subplots(self._rows, 3, squeeze=False).flatten()
        for axes, panel in zip(grid, self.panels):
            places = range(1, len(panel.middle) + 1)
            axes.fill_between(
                places, panel.low, panel.high, color=_DATA, alpha=0.25, linewidth=0, gid="band"
            )
            axes.plot(places, panel.middle, color=_DATA, gid="curve")
            axes.axvline(panel.mark + 0.5, color=_INK, linewidth=1, gid="limit")
            axes.set_title(_short(panel.label))
            axes.set_xlim(0.5, max(len(places), panel.mark) + 1)
            axes.set_ylim(0, max(*panel.high, 1e-9) * 1.05)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axes in grid[len(self.panels) :]:
            axes.remove()
        return []


def check_matplotlib(option: str, extra: str = "plot") -> None:
    """Raise OptionError before anything is computed: ``option`` has nothing to draw with.

    Args:
        extra: of this package, which brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f'{option} needs matplotlib; pip install "vllm-vlora[{extra}]"'
        ) from error


def render_svg(plot: Plot) -> str:
    """An ``<svg>`` element for a page that has the variables of :data:`COLOURS`."""
    from matplotlib.figure import Figure

    # The figures of a page share no id.
    with _settings({"svg.hashsalt": plot.title}):
        canvas = Figure(figsize=(_WIDTH, plot.height), layout="constrained")
        titles = plot.draw(canvas)
        # Nothing reaches over its axes; clip paths would name addresses, if only in the page.
        for artist in canvas.findobj():
            artist.set_clip_on(False)
        stream = BytesIO()
        with warnings.catch_warnings():
            # The browser may have the glyphs that matplotlib's font lacks.
            warnings.filterwarnings("ignore", "Glyph")
            canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    linked = {element.get(_HREF, "")[1:] for element in root.iter()}
    for element in root.iter():
        _tidy(element, linked)
    _add_titles(root, titles)
    root.set("role", "img")
    root.set("aria-label", shown(plot.title))
    return ElementTree.tostring(root, encoding="unicode")


def render_png(title: str, plots: Sequence[Plot]) -> bytes:
    """All of them in one picture, one below the other."""
    from matplotlib.figure import Figure

    heights = [plot.height + 0.4 for plot in plots]
    with _settings({}):
        canvas = Figure(figsize=(_WIDTH, sum(heights) + 0.4), layout="constrained")
        canvas.suptitle(shown(title))
        parts = canvas.subfigures(len(plots), 1, squeeze=False, height_ratios=heights)
        for plot, [part] in zip(plots, parts):
            part.suptitle(plot.title)
            plot.draw(part)
        stream = BytesIO()
        canvas.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


# --- pieces ---------------------------------------------------------------------------------------


@contextmanager
def _settings(more: Mapping[str, Any]) -> Iterator[None]:
    """Our settings over matplotlib's defaults, whatever this user's are."""
    from matplotlib import style

    with style.context(["default", {**_SETTINGS, **more}]):
        yield


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])


def _draw_cells(
    axes: Axes, cells: Iterable[tuple[int, int, float]], colours: Colormap, scale: Normalize
) -> None:
    """Squares of side 1 around (x, y)."""
    from matplotlib.collections import PolyCollection

    corners = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
    placed = list(cells)
    axes.add_collection(
        PolyCollection(
            [[(x + right, y + down) for right, down in corners] for x, y, _ in placed],
            array=[value for _, _, value in placed],
            cmap=colours,
            norm=scale,
            gid="mark",
        )
    )


def _draw_legend(
    canvas: FigureBase, axes: Axes, colours: Colormap, scale: Normalize, label: str
) -> None:
    from matplotlib.cm import ScalarMappable

    # Few enough steps to be drawn as shapes, which follow the page's colours.
    steps = ScalarMappable(scale, colours.resampled(21))
    canvas.colorbar(steps, ax=axes, label=label, aspect=15)


def _short(text: str) -> str:
    """Cut in the middle: names of modules differ at both ends."""
    text = shown(text)
    kept = (_LABEL_CHARACTERS - 3) // 2
    return text if len(text) <= _LABEL_CHARACTERS else f"{text[:kept]}...{text[-kept:]}"


def _size(count: float) -> str:
    from vllm_vlora.checkpoint.card import format_bytes

    return format_bytes(round(count))


# --- SVG of matplotlib to SVG in a page -----------------------------------------------------------

_HREF = "{http://www.w3.org/1999/xlink}href"
_SVG = "{http://www.w3.org/2000/svg}"


def _tidy(element: ElementTree.Element, linked: set[str]) -> None:
    """No name spaces, no ids that could stand twice in a page, no style for the whole of it."""
    for child in [c for c in element if c.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
        element.remove(child)
    element.tag = element.tag.removeprefix(_SVG)
    element.tail = None
    if element.tag != "text":
        element.text = None
    attributes = dict(element.attrib)
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id" and value in _KINDS:
            element.set("class", value)
        elif name == _HREF:
            element.set("href", value)
        elif name == "style":
            value = value.replace(f"'{_FONT}'", "system-ui, sans-serif")
            element.set(name, _COLOUR.sub(lambda m: _VARIABLES.get(m[0], m[0]), value))
        elif name in ("d", "x", "y") or (name == "transform" and element.tag == "text"):
            # Hundredths of a point are enough, and half the page.
            short = _NUMBER.sub(lambda m: f"{float(m[0]):.2f}", value)
            element.set(name, " ".join(short.split()))
        elif name != "id" or value in linked:
            element.set(name, value)


def _add_titles(root: ElementTree.Element, titles: Iterable[str]) -> None:
    shapes = [
        shape
        for group in root.iter("g")
        if group.get("class") == "mark"
        for shape in (*group.iterfind("path"), *group.iter("use"))
    ]
    for shape, title in zip(shapes, titles, strict=True):
        ElementTree.SubElement(shape, "title").text = shown(title)
