"""A task that is in no file: how its tensors come from the process that has them to every worker.

The factors are written once, into memory without a name (``memfd``) that workers map: it needs no room in
``/dev/shm``, of which a container has 64 MiB, and is gone with the last process that has it. What travels
with vLLM's own messages is an ``Offer`` of some kB, which says what lies where. In a worker it is a
``Checkpoint`` of one task, so that whatever takes a task of a checkpoint takes it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import os
import secrets
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import msgspec
import torch

from vllm_vlora._version import __version__
from vllm_vlora.adapters.peft_folder import Factors, LoRAModule
from vllm_vlora.checkpoint.manifest import FORMAT_VERSION, Config, FileRef, TaskRecord, task_file
from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.errors import AdapterError, CheckpointError, TaskLoadError
from vllm_vlora.plugin.identity import MEMORY, TaskPath, parse_task_path
from vllm_vlora.plugin.spare_memory import SPARE_MEMORY, Memory
from vllm_vlora.quantize import (
    FLOAT_DTYPES,
    FORMAT_OF_DTYPE,
    PackedMatrix,
    is_finite,
    pack,
    part_specs,
)
from vllm_vlora.representations.spec import ModuleSpec, Segment
from vllm_vlora.representations.stored import StoredModule

# What kernels and mappings like; the greatest element has 8 bytes.
_ALIGNMENT = 64
# Threads that pack: memory has no use for more.
_PACKERS = 8
# Bytes at the end of the memory that say whose it is.
_MARK_NBYTES = 32


class OfferedModule(msgspec.Struct, frozen=True):
    """One module: delta_W = scale * B A, with factors in a number format."""

    name: str
    kind: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    format: str


class Offer(msgspec.Struct, frozen=True):
    """What lies in ``nbytes`` of memory.

    Attributes:
        path: the task's, which names this publication: no other one has it, of the same tensors neither.
        place: a file that has the memory, on this machine, and what stands at its end, in hex. Where
            processes are numbered anew, as in another container, the file may be any other.
    """

    task: str
    path: str
    place: str
    mark: str
    nbytes: int
    original_nbytes: int
    modules: tuple[OfferedModule, ...]


class Part(msgspec.Struct, frozen=True):
    """A part of a packed factor, and where it lies. ``turned``: as its transpose, contiguous."""

    side: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    turned: bool

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.start + self.nbytes


@functools.lru_cache(8)
def parts_of(modules: tuple[OfferedModule, ...]) -> tuple[tuple[tuple[Part, ...], ...], int]:
    """The parts of each module, in the order in which they lie, and the bytes of all.

    Kept, since a training loop publishes the same modules again and again.
    """
    found, start = [], 0
    for module in modules:
        parts = []
        for side, cols in (("A", module.d_in), ("B", module.d_out)):
            for name, (dtype, row) in part_specs(module.format, cols).items():
                # B comes as (d_out, r), which a slot on CPU wants too, and packed ones as (r, d_out).
                turned = side == "B" and module.format in FLOAT_DTYPES
                part = Part(side, name, dtype, (module.rank, *row), start, turned)
                parts.append(part)
                start += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
        found.append(tuple(parts))
    return tuple(found), start


# --- where the tensors are ------------------------------------------------------------------------


@contextmanager
def offered(
    task: str, modules: Sequence[tuple[LoRAModule, Factors]], quantize: str | None
) -> Iterator[Offer]:
    """Write a task's factors where workers can map them, as long as the context lasts.

    Args:
        quantize: the number format of the factors; their own where it is None.

    Raises:
        AdapterError: a value is NaN or infinite, or too large for the format.
        TaskLoadError: there is no memory for it.
    """
    described = tuple(_described(module, quantize) for module, _ in modules)
    parts, nbytes = parts_of(described)
    with closing(_memory(task, nbytes + _MARK_NBYTES)) as memory:
        mark = secrets.token_bytes(_MARK_NBYTES)
        try:
            memory.data[nbytes:] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
            _write_all(memory.data, f"task {task!r}", modules, described, parts)
            yield Offer(
                task,
                str(TaskPath(MEMORY, task_file(task), secrets.token_hex(16))),
                f"/proc/{os.getpid()}/fd/{memory.file}",
                mark.hex(),
                nbytes,
                2 * sum(module.numel for module, _ in modules),
                described,
            )
        except BaseException:
            memory.unmap()
            raise
        SPARE_MEMORY.renew(memory)


def _memory(task: str, size: int) -> Memory:
    try:
        return SPARE_MEMORY.take(size)
    except OSError as error:
        raise TaskLoadError(
            f"task {task!r} is not published: no {size} bytes of memory to hand it over "
            f"({error.strerror})"
        ) from error


def _described(module: LoRAModule, quantize: str | None) -> OfferedModule:
    format = quantize or FORMAT_OF_DTYPE[module.dtype]
    return OfferedModule(
        module.name, module.kind, module.d_in, module.d_out, module.rank, module.scale, format
    )


def _write_all(
    memory: torch.Tensor,
    where: str,
    modules: Sequence[tuple[LoRAModule, Factors]],
    described: Sequence[OfferedModule],
    parts: Sequence[Sequence[Part]],
) -> None:
    """Write all modules, and check them."""

    def write(place: int) -> None:
        _write(memory, where, described[place], modules[place][1], parts[place])

    # Packing has use for more threads; memory has none.
    packs = any(module.format not in FLOAT_DTYPES for module in described)
    with ThreadPoolExecutor(min(_PACKERS, os.cpu_count() or 1)) as pool:
        deque((pool.map if packs else map)(write, range(len(modules))), maxlen=0)
    _check_written(memory, where, described, parts)


def _write(
    memory: torch.Tensor,
    where: str,
    module: OfferedModule,
    factors: Factors,
    parts: Sequence[Part],
) -> None:
    """Write one module."""
    for side, matrix in zip("AB", factors):
        tensors = _packed(matrix, side, module, where)
        for part in parts:
            if part.side == side:
                try:
                    _copy(tensors[part.name], memory, part)
                except ValueError as error:
                    raise AdapterError(
                        f"{where}: lora_{side} of module {module.name!r} {error}"
                    ) from error


def _copy(tensor: torch.Tensor, memory: torch.Tensor, part: Part) -> None:
    """A tensor's bytes to where they lie.

    Raises:
        ValueError: its storage is smaller than itself, as FSDP leaves what it has sharded.
    """
    values = tensor.cpu().contiguous().resolve_neg()
    if type(values) not in (torch.Tensor, torch.nn.Parameter):
        # Whose memory need not be its numbers, or is none.
        memory[part.start : part.end] = values.view(-1).view(torch.uint8)
        return
    end = values.storage_offset() * values.element_size() + values.nbytes
    if values.nbytes != part.nbytes or end > values.untyped_storage().nbytes():
        raise ValueError("has no memory of its own (sharded?): gather the parameters first")
    # By one thread: where others keep the cores busy, torch's wait for each other at each of hundreds of
    # copies. As memory: the views of an assignment take as long as 60 kB.
    ctypes.memmove(memory.data_ptr() + part.start, values.data_ptr(), part.nbytes)


def _check_written(
    memory: torch.Tensor,
    where: str,
    described: Sequence[OfferedModule],
    parts: Sequence[Sequence[Part]],
) -> None:
    """Refuse NaN and infinity, which packing has refused.

    Neighbours of one format are looked at as a whole, gaps of zeros and all: one by one they took twice
    the time.
    """
    for format, run in itertools.groupby(zip(described, parts), lambda pair: pair[0].format):
        dtype, found = FLOAT_DTYPES.get(format), list(run)
        if dtype is None:
            continue
        start, end = found[0][1][0].start, found[-1][1][-1].end
        if is_finite(memory[start:end].view(dtype)):
            continue
        for module, part in ((module, part) for module, own in found for part in own):
            if not is_finite(memory[part.start : part.end].view(dtype)):
                raise AdapterError(
                    f"{where}: lora_{part.side} of module {module.name!r} holds NaN or infinite values; "
                    "the training diverged, and what was published before it goes on serving"
                )


def _packed(
    matrix: torch.Tensor, side: str, module: OfferedModule, where: str
) -> dict[str, torch.Tensor]:
    """A factor's parts as they lie in memory."""
    dtype = FLOAT_DTYPES.get(module.format)
    try:
        if dtype is None:
            return pack(matrix if side == "A" else matrix.T.contiguous(), module.format).parts
        if matrix.dtype == dtype:
            return {"values": matrix}
        return {"values": pack(matrix, module.format).parts["values"]}
    except ValueError as error:
        raise AdapterError(f"{where}: lora_{side} of module {module.name!r}: {error}") from error


