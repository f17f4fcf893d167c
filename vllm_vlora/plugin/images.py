"""A task as one run of bytes, which is copied to a device as a whole.

A task is hundreds of small tensors. As an *image* all of them are views of one block of host memory, and
on a device views of one block there: bringing a task is one copy, and giving it up is one block. What is
kept on the host in any case, and need not be pinned, may stay where it is: a copy a piece is then little
beside a copy of all. What tasks share is not part of an image.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch

from vllm_vlora.plugin.arena import aligned

Tree = TypeVar("Tree")
# What kernels read at once: an address stays what it is modulo this.
_WIDEST = 16
# What trees hold beside tensors; most of what is in them, and quickly told apart.
_PLAIN = (str, int, float, type(None))
_Pieces = Sequence[tuple[int, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Span:
    """Memory and what takes its place: the bytes from ``start`` on lie in ``memory``, uint8, now."""

    start: int
    memory: torch.Tensor

    @classmethod
    def between(cls, one: torch.Tensor, other: torch.Tensor) -> Span:
        """Of a tensor, whose place another of its shape and strides takes."""
        start = int(other.storage_offset()) * other.element_size()
        return cls(one.data_ptr(), _bytes_of(other.untyped_storage(), start, _extent(other)))


class _Place(msgspec.Struct, gc=False):
    """Where a tensor of an image lies in its block, and what it is; ``stride`` None where contiguous.

    An engine holds thousands for each task, which refer to nothing: a garbage collection that looked at
    all of them would hold up every step.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    extent: int
    start: int = 0

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Place:
        """Of a tensor; where it lies is not known yet."""
        if tensor.is_contiguous():
            return cls(tensor.dtype, tuple(tensor.shape), None, tensor.nbytes)
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), _extent(tensor))

    def within(self, memory: torch.Tensor, begin: int = 0) -> torch.Tensor:
        """The tensor there, in memory that begins so far into the block."""
        start = self.start - begin
        flat = memory[start : start + self.extent].view(self.dtype)
        if self.stride is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


class _Node(msgspec.Struct, gc=False):
    """A dataclass of a tree with places, field by field. Untracked, as they are: there are as many."""

    kind: ClassVar[Any]


