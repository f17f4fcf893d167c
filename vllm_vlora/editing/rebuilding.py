"""Fit a checkpoint anew from the original adapters; ``rebuild_advice`` says when that would pay."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from vllm_vlora.adapters.collection import Collection, Progress
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.carried import keep_beside
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import CompressReport
from vllm_vlora.checkpoint.successor import edit_target, edited
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import Compression
from vllm_vlora.editing.options import AddOptions, check_output
from vllm_vlora.errors import AdapterError


def rebuild(
    checkpoint: str | Path,
    adapters: Mapping[str, Adapter],
    options: AddOptions | None = None,
    *,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress all adapters (task id -> original) into a checkpoint anew, in place or at ``output``.

    Its aliases, its router and other files in the folder stay, or go to ``output`` too.

    Args:
        adapters: every task of the checkpoint, and new ones.
        options: of the whole collection; by default the checkpoint's own ratio, and with ``quantize``
            none no loss.

    Raises:
        AdapterError: a task of the checkpoint has no adapter here.
        As :func:`vllm_vlora.compress`.

    Examples:
        >>> tasks = {f"task_{i}": open_adapter(path) for i, path in enumerate(adapter_dirs)}
        >>> report = rebuild(checkpoint, tasks, AddOptions(max_error=0.1))
        >>> report.worst_error <= 0.1
        True
    """
    started = time.monotonic()
    options = options or AddOptions()
    target = edit_target(checkpoint, output)
    check_output(target, adapters, options.calibration)
    with edited(checkpoint, output, force=force) as (opened, folder):
        missing = [task_id for task_id in opened.tasks if task_id not in adapters]
        if missing:
            raise AdapterError(f"no original of task {missing[0]!r}; a rebuild needs every task's")
        # Before the work, which an alias of a task that would be gone makes vain.
        keep_beside(opened.path, folder, adapters)
        scratch = folder / ".scratch"
        scratch.mkdir()
        with Compression(
            Collection(adapters), _options(opened, options), scratch, progress
        ) as compression:
            report = compression.write(folder, compression.choose(), opened.base_model)
        shutil.rmtree(scratch)
    report.path = target
    report.seconds = time.monotonic() - started
    return report


def _options(checkpoint: Checkpoint, options: AddOptions) -> CompressOptions:
    given = (options.ratio, options.max_bytes, options.max_error)
    ratio = options.ratio
    if all(value is None for value in given) and options.quantize != "none":
        ratio = max(checkpoint.ratio, 1.0)
    return CompressOptions(
        ratio=ratio,
        max_bytes=options.max_bytes,
        max_error=options.max_error,
        quantize=options.quantize,
        double_quantize=options.double_quantize,
        dtype=options.dtype,
        calibration=options.calibration,
        allow_large_error=options.allow_large_error,
        tokenizers=options.tokenizers,
    )
