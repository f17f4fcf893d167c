"""Checkpoint format 1: what lies on disk, how it is written and how it is read back.

    CKPT/vlora_config.json       the manifest: version, base model, module shapes, file digests
    CKPT/basis*.safetensors      shared bases (Hub sharding convention with an index when large)
    CKPT/tasks.json              task id -> file, digest, segments, measured error, adapter_config
    CKPT/tasks/*.safetensors     one file a task, named by ``task_ids.encode_task_id``
    CKPT/README.md               a Hub model card

A *segment* is one module of one task. Its matrices are packed row by row (``quantize``) and lie one
after another, in the order of the task's segments, in one flat tensor per
``representation.side.format.part``; their extents follow from the segment's rank and the module's
shape, so a task of two hundred modules is a handful of tensors. ``docs/format.md`` has the whole
layout.

Everything read is checked: names, sizes, dtypes, finite values, digests, and that paths stay
inside.
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
from vllm_vlora.errors import (
    CheckpointError,
    CheckpointVersionError,
    TaskIdError,
    TaskNotFoundError,
)
from vllm_vlora.hub import resolve_snapshot
from vllm_vlora.quantize import FORMATS, PackedMatrix, part_specs
from vllm_vlora.task_ids import encode_task_id, validate_task_id

FORMAT_VERSION = 1
CONFIG_FILE = "vlora_config.json"
TASKS_FILE = "tasks.json"
TASKS_FOLDER = "tasks"
BASIS_INDEX_FILE = "basis.safetensors.index.json"
REPRESENTATIONS = ("joint", "private")
EXTRA_PREFIX = "extra."
# A shard is serialised in memory before it is written, so its size bounds the writer's memory.
BASIS_SHARD_BYTES = 1 << 30

# In the order in which safetensors lays the tensors of a file out, then by name.
_SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_ORDER = {dtype: place for place, dtype in enumerate(_SAFETENSORS_DTYPES)}


class BasisSpec(msgspec.Struct, forbid_unknown_fields=True):
    """The shared basis of one module: U (d_out x k_out) and V (k_in x d_in), orthonormal."""

    k_out: int
    k_in: int
    format: str


class ModuleSpec(msgspec.Struct, forbid_unknown_fields=True):
    """A module of the base model that some task adapts; delta_W is d_out x d_in."""

    name: str
    d_in: int
    d_out: int
    kind: str = "linear"
    basis: BasisSpec | None = None


class FileRef(msgspec.Struct, forbid_unknown_fields=True):
    """A file beside the manifest, with its SHA-256 and size in bytes."""

    file: str
    sha256: str
    nbytes: int


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """``vlora_config.json``."""

    format_version: int
    created_by: str
    base_model: str | None
    modules: list[ModuleSpec]
    basis: list[FileRef]
    tasks: FileRef


class Segment(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """How one module of one task is stored.

    ``private``: delta_W = scale * B A, side A (rank x d_in), side B transposed (rank x d_out).
    ``joint``, core ``factors``: delta_W = scale * U L_B L_A V, side A is L_A (rank x k_in), side B
    is L_B transposed (rank x k_out). ``joint``, core ``dense``: side C is the core (k_out x k_in),
    whose rank is ``rank``. ``error`` is the measured ||delta_W' - delta_W||_F / ||delta_W||_F.
    """

    module: int
    representation: str
    format: str
    rank: int
    scale: float = 1.0
    error: float = 0.0
    core: str | None = None


class TaskRecord(msgspec.Struct, forbid_unknown_fields=True):
    """One task in ``tasks.json``; ``original_nbytes`` counts its LoRA weights at 16 bits each."""

    file: str
    sha256: str
    nbytes: int
    original_nbytes: int
    error: float
    segments: list[Segment]
    adapter_config: dict[str, Any]
    source: str = ""
    extra: dict[str, tuple[str, list[int]]] = msgspec.field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """The largest rank any module of the task needs of a serving slot."""
        return max((segment.rank for segment in self.segments), default=0)


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

    def to(self, device: torch.device | str) -> StoredModule:
        """The same module with its matrices on ``device``."""
        moved = {side: matrix.to(device) for side, matrix in self.matrices.items()}
        return StoredModule(
            self.representation, self.format, self.rank, moved, self.scale, self.error, self.core
        )


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


def segment_sides(segment: Segment, module: ModuleSpec) -> dict[str, tuple[int, int]]:
    """Side -> (rows, columns) of the matrices that a segment stores."""
    if segment.representation == "private":
        return {"A": (segment.rank, module.d_in), "B": (segment.rank, module.d_out)}
    basis = module.basis
    assert basis is not None
    if segment.core == "dense":
        return {"C": (basis.k_out, basis.k_in)}
    return {"A": (segment.rank, basis.k_in), "B": (segment.rank, basis.k_out)}


def task_tensor_sizes(
    segments: Iterable[Segment], modules: list[ModuleSpec]
) -> dict[str, tuple[torch.dtype, int]]:
    """Flat tensor name -> (dtype, elements) of a task file with these segments."""
    sizes: dict[str, tuple[torch.dtype, int]] = {}
    for segment in segments:
        for side, (rows, cols) in segment_sides(segment, modules[segment.module]).items():
            for part, (dtype, row_shape) in part_specs(segment.format, cols).items():
                key = _tensor_name(segment, side, part)
                have = sizes.get(key, (dtype, 0))[1]
                sizes[key] = (dtype, have + rows * math.prod(row_shape))
    return sizes


def safetensors_nbytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of a safetensors file with these tensors: length word, padded JSON header, data."""
    header, offset = {}, 0
    for name, (dtype, shape) in sorted(
        tensors.items(), key=lambda item: (_DTYPE_ORDER[item[1][0]], item[0])
    ):
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (text + 7) // 8 * 8 + offset


