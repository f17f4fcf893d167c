"""Figures of ``analyze`` and ``diff`` as an HTML page or a PNG.

The page needs nothing but this package and opens without a network; PNG needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vllm_vlora.errors import OptionError
from vllm_vlora.tools import plots
from vllm_vlora.tools.html_report import POLICY, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR_STYLE = """
.bar { display: inline-block; height: 0.7em; background: var(--data); opacity: 0.75; }
.bar.below { background: var(--hot); }
td.bars { text-align: left; min-width: 16rem; }
"""
_MOST_NAMED = 40
_PNG_DPI = 150


@dataclass(frozen=True)
class Similarities:
    """A square of cosines; ``labels`` name rows and columns."""

    title: str
    caption: str
    labels: Sequence[str]
    cosines: Sequence[Sequence[float]]

    def html(self) -> str:
        return plots.similarity(self.labels, self.cosines)

    def draw(self, axes: Axes) -> None:
        image = axes.imshow(self.cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        if len(self.labels) <= _MOST_NAMED:
            places = range(len(self.labels))
            axes.set_xticks(places, self.labels, rotation=90)
            axes.set_yticks(places, self.labels)
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, label="cosine")


@dataclass(frozen=True)
class Spectra:
    """Singular values by kind of module."""

    title: str
    caption: str
    panels: Sequence[plots.Band]

    def html(self) -> str:
        return plots.spectra(self.panels)

    def draw(self, axes: Axes) -> None:
        for panel in self.panels:
            places = range(1, len(panel.middle) + 1)
            [curve] = axes.plot(places, panel.middle, marker="o", label=panel.label)
            axes.fill_between(places, panel.low, panel.high, color=curve.get_color(), alpha=0.2)
        axes.set_xlabel("place")
        axes.set_ylabel("singular value, update scaled to norm 1")
        axes.legend()


@dataclass(frozen=True)
class Bars:
    """A value for each label, in the order given."""

    title: str
    caption: str
    labels: Sequence[str]
    values: Sequence[float]

    def html(self) -> str:
        greatest = max((abs(value) for value in self.values), default=0.0) or 1.0
        rows = (
            f'<tr><td class="text">{escape(label)}</td><td>{value:.4f}</td><td class="bars">'
            f'<span class="bar{" below" if value < 0 else ""}" '
            f'style="width: {100 * abs(value) / greatest:.1f}%"></span></td></tr>'
            for label, value in zip(self.labels, self.values)
        )
        return f'<div class="scroll"><table><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>'

    def draw(self, axes: Axes) -> None:
        places = range(len(self.labels))
        axes.barh(places, self.values)
        axes.set_yticks(places, self.labels)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)


Figure: TypeAlias = Similarities | Spectra | Bars


def check_plot_path(path: Path) -> None:
    """Raise OptionError before anything is computed: no such kind of file, or no matplotlib."""
    if path.suffix not in (".html", ".png"):
        raise OptionError(f"--plot {path} is neither .html nor .png; give a file of one of them")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"--plot {path}: there is no folder {path.absolute().parent}; make it")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise OptionError(
                "a PNG needs matplotlib; pip install 'vllm-vlora[plot]', or give --plot FILE.html"
            ) from error


def save_plot(path: Path, title: str, figures: Sequence[Figure]) -> None:
    """Write figures as ``path`` (.html or .png), in place of a file that is there.

    Raises:
        OptionError: as :func:`check_plot_path`. OutputError: it cannot be written.
    """
    from vllm_vlora.atomic import write_file_atomic

    check_plot_path(path)
    data = render_page(title, figures).encode() if path.suffix == ".html" else _png(title, figures)
    write_file_atomic(path, data)


def render_page(title: str, figures: Sequence[Figure]) -> str:
    """An HTML page without scripts or addresses of other files; text from outside is escaped."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{_BAR_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    for figure in figures:
        parts.append(f"<h2>{escape(figure.title)}</h2>")
        caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
        parts.append(f"<figure>{figure.html()}{caption}</figure>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _png(title: str, figures: Sequence[Figure]) -> bytes:
    from io import BytesIO

    # Not pyplot, which keeps figures and may ask for a display.
    from matplotlib.figure import Figure as Canvas

    heights = [_height(figure) for figure in figures]
    canvas = Canvas(figsize=(9, sum(heights) + 0.6), layout="constrained")
    grid = canvas.subplots(len(figures), 1, squeeze=False, height_ratios=heights)
    canvas.suptitle(title)
    for figure, [axes] in zip(figures, grid):
        axes.set_title(figure.title)
        figure.draw(axes)
    stream = BytesIO()
    canvas.savefig(stream, format="png", dpi=_PNG_DPI)
    return stream.getvalue()


def _height(figure: Figure) -> float:
    """Inches."""
    if isinstance(figure, Bars):
        return 1.0 + 0.2 * len(figure.labels)
    return 7.0 if isinstance(figure, Similarities) else 4.0
