"""The manifest of checkpoint format 1: what its JSON says, how tensors are laid out, how big they are.

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

Everything read is checked: versions, names, extents, digests, and that paths stay inside.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from vllm_vlora.errors import CheckpointError, CheckpointVersionError, TaskIdError
from vllm_vlora.quantize import FORMATS, part_specs
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
SAFETENSORS_DTYPES = {
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
_DTYPE_ORDER = {dtype: place for place, dtype in enumerate(SAFETENSORS_DTYPES)}


class BasisSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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


class Segment(msgspec.Struct, forbid_unknown_fields=True):
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

    @property
    def lora_nbytes(self) -> int:
        """Bytes of the task's file without its extra tensors' data."""
        return self.nbytes - sum(
            math.prod(shape) * dtype_of(dtype).itemsize for dtype, shape in self.extra.values()
        )


# --- layout and sizes -----------------------------------------------------------------------------


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
                key = tensor_name(segment, side, part)
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
            "dtype": SAFETENSORS_DTYPES[dtype],
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
        for name, dtype, shape in basis_tensors(module):
            tensors[name] = (dtype, shape)
    return safetensors_nbytes(tensors) if tensors else 0


def tensor_name(segment: Segment, side: str, part: str) -> str:
    """Name of the flat tensor that a segment's side adds one part to."""
    return f"{segment.representation}.{side}.{segment.format}.{part}"


def basis_tensors(module: ModuleSpec) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(tensor name, dtype, shape) of a module's basis; nothing for a module without one."""
    if module.basis is None:
        return
    extents = {"U": (module.basis.k_out, module.d_out), "V": (module.basis.k_in, module.d_in)}
    for side, (rows, cols) in extents.items():
        for part, (dtype, row_shape) in part_specs(module.basis.format, cols).items():
            yield f"{module.name}.{side}.{part}", dtype, (rows, *row_shape)


# --- reading --------------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of ours, in whatever version, so that ``--force`` may replace it."""
    try:
        data = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "format_version" in data


def read_config(path: Path) -> Config:
    """Read and check ``vlora_config.json`` of the checkpoint folder ``path``."""
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


def read_tasks(path: Path, config: Config) -> dict[str, TaskRecord]:
    """Read and check ``tasks.json``, against its digest and the modules of ``config``."""
    file = path / config.tasks.file
    data = read_checked(file, config.tasks)
    tasks = _decode(file, data, dict[str, TaskRecord])
    for task_id, record in tasks.items():
        try:
            validate_task_id(task_id)
        except TaskIdError as error:
            raise CheckpointError(f"{file}: {error}") from error
        for name, (dtype, _) in record.extra.items():
            if dtype not in SAFETENSORS_DTYPES.values():
                raise CheckpointError(
                    f"{file}: task {task_id!r}, tensor {name!r}: unknown dtype {dtype!r}"
                )
        if record.file != f"{TASKS_FOLDER}/{encode_task_id(task_id)}.safetensors":
            raise CheckpointError(f"{file}: task {task_id!r} names a foreign file {record.file!r}")
        _check_segments(file, task_id, record, config.modules)
    return tasks


def read_checked(path: Path, ref: FileRef) -> bytes:
    """Read a file whose size and SHA-256 must be those of ``ref``."""
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


def dtype_of(name: str) -> torch.dtype:
    """The dtype that safetensors calls ``name``."""
    return next(dtype for dtype, known in SAFETENSORS_DTYPES.items() if known == name)
