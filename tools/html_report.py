"""The fidelity report as one HTML page that opens without a network and runs no script."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_vlora.checkpoint.card import format_bytes
from vllm_vlora.checkpoint.losses import describe_losses
from vllm_vlora.evaluation.fidelity import module_layer
from vllm_vlora.merging.spectra import SPECTRUM_QUANTILES, module_kind
from vllm_vlora.tools import plots
from vllm_vlora.wording import count_of, shown

_BARS = 100
# Modules without a number in their name (lm_head) stand in a column of their own.
_NO_LAYER = "none"

_LIGHT = "; ".join(f"--{name}: {colour}" for name, colour in plots.COLOURS.items())
_STYLE = (
    f":root {{ color-scheme: light dark; --paper: #ffffff; --soft: #f3f5f7; {_LIGHT}; }}"
    + """
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --soft: #1f242a; --ink: #e4e8ec;
  --line: #38404a; --quiet: #9aa5b1; --data: #6ea8e8; --hot: #f08a6c; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem; }
p, figcaption { color: var(--quiet); margin: 0.3rem 0; max-width: 60rem; overflow-wrap: anywhere; }
figure, .scroll { margin: 0.6rem 0; overflow-x: auto; }
.figures { display: flex; flex-wrap: wrap; gap: 0.7rem; margin: 1.2rem 0; }
.figures div { background: var(--soft); border-radius: 6px; padding: 0.6rem 1rem; }
.figures b { display: block; font-size: 1.4rem; }
.figures span { color: var(--quiet); overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
p.loss { color: var(--hot); }
svg { display: block; } svg .mark * { pointer-events: all; }
"""
)
# Whatever a task is called, a browser will neither run nor fetch anything; the one image, that of many
# tasks' similarities, is in the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escape(text: str) -> str:
    """Foreign text in a page: no markup, and nothing that turns the text around it."""
    return html.escape(shown(text))


def render_report(found: Mapping[str, Any]) -> str:
    """An HTML page from ``EvaluationReport.to_dict()``.

    Text from outside (task ids, paths, module names) is escaped. The page has no script and no address
    of another file, and its policy forbids both.
    """
    parts = [
        *_head(found),
        *_table_of_tasks(found),
        *_fraction_figures(found["tasks"]),
        *_error_figure(found["tasks"]),
        *_spectra_figure(found["spectra"]),
        *_similarity_figure(found),
        *_provenance(found),
    ]
    return render_page(f"Fidelity of {found['checkpoint']}", parts)


def render_page(title: str, parts: Sequence[str]) -> str:
    """A page of these elements, under the style and the policy of all our pages."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        *parts,
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def render_figure(plot: plots.Plot) -> str:
    """A figure with its title above and its caption below."""
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>"
    return f"<h2>{escape(plot.title)}</h2>\n<figure>{plots.render_svg(plot)}{caption}</figure>"


def _head(found: Mapping[str, Any]) -> Iterator[str]:
    tasks = found["tasks"]
    yield "<h1>What the tasks kept</h1>"
    yield f"<p>{escape(found['checkpoint'])} on {escape(found['base_model'])}</p>"
    yield '<div class="figures">'
    for name, title in FRACTIONS.items():
        overall = found[name]
        if overall["judged"]:
            yield _tile(f"{title}, worst", _number(overall["worst"]), overall["worst_task"])
            judged = (
                f"median {_number(overall['median'])}; {count_of(overall['judged'], 'task')} judged"
            )
            yield _tile(f"{title}, mean", _number(overall["mean"]), judged)
    ratio = "-" if found["ratio"] is None else f"{found['ratio']:.2f}x"
    sizes = f"{format_bytes(found['original_bytes'])} to {format_bytes(found['bytes'])}"
    yield _tile("smaller", ratio, f"{sizes}; shared bases {format_bytes(found['basis_bytes'])}")
    yield _tile("tasks", str(len(tasks)), f"{len(found['not_evaluated'])} more without data")
    yield "</div>"
    yield (
        "<p>KL kept is 1 - KL(adapter || task) / KL(adapter || base) on held-out text: 1 says that the "
        "task behaves as its adapter, 0 that it is no nearer to it than the base. Recovered is (loss "
        "of the base - loss of the task) / (loss of the base - loss of the adapter). Neither is "
        "clipped. Intervals are 95 % bootstrap intervals over examples, drawn in pairs.</p>"
    )


def _tile(label: str, value: str, more: str) -> str:
    return f"<div>{escape(label)}<b>{escape(value)}</b><span>{escape(more)}</span></div>"


def _table_of_tasks(found: Mapping[str, Any]) -> Iterator[str]:
    tasks = found["tasks"]
    yield "<h2>Tasks</h2>"
    headings = ("Task", *MEASURED, "Ratio", "Examples", "Tokens", "Stored as")
    rows = [
        (
            task["task"],
            *measured_cells(task),
            "-" if task["ratio"] is None else f"{task['ratio']:.2f}x",
            str(task["examples"]),
            str(task["tokens"]),
            ", ".join(f"{name} ({count})" for name, count in task["stored_as"].items()),
        )
        for task in tasks
    ]
    yield _table(headings, rows, text=(0, len(headings) - 1))
    yield (
        "<p>Losses and KL(adapter || task) are nats per supervised token. Agree: share of "
        "supervised positions with the same most likely token. Greedy: first generated tokens that "
        "agree with the adapter's, of those that could. Error: relative, Frobenius.</p>"
    )
    for text in describe_losses(found["losses"]):
        yield f'<p class="loss">{escape(text)}</p>'
    for task in tasks:
        for text in undefined(task):
            yield f"<p><b>{escape(task['task'])}</b>: {escape(text)}</p>"


FRACTIONS = {"kl_kept": "KL kept", "recovered": "Recovered"}
"""The fractions of a report, the one that gates go by first, and what they are called."""
MEASURED = (
    "Base", "Adapter", "Task's loss", "KL kept", "95 %", "Recovered", "95 %", "Agree", "Greedy", "KL",
    "Error", "Size",
)  # fmt: skip


def undefined(task: Mapping[str, Any]) -> Iterator[str]:
    """Why fractions of a task are unknown; a reason that both have is said once."""
    reasons: dict[str, list[str]] = {}
    for name, title in FRACTIONS.items():
        if task[f"{name}_undefined_because"]:
            reasons.setdefault(task[f"{name}_undefined_because"], []).append(title)
    for reason, titles in reasons.items():
        yield f"{' and '.join(titles)} unknown: {reason}"


def measured_cells(task: Mapping[str, Any], between: str = " to ") -> tuple[str, ...]:
    """A task's cells under the headings :data:`MEASURED`; ``between`` an interval's ends."""
    greedy = task["greedy"]
    intervals = {name: task[f"{name}_interval"] for name in FRACTIONS}
    fractions = (
        (_number(task[name]), "-" if ends is None else f"{ends[0]:.3f}{between}{ends[1]:.3f}")
        for name, ends in intervals.items()
    )
    return (
        *map(_number, (task["base_loss"], task["adapter_loss"], task["compressed_loss"])),
        *(cell for pair in fractions for cell in pair),
        _number(task["agreement"]),
        "-" if greedy is None else f"{greedy['tokens']:.1f} of {greedy['possible']:.1f}",
        _number(task["kl"]),
        _number(task["error"]),
        format_bytes(task["bytes"]),
    )


def _fraction_figures(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for name, title in FRACTIONS.items():
        judged = sorted((t for t in tasks if t[name] is not None), key=lambda t: t[name])
        if not judged:
            continue
        shown = judged[:_BARS]
        cut = f" The worst {_BARS} of {len(judged)} tasks are shown." if len(judged) > _BARS else ""
        yield render_figure(
            plots.Bars(
                f"{title}, worst first",
                f"Lines are 95 % intervals; the upright line stands at 1.{cut}",
                [task["task"] for task in shown],
                [task[name] for task in shown],
                [task[f"{name}_interval"] for task in shown],
                limit=1.0,
            )
        )
    yield from _size_figure(tasks)


def _size_figure(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Sizes against the first fraction that any task has."""
    for name, title in FRACTIONS.items():
        sized = [task for task in tasks if task[name] is not None and task["bytes"]]
        if sized:
            yield render_figure(
                plots.Sizes(
                    f"Size against {title}",
                    "One point a task: bytes of its file, without its share of the shared bases.",
                    [task["task"] for task in sized],
                    [task["bytes"] for task in sized],
                    [task[name] for task in sized],
                    "bytes of the task",
                    title,
                )
            )
            return


def _error_figure(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    sums: dict[tuple[str, str], list[float]] = {}
    layers: set[int] = set()
    for task in tasks:
        for name, error in task["module_errors"].items():
            layer = module_layer(name)
            layers |= set() if layer is None else {layer}
            column = _NO_LAYER if layer is None else str(layer)
            if error is not None:
                sums.setdefault((module_kind(name), column), []).append(error**2)
    if not sums:
        return
    cells = {place: math.sqrt(sum(found) / len(found)) for place, found in sums.items()}
    columns = [str(layer) for layer in sorted(layers)]
    columns += [_NO_LAYER] if any(column == _NO_LAYER for _, column in cells) else []
    recorded = sum(task["errors_from"] == "checkpoint" for task in tasks)
    source = "Measured against the originals."
    if recorded:
        source = (
            f"For {recorded} of {count_of(len(tasks), 'task')} as recorded at compression: no original "
            "given."
        )
    yield render_figure(
        plots.Heatmap(
            "Relative error by layer and module",
            f"Root mean square over tasks of the relative error of delta_W (Frobenius). {source}",
            cells,
            sorted({kind for kind, _ in cells}),
            columns,
            "Relative error",
        )
    )


def _spectra_figure(spectra: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not spectra:
        yield "<h2>Spectra</h2>\n<p>No original given.</p>"
        return
    low, middle, high = (f"{share:g}" for share in SPECTRUM_QUANTILES)
    panels = [
        plots.Band(
            spectrum["kind"],
            spectrum["quantiles"][low],
            spectrum["quantiles"][middle],
            spectrum["quantiles"][high],
            spectrum["kept_rank"],
        )
        for spectrum in spectra
    ]
    yield render_figure(
        plots.Spectra(
            "Spectra",
            "Singular values of the original delta_W, each module's scaled to norm 1: median over "
            "tasks and layers, and the range from the 10th to the 90th percentile. The upright line "
            "stands after the median rank that the checkpoint keeps.",
            panels,
        )
    )


def _similarity_figure(found: Mapping[str, Any]) -> Iterator[str]:
    if found["similarity"] is None:
        yield "<h2>Similarity of tasks</h2>\n<p>Needs the originals of at least two tasks.</p>"
        return
    labels, cosines = found["similarity"]["tasks"], found["similarity"]["cosines"]
    having = sum(task["original"] is not None for task in found["tasks"])
    cut = f" The first {len(labels)} of {having} tasks are shown." if having > len(labels) else ""
    order = "Rows and columns are in the table's order."
    yield render_figure(
        plots.Similarities(
            "Similarity of tasks",
            "Cosine between the original updates, all modules together: full colour is 1, none is "
            f"0, the other colour is below zero. {order}{cut}",
            labels,
            cosines,
        )
    )


def _provenance(found: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>How it was measured</h2>"
    yield _table(("", ""), list(found["setting"].items()), text=(0, 1))
    yield f"<p>{found['seconds']:.1f} seconds.</p>"
    yield "<h2>Data</h2>"
    rows = [
        (
            task["task"],
            ", ".join(task["data"]),
            task["data_sha256"],
            task["tokenizer"] or "the base model's",
            str(task["left_out"]),
        )
        for task in found["tasks"]
    ]
    yield _table(("Task", "Files", "SHA-256", "Tokenizer", "Left out"), rows, text=(0, 1, 2, 3))
    yield "<p>Left out: examples without a supervised token within the length that was read.</p>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = [' class="text"' if place in text else "" for place in range(len(values))]
        return "".join(
            f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values)
        )

    head = f"<thead><tr>{cells('th', headings)}</tr></thead>" if any(headings) else ""
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
