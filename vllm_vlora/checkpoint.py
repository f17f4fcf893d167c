"""Checkpoint format 1 in memory: written task by task, read back and checked.

``manifest`` describes what lies on disk. Everything read is checked: names, sizes, dtypes, digests
and that every number is finite.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch

from vllm_vlora._version import __version__
from vllm_vlora.errors import CheckpointError, TaskNotFoundError
from vllm_vlora.hub import resolve_snapshot
from vllm_vlora.manifest import (
    BASIS_INDEX_FILE,
    BASIS_SHARD_BYTES,
    CONFIG_FILE,
    EXTRA_PREFIX,
    FORMAT_VERSION,
    SAFETENSORS_DTYPES,
    TASKS_FILE,
    TASKS_FOLDER,
    BasisSpec,
    Config,
    FileRef,
    ModuleSpec,
    Segment,
    TaskRecord,
    basis_tensors,
    dtype_of,
    read_checked,
    read_config,
    read_tasks,
    segment_sides,
    task_tensor_sizes,
    tensor_name,
)
from vllm_vlora.quantize import PackedMatrix, part_specs
from vllm_vlora.task_ids import encode_task_id


@dataclass(frozen=True)
class StoredModule:
    """One module of one task in memory: its segment's fields and its packed matrices by side."""

    representation: str
    format: str
    rank: int
    matrices: Mapping[str, PackedMatrix]
    scale: float = 1.0
    error: float = 0.0
    core: str | None = None


@dataclass(frozen=True)
class Basis:
    """A module's shared basis: ``u`` is U transposed (k_out x d_out), ``v`` is V (k_in x d_in)."""

    u: PackedMatrix
    v: PackedMatrix


@dataclass(frozen=True)
class StoredTask:
    """A task read back whole: module name -> stored matrices, and its non-LoRA tensors."""

    task_id: str
    digest: str
    modules: Mapping[str, StoredModule]
    extra: Mapping[str, torch.Tensor]


# --- writing --------------------------------------------------------------------------------------


