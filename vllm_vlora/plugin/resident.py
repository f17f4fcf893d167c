"""Tasks that are resident in a worker's memory: bases once, every task packed, all on device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_vlora.checkpoint import Basis, Checkpoint
from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin.identity import TaskPath, task_path
from vllm_vlora.representations import SideSource, side_sources

Check = Callable[[Checkpoint, Iterable[str]], None]


@dataclass(frozen=True)
class ResidentTask:
    """One task on the device: the engine's module name -> sources of A and of B transposed."""

    task_id: str
    path: str
    rank: int
    sources: dict[str, tuple[SideSource, SideSource]]
    extra: dict[str, torch.Tensor]


class ResidentStore:
    """The tasks of one worker by their ``lora_path``, which names their content.

    Bases and private factors keep their stored precision; only the cores of joint tasks, which are
    small, are unpacked. A task that was loaded stays: the API server may hold its path for as long as
    it lives, and a request whose task must be read from disk can fail, which inside a step ends the
    engine. So a re-published task costs the bytes of its old state until the engine ends.

    Args:
        device: where the tensors lie.
        engine_name: turns the adapters' name of a module into the engine's.
        check: called with a checkpoint and task ids before these are loaded; raises when the served
            model cannot take them.
    """

    def __init__(
        self, device: torch.device, engine_name: Callable[[str], str], check: Check
    ) -> None:
        self._device = device
        self._engine_name = engine_name
        self._check = check
        self._tasks: dict[str, ResidentTask] = {}
        self._bases: dict[str, dict[str, Basis]] = {}
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._tasks)

    def tasks(self) -> list[ResidentTask]:
        """Every task held, in the order of loading."""
        return list(self._tasks.values())

    def preload(self, folder: str | Path) -> Checkpoint:
        """Load every task of a checkpoint; raises CheckpointError or ModelMismatchError."""
        started = time.perf_counter()
        checkpoint = Checkpoint.open(folder)
        self._check(checkpoint, checkpoint.tasks)
        for task_id in checkpoint.tasks:
            self._load(checkpoint, task_id)
        self.seconds = time.perf_counter() - started
        return checkpoint

    def task(self, path: TaskPath) -> ResidentTask:
        """The task of a path: from memory, or from disk when it was never asked for.

        Raises:
            CheckpointError: the checkpoint on disk no longer holds these weights, or is damaged.
            ModelMismatchError: the served model cannot take the task.
        """
        held = self._tasks.get(str(path))
        if held is not None:
            return held
        checkpoint = Checkpoint.open(path.checkpoint)
        for task_id, record in checkpoint.tasks.items():
            if record.file == path.file and checkpoint.digest(task_id) == path.digest:
                self._check(checkpoint, [task_id])
                return self._load(checkpoint, task_id)
        raise CheckpointError(
            f"{path.checkpoint / path.file} was published again with other weights; make a new "
            "request with vllm_vlora.lora_request"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held on the device; storage shared by several is counted once."""
        storages = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _tensors(self) -> Iterable[torch.Tensor]:
        for bases in self._bases.values():
            for basis in bases.values():
                yield from basis.u.parts.values()
                yield from basis.v.parts.values()
        for task in self._tasks.values():
            yield from task.extra.values()
            for pair in task.sources.values():
                for source in pair:
                    yield from source.matrix.parts.values()
                    if source.left is not None:
                        yield source.left

    def _load(self, checkpoint: Checkpoint, task_id: str) -> ResidentTask:
        path = str(task_path(checkpoint, task_id))
        if path in self._tasks:
            return self._tasks[path]
        bases = self._load_bases(checkpoint)
        stored = checkpoint.load_task(task_id, self._device)
        sources = {
            self._engine_name(name): side_sources(module, bases.get(name))
            for name, module in stored.modules.items()
        }
        rank = checkpoint.record(task_id).max_rank
        self._tasks[path] = ResidentTask(task_id, path, rank, sources, dict(stored.extra))
        return self._tasks[path]

    def _load_bases(self, checkpoint: Checkpoint) -> dict[str, Basis]:
        key = checkpoint.basis_digest
        if key not in self._bases:
            self._bases[key] = {
                name: Basis(basis.u.to(self._device), basis.v.to(self._device))
                for name, basis in checkpoint.bases()
            }
        return self._bases[key]
