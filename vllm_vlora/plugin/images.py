"""A task as one run of bytes, which is copied to a device as a whole.

A task is hundreds of small tensors. As an *image* all of them are views of one block of host memory, and
on a device views of one block there: bringing a task is one copy, and giving it up is one block. What
tasks share is not part of an image.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from vllm_vlora.plugin.arena import aligned

Tree = TypeVar("Tree")
# What kernels read at once: an address stays what it is modulo this.
_WIDEST = 16
# What trees hold beside tensors; most of what is in them, and quickly told apart.
_PLAIN = (str, int, float, type(None))


@dataclasses.dataclass(frozen=True)
class Span:
    """Memory and what takes its place: the bytes from ``start`` on lie in ``memory``, uint8, now."""

    start: int
    memory: torch.Tensor

    @classmethod
    def between(cls, one: torch.Tensor, other: torch.Tensor) -> Span:
        """Of a tensor, whose place another of its shape and strides takes."""
        start = other.storage_offset() * other.element_size()
        memory = torch.empty(0, dtype=torch.uint8, device=other.device)
        memory.set_(other.untyped_storage(), start, (_extent(other),), (1,))
        return cls(one.data_ptr(), memory)


class _Place:
    """Where a tensor of an image lies in its block, and what it is; ``stride`` None where contiguous."""

    __slots__ = ("dtype", "extent", "shape", "start", "stride")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.start = 0
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self.stride = None if tensor.is_contiguous() else tensor.stride()
        self.extent = tensor.nbytes if self.stride is None else _extent(tensor)

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor there."""
        flat = memory[self.start : self.start + self.extent].view(self.dtype)
        if self.stride is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


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


@dataclasses.dataclass(frozen=True)
class Image(Generic[Tree]):
    """What lies in a block of host memory.

    Attributes:
        places: the tree, with the place in ``block`` instead of each tensor of the image.
        block: uint8; pinned where there is a GPU, so that the copy to it need not wait.
        nbytes: bytes of what lies in it, without the gaps.
        records: a part of the tree, and of the block: int64, among them addresses. None for none.
        targets: like ``records``: for an address how far from the block's start it points, else -1.
    """

    places: Tree
    block: torch.Tensor
    nbytes: int
    records: torch.Tensor | None = None
    targets: np.ndarray | None = None
    _copied: list[torch.cuda.Event] = dataclasses.field(default_factory=list)

    @property
    def tree(self) -> Tree:
        """Tensors in dataclasses, mappings and tuples; those of the image are views of ``block``."""
        return self._over(self.block, ())

    def _over(self, memory: torch.Tensor, shared: Sequence[Span]) -> Tree:
        ordered = sorted(shared, key=lambda span: span.start)
        starts = [span.start for span in ordered]

        def leaf(found: Any) -> torch.Tensor:
            if isinstance(found, _Place):
                return found.within(memory)
            return _moved(found, starts, ordered)

        # What is made later must not keep what others share on the host.
        return _mapped(self.places, leaf, later=not ordered)

    def on(self, memory: torch.Tensor, shared: Iterable[Span] = ()) -> Tree:
        """Copy the block to ``memory``; the tree over it.

        Args:
            memory: uint8, no shorter than the block, and free while copies to it are under way.
            shared: where that lies which is no part of the image.
        """
        memory = memory[: self.block.nbytes]
        pinned = self.block.is_pinned()
        while self._copied:
            self._copied.pop().synchronize()
        if self.records is not None and self.targets is not None:
            records, targets = self.records.numpy(), self.targets
            np.copyto(records, targets + memory.data_ptr(), where=targets >= 0)
        memory.copy_(self.block, non_blocking=pinned)
        if pinned:
            self._copied.append(torch.cuda.current_stream().record_event())
        return self._over(memory, list(shared))


def make_image(
    tree: Tree,
    leave: Iterable[torch.Tensor] = (),
    records: tuple[torch.Tensor, Sequence[int]] | None = None,
    pin: bool = False,
) -> Image[Tree]:
    """An image of a tree of host tensors.

    Args:
        leave: tensors that are not part of it, and whose memory no part of it shares.
        records: a tensor of the tree, int64 ``[rows, fields]``, and which fields are addresses of what
            lies in the others; 0 stands for none.
        pin: pin its memory.
    """
    left = {tensor.untyped_storage().data_ptr() for tensor in leave}
    found: list[tuple[int, _Place]] = []

    def leaf(tensor: torch.Tensor) -> Any:
        if not tensor.numel() or (left and tensor.untyped_storage().data_ptr() in left):
            return tensor
        place = _Place(tensor)
        found.append((tensor.data_ptr(), place))
        return place

    places = _mapped(tree, leaf)
    runs = _merged([(address, address + place.extent) for address, place in found])
    starts, end = [], 0
    for first, stop in runs:
        starts.append(end + first % _WIDEST)
        end = aligned(starts[-1] + stop - first)
    block = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
    for (first, stop), start in zip(runs, starts):
        ctypes.memmove(block.data_ptr() + start, first, stop - first)

    firsts = [first for first, _ in runs]

    def start_of(address: int) -> int:
        run = bisect_right(firsts, address) - 1
        return starts[run] + address - firsts[run]

    for address, place in found:
        place.start = start_of(address)
    nbytes = sum(stop - first for first, stop in runs)
    if records is None:
        return Image(places, block, nbytes)
    table, fields = records
    targets = _targets(table.numpy(), fields, runs, starts)
    own = _Place(table)
    own.start = start_of(table.data_ptr())
    return Image(places, block, nbytes, own.within(block), targets)


def _targets(
    table: np.ndarray, fields: Sequence[int], runs: list[tuple[int, int]], starts: list[int]
) -> np.ndarray:
    targets = np.full(table.shape, -1, dtype=np.int64)
    addresses = table[:, fields]
    firsts = np.array([first for first, _ in runs], dtype=np.int64)
    run = np.searchsorted(firsts, addresses, side="right") - 1
    moved = addresses - firsts[run] + np.array(starts, dtype=np.int64)[run]
    targets[:, fields] = np.where(addresses != 0, moved, -1)
    return targets


def _mapped(tree: Any, leaf: Callable[[Any], Any], later: bool = False) -> Any:
    """A tree with something else in place of each tensor; ``later``: in mappings once they are read."""
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
    if not dataclasses.is_dataclass(tree):
        return tree
    # Not ``replace``: what is checked when one is made was checked.
    found = copy.copy(tree)
    for name, value in vars(tree).items():
        object.__setattr__(found, name, _mapped(value, leaf, later))
    return found


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


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs that extents fill together, in order."""
    runs: list[tuple[int, int]] = []
    for first, stop in sorted(extents):
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(stop, runs[-1][1])
        else:
            runs.append((first, stop))
    return runs
