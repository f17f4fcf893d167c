"""Time of one layer against the number of distinct tasks, a line an operation."""

from __future__ import annotations

from typing import Any

from kernelbench.report import Key

Curves = dict[str, list[tuple[int, float]]]


def panels(sums: dict[Key, dict[str, float]], mode: str) -> dict[str, Curves]:
    """Title -> label -> (tasks, us), for every model and kind of batch with two or more counts."""
    found: dict[str, Curves] = {}
    for (
        model,
        phase,
        tokens,
        tasks,
        mode_,
    ), by_label in sums.items():
        if mode_ != mode:
            continue
        titles = [f"{model}, {phase}, {tokens} tokens"]
        if phase == "decode" and tokens == tasks:
            titles.append(f"{model}, decode, a token a task")
        for title in titles:
            for name, us in by_label.items():
                found.setdefault(title, {}).setdefault(name, []).append((tasks, us))
    return {
        title: {name: sorted(points) for name, points in curves.items()}
        for title, curves in found.items()
        if any(len(points) > 1 for points in curves.values())
    }


def draw(sums: dict[Key, dict[str, float]], mode: str, title: str, path: str) -> None:
    """Draw the sums into a picture; its kind is what ``path`` ends with.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib knows no picture of that kind, or there is nothing to draw.
    """
    from matplotlib.figure import Figure

    found = panels(sums, mode)
    if not found:
        raise ValueError("a plot needs whole layers with two or more numbers of tasks")
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, curves) in zip(axes, found.items()):
        _draw(axis, name, curves)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _draw(axis: Any, title: str, curves: Curves) -> None:
    for name, points in curves.items():
        tasks, us = zip(*points)
        axis.plot(
            tasks,
            us,
            marker="o",
            label=name,
            color="grey" if name == "base" else None,
            linestyle="--" if name == "base" else "-",
        )
    axis.set_xscale("log", base=2)
    axis.set(xlabel="distinct tasks", yscale="log", title=title)
    axis.set_ylabel("us a layer (p50)")
    axis.legend(fontsize="small")
