"""Time against the number of distinct tasks, a line an operation, in panels."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Label -> (tasks, microseconds), by tasks.
Curves = Mapping[str, Sequence[tuple[int, float]]]


def draw_panels(panels: Mapping[str, Curves], title: str, what: str, path: Path) -> None:
    """Draw a panel for each title; the picture's kind is what ``path`` ends with.

    Raises:
        ValueError: matplotlib knows no picture of that kind.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, curves) in zip(axes, panels.items()):
        _draw(axis, name, what, curves)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _draw(axis: Any, title: str, what: str, curves: Curves) -> None:
    for name, points in curves.items():
        if name != "base":
            axis.plot(*zip(*points), marker="o", label=name)
        elif len(points) == 1:  # The number of tasks makes no difference to it.
            axis.axhline(points[0][1], color="grey", linestyle="--", label=name)
        else:
            axis.plot(*zip(*points), marker="o", color="grey", linestyle="--", label=name)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="distinct tasks", ylabel=what, yscale="log", title=title)
    axis.legend(fontsize="small")
