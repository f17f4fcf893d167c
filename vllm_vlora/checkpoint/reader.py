"""A checkpoint opened for reading, and checked.

``manifest`` describes what lies on disk. Everything read is checked: names, sizes, dtypes, digests
and that every number is finite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch

from vllm_vlora.checkpoint.aliases import Aliases, read_aliases
from vllm_vlora.checkpoint.attachments import Attached, read_attachments
from vllm_vlora.checkpoint.layout import (
    CODE_PARTS,
    EXTRA_PREFIX,
    basis_tensors,
    dtype_of,
    stored_parts,
    task_tensor_sizes,
    tensor_name,
)
from vllm_vlora.checkpoint.manifest import (
    TASKS_FOLDER,
    Config,
    FileRef,
    TaskRecord,
    read_checked,
    read_config,
    task_file,
)
from vllm_vlora.checkpoint.pinning import (
    basis_digest,
    check_content,
    content_digest,
    identity_of,
    split_pin,
    stands_on_basis,
    task_digest,
)
from vllm_vlora.checkpoint.router_files import RouterRecord, read_router
from vllm_vlora.checkpoint.sources import (
    checkpoint_folder,
    fetch_task,
    fetches_tasks,
    may_be_here,
)
from vllm_vlora.checkpoint.task_entry import TaskEntry, column, entry
from vllm_vlora.checkpoint.task_index import IndexedTasks, Usage, open_tasks
from vllm_vlora.downloads import Parts
from vllm_vlora.errors import CheckpointError, CheckpointReplacedError, TaskNotFoundError
from vllm_vlora.narrow_rows import NARROW_FORMAT, Bits, NarrowCodes, NarrowMatrix, Planes, planes_of
from vllm_vlora.quantize import (
    NF4_BLOCK,
    PackedMatrix,
    is_finite,
    part_specs,
    stored_places,
    trellis_parts_of,
    widen_codes,
)
from vllm_vlora.representations.registry import segment_sides, shared_of
from vllm_vlora.representations.spec import ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule
from vllm_vlora.tensor_files import DamagedFileError, read_tensors
from vllm_vlora.wording import some_of

_Read = TypeVar("_Read")
# How often a reader begins again when publications follow each other without a pause.
_TRIES = 20
# Part of a file -> bits of the rows whose codes it holds.
_WIDTHS = {part: bits for bits, part in CODE_PARTS.items()}


@dataclass(frozen=True)
class StoredTask:
    """A task read back whole: module name -> stored matrices, and its non-LoRA tensors."""

    task_id: str
    digest: str
    modules: Mapping[str, StoredModule]
    extra: Mapping[str, torch.Tensor]


class Checkpoint:
    """A checkpoint opened for reading.

    Opening reads and checks the two JSON files only, of very many tasks (format 4) an index in place of
    the second, whose records are read as they are asked for (``task_index``). ``load_task`` and ``bases``
    read tensors and check each file's SHA-256, tensor names, dtypes, sizes and that every number is
    finite.

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

    # Whether tasks are views of memory that is there as long as the checkpoint, and that none writes to.
    is_in_memory = False

    def __init__(
        self,
        path: Path,
        config: Config,
        tasks: Mapping[str, TaskRecord],
        state: tuple[int, ...] | None = None,
    ) -> None:
        self.path = path
        # Of before the manifest was read; after it, the folder may be another one.
        self._state = _state_of(path) if state is None else state
        self.config = config
        self.tasks = tasks
        # Whether an edited one is to take its place, which then has the files that stay (``edited``).
        self.gives_way = False
        # Names the content of all bases; resident bases are kept under it.
        self.basis_digest = basis_digest(config.basis)

    @classmethod
    def open(cls, ref: str | Path, *, manifest_only: bool = False) -> Checkpoint:
        """Open a folder, a Hub id (``org/name`` or ``org/name@revision``) or a URL (``s3://...``).

        Behind each, ``@sha256:`` and ``content_digest`` say which content it must have.

        Args:
            manifest_only: of a Hub id or a URL only what names its tasks is fetched; no tensors can be
                read then.
        """
        where, wanted = split_pin(ref)
        parts = Parts.MANIFEST if manifest_only else Parts.WHOLE
        path = checkpoint_folder(where, wanted, parts=parts)
        opened = cls(path, *_read_manifest(path))
        if wanted is not None:
            check_content(path, opened.content_digest, wanted)
        return opened

    @property
    def was_replaced(self) -> bool:
        """Whether another folder has taken the place of the one that was opened."""
        return _state_of(self.path) != self._state

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
        return max(column(self.tasks, "max_rank"), default=0)

    @property
    def original_nbytes(self) -> int:
        """The original adapters' LoRA weights at 16 bits each, in bytes."""
        return sum(column(self.tasks, "original_nbytes"))

    @property
    def basis_nbytes(self) -> int:
        """Bytes of the basis files."""
        return sum(ref.nbytes for ref in self.config.basis)

    @property
    def nbytes(self) -> int:
        """Bytes of every safetensors file, headers included, classifier heads and the like not."""
        return self.basis_nbytes + sum(column(self.tasks, "lora_nbytes"))

    @property
    def ratio(self) -> float:
        """``original_nbytes / nbytes``."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.inf

    @cached_property
    def attachments(self) -> Mapping[str, Attached]:
        """Task id -> tokenizer files and the like that are kept with it, read when first asked for.

        Raises:
            CheckpointError: their index is damaged.
        """
        return read_attachments(self.path, self.tasks)

    @cached_property
    def aliases(self) -> Aliases:
        """Names for tasks, blends and canaries, read when first asked for.

        Raises:
            CheckpointError: their file is damaged, or names a task that there is not.
        """
        return read_aliases(self.path, self.tasks)

    @cached_property
    def router(self) -> RouterRecord | None:
        """What is said of the router that is kept with the checkpoint, read when first asked for.

        Raises:
            CheckpointError: its file is damaged.
        """
        return read_router(self.path)

    @cached_property
    def content_digest(self) -> str:
        """SHA-256, in hex, of all that is served of this checkpoint (see ``pinning``).

        Raises:
            CheckpointError: the index of what is kept with tasks, or the file of aliases or of the
                router, is damaged.
        """
        return content_digest(self.config, self.attachments, self.aliases, self.router)

    @property
    def files(self) -> list[FileRef]:
        """The files that the manifest vouches for, without the tasks' own."""
        refs = [*self.config.basis, self.config.tasks]
        return [*refs, self.tasks.records] if isinstance(self.tasks, IndexedTasks) else refs

    def usage(self) -> list[Segment]:
        """How the tasks use the modules: of segments that are alike but for rank, scale and error, one.

        It has the greatest rank of them; its scale and error mean nothing. What an engine must be ready
        for, known without reading the record of every task.
        """
        if isinstance(self.tasks, IndexedTasks):
            return self.tasks.usage
        return Usage(s for record in self.tasks.values() for s in record.segments).segments()

    def alike(self) -> Iterator[tuple[Sequence[Segment], list[str]]]:
        """Segments, and the tasks that have these but for the errors, which mean nothing here.

        Of an index each distinct list is read once, where its first task stands.
        """
        if isinstance(self.tasks, IndexedTasks):
            yield from self.tasks.alike()
        else:
            yield from ((record.segments, [task]) for task, record in self.tasks.items())

    def kinds(self) -> Iterator[tuple[TaskRecord, list[str]]]:
        """Records, and the tasks of which each speaks: with its segments, adapter config and heads.

        What else it says (file, errors, the adapter's own names of modules) is the first task's. Of an
        index one record of each kind is read.
        """
        if isinstance(self.tasks, IndexedTasks):
            yield from self.tasks.kinds()
        else:
            yield from ((record, [task]) for task, record in self.tasks.items())

    def record(self, task_id: str) -> TaskRecord:
        """The record of a task; TaskNotFoundError names the tasks there are."""
        self._check_known(task_id)
        return self.tasks[task_id]

    def entry(self, task_id: str) -> TaskEntry:
        """What lists say of a task, known without its record; errors as of ``record``."""
        self._check_known(task_id)
        return entry(self.tasks, task_id)

    def _check_known(self, task_id: str) -> None:
        if task_id not in self.tasks:
            known = some_of(self.tasks)
            raise TaskNotFoundError(f"{self.path}: no task {task_id!r}; it has: {known}")

    def lora_nbytes(self, task_id: str) -> int:
        """Bytes of a task's file without its extra tensors' data."""
        return self.entry(task_id).lora_nbytes

    def file_of(self, task_id: str) -> FileRef:
        """The file of a task, known without its record; errors as of ``record``."""
        entry = self.entry(task_id)
        return FileRef(task_file(task_id), entry.sha256, entry.nbytes)

    def is_far(self, task_id: str) -> bool:
        """Whether a task's file is not on this machine, and is fetched when it is read."""
        return fetches_tasks(self.path) and not may_be_here(self.path / task_file(task_id))

    def far_tasks(self) -> set[str]:
        """The tasks that are far, by one look at the folder."""
        if not fetches_tasks(self.path):
            return set()
        here = self._files_here()
        return {task_id for task_id in self.tasks if task_file(task_id) not in here}

    def count_far(self) -> int:
        """How many those are, several times sooner: such a folder has files of its own tasks alone."""
        if not fetches_tasks(self.path):
            return 0
        return max(0, len(self.tasks) - len(self._files_here()))

    def _files_here(self) -> set[str]:
        """The files of tasks that are in the folder, which may lack theirs where it cannot be written."""
        try:
            names = os.listdir(self.path / TASKS_FOLDER)
        except FileNotFoundError:
            return set()
        return {f"{TASKS_FOLDER}/{name}" for name in names if name.endswith(".safetensors")}

    def digest(self, task_id: str) -> str:
        """Identity of a task's weights: 32 hex digits over its record and its basis, if any.

        Two tasks with the same digest have the same weights; a task re-published with other
        weights, ranks, scales or basis has another digest. What says nothing about the weights
        (measured errors, the module's place in the manifest) is not part of it.
        """
        self._check_known(task_id)
        if isinstance(self.tasks, IndexedTasks):
            return self.tasks.digest(task_id)
        record = self.tasks[task_id]
        basis = self.basis_digest if stands_on_basis(record.segments, self.modules) else None
        return task_digest(record.sha256, identity_of(record.segments, self.modules), basis)

    def load_task(
        self, task_id: str, device: torch.device | str = "cpu", narrow: bool = False
    ) -> StoredTask:
        """Read one task whole, checked, with its packed matrices on ``device``.

        The matrices of a task are views of a handful of flat tensors, so a device gets a handful of
        copies, whatever the number of modules.

        Args:
            narrow: private factors in nf4-dq become a ``NarrowMatrix``, whose rows have the bits that
                they have in the file; otherwise every row has 4.
        """
        record = self.record(task_id)
        path = self.path / record.file
        tensors = self._load(FileRef(record.file, record.sha256, record.nbytes))
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
        modules = self._split(record, flat, narrow)  # type: ignore[arg-type]
        return StoredTask(task_id, self.digest(task_id), modules, extra)  # type: ignore[arg-type]

    def has_narrow_rows(self, task_ids: Iterable[str]) -> bool:
        """Whether one of these tasks has rows of 3 or 2 bits."""
        return any(self.entry(task).narrow_rows for task in task_ids)

    def bases(self) -> Iterator[tuple[str, Basis]]:
        """Yield (module name, basis) for every module that has one; holds one shard at a time."""
        for name, _, basis in self.shared():
            if not isinstance(basis, FlatBasis):
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
            if not segment.is_private
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
            held.update(self._load(ref))
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
                    for kind, basis in shared_of(module, parts):
                        yield name, kind, basis
        if wanted:
            raise CheckpointError(f"{self.path}: no basis for module {next(iter(wanted))}")
        if held:
            raise CheckpointError(f"{self.path}: unexpected basis tensor {next(iter(held))!r}")

    def _load(self, ref: FileRef) -> dict[str, torch.Tensor]:
        try:
            fetch_task(self.path, ref)
            return _load_checked(self.path / ref.file, ref)
        except CheckpointError as error:
            if not self.was_replaced:
                raise
            raise CheckpointReplacedError(
                f"{self.path} was replaced by another run while it was read; run this again"
            ) from error

    def _split(
        self, record: TaskRecord, flat: Mapping[str, torch.Tensor], narrow: bool
    ) -> dict[str, StoredModule]:
        planes = _planes(flat) if narrow else {}
        flat = {name: _widened(name, tensor) for name, tensor in flat.items() if name not in planes}
        offsets = dict.fromkeys([*flat, *planes], 0)
        codes = NarrowCodes()
        modules = {}
        for segment in record.segments:
            spec = self.modules[segment.module]
            matrices: dict[str, PackedMatrix] = {}
            for side, (rows, cols) in segment_sides(segment, spec).items():
                parts = _take_parts(segment, side, (rows, cols), flat, offsets)
                if "codes" in parts or "values" in parts:
                    matrices[side] = PackedMatrix(segment.format, rows, cols, parts)
                    continue
                taken = _take_planes(segment, side, (rows, cols), planes, offsets)
                bits = segment.bits or (rows, 0, 0)
                codes.add(taken, partial(_put_narrow, matrices, side, (cols, bits), parts))
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
        codes.place()
        return modules


