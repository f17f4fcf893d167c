"""Which files of a checkpoint's folder are the checkpoint's, so that no other is ever deleted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from vllm_vlora.checkpoint.aliases import ALIASES_FILE
from vllm_vlora.checkpoint.attachments import ATTACHMENTS_FILE, ATTACHMENTS_FOLDER
from vllm_vlora.checkpoint.components import COMPONENTS_FILE
from vllm_vlora.checkpoint.manifest import (
    BASIS_INDEX_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    RECORDS_FILE,
    TASKS_FILE,
    TASKS_FOLDER,
    hash_file,
    is_checkpoint,
    is_indexed,
    read_checked,
    read_config,
    task_file,
)
from vllm_vlora.checkpoint.router_files import NETWORK_NAME, ROUTER_FILE
from vllm_vlora.checkpoint.task_index import read_ids
from vllm_vlora.errors import CheckpointError, TaskIdError
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.strict_json import JSONError, decode

CARD_FILE = "README.md"
DESCRIPTIONS = frozenset(
    {
        TASKS_FILE,
        INDEX_FILE,
        RECORDS_FILE,
        BASIS_INDEX_FILE,
        ATTACHMENTS_FILE,
        ALIASES_FILE,
        COMPONENTS_FILE,
        ROUTER_FILE,
    }
)
"""The files of fixed names beside the manifest, of which a checkpoint has some."""
_ATTACHED = rf"{ATTACHMENTS_FOLDER}/[0-9a-f]{{64}}"
# What this package calls its files; where what names them is damaged or newer, that must do.
_NAMES = re.compile(
    rf"basis(-\d{{5}}-of-\d{{5}})?\.safetensors|{TASKS_FOLDER}/[^/]+\.safetensors"
    rf"|{_ATTACHED}|{NETWORK_NAME}"
)
BASIS_NAME = r"basis[A-Za-z0-9_.-]*\.safetensors"
"""What this package lets a file of shared bases be called, as a regular expression."""
# What names files in JSON, and how those are called: any other name is of a file of somebody else's.
_NAMED = {
    CONFIG_FILE: BASIS_NAME,
    ATTACHMENTS_FILE: _ATTACHED,
    ROUTER_FILE: NETWORK_NAME,
}
_FILE = re.compile(rb'"file"\s*:\s*("(?:[^"\\]|\\.)*")')


def checkpoint_files(path: Path) -> set[str] | None:
    """The checkpoint's files, relative to its folder, in whatever version; None if there is none.

    A manifest without any of the files that it names is none, if anything else lies there.
    """
    if not is_checkpoint(path):
        return None
    own = {CONFIG_FILE, CARD_FILE, *DESCRIPTIONS}
    for name, called in _NAMED.items():
        with suppress(OSError):
            own.update(_named(read_regular(path / name, JSON_BYTES), called))
    with suppress(OSError, CheckpointError):
        own.update(_foreign_bases(path))
    with suppress(OSError, msgspec.MsgspecError, UnicodeError, RecursionError, TaskIdError):
        own.update(_recorded(read_regular(path / TASKS_FILE, JSON_BYTES)))
    with suppress(CheckpointError):
        own.update(_indexed(path))
    if not _is_sound(path):
        own.update(_known_names(path))
    own_there = any((path / name).is_file() for name in own - {CONFIG_FILE, CARD_FILE})
    if not own_there and any(entry.name not in own for entry in path.iterdir()):
        return None
    return own


def _named(data: bytes, called: str) -> Iterator[str]:
    """What "file" says, wherever it stands, that is called so; a large manifest is not decoded for it."""
    for text in _FILE.findall(data):
        with suppress(JSONError):
            name = decode(text, str)
            if re.fullmatch(called, name):
                yield name


def _foreign_bases(path: Path) -> Iterator[str]:
    """Basis files of other makes, called anything: each the very file that the manifest means."""
    for ref in read_config(path).basis:
        file = path / ref.file
        foreign = not re.fullmatch(BASIS_NAME, ref.file)
        if foreign and file.is_file() and hash_file(file) == (ref.sha256, ref.nbytes):
            yield ref.file


def _recorded(data: bytes) -> Iterator[str]:
    """The files of the tasks in ``tasks.json``; what else its records say is mostly an adapter's."""
    yield from map(task_file, msgspec.json.decode(data, type=dict[str, msgspec.Raw]))


def _indexed(path: Path) -> Iterator[str]:
    """The files of tasks that an index names, where it is whole."""
    config = read_config(path)
    if is_indexed(config):
        yield from map(task_file, read_ids(path, config))


def _is_sound(path: Path) -> bool:
    """Whether what names the files is as it was written."""
    try:
        ref = read_config(path).tasks
        read_checked(path / ref.file, ref)
    except CheckpointError:
        return False
    return True


def _known_names(path: Path) -> Iterator[str]:
    for pattern in ("*", f"{TASKS_FOLDER}/*", f"{ATTACHMENTS_FOLDER}/*"):
        for entry in path.glob(pattern):
            name = entry.relative_to(path).as_posix()
            if _NAMES.fullmatch(name):
                yield name
