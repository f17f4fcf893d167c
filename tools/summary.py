"""What is said about a checkpoint: as plain data for ``--json`` and as tables for a person."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vllm_vlora.blend_names import blend_text
from vllm_vlora.blending.text_router import AUTO
from vllm_vlora.checkpoint.aliases import Aliases, kind_of
from vllm_vlora.checkpoint.attachments import attached_nbytes
from vllm_vlora.checkpoint.card import format_bytes, format_ratio
from vllm_vlora.checkpoint.losses import (
    NOTED_LOSS,
    Losses,
    describe_losses,
    is_worthless,
    predicted_loss,
)
from vllm_vlora.checkpoint.manifest import task_file
from vllm_vlora.checkpoint.pinning import absolute_ref
from vllm_vlora.checkpoint.report import extra_nbytes
from vllm_vlora.checkpoint.router_files import router_fit
from vllm_vlora.checkpoint.serving import remove_line, serve_command, serving_rank
from vllm_vlora.checkpoint.task_entry import entries
from vllm_vlora.plugin.memory import serving_obstacles
from vllm_vlora.wording import count_of, quoted, shown, some_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vllm_vlora.adapters.peft_folder import Adapter
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.router_files import Measured
    from vllm_vlora.checkpoint.task_entry import TaskEntry
    from vllm_vlora.representations.spec import Segment

# A collection may have a thousand such tasks.
_NAMED_TASKS = 10
_SHOWN_TASKS = 2048
# The part of a task's held-out prompts below which a router is said not to find it.
_SELDOM_RIGHT = 0.5
# Of a column of names that are folded, at the least.
_FOLDED_WIDTH = 8


def summarize(checkpoint: Checkpoint, ref: str) -> dict[str, Any]:
    """Everything ``info`` shows, as JSON data; sizes in bytes, errors relative (Frobenius)."""
    where = absolute_ref(ref)
    stored = {
        task_id: found
        for segments, task_ids in checkpoint.alike()
        for found in [_summarize_segments(segments)]
        for task_id in task_ids
    }
    tasks = [
        _summarize_task(checkpoint, task_id, entry, stored[task_id])
        for task_id, entry in entries(checkpoint.tasks)
    ]
    errors = [task["error"] for task in tasks]
    return {
        "checkpoint": where,
        "content": f"sha256:{checkpoint.content_digest}",
        "format_version": checkpoint.config.format_version,
        "created_by": checkpoint.config.created_by,
        "base_model": checkpoint.base_model,
        "original_bytes": checkpoint.original_nbytes,
        "bytes": checkpoint.nbytes,
        "basis_bytes": checkpoint.basis_nbytes,
        "extra_bytes": extra_nbytes(checkpoint.tasks),
        "ratio": checkpoint.original_nbytes / checkpoint.nbytes if checkpoint.nbytes else None,
        "attached_bytes": attached_nbytes(checkpoint.attachments),
        "aliases": describe_aliases(checkpoint.aliases),
        "router": describe_router(checkpoint),
        "mean_error": sum(errors) / len(errors) if errors else None,
        "worst_error": max(errors, default=None),
        "max_rank": checkpoint.max_rank,
        "max_lora_rank": serving_rank(checkpoint.max_rank),
        "losses": Losses.of(checkpoint.tasks, checkpoint.modules).to_dict(),
        "not_served": serving_obstacles(checkpoint),
        "serve": serve_command(
            where, checkpoint.base_model, checkpoint.max_rank, len(checkpoint.tasks)
        ),
        "tasks": tasks,
        "modules": [
            {
                "name": module.name,
                "kind": module.kind,
                "d_in": module.d_in,
                "d_out": module.d_out,
                "basis": module.basis
                and {
                    "k_out": module.basis.k_out,
                    "k_in": module.basis.k_in,
                    "format": module.basis.format,
                },
                "flat": module.flat
                and {
                    "rank": module.flat.rank,
                    "k_out": module.flat.k_out,
                    "k_in": module.flat.k_in,
                    "format": module.flat.format,
                },
            }
            for module in checkpoint.modules
        ],
    }


def _summarize_task(
    checkpoint: Checkpoint, task_id: str, entry: TaskEntry, stored: dict[str, Any]
) -> dict[str, Any]:
    size = entry.lora_nbytes
    return {
        "task": task_id,
        "source": entry.source,
        "file": task_file(task_id),
        "digest": checkpoint.digest(task_id),
        "original_bytes": entry.original_nbytes,
        "bytes": size,
        "extra_bytes": entry.nbytes - size,
        "ratio": entry.original_nbytes / size if size else None,
        "error": entry.error,
        "predicted_loss": predicted_loss(entry.error, entry.representation),
        "min_rank": entry.min_rank,
        "max_rank": entry.max_rank,
        **stored,
        "attached": sorted(checkpoint.attachments.get(task_id, ())),
    }


def _summarize_segments(segments: Sequence[Segment]) -> dict[str, Any]:
    stored = Counter(f"{segment.representation} {segment.format}" for segment in segments)
    return {
        "modules": len(segments),
        "stored_as": dict(stored.most_common()),
        "nf4_rows_by_bits": _rows_by_bits(segments, "nf4-dq"),
        "trellis_rows_by_bits": _rows_by_bits(segments, "trellis"),
    }


def _rows_by_bits(segments: Sequence[Segment], format: str) -> dict[str, int]:
    """How many rows of private factors in a format have 4, 3 and 2 bits."""
    counts: Counter[str] = Counter()
    for segment in segments:
        if segment.is_private and segment.format == format:
            for bits, rows in zip("432", segment.bits or (segment.rank, 0, 0)):
                counts[bits] += rows
    return dict(counts)


def print_tasks(console: Console, summary: dict[str, Any], most: int | None = None) -> None:
    """The table of tasks, with the shared bases and the total below.

    Args:
        most: where there are more tasks, so many with the greatest errors; ``info`` lists them all.
    """
    tasks, rest = summary["tasks"], ", with --json"
    if most is not None and len(tasks) > most:
        worst = sorted(tasks, key=lambda task: -task["error"])[:most]
        tasks, rest = worst, ": vllm-vlora info"
    # Of a calibrated compression; a checkpoint does not record them.
    seen = summary.get("seen_errors")
    table = make_table(["Task"], ["Before", "Stored", "Ratio", "Rank"])
    table.add_column("Stored as", overflow="fold")
    table.add_column("Error", justify="right", no_wrap=True)
    if seen is not None:
        table.add_column("Seen", justify="right", no_wrap=True)
    for task in tasks[:_SHOWN_TASKS]:
        table.add_row(
            Text(task["task"]),
            format_bytes(task["original_bytes"]),
            format_bytes(task["bytes"]),
            format_ratio(task["original_bytes"], task["bytes"]),
            format_range(task["min_rank"], task["max_rank"]),
            _stored_as(task["stored_as"])
            + _mean_bits(Counter(task["nf4_rows_by_bits"]) + Counter(task["trellis_rows_by_bits"])),
            *_error_cells(task, summary["losses"], seen),
        )
    more = len(summary["tasks"]) - len(tasks[:_SHOWN_TASKS])
    if more > 0:
        table.add_row(f"and {more} more{rest}")
    table.add_section()
    if summary["basis_bytes"]:
        table.add_row("shared bases", "", format_bytes(summary["basis_bytes"]))
    table.add_row(
        "total",
        format_bytes(summary["original_bytes"]),
        format_bytes(summary["bytes"]),
        format_ratio(summary["original_bytes"], summary["bytes"]),
        str(summary["max_rank"]),
        "",
        "-" if summary["mean_error"] is None else f"{summary['mean_error']:.4f}",
        *([f"{sum(seen.values()) / len(seen):.4f}"] if seen else []),
        style="bold",
    )
    if summary["extra_bytes"]:
        table.add_section()
        table.add_row(
            "extra tensors", "", format_bytes(summary["extra_bytes"]), "", "", "as they were", ""
        )
    console.print(table)
    line(
        console,
        "Before: the adapters' LoRA weights at 16 bits each. Stored: safetensors files; heads and other "
        "extra tensors stand by themselves. Error: relative, Frobenius; in total the mean.",
        style="dim",
    )
    print_seen(console, seen is not None)


def _error_cells(
    task: Mapping[str, Any], losses: Mapping[str, Any], seen: Mapping[str, float] | None
) -> list[Text]:
    """A task's error, and the one that the calibrated model sees, from which its loss is predicted."""
    task_id = task["task"]
    no_update = task_id in losses["no_update"]
    if seen is None:
        return [error_cell(task["error"], task["predicted_loss"], no_update=no_update)]
    return [
        error_cell(task["error"], 0.0, no_update=no_update),
        error_cell(seen[task_id], losses["above"].get(task_id, 0.0), no_update=no_update),
    ]