class _Later(Mapping[Any, Any]):
    """A mapping whose values are made once they are read: kernels read addresses, and most never are."""

    def __init__(self, values: Mapping[Any, Any], leaf: Callable[[Any], torch.Tensor]) -> None:
        self._values, self._leaf = values, leaf
        self._made: dict[Any, Any] = {}

    def __getitem__(self, name: Any) -> Any:
        if name not in self._made:
            self._made[name] = _mapped(self._values[name], self._leaf, later=True)
        return self._made[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Run(NamedTuple):
    """Host memory from one address up to another, of one storage, or 0 for whatever has it."""

    first: int
    stop: int
    home: int = 0

    @property
    def nbytes(self) -> int:
        return self.stop - self.first


@dataclasses.dataclass(frozen=True)
class Image(Generic[Tree]):
    """What lies in host memory as it is to lie in a block of a device's.

    Attributes:
        places: the tree, with the place in the block instead of each tensor of the image, as ``_Node``.
        pieces: where each begins in the block, and its bytes on the host, uint8, in this order; one alone
            unless what is in the image stayed where it was.
        size: bytes of the block. nbytes: of what lies in it, without the gaps.
        pinned: the host's memory is, so that the copy need not be waited for.
        records: a part of the tree, and of a piece: int64, among them addresses. None for none.
        targets: like ``records``: for an address how far from the block's start it points, else -1.
    """

    places: Any
    pieces: _Pieces
    size: int
    nbytes: int
    pinned: bool = False
    records: torch.Tensor | None = None
    targets: np.ndarray | None = None
    _copied: list[torch.cuda.Event] = dataclasses.field(default_factory=list)

    @property
    def tree(self) -> Tree:
        """Tensors in dataclasses, mappings and tuples; those of the image are views of its pieces."""
        return self._over(self.pieces, ())

    def _over(self, pieces: _Pieces, shared: Sequence[Span]) -> Tree:
        ordered = sorted(shared, key=lambda span: span.start)
        starts = [span.start for span in ordered]

        def leaf(found: Any) -> torch.Tensor:
            if isinstance(found, _Place):
                return _within(pieces, found)
            return _moved(found, starts, ordered)

        # What is made later must not keep what others share on the host.
        return _mapped(self.places, leaf, later=not ordered)

    def on(self, memory: torch.Tensor, shared: Iterable[Span] = ()) -> Tree:
        """Copy the block to ``memory``; the tree over it.

        Args:
            memory: uint8, no shorter than the block, and free while copies to it are under way.
            shared: where that lies which is no part of the image.
        """
        memory = memory[: self.size]
        while self._copied:
            self._copied.pop().synchronize()
        if self.records is not None and self.targets is not None:
            records, targets = self.records.numpy(), self.targets
            np.copyto(records, targets + memory.data_ptr(), where=targets >= 0)
        for begin, piece in self.pieces:
            memory[begin : begin + piece.nbytes].copy_(piece, non_blocking=self.pinned)
        if self.pinned:
            self._copied.append(torch.cuda.current_stream().record_event())
        return self._over([(0, memory)], list(shared))


def make_image(
    tree: Tree,
    leave: Iterable[torch.Tensor] = (),
    records: tuple[torch.Tensor, Sequence[int]] | None = None,
    pin: bool = False,
    stay: bool = False,
) -> Image[Tree]:
    """An image of a tree of host tensors.

    Args:
        leave: tensors that are not part of it, and whose memory no part of it shares.
        records: a tensor of the tree, int64 ``[rows, fields]``, and which fields are addresses of what
            lies in the others; 0 stands for none.
        pin: pin its memory.
        stay: leave the tensors where they are. Nobody writes to them as long as the image lives, and the
            image writes to the records alone.
    """
    left = {tensor.untyped_storage().data_ptr() for tensor in leave}
    found: list[tuple[int, _Place]] = []
    homes: dict[int, torch.UntypedStorage] = {}
    extents: list[_Run] = []

    def leaf(tensor: torch.Tensor) -> Any:
        if not tensor.numel() or (left and tensor.untyped_storage().data_ptr() in left):
            return tensor
        place, address = _Place.of(tensor), tensor.data_ptr()
        found.append((address, place))
        home = 0
        if stay:
            storage = tensor.untyped_storage()
            homes[home := storage.data_ptr()] = storage
        extents.append(_Run(address, address + place.extent, home))
        return place

    places = _mapped(tree, leaf)
    runs = _merged(extents)
    starts, size = _laid_out(runs)
    firsts = [run.first for run in runs]

    def start_of(address: int) -> int:
        run = bisect_right(firsts, address) - 1
        return starts[run] + address - firsts[run]

    for address, place in found:
        place.start = start_of(address)
    if stay:
        pieces = [
            (start, _bytes_of(homes[run.home], run.first - run.home, run.nbytes))
            for run, start in zip(runs, starts)
        ]
    else:
        pieces = [(0, _joined(runs, starts, size, pin))]
    nbytes = sum(run.nbytes for run in runs)
    if records is None:
        return Image(places, pieces, size, nbytes, pin)
    table, fields = records
    own = _Place.of(table)
    own.start = start_of(table.data_ptr())
    targets = _targets(table.numpy(), fields, firsts, starts)
    return Image(places, pieces, size, nbytes, pin, _within(pieces, own), targets)


def _laid_out(runs: list[_Run]) -> tuple[list[int], int]:
    """Where each run begins in a block, and how long that is."""
    starts, size = list[int](), 0
    for run in runs:
        starts.append(size + run.first % _WIDEST)
        size = aligned(starts[-1] + run.nbytes)
    return starts, size


def _joined(runs: list[_Run], starts: list[int], size: int, pin: bool) -> torch.Tensor:
    """One block with a copy of all runs."""
    block = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for run, start in zip(runs, starts):
        ctypes.memmove(block.data_ptr() + start, run.first, run.nbytes)
    return block


def _within(pieces: _Pieces, place: _Place) -> torch.Tensor:
    """The tensor of a place, in the piece that has it."""
    found = bisect_right(pieces, place.start, key=itemgetter(0)) - 1
    begin, memory = pieces[found]
    return place.within(memory, begin)


def _targets(
    table: np.ndarray, fields: Sequence[int], firsts: list[int], starts: list[int]
) -> np.ndarray:
    targets = np.full(table.shape, -1, dtype=np.int64)
    addresses = table[:, fields]
    run = np.searchsorted(np.array(firsts, dtype=np.int64), addresses, side="right") - 1
    moved = addresses - np.array(firsts)[run] + np.array(starts, dtype=np.int64)[run]
    targets[:, fields] = np.where(addresses != 0, moved, -1)
    return targets


def _mapped(tree: Any, leaf: Callable[[Any], Any], later: bool = False) -> Any:
    """A tree with something else in place of each tensor; ``later``: in mappings once they are read.

    Dataclasses become nodes, and nodes dataclasses.
    """
    if isinstance(tree, _PLAIN):
        return tree
    if isinstance(tree, (torch.Tensor, _Place)):
        return leaf(tree)
    if isinstance(tree, Mapping):
        if later:
            return _Later(tree, leaf)
        return {name: _mapped(value, leaf) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_mapped(value, leaf, later) for value in tree)
    if isinstance(tree, _Node):
        # Not by its class: what is checked when one is made was checked. And not by ``vars``, which gives
        # each a dictionary.
        found = object.__new__(tree.kind)
        for name in tree.__struct_fields__:
            object.__setattr__(found, name, _mapped(getattr(tree, name), leaf, later))
        return found
    if not dataclasses.is_dataclass(tree):
        return tree
    kind: Any = type(tree)
    made = _node_of(kind)
    return made(*(_mapped(getattr(tree, name), leaf) for name in made.__struct_fields__))


@functools.cache
def _node_of(kind: Any) -> Any:
    names = [field.name for field in dataclasses.fields(kind)]
    own = {"kind": kind}
    return msgspec.defstruct(kind.__name__, names, bases=(_Node,), namespace=own, gc=False)


def _moved(tensor: torch.Tensor, starts: list[int], spans: list[Span]) -> torch.Tensor:
    address = tensor.data_ptr()
    place = bisect_right(starts, address) - 1
    if place < 0 or not tensor.numel():
        return tensor
    span = spans[place]
    offset, extent = address - span.start, _extent(tensor)
    if offset + extent > span.memory.nbytes:
        return tensor
    flat = span.memory[offset : offset + extent].view(tensor.dtype)
    if tensor.is_contiguous():
        return flat.view(tensor.shape)
    return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset())


def _bytes_of(storage: torch.UntypedStorage, start: int, nbytes: int) -> torch.Tensor:
    """A part of a tensor's memory, uint8."""
    memory = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return memory.set_(storage, start, (nbytes,), (1,))


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _merged(extents: list[_Run]) -> list[_Run]:
    """The runs that extents fill together, in order."""
    runs: list[_Run] = []
    for extent in sorted(extents):
        last = runs[-1] if runs else None
        if last is not None and extent.first <= last.stop and extent.home == last.home:
            runs[-1] = last._replace(stop=max(last.stop, extent.stop))
        else:
            runs.append(extent)
    return runs
