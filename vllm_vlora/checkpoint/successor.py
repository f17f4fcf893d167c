"""Write a checkpoint anew with other tasks, atomically; what stays in it stays byte for byte.

Task files are copied, or in place given a second name until the old folder goes, with their digests
checked. Basis files are copied too, unless bases have grown.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from vllm_vlora.atomic import (
    carry_over,
    check_apart,
    exclusive,
    foreign_files,
    publish_folder,
)
from vllm_vlora.checkpoint.aliases import refuse_fault
from vllm_vlora.checkpoint.card import model_card
from vllm_vlora.checkpoint.components import read_asked, write_asked
from vllm_vlora.checkpoint.layout import basis_nbytes
from vllm_vlora.checkpoint.manifest import (
    BASIS_INDEX_FILE,
    CONFIG_FILE,
    FileRef,
)
from vllm_vlora.checkpoint.own_files import BASIS_NAME, checkpoint_files
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import CompressReport, report_contents
from vllm_vlora.checkpoint.router_files import keep_router
from vllm_vlora.checkpoint.writer import CheckpointWriter, basis_file
from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import CheckpointError, OptionError, OutputError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.regular_files import JSON_BYTES, copy_regular, open_regular, read_regular
from vllm_vlora.representations.spec import ModuleSpec
from vllm_vlora.representations.stored import Basis, FlatBasis
from vllm_vlora.strict_json import JSONError, decode
from vllm_vlora.urls import is_remote, local_folder

_CHUNK = 1 << 22


def edit_target(ref: str | Path, output: str | Path | None) -> Path:
    """Where an edit of this checkpoint writes: ``output``, or the folder itself."""
    return Path((local_folder(ref) or ref) if output is None else output).expanduser()


@contextmanager
def edited(
    ref: str | Path, output: str | Path | None, *, force: bool
) -> Iterator[tuple[Checkpoint, Path]]:
    """Yield a checkpoint and an empty folder that takes its place when the block ends cleanly.

    Files that are no part of a checkpoint, as a licence, are carried over. No other run changes the
    checkpoint meanwhile: the lock is held from reading to publishing, and others wait.

    Args:
        ref: a folder, a Hub id or a URL. output: another folder to write; needed but for a folder.
        force: replace a checkpoint at ``output``.

    Raises:
        CheckpointError: there is no sound checkpoint.
        OptionError: a checkpoint of the Hub or at a URL is not changed in place.
        OutputError: the output may not be replaced or cannot be written, another run writes it and
            does not end in time, or somebody has changed the checkpoint without asking for the lock.
    """
    if output is None and is_remote(ref):
        raise OptionError(
            f"{ref} is a URL and not changed in place; name a folder to write, or `vllm-vlora pull` it "
            "first"
        )
    target = edit_target(ref, output)
    with exclusive(target):
        checkpoint = Checkpoint.open(ref)
        if output is None and not target.is_dir():
            raise OptionError(
                f"{ref} is on the Hub and not changed in place; name a folder to write"
            )
        in_place = target.resolve() == checkpoint.path.resolve()
        if not in_place:
            _check_outside(target, checkpoint.path)
        checkpoint.gives_way = in_place
        before = _manifest(checkpoint.path)

        def unchanged() -> None:
            if in_place and _manifest(checkpoint.path) != before:
                raise OutputError(
                    f"{target} was changed meanwhile by somebody else; run this again"
                )

        with publish_folder(
            target, force=force or in_place, owned=checkpoint_files, unchanged=unchanged
        ) as folder:
            yield checkpoint, folder
            if not in_place:
                own = checkpoint_files(checkpoint.path) or ()
                foreign = foreign_files(checkpoint.path, own)
                carry_over(checkpoint.path, folder, foreign, _copy_file)


def _check_outside(target: Path, checkpoint: Path) -> None:
    check_apart(target, [checkpoint])
    # What is carried over would hold what is being written, and the checkpoint its own successor.
    if checkpoint.resolve() in target.resolve().parents:
        raise OutputError(
            f"the output {target} lies in the checkpoint {checkpoint}; choose an output beside it"
        )


def _copy_file(source: Path, target: Path) -> None:
    # A pipe or a device is nothing that a copy would have.
    if source.is_file():
        copy_regular(source, target)
        shutil.copystat(source, target)


def _manifest(path: Path) -> bytes:
    try:
        return read_regular(path / CONFIG_FILE, JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {error.strerror}") from error


class Successor(CheckpointWriter):
    """Writes a checkpoint that goes on from another one, whose modules keep their places."""

    def __init__(self, folder: Path, old: Checkpoint, *, allow_large_error: bool = False) -> None:
        super().__init__(folder, old.base_model, allow_large_error=allow_large_error)
        self._old = old
        self.aliases = old.aliases
        self._kept: list[FileRef] | None = None

    def keep_bases(self) -> None:
        """Take over the modules and the basis files of the old checkpoint as they are.

        Their names too, unless they are such as would be in the way of other files (``README.md``, or in
        a sub-folder), which no checkpoint of this package has.

        Raises:
            CheckpointError: a basis file is damaged.
        """
        for spec in self._old.modules:
            self._index[spec.name] = len(self.modules)
            self.modules.append(spec)
        old = self._old.config.basis
        names = [ref.file for ref in old]
        if len(set(names)) < len(names) or not all(
            re.fullmatch(BASIS_NAME, name) for name in names
        ):
            names = [basis_file(number, len(old)) for number in range(1, len(old) + 1)]
        for ref, name in zip(old, names):
            refuse_link_out(self._old.path / ref.file, self._old.path, CheckpointError)
            _copy_checked(self._old.path / ref.file, self.folder / name, ref)
        index = self._old.path / BASIS_INDEX_FILE
        if index.exists():
            refuse_link_out(index, self._old.path, CheckpointError)
            renamed = {ref.file: name for ref, name in zip(old, names)}
            (self.folder / BASIS_INDEX_FILE).write_bytes(_renamed_index(index, renamed))
        self._kept = [replace(ref, file=name) for ref, name in zip(old, names)]

    def write_bases(self, grow: Callable[[str, Basis], Basis]) -> None:
        """Write the modules of the old checkpoint, each with what ``grow`` makes of its basis.

        The rows of the old basis must come first and be as they were. Holds one shard at a time.
        """
        for spec, basis, flat in _shared_by_module(self._old):
            new = None if basis is None else grow(spec.name, basis)
            self.add_module(spec.name, spec.d_in, spec.d_out, spec.kind, new, flat)

    def finish_edited(self) -> CompressReport:
        """Write the rest, with a model card; returns what the card says.

        Raises:
            OutputError: an alias names a task that would be gone, or a new task has an alias' name.
        """
        refuse_fault(self.aliases, self.tasks, self._old.path)
        bases = basis_nbytes(self.modules) if self._kept is None else self._old.basis_nbytes
        report = report_contents(self.folder, self.tasks, self.modules, bases)
        keep_router(self._old.path, self.folder)
        write_asked(self.folder, read_asked(self._old.path))
        self.finish(model_card(self.base_model, report))
        return report

    def _finish_basis(self) -> list[FileRef]:
        return super()._finish_basis() if self._kept is None else self._kept


def _renamed_index(path: Path, renamed: Mapping[str, str]) -> bytes:
    """A shard index with other names of its files; byte for byte where they are the same."""
    try:
        data = read_regular(path, JSON_BYTES)
        if all(old == new for old, new in renamed.items()):
            return data
        index = decode(data, dict[str, Any])
        weight_map = {name: renamed[file] for name, file in index["weight_map"].items()}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (JSONError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a shard index; compress again") from error
    return json.dumps({**index, "weight_map": weight_map}, indent=2).encode()


def _shared_by_module(
    checkpoint: Checkpoint,
) -> Iterator[tuple[ModuleSpec, Basis | None, FlatBasis | None]]:
    """Every module with its basis and its flat one, in the checkpoint's order."""
    found: dict[tuple[str, str], Basis] = {}
    shared = checkpoint.shared()
    for spec in checkpoint.modules:
        wanted = {
            (spec.name, kind)
            for kind, has in (("joint", spec.basis), ("flat", spec.flat))
            if has is not None
        }
        while not wanted <= found.keys():
            name, kind, basis = next(shared)
            found[name, kind] = basis
        flat = found.pop((spec.name, "flat"), None)
        assert flat is None or isinstance(flat, FlatBasis)
        yield spec, found.pop((spec.name, "joint"), None), flat
    # What is left to read would be a tensor of no module.
    for name, _, _ in shared:
        raise CheckpointError(f"{checkpoint.path}: two bases for module {name}")


def _copy_checked(source: Path, target: Path, ref: FileRef) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        stream = open_regular(source)
    except OSError as error:
        raise CheckpointError(f"{source}: {error.strerror}; {copy_again(source)}") from error
    with stream, target.open("xb") as copy:
        # A file that was grown is not copied first.
        while size <= ref.nbytes and (chunk := stream.read(_CHUNK)):
            digest.update(chunk)
            copy.write(chunk)
            size += len(chunk)
    if size != ref.nbytes or digest.hexdigest() != ref.sha256:
        raise CheckpointError(
            f"{source}: differs from what the manifest says; {copy_again(source)}"
        )
