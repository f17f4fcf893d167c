"""A checkpoint in memory: written task by task, read back and checked.

``manifest`` describes what lies on disk. Everything read is checked: names, sizes, dtypes, digests
and that every number is finite.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch

from vllm_vlora._version import __version__
from vllm_vlora.checkpoint.manifest import (
    BASIS_INDEX_FILE,
    BASIS_SHARD_BYTES,
    CODE_PARTS,
    CONFIG_FILE,
    EXTRA_PREFIX,
    SAFETENSORS_DTYPES,
    TASKS_FILE,
    TASKS_FOLDER,
    BasisSpec,
    Config,
    FileRef,
    FlatSpec,
    ModuleSpec,
    Segment,
    TaskRecord,
    basis_tensors,
    dtype_of,
    encode_config,
    encode_tasks,
    format_version,
    plain,
    read_checked,
    read_config,
    read_tasks,
    segment_sides,
    shared_sides,
    stored_parts,
    task_tensor_sizes,
    tensor_name,
)
from vllm_vlora.errors import CheckpointError, TaskNotFoundError
from vllm_vlora.quantize import PackedMatrix, is_finite, narrow_codes, part_specs, widen_codes
from vllm_vlora.snapshots import resolve_snapshot
from vllm_vlora.task_ids import encode_task_id
from vllm_vlora.wording import some_of


@dataclass(frozen=True)
class StoredModule:
    """One module of one task in memory: its segment's fields and its packed matrices by side.

    The matrices of a task with ``bits`` hold 4-bit codes in every row, as ``pack_narrow`` makes them;
    only the file has fewer.
    """

    representation: str
    format: str
    rank: int
    matrices: Mapping[str, PackedMatrix]
    scale: float = 1.0
    error: float = 0.0
    core: str | None = None
    bits: tuple[int, int, int] | None = None
    rows: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Basis:
    """A module's shared basis: ``u`` is U transposed (k_out x d_out), ``v`` is V (k_in x d_in)."""

    u: PackedMatrix
    v: PackedMatrix


@dataclass(frozen=True)
class FlatBasis(Basis):
    """What a module's ``flat`` tasks share, stacked as ``FlatSpec`` says.

    ``u`` is ((k_out + 1) * rank, d_out) and ``v`` ((k_in + 1) * rank, d_in).
    """

    rank: int

    @property
    def k_out(self) -> int:
        """Components of B transposed beside their mean."""
        return self.u.rows // self.rank - 1

    @property
    def k_in(self) -> int:
        """Components of A beside their mean."""
        return self.v.rows // self.rank - 1


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
        self,
        name: str,
        d_in: int,
        d_out: int,
        kind: str = "linear",
        basis: Basis | None = None,
        flat: FlatBasis | None = None,
    ) -> ModuleSpec:
        """Declare a module and store what its tasks share: a basis, a flat one, both or nothing."""
        assert name not in self._index, f"module {name} declared twice"
        spec = ModuleSpec(name, d_in, d_out, kind)
        shared: dict[str, PackedMatrix] = {}
        if basis is not None:
            spec.basis = BasisSpec(basis.u.rows, basis.v.rows, basis.u.format)
            shared.update(U=basis.u, V=basis.v)
        if flat is not None:
            spec.flat = FlatSpec(flat.rank, flat.k_out, flat.k_in, flat.u.format)
            shared.update(flatU=flat.u, flatV=flat.v)
        for side, matrix in shared.items():
            for part, tensor in matrix.parts.items():
                self._pending[f"{name}.{side}.{part}"] = tensor.cpu().contiguous()
        if shared and sum(t.nbytes for t in self._pending.values()) >= self.shard_bytes:
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
                stored.bits,
                stored.rows,
            )
            segments.append(segment)
            for side, matrix in stored.matrices.items():
                for part, tensor in _narrowed(matrix, segment.bits).items():
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

    def copy_task(self, checkpoint: Checkpoint, task_id: str) -> TaskRecord:
        """Take over a task of another checkpoint: its file as it is, its record with modules found anew.

        Its modules must be declared here, with the bases that it stands on. A basis may have grown at its
        end: the segment then says which rows it uses.

        Raises:
            TaskNotFoundError, CheckpointError: no such task, or its file is damaged.
        """
        assert task_id not in self.tasks, f"task {task_id!r} added twice"
        record = checkpoint.record(task_id)
        segments = []
        for segment in record.segments:
            old = checkpoint.modules[segment.module]
            place = self._index[old.name]
            rows = _grown_rows(segment, old, self.modules[place])
            segments.append(msgspec.structs.replace(segment, module=place, rows=rows))
        ref = FileRef(record.file, record.sha256, record.nbytes)
        self._write(record.file, read_checked(checkpoint.path / record.file, ref))
        self.tasks[task_id] = msgspec.structs.replace(record, segments=segments)
        return self.tasks[task_id]

    def finish(self, card: str) -> None:
        """Write the basis index, ``tasks.json``, the model card and, last, the manifest."""
        basis = self._finish_basis()
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        tasks = self._write(TASKS_FILE, encode_tasks(self.tasks))
        config = Config(
            format_version(self.modules, self.tasks.values()),
            f"vllm-vlora {__version__}",
            self.base_model,
            self.modules,
            basis,
            tasks,
        )
        self._write(CONFIG_FILE, encode_config(config))

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


