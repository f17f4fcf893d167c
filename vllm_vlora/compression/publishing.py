"""A compression written as a checkpoint and published."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from vllm_vlora.atomic import publish_folder
from vllm_vlora.checkpoint.manifest import is_checkpoint
from vllm_vlora.checkpoint.report import (
    CompressReport,
)


def publish_checkpoint(
    output: str | Path, force: bool, make: Callable[[Path, Path], CompressReport]
) -> CompressReport:
    """What ``make`` writes into (folder, scratch folder), published as ``output``, with its time.

    Raises:
        OutputError: ``output`` exists and is not to be replaced, or cannot be written.
    """
    started = time.monotonic()
    with publish_folder(output, force=force, owned=is_checkpoint) as folder:
        scratch = folder / ".scratch"
        scratch.mkdir()
        report = make(folder, scratch)
        shutil.rmtree(scratch)
    report.path = Path(output)
    report.seconds = time.monotonic() - started
    return report
