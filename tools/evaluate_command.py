"""``evaluate``: what every task of a checkpoint lost on held-out text, and a gate on the worst."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.errors import OptionError, OutputError
from vllm_vlora.tools.common_options import BatchSize, Device, ModelDtype, base_option
from vllm_vlora.tools.terminal import (
    EXIT_CHECK_FAILED,
    AsJson,
    CheckpointRef,
    Verbose,
    open_console,
    print_result,
    progress_bar,
    reported,
)
from vllm_vlora.wording import count_of, quoted, some_of

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.checkpoint.reader import Checkpoint

# Tasks that one line names at most.
_NAMED_TASKS = 5
_BATCH_SIZE, _GREEDY_TOKENS, _NEW_TOKENS = 4, 16, 128


class Metric(str, Enum):
    """What answers are judged by."""

    rouge_l = "rouge-l"
    exact_match = "exact-match"
    loss = "loss"


def evaluate(
    checkpoint: CheckpointRef,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE",
            help="Held-out text of a task, .jsonl or .txt; or a folder with a file TASK.jsonl or "
            "TASK.txt for each task. May be repeated.",
        ),
    ],
    base: Annotated[str | None, base_option("checkpoint names")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="A folder with the original adapters in sub-folders, named as the tasks or as when "
            "they were compressed. May be repeated.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=PATH",
            help="The original of one task. May be repeated.",
            show_default=False,
        ),
    ] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            help="Exit with 1 if a task keeps less than X of its adapter (KL kept).",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a report with plots; needs matplotlib."),
    ] = None,
    save_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what --json prints to a file.")
    ] = None,
    max_length: Annotated[int, typer.Option(metavar="N", help="Cut examples to N tokens.")] = 1024,
    batch_size: BatchSize = _BATCH_SIZE,
    max_examples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use the first N examples of each file.")
    ] = None,
    device: Device = None,
    dtype: ModelDtype = None,
    greedy_tokens: Annotated[
        int, typer.Option(metavar="N", help="Compare N greedily generated tokens; 0: none.")
    ] = _GREEDY_TOKENS,
    losses_only: Annotated[
        bool, typer.Option("--losses-only", help="No KL and no agreement: quicker.")
    ] = False,
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="Judge answers that vLLM generates, relative to the uncompressed adapter, in place "
            "of the figures above. Data needs prompt and completion, or chats.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --metric: tokens of an answer at most. Default: 128.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure what each task kept of its adapter, on held-out text.

    KL kept is 1 - KL(original adapter || task) / KL(original adapter ||
    base): 1 says that the task behaves as its adapter does, 0 that it is no
    nearer to it than the base. Recovered is (loss of the base - loss of the
    task) / (loss of the base - loss of the original adapter). Give the
    originals with --adapters or --adapter; without them only losses are
    reported. Needs transformers and peft.

    Examples:
        vllm-vlora evaluate ckpt --base org/model --data texts/ --adapters loras/
        vllm-vlora evaluate ckpt --base models/llama --data sql=sql.jsonl \\
            --adapter sql=runs/sql --html report.html
        vllm-vlora evaluate ckpt --data texts/ --adapters loras/ --fail-under 0.95
        vllm-vlora evaluate ckpt --data texts/ --adapters loras/ --metric rouge-l
    """
    with reported(verbose):
        if metric is not None:
            unused = {
                "--html": html is not None,
                "--losses-only": losses_only,
                "--device": device is not None,
                "--greedy-tokens": greedy_tokens != _GREEDY_TOKENS,
                "--batch-size": batch_size != _BATCH_SIZE,
            }
            _refuse_beside("--metric", unused)
            unused = {"--max-new-tokens": max_new_tokens is not None}
            _refuse_beside("--metric loss", unused if metric is Metric.loss else {})
        else:
            _refuse_beside("no --metric", {"--max-new-tokens": max_new_tokens is not None})
        for target in (html, save_json):
            _check_target(target)
        if html is not None:
            from vllm_vlora.tools.plots import check_matplotlib

            check_matplotlib("--html", "evaluate")
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.checkpoint.task_files import find_data, find_originals

        if metric is None and fail_under is not None and fail_under > 1:
            raise OptionError(
                f"--fail-under {fail_under:g}: KL kept is at most 1; give a fraction, as 0.95"
            )
        opened = Checkpoint.open(checkpoint)
        files = find_data(opened, data)
        originals = find_originals(opened, adapters or [], adapter or [])
        if fail_under is not None:
            _check_gate(files, originals, losses_only)
        if metric is not None:
            _answer(
                opened,
                base or _recorded_base(opened),
                (files, originals),
                metric.value,
                (
                    max_length,
                    _NEW_TOKENS if max_new_tokens is None else max_new_tokens,
                    max_examples,
                    dtype,
                ),
                save_json,
                fail_under,
                as_json,
            )
            return
        with progress_bar() as advance:
            from vllm_vlora.evaluation.base_model import quieten
            from vllm_vlora.evaluation.evaluator import (
                EvaluationOptions,
                Evaluator,
                evaluate_checkpoint,
            )

            quieten()
            options = EvaluationOptions(
                max_length, batch_size, max_examples, device, dtype, greedy_tokens
            )
            advance("load the base model", 0, 1)
            evaluator = Evaluator(base or _recorded_base(opened), files, options)
            report = evaluate_checkpoint(
                evaluator,
                opened,
                originals,
                losses_only=losses_only,
                command=_command(),
                progress=advance,
            )
        found = report.to_dict()
        # Shown first: a disk may be full.
        print_result(found, print_report, as_json)
        _write_reports(found, html, save_json)
        if html is not None and not as_json:
            open_console().print(f"Wrote {html}", soft_wrap=True)
        if fail_under is not None:
            failure = gate_failure(found, fail_under)
            if failure is not None:
                open_console(stderr=True).print(failure, style="red", soft_wrap=True)
                raise typer.Exit(EXIT_CHECK_FAILED)