def _grown_rows(
    segment: Segment, old: ModuleSpec, new: ModuleSpec
) -> tuple[int, int, int, int] | None:
    """The rows that a segment written on the basis of ``old`` uses of that of ``new``."""
    assert (old.d_in, old.d_out, old.kind) == (new.d_in, new.d_out, new.kind), new.name
    if segment.representation == "flat":
        assert old.flat == new.flat, f"{new.name} has another flat basis"
    if segment.representation != "joint" or segment.rows is not None or old.basis == new.basis:
        return segment.rows
    assert old.basis is not None
    assert new.basis is not None
    assert old.basis.k_out <= new.basis.k_out, f"the basis of {new.name} has shrunk"
    assert old.basis.k_in <= new.basis.k_in, f"the basis of {new.name} has shrunk"
    return 0, old.basis.k_out, 0, old.basis.k_in


def _narrowed(
    matrix: PackedMatrix, bits: tuple[int, int, int] | None
) -> Mapping[str, torch.Tensor]:
    """The parts of a matrix as its file has them (``manifest.stored_parts``)."""
    if bits is None:
        return matrix.parts
    parts = dict(matrix.parts)
    whole = parts.pop("codes").split(list(bits))
    for (width, name), codes in zip(CODE_PARTS.items(), whole):
        if len(codes):
            parts[name] = codes if width == 4 else narrow_codes(codes, width)
    return parts


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

    Examples:
        >>> opened = Checkpoint.open(checkpoint)
        >>> list(opened.tasks)
        ['task_0', 'task_1', 'task_2', 'task_3']
        >>> opened.load_task("task_1").modules["layers.0.q_proj"].representation
        'joint'
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
            known = some_of(self.tasks)
            raise TaskNotFoundError(f"{self.path}: no task {task_id!r}; it has: {known}")
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
        segments = [self._identity(segment) for segment in record.segments]
        content = msgspec.json.encode([record.sha256, segments])
        modules = [self.modules[segment.module] for segment in record.segments]
        if any(module.basis is not None or module.flat is not None for module in modules):
            content += self.basis_digest.encode()
        return hashlib.sha256(content).hexdigest()[:32]

    def _identity(self, s: Segment) -> list[Any]:
        """What of a segment says something about the weights; as in format 1 where it uses no more."""
        fields = [
            plain(self.modules[s.module]),
            s.representation,
            s.format,
            s.rank,
            s.scale,
            s.core,
        ]
        later = [s.bits, s.rows]
        return fields + later if any(later) else fields

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
        for name, representation, basis in self.shared():
            if representation == "joint":
                yield name, basis

    def shared_by(self, task_ids: Iterable[str]) -> dict[tuple[str, str], Basis]:
        """(module name, representation) -> what these tasks share there, as it is packed.

        Raises:
            TaskNotFoundError: no such task. CheckpointError: a basis file is damaged.
        """
        wanted = {
            (self.modules[segment.module].name, segment.representation)
            for task_id in task_ids
            for segment in self.record(task_id).segments
            if segment.representation != "private"
        }
        if not wanted:
            return {}
        return {
            (name, kind): basis for name, kind, basis in self.shared() if (name, kind) in wanted
        }

    def shared(self) -> Iterator[tuple[str, str, Basis]]:
        """Yield (module name, representation, what its tasks of that representation share).

        ``joint`` ones share a ``Basis``, ``flat`` ones a ``FlatBasis``. Holds one shard at a time.
        """
        wanted = {m.name: m for m in self.modules if m.basis is not None or m.flat is not None}
        held: dict[str, torch.Tensor] = {}
        for ref in self.config.basis:
            held.update(_load_checked(self.path / ref.file, ref))
            for name in list(wanted):
                tensors = list(basis_tensors(wanted[name]))
                if all(tensor_name in held for tensor_name, _, _ in tensors):
                    module = wanted.pop(name)
                    parts: dict[str, dict[str, torch.Tensor]] = {}
                    for tensor_name, dtype, shape in tensors:
                        tensor = held.pop(tensor_name)
                        _check_tensor(self.path / ref.file, tensor_name, tensor, dtype, shape)
                        side, part = tensor_name[len(name) + 1 :].split(".", 1)
                        parts.setdefault(side, {})[part] = tensor
                    yield from _make_shared(module, parts)
        if wanted:
            raise CheckpointError(f"{self.path}: no basis for module {next(iter(wanted))}")
        if held:
            raise CheckpointError(f"{self.path}: unexpected basis tensor {next(iter(held))!r}")

    def _split(
        self, record: TaskRecord, flat: Mapping[str, torch.Tensor]
    ) -> dict[str, StoredModule]:
        flat = {name: _widened(name, tensor) for name, tensor in flat.items()}
        offsets = dict.fromkeys(flat, 0)
        modules = {}
        for segment in record.segments:
            spec = self.modules[segment.module]
            matrices = {}
            for side, (rows, cols) in segment_sides(segment, spec).items():
                shapes = {
                    part: shape for part, (_, shape) in part_specs(segment.format, cols).items()
                }
                taken: dict[str, list[torch.Tensor]] = {part: [] for part in shapes}
                for part, _, count, _ in stored_parts(segment, rows, cols):
                    key = tensor_name(segment, side, part)
                    part = "codes" if part in CODE_PARTS.values() else part
                    start, size = offsets[key], count * math.prod(shapes[part])
                    taken[part].append(flat[key][start : start + size].view(count, *shapes[part]))
                    offsets[key] = start + size
                parts = {name: t[0] if len(t) == 1 else torch.cat(t) for name, t in taken.items()}
                matrices[side] = PackedMatrix(segment.format, rows, cols, parts)
            modules[spec.name] = StoredModule(
                segment.representation,
                segment.format,
                segment.rank,
                matrices,
                segment.scale,
                segment.error,
                segment.core,
                segment.bits,
                segment.rows,
            )
        return modules


def _widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A flat tensor of a task's file; codes of 3 and 2 bits, which lie in whole blocks, as of 4."""
    part = name.rsplit(".", 1)[-1]
    for bits, narrow in CODE_PARTS.items():
        if part == narrow and bits < 4:
            return widen_codes(tensor, bits)
    return tensor


def _make_shared(
    module: ModuleSpec, parts: Mapping[str, dict[str, torch.Tensor]]
) -> Iterator[tuple[str, str, Basis]]:
    sides = {
        side: PackedMatrix(format, rows, cols, parts[side])
        for side, format, rows, cols in shared_sides(module)
    }
    if module.basis is not None:
        yield module.name, "joint", Basis(sides["U"], sides["V"])
    if module.flat is not None:
        yield module.name, "flat", FlatBasis(sides["flatU"], sides["flatV"], module.flat.rank)


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
    if not is_finite(tensor):
        raise CheckpointError(f"{path}: tensor {name!r} holds NaN or infinity")