def task_nbytes(segments: Iterable[Segment], modules: list[ModuleSpec]) -> int:
    """Bytes of the task file that these segments make, header included, extra tensors left out."""
    sizes = task_tensor_sizes(segments, modules)
    return safetensors_nbytes({name: (dtype, (n,)) for name, (dtype, n) in sizes.items()})


def basis_nbytes(modules: Iterable[ModuleSpec]) -> int:
    """Bytes of the basis file of these modules, header included (one shard)."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in modules:
        for name, dtype, shape in _basis_tensors(module):
            tensors[name] = (dtype, shape)
    return safetensors_nbytes(tensors) if tensors else 0


def _tensor_name(segment: Segment | StoredModule, side: str, part: str) -> str:
    return f"{segment.representation}.{side}.{segment.format}.{part}"


def _basis_tensors(
    module: ModuleSpec,
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    if module.basis is None:
        return
    extents = {"U": (module.basis.k_out, module.d_out), "V": (module.basis.k_in, module.d_in)}
    for side, (rows, cols) in extents.items():
        for part, (dtype, row_shape) in part_specs(module.basis.format, cols).items():
            yield f"{module.name}.{side}.{part}", dtype, (rows, *row_shape)


# --- writing -------------------------------------------------------------------------------------


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
                    key = _tensor_name(stored, side, part)
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
            extra={k: (_SAFETENSORS_DTYPES[t.dtype], list(t.shape)) for k, t in extra.items()},
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
                "metadata": {"total_size": sum(ref.nbytes for ref in refs)},
                "weight_map": weight_map,
            }
            self._write(BASIS_INDEX_FILE, json.dumps(index, indent=2).encode())
        return refs

    def _write(self, name: str, data: bytes) -> FileRef:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return FileRef(name, hashlib.sha256(data).hexdigest(), len(data))


# --- reading -------------------------------------------------------------------------------------


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
        self._basis_digest = hashlib.sha256(
            "".join(ref.sha256 for ref in config.basis).encode()
        ).hexdigest()

    @classmethod
    def open(cls, ref: str | Path) -> Checkpoint:
        """Open a folder or a Hub id (``org/name`` or ``org/name@revision``)."""
        path = resolve_snapshot(ref, what="checkpoint", error=CheckpointError)
        config = _read_config(path)
        tasks = _read_tasks(path, config)
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
        record = self.record(task_id)
        return record.nbytes - sum(
            math.prod(shape) * _dtype_of(dtype).itemsize for dtype, shape in record.extra.values()
        )

    def digest(self, task_id: str) -> str:
        """Identity of a task's weights: 32 hex digits over its record and its basis, if any.

        Two tasks with the same digest have the same weights; a task re-published with other
        weights, ranks, scales or basis has another digest.
        """
        record = self.record(task_id)
        content = msgspec.json.encode(
            (record.sha256, record.segments, [self.modules[s.module] for s in record.segments])
        )
        if any(self.modules[s.module].basis is not None for s in record.segments):
            content += self._basis_digest.encode()
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
            _check_tensor(path, name, tensor, _dtype_of(dtype_name), tuple(shape))
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
                tensors = list(_basis_tensors(wanted[name]))
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
                    key = _tensor_name(segment, side, part)
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


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of ours, in whatever version, so that ``--force`` may replace it."""
    try:
        data = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "format_version" in data


def _make_basis(module: ModuleSpec, parts: Mapping[str, dict[str, torch.Tensor]]) -> Basis:
    spec = module.basis
    assert spec is not None
    return Basis(
        PackedMatrix(spec.format, spec.k_out, module.d_out, parts["U"]),
        PackedMatrix(spec.format, spec.k_in, module.d_in, parts["V"]),
    )


