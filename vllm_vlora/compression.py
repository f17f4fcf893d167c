"""Compress a collection of adapters into one checkpoint, under a budget, by measured error.

The adapters are streamed: every pass reads them module by module (or task by task) and keeps
numbers only. Fitted bases and encoded cores wait in the unpublished output folder, not in memory.

    collection   the adapters and the union of their modules
    formats      the number formats to try
    survey       error of every (task, module) at every rank and format, stored privately; a shared
                 basis of every module, and the error of every task at every width of it
    plan         ranks, widths and formats that meet the budget, for each representation
    encoding     the best joint plan for real, with its real errors
    here         choose the better plan, and write it task by task with its measured errors
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_vlora.adapters import Adapter
from vllm_vlora.atomic import publish_folder
from vllm_vlora.card import model_card
from vllm_vlora.checkpoint import CheckpointWriter
from vllm_vlora.collection import Collection, Module, Progress, common_base_model
from vllm_vlora.encoding import encode_task, encode_within
from vllm_vlora.errors import BudgetError, OptionError
from vllm_vlora.formats import formats_to_try
from vllm_vlora.manifest import basis_nbytes, is_checkpoint
from vllm_vlora.plan import MIXED, Budget, Plan, joint_problem, make_plans, private_problems
from vllm_vlora.quantize import FLOAT_DTYPES
from vllm_vlora.report import Candidate, CompressReport, TaskReport
from vllm_vlora.scratch import CoreSpool, FittedBases
from vllm_vlora.survey import Survey, survey_joint, survey_private

REPRESENTATION_CHOICES = ("auto", "joint", "private")
QUANTIZE_CHOICES = ("auto", "none", "int8", "nf4")
DEFAULT_RATIO = 3.5
"""The ratio when nothing is asked for: NF4 at full rank, 4.5 bits for 16, fits with its headers."""

# Planned errors equal measured ones up to float64 rounding; the margin keeps a promise exact.
_MARGIN = 1e-6


# --- options ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressOptions:
    """What to compress to. At most one of ``ratio``, ``max_error``, ``num_components``.

    Attributes:
        representation: ``joint``, ``private``, or ``auto``, which plans both, measures both and
            keeps the better: the lower root-mean-square error of the tasks, or under ``max_error``
            the fewer bytes.
        ratio: the originals' LoRA weights at 16 bits each over all bytes of the checkpoint's
            safetensors files (without classifier heads and the like) is to be at least this. One or
            less sets no limit. Default 3.5, unless one of the others is given.
        max_error: ||delta_W' - delta_W||_F / ||delta_W||_F of the worst task is to be at most this,
            in as few bytes as possible.
        num_components: k of every shared basis, cut to what a module can have; implies ``joint``.
            Sets no limit on bytes, so that ``quantize`` auto then means none.
        quantize: number format of private factors and shared bases. ``none`` is the adapters' own
            dtype; ``auto`` chooses by measured error among that, bfloat16, int8 and NF4.
        double_quantize: NF4 may store its scales in 8 bits.
        dtype: ``float32``, ``float16`` or ``bfloat16`` in place of the adapters' own dtype, and for
            the cores of ``joint``.
        seed: of the fit's random start.

    Raises:
        OptionError: unknown, out of range or contradictory values.
    """

    representation: str = "auto"
    ratio: float | None = None
    max_error: float | None = None
    num_components: int | None = None
    quantize: str = "auto"
    double_quantize: bool = True
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("representation", self.representation, REPRESENTATION_CHOICES)
        _check_choice("quantize", self.quantize, QUANTIZE_CHOICES)
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, tuple(FLOAT_DTYPES))
        budgets = {
            "ratio": self.ratio,
            "max_error": self.max_error,
            "num_components": self.num_components,
        }
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} contradict each other; give only one of them")
        if self.ratio is not None and not (math.isfinite(self.ratio) and self.ratio > 0):
            raise OptionError(f"ratio must be a positive number, got {self.ratio}")
        if self.max_error is not None and not (
            math.isfinite(self.max_error) and self.max_error >= 0
        ):
            raise OptionError(f"max_error must be zero or more, got {self.max_error}")
        if self.num_components is not None and self.num_components < 1:
            raise OptionError(f"num_components must be at least 1, got {self.num_components}")
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


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"unknown {name} {value!r}; use one of {', '.join(allowed)}")


def compress(
    adapters: Mapping[str, Adapter],
    output: str | Path,
    options: CompressOptions | None = None,
    *,
    force: bool = False,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress adapters (task id -> opened adapter) into the checkpoint folder ``output``.

    Memory is one module's factors and bases, one task and planning numbers; the adapters are read
    several times. The folder appears complete or not at all.

    Args:
        adapters: in the order in which the checkpoint is to list them.
        force: replace an existing checkpoint.
        base_model: overrides what the adapters' configs name.
        progress: called with (stage, done, total); stages are measure, fit, encode and write.

    Raises:
        AdapterError: no adapters, two that contradict each other, or weights that are not finite.
        BudgetError: no allowed plan meets the budget; says how near one can get.
        OutputError: ``output`` exists and is not to be replaced, or cannot be written.
        TaskIdError: a task id that is not allowed.
    """
    started = time.monotonic()
    options = options or CompressOptions()
    progress = progress or (lambda *_: None)
    collection = Collection(adapters)
    common, warning = common_base_model(adapters)
    base_model = base_model or common
    with publish_folder(output, force=force, owned=is_checkpoint) as folder:
        scratch = folder / ".scratch"
        scratch.mkdir()
        chosen = _choose(collection, options, scratch, progress)
        writer = CheckpointWriter(folder, base_model)
        tasks = _write(writer, chosen, progress)
        shutil.rmtree(scratch)
        bases = basis_nbytes(writer.modules)
        report = CompressReport(
            path=Path(output),
            tasks=tasks,
            representation=chosen.plan.representation,
            format=chosen.plan.format,
            original_nbytes=collection.original_nbytes,
            nbytes=bases + sum(task.nbytes for task in tasks),
            basis_nbytes=bases,
            candidates=chosen.candidates,
            warnings=[] if warning is None else [warning],
        )
        writer.finish(model_card(base_model, report))
    report.seconds = time.monotonic() - started
    return report


