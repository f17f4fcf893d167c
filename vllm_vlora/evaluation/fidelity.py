"""What a compressed task lost: the figures of a fidelity report and their arithmetic.

The figure that gates and choices go by is *KL kept* on some text,

    1 - KL(adapter || compressed) / KL(adapter || base)

with divergences in nats per supervised token: 1 says that the compressed task behaves as its adapter
does, 0 that it is as far from it as the base model. Beside it stands the *recovered fraction*,

    (loss_base - loss_compressed) / (loss_base - loss_adapter)

with losses in nats per supervised token: of the good that the adapter did, how much is left. An adapter
that was not trained to the end gains by being scaled up, and so recovers less when it is scaled down,
however faithful it is; KL kept has its greatest value where nothing is changed. Neither is clipped: a
task that does harm is below 0. They are undefined where the adapter does not change, or not clearly
improve on, the base model: the denominator would be noise.

Nothing here runs a model; ``vllm_vlora.evaluation.evaluator`` does and hands over sums per example.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_vlora.adapters.peft_folder import Adapter, Factors
from vllm_vlora.checkpoint.losses import Losses, predicted_loss
from vllm_vlora.checkpoint.task_entry import common
from vllm_vlora.errors import AdapterError
from vllm_vlora.merging.spectra import (
    SPECTRUM_QUANTILES,
    ModuleFidelity,
    Spectrum,
    error_of,
    quantile,
)
from vllm_vlora.representations.factors import small_product

MIN_GAIN = 0.01
"""Nats per token by which an adapter must improve on the base before a fraction means anything."""
MIN_GAIN_ERRORS = 2.0
"""Standard errors by which it must do so: less is no gain that these examples can show."""
MIN_DIVERGENCE = 1e-3
"""Nats per token by which an adapter must change the model before keeping that means anything."""
NO_ORIGINAL = "no original given"

_RESAMPLES = 2000
_COVERAGE = 0.95
# Resampled counts are held as doubles, so many at a time.
_COUNTS_AT_ONCE = 1 << 22


# --- losses ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleLosses:
    """Losses of one model on one data set.

    Attributes:
        nll: (examples,) float64, summed -log p of an example's supervised tokens, in nats.
        tokens: (examples,) int64, their number.
    """

    nll: torch.Tensor
    tokens: torch.Tensor

    @property
    def loss(self) -> float:
        """Mean loss per supervised token over all examples, in nats."""
        return float(self.nll.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Divergences:
    """How far models are from an adapter on one data set.

    Attributes:
        base, compressed: (examples,) float64, KL(adapter || base) and KL(adapter || compressed task), in
            nats, summed over an example's supervised tokens.
        tokens: (examples,) int64, their number.
    """

    base: torch.Tensor
    compressed: torch.Tensor
    tokens: torch.Tensor

    @property
    def kl_base(self) -> float:
        """KL(adapter || base), mean per supervised token over all examples."""
        return float(self.base.sum() / self.tokens.sum())

    @property
    def kl(self) -> float:
        """KL(adapter || compressed), mean per supervised token over all examples."""
        return float(self.compressed.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Fraction:
    """KL kept or a recovered fraction, or why there is none.

    Attributes:
        value: the fraction; None where it is undefined.
        standard_error: of ``value``, over examples; None with fewer than two.
        interval: 95% interval from a paired bootstrap over examples; None with fewer than two.
        reason: why ``value`` is None.
    """

    value: float | None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    reason: str | None = None


def recovered_fraction(
    base: ExampleLosses,
    original: ExampleLosses,
    compressed: ExampleLosses,
    *,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Fraction:
    """The recovered fraction of one task, with its uncertainty over examples.

    With N_i and D_i the gains (base's nll less the model's) of the compressed task and of the adapter
    on example i, the fraction is f = sum N_i / sum D_i: the token counts cancel. Its standard error is
    that of a ratio of sums, sqrt(n / (n - 1) sum (N_i - f D_i)^2) / sum D_i (Cochran, *Sampling
    Techniques*, 1977, ch. 6). The interval is a percentile bootstrap that draws examples with their
    three losses together, so that what makes an example hard cancels.

    Args:
        base, original, compressed: losses on the same examples in the same order.
        resamples: draws of the bootstrap; 0 for none.
        seed: of the bootstrap, so that a report repeats.
    """
    assert torch.equal(base.tokens, original.tokens), "losses of different examples"
    assert torch.equal(base.tokens, compressed.tokens), "losses of different examples"
    reason = _why_undefined(base, original)
    if reason is not None:
        return Fraction(None, reason=reason)
    return _fraction(base.nll - compressed.nll, base.nll - original.nll, resamples, seed)


def kl_kept(found: Divergences, *, resamples: int = _RESAMPLES, seed: int = 0) -> Fraction:
    """KL kept by one task, with its uncertainty over examples, as of :func:`recovered_fraction`.

    Args:
        resamples: draws of the bootstrap; 0 for none.
        seed: of the bootstrap, so that a report repeats.
    """
    if found.kl_base < MIN_DIVERGENCE:
        reason = f"the adapter's KL to the base is {found.kl_base:.2g}, less than {MIN_DIVERGENCE}"
        return Fraction(None, reason=reason)
    return _fraction(found.base - found.compressed, found.base, resamples, seed)


def _fraction(top: torch.Tensor, bottom: torch.Tensor, resamples: int, seed: int) -> Fraction:
    value = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Fraction(value)
    interval = _bootstrap(top, bottom, resamples, seed) if resamples else None
    return Fraction(value, _ratio_error(top, bottom, value), interval)


def _why_undefined(base: ExampleLosses, original: ExampleLosses) -> str | None:
    gained = base.nll - original.nll
    gain = float(gained.sum() / base.tokens.sum())
    if gain < MIN_GAIN:
        return (
            f"the adapter's loss is {original.loss:.4f}, the base's {base.loss:.4f}: no gain of "
            f"{MIN_GAIN} or more to recover"
        )
    if len(gained) < 2:
        return None
    error = _ratio_error(gained, base.tokens.double(), gain)
    if gain < MIN_GAIN_ERRORS * error:
        return (
            f"the adapter gains {gain:.4f} with a standard error of {error:.4f}: give more examples"
        )
    return None


def _ratio_error(top: torch.Tensor, bottom: torch.Tensor, ratio: float) -> float:
    """Standard error of sum(top) / sum(bottom) over n >= 2 examples."""
    count = len(top)
    spread = (top - ratio * bottom).square().sum() * count / (count - 1)
    return float(spread.sqrt() / bottom.sum())


def _bootstrap(
    top: torch.Tensor, bottom: torch.Tensor, resamples: int, seed: int
) -> tuple[float, float] | None:
    count = len(top)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for start in range(0, resamples, max(1, _COUNTS_AT_ONCE // count)):
        rows = min(max(1, _COUNTS_AT_ONCE // count), resamples - start)
        chosen = torch.randint(count, (rows, count), generator=generator)
        above, below = top.cpu()[chosen].sum(1), bottom.cpu()[chosen].sum(1)
        # A draw without any gain has no fraction; the margin asked of the adapter makes it rare.
        ratios.append((above / below)[below > 0])
    drawn = torch.cat(ratios).sort().values
    if len(drawn) == 0:
        return None
    tail = (1 - _COVERAGE) / 2
    return quantile(drawn, tail), quantile(drawn, 1 - tail)


# --- tokens ---------------------------------------------------------------------------------------


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that two answers share."""
    shared = 0
    for ours, theirs in zip(first, second, strict=False):
        if ours != theirs:
            break
        shared += 1
    return shared


