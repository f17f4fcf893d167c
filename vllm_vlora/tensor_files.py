"""Safetensors files that others wrote, read without mapping them.

A mapped file that is truncated, as by copying over it, ends the process with SIGBUS at the next access.
Here every tensor is read into memory of its own, and a file that has become shorter is an error. The
header is checked as the safetensors library checks it: the tensors lie one behind the other, without
gaps, up to the end of the file, and each has the bytes of its shape.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import msgspec
import torch

from vllm_vlora.regular_files import open_regular, size_of
from vllm_vlora.strict_json import JSONError, decode_typed

_CUT = "the file was cut while it was read"
_MOST_HEADER = 100_000_000
# torch counts elements, and the products of trailing dimensions, in 64 bits with sign.
_MOST_ELEMENTS = 1 << 62
_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# What the format has besides, in bits; such tensors can be named and not read.
_OTHER_BITS = {
    "U64": 64, "U32": 32, "U16": 16, "C64": 64, "C128": 128, "F8_E8M0": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_BITS = {name: 8 * dtype.itemsize for name, dtype in _TORCH_DTYPES.items()} | _OTHER_BITS


class DamagedFileError(ValueError):
    """What is wrong with a file that was to be safetensors."""


class TensorEntry(NamedTuple):
    """What the header says of a tensor; ``start`` and ``stop`` count from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


Stamp = tuple[int, ...]
"""Device, inode, size and times of a file: the same as long as nobody writes to it or replaces it."""


class ShardIndex(msgspec.Struct):
    """The Hub's index beside several files: tensor name -> file name."""

    weight_map: dict[str, str]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class TensorFile:
    """An opened file and its header; a context manager.

    Args:
        known: the stamp of a file whose header was read before. Of that very file it is not read again:
            ``read_entry`` takes what it said.

    Attributes:
        entries: name -> what the header says, in the order of the data; empty where it is known.
        stamp: of the file.

    Raises:
        OSError: it cannot be opened or is no regular file. DamagedFileError: it is not whole.
    """

    def __init__(self, path: Path, known: Stamp | None = None) -> None:
        self._file = open_regular(path)
        try:
            found = os.fstat(self._file.fileno())
            self.stamp: Stamp = (
                found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
            )  # fmt: skip
            self.entries: dict[str, TensorEntry] = {}
            if self.stamp != known:
                self.entries = _read_header(self._file, found.st_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays."""
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """A tensor in memory of its own.

        Raises:
            OSError: reading failed.
            DamagedFileError: no such tensor, torch has no such dtype, or the file was cut since it was
                opened.
        """
        if name not in self.entries:
            raise DamagedFileError("the tensor is missing")
        return self.read_entry(self.entries[name])

    def read_entry(self, entry: TensorEntry) -> torch.Tensor:
        """The same by what the header says of it."""
        # Compared first, so that a cut file does not cost the memory of what it was.
        if size_of(self._file) < entry.stop:
            raise DamagedFileError(_CUT)
        return _read_tensor(self._file, entry)


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """All tensors of a file in memory, each in memory of its own.

    Raises:
        DamagedFileError: it is no whole safetensors file, or torch has no such dtype.
    """
    file = io.BytesIO(data)
    return {n: _read_tensor(file, entry) for n, entry in _read_header(file, len(data)).items()}


def _read_tensor(file: BinaryIO, entry: TensorEntry) -> torch.Tensor:
    if entry.dtype not in _TORCH_DTYPES:
        raise DamagedFileError(f"the dtype {entry.dtype} cannot be read")
    values = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    file.seek(entry.start)
    if len(values):
        memory = (ctypes.c_ubyte * len(values)).from_address(values.data_ptr())
        if file.readinto(memory) < len(values):  # type: ignore[attr-defined]
            raise DamagedFileError(_CUT)
    return values.view(_TORCH_DTYPES[entry.dtype]).view(entry.shape)


def _read_header(file: BinaryIO, size: int) -> dict[str, TensorEntry]:
    length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
    if not 0 <= length <= min(size - 8, _MOST_HEADER):
        raise DamagedFileError("its header does not fit into it")
    try:
        found: dict[str, msgspec.Raw] = decode_typed(file.read(length), dict[str, msgspec.Raw])
        found.pop("__metadata__", None)
        entries = {name: decode_typed(bytes(raw), _Entry) for name, raw in found.items()}
    except JSONError as error:
        raise DamagedFileError(f"its header is damaged: {error}") from error
    ordered = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    begin, place = 8 + length, 0
    result = {}
    for name, entry in ordered:
        start, stop = entry.data_offsets
        if start != place or stop != start + _nbytes(name, entry):
            raise DamagedFileError(f"tensor {name!a:.100} is not where its header says")
        result[name] = TensorEntry(entry.dtype, tuple(entry.shape), begin + start, begin + stop)
        place = stop
    if begin + place != size:
        raise DamagedFileError(f"it has {size} bytes, its header says {begin + place}")
    return result


def _nbytes(name: str, entry: _Entry) -> int:
    bits = _BITS.get(entry.dtype)
    # Without the zeros: a tensor of shape [0, 2^62, 2^62] has no elements, and overflows all the same.
    spread = math.prod(size for size in entry.shape if size)
    if bits is None or len(entry.shape) > 64 or any(size < 0 for size in entry.shape):
        raise DamagedFileError(f"tensor {name!a:.100} has an impossible dtype or shape")
    if spread > _MOST_ELEMENTS:
        raise DamagedFileError(f"tensor {name!a:.100} has an impossible shape")
    total = math.prod(entry.shape) * bits
    if total % 8:
        raise DamagedFileError(f"tensor {name!a:.100} does not end at a whole byte")
    return total // 8