# --- choosing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """The plan to write and what it is written from; bases and cores are those of a joint plan."""

    plan: Plan
    candidates: list[Candidate]
    survey: Survey
    bases: FittedBases
    cores: CoreSpool | None


def _choose(
    collection: Collection, options: CompressOptions, scratch: Path, progress: Progress
) -> _Chosen:
    """Measure, plan and pick; raises BudgetError when nothing meets the budget."""
    formats = formats_to_try(collection, _quantize(options), options.dtype, options.double_quantize)
    shareable = _modules_to_share(collection, options)
    budget = _budget(options, collection.original_nbytes)
    only_joint = _representation(options) == "joint"
    plans: list[Plan] = []
    misses: list[float] = []
    best, cores = None, None

    skip = {module.name for module in shareable} if only_joint else set()
    survey = survey_private(collection, formats, skip, progress)
    if not only_joint:
        plans, misses = make_plans(private_problems(survey, formats.labels), budget)
        best = min(plans, key=budget.order, default=None)

    bases = FittedBases(scratch / "fit")
    if shareable and not (best and budget.is_perfect(best)):
        limit = budget.nbytes
        if budget.loss is not None:
            # A joint plan is only wanted if it is smaller than the private one.
            limit = best.nbytes if best else collection.original_nbytes
        survey = survey_joint(
            survey,
            shareable,
            formats,
            bases,
            num_components=options.num_components,
            byte_limit=limit,
            seed=options.seed,
            progress=progress,
        )
        problems = (joint_problem(survey, label) for label in formats.labels)
        joint, joint_misses = make_plans(problems, budget)
        misses += joint_misses
        place = min(range(len(joint)), key=lambda i: budget.order(joint[i]), default=None)
        if place is not None and not (best and budget.clearly_prefers(best, joint[place])):
            plan, cores = encode_within(joint[place], survey, bases, budget, scratch, progress)
            joint[place] = plan
            if cores is None:
                misses.append(joint.pop(place).worst_error)
            elif best is None or budget.order(plan) < budget.order(best):
                best = plan
        plans += joint
    if best is None:
        raise BudgetError(_out_of_reach(options, collection.original_nbytes, min(misses)))
    if best.representation == "private":
        cores = None
    return _Chosen(best, [_candidate(plan) for plan in plans], survey, bases, cores)


