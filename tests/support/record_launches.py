"""What the real host code launches on a GPU, recorded without one.

Triton finds out the types, the alignment and the constants of a launch by looking at its arguments, and
compiles each combination once. Inside :func:`recording` it does all of that for a target of our choice
and stops before the compiler. Tensors may be on the ``meta`` device, so that a layer of any size costs
nothing. Whatever kernels there are, and however they are launched, is recorded.

To be run in a process that does not interpret Triton's kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# A kernel keeps what it compiled by the number of the device: every recording has one of its own.
_DEVICES = itertools.count()


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel, as Triton's compiler takes it.

    Attributes:
        label: what launched it first.
    """

    kernel: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any
    label: str

    @property
    def name(self) -> str:
        """The kernel's name with its file's: both halves of the direct path have a shrink."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


@dataclass
class Recording:
    """What was launched.

    Attributes:
        target: whose launches they would be.
        variants: (kernel, Triton's key) -> the variant, in the order of their first launches.
        launches: (kernel, grid) of every launch in order; ("mm", ()) for a product of torch's.
        keys: Triton's, of each launch of a kernel.
        label: of what follows, set by whoever launches.
    """

    target: GPUTarget
    variants: dict[tuple[str, str], Variant] = field(default_factory=dict)
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def programs(self) -> int:
        """Of all launches of Triton's."""
        return sum(math.prod(grid) for _, grid in self.launches if grid)


class _Driver:
    """What Triton asks a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target, self._device = target, next(_DEVICES)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """Stands for a compiled kernel; a launch of it is recorded."""

    function = None
    packed_metadata = ()

    def __init__(self, name: str, key: str, recording: Recording) -> None:
        self._name, self._key, self._recording = name, key, recording

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self._record(tuple(arguments[:3]))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        full = (*grid, 1, 1)[:3]
        return lambda *arguments, **named: self._record(full)

    def _record(self, grid: tuple[int, ...]) -> None:
        self._recording.launches.append((self._name, grid))
        self._recording.keys.append(self._key)


class _Kept(_Compiled, CompiledKernel):  # type: ignore[misc]
    """One that host code takes for what Triton compiled, and may keep."""


class _Products(TorchDispatchMode):
    """Records torch's products of matrices beside the launches of kernels."""

    def __init__(self, launches: list[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket is torch.ops.aten.mm:
            self._launches.append(("mm", ()))
        return op(*args, **(kwargs or {}))


@contextmanager
def recording(target: tuple[str, int | str, int], kept: bool = False) -> Iterator[Recording]:
    """Record launches instead of compiling and running them.

    Args:
        target: backend, architecture and threads of a warp, as ``GPUTarget`` takes them.
        kept: ``Launch`` may keep what it has launched; else Triton looks at every launch's arguments.
    """
    found = Recording(GPUTarget(*target))

    def record(
        kernel: Any,
        key: str,
        signature: dict[str, Any],
        device: int,
        constants: dict[Any, Any],
        options: Any,
        attributes: dict[Any, Any],
        warmup: bool,
    ) -> _Compiled:
        variant = Variant(kernel, signature, constants, attributes, options, found.label)
        found.variants[variant.name, key] = variant
        compiled = (_Kept if kept else _Compiled)(variant.name, key, found)
        kernel.device_caches[device][0][key] = compiled
        return compiled

    before, compile = driver._active, JITFunction._do_compile
    driver.set_active(_Driver(found.target))
    JITFunction._do_compile = record
    try:
        with _Products(found.launches):
            yield found
    finally:
        driver._active, JITFunction._do_compile = before, compile
