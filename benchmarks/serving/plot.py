"""Throughput over the base model's against the number of distinct tasks, a line a configuration."""

from __future__ import annotations

from typing import Any

from serving.configurations import BASE
from serving.report import DECODE, PREFILL

_PANELS = ((PREFILL, "prefill"), (DECODE, "decode"))


def plot_ratios(report: dict[str, Any], path: str) -> None:
    """Draw uniform loads of a report into a picture; its kind is what ``path`` ends with.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib knows no picture of that kind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (rate, title) in zip(axes, _PANELS):
        _draw(axis, lines_of(report["rows"], rate), title)
    axes[0].set_ylabel("throughput / base model without LoRA (p50, p20 to p80)")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(report["device"])
    figure.savefig(path, dpi=150)


def lines_of(
    rows: list[dict[str, Any]], rate: str
) -> dict[str, list[tuple[int, float, float, float]]]:
    """Configuration -> (tasks, p20, p50, p80) of the ratio to base, in the order of tasks."""
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["tasks"]):
        # A base model's ratio to itself is 1 everywhere.
        if row["popularity"] != "uniform" or row["configuration"] == BASE or not row["to_base"]:
            continue
        ratio = row["to_base"][rate]
        point = (row["tasks"], ratio["p20"], ratio["p50"], ratio["p80"])
        lines.setdefault(row["configuration"], []).append(point)
    return lines


def _draw(axis: Any, lines: dict[str, list[tuple[int, float, float, float]]], title: str) -> None:
    for name, points in lines.items():
        tasks, low, middle, high = zip(*points)
        errors = [[m - p for m, p in zip(middle, low)], [p - m for m, p in zip(middle, high)]]
        axis.errorbar(tasks, middle, yerr=errors, marker="o", capsize=2, label=name)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("distinct tasks")
    axis.set_title(title)
