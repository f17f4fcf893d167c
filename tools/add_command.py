"""``add`` and ``remove``: change the tasks of a checkpoint without touching those that stay."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.errors import OptionError
from vllm_vlora.tools.common_options import (
    AdapterRefs,
    MaxBytes,
    Names,
    Quantize,
    parse_size,
)
from vllm_vlora.tools.terminal import (
    AsJson,
    CheckpointRef,
    Verbose,
    open_console,
    print_json,
    progress_bar,
    reported,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.adapters.peft_folder import Adapter
    from vllm_vlora.checkpoint.report import CompressReport
    from vllm_vlora.editing.options import AddOptions, AddReport


Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Write a new checkpoint instead of changing CKPT.",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a checkpoint at --output.")]


def add(
    checkpoint: CheckpointRef,
    adapters: AdapterRefs = None,
    name: Names = None,
    task_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The task id of a single adapter.", show_default=False),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Store each new task at least R times smaller than at 16 bits. Default: the "
            "checkpoint's ratio, and down to 3.5 for tasks that would lose far more than any in it.",
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
        Quantize, typer.Option(help="Number format of what is stored for the new tasks.")
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
    originals: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --rebuild: the original adapters, in sub-folders named by task id.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Minimise what the model sees (`calibrate`).", show_default=False
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace tasks that CKPT has already.")
    ] = False,
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Add adapters to a checkpoint.

    Each module of a new task is projected on its shared basis where that
    keeps more than private factors of the same bytes, and stored privately
    otherwise. The tasks that are there keep their files; with --expand they
    decode to the same numbers. CKPT changes at once or not at all.

    [bold]Examples[/bold]

    vllm-vlora add ckpt new-lora/

    vllm-vlora add ckpt --name de=run2/out --replace --expand

    vllm-vlora add ckpt new-lora/ --rebuild --originals adapters/
    """
    with reported(verbose):
        from vllm_vlora.editing.options import AddOptions
        from vllm_vlora.tools.inputs import collect_shown

        _check_rebuild(rebuild, originals, expand)
        options = AddOptions(
            ratio=ratio,
            max_bytes=None if max_bytes is None else parse_size(max_bytes),
            max_error=max_error,
            quantize=quantize.value,
            calibration=None if calibration is None else str(calibration),
        )
        if task_id is not None:
            adapters, name = None, [f"{task_id}={_only(adapters, name)}"]
        messages = open_console(stderr=True)
        # A rebuild may also come without new adapters, after some were removed.
        collected = (
            collect_shown(adapters or [], name or [], messages)
            if adapters or name or not rebuild
            else {}
        )
        target = checkpoint if output is None else str(output)
        if rebuild:
            assert originals is not None
            _rebuild(checkpoint, collected, originals, options, replace, output, force, as_json)
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
        if as_json:
            print_json(_added_json(report, target))
        else:
            _print_added(open_console(), report, target)


def remove(
    checkpoint: CheckpointRef,
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="The tasks to remove.")],
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Remove tasks from a checkpoint.

    Shared bases stay as they are; `info` says when a rebuild would pay.
    CKPT changes at once or not at all.

    [bold]Example[/bold]

    vllm-vlora remove ckpt summarize translate
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.card import format_bytes
        from vllm_vlora.editing.removing import remove_tasks
        from vllm_vlora.tools.summary import line

        freed = remove_tasks(checkpoint, tasks, output=output, force=force)
        removed = list(dict.fromkeys(tasks))
        target = checkpoint if output is None else str(output)
        if as_json:
            print_json({"checkpoint": target, "removed": removed, "freed_bytes": freed})
            return
        count = f"{len(removed)} task{'s' if len(removed) > 1 else ''}"
        line(open_console(), f"Removed {count} ({format_bytes(freed)}) from {target}.")


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
    checkpoint: str,
    collected: dict[str, Adapter],
    originals: Path,
    options: AddOptions,
    replace: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.task_files import open_originals
    from vllm_vlora.editing.adding import check_new
    from vllm_vlora.editing.rebuilding import rebuild

    opened = Checkpoint.open(checkpoint)
    if not replace:
        check_new(opened, list(collected))
    kept = [task_id for task_id in opened.tasks if task_id not in collected]
    adapters = {**open_originals(opened, originals, kept), **collected}
    before = opened.nbytes
    with progress_bar(open_console(stderr=True)) as advance:
        report = rebuild(
            checkpoint, adapters, options, output=output, force=force, progress=advance
        )
    target = checkpoint if output is None else str(output)
    if as_json:
        print_json(_rebuilt_json(report, before, list(collected), target))
    else:
        _print_rebuilt(open_console(), report, before, target)


# --- showing -------------------------------------------------------------------------------------


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
        "warnings": report.warnings,
        "seconds": report.seconds,
        "tasks": [
            {key.replace("nbytes", "bytes"): value for key, value in asdict(task).items()}
            for task in report.tasks
        ],
    }


def _print_added(console: Console, report: AddReport, target: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from vllm_vlora.checkpoint.card import format_bytes, format_ratio
    from vllm_vlora.tools.summary import line

    table = Table(header_style="bold")
    table.add_column("New task", overflow="fold")
    table.add_column("Stored")
    for column in ("Before", "Bytes", "Ratio", "On bases", "Error", "If private"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in report.tasks:
        nbytes = task.nbytes + task.grown_nbytes
        private = "-" if task.private_error is None else f"{task.private_error:.4f}"
        table.add_row(
            Text(task.task_id),
            task.kind,
            format_bytes(task.original_nbytes),
            format_bytes(nbytes),
            format_ratio(task.original_nbytes, nbytes),
            f"{task.carried:.1%}",
            f"{task.error:.4f}",
            private,
        )
    console.print(table)
    for task in report.tasks:
        line(console, f"{task.task_id}: {task.kind}; {task.why}.")
    for warning in report.warnings:
        line(console, f"Warning: {warning}", style="yellow")
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
        "warnings": report.warnings,
        "seconds": report.seconds,
    }


def _print_rebuilt(console: Console, report: CompressReport, before: int, target: str) -> None:
    from vllm_vlora.checkpoint.card import format_bytes
    from vllm_vlora.tools.summary import line

    for warning in report.warnings:
        line(console, f"Warning: {warning}", style="yellow")
    line(
        console,
        f"Rebuilt {target} with {len(report.tasks)} tasks ({report.representation}): "
        f"{format_bytes(before)} before, {format_bytes(report.nbytes)} now ({report.ratio:.2f}x), "
        f"error {report.mean_error:.4f} in the mean and {report.worst_error:.4f} at worst, in "
        f"{report.seconds:.1f} s.",
    )
