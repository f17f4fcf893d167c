"""The Hub model card of a checkpoint, and how sizes are worded.

The card follows the Hub's conventions for adapters: YAML front matter with ``base_model`` and
``library_name``, so that the checkpoint is listed under its base model.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from vllm_vlora.checkpoint.losses import describe_losses
from vllm_vlora.checkpoint.serving import serve_command
from vllm_vlora.wording import shown

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.report import CompressReport, TaskReport

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!$])")
# The Hub shows no page of a hundred thousand rows.
_LISTED_TASKS = 2048
_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_bytes(count: int) -> str:
    """``count`` bytes in decimal units with three digits: 812 B, 4.61 MB, 12.3 GB."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{count} B"
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {_UNITS[unit]}"


def format_ratio(original: int, stored: int) -> str:
    """``original / stored`` as ``7.5x``; a dash where nothing is stored."""
    return f"{original / stored:.2f}x" if stored else "-"


def model_card(base_model: str | None, report: CompressReport) -> str:
    """Return the text of the checkpoint's ``README.md``.

    Args:
        base_model: Hub id or path of the base model. Only a Hub id enters the front matter, which
            the Hub refuses to accept with anything else.
        report: what ``compress`` did, one entry a task.
    """
    count = len(report.tasks)
    lines = [
        *_front_matter(base_model),
        "",
        f"# {count} LoRA {'adapter' if count == 1 else 'adapters'} in one checkpoint",
        "",
        f"Base model: {_escape(base_model) if base_model else 'not recorded'}. Written by "
        "vllm-vlora. Representation: "
        f"{report.representation}, number format: {report.format}.",
        "",
        f"- Adapters before: {format_bytes(report.original_nbytes)} (LoRA weights at 16 bits each)",
        f"- This checkpoint: {format_bytes(report.nbytes)} of LoRA weights (of which shared bases "
        f"{format_bytes(report.basis_nbytes)}), {report.ratio:.2f} times smaller",
        *_extra_lines(report),
        f"- Relative error of the weights: mean {report.mean_error:.4f}, worst "
        f"{report.worst_error:.4f}",
        *_judged_lines(report),
        *(f"- **{_escape(line)}**" for line in describe_losses(report.losses.to_dict())),
        "",
        "## Tasks",
        "",
        "| Task | Before | Stored | Ratio | Relative error |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {_escape(task.task_id)} | {format_bytes(task.original_nbytes)} "
        f"| {format_bytes(task.nbytes)} | {format_ratio(task.original_nbytes, task.nbytes)} "
        f"| {_error(task, report)} |"
        for task in report.tasks[:_LISTED_TASKS]
    ]
    if count > _LISTED_TASKS:
        lines += ["", f"And {count - _LISTED_TASKS} more: `vllm-vlora info CHECKPOINT` lists all."]
    lines += [
        "",
        "*Stored* is the task's own file; the shared bases come once on top of it.",
        "",
        "Relative error is `||W' - W|| / ||W||` in the Frobenius norm, W being the adapter's "
        "weight update over all its modules. **It is a proxy:** it says how close the stored "
        "weights are to the adapter's, not how well the task is still done. Evaluate the tasks "
        "that matter to you.",
        "",
        "## Serve",
        "",
        "```bash",
        "pip install vllm vllm-vlora",
        serve_command("CHECKPOINT", base_model, max(task.ranks[1] for task in report.tasks), count),
        "```",
        "",
        "`CHECKPOINT` is this folder or this repository's Hub id. A request names its task in the "
        "`model` field of the OpenAI API.",
        "",
        "## Take a task out again",
        "",
        "```bash",
        "vllm-vlora export CHECKPOINT TASK -o FOLDER",
        "```",
        "",
        "writes a standard PEFT folder, which PEFT and vLLM load without this package.",
        "",
    ]
    return "\n".join(lines)


def _extra_lines(report: CompressReport) -> list[str]:
    """What the files hold beside the LoRA weights, where they do."""
    if not report.extra_nbytes:
        return []
    return [
        f"- Heads and other tensors beside them, as they were: {format_bytes(report.extra_nbytes)}; "
        f"all safetensors files: {format_bytes(report.nbytes + report.extra_nbytes)}"
    ]


def _error(task: TaskReport, report: CompressReport) -> str:
    if task.task_id in report.losses.no_update:
        return "no update"
    shown = f"{task.error:.4f}"
    return f"**{shown}**" if task.task_id in report.losses.above else shown


def _judged_lines(report: CompressReport) -> list[str]:
    """What was measured with the model, where it was."""
    values = {task: value for task, value in report.kl_kept.items() if value is not None}
    lines = [f"- Chosen by {_escape(report.chosen_by)}"] if report.chosen_by else []
    if values:
        worst = min(values, key=values.__getitem__)
        lines.append(
            "- KL kept, 1 - KL(adapter \\|\\| task) / KL(adapter \\|\\| base): mean "
            f"{sum(values.values()) / len(values):.4f}, worst {values[worst]:.4f} ({_escape(worst)})"
        )
    if report.kept:
        lines.append(f"- Kept as they were: {', '.join(map(_escape, report.kept))}")
    return lines


def _front_matter(base_model: str | None) -> list[str]:
    lines = ["---"]
    if base_model is not None and _HUB_ID.fullmatch(base_model):
        # A JSON string is a YAML scalar, whatever characters it holds.
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: adapter"]
    return [*lines, "library_name: vllm-vlora", "tags:", "- lora", "- vllm", "- peft", "---"]


def _escape(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", shown(text))
