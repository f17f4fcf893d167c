"""Fit a checkpoint anew from the original adapters; ``rebuild_advice`` says when that would pay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_vlora.adapters.collection import Progress
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.atomic import exclusive
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import CompressReport
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.errors import AdapterError, OptionError


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
    target = Path(checkpoint if output is None else output).expanduser()
    with exclusive(target):
        return _rebuild(
            checkpoint, adapters, options or AddOptions(), target, output, force, progress
        )


def _rebuild(
    checkpoint: str | Path,
    adapters: Mapping[str, Adapter],
    options: AddOptions,
    target: Path,
    output: str | Path | None,
    force: bool,
    progress: Progress | None,
) -> CompressReport:
    opened = Checkpoint.open(checkpoint)
    missing = [task_id for task_id in opened.tasks if task_id not in adapters]
    if missing:
        raise AdapterError(f"no original of task {missing[0]!r}; a rebuild needs every task's")
    if output is None and not target.is_dir():
        raise OptionError(f"{checkpoint} is on the Hub and not changed in place; name a folder")
    return compress(
        adapters,
        target,
        _options(opened, options),
        force=force or output is None,
        base_model=opened.base_model,
        progress=progress,
    )


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
