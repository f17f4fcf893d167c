"""The manifest of a checkpoint: what its JSON says, how tensors are laid out, how big they are.

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

Format 2 adds what format 1 cannot say: ``bits`` and ``rows`` of a segment, and ``flat``. A checkpoint
that uses none of it is written as format 1, byte for byte as ever.

Everything read is checked: versions, names, extents, digests, and that paths stay inside.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import GenericAlias
from typing import Any

import msgspec
import torch

from vllm_vlora.errors import CheckpointError, CheckpointVersionError, TaskIdError
from vllm_vlora.quantize import FLOAT_DTYPES, FORMATS, part_specs
from vllm_vlora.task_ids import encode_task_id, validate_task_id

FORMAT_VERSION = 2
"""The newest version, which is written where it is needed; 1 is written everywhere else."""
CONFIG_FILE = "vlora_config.json"
TASKS_FILE = "tasks.json"
TASKS_FOLDER = "tasks"
BASIS_INDEX_FILE = "basis.safetensors.index.json"
REPRESENTATIONS = ("joint", "private", "flat")
# Part of a file that holds the codes of rows with so many bits.
CODE_PARTS = {4: "codes", 3: "codes3", 2: "codes2"}
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


class FlatSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one module's ``flat`` tasks share: the principal components of their flattened factors.

    ``flatU`` holds the mean and ``k_out`` components of B transposed (rank x d_out), ``flatV`` the
    mean and ``k_in`` components of A (rank x d_in): ``(k + 1) * rank`` rows, component by component,
    the mean first. After vlora, whose representation it is.
    """

    rank: int
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
    flat: FlatSpec | None = None


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
    whose rank is ``rank``. ``flat``: side A holds k_in loadings and side B k_out, one row each;
    A = mean + sum_j A_j * component j of flatV, and B transposed alike from flatU. ``error`` is the
    measured ||delta_W' - delta_W||_F / ||delta_W||_F.

    ``bits`` (private, nf4-dq): how many rows of each side have 4, 3 and 2 bits, in this order; None is
    4 bits for all. ``rows`` (joint): (u_start, u_stop, v_start, v_stop), the rows of U transposed and
    of V that the core stands on; None is all of them.
    """

    module: int
    representation: str
    format: str
    rank: int
    scale: float = 1.0
    error: float = 0.0
    core: str | None = None
    bits: tuple[int, int, int] | None = None
    rows: tuple[int, int, int, int] | None = None


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


def core_widths(segment: Segment, basis: BasisSpec) -> tuple[int, int]:
    """(k_out, k_in) of a joint segment's core: how many rows of each side of the basis it uses."""
    if segment.rows is None:
        return basis.k_out, basis.k_in
    u_start, u_stop, v_start, v_stop = segment.rows
    return u_stop - u_start, v_stop - v_start


def segment_sides(segment: Segment, module: ModuleSpec) -> dict[str, tuple[int, int]]:
    """Side -> (rows, columns) of the matrices that a segment stores."""
    if segment.representation == "private":
        return {"A": (segment.rank, module.d_in), "B": (segment.rank, module.d_out)}
    if segment.representation == "flat":
        assert module.flat is not None
        return {"A": (1, module.flat.k_in), "B": (1, module.flat.k_out)}
    assert module.basis is not None
    k_out, k_in = core_widths(segment, module.basis)
    if segment.core == "dense":
        return {"C": (k_out, k_in)}
    return {"A": (segment.rank, k_in), "B": (segment.rank, k_out)}


