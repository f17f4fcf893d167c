"""What every way of compressing hands over to be measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class OutOfReachError(Exception):
    """A method cannot reach the ratio that was asked for; says why."""


@dataclass(frozen=True)
class Built:
    """A collection after compression.

    Attributes:
        folders: task -> PEFT folder of its reconstruction, held-out tasks included.
        nbytes: of all tensors in the files with the tasks in the basis; float32 tensors of a library
            that has no 16-bit files are counted at 16 bits.
        nbytes_on_disk: the same files as they are.
        nbytes_with_added: ``nbytes`` once the held-out tasks are there too.
        details: what the method says about itself.
        seconds: compression of the tasks in the basis.
    """

    folders: dict[str, Path]
    nbytes: int
    nbytes_on_disk: int
    nbytes_with_added: int
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
