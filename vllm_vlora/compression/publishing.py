"""A compression written as a checkpoint and published."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_vlora.adapters.collection import Collection, common_base_model, reading_warnings
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.atomic import check_apart, publish_folder
from vllm_vlora.checkpoint.card import model_card
from vllm_vlora.checkpoint.carried import keep_beside
from vllm_vlora.checkpoint.layout import basis_nbytes
from vllm_vlora.checkpoint.losses import Losses
from vllm_vlora.checkpoint.own_files import checkpoint_files
from vllm_vlora.checkpoint.report import (
    Candidate,
    CompressReport,
    TaskReport,
    extra_nbytes,
    report_task,
)
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.compression.encoding import EncodedTask, Encoder, stored_basis, stored_flat
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.planning.plan import Plan
from vllm_vlora.planning.scratch import CoreSpool

BY_ERROR = "the error of the weights"
"""What a choice goes by where the model is not asked."""
BY_SEEN_ERROR = "the error that the calibrated model sees"
"""The same, with a calibration."""


@dataclass(frozen=True)
class Chosen:
    """The plan to write and what it is written from; cores are those of shared bases."""

    plan: Plan
    candidates: list[Candidate]
    cores: CoreSpool | None


def publish_checkpoint(
    output: str | Path,
    force: bool,
    make: Callable[[Path, Path], CompressReport],
    adapters: Mapping[str, Adapter],
    options: CompressOptions,
) -> CompressReport:
    """What ``make`` writes into (folder, scratch folder), published as ``output``, with its time.

    Raises:
        OutputError: ``output`` exists and is not to be replaced, is or holds what is read, or
            cannot be written; or one of its aliases names a task that would be gone.
    """
    started = time.monotonic()
    read = [adapter.path for adapter in adapters.values()]
    check_apart(output, [*read, *([options.calibration] if options.calibration else [])])
    with publish_folder(output, force=force, owned=checkpoint_files) as folder:
        # Now, and not after the work; others may change them meanwhile.
        keep_beside(Path(output).expanduser(), folder, adapters)
        scratch = folder / ".scratch"
        scratch.mkdir()
        report = make(folder, scratch)
        shutil.rmtree(scratch)
        keep_beside(Path(output).expanduser(), folder, adapters)
    report.path = Path(output)
    report.seconds = time.monotonic() - started
    return report


def write_checkpoint(
    folder: Path,
    chosen: Chosen,
    encoder: Encoder,
    base_model: str | None = None,
    *,
    kl_kept: Mapping[str, float | None] | None = None,
    chosen_by: str = "",
    kept: Sequence[str] = (),
    allow_large_error: bool = False,
    tokenizers: bool = True,
    warnings: Sequence[str] = (),
) -> CompressReport:
    """Write a chosen plan as a checkpoint into an existing folder; the manifest comes last.

    Args:
        kl_kept, chosen_by, kept: of the report, where the model was run.
        allow_large_error: store tasks that are worse than none.
        tokenizers: keep what lies beside the adapters' weights.
        warnings: of the report, before those about the adapters.

    Raises:
        BudgetError: a task is worse than none, and that is not allowed.
    """
    collection = encoder.survey.collection
    adapters = dict(zip(collection.task_ids, collection.adapters))
    common, warning = common_base_model(adapters)
    writer = CheckpointWriter(folder, base_model or common, allow_large_error=allow_large_error)
    for module in collection.modules.values():
        basis = stored_basis(chosen.plan, encoder.bases, module)
        flat = stored_flat(chosen.plan, encoder.bases, module)
        writer.add_module(module.name, module.d_in, module.d_out, module.kind, basis, flat)
    tasks = []
    for task, encoded in enumerate(encoder.encode_tasks(chosen.plan, chosen.cores)):
        tasks.append(_write_task(writer, collection, task, encoded, tokenizers))
        encoder.progress("write", len(tasks), len(collection.task_ids))
    bases = basis_nbytes(writer.modules)
    seen = {task.task_id: task.seen_error for task in tasks}
    calibrated = encoder.settings.calibration is not None
    judged = [task for task, kept in (kl_kept or {}).items() if kept is not None]
    report = CompressReport(
        path=folder,
        tasks=tasks,
        representation=chosen.plan.representation,
        format=chosen.plan.format,
        original_nbytes=collection.original_nbytes,
        nbytes=bases + sum(task.nbytes for task in tasks),
        basis_nbytes=bases,
        candidates=chosen.candidates,
        warnings=[
            *warnings,
            *([] if warning is None else [warning]),
            *reading_warnings(adapters),
        ],
        raised=[collection.task_ids[task] for task in chosen.plan.raised],
        calibrated=calibrated,
        kl_kept=dict(kl_kept or {}),
        chosen_by=chosen_by or (BY_SEEN_ERROR if calibrated else BY_ERROR),
        kept=list(kept),
        losses=replace(Losses.of(writer.tasks, writer.modules, seen), judged=judged),
        extra_nbytes=extra_nbytes(writer.tasks),
    )
    writer.finish(model_card(base_model or common, report))
    return report


def _write_task(
    writer: CheckpointWriter,
    collection: Collection,
    task: int,
    encoded: EncodedTask,
    tokenizers: bool,
) -> TaskReport:
    task_id, adapter = collection.task_ids[task], collection.adapters[task]
    record = writer.add_task(
        task_id,
        encoded.modules,
        original_nbytes=adapter.original_nbytes,
        error=encoded.error,
        adapter_config=adapter.config,
        source=adapter.name,
        extra=adapter.extra_tensors(),
        renamed=adapter.renamed,
        seen_error=encoded.seen,
        companions=adapter.companions if tokenizers else None,
    )
    return replace(report_task(task_id, record), seen_error=encoded.seen)
