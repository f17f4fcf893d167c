"""A point of the plot: one method at one size on one collection; measured once and kept."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import vllm_vlora
from fidelity.built import Built
from fidelity.inputs import CollectionFolder
from fidelity.methods import Method
from fidelity.seeds import PINS
from vllm_vlora import open_adapter
from vllm_vlora.evaluation.evaluator import Comparison, EvaluationOptions, Evaluator
from vllm_vlora.evaluation.fidelity import compare_weights, total_error

Point = dict[str, Any]
_BATCH_SIZE = 8


class Judge:
    """One base model, and the held-out text of every task of all collections.

    Args:
        model: folder of the base model, run in float32.
        examples: the first so many of a data file are scored.
    """

    def __init__(self, model: Path, collections: Iterable[CollectionFolder], examples: int) -> None:
        data = {
            f"{collection.name}/{task}": [collection.data(task)]
            for collection in collections
            for task in collection.all
        }
        options = EvaluationOptions(
            max_examples=examples, batch_size=_BATCH_SIZE, greedy_tokens=0, dtype="float32"
        )
        self._evaluator = Evaluator(model, data, options)

    def compare(self, collection: CollectionFolder, task: str, folder: Path) -> Comparison:
        """A reconstructed task beside its original and the base model, by losses alone."""
        return self._evaluator.compare(
            f"{collection.name}/{task}", folder, collection.all[task], losses_only=True
        )


def measure(judge: Judge, collection: CollectionFolder, built: Built) -> Point:
    """Recovered fractions and relative errors of everything that was reconstructed."""
    tasks = {
        task: _measure_task(judge, collection, task, folder)
        for task, folder in built.folders.items()
    }
    original = collection.original_nbytes(collection.in_basis)
    with_added = original + collection.original_nbytes(collection.held_out)
    point: Point = {
        "nbytes": built.nbytes,
        "nbytes_on_disk": built.nbytes_on_disk,
        "nbytes_with_added": built.nbytes_with_added,
        "ratio": original / built.nbytes,
        "in_basis": summary(tasks, False),
        "held_out": summary(tasks, True),
        "tasks": tasks,
        "seconds": built.seconds,
        "details": built.details,
    }
    if point["held_out"] is not None:
        point["ratio_with_added"] = with_added / built.nbytes_with_added
    return point


def _measure_task(
    judge: Judge, collection: CollectionFolder, task: str, folder: Path
) -> dict[str, Any]:
    compared = judge.compare(collection, task, folder)
    assert compared.original is not None
    modules = compare_weights(open_adapter(collection.all[task]), open_adapter(folder))
    return {
        "held_out": task in collection.held_out,
        "loss_base": compared.base.loss,
        "loss_adapter": compared.original.loss,
        "loss": compared.compressed.loss,
        "tokens": int(compared.base.tokens.sum()),
        "recovered": compared.recovered.value,
        "standard_error": compared.recovered.standard_error,
        "undefined_because": compared.recovered.reason,
        "error": total_error(modules),
    }


def summary(tasks: Mapping[str, Mapping[str, Any]], held_out: bool) -> dict[str, Any] | None:
    """Mean and worst over one kind of task; None where none was measured.

    A task whose fraction is undefined counts for the errors alone.
    """
    chosen = {task: row for task, row in tasks.items() if row["held_out"] == held_out}
    judged = {
        task: row["recovered"] for task, row in chosen.items() if row["recovered"] is not None
    }
    if not judged:
        return None
    worst = min(judged, key=lambda task: judged[task])
    return {
        "judged": len(judged),
        "mean": statistics.fmean(judged.values()),
        "worst": judged[worst],
        "worst_task": worst,
        "mean_error": statistics.fmean(row["error"] for row in chosen.values()),
    }


# --- kept points ---------------------------------------------------------------------------------


class PointStore:
    """Points on disk, by what they depend on.

    A point of ours depends on the library's sources, so that no figure outlives the code it is of.
    """

    def __init__(self, folder: Path, model: str, examples: int) -> None:
        self.folder, self.model, self.examples = folder, model, examples
        self._code = code_digest(Path(vllm_vlora.__file__).parent)

    def key(self, collection: CollectionFolder, method: Method, ratio: float) -> str:
        """A short digest of the settings of a point."""
        settings = {
            "collection": collection.digest,
            "method": method.label,
            "ratio": ratio,
            "model": self.model,
            "examples": self.examples,
            "code": PINS if method.is_seed else self._code,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]

    def read(self, key: str) -> Point | None:
        """A kept point."""
        path = self.folder / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, key: str, point: Point) -> None:
        """Keep a point."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{key}.json").write_text(json.dumps(point), encoding="utf-8")


_NOT_COUNTED = {"tools", "plugin", "triton_kernels"}


def code_digest(folder: Path) -> str:
    """SHA-256 over the library's Python files; tools, plugin and kernels do not count."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if name.parts[0] not in _NOT_COUNTED:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{name.as_posix()} {digest}\n".encode())
    return total.hexdigest()
