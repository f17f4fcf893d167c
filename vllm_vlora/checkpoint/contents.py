"""What a checkpoint's records say about it, as the report that its model card is written from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from vllm_vlora.checkpoint.manifest import TaskRecord
from vllm_vlora.checkpoint.report import CompressReport, TaskReport
from vllm_vlora.planning.plan import MIXED


def report_contents(
    path: Path, tasks: Mapping[str, TaskRecord], basis_nbytes: int
) -> CompressReport:
    """Sizes and recorded errors of every task; nothing is measured anew.

    Args:
        tasks: task id -> record, in the checkpoint's order. basis_nbytes: of its basis files.
    """
    reports = [report_task(task_id, record) for task_id, record in tasks.items()]
    segments = [segment for record in tasks.values() for segment in record.segments]
    return CompressReport(
        path=path,
        tasks=reports,
        representation=common(segment.representation for segment in segments),
        format=common(segment.format for segment in segments),
        original_nbytes=sum(task.original_nbytes for task in reports),
        nbytes=basis_nbytes + sum(task.nbytes for task in reports),
        basis_nbytes=basis_nbytes,
        candidates=[],
    )


def report_task(task_id: str, record: TaskRecord) -> TaskReport:
    """One task's sizes and its recorded error."""
    ranks = [segment.rank for segment in record.segments]
    return TaskReport(
        task_id,
        record.source,
        (min(ranks, default=0), max(ranks, default=0)),
        record.original_nbytes,
        record.lora_nbytes,
        record.error,
        common(segment.representation for segment in record.segments),
        common(segment.format for segment in record.segments),
        record.error,
    )


def common(values: Iterable[str]) -> str:
    """The one value that all have, or ``mixed``."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else MIXED
