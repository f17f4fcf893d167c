"""``diff``: two tasks of a checkpoint, or two adapters, layer by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.errors import OptionError
from vllm_vlora.tools.common_options import Plot
from vllm_vlora.tools.terminal import AsJson, Verbose, print_result, reported
from vllm_vlora.wording import count_of, without_secrets

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.subspace.weights import Update


def diff(
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT TASK TASK | ADAPTER ADAPTER",
            help="A checkpoint and two of its tasks, or two adapters (PEFT folders or Hub ids).",
        ),
    ],
    plot: Plot = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare two tasks or adapters, layer by layer.

    Distances are ||W_a - W_b|| (Frobenius) of the updates s B A, so two
    factorings of one update are at distance 0.

    Examples:
        vllm-vlora diff ckpt summarize translate
        vllm-vlora diff runs/lora-old runs/lora-new --plot changes.html
    """
    with reported(verbose):
        from vllm_vlora.merging.comparing import compare_pair
        from vllm_vlora.tools.task_plots import check_plot_path

        if plot is not None:
            check_plot_path(plot)
        names, pair = _open(refs)
        data: dict[str, Any] = {"a": names[0], "b": names[1], **compare_pair(pair)}
        if plot is not None:
            _plot(plot, data)
            data["plot"] = str(plot)
        print_result(data, _print, as_json)


def _open(refs: list[str]) -> tuple[tuple[str, str], tuple[Update, Update]]:
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.merging.blending import read_tasks

    if len(refs) == 2:
        # Two folders may have one last name; errors name what was given, as the table does.
        first, second = (replace(open_adapter(ref), name=without_secrets(ref)) for ref in refs)
        return (refs[0], refs[1]), (first, second)
    if len(refs) == 3:
        task_a, task_b = read_tasks(Checkpoint.open(refs[0]), refs[1:])
        return (refs[1], refs[2]), (task_a, task_b)
    raise OptionError(
        f"{count_of(len(refs), 'name')} given; give a checkpoint and two of its tasks, or two adapters"
    )


def _print(console: Console, data: dict[str, Any]) -> None:
    from rich.text import Text

    from vllm_vlora.tools.summary import line, make_table

    table = make_table(["Layer"], ["L2 distance", "Cosine"])
    for name, found in data["layers"].items():
        table.add_row(Text(name), f"{found['l2_distance']:.4g}", f"{found['cosine_sim']:.4f}")
    table.add_section()
    table.add_row("all", f"{data['l2_distance']:.4g}", f"{data['cosine_sim']:.4f}", style="bold")
    console.print(table)
    line(console, f"Norms: {data['a']} {data['norm_a']:.4g}, {data['b']} {data['norm_b']:.4g}")
    if "plot" in data:
        line(console, f"Wrote {data['plot']}")


def _plot(path: Path, data: dict[str, Any]) -> None:
    from vllm_vlora.tools.plots import Bars
    from vllm_vlora.tools.task_plots import save_plot

    names = list(data["layers"])
    distances, cosines = (
        [found[key] for found in data["layers"].values()] for key in ("l2_distance", "cosine_sim")
    )
    save_plot(
        path,
        f"{data['a']} and {data['b']}",
        [
            Bars("L2 distance", "||W_a - W_b|| (Frobenius) of the updates.", names, distances),
            Bars("Cosine", "Of the updates; below zero they oppose each other.", names, cosines),
        ],
    )
