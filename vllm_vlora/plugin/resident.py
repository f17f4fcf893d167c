"""Tasks that are resident in a worker's memory: bases once, every task packed, all on device.

What is loaded at start-up stays. A task that comes later stays until it is forgotten: the engine core
decides that (see ``residency``), which alone knows what is asked for.

A task is held in one of two forms: as a direct task, or as the sources from which it is materialized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vllm_vlora.adapters.saved_tensors import is_base_copy
from vllm_vlora.checkpoint.pinning import pinned, split_pin
from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.errors import CheckpointError, ModelMismatchError
from vllm_vlora.plugin.blend_paths import with_blend
from vllm_vlora.plugin.direct import DirectPath, task_memory
from vllm_vlora.plugin.identity import TaskPath, task_path
from vllm_vlora.quantize import PackedMatrix
from vllm_vlora.representations.registry import side_sources
from vllm_vlora.representations.stored import Basis, SideSource, StoredModule
from vllm_vlora.triton_kernels.direct import DirectTask

BasisKey = tuple[str, str, str]
"""Digest of all bases, module, representation of the tasks that share one."""
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


@dataclass(frozen=True)
class _Late:
    """A task that came after start-up: bytes of its own, and the bases that it needs beside them."""

    nbytes: int
    bases: frozenset[BasisKey]


class ResidentStore:
    """The tasks of one worker by their ``lora_path``, which names their content.

    Bases and private factors keep their stored precision; only the cores of joint tasks, which are
    small, are unpacked.

    Args:
        device: where the tensors lie.
        engine_name: turns the adapters' name of a module into the engine's.
        check: called with a checkpoint, task ids and whether they run direct before these are loaded;
            raises when the served model cannot take them.
        only_direct: refuse tasks that cannot run direct.
        elsewhere: the engine's names of modules that other pipeline-parallel ranks have; what is stored
            for them is left out.
        narrow_rows: hold rows of 3 and 2 bits with no more, in tasks that are materialized.
    """

    def __init__(
        self,
        device: torch.device,
        engine_name: Callable[[str], str],
        check: Check,
        only_direct: bool = False,
        elsewhere: Collection[str] = (),
        narrow_rows: bool = False,
    ) -> None:
        self._device = device
        self._engine_name = engine_name
        self._check = check
        self._only_direct = only_direct
        self._elsewhere = elsewhere
        self._narrow_rows = narrow_rows
        self.direct: DirectPath | None = None
        self._tasks: dict[str, ResidentTask] = {}
        # By the digest of all bases, then by module and the representation of the tasks that share it.
        self._bases: dict[str, dict[tuple[str, str], Basis]] = {}
        self._late: dict[str, _Late] = {}
        self._preloading = False
        self._pin: str | None = None
        self._preloaded_bases: set[BasisKey] = set()
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

        Where its reference says which content it must have, no other is loaded later either.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            ModelMismatchError: the served model cannot take it.
        """
        started = time.perf_counter()
        _, self._pin = split_pin(folder)
        checkpoint = Checkpoint.open(folder)
        if make_path is not None:
            self.direct = make_path(checkpoint)
        self._preloading = True
        self._load_all(checkpoint, checkpoint.tasks)
        self._preloading = False
        self._preloaded_bases = set(self._basis_keys())
        self.seconds = time.perf_counter() - started
        return checkpoint

    def task(self, path: TaskPath) -> ResidentTask:
        """The task of a path: from memory, or from disk when it was never asked for.

        Raises:
            CheckpointError: the checkpoint on disk no longer holds these weights, or is damaged.
            BlendError: the path is a blend's, of tasks that cannot be blended.
            ModelMismatchError: the served model cannot take the task.
        """
        held = self._tasks.get(str(path))
        if held is not None:
            return held
        if not path.checkpoint.is_absolute():
            # A client may have made it up; what is no path could be the name of a repository.
            raise CheckpointError(f"{path}: not a path from the root; give the task's whole path")
        checkpoint = with_blend(Checkpoint.open(pinned(path.checkpoint, self._pin)), path)
        for task_id, record in checkpoint.tasks.items():
            if record.file == path.file and checkpoint.digest(task_id) == path.digest:
                own = task_path(checkpoint, task_id)
                if own != path:
                    raise CheckpointError(f"{path}: give the task's own path, {own}")
                self._load_all(checkpoint, [task_id])
                return self._tasks[str(path)]
        raise CheckpointError(
            f"{path.checkpoint / path.file} was published again with other weights; make a new "
            "request with vllm_vlora.lora_request"
        )

    def preloaded(self) -> list[tuple[str, str]]:
        """(task id, path) of what was loaded at start-up, in that order."""
        tasks = self._tasks.values()
        return [(task.task_id, task.path) for task in tasks if task.path not in self._late]

    def is_late(self, path: str) -> bool:
        """Whether a task came after start-up and is held."""
        return path in self._late

    @property
    def late_nbytes(self) -> int:
        """Bytes on the device of what came after start-up."""
        late = [
            self._bases[digest][module, representation]
            for digest, module, representation in set(self._basis_keys()) - self._preloaded_bases
        ]
        return sum(task.nbytes for task in self._late.values()) + sum(
            sum(_storages(_basis_tensors(basis)).values()) for basis in late
        )

    def forget(self, path: str) -> None:
        """Let go of a task that came after start-up, if it is held, and of bases that no task needs."""
        if self._late.pop(path, None) is not None:
            task = self._tasks.pop(path)
            if task.direct is not None:
                assert self.direct is not None
                self.direct.drop_task(task.direct)
        needed = self._preloaded_bases.union(*(task.bases for task in self._late.values()))
        for digest, module, representation in set(self._basis_keys()) - needed:
            del self._bases[digest][module, representation]

    def _basis_keys(self) -> Iterable[BasisKey]:
        return [(digest, *key) for digest, held in self._bases.items() for key in held]

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held on the device; storage shared by several is counted once."""
        direct = 0 if self.direct is None else self.direct.memory().total
        return direct + self.materialized_nbytes

    @property
    def materialized_nbytes(self) -> int:
        """Bytes of what is not held for direct tasks."""
        return sum(_storages(self._tensors()).values())

    def _tensors(self) -> Iterable[torch.Tensor]:
        for bases in self._bases.values():
            for basis in bases.values():
                yield from _basis_tensors(basis)
        for task in self._tasks.values():
            yield from _task_tensors(task)

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
        # A core is some ten small operations a module: on the host they are faster than their launches.
        joint = all(segment.is_joint for segment in checkpoint.record(task_id).segments)
        if obstacle is None:
            assert self.direct is not None
            narrow = self.direct.narrow_rows
        else:
            narrow = self._narrow_rows and checkpoint.has_narrow_rows([task_id])
        stored = self._read(checkpoint, task_id, obstacle is None and joint, narrow)
        if obstacle is None:
            assert self.direct is not None
            task = self.direct.make_task(stored)
            self._keep(ResidentTask(task_id, path, rank, {}, {}, task), frozenset())
            return
        bases = self._bases.get(checkpoint.basis_digest, {})
        sources = {
            self._engine_name(name): side_sources(
                self._lay_out(module), bases.get((name, module.representation))
            )
            for name, module in stored.modules.items()
        }
        used = frozenset(
            (checkpoint.basis_digest, name, module.representation)
            for name, module in stored.modules.items()
            if not module.is_private
        )
        # A copy of the base's embedding is larger than many tasks together, and nothing reads it.
        extra = {name: t for name, t in stored.extra.items() if not is_base_copy(name)}
        self._keep(ResidentTask(task_id, path, rank, sources, extra, None, obstacle), used)

    def _keep(self, task: ResidentTask, bases: frozenset[BasisKey]) -> None:
        self._tasks[task.path] = task
        if self._preloading:
            return
        if task.direct is not None:
            nbytes = task_memory(task.direct).total
        else:
            shared = [self._bases[digest][module, kind] for digest, module, kind in bases]
            others = _storages(tensor for basis in shared for tensor in _basis_tensors(basis))
            own = _storages(_task_tensors(task))
            nbytes = sum(size for place, size in own.items() if place not in others)
        self._late[task.path] = _Late(nbytes, bases)

    def _load_bases(self, checkpoint: Checkpoint, task_ids: list[str]) -> None:
        """Hold the packed bases that these tasks are materialized from."""
        held = self._bases.setdefault(checkpoint.basis_digest, {})
        wanted = {
            (checkpoint.modules[segment.module].name, segment.representation)
            for task_id in task_ids
            for segment in checkpoint.record(task_id).segments
            if not segment.is_private and self._is_here(checkpoint.modules[segment.module].name)
        }
        if wanted <= held.keys():
            return
        for name, representation, basis in checkpoint.shared():
            key = name, representation
            if key in wanted and key not in held:
                u = basis.u.to(self._device)
                held[key] = Basis(self._by_slot(u), basis.v.to(self._device))

    def _is_here(self, module: str) -> bool:
        return not self._elsewhere or self._engine_name(module) not in self._elsewhere

    def _read(
        self, checkpoint: Checkpoint, task_id: str, on_host: bool, narrow: bool
    ) -> StoredTask:
        """A task on the device, or on the host, without what other pipeline ranks have."""
        if not self._elsewhere:
            return checkpoint.load_task(task_id, "cpu" if on_host else self._device, narrow)
        # Copies of what stays: views would keep the whole file's tensors.
        whole = checkpoint.load_task(task_id, narrow=narrow)
        modules = {
            name: replace(
                module,
                matrices={n: _copy(m, self._device) for n, m in module.matrices.items()},
            )
            for name, module in whole.modules.items()
            if self._is_here(name)
        }
        return replace(whole, modules=modules)

    def _lay_out(self, module: StoredModule) -> StoredModule:
        if not module.is_private:
            return module
        matrices = {**module.matrices, "B": self._by_slot(module.matrices["B"])}
        return replace(module, matrices=matrices)

    def _by_slot(self, matrix: PackedMatrix) -> PackedMatrix:
        """On CPU: the matrix laid out as a slot's B is, which is several times quicker to copy from."""
        return matrix.by_columns() if self._device.type == "cpu" else matrix


def _basis_tensors(basis: Basis) -> Iterable[torch.Tensor]:
    yield from basis.u.parts.values()
    yield from basis.v.parts.values()


def _task_tensors(task: ResidentTask) -> Iterable[torch.Tensor]:
    yield from task.extra.values()
    for pair in task.sources.values():
        for source in pair:
            yield from source.matrix.parts.values()
            if source.left is not None:
                yield source.left


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of what the tensors lie in."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _copy(matrix: PackedMatrix, device: torch.device) -> PackedMatrix:
    parts = {name: part.to(device, copy=True) for name, part in matrix.parts.items()}
    return replace(matrix, parts=parts)
