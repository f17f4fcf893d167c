"""Tasks that are resident in a worker's memory: bases once, every task packed, all on device.

A task is held in one of two forms: as a direct task, or as the sources from which it is materialized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import CheckpointError, ModelMismatchError
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.identity import TaskPath, task_path
from vllm_vlora.quantize import PackedMatrix
from vllm_vlora.representations.registry import side_sources
from vllm_vlora.representations.stored import Basis, SideSource, StoredModule
from vllm_vlora.triton_kernels.direct import DirectTask

Check = Callable[[Checkpoint, Iterable[str], bool], None]
MakePath = Callable[[Checkpoint], DirectPath]


@dataclass(frozen=True)
class ResidentTask:
    """One task on the device.

    Attributes:
        sources: the engine's module name -> sources of A and of B transposed; empty for a direct task.
        direct: the task as the direct kernels read it; None for one that is materialized.
        obstacle: why it is materialized; empty for a direct task.
    """

    task_id: str
    path: str
    rank: int
    sources: dict[str, tuple[SideSource, SideSource]]
    extra: dict[str, torch.Tensor]
    direct: DirectTask | None = None
    obstacle: str = ""


class ResidentStore:
    """The tasks of one worker by their ``lora_path``, which names their content.

    Bases and private factors keep their stored precision; only the cores of joint tasks, which are
    small, are unpacked. A task that was loaded stays: the API server may hold its path for as long as
    it lives, and a request whose task must be read from disk can fail, which inside a step ends the
    engine. So a re-published task costs the bytes of its old state until the engine ends.

    Args:
        device: where the tensors lie.
        engine_name: turns the adapters' name of a module into the engine's.
        check: called with a checkpoint, task ids and whether they run direct before these are loaded;
            raises when the served model cannot take them.
        only_direct: refuse tasks that cannot run direct.
    """

    def __init__(
        self,
        device: torch.device,
        engine_name: Callable[[str], str],
        check: Check,
        only_direct: bool = False,
    ) -> None:
        self._device = device
        self._engine_name = engine_name
        self._check = check
        self._only_direct = only_direct
        self.direct: DirectPath | None = None
        self._tasks: dict[str, ResidentTask] = {}
        # By the digest of all bases, then by module and the representation of the tasks that share it.
        self._bases: dict[str, dict[tuple[str, str], Basis]] = {}
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._tasks)

    def tasks(self) -> list[ResidentTask]:
        """Every task held, in the order of loading."""
        return list(self._tasks.values())

    def held(self, path: str) -> ResidentTask | None:
        """The task of a path, if it is in memory."""
        return self._tasks.get(path)

    def preload(self, folder: str | Path, make_path: MakePath | None = None) -> Checkpoint:
        """Load every task of a checkpoint, with ``make_path`` also what lets tasks run direct.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            ModelMismatchError: the served model cannot take it.
        """
        started = time.perf_counter()
        checkpoint = Checkpoint.open(folder)
        if make_path is not None:
            self.direct = make_path(checkpoint)
        self._load_all(checkpoint, checkpoint.tasks)
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
                self._load_all(checkpoint, [task_id])
                return self._tasks[str(path)]
        raise CheckpointError(
            f"{path.checkpoint / path.file} was published again with other weights; make a new "
            "request with vllm_vlora.lora_request"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held on the device; storage shared by several is counted once."""
        direct = 0
        if self.direct is not None:
            memory = self.direct.memory()
            direct = memory.bases + memory.cores + memory.factors + memory.table
        return direct + self.materialized_nbytes

    @property
    def materialized_nbytes(self) -> int:
        """Bytes of what is not held for direct tasks."""
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

    def _load_all(self, checkpoint: Checkpoint, task_ids: Iterable[str]) -> None:
        obstacles = {task_id: self._obstacle(checkpoint, task_id) for task_id in task_ids}
        for runs_direct in (True, False):
            chosen = [task for task, why in obstacles.items() if (why is None) == runs_direct]
            self._check(checkpoint, chosen, runs_direct)
        self._load_bases(checkpoint, [t for t, why in obstacles.items() if why is not None])
        for task_id, why in obstacles.items():
            self._load(checkpoint, task_id, why)

    def _obstacle(self, checkpoint: Checkpoint, task_id: str) -> str | None:
        """Why a task is materialized; None when it runs direct."""
        if self.direct is None:
            return "direct mode is off"
        why = self.direct.obstacle(checkpoint, task_id)
        if why is not None and self._only_direct:
            raise ModelMismatchError(
                f"{checkpoint.path}: task {task_id!r} cannot run direct: {why}; use "
                "VLLM_VLORA_MODE=auto, which materializes such tasks"
            )
        return why

    def _load(self, checkpoint: Checkpoint, task_id: str, obstacle: str | None) -> None:
        path = str(task_path(checkpoint, task_id))
        if path in self._tasks:
            return
        rank = checkpoint.record(task_id).max_rank
        stored = checkpoint.load_task(task_id, self._device)
        if obstacle is None:
            assert self.direct is not None
            task = self.direct.make_task(stored)
            self._tasks[path] = ResidentTask(task_id, path, rank, {}, {}, task)
            return
        bases = self._bases.get(checkpoint.basis_digest, {})
        sources = {
            self._engine_name(name): side_sources(
                self._lay_out(module), bases.get((name, module.representation))
            )
            for name, module in stored.modules.items()
        }
        extra = dict(stored.extra)
        self._tasks[path] = ResidentTask(task_id, path, rank, sources, extra, None, obstacle)

    def _load_bases(self, checkpoint: Checkpoint, task_ids: list[str]) -> None:
        """Hold the packed bases that these tasks are materialized from."""
        held = self._bases.setdefault(checkpoint.basis_digest, {})
        wanted = {
            (checkpoint.modules[segment.module].name, segment.representation)
            for task_id in task_ids
            for segment in checkpoint.record(task_id).segments
            if not segment.is_private
        }
        if wanted <= held.keys():
            return
        for name, representation, basis in checkpoint.shared():
            key = name, representation
            if key in wanted and key not in held:
                u = basis.u.to(self._device)
                held[key] = Basis(self._by_slot(u), basis.v.to(self._device))

    def _lay_out(self, module: StoredModule) -> StoredModule:
        if not module.is_private:
            return module
        matrices = {**module.matrices, "B": self._by_slot(module.matrices["B"])}
        return replace(module, matrices=matrices)

    def _by_slot(self, matrix: PackedMatrix) -> PackedMatrix:
        """On CPU: the matrix laid out as a slot's B is, which is several times quicker to copy from."""
        return matrix.by_columns() if self._device.type == "cpu" else matrix
