"""The tasks of a checkpoint that is being written: few in memory, many in ``tasks.records`` at once.

Below ``manifest.INDEXED_TASKS`` tasks the records wait in memory and become ``tasks.json``. With more,
each goes to disk as it comes, in parts (``task_index``), and what stays in memory is a row for each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import safetensors.torch
import torch

from vllm_vlora.checkpoint import manifest
from vllm_vlora.checkpoint.manifest import (
    INDEX_FILE,
    INDEX_VERSION,
    RECORDS_FILE,
    TASKS_FILE,
    TRELLIS_VERSION,
    FileRef,
    TaskRecord,
    encode_tasks,
    format_version,
    hash_file,
)
from vllm_vlora.checkpoint.pinning import basis_digest
from vllm_vlora.checkpoint.task_entry import TaskEntry, TaskTable, entry_of
from vllm_vlora.checkpoint.task_index import (
    COLUMNS,
    PART_COLUMNS,
    About,
    IndexedTasks,
    Own,
    Parts,
    Shape,
    Usage,
    encode_parts,
    join_parts,
)
from vllm_vlora.representations.spec import ModuleSpec, Segment


class WrittenTasks(TaskTable):
    """Tasks of a checkpoint that is written into ``folder``, in the order in which they will be listed.

    Args:
        modules: those that the tasks' segments count; may grow until ``finish``.
    """

    def __init__(self, folder: Path, modules: Sequence[ModuleSpec]) -> None:
        self._folder = folder
        self._modules = modules
        self._held: dict[str, TaskRecord] = {}
        self._spool: _Spool | None = None

    def __getitem__(self, task_id: str) -> TaskRecord:
        return self._held[task_id] if self._spool is None else self._spool.record(task_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held if self._spool is None else self._spool.rows)

    def __len__(self) -> int:
        return len(self._held if self._spool is None else self._spool.rows)

    def entry(self, task_id: str) -> TaskEntry:
        """As of ``TaskTable``."""
        if self._spool is None:
            return entry_of(self._held[task_id])
        return self._spool.rows[task_id].entry

    def add(self, task_id: str, record: TaskRecord) -> None:
        """Take a task whose file is written."""
        assert task_id not in self, f"task {task_id!r} added twice"
        if self._spool is not None:
            self._spool.add(task_id, record)
            return
        self._held[task_id] = record
        if len(self._held) >= manifest.INDEXED_TASKS:
            self._spool = _Spool(self._folder / RECORDS_FILE)
            for known, held in self._held.items():
                self._spool.add(known, held)
            self._held = {}

    def copy(self, task_id: str, tasks: IndexedTasks) -> None:
        """Take a task of another checkpoint with the same modules, with its record as it is.

        Raises:
            CheckpointError: a part of its record is damaged.
        """
        if self._spool is None:
            self.add(task_id, tasks[task_id])
        else:
            assert task_id not in self, f"task {task_id!r} added twice"
            self._spool.copy(task_id, tasks)

    def arrange(self, task_ids: Iterable[str]) -> None:
        """List the tasks in this order, which names each of them."""
        order = list(task_ids)
        if self._spool is None:
            self._held = {task_id: self._held[task_id] for task_id in order}
        else:
            self._spool.rows = {task_id: self._spool.rows[task_id] for task_id in order}

    def finish(self, basis: Iterable[FileRef]) -> tuple[FileRef, int]:
        """Write what names the tasks; returns it, and the least format version that can say all."""
        if self._spool is not None:
            return self._spool.finish(self._folder, self._modules, basis_digest(basis))
        version = format_version(self._modules, self._held.values())
        return write_file(self._folder, TASKS_FILE, encode_tasks(self._held)), version


def write_file(folder: Path, name: str, data: bytes) -> FileRef:
    """Write a file of a checkpoint."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return FileRef(name, hashlib.sha256(data).hexdigest(), len(data))


class _Row(NamedTuple):
    entry: TaskEntry
    parts: Parts


