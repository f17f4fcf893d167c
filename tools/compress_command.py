"""``compress``: adapters of one base model into one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.tools.common_options import (
    AdapterRefs,
    AllowLargeError,
    Codes,
    MaxBytes,
    Names,
    Quantize,
    SkipUnreadable,
    Timeout,
    Tokenizers,
    base_option,
    force_option,
    output_option,
    parse_size,
    quantize_option,
)
from vllm_vlora.tools.flags import takes
from vllm_vlora.tools.terminal import (
    AsJson,
    Verbose,
    open_console,
    print_result,
    progress_bar,
    reported,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from vllm_vlora.adapters.collection import Progress
    from vllm_vlora.adapters.peft_folder import Adapter
    from vllm_vlora.checkpoint.report import Candidate, CompressReport
    from vllm_vlora.compression.options import CompressOptions
    from vllm_vlora.compression.quality import Jury
    from vllm_vlora.evaluation.judge import SelfJudge

# Tasks that are told of one by one; of a thousand the table took longer than writing them.
_SHOWN_TASKS = 50
_ANY_RATIO = 2.0


class Representation(str, Enum):
    """How tasks are stored."""

    auto = "auto"
    joint = "joint"
    factored = "factored"
    flat = "flat"
    private = "private"


class Dtype(str, Enum):
    """Floating-point format of what is not quantised."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Device(str, Enum):
    """What measures, fits and encodes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExecutorKind(str, Enum):
    """Where modules are worked on."""

    auto = "auto"
    serial = "serial"
    processes = "processes"
    ray = "ray"


@dataclass(frozen=True)
class CompressFlags:
    """What ``compress`` is called with."""

    adapters: AdapterRefs = None
    output: Annotated[Path | None, output_option(metavar="CKPT")] = None
    name: Names = None
    skip_unreadable: SkipUnreadable = False
    ratio: Annotated[
        float | None,
        typer.Option(metavar="R", help="Be at least R times smaller than the adapters at 16 bits."),
    ] = None
    max_bytes: MaxBytes = None
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="E", help="Be as small as a relative error of E in the worst task allows."
        ),
    ] = None
    min_kept: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Be as small as keeping X of every adapter allows, by KL (see `evaluate`); runs the "
            "model, and needs --data.",
        ),
    ] = None
    num_components: Annotated[
        int | None,
        typer.Option(
            "--num-components",
            "-k",
            metavar="K",
            help="Make every shared basis K wide, or as wide as its module has directions "
            "(implies joint).",
        ),
    ] = None
    gate: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="With a ratio or a size: no task may have a relative error above E. Those above "
            "get more of the bytes, and are named.",
        ),
    ] = None
    representation: Annotated[
        Representation,
        typer.Option(help="Share a basis, do not, or let measured error choose."),
    ] = Representation.auto
    clusters: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Groups of tasks that get a basis of their own; auto tries some where tasks "
            "resemble each other.",
        ),
    ] = "auto"
    quantize: Annotated[Quantize, quantize_option("factors, bases and cores")] = Quantize.auto
    codes: Annotated[
        Codes,
        typer.Option(
            help="What private factors of 4 bits and less are in: trellis codes keep more in as many "
            "bytes, and take a microsecond a number to find."
        ),
    ] = Codes.nf4
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            metavar="FLOAT",
            help="float32, float16 or bfloat16, where nothing is quantised. "
            "Default: the adapters' own.",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Minimise the error that the model sees: a folder of `vllm-vlora calibrate`, or text "
            "(.jsonl, .txt) to gather one from, which is kept beside it.",
        ),
    ] = None
    tokenizers: Tokenizers = True
    executor: Annotated[
        ExecutorKind,
        typer.Option(help="Where modules are worked on; ray takes RAY_ADDRESS's cluster."),
    ] = ExecutorKind.auto
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Processes or Ray tasks at once; 0: one a core.")
    ] = 0
    device: Annotated[
        Device,
        typer.Option(help="What measures, fits and encodes; auto: a GPU where there is one."),
    ] = Device.auto
    base: Annotated[
        str | None, base_option("adapters name", ", for judging and for calibration text")
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FILE",
            help="Held-out text, as for `evaluate`: the model then judges which representation "
            "keeps most. --min-kept needs it.",
            show_default=False,
        ),
    ] = None
    judge: Annotated[
        bool | None,
        typer.Option(
            "--judge/--no-judge",
            help="Let the base model say which representation keeps most, on text that it writes with "
            "each adapter: no data is needed. By default where the model is on this machine and that "
            "takes less time than measuring the adapters; --judge: whatever it takes.",
            show_default=False,
        ),
    ] = None
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Predict the error at every size, and write no checkpoint."),
    ] = False
    allow_large_error: AllowLargeError = False
    force: Annotated[bool, force_option("an existing checkpoint")] = False
    timeout: Timeout = None
    as_json: AsJson = False
    verbose: Verbose = False


@takes(CompressFlags)
def compress(flags: CompressFlags) -> None:
    """Compress adapters of one base model into one checkpoint.

    Give at most one budget: --ratio, --max-bytes, --max-error,
    --min-kept or --num-components. Without one it is as small as a
    predicted loss of 1 % of every adapter's gain allows, and exact with
    --quantize none.
    Adapters may differ in rank, alpha and target modules. The checkpoint
    appears only when it is whole: an interrupted run leaves an old one as it
    was.

    Examples:
        vllm-vlora compress adapters/ --plan
        vllm-vlora compress adapters/ -o ckpt --ratio 6
        vllm-vlora compress sql/ org/chat-lora -o ckpt --max-error 0.1
        vllm-vlora compress adapters/ -o ckpt --ratio 8 --calibration calibration/
        vllm-vlora compress adapters/ -o ckpt --ratio 16 --data heldout/
        vllm-vlora compress adapters/ -o ckpt --min-kept 0.97 --data heldout/
        vllm-vlora compress --name de=run1/out --name fr=run2/out -o ckpt
    """
    if flags.output is None and not flags.plan:
        raise typer.BadParameter("give -o CKPT, or --plan to write nothing", param_hint="--output")
    with reported(flags.verbose, flags.timeout):
        from vllm_vlora.tools import summary as show
        from vllm_vlora.tools.inputs import collect_shown

        _check_unused(flags)
        options = _options(flags)
        messages = open_console(stderr=True)
        inputs = collect_shown(
            flags.adapters or [], flags.name or [], messages, flags.skip_unreadable
        )
        collected = inputs.adapters
        if flags.calibration is not None:
            options = _calibrated(options, flags.calibration, flags.base, collected, messages)
        if flags.plan:
            points = _predict(collected, options, messages)
            points["left_out"] = inputs.left_out
            print_result(points, show.print_curve, flags.as_json)
            return
        assert flags.output is not None
        report = _compress(collected, flags.output, options, flags, messages)
        show.print_warnings(messages, report.warnings)
        if not flags.tokenizers:
            show.print_left_behind(messages, show.having_companions(collected))
        print_result(
            _as_data(report, flags.output) | {"left_out": inputs.left_out},
            lambda console, data: _print(console, data, report, by_size=options.by_size),
            flags.as_json,
        )


def _options(flags: CompressFlags) -> CompressOptions:
    """What is asked for; the calibration is added when it is there."""
    from vllm_vlora.compression.options import CompressOptions

    return CompressOptions(
        representation=flags.representation.value,
        # Every size is planned in the place of one; without any, some options have no meaning.
        ratio=_ANY_RATIO if flags.plan else flags.ratio,
        max_bytes=None if flags.max_bytes is None else parse_size(flags.max_bytes),
        max_error=flags.max_error,
        num_components=flags.num_components,
        gate=flags.gate,
        clusters=_parse_clusters(flags.clusters),
        quantize=flags.quantize.value,
        codes=flags.codes.value,
        dtype=flags.dtype.value if flags.dtype else None,
        executor=flags.executor.value,
        jobs=flags.jobs,
        device=flags.device.value,
        allow_large_error=flags.allow_large_error,
        tokenizers=flags.tokenizers,
    )


def _parse_clusters(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _check_unused(flags: CompressFlags) -> None:
    from vllm_vlora.errors import OptionError

    if flags.plan and (flags.data or flags.min_kept is not None):
        raise OptionError("--plan asks no model: leave out --data and --min-kept, or it")
    if flags.plan and (unused := _unplanned(flags)):
        raise OptionError(
            f"--plan predicts every size and writes no checkpoint: leave out {', '.join(unused)}, or it"
        )
    gathers = flags.calibration is not None and not flags.calibration.is_dir()
    if flags.judge and (flags.data or flags.min_kept is not None):
        raise OptionError("--judge is for where there is no held-out text; leave out --data, or it")
    if flags.judge and not _may_judge(flags):
        raise OptionError(
            "--judge chooses between representations at a size; leave out --representation, "
            "--num-components, --max-error and --plan, or it"
        )
    if flags.data and flags.max_error is not None and flags.min_kept is None:
        raise OptionError(
            "under --max-error the smallest is chosen, and no model is asked: leave out --data, or "
            "--max-error"
        )
    if flags.base is not None and not (flags.data or gathers or _may_judge(flags)):
        raise OptionError("--base is for judging and for calibration text; leave it out")


def _unplanned(flags: CompressFlags) -> list[str]:
    """What is given of the options that a plan of every size has no use for."""
    given = {
        "--ratio": flags.ratio is not None,
        "--max-bytes": flags.max_bytes is not None,
        "--max-error": flags.max_error is not None,
        "--num-components": flags.num_components is not None,
        "--output": flags.output is not None,
        "--force": flags.force,
        "--no-tokenizers": not flags.tokenizers,
    }
    return [name for name, is_given in given.items() if is_given]


def _may_judge(flags: CompressFlags) -> bool:
    """Whether there is a choice that the model could make by itself."""
    free = flags.representation is Representation.auto and flags.num_components is None
    return free and flags.max_error is None and not flags.plan and flags.judge is not False


def _self_judge(
    flags: CompressFlags, collected: Mapping[str, Adapter], progress: Progress
) -> SelfJudge | None:
    """The base model as a judge, where it may be one and is at hand."""
    if not _may_judge(flags):
        return None
    from vllm_vlora.adapters.collection import common_base_model
    from vllm_vlora.errors import OptionError
    from vllm_vlora.evaluation.judge import SelfJudge
    from vllm_vlora.snapshots import local_model

    name = flags.base or common_base_model(collected)[0]
    model = None if name is None else local_model(name)
    if model is not None:
        return SelfJudge(collected, model, flags.judge is True, progress)
    if flags.judge or flags.base is not None:
        raise OptionError(
            f"the base model {name or ''} is not on this machine; give its folder with --base".replace(
                "  ", " "
            )
        )
    return None


def _calibrated(
    options: CompressOptions,
    given: Path,
    base: str | None,
    collected: Mapping[str, Adapter],
    messages: Console,
) -> CompressOptions:
    """The options with the calibration folder that is given, or gathered from the text given."""
    from dataclasses import replace

    from vllm_vlora.evaluation.calibrate import calibration_folder

    with progress_bar(messages) as advance:
        return replace(
            options, calibration=str(calibration_folder(given, base, collected, advance))
        )


def _compress(
    collected: Mapping[str, Adapter],
    output: Path,
    options: CompressOptions,
    flags: CompressFlags,
    messages: Console,
) -> CompressReport:
    """By errors alone, or judged by the model where it is at hand or there is data."""
    from vllm_vlora.compression.pipeline import compress as run
    from vllm_vlora.compression.quality import OneByOne, compress_judged, compress_to_quality

    force, least = flags.force, flags.min_kept
    with progress_bar(messages) as advance:
        jury: Jury | None
        if least is None and not flags.data:
            jury = _self_judge(flags, collected, advance)
            if jury is None:
                return run(collected, output, options, force=force, progress=advance)
            return compress_judged(collected, output, jury, options, force=force, progress=advance)
        from vllm_vlora.evaluation.judge import make_judge

        judge = make_judge(collected, flags.base, flags.data or [], advance)
        if least is None:
            jury = OneByOne(judge)
            return compress_judged(collected, output, jury, options, force=force, progress=advance)
        return compress_to_quality(
            collected, output, least, judge, options, force=force, progress=advance
        )


def _predict(
    collected: Mapping[str, Adapter], options: CompressOptions, messages: Console
) -> dict[str, Any]:
    from vllm_vlora.compression.pipeline import CURVE_RATIOS, predict

    with progress_bar(messages) as advance:
        points = predict(collected, options, ratios=CURVE_RATIOS, progress=advance)
    original = sum(adapter.original_nbytes for adapter in collected.values())
    rows = [{"ratio": p.ratio, **_candidate(p.candidate)} for p in points]
    reached = {p.ratio for p in points}
    return {
        "original_bytes": original,
        "points": rows,
        "missing": [ratio for ratio in CURVE_RATIOS if ratio not in reached],
        "gate": options.gate,
    }


def _as_data(report: CompressReport, output: Path) -> dict[str, Any]:
    """What ``--json`` prints."""
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.tools import summary as show

    data = show.summarize(Checkpoint.open(output), str(output))
    data["losses"] = report.losses.to_dict()
    data["candidates"] = [_candidate(candidate) for candidate in report.candidates]
    data["seconds"] = report.seconds
    data["warnings"] = report.warnings
    data["raised"], data["kept"] = report.raised, report.kept
    data["chosen_by"] = report.chosen_by
    if report.calibrated:
        data["seen_errors"] = {task.task_id: task.seen_error for task in report.tasks}
    if report.kl_kept:
        data["kl_kept"] = report.kl_kept
    return data


def _print(
    console: Console, data: dict[str, Any], report: CompressReport, *, by_size: bool
) -> None:
    from vllm_vlora.tools import summary as show

    show.print_tasks(console, data, _SHOWN_TASKS)
    show.print_candidates(console, data, (report.representation, report.format), by_error=by_size)
    show.print_quality(console, data)
    show.print_losses(console, data["losses"])
    show.print_attachments(console, data)
    show.line(console, f"Wrote {data['checkpoint']} in {report.seconds:.1f} s.")
    show.print_serving(console, data)


def _candidate(candidate: Candidate) -> dict[str, Any]:
    """What was measured, as JSON data."""
    return {
        "representation": candidate.representation,
        "format": candidate.format,
        "bytes": candidate.nbytes,
        "mean_error": candidate.mean_error,
        "worst_error": candidate.worst_error,
        **({} if candidate.kl_kept is None else {"kl_kept": candidate.kl_kept}),
    }
