"""The tasks of a large checkpoint, of which none is decoded before it is asked for (format 4).

    CKPT/tasks.index      safetensors: a row for each task (``task_entry``), a row for each part
    CKPT/tasks.records    the parts, JSON, one behind the other

A task's record is three *parts*: what is its own (errors by module, names of extra tensors), its
segments, and its adapter's config. Equal segments and configs are one part, and the tasks of one
collection have mostly equal ones. The manifest has the digest of the index, which is read and checked
whole; the index has the digest of every part, which is read alone and checked by it. So nothing is used
that the manifest does not vouch for, and opening reads some 150 bytes a task.

``docs/format.md`` has the whole layout.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from vllm_vlora.checkpoint.manifest import (
    RECORDS_FILE,
    Config,
    FileRef,
    TaskRecord,
    check_adapter_config,
    check_formats,
    check_names,
    check_segments,
    is_indexed,
    plain,
    read_checked,
    read_tasks,
    task_file,
)
from vllm_vlora.checkpoint.pinning import (
    basis_digest,
    identity_of,
    stands_on_basis,
    task_digest,
)
from vllm_vlora.checkpoint.task_entry import TaskEntry, TaskTable, entry_of
from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import CheckpointError, TaskIdError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.regular_files import open_regular, size_of
from vllm_vlora.representations.spec import ModuleSpec, Segment, Size
from vllm_vlora.strict_json import JSONError, decode_typed
from vllm_vlora.task_ids import validate_task_ids
from vllm_vlora.tensor_files import DamagedFileError, read_tensors

# Decoded records that are kept, and decoded parts of each kind: some 30 kB each with 112 modules.
_KEPT = 256

COLUMNS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "sha256": (torch.uint8, (32,)),
    "nbytes": (torch.int64, ()),
    "lora_nbytes": (torch.int64, ()),
    "original_nbytes": (torch.int64, ()),
    "error": (torch.float64, ()),
    "min_rank": (torch.int64, ()),
    "max_rank": (torch.int64, ()),
    "representation": (torch.uint8, ()),
    "format": (torch.uint8, ()),
    "lost_modules": (torch.int32, ()),
    "no_update": (torch.uint8, ()),
    "narrow_rows": (torch.uint8, ()),
    "carries": (torch.uint8, ()),
    "digest": (torch.uint8, (16,)),
    "parts": (torch.int32, (3,)),
}
"""Tensor of the index -> dtype and shape of a task's row; the first ones are fields of ``TaskEntry``."""
PART_COLUMNS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "part_nbytes": (torch.int32, ()),
    "part_sha256": (torch.uint8, (32,)),
}
_WORDS = ("representation", "format")
_FLAGS = ("no_update", "narrow_rows", "carries")
_SIZES = ("nbytes", "lora_nbytes", "original_nbytes", "min_rank", "max_rank", "lost_modules")


class About(msgspec.Struct, forbid_unknown_fields=True):
    """The tensor ``about`` of an index.

    ``words`` are those that ``representation`` and ``format`` count, and ``usage`` has, of all segments
    that are alike but for rank, scale and error, the one of the greatest rank (:class:`Usage`).
    """

    records: FileRef
    words: list[str]
    usage: list[Segment]