# --- in a worker ----------------------------------------------------------------------------------


class ElsewhereError(CheckpointError):
    """The memory of an offer is another machine's."""


class OfferedCheckpoint(Checkpoint):
    """A checkpoint in memory whose one task was offered.

    Args:
        offer: what is offered.
        content: the memory's bytes, for who cannot map them.

    Raises:
        ElsewhereError: the memory cannot be mapped here.
    """

    is_in_memory = True

    def __init__(self, offer: Offer, content: bytes | None = None) -> None:
        parsed = parse_task_path(offer.path)
        assert parsed is not None, offer.path
        self.task_path, self._own_digest = parsed, parsed.digest
        self._parts, size = parts_of(offer.modules)
        assert size == offer.nbytes, f"{size} bytes, and {offer.nbytes} were offered"
        self._memory = _mapped(offer) if content is None else _copied(content)
        segments = [
            Segment(place, "private", module.format, module.rank, module.scale)
            for place, module in enumerate(offer.modules)
        ]
        record = TaskRecord(
            file=parsed.file,
            sha256="",
            nbytes=offer.nbytes,
            original_nbytes=offer.original_nbytes,
            error=0.0,
            segments=segments,
            adapter_config={},
            source="vllm_vlora.publish",
        )
        modules = [ModuleSpec(m.name, m.d_in, m.d_out, m.kind) for m in offer.modules]
        nothing = FileRef("", "", 0)
        config = Config(FORMAT_VERSION, f"vllm-vlora {__version__}", None, modules, [], nothing)
        super().__init__(MEMORY, config, {offer.task: record}, ())

    def digest(self, task_id: str) -> str:
        """The digest that the offer's path ends in."""
        self.record(task_id)
        return self._own_digest

    def load_task(
        self, task_id: str, device: torch.device | str = "cpu", narrow: bool = False
    ) -> StoredTask:
        """The task, whose factors are views of the memory where ``device`` is the host."""
        # By the thread that reads, which nobody waits for, and not by the copy to a device.
        self._memory[:: mmap.PAGESIZE].max()
        modules = {}
        for segment, parts in zip(self.record(task_id).segments, self._parts):
            sides: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
            for part in parts:
                sides[part.side][part.name] = self._tensor(part).to(device)
            spec = self.modules[segment.module]
            matrices = {
                side: PackedMatrix(segment.format, segment.rank, cols, sides[side])
                for side, cols in (("A", spec.d_in), ("B", spec.d_out))
            }
            modules[spec.name] = StoredModule(
                "private", segment.format, segment.rank, matrices, segment.scale
            )
        return StoredTask(task_id, self._own_digest, modules, {})

    def _tensor(self, part: Part) -> torch.Tensor:
        flat = self._memory[part.start : part.end].view(part.dtype)
        return flat.view(part.shape[::-1]).T if part.turned else flat.view(part.shape)


def _mapped(offer: Offer) -> torch.Tensor:
    """The memory of an offer, which is shared with whoever maps it and never written to."""
    size = offer.nbytes + _MARK_NBYTES
    try:
        # What is no regular file must not be opened: that may wait, or do something.
        found = os.stat(offer.place)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise ElsewhereError(f"{offer.place} is another file")
        file = os.open(offer.place, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ElsewhereError(f"{offer.place}: {error.strerror}") from error
    try:
        # Whatever went wrong here, nothing would be written where others read.
        memory = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ElsewhereError(f"{offer.place}: {error}") from error
    finally:
        os.close(file)
    if memory[offer.nbytes :] != bytes.fromhex(offer.mark):
        raise ElsewhereError(f"{offer.place} is another file")
    return torch.frombuffer(memory, dtype=torch.uint8)


def _copied(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def read_whole(offer: Offer) -> bytes:
    """The bytes of an offer that this process made, for a machine that cannot map them."""
    return bytes(_mapped(offer)[: offer.nbytes].numpy())