@dataclass(frozen=True)
class GreedyAgreement:
    """How far greedy answers of the compressed task follow those of its adapter.

    Attributes:
        tokens: mean number of first tokens that agree.
        possible: mean number that could: the longer of two answers, which end early at an
            end-of-sequence token.
        exact: share of answers that agree throughout.
        limit: the most tokens that were generated.
    """

    tokens: float
    possible: float
    exact: float
    limit: int


def greedy_agreement(
    original: Sequence[Sequence[int]], compressed: Sequence[Sequence[int]], limit: int
) -> GreedyAgreement:
    """Compare answers to the same prompts; each ends with its end-of-sequence token if it has one."""
    assert len(original) == len(compressed) > 0
    pairs = list(zip(original, compressed, strict=True))
    longest = [max(len(first), len(second)) for first, second in pairs]
    shared = [common_prefix(first, second) for first, second in pairs]
    return GreedyAgreement(
        tokens=sum(shared) / len(pairs),
        possible=sum(longest) / len(pairs),
        exact=sum(s == n for s, n in zip(shared, longest, strict=True)) / len(pairs),
        limit=limit,
    )


def divergences(original: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """KL(softmax(original) || softmax(compressed)) of every row, (tokens,) float64, in nats.

    Args:
        original, compressed: (tokens, vocabulary) logits of the same positions.
    """
    log_p = original.float().log_softmax(-1)
    log_q = compressed.float().log_softmax(-1)
    # A token that the original rules out (-inf) adds nothing; 0 * inf would be NaN.
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1, dtype=torch.float64)


# --- weights --------------------------------------------------------------------------------------


def total_error(modules: Sequence[ModuleFidelity]) -> float | None:
    """||delta_W' - delta_W||_F / ||delta_W||_F over all modules of a task."""
    return error_of(sum(m.error_squared for m in modules), sum(m.norm_squared for m in modules))


