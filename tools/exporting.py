"""Tasks to PEFT folders, as ``export`` and ``reconstruct`` write and show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vlora.tools.terminal import print_result, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.checkpoint.export import ConfigChanges
    from vllm_vlora.checkpoint.reader import Checkpoint


def write_folders(
    checkpoint: Checkpoint,
    tasks: Iterable[str],
    output: Path,
    stage: str,
    *,
    force: bool,
    changes: ConfigChanges | None = None,
) -> dict[str, Path]:
    """A folder in ``output`` for each task, with a bar; see ``export_all``."""
    from vllm_vlora.checkpoint.export import export_all

    with progress_bar() as advance:
        return export_all(
            checkpoint,
            tasks,
            output,
            force=force,
            changes=changes,
            progress=lambda _, done, total: advance(stage, done, total),
        )


def _dtypes(folder: Path) -> str:
    """Of the LoRA weights in an adapter's folder, as safetensors names them: "F32"."""
    from vllm_vlora.adapters.weights_files import read_headers

    return ", ".join(
        sorted({t.dtype for name, t in read_headers(folder).items() if ".lora_" in name})
    )


def show_folders(folders: Mapping[str, Path], as_json: bool) -> None:
    """What was written: JSON, or a line each."""
    from vllm_vlora.tools.summary import line

    def draw(console: Console, data: Mapping[str, str]) -> None:
        for task_id, folder in data.items():
            line(console, f"{task_id} -> {folder} ({_dtypes(Path(folder))})")

    print_result({task_id: str(folder) for task_id, folder in folders.items()}, draw, as_json)
