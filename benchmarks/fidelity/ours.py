"""Compress a collection with this package, add the held-out tasks, take every task out again."""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fidelity.built import Built, OutOfReachError
from fidelity.inputs import CollectionFolder
from fidelity.methods import Method
from vllm_vlora import Checkpoint, CompressReport, export_all, open_adapter
from vllm_vlora.adapters.collection import Collection
from vllm_vlora.compression.pipeline import Compression
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.errors import BudgetError
from vllm_vlora.planning.plan import Budget


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
    started = time.perf_counter()
    measured = _measured(method, collection, calibration)
    seconds = measured.seconds
    try:
        report = measured.write(ratio, folder / "checkpoint")
    except BudgetError as error:
        raise OutOfReachError(str(error)) from error
    seconds += time.perf_counter() - started - (0 if measured.used else measured.seconds)
    measured.used = True
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


class _Measured:
    """A collection, measured once for all ratios of a method."""

    def __init__(
        self, method: Method, collection: CollectionFolder, calibration: Path | None
    ) -> None:
        started = time.perf_counter()
        adapters = {task: open_adapter(path) for task, path in collection.in_basis.items()}
        # Removed when the program ends.
        self._scratch = tempfile.TemporaryDirectory(prefix="bench-fidelity-")
        options = replace(method.compress_options(1.0, calibration), ratio=None)
        self._compression = Compression(
            Collection(adapters), options, Path(self._scratch.name), bounded=False
        )
        _ = self._compression.candidates.survey
        self.seconds = time.perf_counter() - started
        self.used = False

    def write(self, ratio: float, folder: Path) -> CompressReport:
        """A checkpoint at one ratio."""
        original = self._compression.collection.original_nbytes
        budget = Budget(math.floor(original / ratio)) if ratio > 1 else Budget()
        folder.mkdir(parents=True)
        return self._compression.write(folder, self._compression.choose(budget))


@lru_cache(maxsize=1)
def _measured(method: Method, collection: CollectionFolder, calibration: Path | None) -> _Measured:
    return _Measured(method, collection, calibration)


def stored_as(checkpoint: Checkpoint) -> dict[str, int]:
    """Number of (task, module) by representation and format."""
    return dict(
        Counter(
            f"{segment.representation} {segment.format}"
            for task in checkpoint.tasks
            for segment in checkpoint.record(task).segments
        )
    )
