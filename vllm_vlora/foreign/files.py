"""JSON and safetensors that another package wrote: names, shapes and every number checked."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from vllm_vlora.checkpoint.layout import SAFETENSORS_DTYPES
from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import CheckpointError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.quantize import FLOAT_DTYPES, is_finite
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.strict_json import JSONError, decode
from vllm_vlora.tensor_files import DamagedFileError
from vllm_vlora.tensor_files import TensorFile as OpenedFile

T = TypeVar("T")


def read_json(path: Path, kind: type[T]) -> T:
    """The JSON object of a file as a msgspec struct; fields that the struct lacks are left out.

    Raises:
        CheckpointError: no such file, no JSON, or a field of another type.
    """
    refuse_link_out(path, path.parent, CheckpointError)
    try:
        # Their statistics may hold Infinity, which json.dump writes and strict JSON forbids.
        return decode(read_regular(path, JSON_BYTES), kind, infinite=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; {copy_again(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except JSONError as error:
        raise CheckpointError(f"{path}: {error}; {copy_again(path)}") from error


def inside(folder: Path, *parts: str) -> Path:
    """``folder/parts...``, each part a plain relative path that stays inside.

    Raises:
        CheckpointError: it would leave the folder.
    """
    for part in parts:
        if not part or part.startswith("/") or "\\" in part or not part.isprintable():
            raise CheckpointError(f"{folder}: path {part!r} leaves the checkpoint")
        if ".." in part.split("/"):
            raise CheckpointError(f"{folder}: path {part!r} leaves the checkpoint")
    path = folder.joinpath(*parts)
    refuse_link_out(path, folder, CheckpointError)
    return path


class TensorFile:
    """A safetensors file that is read tensor by tensor.

    Raises:
        CheckpointError: it is missing or not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_link_out(path, path.parent, CheckpointError)
        try:
            self._file = OpenedFile(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: the file is missing; {copy_again(path)}") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except DamagedFileError as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); {copy_again(path)}"
            ) from error
        self.names = frozenset(self._file.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header.

        Raises:
            CheckpointError: no such tensor.
        """
        self._check_name(name)
        return self._file.entries[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of any dtype that a checkpoint can hold, finite.

        Raises:
            CheckpointError: no such tensor, another dtype, or a value that is not finite.
        """
        self._check_name(name)
        try:
            tensor = self._file.read(name)
        except (DamagedFileError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {error}") from error
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has the unsupported dtype {tensor.dtype}"
            )
        if not is_finite(tensor):
            raise CheckpointError(f"{self.path}: tensor {name!r} holds NaN or infinity")
        return tensor

    def floats(self, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        """A float32, float16 or bfloat16 tensor; None in ``shape`` is any size.

        Raises:
            CheckpointError: as :meth:`tensor`, or another shape or dtype.
        """
        found = self.shape(name)
        fits = len(found) == len(shape) and all(w in (None, f) for w, f in zip(shape, found))
        if 0 in found:
            raise CheckpointError(f"{self.path}: tensor {name!r} is empty, {list(found)}")
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {list(found)}, expected [{wanted}]"
            )
        tensor = self.tensor(name)
        if tensor.dtype not in FLOAT_DTYPES.values():
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {tensor.dtype}; only float32, float16 and "
                "bfloat16 can be kept exactly, so save the checkpoint in one of them"
            )
        return tensor

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
