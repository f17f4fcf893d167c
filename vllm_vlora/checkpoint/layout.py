"""Which tensors lie in a checkpoint's files, under which names, and the files' exact bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias

import torch

from vllm_vlora.quantize import part_specs, stored_code_nbytes
from vllm_vlora.representations.registry import segment_sides, shared_sides
from vllm_vlora.representations.spec import ModuleSpec, Segment

# Part of a file that holds the codes of rows with so many bits.
CODE_PARTS = {4: "codes", 3: "codes3", 2: "codes2"}
EXTRA_PREFIX = "extra."
ExtraTensors: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> (dtype, shape) of the tensors of a task that are not LoRA."""
_NO_TENSORS: ExtraTensors = MappingProxyType({})
# A shard is serialised in memory before it is written, so its size bounds the writer's memory.
BASIS_SHARD_BYTES = 1 << 30
# In the order in which safetensors lays the tensors of a file out, then by name.
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_DTYPE_ORDER = {dtype: place for place, dtype in enumerate(SAFETENSORS_DTYPES)}


def stored_parts(
    segment: Segment, rows: int, cols: int
) -> Iterator[tuple[str, torch.dtype, int, tuple[int, ...]]]:
    """(part, dtype, rows, shape of a row) of a segment's side of ``rows`` rows, as in the file.

    These are the parts of the number format, save that codes of rows with 3 and 2 bits are parts of
    their own, and that such parts say the widths. A part without rows is left out.
    """
    by_bits = segment.format == "trellis" or segment.bits is not None
    for part, (dtype, row_shape) in part_specs(segment.format, cols).items():
        if part == "widths":
            continue
        if part != "codes" or not by_bits:
            yield part, dtype, rows, row_shape
            continue
        for (bits, name), count in zip(CODE_PARTS.items(), segment.bits or (rows, 0, 0)):
            if count:
                yield name, dtype, count, (stored_code_nbytes(segment.format, cols, bits),)


def task_tensor_sizes(
    segments: Iterable[Segment], modules: list[ModuleSpec]
) -> dict[str, tuple[torch.dtype, int]]:
    """Flat tensor name -> (dtype, elements) of a task file with these segments."""
    sizes: dict[str, tuple[torch.dtype, int]] = {}
    for segment in segments:
        for side, (rows, cols) in segment_sides(segment, modules[segment.module]).items():
            for part, dtype, count, row_shape in stored_parts(segment, rows, cols):
                key = tensor_name(segment, side, part)
                have = sizes.get(key, (dtype, 0))[1]
                sizes[key] = (dtype, have + count * math.prod(row_shape))
    return sizes


def safetensors_nbytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of a safetensors file with these tensors: length word, padded JSON header, data."""
    text, offset = 2 + max(len(tensors) - 1, 0), 0
    for name, (dtype, shape) in sorted(
        tensors.items(), key=lambda item: (_DTYPE_ORDER[item[1][0]], item[0])
    ):
        stop = offset + math.prod(shape) * dtype.itemsize
        sizes = ",".join(map(str, shape))
        # "name":{"dtype":"F32","shape":[4,2],"data_offsets":[0,32]}
        text += _json_nbytes(name) + len(SAFETENSORS_DTYPES[dtype]) + len(sizes)
        text += len(f"{offset}{stop}") + _ENTRY_NBYTES
        offset = stop
    return 8 + (text + 7) // 8 * 8 + offset


_ENTRY_NBYTES = len(':{"dtype":"","shape":[],"data_offsets":[,]}')


@lru_cache(maxsize=1 << 14)
def _json_nbytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode())


def task_nbytes(
    segments: Iterable[Segment], modules: list[ModuleSpec], extra: ExtraTensors = _NO_TENSORS
) -> int:
    """Bytes of the task file that these segments make, header included.

    Args:
        extra: its tensors that are not LoRA, in the header only: their data is left out.
    """
    return file_nbytes(task_tensor_sizes(segments, modules), extra)


def file_nbytes(
    sizes: Mapping[str, tuple[torch.dtype, int]], extra: ExtraTensors = _NO_TENSORS
) -> int:
    """The same from the sizes of its flat tensors, as of ``task_tensor_sizes``."""
    flat = {name: (dtype, (count,)) for name, (dtype, count) in sizes.items()}
    named = {EXTRA_PREFIX + name: spec for name, spec in extra.items()}
    data = sum(math.prod(shape) * dtype.itemsize for dtype, shape in extra.values())
    return safetensors_nbytes({**flat, **named}) - data


def basis_nbytes(modules: Iterable[ModuleSpec]) -> int:
    """Bytes of the basis file of these modules, header included (one shard)."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in modules:
        for name, dtype, shape in basis_tensors(module):
            tensors[name] = (dtype, shape)
    return safetensors_nbytes(tensors) if tensors else 0


def tensor_name(segment: Segment, side: str, part: str) -> str:
    """Name of the flat tensor that a segment's side adds one part to."""
    return f"{segment.representation}.{side}.{segment.format}.{part}"


def basis_tensors(module: ModuleSpec) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(tensor name, dtype, shape) of what a module's tasks share: its basis, then its flat one."""
    for side, format, rows, cols in shared_sides(module):
        for part, (dtype, row_shape) in part_specs(format, cols).items():
            yield f"{module.name}.{side}.{part}", dtype, (rows, *row_shape)


def dtype_of(name: str) -> torch.dtype:
    """The dtype that safetensors calls ``name``."""
    return next(dtype for dtype, known in SAFETENSORS_DTYPES.items() if known == name)