def print_modules(console: Console, summary: dict[str, Any]) -> None:
    """The adapted modules, those of one name and shape in one row."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for module in summary["modules"]:
        leaf = module["name"].rsplit(".", 1)[-1]
        groups.setdefault((leaf, module["kind"], module["d_out"], module["d_in"]), []).append(
            module
        )
    table = SafeTable(header_style="bold")
    table.add_column("Module", overflow="fold")
    table.add_column("Count", justify="right")
    table.add_column("Kind")
    table.add_column("Shape", justify="right", no_wrap=True)
    table.add_column("Basis k_out x k_in", justify="right")
    table.add_column("Basis format")
    for (leaf, kind, d_out, d_in), modules in groups.items():
        shared = {
            name: [module[name] for module in modules if module[name]] for name in ("basis", "flat")
        }
        formats = sorted({found["format"] for bases in shared.values() for found in bases})
        extents = [
            f"{prefix}{_basis_extent(shared[name], len(modules))}"
            for name, prefix in (("basis", ""), ("flat", "flat "))
            if shared[name]
        ]
        table.add_row(
            Text(leaf),
            str(len(modules)),
            kind,
            f"{d_out} x {d_in}",
            ", ".join(extents) or "-",
            ", ".join(formats) or "-",
        )
    console.print(table)


def print_candidates(
    console: Console, summary: dict[str, Any], chosen: tuple[str, str], *, by_error: bool
) -> None:
    """What was measured before the choice, the chosen one marked.

    ``by_error``: the budget was an error, so that the smallest won and not the most faithful.
    """
    if len(summary["candidates"]) < 2:
        return
    judged = any("kl_kept" in candidate for candidate in summary["candidates"])
    seen = ", as the calibrated model sees it" if "seen_errors" in summary else ""
    table = make_table(
        ["", "Representation", "Format"],
        ["Size", "Mean error", "Worst error", *(["KL kept"] if judged else [])],
        title=f"Measured{seen}: {chosen[0]} {chosen[1]} "
        f"{'is smallest' if by_error else 'keeps most'}",
    )
    for candidate in summary["candidates"]:
        is_chosen = (candidate["representation"], candidate["format"]) == chosen
        table.add_row(
            "chosen" if is_chosen else "",
            candidate["representation"],
            candidate["format"],
            format_bytes(candidate["bytes"]),
            f"{candidate['mean_error']:.4f}",
            f"{candidate['worst_error']:.4f}",
            *([f"{candidate['kl_kept']:.4f}"] if judged else []),
            style="bold" if is_chosen else "",
        )
    console.print(table)


def print_curve(console: Console, predicted: dict[str, Any]) -> None:
    """What every size would cost, and which of those that are tried cannot be had."""
    gate = predicted["gate"]
    which = (
        "is to be had" if gate is None else f"keeps every task within a relative error of {gate:g}"
    )
    if not predicted["points"] and gate is not None:
        advice = "allow a larger --gate, or compress with --max-error"
        line(console, f"No plan {which} at any ratio that is tried; {advice}.", style="yellow")
        return
    if not predicted["points"]:
        size = format_bytes(predicted["original_bytes"])
        said = f"These adapters ({size} at 16 bits) are too small for any ratio that is tried"
        line(console, f"{said}; compress them with --max-error, or without a size.", style="yellow")
        return
    columns = ["Ratio", "Size", "Mean error", "Worst error"]
    table = make_table([], columns, title="Predicted; no checkpoint was written")
    table.add_column("Best stored as", overflow="fold")
    for point in predicted["points"]:
        table.add_row(
            f"{point['ratio']:g}x",
            format_bytes(point["bytes"]),
            f"{point['mean_error']:.4f}",
            error_cell(
                point["worst_error"], predicted_loss(point["worst_error"], point["representation"])
            ),
            f"{point['representation']} {point['format']}",
        )
    console.print(table)
    if predicted["missing"]:
        missing = ", ".join(f"{ratio:g}x" for ratio in predicted["missing"])
        line(console, f"No plan {which} at {missing}.", style="yellow")
    line(
        console,
        f"The adapters take {format_bytes(predicted['original_bytes'])} at 16 bits. Error: relative; "
        "what it does to answers `vllm-vlora evaluate` says.",
        style="dim",
    )


def print_quality(console: Console, summary: dict[str, Any]) -> None:
    """What the choice went by, which tasks were given more, and what was kept, as far as it is known."""
    line(console, f"Chosen by {summary['chosen_by']}.", style="dim")
    if summary["raised"]:
        line(console, f"Given more bytes to pass the gate: {', '.join(summary['raised'])}")
    kl_kept = summary.get("kl_kept", {})
    defined = {task: value for task, value in kl_kept.items() if value is not None}
    if defined:
        worst = min(defined, key=defined.__getitem__)
        mean = sum(defined.values()) / len(defined)
        line(console, f"KL kept: mean {mean:.4f}, worst {defined[worst]:.4f} ({worst})")
        # Whatever was predicted: this was measured.
        low = sorted((kept, task) for task, kept in defined.items() if kept < 1 - NOTED_LOSS)
        if low:
            named = some_of((f"{task} ({kept:.4f})" for kept, task in low), _NAMED_TASKS)
            line(
                console,
                f"Measured to lose more than {NOTED_LOSS:.0%}: {named}; a lower --ratio keeps more.",
                style="yellow",
            )
    undefined = [task for task, value in kl_kept.items() if value is None]
    if undefined:
        line(
            console,
            "Not judged, since the adapter changes nothing clear on this text: "
            f"{', '.join(undefined)}",
            style="yellow",
        )
    if summary["kept"]:
        line(console, f"Kept as they were, since less would not do: {', '.join(summary['kept'])}")


def print_attachments(console: Console, summary: dict[str, Any]) -> None:
    """Tokenizer files that are kept with tasks, if there are any; no size above counts them."""
    having = [task["task"] for task in summary["tasks"] if task["attached"]]
    if having:
        names = sorted({name for task in summary["tasks"] for name in task["attached"]})
        line(
            console,
            f"Kept beside the weights of {count_of(len(having), 'task')}: {some_of(names)} "
            f"({format_bytes(summary['attached_bytes'])}, not counted above)",
        )


def describe_aliases(aliases: Aliases) -> list[dict[str, Any]]:
    """Aliases as JSON data: what each is, and what it stands for with which part of its requests."""
    return [
        {
            "alias": name,
            "kind": kind_of(routes),
            "targets": [
                {
                    "target": blend_text(blend),
                    "share": share / sum(route.share for route in routes),
                    "tasks": {task: float(weight) for task, weight in blend},
                }
                for share, blend in routes
            ],
        }
        for name, routes in sorted(aliases.items())
    ]


def print_aliases(console: Console, aliases: Sequence[Mapping[str, Any]]) -> None:
    """One line an alias."""
    for alias in aliases:
        targets = [
            f"{target['target']} ({target['share']:.4g})"
            if alias["kind"] == "canary"
            else target["target"]
            for target in alias["targets"]
        ]
        line(console, f"Alias          {alias['alias']} -> {', '.join(targets)} ({alias['kind']})")


def describe_router(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """A checkpoint's router as JSON data; None where it has none. Text of no task is the task ""."""
    record = checkpoint.router
    if record is None:
        return None
    fit = router_fit(record.tasks, checkpoint.tasks, checkpoint.aliases)
    return {
        "tasks": record.tasks,
        "others": record.others,
        "bytes": record.weights.nbytes,
        "measured": measured_rows(record.measured),
        "unknown_tasks": fit.unknown,
        "gone_tasks": fit.gone,
        "hidden_by": hiding_auto(checkpoint),
    }


