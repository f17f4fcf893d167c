"""Figures of ``analyze`` and ``diff`` as an HTML page, which opens without a network, or a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_vlora.errors import OptionError
from vllm_vlora.tools.html_report import escape, render_figure, render_page
from vllm_vlora.tools.plots import Plot, check_matplotlib, render_png


def check_plot_path(path: Path) -> None:
    """Raise OptionError before anything is computed: no such kind of file, or no matplotlib."""
    if path.suffix not in (".html", ".png"):
        raise OptionError(f"--plot {path} is neither .html nor .png; give a file of one of them")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"--plot {path}: there is no folder {path.absolute().parent}; make it")
    check_matplotlib("--plot")


def save_plot(path: Path, title: str, plots: Sequence[Plot]) -> None:
    """Write figures as ``path`` (.html or .png), in place of a file that is there.

    Raises:
        OptionError: as :func:`check_plot_path`. OutputError: it cannot be written.
    """
    from vllm_vlora.atomic import write_file_atomic

    check_plot_path(path)
    if path.suffix == ".html":
        data = render_plots(title, plots).encode()
    else:
        data = render_png(title, plots)
    write_file_atomic(path, data)


def render_plots(title: str, plots: Sequence[Plot]) -> str:
    """The page with these figures and nothing else."""
    parts = [f"<h1>{escape(title)}</h1>", *map(render_figure, plots)]
    return render_page(title, parts)