def stored_parts(
    segment: Segment, rows: int, cols: int
) -> Iterator[tuple[str, torch.dtype, int, tuple[int, ...]]]:
    """(part, dtype, rows, shape of a row) of a segment's side of ``rows`` rows, as in the file.

    These are the parts of the number format, save that codes of rows with 3 and 2 bits are parts of
    their own. A part without rows is left out.
    """
    for part, (dtype, row_shape) in part_specs(segment.format, cols).items():
        if part != "codes" or segment.bits is None:
            yield part, dtype, rows, row_shape
            continue
        for (bits, name), count in zip(CODE_PARTS.items(), segment.bits):
            if count:
                yield name, dtype, count, (row_shape[0] * bits // 4,)


def task_tensor_sizes(
    segments: Iterable[Segment], modules: list[ModuleSpec]
) -> dict[str, tuple[torch.dtype, int]]:
    """Flat tensor name -> (dtype, elements) of a task file with these segments."""
    sizes: dict[str, tuple[torch.dtype, int]] = {}
    for segment in segments:
        for side, (rows, cols) in segment_sides(segment, modules[segment.module]).items():
            for part, dtype, count, row_shape in stored_parts(segment, rows, cols):
                key = tensor_name(segment, side, part)
                have = sizes.get(key, (dtype, 0))[1]
                sizes[key] = (dtype, have + count * math.prod(row_shape))
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
    """(tensor name, dtype, shape) of what a module's tasks share: its basis, then its flat one."""
    for side, format, rows, cols in shared_sides(module):
        for part, (dtype, row_shape) in part_specs(format, cols).items():
            yield f"{module.name}.{side}.{part}", dtype, (rows, *row_shape)


def shared_sides(module: ModuleSpec) -> Iterator[tuple[str, str, int, int]]:
    """(side, format, rows, columns) of the matrices that a module's tasks share."""
    basis, flat = module.basis, module.flat
    if basis is not None:
        yield "U", basis.format, basis.k_out, module.d_out
        yield "V", basis.format, basis.k_in, module.d_in
    if flat is not None:
        yield "flatU", flat.format, (flat.k_out + 1) * flat.rank, module.d_out
        yield "flatV", flat.format, (flat.k_in + 1) * flat.rank, module.d_in


# --- versions and writing -------------------------------------------------------------------------

# Fields that came with format 2, by the struct that has them. They are None in format 1.
_VERSION_2_FIELDS = {ModuleSpec: ("flat",), Segment: ("bits", "rows")}


def format_version(modules: Iterable[ModuleSpec], tasks: Iterable[TaskRecord]) -> int:
    """The least format version that can say what these modules and tasks hold."""
    structs = [*modules, *(segment for record in tasks for segment in record.segments)]
    for struct in structs:
        if any(getattr(struct, name) is not None for name in _VERSION_2_FIELDS[type(struct)]):
            return 2
    return 1


def plain(struct: ModuleSpec | Segment) -> dict[str, Any]:
    """The JSON object of a module or a segment; fields of format 2 stand in it where they are set."""
    fields = msgspec.to_builtins(struct)
    for name in _VERSION_2_FIELDS[type(struct)]:
        if fields[name] is None:
            del fields[name]
    return fields


def encode_config(config: Config) -> bytes:
    """``vlora_config.json``, indented for people."""
    fields = {**msgspec.to_builtins(config), "modules": [plain(m) for m in config.modules]}
    return msgspec.json.format(msgspec.json.encode(fields))


def encode_tasks(tasks: Mapping[str, TaskRecord]) -> bytes:
    """``tasks.json``."""
    fields: dict[str, Any] = {}
    for task_id, record in tasks.items():
        segments = [plain(segment) for segment in record.segments]
        fields[task_id] = {**msgspec.to_builtins(record), "segments": segments}
    return msgspec.json.encode(fields)


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
    if _check_version(file, data) == 1:
        _decode(file, data, _CONFIG_1)
    config = _decode(file, data, Config)
    _check_modules(file, config)
    for ref in [*config.basis, config.tasks]:
        _check_inside(file, ref.file)
    return config


def read_tasks(path: Path, config: Config) -> dict[str, TaskRecord]:
    """Read and check ``tasks.json``, against its digest and the modules of ``config``."""
    file = path / config.tasks.file
    data = read_checked(file, config.tasks)
    if config.format_version == 1:
        _decode(file, data, _TASKS_1)
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


def _check_version(file: Path, data: bytes) -> int:
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
    return version


def _check_modules(file: Path, config: Config) -> None:
    seen = set()
    for module in config.modules:
        if module.name in seen or not module.name:
            raise CheckpointError(f"{file}: module {module.name!r} is listed twice or unnamed")
        seen.add(module.name)
        if module.d_in < 1 or module.d_out < 1 or module.kind not in ("linear", "embedding"):
            raise CheckpointError(f"{file}: module {module.name} has an impossible shape or kind")
        wrong = _basis_fault(module)
        if wrong:
            raise CheckpointError(f"{file}: module {module.name} has an impossible {wrong}")


def _basis_fault(module: ModuleSpec) -> str | None:
    basis, flat = module.basis, module.flat
    if basis is not None and (
        not 1 <= basis.k_in <= module.d_in
        or not 1 <= basis.k_out <= module.d_out
        or basis.format not in FORMATS
    ):
        return "basis"
    if flat is not None and (
        min(flat.rank, flat.k_in, flat.k_out) < 1 or flat.format not in FORMATS
    ):
        return "flat basis"
    return None


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
    return (
        _bits_fault(segment)
        or _rows_fault(segment, module)
        or _joint_fault(segment, module)
        or _flat_fault(segment, module)
    )


def _joint_fault(segment: Segment, module: ModuleSpec) -> str | None:
    if segment.representation != "joint":
        return None
    if module.basis is None:
        return "joint, but the module has no basis"
    if segment.core not in ("factors", "dense"):
        return f"unknown core form {segment.core!r}"
    if segment.core == "dense" and segment.rank > min(core_widths(segment, module.basis)):
        return f"rank {segment.rank} exceeds the core"
    return None


def _rows_fault(segment: Segment, module: ModuleSpec) -> str | None:
    if segment.rows is None:
        return None
    if segment.representation != "joint" or module.basis is None:
        return "rows of a basis, which only joint segments of a module with a basis use"
    u_start, u_stop, v_start, v_stop = segment.rows
    basis = module.basis
    if not (0 <= u_start < u_stop <= basis.k_out and 0 <= v_start < v_stop <= basis.k_in):
        return f"rows {list(segment.rows)} are not within the basis ({basis.k_out}, {basis.k_in})"
    return None


def _bits_fault(segment: Segment) -> str | None:
    if segment.bits is None:
        return None
    if segment.representation != "private" or segment.format != "nf4-dq":
        return "bits by row, which only private segments in nf4-dq have"
    if min(segment.bits) < 0 or sum(segment.bits) != segment.rank:
        return f"bits {list(segment.bits)} do not sum to the rank {segment.rank}"
    return None


def _flat_fault(segment: Segment, module: ModuleSpec) -> str | None:
    if segment.representation != "flat":
        return None
    if module.flat is None:
        return "flat, but the module has no flat basis"
    if segment.format not in FLOAT_DTYPES:
        return f"flat loadings are floating-point numbers, not {segment.format}"
    if segment.rank != module.flat.rank:
        return f"rank {segment.rank} is not the flat basis' {module.flat.rank}"
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


def _version_1(struct: type[msgspec.Struct], **types: Any) -> Any:
    """The struct as format 1 has it, without later fields, and with fields of these other types."""
    later = _VERSION_2_FIELDS.get(struct, ())
    fields: list[Any] = []
    for info in msgspec.structs.fields(struct):
        if info.name in later:
            continue
        field: tuple[Any, ...] = (info.name, types.get(info.name, info.type))
        if info.default_factory is not msgspec.NODEFAULT:
            field = (*field, msgspec.field(default_factory=info.default_factory))
        elif info.default is not msgspec.NODEFAULT:
            field = (*field, info.default)
        fields.append(field)
    return msgspec.defstruct(struct.__name__, fields, forbid_unknown_fields=True)


# A file of version 1 must also decode as these, so that no later field stands in it.
_CONFIG_1 = _version_1(Config, modules=GenericAlias(list, (_version_1(ModuleSpec),)))
_TASK_1 = _version_1(TaskRecord, segments=GenericAlias(list, (_version_1(Segment),)))
_TASKS_1 = GenericAlias(dict, (str, _TASK_1))
