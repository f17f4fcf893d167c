"""A collection as `examples/collections/train.py` writes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_vlora import open_adapter
from vllm_vlora.errors import DataError


@dataclass(frozen=True)
class CollectionFolder:
    """Adapters, those held out of the basis, and held-out text of all of them.

    Attributes:
        folder: holds `adapters/`, `held_out_of_basis/`, `data/` and `calibration.jsonl`.
        tasks: at most so many of each kind, in the order of their names; None for all.
    """

    folder: Path
    tasks: int | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @cached_property
    def in_basis(self) -> dict[str, Path]:
        """Task -> PEFT folder, of the tasks that a basis is fitted on."""
        return self._adapters("adapters")

    @cached_property
    def held_out(self) -> dict[str, Path]:
        """Task -> PEFT folder, of the tasks that are added to a finished checkpoint."""
        return self._adapters("held_out_of_basis")

    @property
    def all(self) -> dict[str, Path]:
        """Both kinds."""
        return self.in_basis | self.held_out

    @property
    def calibration(self) -> Path:
        """Text of the tasks in the basis, which nothing is measured on."""
        return self.folder / "calibration.jsonl"

    def data(self, task: str) -> Path:
        """A task's held-out examples."""
        return self.folder / "data" / f"{task}.jsonl"

    def original_nbytes(self, tasks: dict[str, Path]) -> int:
        """LoRA weights of these adapters at 16 bits each."""
        return sum(open_adapter(path).original_nbytes for path in tasks.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weights and the data: what results depend on."""
        total = hashlib.sha256()
        for task, path in self.all.items():
            for file in (path / "adapter_model.safetensors", self.data(task)):
                total.update(f"{task} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        return total.hexdigest()

    def _adapters(self, kind: str) -> dict[str, Path]:
        folders = sorted(
            path
            for path in (self.folder / kind).glob("*")
            if (path / "adapter_config.json").exists()
        )
        if not folders:
            raise DataError(
                f"{self.folder / kind}: holds no adapter; make the collection with "
                "examples/collections/train.py"
            )
        return {path.name: path for path in folders[: self.tasks]}


def training_record(folder: Path) -> dict[str, object]:
    """What `collection.json` says about the training; empty for a folder of other origin."""
    path = folder / "collection.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