def _answer(
    opened: Checkpoint,
    base: str,
    given: tuple[Mapping[str, Any], Mapping[str, Any]],
    metric: str,
    limits: tuple[int, int, int | None, str | None],
    save_json: Path | None,
    fail_under: float | None,
    as_json: bool,
) -> None:
    """``--metric``: what vLLM generates, judged."""
    from vllm_vlora.tools.answers_report import answer, answers_failure, print_answers

    max_length, max_new_tokens, max_examples, dtype = limits
    if metric != Metric.loss.value and not 1 <= max_new_tokens < max_length:
        raise OptionError(
            f"--max-new-tokens {max_new_tokens} leaves no room in --max-length {max_length}"
        )
    with progress_bar() as advance:
        report = answer(
            opened,
            base,
            given[0],
            given[1],
            metric,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            max_examples=max_examples,
            dtype=None if dtype is None else str(getattr(dtype, "value", dtype)),
            progress=advance,
        )
    found = report.to_dict() | {"command": _command()}
    print_result(found, print_answers, as_json)
    _write_reports(found, None, save_json)
    if fail_under is not None:
        failure = answers_failure(found, fail_under)
        if failure is not None:
            open_console(stderr=True).print(failure, style="red", soft_wrap=True)
            raise typer.Exit(EXIT_CHECK_FAILED)


def _refuse_beside(what: str, given: Mapping[str, bool]) -> None:
    for option, is_given in given.items():
        if is_given:
            raise OptionError(f"{option} says nothing with {what}; leave it out")


# --- what is evaluated ----------------------------------------------------------------------------


def _recorded_base(checkpoint: Checkpoint) -> str:
    if checkpoint.base_model is None:
        raise OptionError(f"{checkpoint.path} names no base model; give it with --base MODEL")
    return checkpoint.base_model