class Own(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The first part of a record: what a task shares with no other."""

    errors: list[float]
    extra: dict[str, tuple[str, list[Size]]] = msgspec.field(default_factory=dict)
    renamed: dict[str, str] = msgspec.field(default_factory=dict)


class Parts(NamedTuple):
    """The places of a record's parts."""

    own: int
    segments: int
    config: int


@dataclass(frozen=True)
class Shape:
    """Decoded segments without their errors, and the modules that they count."""

    segments: list[Segment]
    modules: Sequence[ModuleSpec]

    @cached_property
    def identity(self) -> bytes:
        """What of them says something about the weights."""
        return identity_of(self.segments, self.modules)

    def digest(self, sha256: str, basis: str) -> str:
        """Of a task with these segments in a file with this SHA-256, beside bases of this digest."""
        stands = stands_on_basis(self.segments, self.modules)
        return task_digest(sha256, self.identity, basis if stands else None)


def encode_parts(record: TaskRecord) -> tuple[bytes, bytes, bytes]:
    """The parts of a record, in the order of ``Parts``."""
    errors = [segment.error for segment in record.segments]
    segments = [plain(segment) for segment in record.segments]
    for fields in segments:
        del fields["error"]
    return (
        msgspec.json.encode(Own(errors, record.extra, record.renamed)),
        msgspec.json.encode(segments),
        msgspec.json.encode(record.adapter_config),
    )


def join_parts(
    task_id: str, entry: TaskEntry, own: Own, segments: Sequence[Segment], config: dict[str, Any]
) -> TaskRecord:
    """The record that these are the parts of."""
    return TaskRecord(
        file=task_file(task_id),
        sha256=entry.sha256,
        nbytes=entry.nbytes,
        original_nbytes=entry.original_nbytes,
        error=entry.error,
        segments=[
            msgspec.structs.replace(segment, error=error)
            for segment, error in zip(segments, own.errors)
        ],
        adapter_config=config,
        source=entry.source,
        extra=own.extra,
        renamed=own.renamed,
    )


class Usage:
    """Of segments that are alike but for rank, scale and error, the one of the greatest rank.

    What can be known of how the tasks use the modules without reading their records: formats, cores,
    ranges of rows, whether rows have 3 or 2 bits, and the greatest rank of each.
    """

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self._found: dict[tuple[Any, ...], Segment] = {}
        self.add(segments)

    def add(self, segments: Iterable[Segment]) -> None:
        """Take these in too."""
        found = self._found
        for s in segments:
            narrow = s.bits is not None
            key = (s.module, s.representation, s.format, s.core or "", narrow, s.rows or ())
            held = found.setdefault(key, s)
            if (held.rank, held.bits or ()) < (s.rank, s.bits or ()):
                found[key] = s

    def segments(self) -> list[Segment]:
        """One of each, ordered; scale and error are 1 and 0."""
        return [
            msgspec.structs.replace(self._found[key], scale=1.0, error=0.0)
            for key in sorted(self._found)
        ]


def open_tasks(path: Path, config: Config) -> Mapping[str, TaskRecord]:
    """The tasks of a checkpoint, in its order: read and checked, or such as are when they are asked for.

    Raises:
        CheckpointError: what names the tasks is damaged, or contradicts itself.
    """
    if is_indexed(config):
        return IndexedTasks(path, config)
    return read_tasks(path, config)


def read_ids(path: Path, config: Config) -> list[str]:
    """The tasks that an index names, without a look at their records.

    Raises:
        CheckpointError: the index is damaged.
    """
    return _Table(path / config.tasks.file, config).ids


def records_of(path: Path, config: Config) -> FileRef | None:
    """The file of the records that an index names, which need not be there yet; None without an index.

    Raises:
        CheckpointError: the index is damaged.
    """
    if not is_indexed(config):
        return None
    return _Table(path / config.tasks.file, config).about.records


class IndexedTasks(TaskTable):
    """The tasks of an index; a record is read, and checked, when it is asked for.

    The file of the records stays open, so that they can be read after another checkpoint has taken the
    folder's place.

    Raises:
        CheckpointError: a file is damaged; of a part of the records, when it is read.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.file = path / config.tasks.file
        self._opened = path, config
        self._modules = config.modules
        self._basis = basis_digest(config.basis)
        table = _Table(self.file, config)
        self.records, self.usage = table.about.records, table.about.usage
        self._words, self._columns = table.about.words, table.columns
        self._sources = table.sources
        self._rows = {task_id: row for row, task_id in enumerate(table.ids)}
        self._parts = PartsFile(path, self.records, table.parts)
        # What many tasks have in common is decoded and checked once.
        self._record = lru_cache(_KEPT)(self._read_record)
        self._shape = lru_cache(_KEPT)(self._read_shape)
        self._config = lru_cache(_KEPT)(self._read_config)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the file anew.
        return IndexedTasks, self._opened

    def __getitem__(self, task_id: str) -> TaskRecord:
        if task_id not in self._rows:
            raise KeyError(task_id)
        return self._record(task_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._rows

    def entry(self, task_id: str) -> TaskEntry:
        """As of ``TaskTable``."""
        row = self._rows[task_id]
        return TaskEntry(*(self._cell(name, row) for name in TaskEntry._fields))

    def column(self, name: str) -> Sequence[Any]:
        """As of ``TaskTable``."""
        if name == "source":
            return self._sources
        values = self._columns[name]
        if name == "sha256":
            text = values.tobytes().hex()
            return [text[start : start + 64] for start in range(0, len(text), 64)]
        if name in _WORDS:
            return [self._words[place] for place in values.tolist()]
        return list((values.astype(bool) if name in _FLAGS else values).tolist())

    def entries(self) -> Iterator[tuple[str, TaskEntry]]:
        """As of ``TaskTable``."""
        columns = (self.column(name) for name in TaskEntry._fields)
        return zip(self._rows, map(TaskEntry._make, zip(*columns)))

    def alike(self) -> Iterator[tuple[Sequence[Segment], list[str]]]:
        """``Checkpoint.alike``.

        Raises:
            CheckpointError: a list of segments is damaged.
        """
        found: dict[int, list[str]] = {}
        for task_id, part in zip(self._rows, self._columns["parts"][:, 1].tolist()):
            found.setdefault(part, []).append(task_id)
        return ((self._shape(part).segments, task_ids) for part, task_ids in found.items())

    def kinds(self) -> Iterator[tuple[TaskRecord, list[str]]]:
        """``Checkpoint.kinds``.

        Raises:
            CheckpointError: a record is damaged.
        """
        found: dict[tuple[Any, ...], list[str]] = {}
        columns = self._columns["parts"][:, 1:].tolist(), self._columns["carries"].tolist()
        for task_id, (segments, config), carries in zip(self._rows, *columns):
            # Which tensors it carries, its own part says.
            alone = (task_id,) if carries else ()
            found.setdefault((segments, config, *alone), []).append(task_id)
        return ((self[task_ids[0]], task_ids) for task_ids in found.values())

    def digest(self, task_id: str) -> str:
        """``Checkpoint.digest`` of a task."""
        return self._columns["digest"][self._rows[task_id]].tobytes().hex()

    def parts(self, task_id: str) -> Parts:
        """Where the parts of a task's record are."""
        return Parts(*self._columns["parts"][self._rows[task_id]].tolist())

    def part(self, number: int) -> bytes:
        """One part, checked.

        Raises:
            CheckpointError: it is not what the index says.
        """
        return self._parts.read(number)

    def _cell(self, name: str, row: int) -> Any:
        if name == "source":
            return self._sources[row]
        value = self._columns[name][row]
        if name == "sha256":
            return value.tobytes().hex()
        if name in _WORDS:
            return self._words[value]
        return bool(value) if name in _FLAGS else value.item()

    def _read_record(self, task_id: str) -> TaskRecord:
        parts, entry = self.parts(task_id), self.entry(task_id)
        own: Own = self._decode(parts.own, Own)
        shape = self._shape(parts.segments)
        if len(own.errors) != len(shape.segments):
            raise damaged(self.file, f"task {task_id!r} has not one error for each module")
        # Decoded anew, so that who changes a record's config changes no other's.
        config = msgspec.json.decode(self._config(parts.config))
        record = join_parts(task_id, entry, own, shape.segments, config)
        check_names(self.file, task_id, record, self._modules)
        digest = shape.digest(record.sha256, self._basis)
        if entry_of(record) != entry or digest != self.digest(task_id):
            raise damaged(
                self.file, f"what it says of task {task_id!r} is not what its record says"
            )
        return record

    def _read_shape(self, part: int) -> Shape:
        segments = self._decode(part, list[Segment])
        if any(segment.error for segment in segments):
            raise damaged(self.file, f"part {part} has errors, which are a task's own")
        check_segments(self.file, f"(part {part})", segments, self._modules)
        return Shape(segments, self._modules)

    def _read_config(self, part: int) -> bytes:
        config = self._decode(part, dict[str, Any])
        check_adapter_config(self.file, f"(part {part})", config)
        return self.part(part)

    def _decode(self, part: int, kind: Any) -> Any:
        try:
            return decode_typed(self.part(part), kind)
        except JSONError as error:
            raise CheckpointError(f"{self._parts.path}: part {part}: {error}") from error


def damaged(file: Path, what: str) -> CheckpointError:
    """The refusal of an index."""
    return CheckpointError(f"{file}: {what}; {copy_again(file)}")


class PartsFile:
    """``tasks.records``, whose parts are read one at a time.

    Raises:
        CheckpointError: it is missing, or is not of the size that the index says.
    """

    def __init__(
        self, folder: Path, ref: FileRef, parts: Mapping[str, np.ndarray[Any, Any]]
    ) -> None:
        self.path = folder / ref.file
        refuse_link_out(self.path, folder, CheckpointError)
        self._sizes = parts["part_nbytes"]
        self._sha256 = parts["part_sha256"]
        self._ends = np.cumsum(self._sizes, dtype=np.int64)
        try:
            with open_regular(self.path) as file:
                size = size_of(file)
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {error.strerror}; {copy_again(self.path)}"
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        if size != ref.nbytes:
            raise damaged(self.path, f"{size} bytes, the index says {ref.nbytes}")

    def read(self, number: int) -> bytes:
        """One part.

        Raises:
            CheckpointError: it cannot be read, or is not what the index says.
        """
        size = int(self._sizes[number])
        try:
            data = os.pread(self._descriptor, size, int(self._ends[number]) - size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        if hashlib.sha256(data).digest() != self._sha256[number].tobytes():
            raise damaged(self.path, f"the SHA-256 of part {number} differs from the index")
        return data


class _Table:
    """``tasks.index``, read and checked whole."""

    def __init__(self, file: Path, config: Config) -> None:
        self._file = file
        data = read_checked(file, config.tasks)
        try:
            self._tensors = read_tensors(data)
        except DamagedFileError as error:
            raise damaged(file, f"not a safetensors file ({error})") from error
        self.about: About = self._text("about", About)
        self.ids: list[str] = self._text("ids", list[str])
        self.sources: list[str] = self._text("sources", list[str])
        self.columns = self._take(COLUMNS, len(self.ids))
        self.parts = self._take(PART_COLUMNS, None)
        if self._tensors:
            raise damaged(file, f"unexpected tensor {next(iter(self._tensors))!r}")
        self._check_ids()
        self._check_numbers()
        check_usage(file, self.about.usage, config.modules)
        check_formats(file, self.about.usage, config.format_version)

    def _tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._tensors.pop(name, None)
        if tensor is None or tensor.dtype != dtype or tensor.ndim == 0:
            raise damaged(self._file, f"the tensor {name!r} is missing or of another kind")
        return tensor

    def _text(self, name: str, kind: Any) -> Any:
        data = self._tensor(name, torch.uint8).numpy().tobytes()
        try:
            return decode_typed(data, kind)
        except JSONError as error:
            raise CheckpointError(f"{self._file}: {name}: {error}") from error

    def _take(
        self, columns: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], rows: int | None
    ) -> dict[str, np.ndarray[Any, Any]]:
        taken = {}
        for name, (dtype, shape) in columns.items():
            tensor = self._tensor(name, dtype)
            rows = len(tensor) if rows is None else rows
            if tuple(tensor.shape) != (rows, *shape):
                raise damaged(self._file, f"the tensor {name!r} has not a row for each")
            taken[name] = tensor.numpy()
        return taken

    def _check_ids(self) -> None:
        if len(set(self.ids)) < len(self.ids) or len(self.ids) != len(self.sources):
            raise damaged(self._file, "a task stands twice, or has no source")
        try:
            validate_task_ids(self.ids)
        except TaskIdError as error:
            raise CheckpointError(f"{self._file}: {error}") from error

    def _check_numbers(self) -> None:
        """Whatever is a place must be one, and a number one that a record can have."""
        sizes, records = self.parts["part_nbytes"], self.about.records
        most = {"parts": len(sizes), **dict.fromkeys(_WORDS, len(self.about.words))}
        most |= dict.fromkeys(_FLAGS, 2) | dict.fromkeys(_SIZES, (1 << 53) + 1)
        wrong = [
            name
            for name, end in most.items()
            if ((self.columns[name] < 0) | (self.columns[name] >= end)).any()
        ]
        if wrong or not np.isfinite(self.columns["error"]).all():
            raise damaged(self._file, f"impossible numbers in {(*wrong, 'error')[0]!r}")
        if (sizes < 0).any() or sizes.sum(dtype=np.int64) != records.nbytes:
            raise damaged(self._file, "its parts are not as large as their file")
        if records.file != RECORDS_FILE:
            raise damaged(self._file, f"it names a foreign file {records.file!r}")


def check_usage(file: Path, usage: Sequence[Segment], modules: Sequence[ModuleSpec]) -> None:
    """Raise CheckpointError where what an index says of the modules' use cannot be."""
    for segment in usage:
        check_segments(file, "(usage)", [segment], modules)
