"""``analyze``: how adapters relate to each other, before anything is compressed or merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.tools.common_options import Plot, adapters_argument, names_option
from vllm_vlora.tools.terminal import (
    AsJson,
    Verbose,
    open_console,
    print_result,
    progress_bar,
    reported,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.merging.spectra import Spectrum

# A matrix wider than this is left to --json and --plot.
_MOST_COLUMNS = 12


def analyze(
    adapters: Annotated[list[str], adapters_argument()],
    threshold: Annotated[
        float,
        typer.Option(
            metavar="C", help="Cosine from which two adapters are one cluster.", min=-1, max=1
        ),
    ] = 0.9,
    name: Annotated[list[str] | None, names_option("Call the adapter at PATH ID.")] = None,
    plot: Plot = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare adapters: similarity, clusters, outliers, effective ranks.

    Everything is measured on the updates s B A, so neither the way they are
    factored nor alpha hides a resemblance. Adapters are read module by module.

    Examples:
        vllm-vlora analyze adapters/
        vllm-vlora analyze lora-a lora-b lora-c --threshold 0.8 --json
        vllm-vlora analyze adapters/ --plot similarity.html
    """
    with reported(verbose):
        from vllm_vlora.merging.comparing import analyze_adapters
        from vllm_vlora.tools.inputs import collect_shown
        from vllm_vlora.tools.task_plots import check_plot_path

        if plot is not None:
            check_plot_path(plot)
        inputs = collect_shown(adapters, name or [], open_console(stderr=True))
        with progress_bar() as advance:
            data, spectra = analyze_adapters(inputs.adapters, threshold, advance)
        data["left_out"] = inputs.left_out
        if plot is not None:
            _plot(plot, data, spectra)
            data["plot"] = str(plot)
        print_result(data, _print, as_json)


def _print(console: Console, data: dict[str, Any]) -> None:
    from rich.text import Text

    from vllm_vlora.tools.summary import line, make_table

    names = [adapter["adapter"] for adapter in data["adapters"]]
    table = make_table(["Adapter"], ["Modules", "Rank", "Effective", "Norm", "Nearest"])
    for adapter in data["adapters"]:
        table.add_row(
            Text(adapter["adapter"]),
            str(adapter["modules"]),
            str(adapter["max_rank"]),
            f"{adapter['effective_rank']:.1f}",
            f"{adapter['norm']:.3g}",
            Text(_nearest(data["similarity_matrix"][adapter["adapter"]], adapter["adapter"])),
        )
    console.print(table)
    if len(names) <= _MOST_COLUMNS:
        _print_matrix(console, names, data["similarity_matrix"])
    else:
        line(console, f"{len(names)} x {len(names)} cosines: see --json or --plot.", style="dim")
    for number, cluster in enumerate(data["clusters"], 1):
        line(console, f"Cluster {number}: {', '.join(cluster)}")
    redundant, limit = data["redundant_count"], data["threshold"]
    count = redundant or "none"
    line(console, f"Adapters that could be redundant (cosine {limit:g} or more): {count}")
    for found in data["outliers"] or ():
        line(
            console,
            f"Outlier: {found['adapter']}, {found['z_score']:.1f} standard deviations away",
            style="yellow",
        )
    if "plot" in data:
        line(console, f"Wrote {data['plot']}")


def _nearest(row: dict[str, float], own: str) -> str:
    name = max((other for other in row if other != own), key=row.__getitem__)
    return f"{row[name]:.3f} {name}"


def _print_matrix(
    console: Console, names: Sequence[str], matrix: dict[str, dict[str, float]]
) -> None:
    from rich.text import Text

    from vllm_vlora.tools.summary import make_table

    table = make_table([""], [], title="Cosines")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for name in names:
        table.add_row(Text(name), *(f"{matrix[name][other]:.3f}" for other in names))
    console.print(table)


def _plot(path: Path, data: dict[str, Any], spectra: Sequence[Spectrum]) -> None:
    from vllm_vlora.tools import plots
    from vllm_vlora.tools.task_plots import save_plot

    matrix = data["similarity_matrix"]
    names = list(matrix)
    panels = []
    for found in spectra:
        low, middle, high = found.quantiles
        panels.append(plots.Band(found.kind, low, middle, high, found.kept_rank))
    save_plot(
        path,
        f"{len(names)} adapters",
        [
            plots.Similarities(
                "Similarity",
                "Cosine between the updates, all modules together.",
                names,
                [list(row.values()) for row in matrix.values()],
            ),
            plots.Bars(
                "Effective rank",
                "exp of the entropy of the squared singular values, mean over modules.",
                names,
                [adapter["effective_rank"] for adapter in data["adapters"]],
            ),
            plots.Spectra(
                "Spectra",
                "Singular values of the updates, each module's scaled to norm 1: median over "
                "adapters and layers, and the range from the 10th to the 90th percentile. The "
                "upright line stands after the median effective rank.",
                panels,
            ),
        ],
    )