def _check_gate(files: Mapping[str, Any], originals: Mapping[str, Any], losses_only: bool) -> None:
    if losses_only:
        raise OptionError("--fail-under goes by KL kept, which --losses-only leaves out; drop one")
    missing = [task for task in files if task not in originals]
    if missing:
        raise OptionError(
            f"--fail-under needs the original of every task with data; give that of {missing[0]!r} "
            "with --adapters DIR or --adapter TASK=PATH"
        )


def _check_target(target: Path | None) -> None:
    """Found out before the evaluation, which takes long."""
    if target is None:
        return
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give the name of a file")
    if not os.access(target.absolute().parent, os.W_OK):
        raise OutputError(
            f"{target}: its folder does not exist or cannot be written; make it first"
        )


def _command() -> str:
    return quoted([Path(sys.argv[0]).name, *sys.argv[1:]])


# --- what is said ---------------------------------------------------------------------------------


def gate_failure(found: Mapping[str, Any], threshold: float) -> str | None:
    """Why a report does not pass ``--fail-under``, in one line; None if it does.

    A task whose KL kept is undefined neither passes nor fails; a report without any fails.
    """
    judged = [task for task in found["tasks"] if task["kl_kept"] is not None]
    if not judged:
        reason = found["tasks"][0]["kl_kept_undefined_because"]
        return f"no task could be judged against {threshold:g}: {reason}"
    below = sorted((t for t in judged if t["kl_kept"] < threshold), key=lambda t: t["kl_kept"])
    if not below:
        return None
    named = some_of(f"{task['task']} {task['kl_kept']:.4f}" for task in below)
    return (
        f"KL kept below {threshold:g} in {len(below)} of {count_of(len(judged), 'task')}: {named}"
    )


def _write_reports(found: Mapping[str, Any], html: Path | None, save_json: Path | None) -> None:
    if html is not None:
        from vllm_vlora.tools.html_report import render_report

        _write_report(html, render_report(found))
    if save_json is not None:
        import json

        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        _write_report(save_json, text + "\n")


def _write_report(path: Path, text: str) -> None:
    """In place of an older one, which stays if that fails; into a pipe or a device as it comes."""
    from vllm_vlora.atomic import write_file_atomic

    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_file_atomic(path, text.encode())


def print_report(console: Console, found: Mapping[str, Any]) -> None:
    """The table of tasks, the figures over all, and what a reader must know beside them."""
    from rich.text import Text

    from vllm_vlora.tools.html_report import FRACTIONS, MEASURED, measured_cells, undefined
    from vllm_vlora.tools.summary import line, make_table, print_losses

    table = make_table(["Task"], [*MEASURED, "Tokens"])
    for task in found["tasks"]:
        table.add_row(Text(task["task"]), *measured_cells(task, "-"), str(task["tokens"]))
    console.print(table)
    for name, title in FRACTIONS.items():
        overall = found[name]
        if overall["judged"]:
            line(
                console,
                f"{title}: mean {overall['mean']:.4f}, median {overall['median']:.4f}, worst "
                f"{overall['worst']:.4f} ({overall['worst_task']}); {overall['judged']} of "
                f"{count_of(len(found['tasks']), 'task')}, {found['ratio']:.2f}x smaller",
                style="bold",
            )
    for task in found["tasks"]:
        for text in undefined(task):
            line(console, f"{task['task']}: {text}", style="yellow")
        if task["tokenizer"]:
            line(
                console,
                f"{task['task']}: its data is in tokens of the adapter's own tokenizer, which "
                f"differ from the base model's: {task['tokenizer']}",
                style="yellow",
            )
    print_losses(console, found["losses"])
    if found["not_evaluated"]:
        line(console, f"no data, left out: {some_of(found['not_evaluated'])}", style="yellow")
    line(
        console,
        "KL kept: 1 - KL(adapter || task) / KL(adapter || base). Losses and KL(adapter || task): nats "
        "per supervised token. Greedy: first tokens that agree. Error: relative, Frobenius. 95 %: "
        "bootstrap over examples.",
        style="dim",
    )