def _read_config(path: Path) -> Config:
    file = path / CONFIG_FILE
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not a vllm-vlora checkpoint: it has no {CONFIG_FILE}; make one with "
            "`vllm-vlora compress`"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    _check_version(file, data)
    config = _decode(file, data, Config)
    _check_modules(file, config)
    for ref in [*config.basis, config.tasks]:
        _check_inside(file, ref.file)
    return config


def _check_version(file: Path, data: bytes) -> None:
    try:
        version = json.loads(data).get("format_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a JSON object ({error})") from error
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file}: format_version must be a whole number, got {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointVersionError(
            f"{file}: format version {version} is newer than this vllm-vlora reads "
            f"({FORMAT_VERSION}); upgrade vllm-vlora"
        )


def _check_modules(file: Path, config: Config) -> None:
    seen = set()
    for module in config.modules:
        if module.name in seen or not module.name:
            raise CheckpointError(f"{file}: module {module.name!r} is listed twice or unnamed")
        seen.add(module.name)
        if module.d_in < 1 or module.d_out < 1 or module.kind not in ("linear", "embedding"):
            raise CheckpointError(f"{file}: module {module.name} has an impossible shape or kind")
        basis = module.basis
        if basis is not None and (
            not 1 <= basis.k_in <= module.d_in
            or not 1 <= basis.k_out <= module.d_out
            or basis.format not in FORMATS
        ):
            raise CheckpointError(f"{file}: module {module.name} has an impossible basis")


def _read_tasks(path: Path, config: Config) -> dict[str, TaskRecord]:
    file = path / config.tasks.file
    data = _read_checked(file, config.tasks)
    tasks = _decode(file, data, dict[str, TaskRecord])
    for task_id, record in tasks.items():
        try:
            validate_task_id(task_id)
        except TaskIdError as error:
            raise CheckpointError(f"{file}: {error}") from error
        for name, (dtype, _) in record.extra.items():
            if dtype not in _SAFETENSORS_DTYPES.values():
                raise CheckpointError(
                    f"{file}: task {task_id!r}, tensor {name!r}: unknown dtype {dtype!r}"
                )
        if record.file != f"{TASKS_FOLDER}/{encode_task_id(task_id)}.safetensors":
            raise CheckpointError(f"{file}: task {task_id!r} names a foreign file {record.file!r}")
        _check_segments(file, task_id, record, config.modules)
    return tasks


def _check_segments(
    file: Path, task_id: str, record: TaskRecord, modules: list[ModuleSpec]
) -> None:
    seen = set()
    for segment in record.segments:
        if not 0 <= segment.module < len(modules) or segment.module in seen:
            raise CheckpointError(
                f"{file}: task {task_id!r} names module {segment.module}, which does not exist or "
                "stands twice"
            )
        seen.add(segment.module)
        module = modules[segment.module]
        wrong = _segment_fault(segment, module)
        if wrong:
            raise CheckpointError(f"{file}: task {task_id!r}, module {module.name}: {wrong}")


def _segment_fault(segment: Segment, module: ModuleSpec) -> str | None:
    if segment.representation not in REPRESENTATIONS:
        return f"unknown representation {segment.representation!r}; upgrade vllm-vlora"
    if segment.format not in FORMATS:
        return f"unknown number format {segment.format!r}; upgrade vllm-vlora"
    if segment.rank < 1:
        return f"rank must be positive, got {segment.rank}"
    if not math.isfinite(segment.scale):
        return f"scale is not finite ({segment.scale})"
    if segment.representation == "joint":
        if module.basis is None:
            return "joint, but the module has no basis"
        if segment.core not in ("factors", "dense"):
            return f"unknown core form {segment.core!r}"
        if segment.core == "dense" and segment.rank > min(module.basis.k_in, module.basis.k_out):
            return f"rank {segment.rank} exceeds the core"
    return None


def _check_inside(file: Path, name: str) -> None:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{file}: path {name!r} leaves the checkpoint")


def _decode(file: Path, data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _hash_file(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _read_checked(path: Path, ref: FileRef) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; copy the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if len(data) != ref.nbytes:
        raise CheckpointError(
            f"{path}: {len(data)} bytes, the manifest says {ref.nbytes}; copy the checkpoint again"
        )
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise CheckpointError(
            f"{path}: SHA-256 differs from the manifest's; copy the checkpoint again"
        )
    return data


def _load_checked(path: Path, ref: FileRef) -> dict[str, torch.Tensor]:
    data = _read_checked(path, ref)
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


def _dtype_of(name: str) -> torch.dtype:
    return next(dtype for dtype, known in _SAFETENSORS_DTYPES.items() if known == name)
