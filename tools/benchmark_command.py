"""``benchmark``: how long the operations on a checkpoint take on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.tools.terminal import (
    AsJson,
    CheckpointRef,
    Verbose,
    print_result,
    progress_bar,
    reported,
)
from vllm_vlora.wording import count_of

if TYPE_CHECKING:
    from rich.console import Console


def benchmark(
    checkpoint: CheckpointRef,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK", help="The task to time. Default: the first one.", show_default=False
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option(metavar="N", help="Timed runs of each operation.", min=3)
    ] = 10,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Time loading, switching, reconstructing, projecting and exporting.

    On the CPU, outside vLLM: how fast a served checkpoint switches is
    measured by benchmarks/ of the source repository.

    Examples:
        vllm-vlora benchmark ckpt
        vllm-vlora benchmark ckpt --task summarize --runs 30 --json
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.model.operation_times import time_operations

        opened = Checkpoint.open(checkpoint)
        with progress_bar() as advance:
            data = {"checkpoint": checkpoint, **time_operations(opened, task, runs, advance)}
        print_result(data, _print, as_json)


def _print(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.tools.summary import line, make_table

    table = make_table(["Operation"], ["p50 ms", "p20", "p80"])
    table.add_column("What", overflow="fold")
    for result in data["results"]:
        table.add_row(
            result["operation"],
            *(f"{result[name]:.3f}" for name in ("p50", "p20", "p80")),
            result["what"],
        )
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    line(
        console,
        f"{count_of(data['tasks'], 'task')}, {count_of(data['modules'], 'module')}; task {data['task']}; "
        f"{count_of(data['runs'], 'run')}. {data['device']}, {count_of(data['threads'], 'thread')}; "
        f"{versions}.",
        style="dim",
    )