def compare_weights(original: Adapter, compressed: Adapter) -> list[ModuleFidelity]:
    """Measure what every module of a task lost, from factors alone, in float64.

    delta_W' - delta_W = [B', -B] [A'; A] is a product of stacked factors, whose norm is that of the
    product of their small R factors (QR): d_out x d_in is never formed.

    Args:
        original: the adapter that was compressed.
        compressed: the task as it was taken out of the checkpoint. A module that it does not adapt
            counts as zero.

    Raises:
        AdapterError: the task adapts a module that the original has not, or has in another shape.
    """
    ours, theirs = compressed.modules, original.modules
    for name in ours:
        _check_same(name, original, compressed)
    copies = compressed.iter_factors(name for name in sorted(theirs) if name in ours)
    return [
        _compare_module(
            name,
            _scaled(factors, theirs[name].scale),
            _scaled(next(copies)[1], ours[name].scale) if name in ours else None,
        )
        for name, factors in original.iter_factors(sorted(theirs))
    ]


def _check_same(name: str, original: Adapter, compressed: Adapter) -> None:
    ours, theirs = compressed.modules[name], original.modules.get(name)
    if theirs is not None and (theirs.d_out, theirs.d_in) == (ours.d_out, ours.d_in):
        return
    there = "absent" if theirs is None else f"{theirs.d_out} x {theirs.d_in}"
    raise AdapterError(
        f"{original.path}: not the original of this task: module {name} is {there} in it and "
        f"{ours.d_out} x {ours.d_in} in the task; name the right one with --adapter TASK=PATH"
    )


def _scaled(factors: Factors, scale: float) -> Factors:
    return factors[0].double(), factors[1].double() * scale


def _compare_module(name: str, original: Factors, copy: Factors | None) -> ModuleFidelity:
    a, b = original
    sigma = torch.linalg.svdvals(small_product(a, b))
    difference = sigma
    if copy is not None:
        difference = small_product(torch.cat([copy[0], a]), torch.cat([copy[1], -b], dim=1))
    return ModuleFidelity(
        name,
        float(difference.square().sum()),
        float(sigma.square().sum()),
        tuple(sigma.tolist()),
    )


