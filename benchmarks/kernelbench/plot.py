"""Time of one layer against the number of distinct tasks, a line an operation."""

from __future__ import annotations

from pathlib import Path

from plots import draw_panels

from kernelbench.report import Key

Curves = dict[str, list[tuple[int, float]]]


def panels(sums: dict[Key, dict[str, float]], mode: str) -> dict[str, Curves]:
    """Title -> label -> (tasks, us), for every model and kind of batch with two or more counts."""
    found: dict[str, Curves] = {}
    for (model, phase, tokens, tasks, mode_), by_label in sums.items():
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


def draw(sums: dict[Key, dict[str, float]], mode: str, title: str, path: Path) -> None:
    """Draw the sums into a picture; its kind is what ``path`` ends with.

    Raises:
        ValueError: matplotlib knows no picture of that kind, or there is nothing to draw.
    """
    found = panels(sums, mode)
    if not found:
        raise ValueError("a plot needs whole layers with two or more numbers of tasks")
    draw_panels(found, title, "us a layer (p50)", path)
