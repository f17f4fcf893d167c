"""An adapter's weights files: one safetensors file, or several with an index; opened when read."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from vllm_vlora.adapters.lookalikes import describe_folder, describe_weights
from vllm_vlora.errors import AdapterError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.quantize import is_finite
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.strict_json import JSONError, decode
from vllm_vlora.tensor_files import DamagedFileError, ShardIndex, Stamp, TensorEntry, TensorFile
from vllm_vlora.wording import some_of

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor of an adapter stands, and what the file's header says of it.

    Attributes:
        dtype: safetensors' name, "BF16". shape: as it is read, so after ``transposed``.
        file, key: the file and its name there. transposed: whether the file has the transpose.
        stamp, entry: of the file, and what its header said, so that it need not be read again.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    key: str
    transposed: bool = False
    stamp: Stamp | None = None
    entry: TensorEntry | None = None


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of an adapter's folder, by its name in the file.

    Raises:
        AdapterError: a file is missing or damaged, or the index contradicts the files.
    """
    if (folder / WEIGHTS_FILE).exists() or not (folder / INDEX_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    names = _read_index(folder / INDEX_FILE)
    missing = [name for name in sorted(set(names.values())) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder}: {INDEX_FILE} names {some_of(missing)}, not there; copy all")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(names.values())):
        tensors = read_header(folder / name)
        unnamed = sorted(tensors.keys() - names.keys())
        if unnamed:
            raise AdapterError(
                f"{folder}: {INDEX_FILE} does not name {some_of(unnamed)} of {name}; copy it again"
            )
        found |= {key: tensor for key, tensor in tensors.items() if names[key] == name}
    lost = sorted(names.keys() - found.keys())
    if lost:
        raise AdapterError(f"{folder}: no file has {some_of(lost)} of {INDEX_FILE}; copy it again")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file, by name."""
    with open_weights(path) as file:
        return {
            key: StoredTensor(entry.dtype, entry.shape, path, key, stamp=file.stamp, entry=entry)
            for key, entry in file.entries.items()
        }


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    refuse_link_out(path, path.parent, AdapterError)
    try:
        names = decode(read_regular(path, JSON_BYTES), ShardIndex).weight_map
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
    except JSONError as error:
        raise AdapterError(f"{path}: no index of weights files ({error}); copy it again") from error
    if not all(_is_file_name(name) for name in names.values()):
        raise AdapterError(f"{path}: names files outside of its folder; save the adapter again")
    return names


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name.encode()) <= 255


def open_weights(path: Path, known: Stamp | None = None) -> TensorFile:
    """The opened weights file; AdapterError when it is missing, damaged or a link out of its folder.

    Args:
        known: as of ``TensorFile``; such a file was also found not to lie behind a link out.
    """
    if known is None:
        refuse_link_out(path, path.parent, AdapterError)
    try:
        opened = TensorFile(path, known)
        if known in (None, opened.stamp):
            return opened
        opened.close()
        return open_weights(path)
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent}: {_missing(path)}") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
    except DamagedFileError as error:
        advice = describe_weights(path) or "copy or download it again"
        raise AdapterError(f"{path}: not a whole safetensors file ({error}); {advice}") from error


def _missing(path: Path) -> str:
    found = describe_folder(path.parent)
    if found is not None:
        return f"no {path.name}; {found}"
    return (
        f"no {path.name}; where there is only a .bin file: that is pickle, which can run code when "
        "it is read; load it with PEFT and call save_pretrained(folder, safe_serialization=True)"
    )


class WeightsReader:
    """Reads tensors, opening each file once; a context manager.

    Args:
        where: the adapter, for messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack = ExitStack()
        self._files: dict[Path, TensorFile] = {}

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor, in its own dtype.

        Raises:
            AdapterError: a value is NaN or infinite, or the file changed since its header was read.
        """
        if stored.file not in self._files:
            opened = open_weights(stored.file, stored.stamp)
            self._files[stored.file] = self._stack.enter_context(opened)
        file = self._files[stored.file]
        try:
            if stored.entry is not None and file.stamp == stored.stamp:
                tensor = file.read_entry(stored.entry)
            else:
                tensor = file.read(stored.key)
        except (DamagedFileError, OSError) as error:
            raise AdapterError(
                f"{self._where}: cannot read tensor {stored.key!r}: {error}"
            ) from error
        tensor = tensor.T if stored.transposed and tensor.ndim == 2 else tensor
        if tuple(tensor.shape) != stored.shape:
            raise AdapterError(
                f"{self._where}: tensor {stored.key!r} changed while it was read; run again"
            )
        check_finite(tensor, stored.key, self._where)
        return tensor.contiguous()


def check_finite(tensor: torch.Tensor, key: str, where: str) -> None:
    """Refuse a tensor with NaN or infinite values."""
    if not is_finite(tensor):
        raise AdapterError(
            f"{where}: tensor {key!r} holds NaN or infinite values; the training diverged or the "
            "file is damaged"
        )
