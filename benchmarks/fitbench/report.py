"""From runs to medians, spreads and ratios, and the table that is printed."""

from __future__ import annotations

from statistics import median
from typing import Any

from harness import table

from fitbench.collection import Size
from fitbench.runs import Run

Cell = dict[str, Any]


def summarise(size: Size, k: int, runs: dict[str, list[Run]]) -> Cell:
    """Everything about one size: a row a contestant, and ratios to ``ours`` in the same run.

    Of a contestant that was stopped, seconds, memory and ratios are lower bounds.
    """
    rows = {name: _row(size, past) for name, past in runs.items() if past}
    reference = rows.get("exact", {}).get("energy")
    for row in rows.values():
        row["times_ours"] = row["seconds"] / rows["ours"]["seconds"]
        row["cpu_times_ours"] = row["cpu_seconds"] / rows["ours"]["cpu_seconds"]
        if row["energy"] is not None and reference is not None:
            row["energy_of_exact"] = row["energy"] / reference
    return {
        "d_in": size.d_in,
        "d_out": size.d_out,
        "adapters": size.adapters,
        "rank": size.rank,
        "k": k,
        "adapter_nbytes": size.adapter_nbytes,
        "rows": rows,
    }


def _row(size: Size, runs: list[Run]) -> Cell:
    last = runs[-1]
    return {
        "runs": len(runs),
        "stopped": any(run.stopped for run in runs),
        "seconds": median(run.seconds for run in runs),
        "seconds_all": [run.seconds for run in runs],
        "cpu_seconds": median(run.cpu_seconds for run in runs),
        "peak_nbytes": max(run.peak_nbytes for run in runs),
        "peak_above_one_adapter_nbytes": max(run.peak_nbytes for run in runs) - size.adapter_nbytes,
        "energy": last.energy,
        "stored_nbytes": None if last.stored_numbers is None else 4 * last.stored_numbers,
        "details": {key: median(run.details[key] for run in runs) for key in last.details},
    }


def format_cell(cell: Cell, floor_s: float) -> str:
    """The table of one size."""
    head = ["", "seconds", "min..max", "x ours", "x cpu", "peak MB", "- adapter", "energy"]
    lines = (_cells(name, row) for name, row in cell["rows"].items())
    return (
        f"{cell['d_in']} -> {cell['d_out']}, {cell['adapters']} adapters of rank {cell['rank']}, "
        f"k {cell['k']} (floor of ours {floor_s:.1f} s)\n"
        + table([*head, "of exact", "stored MB"], lines)
    )


def _cells(name: str, row: Cell) -> list[str]:
    least = ">" if row["stopped"] else ""
    stored = row["stored_nbytes"]
    return [
        name,
        f"{least}{row['seconds']:.1f}",
        f"{min(row['seconds_all']):.1f}..{max(row['seconds_all']):.1f}",
        f"{least}{row['times_ours']:.1f}",
        f"{least}{row['cpu_times_ours']:.1f}",
        f"{least}{row['peak_nbytes'] / 1e6:.0f}",
        f"{least}{row['peak_above_one_adapter_nbytes'] / 1e6:.0f}",
        _number(row["energy"], ".4f"),
        _number(row.get("energy_of_exact"), ".4f"),
        _number(None if stored is None else stored / 1e6, ".1f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
