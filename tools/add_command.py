"""``add`` and ``remove``: change the tasks of a checkpoint without touching those that stay."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.errors import OptionError
from vllm_vlora.tools.common_options import (
    AdapterRefs,
    AllowLargeError,
    MaxBytes,
    Names,
    Originals,
    Quantize,
    SkipUnreadable,
    Timeout,
    Tokenizers,
    force_option,
    output_option,
    parse_size,
    quantize_option,
)
from vllm_vlora.tools.terminal import (
    AsJson,
    CheckpointRef,
    Verbose,
    open_console,
    print_result,
    progress_bar,
    reported,
)
from vllm_vlora.wording import count_of

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.adapters.peft_folder import Adapter
    from vllm_vlora.checkpoint.report import CompressReport
    from vllm_vlora.editing.options import AddOptions, AddReport


Output = Annotated[Path | None, output_option("Write a new checkpoint instead of changing CKPT.")]
Force = Annotated[bool, force_option("a checkpoint at --output")]


@dataclass(frozen=True)
class _Target:
    """The checkpoint that is changed, or the folder that the changed one goes to."""

    checkpoint: str
    output: Path | None
    force: bool

    @property
    def name(self) -> str:
        return self.checkpoint if self.output is None else str(self.output)


def add(
    checkpoint: CheckpointRef,
    adapters: AdapterRefs = None,
    name: Names = None,
    skip_unreadable: SkipUnreadable = False,
    task_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The task id of a single adapter.", show_default=False),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Store each new task at least R times smaller than at 16 bits. Default: the "
            "checkpoint's ratio, and more bytes for tasks that would lose far more than any in it.",
            show_default=False,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="E", help="Take as few bytes as a relative error of E allows each new task."
        ),
    ] = None,
    max_bytes: MaxBytes = None,
    quantize: Annotated[
        Quantize, quantize_option("what is stored for the new tasks")
    ] = Quantize.auto,
    expand: Annotated[
        bool,
        typer.Option(
            "--expand",
            "--incremental",
            help="Let shared bases grow for the new tasks where that keeps more.",
        ),
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Fit everything anew; needs --originals."),
    ] = False,
    originals: Originals = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Minimise what the model sees (`calibrate`).", show_default=False
        ),
    ] = None,
    tokenizers: Tokenizers = True,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace tasks that CKPT has already.")
    ] = False,
    allow_large_error: AllowLargeError = False,
    output: Output = None,
    force: Force = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Add adapters to a checkpoint.

    Each module of a new task is projected on its shared basis where that
    keeps more than private factors of the same bytes, and stored privately
    otherwise. The tasks that are there keep their files; with --expand they
    decode to the same numbers. CKPT changes at once or not at all.

    Examples:
        vllm-vlora add ckpt new-lora/
        vllm-vlora add ckpt --name de=run2/out --replace --expand
        vllm-vlora add ckpt new-lora/ --rebuild --originals adapters/
    """
    with reported(verbose, timeout):
        from vllm_vlora.atomic import exclusive
        from vllm_vlora.checkpoint.successor import edit_target
        from vllm_vlora.editing.options import AddOptions
        from vllm_vlora.tools.inputs import Inputs, collect_shown
        from vllm_vlora.tools.summary import having_companions, print_left_behind

        _check_rebuild(rebuild, originals, expand)
        options = AddOptions(
            ratio=ratio,
            max_bytes=None if max_bytes is None else parse_size(max_bytes),
            max_error=max_error,
            quantize=quantize.value,
            calibration=None if calibration is None else str(calibration),
            allow_large_error=allow_large_error,
            tokenizers=tokenizers,
        )
        named: list[str | tuple[str, str]] = [*(name or [])]
        if task_id is not None:
            adapters, named = None, [(task_id, _only(adapters, name))]
        messages = open_console(stderr=True)
        # A rebuild may also come without new adapters, after some were removed.
        inputs = (
            collect_shown(adapters or [], named, messages, skip_unreadable)
            if adapters or named or not rebuild
            else Inputs({}, {}, {})
        )
        collected = inputs.adapters
        if not tokenizers:
            print_left_behind(messages, having_companions(collected))
        target = _Target(checkpoint, output, force)
        if rebuild:
            assert originals is not None
            # Whatever others do to the checkpoint comes before it is looked at, or after all is done.
            with exclusive(edit_target(target.checkpoint, target.output)):
                rebuilt, before = _rebuild(target, collected, originals, options, replace)
            data = _rebuilt_json(rebuilt, before, list(collected), target.name)
            print_result(
                data | {"left_out": inputs.left_out} | _not_served(target) | _router(target),
                lambda console, data: _print_rebuilt(console, rebuilt, before, data),
                as_json,
            )
            return
        from vllm_vlora.editing.adding import add_adapters

        with progress_bar(messages) as advance:
            report = add_adapters(
                checkpoint,
                collected,
                options,
                expand=expand,
                replace_tasks=replace,
                output=output,
                force=force,
                progress=advance,
            )
        print_result(
            _added_json(report, target.name)
            | {"left_out": inputs.left_out}
            | _not_served(target)
            | _router(target),
            lambda console, data: _print_added(console, report, data),
            as_json,
        )


