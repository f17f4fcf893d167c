"""Checkpoints that are resident in a worker's memory: bases once, every task packed, all on device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_vlora.checkpoint import Basis, Checkpoint
from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin.identity import TaskPath
from vllm_vlora.representations import SideSource, side_sources


@dataclass(frozen=True)
class ResidentTask:
    """One task on the device: the engine's module name -> sources of A and of B transposed."""

    task_id: str
    path: str
    rank: int
    sources: dict[str, tuple[SideSource, SideSource]]
    extra: dict[str, torch.Tensor]


class ResidentCheckpoint:
    """One state of one checkpoint, loaded whole; ``tasks`` are keyed by their ``lora_path``.

    Bases and private factors keep their stored precision; only the cores of joint tasks, which are
    small, are unpacked. ``engine_name`` turns the adapters' name of a module into the engine's.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, engine_name: Callable[[str], str]
    ) -> None:
        started = time.perf_counter()
        self.checkpoint = checkpoint
        self.device = device
        self.engine_names = {m.name: engine_name(m.name) for m in checkpoint.modules}
        self.bases: dict[str, Basis] = {
            name: Basis(basis.u.to(device), basis.v.to(device))
            for name, basis in checkpoint.bases()
        }
        self.tasks: dict[str, ResidentTask] = {}
        for task_id in checkpoint.tasks:
            self._load(task_id)
        self.seconds = time.perf_counter() - started

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held on the device; storage shared by several is counted once."""
        storages = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _tensors(self) -> Iterable[torch.Tensor]:
        for basis in self.bases.values():
            yield from basis.u.parts.values()
            yield from basis.v.parts.values()
        for task in self.tasks.values():
            yield from task.extra.values()
            for pair in task.sources.values():
                for source in pair:
                    yield from source.matrix.parts.values()
                    if source.left is not None:
                        yield source.left

    def _load(self, task_id: str) -> None:
        stored = self.checkpoint.load_task(task_id, self.device)
        sources = {
            self.engine_names[name]: side_sources(module, self.bases.get(name))
            for name, module in stored.modules.items()
        }
        record = self.checkpoint.record(task_id)
        path = TaskPath(self.checkpoint.path.absolute(), record.file, stored.digest)
        self.tasks[str(path)] = ResidentTask(
            task_id, str(path), record.max_rank, sources, dict(stored.extra)
        )


class ResidentStore:
    """The checkpoints of one worker, by folder; at most one state of each, the newest asked for.

    ``check`` is called with a state before it replaces the old one and raises when the served model
    cannot take it: the old state then stays.
    """

    def __init__(
        self,
        device: torch.device,
        engine_name: Callable[[str], str],
        check: Callable[[ResidentCheckpoint], None],
    ) -> None:
        self._device = device
        self._engine_name = engine_name
        self._check = check
        self._states: dict[Path, ResidentCheckpoint] = {}

    def load(self, folder: str | Path) -> ResidentCheckpoint:
        """Read a checkpoint whole from disk, check it against the model and keep it."""
        state = ResidentCheckpoint(Checkpoint.open(folder), self._device, self._engine_name)
        self._check(state)
        self._states[state.checkpoint.path.absolute()] = state
        return state

    def task(self, path: TaskPath) -> ResidentTask:
        """The task of a path: from memory, or from disk when its state is not loaded yet.

        Raises:
            CheckpointError: the checkpoint on disk no longer holds these weights.
        """
        state = self._states.get(path.checkpoint)
        if state is None or str(path) not in state.tasks:
            state = self.load(path.checkpoint)
        task = state.tasks.get(str(path))
        if task is None:
            raise CheckpointError(
                f"{path.checkpoint / path.file} was published again with other weights; make a new "
                "request with vllm_vlora.lora_request"
            )
        return task
