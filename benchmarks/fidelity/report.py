"""The table and the plot."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import cpu_name, record

from fidelity.points import Point
from fidelity.seeds import PINS

SCHEMA_VERSION = 1
KINDS = {"in_basis": ("in basis", "ratio"), "held_out": ("added later", "ratio_with_added")}
"""Kind of task -> its name, and the ratio of the files that hold it."""


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Command, versions and machine."""
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}"
    run = record(args, machine, "torch", "transformers", "safetensors")
    del run["arguments"]
    return {
        **run,
        "python": run["versions"]["python"],
        "versions": run["versions"] | PINS,
        "machine": run["device"],
        "threads": torch.get_num_threads(),
    }


# --- table ---------------------------------------------------------------------------------------


def table(points: Iterable[Point]) -> str:
    """Markdown: a row a point; recovered fractions in per cent, mean and worst task."""
    lines = [
        "| collection | representation | asked | ratio | in basis | worst | added | worst | error |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += (_row(point) for point in points)
    return "\n".join(lines)


def _row(point: Point) -> str:
    head = f"| {point['collection']} | {point['representation']} | {point['ratio_asked']:g}"
    if "reason" in point:
        return f"{head} | out of reach | | | | | |"
    cells = [f"{point['ratio']:.2f}"]
    for kind in KINDS:
        figures = point[kind]
        cells += [f"{100 * figures[name]:.1f}" if figures else "" for name in ("mean", "worst")]
    inside = point["in_basis"]
    cells.append(f"{inside['mean_error']:.3f}" if inside else "")
    return " | ".join([head, *cells]) + " |"


# --- plot ----------------------------------------------------------------------------------------


def lines_of(
    points: Iterable[Point], collection: str, kind: str
) -> dict[str, list[tuple[float, float, float]]]:
    """Representation -> (ratio reached, mean, worst recovered fraction), by ratio.

    Sizes that a method reaches for several ratios asked are one place.
    """
    _, ratio = KINDS[kind]
    lines: dict[str, dict[float, tuple[float, float, float]]] = {}
    for point in points:
        if point["collection"] == collection and point.get(kind):
            figures = point[kind]
            place = (point[ratio], figures["mean"], figures["worst"])
            lines.setdefault(point["representation"], {})[point[ratio]] = place
    return {name: [line[at] for at in sorted(line)] for name, line in lines.items()}


# What a picture shows as lost where nothing is.
_LEAST_LOST = 5e-4


def plot(report: dict[str, Any], path: Path) -> None:
    """Mean recovered fraction against ratio: a panel for each collection and kind of task.

    A thin dashed line is the worst task. The axis is logarithmic in what is lost.

    Raises:
        ValueError: matplotlib knows no picture of the kind that ``path`` ends with.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Without it an SVG differs from run to run.
    matplotlib.rcParams["svg.hashsalt"] = "vllm-vlora"
    collections = list(report["collections"])
    figure = Figure(figsize=(5.5 * len(KINDS), 4.2 * len(collections)), layout="constrained")
    panels = figure.subplots(len(collections), len(KINDS), squeeze=False, sharex=True)
    names = list(dict.fromkeys(point["representation"] for point in report["points"]))
    colours = {name: matplotlib.colormaps["tab10"](place % 10) for place, name in enumerate(names)}
    for row, collection in zip(panels, collections):
        for axis, kind in zip(row, KINDS):
            lines = lines_of(report["points"], collection, kind)
            _draw(axis, lines, colours)
            axis.set_title(f"{collection}, {KINDS[kind][0]}")
    figure.supxlabel("times smaller than the adapters' LoRA weights at 16 bits")
    figure.supylabel("recovered fraction of the adapter's gain (mean of tasks; dashed: worst)")
    handles = [
        matplotlib.lines.Line2D([], [], color=colour, marker="o", label=name)
        for name, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(
    axis: Any, lines: dict[str, list[tuple[float, float, float]]], colours: dict[str, Any]
) -> None:
    for name, places in lines.items():
        ratios, means, worsts = zip(*places)
        axis.plot(ratios, _lost(means), marker="o", markersize=4, color=colours[name])
        axis.plot(ratios, _lost(worsts), linestyle="--", linewidth=0.7, color=colours[name])
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    # By what is lost, so that 0.99 and 0.999 are apart; harm has no bottom, and all of it is at zero.
    axis.set_yscale("log")
    axis.set_ylim(1.0, _LEAST_LOST / 2)
    axis.set_yticks([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda lost, _: f"{1 - lost:.4g}")
    axis.grid(alpha=0.3)


def _lost(recovered: Sequence[float]) -> list[float]:
    return [min(max(1 - value, _LEAST_LOST), 1.0) for value in recovered]
