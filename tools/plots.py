"""Figures of a fidelity report as SVG text for an HTML page, which colours them by its style sheet.

Written by hand and not with a plotting library: the figures follow the page's light or dark colours,
their text can be searched, nothing needs to be installed, and equal data gives equal bytes.

Every function takes plain data and returns one ``<svg>`` element. Classes that the page must style:
``axis`` and ``grid`` (lines), ``mark`` (data), ``band`` (spreads), ``limit`` (reference lines),
``heat`` and ``cold`` (cells of a heatmap, whose opacity is their value), ``note`` (small text).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

_LABEL_CHARACTERS = 32
# Half the height of small text, to centre it on a line.
_HALF_LINE = 4


class Bar(NamedTuple):
    """One task: its value and, where known, the interval around it."""

    label: str
    value: float
    interval: tuple[float, float] | None


class Point(NamedTuple):
    """One task in a scatter plot."""

    label: str
    x: float
    y: float


class Band(NamedTuple):
    """A line with the spread around it, at 1, 2, ...; ``mark`` is a place on the x axis."""

    label: str
    low: Sequence[float]
    middle: Sequence[float]
    high: Sequence[float]
    mark: float


class _Axis(NamedTuple):
    """Maps data to pixels: ``low`` lies at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them: steps of 1, 2 or 5 times 10^n."""
    assert high > low
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars with intervals, in the order given; a line marks 1."""
    width, left, right, row, top = 760, 240, 70, 20, 8
    height = top + row * len(rows) + 30
    ends = [end for bar in rows for end in (bar.interval or (bar.value, bar.value))]
    low = min(0.0, *(bar.value for bar in rows), *ends)
    axis = _padded(low, max(1.0, *(bar.value for bar in rows), *ends), left, width - right)
    bottom = top + row * len(rows)
    parts = _vertical_grid(axis, top, bottom)
    for place, bar in enumerate(rows):
        middle = top + row * place + row / 2
        zero, end = axis.at(max(axis.low, 0.0)), axis.at(bar.value)
        parts.append(_text(left - 8, middle + _HALF_LINE, _short(bar.label), "end"))
        parts.append(
            f'<rect class="mark" x="{min(zero, end):.1f}" y="{middle - 6:.1f}" '
            f'width="{abs(end - zero):.1f}" height="12">{_title(_bar_title(bar))}</rect>'
        )
        if bar.interval is not None:
            ends_at = [axis.at(end) for end in bar.interval]
            parts.append(_line(ends_at[0], middle, ends_at[1], middle, "limit"))
            parts += [_line(x, middle - 4, x, middle + 4, "limit") for x in ends_at]
        parts.append(_text(width - 4, middle + _HALF_LINE, f"{bar.value:.4f}", "end"))
    parts.append(_line(axis.at(1.0), top, axis.at(1.0), bottom, "axis"))
    return _svg(width, height, "Recovered fraction by task", parts)


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points over a logarithmic x axis; ``x`` must be positive."""
    width, height, left, right, top, bottom = 760, 320, 70, 20, 12, 44
    xs = [math.log10(point.x) for point in points]
    x_axis = _padded(min(xs), max(xs), left, width - right)
    ys = [point.y for point in points]
    y_axis = _padded(min(*ys, 1.0), max(*ys, 1.0), height - bottom, top)
    parts = []
    for value in ticks(y_axis.low, y_axis.high):
        y = y_axis.at(value)
        parts.append(_line(left, y, width - right, y, "grid"))
        parts.append(_text(left - 8, y + _HALF_LINE, f"{value:g}", "end"))
    for value in _log_ticks(x_axis.low, x_axis.high):
        x = x_axis.at(math.log10(value))
        parts.append(_line(x, top, x, height - bottom, "grid"))
        parts.append(_text(x, height - bottom + 16, _size(value), "middle"))
    parts.append(_line(left, y_axis.at(1.0), width - right, y_axis.at(1.0), "axis"))
    parts += [
        f'<circle class="mark" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(point.y):.1f}" r="4">'
        f"{_title(f'{point.label}: {_size(point.x)}, {point.y:.4f}')}</circle>"
        for point, x in zip(points, xs)
    ]
    parts.append(_text((left + width - right) / 2, height - 6, x_label, "middle"))
    parts.append(_text(left, top - 2, y_label, "start"))
    return _svg(width, height, f"{y_label} against {x_label}", parts)


def heatmap(
    cells: Mapping[tuple[str, str], float], rows: Sequence[str], columns: Sequence[str], label: str
) -> str:
    """Cells by (row, column), the greatest the darkest; absent cells stay empty."""
    side, left, top = 22, 130, 8
    greatest = max(cells.values(), default=0.0) or 1.0
    parts = []
    for place, row in enumerate(rows):
        y = top + side * place
        parts.append(_text(left - 8, y + side / 2 + _HALF_LINE, _short(row), "end"))
        for position, column in enumerate(columns):
            value = cells.get((row, column))
            if value is not None:
                title = _title(f"{row}, layer {column}: {value:.4f}")
                x = left + side * position
                parts.append(_cell(x, y, side, value / greatest, "heat", title))
    bottom = top + side * len(rows)
    every = max(1, math.ceil(len(columns) / 24))
    for position, column in enumerate(columns):
        if position % every == 0:
            middle = left + side * position + side / 2
            parts.append(_text(middle, bottom + 14, column, "middle"))
    parts += _legend(left, bottom + 26, greatest)
    width = max(left + side * len(columns) + 10, left + 230)
    return _svg(width, bottom + 50, label, parts)


def spectra(panels: Sequence[Band]) -> str:
    """Small panels, one a kind of module: median line, spread band, kept rank as a vertical line."""
    columns, panel_width, panel_height, left, top = 3, 250, 150, 34, 22
    lines = math.ceil(len(panels) / columns)
    parts = []
    for place, panel in enumerate(panels):
        x = panel_width * (place % columns)
        y = panel_height * (place // columns)
        parts += _panel(panel, x + left, x + panel_width - 12, y + top, y + panel_height - 24)
    width = panel_width * min(columns, max(1, len(panels)))
    return _svg(width, panel_height * lines, "Singular values by kind of module", parts)


def similarity(labels: Sequence[str], cosines: Sequence[Sequence[float]]) -> str:
    """A square of cosines in [-1, 1]: warm above zero, cold below; rows and columns as given."""
    count = len(labels)
    named = count <= 40
    side: float = 18 if named else max(4, 640 // count)
    left, top = (200, 8) if named else (8, 8)
    parts = []
    for row in range(count):
        if named:
            middle = top + side * (row + 0.5) + _HALF_LINE
            parts.append(_text(left - 8, middle, _short(labels[row], 26), "end"))
        for column in range(count):
            value = cosines[row][column]
            title = ""
            if named:
                title = _title(f"{labels[row]}, {labels[column]}: {value:.3f}")
            kind = "heat" if value >= 0 else "cold"
            x, y = left + side * column, top + side * row
            parts.append(_cell(x, y, side, abs(value), kind, title))
    edge = side * count
    return _svg(left + edge + 10, top + edge + 8, "Similarity of the tasks' updates", parts)


# --- pieces ---------------------------------------------------------------------------------------


def _panel(panel: Band, left: float, right: float, top: float, bottom: float) -> list[str]:
    count = len(panel.middle)
    x_axis = _Axis(0.5, max(count, panel.mark) + 0.5, left, right)
    y_axis = _Axis(0.0, max(*panel.high, 1e-9) * 1.05, bottom, top)
    places = [x_axis.at(place + 1) for place in range(count)]
    middle = _path(places, [y_axis.at(value) for value in panel.middle])
    outline = _path(
        [*places, *reversed(places)],
        [y_axis.at(value) for value in [*panel.high, *reversed(panel.low)]],
    )
    mark = x_axis.at(panel.mark + 0.5)
    parts = [
        _text(left, top - 8, _short(panel.label), "start", "name"),
        _line(left, bottom, right, bottom, "axis"),
        _line(left, top, left, bottom, "axis"),
        f'<path class="band" d="{outline} Z"/>',
        f'<path class="curve" d="{middle}"/>',
        _line(mark, top, mark, bottom, "limit"),
    ]
    for value in ticks(0.0, y_axis.high, 3):
        parts.append(_text(left - 4, y_axis.at(value) + _HALF_LINE, f"{value:g}", "end"))
    for value in ticks(1.0, max(2.0, float(count)), 4):
        if value == int(value) and value <= count:
            parts.append(_text(x_axis.at(value), bottom + 14, f"{value:g}", "middle"))
    return parts


def _padded(low: float, high: float, start: float, end: float) -> _Axis:
    """An axis with a little room at both ends, also where all values are one."""
    room = (high - low) * 0.04 or max(abs(high) * 0.1, 0.1)
    return _Axis(low - room if low != 0.0 else low, high + room, start, end)


def _vertical_grid(axis: _Axis, top: float, bottom: float) -> list[str]:
    parts = []
    for value in ticks(axis.low, axis.high):
        x = axis.at(value)
        parts.append(_line(x, top, x, bottom, "grid"))
        parts.append(_text(x, bottom + 16, f"{value:g}", "middle"))
    return parts


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within 10^low .. 10^high; few if there are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [
        f * 10.0**p for p in powers for f in (1, 2, 5) if low <= math.log10(f * 10.0**p) <= high
    ]
    return found if len(found) <= 8 else [value for value in found if f"{value:e}"[0] == "1"]


def _legend(x: float, y: float, greatest: float) -> list[str]:
    parts = [_text(x - 8, y + 9, "0", "end")]
    parts += [_cell(x + 12 * step, y, 12, step / 10, "heat", "") for step in range(11)]
    parts.append(_text(x + 12 * 11 + 8, y + 9, f"{greatest:.3g}", "start"))
    return parts


def _cell(x: float, y: float, side: float, opacity: float, kind: str, title: str) -> str:
    shape = f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" '
    shape += f'fill-opacity="{min(1.0, max(0.0, opacity)):.3g}"'
    return f"{shape}>{title}</rect>" if title else f"{shape}/>"


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "note") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _bar_title(bar: Bar) -> str:
    text = f"{bar.label}: {bar.value:.4f}"
    return (
        text if bar.interval is None else f"{text} ({bar.interval[0]:.4f} to {bar.interval[1]:.4f})"
    )


def _short(text: str, limit: int = _LABEL_CHARACTERS) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _size(count: float) -> str:
    from vllm_vlora.checkpoint.card import format_bytes

    return format_bytes(round(count))


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([opening, *parts, "</svg>"])
