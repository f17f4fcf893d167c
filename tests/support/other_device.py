"""A device that this machine does not have, for tests of where tensors are.

Its tensors say that they are elsewhere, and are worked on by the CPU. As on a GPU, an operation refuses
them beside tensors of the CPU, numbers and indices excepted, and what is made without a device is on the
CPU. So a path that runs here moves all that it must. What a GPU's arithmetic gives is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from vllm_vlora import quantize

_aten = torch.ops.aten
# Those of CUDA that take tensors on the CPU too: copies from there, and indices.
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten._unsafe_index.Tensor)


class OtherDeviceTensor(torch.Tensor):
    """A tensor of that device; ``inner`` holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OtherDeviceTensor:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_registered(),
        )
        found.inner = inner
        return found

    def tolist(self) -> Any:
        """As any tensor's; torch refuses it of subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _OtherDevice(TorchDispatchMode):
    """Sees what is made on the device from no tensor of it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(found, OtherDeviceTensor) for found in types):
            self.operations += 1
        elif not kwargs or kwargs.get("device") is None:
            return func(*args, **kwargs or {})
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    others = [x for x in flat if isinstance(x, OtherDeviceTensor)]
    wanted = kwargs.get("device")
    there = bool(others) if wanted is None else torch.device(wanted).type != "cpu"
    if func is _aten.copy_.default:
        there = isinstance(args[0], OtherDeviceTensor)
    elif func is _aten._local_scalar_dense.default:
        there = False
    if others:
        _check_beside(func, args, flat)
    inner = [x.inner if isinstance(x, OtherDeviceTensor) else x for x in flat]
    inner_args, inner_kwargs = tree_unflatten(inner, spec)
    if wanted is not None:
        inner_kwargs["device"] = torch.device("cpu")
    found = func(*inner_args, **inner_kwargs)
    # What an operation writes into is what it returns.
    known = {id(x.inner): x for x in others}
    if func is _aten._to_copy.default and found is inner_args[0]:
        found = found.clone()

    def outer(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not there:
            return x
        return known[id(x)] if id(x) in known else OtherDeviceTensor(x)

    return tree_map(outer, found)


def _check_beside(func: Any, args: tuple[Any, ...], flat: list[Any]) -> None:
    if func in _COPIES:
        return
    if func in _INDEXED:
        flat = [args[0], *args[2:]] if isinstance(args[0], OtherDeviceTensor) else flat
    for x in flat:
        if isinstance(x, torch.Tensor) and not isinstance(x, OtherDeviceTensor) and x.dim():
            raise RuntimeError(f"{func}: all tensors must be on one device, one is on {x.device}")


@cache
def _registered() -> torch.device:
    """The device, which Python may add to torch once a process."""
    backend_registration._setup_privateuseone_for_python_backend("elsewhere")
    return torch.device("elsewhere", 0)


@contextmanager
def other_device() -> Iterator[_OtherDevice]:
    """Tensors of that device can be made within; yields what counts the operations on it."""
    device = _registered()
    module = torch.get_device_module(device)
    module.is_available = lambda: True
    # As torch's own fake tensors do: torch.tensor(device=...) is then seen too.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    tables: tuple[Any, ...] = (quantize._Cells.of, quantize._both_values)
    try:
        with _OtherDevice(device) as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        # It stays registered, and a Trainer of a later test would pin its batches for it.
        module.is_available = lambda: False
        for table in tables:
            table.cache_clear()