def remove(
    checkpoint: CheckpointRef,
    tasks: Annotated[list[str], typer.Argument(metavar="TASK", help="The tasks to remove.")],
    output: Output = None,
    force: Force = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Remove tasks from a checkpoint.

    Shared bases stay as they are; `info` says when a rebuild would pay.
    CKPT changes at once or not at all.

    Example:
        vllm-vlora remove ckpt summarize translate
    """
    with reported(verbose, timeout):
        from vllm_vlora.editing.removing import remove_tasks

        freed = remove_tasks(checkpoint, tasks, output=output, force=force)
        data = {
            "checkpoint": _Target(checkpoint, output, force).name,
            "removed": list(dict.fromkeys(tasks)),
            "freed_bytes": freed,
        }
        print_result(data | _router(_Target(checkpoint, output, force)), _print_removed, as_json)


def _only(adapters: list[str] | None, name: list[str] | None) -> str:
    if name or len(adapters or []) != 1:
        raise OptionError(
            "--task-id names a single adapter; give --name ID=PATH for each of several"
        )
    assert adapters
    return adapters[0]


def _check_rebuild(rebuild: bool, originals: Path | None, expand: bool) -> None:
    if rebuild and originals is None:
        raise OptionError("--rebuild fits from the original adapters; name their --originals DIR")
    if originals is not None and not rebuild:
        raise OptionError("--originals is for --rebuild; give both or none")
    if rebuild and expand:
        raise OptionError("--rebuild fits all bases anew, so --expand has no effect; give one")


def _rebuild(
    target: _Target,
    collected: dict[str, Adapter],
    originals: Path,
    options: AddOptions,
    replace: bool,
) -> tuple[CompressReport, int]:
    """The report, and the bytes that the checkpoint had before."""
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.task_files import open_originals
    from vllm_vlora.editing.adding import check_new
    from vllm_vlora.editing.rebuilding import rebuild

    opened = Checkpoint.open(target.checkpoint)
    if not replace:
        check_new(opened, list(collected))
    kept = [task_id for task_id in opened.tasks if task_id not in collected]
    adapters = {**open_originals(opened, originals, kept), **collected}
    before = opened.nbytes
    with progress_bar() as advance:
        report = rebuild(
            target.checkpoint,
            adapters,
            options,
            output=target.output,
            force=target.force,
            progress=advance,
        )
    return report, before


def _not_served(target: _Target) -> dict[str, dict[str, str]]:
    """Every task of the checkpoint with which vLLM would not start, and why."""
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.plugin.memory import serving_obstacles

    return {"not_served": serving_obstacles(Checkpoint.open(target.name))}


def _router(target: _Target) -> dict[str, Any]:
    """The checkpoint's router, which may not know what was added, or know what was removed."""
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.tools.summary import describe_router

    return {"router": describe_router(Checkpoint.open(target.name))}


# --- showing -------------------------------------------------------------------------------------


def _print_removed(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.checkpoint.card import format_bytes
    from vllm_vlora.tools.summary import line, print_router_fit

    count, freed = count_of(len(data["removed"]), "task"), format_bytes(data["freed_bytes"])
    line(console, f"Removed {count} ({freed}) from {data['checkpoint']}.")
    print_router_fit(console, data["router"])


def _added_json(report: AddReport, target: str) -> dict[str, Any]:
    """What ``--json`` prints; sizes in bytes, errors relative (Frobenius)."""
    return {
        "checkpoint": target,
        "budget": report.budget,
        "bytes_before": report.nbytes_before,
        "bytes": report.nbytes,
        "original_bytes": report.original_nbytes,
        "ratio": report.ratio,
        "grown_modules": report.grown,
        "grown_bytes": report.grown_nbytes,
        "losses": report.losses.to_dict(),
        "warnings": report.warnings,
        "seconds": report.seconds,
        "tasks": [
            {key.replace("nbytes", "bytes"): value for key, value in asdict(task).items()}
            for task in report.tasks
        ],
    }


def _print_added(console: Console, report: AddReport, data: dict[str, Any]) -> None:
    from rich.text import Text

    from vllm_vlora.checkpoint.card import format_bytes, format_ratio
    from vllm_vlora.tools import summary as show
    from vllm_vlora.tools.summary import error_cell, line

    target = data["checkpoint"]
    # What it would be privately is measured as it was planned: with a calibration, as the model sees it.
    seen = ["Seen"] if report.calibrated else []
    numbers = ["Before", "Bytes", "Ratio", "On bases", "Error", *seen, "If private"]
    table = show.make_table(["New task", "Stored"], numbers)
    for task in report.tasks:
        nbytes = task.nbytes + task.grown_nbytes
        private = "-" if task.private_error is None else f"{task.private_error:.4f}"
        no_update = task.task_id in report.losses.no_update
        judged = error_cell(
            task.seen_error, report.losses.above.get(task.task_id, 0.0), no_update=no_update
        )
        error = error_cell(task.error, 0.0, no_update=no_update)
        table.add_row(
            Text(task.task_id),
            task.kind,
            format_bytes(task.original_nbytes),
            format_bytes(nbytes),
            format_ratio(task.original_nbytes, nbytes),
            f"{task.carried:.1%}",
            *([error, judged] if report.calibrated else [judged]),
            private,
        )
    console.print(table)
    show.print_seen(console, report.calibrated)
    for task in report.tasks:
        line(console, f"{task.task_id}: {task.kind}; {task.why}.")
    show.print_losses(console, report.losses.to_dict())
    show.print_warnings(console, report.warnings)
    if report.grown:
        line(
            console,
            f"{report.grown} bases have grown by {format_bytes(report.grown_nbytes)}; old tasks "
            "decode to the same numbers.",
        )
    line(
        console,
        f"Allowed: {report.budget}. {target}: {format_bytes(report.nbytes_before)} before, "
        f"{format_bytes(report.nbytes)} now ({report.ratio:.2f}x), in {report.seconds:.1f} s.",
    )
    show.print_not_served(console, data["not_served"], target)
    show.print_router_fit(console, data["router"])


def _rebuilt_json(
    report: CompressReport, before: int, added: list[str], target: str
) -> dict[str, Any]:
    return {
        "checkpoint": target,
        "rebuilt": True,
        "added": added,
        "bytes_before": before,
        "bytes": report.nbytes,
        "original_bytes": report.original_nbytes,
        "ratio": report.ratio,
        "mean_error": report.mean_error,
        "worst_error": report.worst_error,
        "losses": report.losses.to_dict(),
        "warnings": report.warnings,
        "seconds": report.seconds,
    }


def _print_rebuilt(
    console: Console, report: CompressReport, before: int, data: dict[str, Any]
) -> None:
    from vllm_vlora.checkpoint.card import format_bytes
    from vllm_vlora.tools.summary import (
        line,
        print_losses,
        print_not_served,
        print_router_fit,
        print_seen,
        print_warnings,
    )

    target = data["checkpoint"]
    print_warnings(console, report.warnings)
    print_seen(console, report.calibrated)
    print_losses(console, report.losses.to_dict())
    line(
        console,
        f"Rebuilt {target} with {count_of(len(report.tasks), 'task')} ({report.representation}): "
        f"{format_bytes(before)} before, {format_bytes(report.nbytes)} now ({report.ratio:.2f}x), "
        f"error {report.mean_error:.4f} in the mean and {report.worst_error:.4f} at worst, in "
        f"{report.seconds:.1f} s.",
    )
    print_not_served(console, data["not_served"], target)
    print_router_fit(console, data["router"])
