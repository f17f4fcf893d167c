"""The manifest of a checkpoint: what its JSON says. ``layout`` has the tensors and their bytes.

    CKPT/vlora_config.json       the manifest: version, base model, module shapes, file digests
    CKPT/basis*.safetensors      shared bases (Hub sharding convention with an index when large)
    CKPT/tasks.json              task id -> file, digest, segments, measured error, adapter_config
    CKPT/tasks.index, .records   the same of very many tasks, read one at a time; see ``task_index``
    CKPT/tasks/*.safetensors     one file a task, named by ``task_ids.encode_task_id``
    CKPT/attachments*            tokenizers that travel with tasks; see ``attachments``
    CKPT/aliases.json            other names for tasks and blends; see ``aliases``
    CKPT/router*                 picks tasks by prompts; see ``router_files``
    CKPT/components.json         how many components were asked for; see ``components``
    CKPT/README.md               a Hub model card

A *segment* is one module of one task. Its matrices are packed row by row (``quantize``) and lie one
after another, in the order of the task's segments, in one flat tensor per
``representation.side.format.part``; their extents follow from the segment's rank and the module's
shape, so a task of two hundred modules is a handful of tensors. ``docs/format.md`` has the whole
layout.

Format 2 adds what format 1 cannot say: ``bits`` and ``rows`` of a segment, and ``flat``; format 3 adds
``renamed`` of a task. A checkpoint that uses none of it is written as format 1, byte for byte as ever.
Format 4 is that of ``INDEXED_TASKS`` tasks and more, with ``tasks.index`` in place of ``tasks.json``.
Format 5 is that of a checkpoint with the number format ``trellis``, whatever it has of the others.

Everything read is checked: versions, names, extents, digests, and that paths stay inside.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import GenericAlias
from typing import Any, BinaryIO

import msgspec

from vllm_vlora.adapters.module_names import renamed
from vllm_vlora.adapters.peft_config import check_values
from vllm_vlora.checkpoint.layout import SAFETENSORS_DTYPES, dtype_of
from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import AdapterError, CheckpointError, CheckpointVersionError, TaskIdError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.regular_files import JSON_BYTES, open_regular, read_regular, size_of
from vllm_vlora.representations.registry import segment_fault, shared_fault
from vllm_vlora.representations.spec import ModuleSpec, Segment, Size
from vllm_vlora.strict_json import JSONError, check_plain, decode, decode_typed
from vllm_vlora.task_ids import encode_task_id, validate_task_id

FORMAT_VERSION = 5
"""The newest version. Each checkpoint is written in the least version that can say what it holds."""
CONFIG_FILE = "vlora_config.json"
TASKS_FILE = "tasks.json"
INDEX_FILE = "tasks.index"
RECORDS_FILE = "tasks.records"
INDEX_VERSION = 4
"""The first version that has these two in place of ``tasks.json``; a later one has them or not."""
TRELLIS_VERSION = 5
"""The first version with private factors in trellis codes."""
INDEXED_TASKS = 2048
"""From so many tasks on a checkpoint is written with them: reading all records takes a second then."""
TASKS_FOLDER = "tasks"
BASIS_INDEX_FILE = "basis.safetensors.index.json"


class FileRef(msgspec.Struct, forbid_unknown_fields=True):
    """A file beside the manifest, with its SHA-256 and size in bytes."""

    file: str
    sha256: str
    nbytes: Size


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """``vlora_config.json``."""

    format_version: int
    created_by: str
    base_model: str | None
    modules: list[ModuleSpec]
    basis: list[FileRef]
    tasks: FileRef


class TaskRecord(msgspec.Struct, forbid_unknown_fields=True):
    """One task in ``tasks.json``; ``original_nbytes`` counts its LoRA weights at 16 bits each.

    ``renamed`` is for an adapter that has other names for its modules than the manifest: prefix of the
    manifest's names -> what the adapter's names have in its place (``adapters.module_names``).
    """

    file: str
    sha256: str
    nbytes: Size
    original_nbytes: Size
    error: float
    segments: list[Segment]
    adapter_config: dict[str, Any]
    source: str = ""
    extra: dict[str, tuple[str, list[Size]]] = msgspec.field(default_factory=dict)
    renamed: dict[str, str] = msgspec.field(default_factory=dict)

    def own_name(self, module: str) -> str:
        """What the task's adapter calls a module of the manifest."""
        return renamed(module, self.renamed)

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


