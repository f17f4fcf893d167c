"""Files that may lie beside a manifest, which does not know of them: small, JSON, with a version."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

from vllm_vlora.errors import CheckpointError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.strict_json import JSONError, decode_typed

VERSION = 1
"""The one version of each of them so far."""


class _Versioned(Protocol):
    version: int


_File = TypeVar("_File", bound=_Versioned)


def read_beside(file: Path) -> bytes | None:
    """What such a file of a checkpoint's folder holds; None where there is none.

    Raises:
        CheckpointError: it cannot be read, or leads out of the folder.
    """
    refuse_link_out(file, file.parent, CheckpointError)
    try:
        return read_regular(file, JSON_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error


def decode_beside(file: Path, data: bytes, kind: type[_File]) -> _File:
    """The content of such a file.

    Raises:
        CheckpointError: it is damaged or newer.
    """
    try:
        found = decode_typed(data, kind)
    except JSONError as error:
        raise CheckpointError(f"{file}: {error}; copy the checkpoint again") from error
    if found.version != VERSION:
        raise CheckpointError(f"{file}: version {found.version!r} is unknown; upgrade vllm-vlora")
    return found