@dataclass
class CheckpointWriter:
    """Writes one checkpoint into ``folder``, which ``atomic.publish_folder`` then puts in place.

    Call ``add_module`` for every module (with its basis, if it has one), ``add_task`` for every
    task and ``finish`` last: the manifest is the last file written. Tensors are written as they
    come, so memory is one basis shard and one task.
    """

    folder: Path
    base_model: str | None
    shard_bytes: int = BASIS_SHARD_BYTES
    modules: list[ModuleSpec] = field(default_factory=list)
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    _index: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _shards: list[tuple[Path, list[str]]] = field(default_factory=list)
    _basis_data_nbytes: int = 0

    def add_module(
        self, name: str, d_in: int, d_out: int, kind: str = "linear", basis: Basis | None = None
    ) -> ModuleSpec:
        """Declare a module and store its basis, if it has one."""
        assert name not in self._index, f"module {name} declared twice"
        spec = ModuleSpec(name, d_in, d_out, kind)
        if basis is not None:
            spec.basis = BasisSpec(basis.u.rows, basis.v.rows, basis.u.format)
            for side, matrix in (("U", basis.u), ("V", basis.v)):
                for part, tensor in matrix.parts.items():
                    self._pending[f"{name}.{side}.{part}"] = tensor.cpu().contiguous()
            if sum(t.nbytes for t in self._pending.values()) >= self.shard_bytes:
                self._flush_shard()
        self._index[name] = len(self.modules)
        self.modules.append(spec)
        return spec

    def add_task(
        self,
        task_id: str,
        modules: Mapping[str, StoredModule],
        *,
        original_nbytes: int,
        error: float,
        adapter_config: dict[str, Any],
        source: str = "",
        extra: Mapping[str, torch.Tensor] | None = None,
    ) -> TaskRecord:
        """Write one task's file and remember its record."""
        assert task_id not in self.tasks, f"task {task_id!r} added twice"
        segments: list[Segment] = []
        chunks: dict[str, list[torch.Tensor]] = {}
        for name, stored in modules.items():
            segment = Segment(
                self._index[name],
                stored.representation,
                stored.format,
                stored.rank,
                stored.scale,
                stored.error,
                stored.core,
            )
            segments.append(segment)
            for side, matrix in stored.matrices.items():
                for part, tensor in matrix.parts.items():
                    key = tensor_name(segment, side, part)
                    chunks.setdefault(key, []).append(tensor.cpu().reshape(-1))
        tensors = {key: torch.cat(parts) for key, parts in chunks.items()}
        extra = extra or {}
        tensors.update({EXTRA_PREFIX + k: t.cpu().contiguous() for k, t in extra.items()})
        ref = self._write(
            f"{TASKS_FOLDER}/{encode_task_id(task_id)}.safetensors", safetensors.torch.save(tensors)
        )
        self.tasks[task_id] = TaskRecord(
            file=ref.file,
            sha256=ref.sha256,
            nbytes=ref.nbytes,
            original_nbytes=original_nbytes,
            error=error,
            segments=segments,
            adapter_config=adapter_config,
            source=source,
            extra={k: (SAFETENSORS_DTYPES[t.dtype], list(t.shape)) for k, t in extra.items()},
        )
        return self.tasks[task_id]

    def finish(self, card: str) -> None:
        """Write the basis index, ``tasks.json``, the model card and, last, the manifest."""
        basis = self._finish_basis()
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        tasks = self._write(TASKS_FILE, msgspec.json.encode(self.tasks))
        config = Config(
            FORMAT_VERSION,
            f"vllm-vlora {__version__}",
            self.base_model,
            self.modules,
            basis,
            tasks,
        )
        self._write(CONFIG_FILE, msgspec.json.format(msgspec.json.encode(config)))

    def _flush_shard(self) -> None:
        path = self.folder / f"basis.part{len(self._shards)}"
        path.write_bytes(safetensors.torch.save(self._pending))
        self._basis_data_nbytes += sum(t.nbytes for t in self._pending.values())
        self._shards.append((path, list(self._pending)))
        self._pending = {}

    def _finish_basis(self) -> list[FileRef]:
        if self._pending:
            self._flush_shard()
        count, refs, weight_map = len(self._shards), [], {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = "basis.safetensors"
            if count > 1:
                final = f"basis-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / final)
            digest, size = _hash_file(self.folder / final)
            refs.append(FileRef(final, digest, size))
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {
                "metadata": {"total_size": self._basis_data_nbytes},
                "weight_map": weight_map,
            }
            self._write(BASIS_INDEX_FILE, json.dumps(index, indent=2).encode())
        return refs

    def _write(self, name: str, data: bytes) -> FileRef:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return FileRef(name, hashlib.sha256(data).hexdigest(), len(data))


def _hash_file(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


# --- reading --------------------------------------------------------------------------------------


class Checkpoint:
    """A checkpoint opened for reading.

    Opening reads and checks the two JSON files only; ``load_task`` and ``bases`` read tensors and
    check each file's SHA-256, tensor names, dtypes, sizes and that every number is finite.

    Raises:
        CheckpointError: something is missing, damaged or contradicts the manifest.
        CheckpointVersionError: a newer format wrote it.
    """

    def __init__(self, path: Path, config: Config, tasks: dict[str, TaskRecord]) -> None:
        self.path = path
        self.config = config
        self.tasks = tasks
        # Names the content of all bases; resident bases are kept under it.
        self.basis_digest = hashlib.sha256(
            "".join(ref.sha256 for ref in config.basis).encode()
        ).hexdigest()

    @classmethod
    def open(cls, ref: str | Path) -> Checkpoint:
        """Open a folder or a Hub id (``org/name`` or ``org/name@revision``)."""
        path = resolve_snapshot(ref, what="checkpoint", error=CheckpointError)
        config = read_config(path)
        tasks = read_tasks(path, config)
        return cls(path, config, tasks)

    @property
    def base_model(self) -> str | None:
        """Hub id or path of the model that the adapters were trained on."""
        return self.config.base_model

    @property
    def modules(self) -> list[ModuleSpec]:
        """The adapted modules, in the order that segments count them."""
        return self.config.modules

    @property
    def max_rank(self) -> int:
        """The largest rank of any task: what ``--max-lora-rank`` must allow."""
        return max((record.max_rank for record in self.tasks.values()), default=0)

    @property
    def original_nbytes(self) -> int:
        """The original adapters' LoRA weights at 16 bits each, in bytes."""
        return sum(record.original_nbytes for record in self.tasks.values())

    @property
    def basis_nbytes(self) -> int:
        """Bytes of the basis files."""
        return sum(ref.nbytes for ref in self.config.basis)

    @property
    def nbytes(self) -> int:
        """Bytes of every safetensors file, headers included, classifier heads and the like not."""
        return self.basis_nbytes + sum(self.lora_nbytes(task) for task in self.tasks)

    @property
    def ratio(self) -> float:
        """``original_nbytes / nbytes``."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.inf

    def record(self, task_id: str) -> TaskRecord:
        """The record of a task; TaskNotFoundError names the tasks there are."""
        if task_id not in self.tasks:
            known = ", ".join(list(self.tasks)[:5]) + (", ..." if len(self.tasks) > 5 else "")
            raise TaskNotFoundError(f"{self.path}: no task {task_id!r}; it has: {known or 'none'}")
        return self.tasks[task_id]

    def lora_nbytes(self, task_id: str) -> int:
        """Bytes of a task's file without its extra tensors' data."""
        return self.record(task_id).lora_nbytes

    def digest(self, task_id: str) -> str:
        """Identity of a task's weights: 32 hex digits over its record and its basis, if any.

        Two tasks with the same digest have the same weights; a task re-published with other
        weights, ranks, scales or basis has another digest. What says nothing about the weights
        (measured errors, the module's place in the manifest) is not part of it.
        """
        record = self.record(task_id)
        content = msgspec.json.encode(
            [
                record.sha256,
                [
                    [self.modules[s.module], s.representation, s.format, s.rank, s.scale, s.core]
                    for s in record.segments
                ],
            ]
        )
        if any(self.modules[s.module].basis is not None for s in record.segments):
            content += self.basis_digest.encode()
        return hashlib.sha256(content).hexdigest()[:32]

    def load_task(self, task_id: str, device: torch.device | str = "cpu") -> StoredTask:
        """Read one task whole, checked, with its packed matrices on ``device``.

        The matrices of a task are views of a handful of flat tensors, so a device gets a handful of
        copies, whatever the number of modules.
        """
        record = self.record(task_id)
        path = self.path / record.file
        tensors = _load_checked(path, FileRef(record.file, record.sha256, record.nbytes))
        expected = task_tensor_sizes(record.segments, self.modules)
        flat = {name: tensors.pop(name, None) for name in expected}
        for name, (dtype, size) in expected.items():
            _check_tensor(path, name, flat[name], dtype, (size,))
            flat[name] = flat[name].to(device)  # type: ignore[union-attr]
        extra = {}
        for name, (dtype_name, shape) in record.extra.items():
            tensor = tensors.pop(EXTRA_PREFIX + name, None)
            _check_tensor(path, name, tensor, dtype_of(dtype_name), tuple(shape))
            extra[name] = tensor
        if tensors:
            raise CheckpointError(f"{path}: unexpected tensor {next(iter(tensors))!r}")
        modules = self._split(record, flat)  # type: ignore[arg-type]
        return StoredTask(task_id, self.digest(task_id), modules, extra)  # type: ignore[arg-type]

    def bases(self) -> Iterator[tuple[str, Basis]]:
        """Yield (module name, basis) for every module that has one; holds one shard at a time."""
        wanted = {m.name: m for m in self.modules if m.basis is not None}
        held: dict[str, torch.Tensor] = {}
        for ref in self.config.basis:
            held.update(_load_checked(self.path / ref.file, ref))
            for name in list(wanted):
                tensors = list(basis_tensors(wanted[name]))
                if all(tensor_name in held for tensor_name, _, _ in tensors):
                    module = wanted.pop(name)
                    parts: dict[str, dict[str, torch.Tensor]] = {"U": {}, "V": {}}
                    for tensor_name, dtype, shape in tensors:
                        tensor = held.pop(tensor_name)
                        _check_tensor(self.path / ref.file, tensor_name, tensor, dtype, shape)
                        side, part = tensor_name[len(name) + 1 :].split(".", 1)
                        parts[side][part] = tensor
                    yield name, _make_basis(module, parts)
        if wanted:
            raise CheckpointError(f"{self.path}: no basis for module {next(iter(wanted))}")
        if held:
            raise CheckpointError(f"{self.path}: unexpected basis tensor {next(iter(held))!r}")

    def _split(
        self, record: TaskRecord, flat: Mapping[str, torch.Tensor]
    ) -> dict[str, StoredModule]:
        offsets = dict.fromkeys(flat, 0)
        modules = {}
        for segment in record.segments:
            spec = self.modules[segment.module]
            matrices = {}
            for side, (rows, cols) in segment_sides(segment, spec).items():
                parts = {}
                for part, (_, row_shape) in part_specs(segment.format, cols).items():
                    key = tensor_name(segment, side, part)
                    size = rows * math.prod(row_shape)
                    start = offsets[key]
                    parts[part] = flat[key][start : start + size].view(rows, *row_shape)
                    offsets[key] = start + size
                matrices[side] = PackedMatrix(segment.format, rows, cols, parts)
            modules[spec.name] = StoredModule(
                segment.representation,
                segment.format,
                segment.rank,
                matrices,
                segment.scale,
                segment.error,
                segment.core,
            )
        return modules


def _make_basis(module: ModuleSpec, parts: Mapping[str, dict[str, torch.Tensor]]) -> Basis:
    spec = module.basis
    assert spec is not None
    return Basis(
        PackedMatrix(spec.format, spec.k_out, module.d_out, parts["U"]),
        PackedMatrix(spec.format, spec.k_in, module.d_in, parts["V"]),
    )


def _load_checked(path: Path, ref: FileRef) -> dict[str, torch.Tensor]:
    data = read_checked(path, ref)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error


def _check_tensor(
    path: Path,
    name: str,
    tensor: torch.Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    if tensor is None:
        raise CheckpointError(f"{path}: tensor {name!r} is missing")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{path}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
            f"{dtype} {shape}"
        )
    # One-byte floats have no isfinite of their own.
    values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{path}: tensor {name!r} holds NaN or infinity")
