"""Launches whose fixed arguments are bound once; needs Triton to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from triton.compiler import CompiledKernel


class Launch:
    """A kernel with the arguments that no batch changes.

    Triton's own call looks at every argument, and at every constant that the kernel reads, to find what
    it has compiled for their kind: some 25 us a launch, which in a step that is not captured is more
    than the device needs. Here only the arguments that change are looked at. What Triton tells kinds of
    them apart by is whether an address or a size is a multiple of 16, whether a size is 1 and, on AMD,
    whether a storage is larger than 2 GiB. A launch is of one device.

    Args:
        kernel: the ``triton.jit`` function.
        fixed: argument or option -> value.
    """

    def __init__(self, kernel: Any, fixed: Mapping[str, Any]) -> None:
        self._kernel = kernel
        self._fixed = dict(fixed)
        names = kernel.arg_names
        self._arguments = [fixed.get(name) for name in names]
        self._places = {name: place for place, name in enumerate(names) if name not in fixed}
        self._counted = set(names) - set(getattr(kernel, "do_not_specialize", ()))
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, grid: tuple[int, int, int], **changing: Any) -> None:
        """Enqueue the kernel; ``changing`` are all arguments that are not fixed."""
        kind = tuple(self._kind(name, value) for name, value in changing.items())
        compiled = self._compiled.get(kind)
        if compiled is None:
            # The interpreter returns nothing.
            compiled = self._kernel[grid](**changing, **self._fixed)
            if isinstance(compiled, CompiledKernel):
                self._compiled[kind] = compiled
            return
        arguments = self._arguments.copy()
        for name, value in changing.items():
            arguments[self._places[name]] = value
        compiled[grid](*arguments)

    def _kind(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            large = value.untyped_storage().nbytes() >> 31
            return value.dtype, value.data_ptr() % 16 == 0, large
        # Wider numbers are another type.
        wide = value >> 31
        return (value % 16 == 0, value == 1, wide) if name in self._counted else wide
