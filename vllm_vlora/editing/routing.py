"""A checkpoint's router: attached and taken away in place, without touching a file of weights."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_vlora.atomic import exclusive, write_file_atomic
from vllm_vlora.checkpoint.beside import VERSION
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.router_files import (
    NETWORK_GLOB,
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


class Labels:
    """What a router may learn to pick: the tasks of a checkpoint, and its aliases.

    As ``checkpoint.task_files.KnownTasks`` has them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path = checkpoint.path
        # Of an index no record is read for it.
        self.tasks: Mapping[str, Any] = ChainMap(dict(checkpoint.aliases), checkpoint.tasks)  # type: ignore[arg-type]

    def record(self, label: str) -> Any:
        """What there is of a label.

        Raises:
            TaskNotFoundError, OptionError: it is neither a task nor an alias.
        """
        if label in self.tasks:
            return self.tasks[label]
        if any(operator in label for operator in "*+"):
            raise OptionError(
                f"{label!r} is neither a task nor an alias; to route to a blend, give it a name: "
                f"vllm-vlora alias {self.path} NAME --blend {label!r}"
            )
        return self._checkpoint.record(label)


@contextmanager
def _held(checkpoint: str | Path) -> Iterator[Path]:
    """The folder of a checkpoint, which nobody else changes meanwhile."""
    target = Path(checkpoint).expanduser()
    if not target.is_dir():
        raise OptionError(f"{checkpoint} is no folder; pull it, and give its folder")
    with exclusive(target):
        yield Checkpoint.open(target).path


def _remove_networks(folder: Path, wanted: Callable[[str], bool]) -> None:
    for file in folder.glob(NETWORK_GLOB):
        if wanted(file.name):
            file.unlink()