def task_file(task_id: str) -> str:
    """The file of a task, relative to the checkpoint."""
    return f"{TASKS_FOLDER}/{encode_task_id(task_id)}.safetensors"


# --- versions and writing -------------------------------------------------------------------------

# Fields that came with a later format, by the struct that has them. Before it they are None or empty.
_LATER_FIELDS: dict[type, dict[int, tuple[str, ...]]] = {
    ModuleSpec: {2: ("flat",)},
    Segment: {2: ("bits", "rows")},
    TaskRecord: {3: ("renamed",)},
}


def format_version(modules: Iterable[ModuleSpec], tasks: Iterable[TaskRecord]) -> int:
    """The least format version that can say what these modules and tasks hold."""
    version = 1
    for struct in _structs(modules, tasks):
        for later, names in _LATER_FIELDS[type(struct)].items():
            if later > version and any(getattr(struct, name) for name in names):
                version = later
        if isinstance(struct, Segment) and struct.format == "trellis":
            return TRELLIS_VERSION
    return version


def is_indexed(config: Config) -> bool:
    """Whether ``tasks.index`` names the tasks, and not ``tasks.json``."""
    if config.format_version > INDEX_VERSION:
        return config.tasks.file == INDEX_FILE
    return config.format_version == INDEX_VERSION


def _structs(
    modules: Iterable[ModuleSpec], tasks: Iterable[TaskRecord]
) -> Iterator[ModuleSpec | TaskRecord | Segment]:
    yield from modules
    for record in tasks:
        yield record
        yield from record.segments


def plain(struct: ModuleSpec | Segment | TaskRecord) -> dict[str, Any]:
    """The JSON object of a struct; fields of later formats stand in it where they are set."""
    fields = msgspec.to_builtins(struct)
    for names in _LATER_FIELDS[type(struct)].values():
        for name in names:
            if not fields[name]:
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
        fields[task_id] = {**plain(record), "segments": segments}
    return msgspec.json.encode(fields)


# --- reading --------------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of ours, in whatever version, so that ``--force`` may replace it."""
    try:
        data = decode(read_regular(path / CONFIG_FILE, JSON_BYTES), object)
    except (OSError, JSONError):
        return False
    return isinstance(data, dict) and "format_version" in data