def hiding_auto(checkpoint: Checkpoint) -> str | None:
    """What requests for ``auto`` mean in place of what the router picks: ``task``, ``alias``, None."""
    named = {"task": checkpoint.tasks, "alias": checkpoint.aliases}
    return next((kind for kind, names in named.items() if AUTO in names), None)


def measured_rows(measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """How often a router was right, a row for each task."""
    return [
        {
            "task": task,
            "trained": found.trained,
            "held_out": found.held_out,
            "right": found.right,
            "accuracy": found.right / found.held_out if found.held_out else None,
        }
        for task, found in measured.items()
    ]


def print_router(console: Console, router: Mapping[str, Any] | None) -> None:
    """What a checkpoint's router picks from, and with which tasks it has nothing in common."""
    if router is None:
        return
    held_out = sum(row["held_out"] for row in router["measured"])
    right = sum(row["right"] for row in router["measured"])
    sure = f", {right / held_out:.4f} of held-out prompts right" if held_out else ""
    line(console, f"Router         model=auto, {count_of(len(router['tasks']), 'task')}{sure}")
    print_router_fit(console, router)
    print_seldom_right(console, router["measured"])


def print_seldom_right(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """The tasks whose own prompts a router mostly sends elsewhere; ``rows`` as of ``measured_rows``."""
    low = {
        row["task"] or "text of no task": row["accuracy"]
        for row in rows
        if row["accuracy"] is not None and row["accuracy"] < _SELDOM_RIGHT
    }
    if low:
        named = some_of((f"{task} ({part:.3f})" for task, part in low.items()), _NAMED_TASKS)
        text = (
            f"Right less than half the time: {named}; train with more prompts of theirs, or without "
            "tasks that are asked alike (--fail-under attaches no such router)"
        )
        line(console, text, style="yellow")


def print_router_fit(console: Console, router: Mapping[str, Any] | None) -> None:
    """The tasks that a router and its checkpoint do not have in common."""
    if router is None:
        return
    if router["unknown_tasks"]:
        named = some_of(router["unknown_tasks"], _NAMED_TASKS)
        text = f"The router never picks {named}: train it again with their prompts"
        line(console, text, style="yellow")
    if router["gone_tasks"]:
        named = some_of(router["gone_tasks"], _NAMED_TASKS)
        text = (
            f"The router knows {named}, gone since: the base model answers for them; train it again"
        )
        line(console, text, style="yellow")
    if router["hidden_by"]:
        text = (
            f"Nothing is routed: the {router['hidden_by']} that is called auto answers in its place"
        )
        line(console, text, style="yellow")


def having_companions(adapters: Mapping[str, Adapter]) -> list[str]:
    """The tasks with tokenizer files or a chat template beside their adapter."""
    return [task for task, adapter in adapters.items() if adapter.companions]


def print_left_behind(console: Console, tasks: Sequence[str]) -> None:
    """The tasks whose tokenizer files go no further."""
    warning = f"tokenizer files and chat templates stay behind, of {some_of(tasks)}"
    print_warnings(console, [warning] * bool(tasks))


def print_overview(console: Console, summary: dict[str, Any]) -> None:
    """Where the checkpoint is, what it is for and how large it is."""
    line(console, f"Checkpoint     {summary['checkpoint']}")
    line(console, f"Content        {summary['content']}")
    line(console, f"Base model     {summary['base_model'] or 'not recorded'}")
    line(
        console,
        f"Written by     {summary['created_by']} (format {summary['format_version']})",
    )
    line(
        console,
        f"Size           {format_bytes(summary['bytes'])}, before "
        f"{format_bytes(summary['original_bytes'])} "
        f"({format_ratio(summary['original_bytes'], summary['bytes'])}); shared bases "
        f"{format_bytes(summary['basis_bytes'])}",
    )
    if summary["extra_bytes"]:
        line(
            console,
            f"Beside them    {format_bytes(summary['extra_bytes'])} of heads and other extra tensors",
        )


def error_cell(error: float | None, loss: float, *, no_update: bool = False) -> Text:
    """A relative error: yellow where the predicted loss is named, red where it is worse than none."""
    if no_update:
        return Text("no update", style="yellow")
    if error is None:
        return Text("-")
    style = "red" if is_worthless(error) else "yellow" if loss > NOTED_LOSS else ""
    return Text(f"{error:.4f}", style=style)


def print_seen(console: Console, calibrated: bool) -> None:
    """What losses are predicted from, where that is not the error of the weights."""
    if calibrated:
        line(
            console,
            "Losses are predicted from the error that the calibrated model sees; `info` knows only the "
            "error of the weights.",
            style="dim",
        )


def print_losses(console: Console, losses: dict[str, Any]) -> None:
    """What must be said of tasks that lost much, or that change nothing."""
    for text in describe_losses(losses):
        line(console, text, style="yellow")


def print_not_served(console: Console, not_served: dict[str, str], where: str) -> None:
    """The tasks that vLLM cannot serve; with one of them an engine does not start."""
    reasons: dict[str, list[str]] = {}
    for task, reason in not_served.items():
        reasons.setdefault(reason, []).append(task)
    for reason, tasks in reasons.items():
        line(console, f"vLLM cannot serve {some_of(tasks, _NAMED_TASKS)}: {reason}.", style="red")
    if not_served:
        command = remove_line(where, not_served)
        if len(not_served) > _NAMED_TASKS:
            command = f"vllm-vlora remove {quoted([where])} TASK... -o COPY"
        line(
            console,
            f"vLLM would not start with this checkpoint. Serve a copy without: {command}",
            style="red",
        )


def print_serving(console: Console, summary: dict[str, Any]) -> None:
    """The line that serves the checkpoint, or what stands in its way."""
    if summary["not_served"]:
        print_not_served(console, summary["not_served"], summary["checkpoint"])
        return
    line(console, "Serve every task:", style="bold")
    line(console, f"  {summary['serve']}")
    line(console, f"or: vllm-vlora serve {quoted([summary['checkpoint']])}", style="dim")
    if summary["max_lora_rank"] is None:
        line(
            console,
            f"  vLLM's slots hold ranks up to 512; with rank {summary['max_rank']} this checkpoint is "
            "served direct, and not with VLLM_VLORA_MODE=materialize",
            style="yellow",
        )


def make_table(names: Sequence[str], numbers: Sequence[str], title: str | None = None) -> Table:
    """An empty table: columns of text, which may be folded, then columns of numbers."""
    table = SafeTable(
        title=title and shown(title), title_justify="left", title_style="bold", header_style="bold"
    )
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """A line each."""
    for warning in warnings:
        line(console, f"Warning: {warning}", style="yellow")


def line(console: Console, text: str, style: str = "") -> None:
    """Print one line as it is: no markup, no highlighting, no wrapping that would break a paste."""
    console.print(Text(shown(text), style=style), soft_wrap=True)


class SafeTable(Table):
    """A table whose cells are as ``wording.shown`` shows them, so that its columns fit them.

    Where a terminal is too narrow for them, numbers stay whole and names have some room: it breaks lines.
    """

    def add_column(self, header: RenderableType = "", *args: Any, **options: Any) -> None:
        super().add_column(_shown_cell(header), *args, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*map(_shown_cell, cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width, self._least_width())
        return super().__rich_console__(console, options.update(max_width=width))

    def _least_width(self) -> int:
        """With a blank on both sides of every cell, and a line between columns and around them."""
        widest = [
            max(text.cell_len for text in (column.header, *column.cells) if isinstance(text, Text))
            for column in self.columns
        ]
        least = (
            width if column.no_wrap else min(width, _FOLDED_WIDTH)
            for column, width in zip(self.columns, widest)
        )
        return 1 + sum(width + 3 for width in least)


def _shown_cell(cell: RenderableType | None) -> Text:
    if isinstance(cell, Text):
        return Text(shown(cell.plain), style=cell.style)
    assert cell is None or isinstance(cell, str)
    return Text(shown(cell or ""))


def _stored_as(counts: dict[str, int]) -> str:
    formats: dict[str, list[str]] = {}
    for name in counts:
        representation, format = name.split(" ")
        formats.setdefault(representation, []).append(format)
    return ", ".join(f"{name} {'/'.join(kinds)}" for name, kinds in formats.items())


def _mean_bits(rows: Counter[str]) -> str:
    """``, 3.2 bits``, where rows have fewer than four."""
    if not rows or rows["4"] == sum(rows.values()):
        return ""
    mean = sum(int(bits) * count for bits, count in rows.items()) / sum(rows.values())
    return f", {mean:.1f} bits"


def format_range(low: int, high: int) -> str:
    """``4``, or ``4-8``."""
    return str(low) if low == high else f"{low}-{high}"


def _basis_extent(bases: list[dict[str, Any]], count: int) -> str:
    k_out, k_in = ([basis[key] for basis in bases] for key in ("k_out", "k_in"))
    text = f"{format_range(min(k_out), max(k_out))} x {format_range(min(k_in), max(k_in))}"
    return text if len(bases) == count else f"{text} ({len(bases)} of {count})"
