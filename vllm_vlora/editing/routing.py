"""A checkpoint's router: attached and taken away in place, without touching a file of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_vlora.atomic import exclusive, write_file_atomic
from vllm_vlora.checkpoint.beside import VERSION
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.router_files import (
    ROUTER_FILE,
    TEXT_FEATURES,
    Measured,
    RouterRecord,
    Weights,
    encode_router,
    network_bytes,
    refuse_unreadable,
)
from vllm_vlora.errors import OptionError


def attach_router(
    checkpoint: str | Path,
    tasks: Sequence[str],
    weights: Weights,
    *,
    others: bool = False,
    temperature: float = 1.0,
    measured: Mapping[str, Measured] | None = None,
) -> RouterRecord:
    """Give a checkpoint a router, in place of the one that it has; readers see one or the other.

    Args:
        checkpoint: its folder. The rest: as a ``RouterRecord`` has them.

    Raises:
        OptionError: no folder is given, or these are no router: a network of another shape or beyond the
            bounds, NaN, a task twice, a temperature that is none.
        CheckpointError, OutputError: the checkpoint cannot be read or written.
    """
    data, ref = network_bytes(weights)
    record = RouterRecord(
        VERSION, TEXT_FEATURES, list(tasks), others, temperature, ref, dict(measured or {})
    )
    refuse_unreadable(record, weights)
    with _held(checkpoint) as folder:
        write_file_atomic(folder / ref.file, data)
        write_file_atomic(folder / ROUTER_FILE, encode_router(record))
        _remove_networks(folder, lambda name: name != ref.file)
    return record


def remove_router(checkpoint: str | Path) -> None:
    """Take a checkpoint's router away, in place, also one that is damaged.

    Raises:
        OptionError: it has none, or no folder is given.
        CheckpointError, OutputError: the checkpoint cannot be read or written.
    """
    with _held(checkpoint) as folder:
        if not (folder / ROUTER_FILE).is_symlink() and not (folder / ROUTER_FILE).exists():
            raise OptionError(f"{checkpoint} has no router")
        (folder / ROUTER_FILE).unlink()
        _remove_networks(folder, lambda _: True)


@contextmanager
def _held(checkpoint: str | Path) -> Iterator[Path]:
    """The folder of a checkpoint, which nobody else changes meanwhile."""
    target = Path(checkpoint).expanduser()
    if not target.is_dir():
        raise OptionError(f"{checkpoint} is no folder; pull it, and give its folder")
    with exclusive(target):
        yield Checkpoint.open(target).path


def _remove_networks(folder: Path, wanted: Callable[[str], bool]) -> None:
    for file in folder.glob("router-*.safetensors"):
        if wanted(file.name):
            file.unlink()
