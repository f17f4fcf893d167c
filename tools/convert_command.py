"""``convert``: checkpoints of vlora and lorashare become ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.tools.common_options import Timeout, force_option, output_option
from vllm_vlora.tools.terminal import (
    AsJson,
    Verbose,
    open_console,
    print_result,
    progress_bar,
    reported,
)
from vllm_vlora.wording import count_of

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.foreign.convert import ConvertReport


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A checkpoint of vlora or lorashare: a folder or a Hub id."
        ),
    ],
    output: Annotated[Path, output_option("The checkpoint to write.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="A",
            help="For vlora, which keeps none: the lora_alpha of its adapters. Default: alpha = rank.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The base model to record; vlora names none.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, force_option("a checkpoint at DIR")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Turn a checkpoint of vlora or lorashare into one that vLLM serves.

    Nothing is lost: every stored number is kept bit for bit. SRC stays as it
    is. Read are vlora 0.3 and 1.0, packed in NF4 or not, and lorashare 0.1.

    Examples:
        vllm-vlora convert subspace/ -o ckpt --alpha 32 --base-model org/model
        vllm-vlora convert org/share-checkpoint -o ckpt
    """
    with reported(verbose, timeout):
        from vllm_vlora.foreign.convert import convert as run

        with progress_bar() as advance:
            report = run(
                source, output, alpha=alpha, base_model=base_model, force=force, progress=advance
            )
        print_result(
            _as_data(source, report), lambda console, _: _print(console, source, report), as_json
        )


def _as_data(source: str, report: ConvertReport) -> dict[str, Any]:
    return {
        "source": source,
        "kind": report.kind,
        "checkpoint": str(report.path.expanduser().absolute()),
        "tasks": report.task_ids,
        "modules": report.modules,
        "representation": report.representation,
        "format": report.format,
        "source_bytes": report.source_nbytes,
        "bytes": report.nbytes,
        "original_bytes": report.original_nbytes,
        "losses": report.losses.to_dict(),
        "warnings": report.warnings,
    }


def _print(console: Console, source: str, report: ConvertReport) -> None:
    from vllm_vlora.checkpoint.card import format_bytes
    from vllm_vlora.tools import summary as show

    show.print_warnings(open_console(stderr=True), report.warnings)
    show.print_losses(console, report.losses.to_dict())
    show.line(
        console,
        f"{source}: {report.kind}, {count_of(len(report.task_ids), 'task')}, {report.modules} "
        f"modules, {format_bytes(report.source_nbytes)}",
    )
    show.line(
        console,
        f"{report.path}: {report.representation}, {report.format}, {format_bytes(report.nbytes)}",
    )
