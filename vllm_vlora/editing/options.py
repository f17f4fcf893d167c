"""What new tasks may take, and what became of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.atomic import check_apart
from vllm_vlora.checkpoint.losses import Losses
from vllm_vlora.compression.options import CompressOptions


@dataclass(frozen=True)
class AddOptions:
    """What new tasks may take. At most one of ``ratio``, ``max_bytes``, ``max_error``.

    Attributes:
        ratio: a new adapter's LoRA weights at 16 bits each over the bytes of its file (and of its
            share of the rows by which bases grow) is to be at least this; one or less sets no limit.
            Default: the checkpoint's ratio, bases counted, so that adding keeps it; a task whose
            relative error would be above 1.5 times the worst of the checkpoint's, or that would lose
            more than a predicted 1 % of its gain where all of these lose less, gets as many bytes as
            it takes not to. With ``quantize`` none nothing is lost.
        max_bytes: all new tasks together, divided by the sizes of their originals.
        max_error: as of ``CompressOptions``, of the new tasks.
        quantize, double_quantize, dtype, calibration, allow_large_error, tokenizers: as of
            ``CompressOptions``.

    Raises:
        OptionError: unknown, out of range or contradictory values.

    Examples:
        >>> AddOptions(ratio=4).max_error is None
        True
        >>> AddOptions(ratio=4, max_error=0.1)
        Traceback (most recent call last):
        vllm_vlora.errors.OptionError: ratio and max_error contradict each other; give only one of them
    """

    ratio: float | None = None
    max_bytes: int | None = None
    max_error: float | None = None
    quantize: str = "auto"
    double_quantize: bool = True
    dtype: str | None = None
    calibration: str | None = None
    allow_large_error: bool = False
    tokenizers: bool = True

    def __post_init__(self) -> None:
        CompressOptions(
            ratio=self.ratio,
            max_bytes=self.max_bytes,
            max_error=self.max_error,
            quantize=self.quantize,
            double_quantize=self.double_quantize,
            dtype=self.dtype,
            calibration=self.calibration,
            allow_large_error=self.allow_large_error,
        )


def check_output(target: Path, adapters: Mapping[str, Adapter], calibration: str | None) -> None:
    """Raise OutputError if the folder to write is or holds what is read beside the checkpoint."""
    read = [adapter.path for adapter in adapters.values()]
    check_apart(target, [*read, *([calibration] if calibration else [])])


@dataclass
class AddedTask:
    """What became of one new task.

    Attributes:
        kind: ``projected`` on the bases, ``private``, or ``mixed``, some modules either way.
        nbytes: its file without extra tensors. grown_nbytes: its share of the rows added for it.
        error: measured ||delta_W' - delta_W||_F / ||delta_W||_F over all modules.
        seen_error: as the calibrated model sees it; without calibration it is ``error``.
        carried: the share of ||delta_W||^2 that the bases hold, where it has modules with one.
        private_error, private_nbytes: of the best private storage within the same limit (as seen),
            None where none meets it.
        why: one line that says why it is stored so.
    """

    task_id: str
    source: str
    kind: str
    ranks: tuple[int, int]
    original_nbytes: int
    nbytes: int
    grown_nbytes: int
    error: float
    seen_error: float
    carried: float
    private_error: float | None
    private_nbytes: int | None
    why: str


@dataclass
class AddReport:
    """What adding did: sizes of the whole checkpoint before and after, and each new task.

    ``grown`` counts the modules whose basis has grown, ``grown_nbytes`` the bytes of their new rows.
    ``budget`` says what the new tasks were allowed, in words. ``losses`` are those of the new tasks;
    where it is ``calibrated``, as the model sees them.

    Examples:
        >>> new = {"new": open_adapter(adapter_dirs[0])}
        >>> report = add_adapters(checkpoint, new, AddOptions(max_error=0.1))
        >>> report.nbytes > report.nbytes_before, report.tasks[0].error <= 0.1
        (True, True)
    """

    path: Path
    tasks: list[AddedTask]
    nbytes_before: int
    nbytes: int
    original_nbytes: int
    budget: str
    grown: int = 0
    grown_nbytes: int = 0
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    losses: Losses = field(default_factory=Losses)
    calibrated: bool = False

    @property
    def ratio(self) -> float:
        """Of the checkpoint as it is now."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.inf
