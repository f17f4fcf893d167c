"""Time and memory of every contestant, a pair of panels a size."""

from __future__ import annotations

from typing import Any

_COLOURS = {
    "ours": "tab:blue",
    "vlora": "tab:orange",
    "vlora-streaming": "tab:red",
    "lorashare": "tab:green",
    "exact": "tab:grey",
}


def draw(cells: list[dict[str, Any]], title: str, path: str) -> None:
    """Bars of seconds and of peak memory on logarithmic axes; its kind is what ``path`` ends with.

    Raises:
        ValueError: matplotlib knows no picture of that kind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 3.6 * len(cells)), 6.4), layout="constrained")
    axes = figure.subplots(2, len(cells), squeeze=False)
    for column, cell in enumerate(cells):
        head = f"{cell['d_in']} -> {cell['d_out']}\n{cell['adapters']} adapters"
        _bars(axes[0][column], cell["rows"], "seconds", 1.0)
        _bars(axes[1][column], cell["rows"], "peak_nbytes", 1e-6)
        axes[0][column].set_title(head)
    axes[0][0].set_ylabel("seconds (median)")
    axes[1][0].set_ylabel("peak MB above the start")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=130)


def _bars(axis: Any, rows: dict[str, Any], key: str, unit: float) -> None:
    names = list(rows)
    values = [rows[name][key] * unit for name in names]
    bars = axis.bar(names, values, color=[_COLOURS[name] for name in names])
    labels = [
        ("> " if rows[name]["stopped"] else "") + (f"{value:.0f}" if value > 99 else f"{value:.2g}")
        for name, value in zip(names, values)
    ]
    axis.bar_label(bars, labels, fontsize="small")
    axis.set_yscale("log")
    axis.tick_params(axis="y", which="minor", labelleft=False)
    axis.margins(y=0.15)
    axis.tick_params(axis="x", labelrotation=30, labelsize="small")