def read_one_state(ref: str | Path, read: Callable[[Checkpoint], _Read]) -> _Read:
    """What ``read`` makes of a checkpoint, begun anew on the new one where it is replaced meanwhile.

    Raises:
        What ``read`` raises; CheckpointError after many replacements too.
    """
    for _ in range(_TRIES - 1):
        opened = Checkpoint.open(ref)
        try:
            return read(opened)
        except CheckpointError:
            if not opened.was_replaced:
                raise
    return read(Checkpoint.open(ref))


def _read_manifest(path: Path) -> tuple[Config, Mapping[str, TaskRecord], tuple[int, ...]]:
    """Both files of one state, and that; when they do not fit as the folder was replaced, again."""
    for _ in range(_TRIES - 1):
        before = _state_of(path)
        try:
            config = read_config(path)
            return config, open_tasks(path, config), before
        except CheckpointError:
            if _state_of(path) == before:
                raise
    before = _state_of(path)
    config = read_config(path)
    return config, open_tasks(path, config), before


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes when another folder is renamed to ``path``; the number alone may come again."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _put_narrow(
    matrices: dict[str, PackedMatrix],
    side: str,
    shape: tuple[int, Bits],
    parts: dict[str, torch.Tensor],
    codes: torch.Tensor,
) -> None:
    cols, bits = shape
    parts = {**parts, "codes": codes}
    matrices[side] = NarrowMatrix(NARROW_FORMAT, sum(bits), cols, parts, bits)


