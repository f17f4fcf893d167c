"""Tokenizers and chat templates that travel with tasks, kept beside the weights.

    CKPT/attachments.json          {"version": 1, "tasks": {task id: {name: file}}}
                                   {"version": 2, "sets": [{name: file}], "tasks": {task id: set}}
    CKPT/attachments/SHA256        each different file once, under its digest

A *file* is as in the manifest: path, SHA-256, bytes. ``name`` is what the file was called in the
adapter's folder (``adapters.companions``). Of so many tasks that the checkpoint has an index of them,
version 2 says of each which of the *sets* it has, by its place: most have one in common. Nothing of it is
needed to decode a task, so the manifest does not know of it, and a checkpoint with attachments reads as
one without to whatever does not look for them. Most adapters of a collection bring the same tokenizer,
which is then stored once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from vllm_vlora.adapters.companions import is_companion
from vllm_vlora.checkpoint import manifest
from vllm_vlora.checkpoint.beside import VERSION, decode_beside, read_beside
from vllm_vlora.checkpoint.manifest import FileRef, hash_file, read_checked
from vllm_vlora.errors import CheckpointError, OutputError
from vllm_vlora.regular_files import open_regular

ATTACHMENTS_FILE = "attachments.json"
ATTACHMENTS_FOLDER = "attachments"

Attached: TypeAlias = Mapping[str, FileRef]
"""Name in the adapter's folder -> where the file is kept."""


class _Index(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    tasks: dict[str, dict[str, FileRef]]


class _Sets(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    sets: list[dict[str, FileRef]]
    tasks: dict[str, int]


class Attachments(dict[str, dict[str, FileRef]]):
    """Those of a checkpoint by task, in the version in which they were read, which its digest is of."""

    version = VERSION


def read_attachments(checkpoint: Path, tasks: Iterable[str]) -> Attachments:
    """The attachments of those of ``tasks`` that have any, from the checkpoint's folder.

    Raises:
        CheckpointError: the index is damaged, newer, or names files that are not its own.
    """
    file = checkpoint / ATTACHMENTS_FILE
    data = read_beside(file)
    if data is None:
        return Attachments()
    index = decode_beside(file, data, _Index, _Sets)
    known = set(tasks)
    if isinstance(index, _Index):
        found = {task: files for task, files in index.tasks.items() if task in known}
        sets = list(found.items())
    else:
        _check_places(file, index)
        found = {t: index.sets[place] for t, place in index.tasks.items() if t in known}
        sets = [(f"of set {place}", files) for place, files in enumerate(index.sets)]
    for whose, files in sets:
        _check_files(file, whose, files)
    attachments = Attachments(found)
    attachments.version = index.version
    return attachments


def _check_places(file: Path, index: _Sets) -> None:
    for task, place in index.tasks.items():
        if not 0 <= place < len(index.sets):
            raise CheckpointError(f"{file}: task {task!r} has set {place}, which there is not")


def _check_files(file: Path, whose: str, files: Attached) -> None:
    for name, ref in files.items():
        if not is_companion(name) or ref.file != f"{ATTACHMENTS_FOLDER}/{ref.sha256}":
            raise CheckpointError(f"{file}: task {whose!r} names a foreign file {name!r}")
        if len(ref.sha256) != 64 or set(ref.sha256) - set("0123456789abcdef"):
            raise CheckpointError(f"{file}: task {whose!r}, {name!r}: no SHA-256")


def read_attached(checkpoint: Path, files: Attached) -> dict[str, bytes]:
    """The files of one task by name, checked.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    return {name: read_checked(checkpoint / ref.file, ref) for name, ref in files.items()}


def encode_attachments(tasks: Mapping[str, Attached]) -> bytes:
    """``attachments.json``, indented for people: as it was read, or in the version for so many tasks."""
    many = len(tasks) >= manifest.INDEXED_TASKS
    version = tasks.version if isinstance(tasks, Attachments) else VERSION + many
    own = {task: dict(files) for task, files in tasks.items()}
    index = _encode_sets(tasks) if version > VERSION else _Index(version, own)
    return msgspec.json.format(msgspec.json.encode(index))


def _encode_sets(tasks: Mapping[str, Attached]) -> _Sets:
    sets: dict[bytes, Attached] = {}
    places: dict[bytes, int] = {}
    found = {}
    for task, files in tasks.items():
        key = msgspec.json.encode(sorted(files.items()))
        sets.setdefault(key, files)
        found[task] = places.setdefault(key, len(places))
    return _Sets(VERSION + 1, [dict(files) for files in sets.values()], found)


def attached_nbytes(attachments: Mapping[str, Attached]) -> int:
    """Bytes of all of them, each different file counted once."""
    files = {ref.sha256: ref.nbytes for refs in attachments.values() for ref in refs.values()}
    return sum(files.values())


class AttachmentWriter:
    """Collects attachments into a checkpoint's folder; ``finish`` writes their index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tasks: dict[str, dict[str, FileRef]] = {}

    def attach(self, task: str, files: Mapping[str, Path]) -> None:
        """Keep these files (name -> where it lies) with a task.

        Raises:
            OutputError: a file cannot be read or written.
        """
        for name, path in files.items():
            try:
                ref = self._store(path)
            except OSError as error:
                raise OutputError(f"cannot keep {path}: {error.strerror}") from error
            self.tasks.setdefault(task, {})[name] = ref

    def carry(self, task: str, checkpoint: Path, files: Attached) -> None:
        """Keep with a task files that another checkpoint keeps.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        for name, ref in files.items():
            copy = self._folder / ref.file
            if not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                copy.write_bytes(read_checked(checkpoint / ref.file, ref))
            self.tasks.setdefault(task, {})[name] = ref

    def finish(self) -> None:
        """Write the index, where there is anything to say."""
        if self.tasks:
            (self._folder / ATTACHMENTS_FILE).write_bytes(encode_attachments(self.tasks))

    def _store(self, path: Path) -> FileRef:
        # Most tasks bring a file that is here already.
        digest, nbytes = hash_file(path)
        name = f"{ATTACHMENTS_FOLDER}/{digest}"
        if (self._folder / name).exists():
            return FileRef(name, digest, nbytes)
        copy = self._folder / ATTACHMENTS_FOLDER / "copy"
        copy.parent.mkdir(exist_ok=True)
        with open_regular(path) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        digest, nbytes = hash_file(copy)
        name = f"{ATTACHMENTS_FOLDER}/{digest}"
        copy.replace(self._folder / name)
        return FileRef(name, digest, nbytes)