def module_layer(name: str) -> int | None:
    """The first number in a module's name, which is its layer; None for ``lm_head`` and the like."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


# --- report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskFidelity:
    """What one task kept, on its held-out data and in its weights.

    Losses are nats per supervised token. What needs the original is None without one.

    Attributes:
        data: the data files; ``data_digest`` is over their contents.
        examples, tokens: how many were scored; ``left_out`` examples had no supervised token.
        kl_kept: 1 - ``kl`` / ``kl_base``.
        agreement: share of supervised positions with the same most likely token as the original.
        kl, kl_base: KL(original || compressed) and KL(original || base) in nats per supervised token.
        greedy: of free-running answers; None if not asked for.
        modules: relative errors by module; from the original's weights, or without an original as the
            checkpoint recorded them.
        error: relative error over all modules, from the same source.
        nbytes, original_nbytes: the task's file, and the adapter's LoRA weights at 16 bits each.
        no_update: its LoRA weights change nothing.
        tokenizer: the folder of its adapter, if that has a tokenizer that reads the data otherwise than
            the base model's, or the checkpoint, if that keeps one and no original was given; the data is
            in its tokens then.
    """

    task_id: str
    data: tuple[str, ...]
    data_digest: str
    examples: int
    tokens: int
    left_out: int
    base_loss: float
    adapter_loss: float | None
    compressed_loss: float
    kl_kept: Fraction
    recovered: Fraction
    agreement: float | None
    kl: float | None
    kl_base: float | None
    greedy: GreedyAgreement | None
    modules: Mapping[str, float | None]
    error: float | None
    original: str | None
    nbytes: int
    original_nbytes: int
    stored_as: Mapping[str, int]
    no_update: bool = False
    tokenizer: str | None = None

    @property
    def predicted_loss(self) -> float | None:
        """What ``error`` alone lets one expect to be lost of the gain; None without an error."""
        kinds = {name.split(" ")[0] for name in self.stored_as}
        return None if self.error is None else predicted_loss(self.error, common(kinds))


@dataclass(frozen=True)
class FidelitySummary:
    """Over the tasks whose fraction is defined; None where there are none."""

    judged: int
    mean: float | None
    median: float | None
    worst: float | None
    worst_task: str | None


@dataclass(frozen=True)
class EvaluationReport:
    """All tasks that were evaluated, and what the figures were measured with.

    Attributes:
        not_evaluated: tasks of the checkpoint that no data was given for.
        similarity: cosines between original updates and the tasks they are of, in order; some,
            where there are many; None without originals.
        setting: versions, machine, command and options, as text by name.
    """

    checkpoint: str
    base_model: str
    nbytes: int
    original_nbytes: int
    basis_nbytes: int
    tasks: tuple[TaskFidelity, ...]
    not_evaluated: tuple[str, ...]
    spectra: tuple[Spectrum, ...]
    similarity: tuple[tuple[str, ...], tuple[tuple[float, ...], ...]] | None
    setting: Mapping[str, str]
    seconds: float = 0.0

    @property
    def summary(self) -> FidelitySummary:
        """Mean, median and worst KL kept."""
        return summarize({task.task_id: task.kl_kept for task in self.tasks})

    @property
    def recovered(self) -> FidelitySummary:
        """Mean, median and worst recovered fraction."""
        return summarize({task.task_id: task.recovered for task in self.tasks})

    def below(self, threshold: float) -> list[TaskFidelity]:
        """Tasks whose KL kept is defined and under ``threshold``, worst first."""
        failing = [
            (task.kl_kept.value, task) for task in self.tasks if task.kl_kept.value is not None
        ]
        return [
            task for value, task in sorted(failing, key=lambda pair: pair[0]) if value < threshold
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data, see ``figures.ReportFigures``."""
        return {
            "checkpoint": self.checkpoint,
            "base_model": self.base_model,
            "bytes": self.nbytes,
            "original_bytes": self.original_nbytes,
            "basis_bytes": self.basis_nbytes,
            "ratio": self.original_nbytes / self.nbytes if self.nbytes else None,
            "kl_kept": asdict(self.summary),
            "recovered": asdict(self.recovered),
            "tasks": [_task_data(task) for task in self.tasks],
            "losses": Losses.measured(
                {task.task_id: task.predicted_loss for task in self.tasks},
                {task.task_id: task.modules for task in self.tasks},
                [task.task_id for task in self.tasks if task.no_update],
            ).to_dict(),
            "not_evaluated": list(self.not_evaluated),
            "spectra": [
                {
                    "kind": spectrum.kind,
                    "modules": spectrum.modules,
                    "kept_rank": spectrum.kept_rank,
                    "quantiles": {
                        f"{share:g}": list(values)
                        for share, values in zip(SPECTRUM_QUANTILES, spectrum.quantiles)
                    },
                }
                for spectrum in self.spectra
            ],
            "similarity": self.similarity
            and {
                "tasks": list(self.similarity[0]),
                "cosines": [list(row) for row in self.similarity[1]],
            },
            "setting": dict(self.setting),
            "seconds": self.seconds,
        }


def summarize(fractions: Mapping[str, Fraction]) -> FidelitySummary:
    """Mean, median and worst of the fractions that are defined."""
    values = {task: found.value for task, found in fractions.items() if found.value is not None}
    if not values:
        return FidelitySummary(0, None, None, None, None)
    worst = min(values, key=lambda task: values[task])
    return FidelitySummary(
        judged=len(values),
        mean=statistics.fmean(values.values()),
        median=statistics.median(values.values()),
        worst=values[worst],
        worst_task=worst,
    )


def _task_data(task: TaskFidelity) -> dict[str, Any]:
    greedy = task.greedy
    return {
        "task": task.task_id,
        "data": list(task.data),
        "data_sha256": task.data_digest,
        "examples": task.examples,
        "left_out": task.left_out,
        "tokens": task.tokens,
        "base_loss": task.base_loss,
        "adapter_loss": task.adapter_loss,
        "compressed_loss": task.compressed_loss,
        **_fraction_data("kl_kept", task.kl_kept),
        **_fraction_data("recovered", task.recovered),
        "agreement": task.agreement,
        "kl": task.kl,
        "kl_base": task.kl_base,
        "greedy": greedy
        and {
            "tokens": greedy.tokens,
            "possible": greedy.possible,
            "exact": greedy.exact,
            "limit": greedy.limit,
        },
        "error": task.error,
        "errors_from": "checkpoint" if task.original is None else "original",
        "module_errors": dict(task.modules),
        "original": task.original,
        "original_bytes": task.original_nbytes,
        "bytes": task.nbytes,
        "ratio": task.original_nbytes / task.nbytes if task.nbytes else None,
        "stored_as": dict(task.stored_as),
        "tokenizer": task.tokenizer,
    }


def _fraction_data(name: str, fraction: Fraction) -> dict[str, Any]:
    return {
        name: fraction.value,
        f"{name}_standard_error": fraction.standard_error,
        f"{name}_interval": fraction.interval and list(fraction.interval),
        f"{name}_undefined_because": fraction.reason,
    }
