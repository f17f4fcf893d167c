"""What ``info`` says about a rebuild: from the manifest, and with ``--rebuild`` from plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vllm_vlora.checkpoint.card import format_bytes
from vllm_vlora.tools.summary import SafeTable, line

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.editing.rebuild_advice import RebuildPoint


def advise(checkpoint: Checkpoint) -> dict[str, Any]:
    """From the manifest alone, as JSON data; sizes in bytes."""
    from vllm_vlora.editing.rebuild_advice import rebuild_advice

    found = rebuild_advice(checkpoint)
    return {
        "may_pay": found.likely,
        "why": found.why,
        "private_tasks": found.private_tasks,
        "private_bytes": found.private_nbytes,
        "task_bytes": found.task_nbytes,
        "idle_basis_bytes": found.idle_nbytes,
    }


def predict(
    checkpoint: Checkpoint, originals: Path | None, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """What rebuilds would come to, as JSON data; errors are means, relative (Frobenius)."""
    from vllm_vlora.checkpoint.task_files import open_originals
    from vllm_vlora.editing.rebuild_advice import predict_rebuild

    adapters = None if originals is None else open_originals(checkpoint, originals)
    found = predict_rebuild(checkpoint, adapters, progress=progress)
    return {
        "pays": found.best is not None,
        "best": None if found.best is None else _point(checkpoint, found.best),
        "from_originals": found.from_originals,
        "bytes": found.nbytes,
        "mean_error": found.error,
        "points": [_point(checkpoint, point) for point in found.points],
    }


def _point(checkpoint: Checkpoint, point: RebuildPoint) -> dict[str, Any]:
    # Rounded down, so that the ratio can be asked for.
    ratio = math.floor(100 * checkpoint.original_nbytes / point.nbytes) / 100
    return {"bytes": point.nbytes, "mean_error": point.error, "ratio": ratio}


def print_advice(console: Console, data: dict[str, Any]) -> None:
    """Nothing where no rebuild is worth a thought."""
    prediction = data.get("prediction")
    if prediction is None:
        if data["may_pay"]:
            line(console, f"A rebuild may pay: {data['why']}.")
            line(console, "  `info CKPT --rebuild` plans one and says whether it does.")
        return
    table = SafeTable(title="Rebuilds, as planned", title_justify="left", header_style="bold")
    for column in ("", "Size", "Mean error"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("today", format_bytes(prediction["bytes"]), f"{prediction['mean_error']:.4f}")
    for point in prediction["points"]:
        best = point == prediction["best"]
        table.add_row(
            "pays" if best else "",
            format_bytes(point["bytes"]),
            f"{point['mean_error']:.4f}",
            style="bold" if best else "",
        )
    console.print(table)
    if not prediction["from_originals"]:
        line(
            console,
            "Planned from the tasks as stored: what they have lost stays lost. With --originals DIR "
            "a rebuild may also keep more.",
            style="dim",
        )
    if prediction["best"] is None:
        line(console, "A rebuild does not pay.")
    else:
        # Not its ratio: one or less sets no limit.
        size = f"--max-bytes {prediction['best']['bytes']}"
        command = f"vllm-vlora add CKPT --rebuild --originals DIR {size}"
        line(console, f"A rebuild pays: `{command}`.")