class _Spool:
    """Parts on disk, and a row for each task and for each part."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[str, _Row] = {}
        self._path = path
        # Of each part its digest and where it ends.
        self._sha256: list[bytes] = []
        self._ends: list[int] = [0]
        # Parts that many tasks have, by their digest.
        self._shared: dict[bytes, int] = {}
        path.write_bytes(b"")

    def add(self, task_id: str, record: TaskRecord) -> None:
        self._take(task_id, entry_of(record), encode_parts(record))

    def copy(self, task_id: str, tasks: IndexedTasks) -> None:
        own, segments, config = map(tasks.part, tasks.parts(task_id))
        self._take(task_id, tasks.entry(task_id), (own, segments, config))

    def record(self, task_id: str) -> TaskRecord:
        entry, parts = self.rows[task_id]
        return join_parts(
            task_id,
            entry,
            msgspec.json.decode(self._read(parts.own), type=Own),
            msgspec.json.decode(self._read(parts.segments), type=list[Segment]),
            msgspec.json.decode(self._read(parts.config)),
        )

    def _take(self, task_id: str, entry: TaskEntry, parts: tuple[bytes, bytes, bytes]) -> None:
        own, segments, config = parts
        self.rows[task_id] = _Row(
            entry, Parts(self._append(own), self._share(segments), self._share(config))
        )

    def _share(self, part: bytes) -> int:
        digest = hashlib.sha256(part).digest()
        if digest not in self._shared:
            self._shared[digest] = self._append(part)
        return self._shared[digest]

    def _append(self, part: bytes) -> int:
        with self._path.open("ab") as file:
            file.write(part)
        self._sha256.append(hashlib.sha256(part).digest())
        self._ends.append(self._ends[-1] + len(part))
        return len(self._sha256) - 1

    def _read(self, part: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._ends[part])
            return file.read(self._ends[part + 1] - self._ends[part])

    def finish(
        self, folder: Path, modules: Sequence[ModuleSpec], basis: str
    ) -> tuple[FileRef, int]:
        digests, usage = self._digests(modules, basis)
        entries = [row.entry for row in self.rows.values()]
        words = sorted({word for entry in entries for word in (entry.representation, entry.format)})
        places = {word: place for place, word in enumerate(words)}
        values: dict[str, Any] = {name: [getattr(e, name) for e in entries] for name in _FIELDS}
        values["sha256"] = list(map(bytes.fromhex, values["sha256"]))
        for name in ("representation", "format"):
            values[name] = [places[word] for word in values[name]]
        values["digest"] = [digests[task_id] for task_id in self.rows]
        values["parts"] = [row.parts for row in self.rows.values()]
        sizes = np.diff(self._ends)
        tensors = {name: _tensor(name, COLUMNS, values[name]) for name in COLUMNS}
        for name, found in (("part_nbytes", sizes), ("part_sha256", self._sha256)):
            tensors[name] = _tensor(name, PART_COLUMNS, found)
        about = About(FileRef(RECORDS_FILE, *hash_file(self._path)), words, usage)
        for name, text in (
            ("about", about),
            ("ids", list(self.rows)),
            ("sources", [entry.source for entry in entries]),
        ):
            data = bytearray(msgspec.json.encode(text))
            tensors[name] = torch.frombuffer(data, dtype=torch.uint8)
        version = TRELLIS_VERSION if "trellis" in {s.format for s in usage} else INDEX_VERSION
        return write_file(folder, INDEX_FILE, safetensors.torch.save(tensors)), version

    def _digests(
        self, modules: Sequence[ModuleSpec], basis: str
    ) -> tuple[dict[str, bytes], list[Segment]]:
        """Each task's digest, and how the modules are used; every part of segments is read once."""
        by_part: dict[int, list[str]] = {}
        for task_id, row in self.rows.items():
            by_part.setdefault(row.parts.segments, []).append(task_id)
        digests, usage = {}, Usage()
        for part, task_ids in by_part.items():
            segments = msgspec.json.decode(self._read(part), type=list[Segment])
            usage.add(segments)
            shape = Shape(segments, modules)
            for task_id in task_ids:
                digest = shape.digest(self.rows[task_id].entry.sha256, basis)
                digests[task_id] = bytes.fromhex(digest)
        return digests, usage.segments()


_FIELDS = [name for name in TaskEntry._fields if name in COLUMNS]


def _tensor(
    name: str, columns: dict[str, tuple[torch.dtype, tuple[int, ...]]], values: Any
) -> torch.Tensor:
    dtype, shape = columns[name]
    if dtype == torch.uint8 and shape:
        return torch.frombuffer(bytearray(b"".join(values)), dtype=dtype).view(-1, *shape)
    return torch.tensor(np.asarray(values)).to(dtype).view(-1, *shape)
