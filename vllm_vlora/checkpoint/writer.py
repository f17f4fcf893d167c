"""A checkpoint written task by task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch

from vllm_vlora._version import __version__
from vllm_vlora.atomic import link_own
from vllm_vlora.checkpoint.aliases import ALIASES_FILE, Aliases, encode_aliases
from vllm_vlora.checkpoint.attachments import AttachmentWriter
from vllm_vlora.checkpoint.layout import (
    BASIS_SHARD_BYTES,
    CODE_PARTS,
    EXTRA_PREFIX,
    SAFETENSORS_DTYPES,
    tensor_name,
)
from vllm_vlora.checkpoint.losses import refuse_worthless
from vllm_vlora.checkpoint.manifest import (
    BASIS_INDEX_FILE,
    CONFIG_FILE,
    Config,
    FileRef,
    TaskRecord,
    encode_config,
    hash_file,
    read_checked,
    task_file,
)
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_index import IndexedTasks
from vllm_vlora.checkpoint.task_spool import WrittenTasks, write_file
from vllm_vlora.quantize import PackedMatrix, narrow_codes, stored_streams
from vllm_vlora.representations.registry import segment_fault, shared_fault
from vllm_vlora.representations.spec import BasisSpec, FlatSpec, ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule


@dataclass
class CheckpointWriter:
    """Writes one checkpoint into ``folder``, which ``atomic.publish_folder`` then puts in place.

    Call ``add_module`` for every module (with its basis, if it has one), ``add_task`` for every
    task and ``finish`` last: the manifest is the last file written. Tensors are written as they
    come, so memory is one basis shard and one task. ``allow_large_error`` takes tasks that are worse than
    none, which ``add_task`` refuses otherwise (``losses``).
    """

    folder: Path
    base_model: str | None
    shard_bytes: int = BASIS_SHARD_BYTES
    allow_large_error: bool = False
    modules: list[ModuleSpec] = field(default_factory=list)
    aliases: Aliases = field(default_factory=dict)
    _index: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending_nbytes: int = 0
    _shards: list[tuple[Path, list[str]]] = field(default_factory=list)
    _basis_data_nbytes: int = 0

    def __post_init__(self) -> None:
        self.attachments = AttachmentWriter(self.folder)
        self.tasks = WrittenTasks(self.folder, self.modules)

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
        assert shared_fault(spec) is None, f"{shared_fault(spec)} of {name} that no reader takes"
        for side, matrix in shared.items():
            for part, tensor in matrix.parts.items():
                self._pending[f"{name}.{side}.{part}"] = tensor.cpu().contiguous()
                self._pending_nbytes += tensor.nbytes
        if self._pending_nbytes >= self.shard_bytes:
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
        renamed: Mapping[str, str] | None = None,
        seen_error: float | None = None,
        companions: Mapping[str, Path] | None = None,
    ) -> TaskRecord:
        """Write one task's file and remember its record.

        A module whose numbers give an update of zero is stored with the scale 0.

        Args:
            renamed: prefix of the modules' names -> what the adapter's own names have in its place.
            seen_error: by which the task is judged in place of ``error``, where errors were minimised as
                a calibrated model sees them.
            companions: files of its adapter's folder that are kept beside it (``attachments``).

        Raises:
            BudgetError: the task would be worse than none.
        """
        assert task_id not in self.tasks, f"task {task_id!r} added twice"
        judged = error if seen_error is None else seen_error
        refuse_worthless(task_id, judged, self.allow_large_error)
        segments: list[Segment] = []
        chunks: dict[str, list[torch.Tensor]] = {}
        for name, stored in modules.items():
            segment = Segment(
                self._index[name],
                stored.representation,
                stored.format,
                stored.rank,
                0.0 if stored.changes_nothing else stored.scale,
                stored.error,
                stored.core,
                stored.bits,
                stored.rows,
            )
            wrong = segment_fault(segment, self.modules[segment.module])
            assert wrong is None, f"{task_id!r}, module {name}: {wrong}; no reader takes it"
            segments.append(segment)
            for side, matrix in stored.matrices.items():
                for part, tensor in _narrowed(matrix, segment.bits).items():
                    key = tensor_name(segment, side, part)
                    chunks.setdefault(key, []).append(tensor.cpu().reshape(-1))
        tensors = {key: torch.cat(parts) for key, parts in chunks.items()}
        extra = extra or {}
        tensors.update({EXTRA_PREFIX + k: t.cpu().contiguous() for k, t in extra.items()})
        ref = self._write(task_file(task_id), safetensors.torch.save(tensors))
        self.attachments.attach(task_id, companions or {})
        record = TaskRecord(
            file=ref.file,
            sha256=ref.sha256,
            nbytes=ref.nbytes,
            original_nbytes=original_nbytes,
            error=error,
            segments=segments,
            adapter_config=adapter_config,
            source=source,
            extra={k: (SAFETENSORS_DTYPES[t.dtype], list(t.shape)) for k, t in extra.items()},
            renamed=dict(renamed or {}),
        )
        self.tasks.add(task_id, record)
        return record

    def copy_task(self, checkpoint: Checkpoint, task_id: str) -> None:
        """Take over a task of another checkpoint: its file as it is, its record with modules found anew.

        Its modules must be declared here, with the bases that it stands on. A basis may have grown at its
        end: the segment then says which rows it uses.

        Raises:
            TaskNotFoundError, CheckpointError: no such task, or its file is damaged.
        """
        ref = checkpoint.file_of(task_id)
        self._take_over(checkpoint, ref.file, read_checked(checkpoint.path / ref.file, ref))
        kept = checkpoint.attachments.get(task_id, {})
        self.attachments.carry(task_id, checkpoint.path, kept)
        modules = self.modules[: len(checkpoint.modules)]
        if isinstance(checkpoint.tasks, IndexedTasks) and modules == checkpoint.modules:
            self.tasks.copy(task_id, checkpoint.tasks)
            return
        record = checkpoint.record(task_id)
        segments = []
        for segment in record.segments:
            old = checkpoint.modules[segment.module]
            place = self._index[old.name]
            rows = _grown_rows(segment, old, self.modules[place])
            segments.append(msgspec.structs.replace(segment, module=place, rows=rows))
        self.tasks.add(task_id, msgspec.structs.replace(record, segments=segments))

    def _take_over(self, checkpoint: Checkpoint, file: str, data: bytes) -> None:
        """Have a file of another checkpoint with this ``data``; its own where that one gives way."""
        target = self.folder / file
        target.parent.mkdir(exist_ok=True)
        if not (checkpoint.gives_way and link_own(checkpoint.path / file, target)):
            target.write_bytes(data)

    def finish(self, card: str) -> None:
        """Write the basis index, what names the tasks, the model card and, last, the manifest."""
        basis = self._finish_basis()
        self.attachments.finish()
        if self.aliases:
            (self.folder / ALIASES_FILE).write_bytes(encode_aliases(self.aliases))
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        tasks, version = self.tasks.finish(basis)
        config = Config(
            version,
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
        self._basis_data_nbytes += self._pending_nbytes
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_nbytes = {}, 0

    def _finish_basis(self) -> list[FileRef]:
        if self._pending:
            self._flush_shard()
        count, refs, weight_map = len(self._shards), [], {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = basis_file(number, count)
            path.rename(self.folder / final)
            digest, size = hash_file(self.folder / final)
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
        return write_file(self.folder, name, data)


def basis_file(number: int, count: int) -> str:
    """The name of a basis file, counted from 1."""
    return "basis.safetensors" if count == 1 else f"basis-{number:05d}-of-{count:05d}.safetensors"


def _grown_rows(
    segment: Segment, old: ModuleSpec, new: ModuleSpec
) -> tuple[int, int, int, int] | None:
    """The rows that a segment written on the basis of ``old`` uses of that of ``new``."""
    assert (old.d_in, old.d_out, old.kind) == (new.d_in, new.d_out, new.kind), new.name
    if segment.is_flat:
        assert old.flat == new.flat, f"{new.name} has another flat basis"
    if not segment.is_joint or segment.rows is not None or old.basis == new.basis:
        return segment.rows
    assert old.basis is not None
    assert new.basis is not None
    assert old.basis.k_out <= new.basis.k_out, f"the basis of {new.name} has shrunk"
    assert old.basis.k_in <= new.basis.k_in, f"the basis of {new.name} has shrunk"
    return 0, old.basis.k_out, 0, old.basis.k_in


def _narrowed(
    matrix: PackedMatrix, bits: tuple[int, int, int] | None
) -> Mapping[str, torch.Tensor]:
    """The parts of a matrix as its file has them (``layout.stored_parts``)."""
    is_trellis = matrix.format == "trellis"
    if bits is None and not is_trellis:
        return matrix.parts
    parts = dict(matrix.parts)
    parts.pop("widths", None)
    whole = parts.pop("codes").split(list(bits or (matrix.rows, 0, 0)))
    for (width, name), codes in zip(CODE_PARTS.items(), whole):
        if not len(codes):
            continue
        if is_trellis:
            parts[name] = stored_streams(codes, matrix.cols, width)
        else:
            parts[name] = codes if width == 4 else narrow_codes(codes, width)
    return parts