def _take_parts(
    segment: Segment,
    side: str,
    shape: tuple[int, int],
    flat: Mapping[str, torch.Tensor],
    offsets: dict[str, int],
) -> dict[str, torch.Tensor]:
    """The next rows of a segment's side from the flat tensors that are there: part -> ``[rows, ...]``."""
    rows, cols = shape
    shapes = {part: row_shape for part, (_, row_shape) in part_specs(segment.format, cols).items()}
    taken: dict[str, list[torch.Tensor]] = {}
    for part, _, count, stored in stored_parts(segment, rows, cols):
        key = tensor_name(segment, side, part)
        width = _WIDTHS.get(part) if segment.format == "trellis" else None
        part = "codes" if part in CODE_PARTS.values() else part
        if key in flat:
            row_shape = shapes[part] if width is None else stored
            start, size = offsets[key], count * math.prod(row_shape)
            found = {part: flat[key][start : start + size].view(count, *row_shape)}
            if width is not None:
                found = trellis_parts_of(found["codes"], cols, width)
            for name, rows_of_it in found.items():
                taken.setdefault(name, []).append(rows_of_it)
            offsets[key] = start + size
    return {name: t[0] if len(t) == 1 else torch.cat(t) for name, t in taken.items()}


def _take_planes(
    segment: Segment,
    side: str,
    shape: tuple[int, int],
    planes: Mapping[str, Planes],
    offsets: dict[str, int],
) -> list[Planes]:
    """The planes of the next rows of a segment's side, of each width that it has."""
    rows, cols = shape
    taken = []
    for part, _, count, _ in stored_parts(segment, rows, cols):
        key = tensor_name(segment, side, part)
        if key in planes:
            start = offsets[key]
            offsets[key] = end = start + count * -(-cols // NF4_BLOCK)
            taken.append(tuple(plane[start:end] for plane in planes[key]))
    return taken


def _planes(flat: Mapping[str, torch.Tensor]) -> dict[str, Planes]:
    """The codes of private factors in nf4-dq among a task's flat tensors, as planes of blocks."""
    return {
        name: planes_of(stored_places(tensor, bits), bits)
        for name, tensor in flat.items()
        for bits, part in CODE_PARTS.items()
        if name.startswith("private.") and name.endswith(f".nf4-dq.{part}")
    }


def _widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A flat tensor of a task's file; NF4 codes of 3 and 2 bits, which lie in whole blocks, as of 4."""
    *_, format, part = name.rsplit(".", 2)
    bits = _WIDTHS.get(part, 4)
    return tensor if bits == 4 or format == "trellis" else widen_codes(tensor, bits)


def _load_checked(path: Path, ref: FileRef) -> dict[str, torch.Tensor]:
    data = read_checked(path, ref)
    try:
        return read_tensors(data)
    except DamagedFileError as error:
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