def read_config(path: Path) -> Config:
    """Read and check ``vlora_config.json`` of the checkpoint folder ``path``."""
    file = path / CONFIG_FILE
    refuse_link_out(file, path, CheckpointError)
    try:
        data = read_regular(file, JSON_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not a vllm-vlora checkpoint: it has no {CONFIG_FILE}; make one with "
            "`vllm-vlora compress`"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    version = _check_version(file, data)
    config = _decode(file, data, Config, _CONFIGS.get(version))
    _check_modules(file, config)
    for ref in [*config.basis, config.tasks]:
        _check_inside(file, ref.file)
    return config


def read_tasks(path: Path, config: Config) -> dict[str, TaskRecord]:
    """Read and check ``tasks.json``, against its digest and the modules of ``config``."""
    file = path / config.tasks.file
    data = read_checked(file, config.tasks)
    tasks = _decode(file, data, dict[str, TaskRecord], _TASKS.get(config.format_version))
    for task_id, record in tasks.items():
        try:
            validate_task_id(task_id)
        except TaskIdError as error:
            raise CheckpointError(f"{file}: {error}") from error
        check_adapter_config(file, task_id, record.adapter_config)
        if record.file != task_file(task_id):
            raise CheckpointError(f"{file}: task {task_id!r} names a foreign file {record.file!r}")
        check_segments(file, task_id, record.segments, config.modules)
        check_formats(file, record.segments, config.format_version)
        check_names(file, task_id, record, config.modules)
    return tasks


def check_adapter_config(file: Path, task_id: str, config: dict[str, Any]) -> None:
    """Raise CheckpointError where the config of a task's adapter is none that can be used."""
    try:
        check_plain(config)
        check_values(config, f"{file}: task {task_id!r}, adapter_config")
    except JSONError as error:
        raise CheckpointError(f"{file}: task {task_id!r}, adapter_config: {error}") from error
    except AdapterError as error:
        raise CheckpointError(str(error)) from error


def read_checked(path: Path, ref: FileRef) -> bytes:
    """Read a file of a checkpoint, whose size and SHA-256 must be those of ``ref``."""
    with _open_of_size(path, ref) as stream:
        data = stream.read(ref.nbytes)
    if len(data) != ref.nbytes:
        raise _wrong_size(path, len(data), ref)
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise CheckpointError(f"{path}: SHA-256 differs from the manifest's; {copy_again(path)}")
    return data


def check_size(path: Path, ref: FileRef) -> None:
    """Raise CheckpointError where a file of a checkpoint is missing or has another size than ``ref``."""
    with _open_of_size(path, ref):
        pass


@contextmanager
def _open_of_size(path: Path, ref: FileRef) -> Iterator[BinaryIO]:
    refuse_link_out(path, _folder_of(path, ref), CheckpointError)
    try:
        with open_regular(path) as stream:
            size = size_of(stream)
            if size != ref.nbytes:
                raise _wrong_size(path, size, ref)
            yield stream
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; {copy_again(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _wrong_size(path: Path, size: int, ref: FileRef) -> CheckpointError:
    return CheckpointError(
        f"{path}: {size} bytes, the manifest says {ref.nbytes}; {copy_again(path)}"
    )


def _folder_of(path: Path, ref: FileRef) -> Path:
    """The checkpoint that a file lies in."""
    return path.parents[len(Path(ref.file).parts) - 1]


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a file of any length."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _check_version(file: Path, data: bytes) -> int:
    try:
        version = decode(data, dict[str, Any]).get("format_version")
    except JSONError as error:
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
        wrong = shared_fault(module)
        if wrong:
            raise CheckpointError(f"{file}: module {module.name} has an impossible {wrong}")


def check_segments(
    file: Path, task_id: str, segments: Iterable[Segment], modules: Sequence[ModuleSpec]
) -> None:
    """Raise CheckpointError where segments of a task are not such as modules of theirs can have."""
    seen = set()
    for segment in segments:
        if not 0 <= segment.module < len(modules) or segment.module in seen:
            raise CheckpointError(
                f"{file}: task {task_id!r} names module {segment.module}, which does not exist or "
                "stands twice"
            )
        seen.add(segment.module)
        module = modules[segment.module]
        wrong = segment_fault(segment, module)
        if wrong:
            raise CheckpointError(f"{file}: task {task_id!r}, module {module.name}: {wrong}")


def check_formats(file: Path, segments: Iterable[Segment], version: int) -> None:
    """Raise CheckpointError where a segment has a number format that came with a later version."""
    if version < TRELLIS_VERSION and any(segment.format == "trellis" for segment in segments):
        raise CheckpointError(
            f"{file}: it has the number format 'trellis', which format {version} has not; its "
            "format_version is wrong"
        )


def check_names(
    file: Path, task_id: str, record: TaskRecord, modules: Sequence[ModuleSpec]
) -> None:
    """Raise CheckpointError where tensors of a task, or its names of modules, are impossible."""
    for name, (dtype, _) in record.extra.items():
        if dtype not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"{file}: task {task_id!r}, tensor {name!r}: unknown dtype {dtype!r}"
            )
    if not record.renamed:
        return
    own = {record.own_name(modules[segment.module].name) for segment in record.segments}
    if len(own) < len(record.segments) or "" in own:
        raise CheckpointError(
            f"{file}: task {task_id!r} has no name of its own for each of its modules"
        )


def _check_inside(file: Path, name: str) -> None:
    parts = Path(name).parts
    if (
        not parts
        or Path(name).is_absolute()
        or ".." in parts
        or "\\" in name
        or not name.isprintable()
    ):
        raise CheckpointError(f"{file}: path {name!r} leaves the checkpoint")


def _decode(file: Path, data: bytes, kind: Any, older: Any) -> Any:
    try:
        return decode_typed(data, kind, *([] if older is None else [older]))
    except JSONError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _as_of(version: int, struct: type[msgspec.Struct], **types: Any) -> Any:
    """The struct as a format has it, without later fields, and with fields of these other types."""
    came = _LATER_FIELDS.get(struct, {})
    later = {name for since, names in came.items() if since > version for name in names}
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


def _config_of(version: int) -> Any:
    return _as_of(version, Config, modules=GenericAlias(list, (_as_of(version, ModuleSpec),)))


def _tasks_of(version: int) -> Any:
    segments = GenericAlias(list, (_as_of(version, Segment),))
    return GenericAlias(dict, (str, _as_of(version, TaskRecord, segments=segments)))


# A file of an older version must also decode as these, so that no later field stands in it.
_CONFIGS = {1: _config_of(1)}
_TASKS = {version: _tasks_of(version) for version in (1, 2)}
