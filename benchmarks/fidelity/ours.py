"""Compress a collection with this package, add the held-out tasks, take every task out again."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fidelity.built import Built, OutOfReachError
from fidelity.inputs import CollectionFolder
from fidelity.methods import Method
from vllm_vlora import Checkpoint, compress, export_all, open_adapter
from vllm_vlora.adding import add_adapters
from vllm_vlora.errors import BudgetError


def build(
    method: Method,
    ratio: float,
    collection: CollectionFolder,
    calibration: Path | None,
    folder: Path,
) -> Built:
    """Compress to ``ratio`` and reconstruct.

    The reconstructions are float32, so that nothing is lost that the checkpoint holds.

    Raises:
        OutOfReachError: no plan reaches the ratio.
    """
    options = method.compress_options(ratio, calibration)
    adapters = {task: open_adapter(path) for task, path in collection.in_basis.items()}
    started = time.perf_counter()
    try:
        report = compress(adapters, folder / "checkpoint", options)
    except BudgetError as error:
        raise OutOfReachError(str(error)) from error
    seconds = time.perf_counter() - started
    checkpoint = Checkpoint.open(folder / "checkpoint")
    details: dict[str, Any] = {
        "chosen": report.representation,
        "format": report.format,
        "stored_as": stored_as(checkpoint),
        "basis_nbytes": report.basis_nbytes,
    }
    started = time.perf_counter()
    new = {task: open_adapter(path) for task, path in collection.held_out.items()}
    added = add_adapters(
        folder / "checkpoint", new, method.add_options(ratio, calibration), expand=method.expand
    )
    details["added"] = {
        task.task_id: {
            "kind": task.kind,
            "nbytes": task.nbytes,
            "grown_nbytes": task.grown_nbytes,
            "carried": task.carried,
            "error": task.error,
            "private_error": task.private_error,
        }
        for task in added.tasks
    }
    details["seconds_to_add"] = time.perf_counter() - started
    checkpoint = Checkpoint.open(folder / "checkpoint")
    folders = export_all(checkpoint, collection.all, folder / "tasks", dtype=torch.float32)
    return Built(folders, report.nbytes, report.nbytes, added.nbytes, seconds, details)


def stored_as(checkpoint: Checkpoint) -> dict[str, int]:
    """Number of (task, module) by representation and format."""
    return dict(
        Counter(
            f"{segment.representation} {segment.format}"
            for task in checkpoint.tasks
            for segment in checkpoint.record(task).segments
        )
    )
