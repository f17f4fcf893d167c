"""Files that may lie beside a manifest, which does not know of them: small, JSON, with a version."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import CheckpointError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.strict_json import JSONError, decode_typed

VERSION = 1
"""The first version of each of them."""


class _Versioned(msgspec.Struct):
    version: int


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


def decode_beside(file: Path, data: bytes, *kinds: Any) -> Any:
    """The content of such a file.

    Args:
        kinds: what version 1 of it is, and the later ones.

    Raises:
        CheckpointError: it is damaged or newer.
    """
    version = 1
    # What is no such JSON is refused below, in words.
    with suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        version = msgspec.json.decode(data, type=_Versioned).version
    if not 1 <= version <= len(kinds):
        raise CheckpointError(f"{file}: version {version!r} is unknown; upgrade vllm-vlora")
    try:
        return decode_typed(data, kinds[version - 1])
    except JSONError as error:
        raise CheckpointError(f"{file}: {error}; {copy_again(file)}") from error