def _representation(options: CompressOptions) -> str:
    return options.representation if options.num_components is None else "joint"


def _quantize(options: CompressOptions) -> str:
    if options.quantize == "auto" and options.num_components is not None:
        return "none"
    return options.quantize


def _budget(options: CompressOptions, original_nbytes: int) -> Budget:
    if options.max_error is not None:
        return Budget(loss=(options.max_error * (1 - _MARGIN)) ** 2)
    ratio = _ratio(options)
    if options.num_components is not None or ratio <= 1:
        return Budget()
    return Budget(nbytes=math.floor(original_nbytes / ratio))


def _ratio(options: CompressOptions) -> float:
    return DEFAULT_RATIO if options.ratio is None else options.ratio


def _modules_to_share(collection: Collection, options: CompressOptions) -> list[Module]:
    """Linear modules that two tasks adapt: of one task a basis is a detour over its factors.

    Whoever asks for joint, or for a number of components, gets bases all the same.
    """
    representation = _representation(options)
    if representation == "private":
        return []
    linear = [module for module in collection.modules.values() if module.kind == "linear"]
    shared = [module for module in linear if len(module.tasks) > 1]
    if representation == "auto":
        return shared
    chosen = linear if options.num_components is not None or not shared else shared
    if not chosen:
        raise OptionError("joint needs a linear module, and these adapters have none; use private")
    return chosen


def _candidate(plan: Plan) -> Candidate:
    return Candidate(
        plan.representation, plan.format, plan.nbytes, plan.mean_error, plan.worst_error
    )


def _out_of_reach(options: CompressOptions, original_nbytes: int, nearest: float) -> str:
    """The line that says how near one can get: to the error, or to the bytes."""
    representation, quantize = _representation(options), options.quantize
    if options.max_error is not None:
        advice = "allow a larger error"
        if quantize not in ("auto", "none"):
            advice += ", or quantize none or auto"
        elif representation == "joint":
            advice += ", or use representation auto or private"
        return (
            f"no {representation} plan with quantize {quantize} keeps every task within a relative "
            f"error of {options.max_error}; the least reachable for the worst task is "
            f"{nearest:.3g}; {advice}"
        )
    advice = "ask for a smaller ratio"
    if quantize not in ("auto", "nf4"):
        advice += ", or quantize auto or nf4"
    if representation == "joint":
        advice += ", or use representation auto"
    reached = math.floor(original_nbytes / nearest * 100) / 100
    return (
        f"a ratio of {_ratio(options):g} is out of reach for {representation} plans with quantize "
        f"{quantize}: the smallest, of rank 1, reaches {reached:g} ({nearest} bytes); {advice}"
    )


# --- writing -------------------------------------------------------------------------------------


def _write(writer: CheckpointWriter, chosen: _Chosen, progress: Progress) -> list[TaskReport]:
    """Write bases and tasks; the manifest waits for the report."""
    plan, collection = chosen.plan, chosen.survey.collection
    for module in collection.modules.values():
        basis = None
        if module.name in plan.joint:
            basis = chosen.bases.read(module, plan.joint[module.name][0])
        writer.add_module(module.name, module.d_in, module.d_out, module.kind, basis)
    tasks = []
    for task in range(len(collection.task_ids)):
        tasks.append(_write_task(writer, chosen, task))
        progress("write", len(tasks), len(collection.task_ids))
    return tasks


def _write_task(writer: CheckpointWriter, chosen: _Chosen, task: int) -> TaskReport:
    collection = chosen.survey.collection
    task_id, adapter = collection.task_ids[task], collection.adapters[task]
    encoded = encode_task(chosen.plan, chosen.survey, chosen.cores, task)
    record = writer.add_task(
        task_id,
        encoded.modules,
        original_nbytes=adapter.original_nbytes,
        error=encoded.error,
        adapter_config=adapter.config,
        source=adapter.name,
        extra=adapter.extra_tensors(),
    )
    ranks = [segment.rank for segment in record.segments]
    return TaskReport(
        task_id,
        adapter.name,
        (min(ranks), max(ranks)),
        adapter.original_nbytes,
        record.lora_nbytes,
        record.error,
        _summary(segment.representation for segment in record.segments),
        _summary(segment.format for segment in record.segments),
    )


def _summary(values: Iterable[str]) -> str:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else MIXED
