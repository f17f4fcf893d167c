"""What a compression is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_vlora.errors import OptionError
from vllm_vlora.planning.executors import Executor, check_device
from vllm_vlora.quantize import FLOAT_DTYPES

REPRESENTATION_CHOICES = ("auto", "joint", "factored", "flat", "private")
QUANTIZE_CHOICES = ("auto", "none", "int8", "nf4")
CODES_CHOICES = ("nf4", "trellis")
DEFAULT_LOSS = 0.01
"""What a task may be predicted to lose of its gain when nothing is asked for (``losses``)."""


@dataclass(frozen=True)
class CompressOptions:
    """What to compress to. At most one of ``ratio``, ``max_bytes``, ``max_error``,
    ``num_components``.

    Attributes:
        representation: ``joint`` shares a basis among all tasks, ``factored`` does so with cores in
            factor form only, ``flat`` shares the principal components of flattened factors (vlora),
            ``private`` shares nothing. ``auto`` plans joint, private, and bases that only some
            tasks share, measures them and keeps the best: the lowest root-mean-square error of the
            tasks, with what shared bases lose counted ``checkpoint.losses.SHARED_LOSS`` times, or under
            ``max_error`` the fewest bytes.
        ratio: the originals' LoRA weights at 16 bits each over all bytes of the checkpoint's
            safetensors files (without classifier heads and the like) is to be at least this. One or
            less sets no limit. Without any of the four, as few bytes as a predicted loss
            (``checkpoint.losses``) of 1 % of the gain allows in every task; with ``quantize`` none
            nothing is lost. What cannot keep that loses the least that it can, with a warning.
        max_bytes: the safetensors files are to take at most this.
        max_error: ||delta_W' - delta_W|| / ||delta_W|| of the worst task is to be at most this, in as
            few bytes as possible.
        num_components: k of every shared basis, cut to what a module can have; implies ``joint``.
            Sets no limit on bytes, so that ``quantize`` auto then means none.
        gate: with a ``ratio`` above one or ``max_bytes``, the largest error that a task may have:
            those above it get more of the bytes, up to their own factors untouched, and the others less.
        quantize: number format of factors, bases and cores. ``none`` is the adapters' own
            dtype; ``auto`` chooses by measured error among that, bfloat16, int8 and NF4.
        codes: what private factors of 4 bits and less are in: ``nf4``, or ``trellis`` codes, which lose
            less and take a microsecond a number to find. For a ``ratio`` or ``max_bytes``: errors are
            planned nearly, and measured when they are stored.
        double_quantize: NF4 may store its scales in 8 bits.
        dtype: ``float32``, ``float16`` or ``bfloat16`` in place of the adapters' own dtype, and for
            the cores of ``joint``.
        clusters: how many groups of tasks get a basis of their own; ``auto`` tries groups where tasks
            resemble each other and keeps them if they pay.
        calibration: a calibration folder (``vllm-vlora calibrate``): errors are then measured and
            minimised as the model sees them, and not in the Frobenius norm.
        allow_large_error: store tasks with a relative error above 1 (as seen, with a calibration), which
            are refused otherwise: leaving them out would lose less.
        tokenizers: keep tokenizer files and chat templates that lie beside the adapters' weights.
        executor, jobs: where modules are worked on; see :class:`planning.executors.Executor`.
        device: what measures, fits and encodes: ``cpu``, ``cuda``, or ``auto`` for CUDA where a process
            has it.
        seed: of the fit's random start.

    Raises:
        OptionError: unknown, out of range or contradictory values.

    Examples:
        >>> CompressOptions(ratio=6, gate=0.3).shares
        'auto'
        >>> CompressOptions(num_components=4).shares
        'joint'
    """

    representation: str = "auto"
    ratio: float | None = None
    max_error: float | None = None
    num_components: int | None = None
    quantize: str = "auto"
    double_quantize: bool = True
    dtype: str | None = None
    seed: int = 0
    max_bytes: int | None = None
    gate: float | None = None
    clusters: int | str = "auto"
    calibration: str | None = None
    executor: str = "auto"
    jobs: int = 0
    device: str = "auto"
    allow_large_error: bool = False
    tokenizers: bool = True
    codes: str = "nf4"

    def __post_init__(self) -> None:
        _check_choice("representation", self.representation, REPRESENTATION_CHOICES)
        _check_choice("quantize", self.quantize, QUANTIZE_CHOICES)
        _check_choice("codes", self.codes, CODES_CHOICES)
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, tuple(FLOAT_DTYPES))
        Executor(self.executor, self.jobs)
        check_device(self.device)
        self._check_budget()
        self._check_clusters()
        self._check_codes()
        if self.num_components is not None and self.representation == "private":
            raise OptionError(
                "num_components is the width of a shared basis, which private has none of; "
                "use joint, or give a ratio"
            )
        if (
            self.dtype is not None
            and self.representation == "private"
            and self.quantize in ("int8", "nf4")
        ):
            raise OptionError(
                f"dtype {self.dtype} has no effect on private factors in {self.quantize}; "
                "leave it out, or quantize none"
            )

    def _check_budget(self) -> None:
        budgets = {
            "ratio": self.ratio,
            "max_bytes": self.max_bytes,
            "max_error": self.max_error,
            "num_components": self.num_components,
        }
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} contradict each other; give only one of them")
        if self.ratio is not None and not (math.isfinite(self.ratio) and self.ratio > 0):
            raise OptionError(f"ratio must be a positive number, got {self.ratio}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise OptionError(f"max_bytes must be at least 1, got {self.max_bytes}")
        _check_error("max_error", self.max_error)
        _check_error("gate", self.gate)
        limits_bytes = self.max_bytes is not None or (self.ratio is not None and self.ratio > 1)
        if self.gate is not None and not limits_bytes:
            raise OptionError(
                "gate limits the error of the worst task in a number of bytes; give it with a ratio "
                "above 1 or max_bytes, or max_error in its place"
            )
        if self.num_components is not None and self.num_components < 1:
            raise OptionError(f"num_components must be at least 1, got {self.num_components}")

    def _check_codes(self) -> None:
        if self.codes == "nf4":
            return
        if self.quantize in ("none", "int8") or self.only_shared:
            raise OptionError(
                f"codes {self.codes} are for private factors in 4 bits and less; leave them out, or use "
                "representation auto or private and quantize auto or nf4"
            )
        if (self.ratio is None and self.max_bytes is None) or self.gate is not None:
            raise OptionError(
                f"codes {self.codes} promise no error; give a ratio or max_bytes, and no gate"
            )

    def _check_clusters(self) -> None:
        if self.clusters == "auto":
            return
        if not isinstance(self.clusters, int) or self.clusters < 1:
            raise OptionError(f"clusters must be auto or at least 1, got {self.clusters}")
        if self.clusters > 1 and self.representation == "private":
            raise OptionError("clusters are groups that share a basis, which private has none of")

    @property
    def has_budget(self) -> bool:
        """Whether a size or an error is asked for."""
        wanted = (self.ratio, self.max_bytes, self.max_error, self.num_components)
        return any(value is not None for value in wanted)

    @property
    def by_size(self) -> bool:
        """Whether the smallest that meets the budget is chosen, and not the one that keeps most."""
        return self.max_error is not None or not (self.has_budget or self.quantize == "none")

    @property
    def shares(self) -> str:
        """The representation, with what ``num_components`` implies."""
        if self.num_components is not None and self.representation == "auto":
            return "joint"
        return self.representation

    @property
    def only_shared(self) -> bool:
        """Whether every task shares a basis wherever it can, whatever that costs."""
        return self.shares in ("joint", "factored", "flat")

    @property
    def number_format(self) -> str:
        """``quantize``, with what ``num_components`` implies."""
        if self.quantize == "auto" and self.num_components is not None:
            return "none"
        return self.quantize


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"unknown {name} {value!r}; use one of {', '.join(allowed)}")


def _check_error(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise OptionError(f"{name} must be zero or more, got {value}")
