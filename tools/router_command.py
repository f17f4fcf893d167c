"""``router``: train what picks a task for ``model="auto"``, show it, ask it, take it away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.blend_names import MAX_TERMS
from vllm_vlora.errors import CheckpointError, OptionError
from vllm_vlora.tools.common_options import Timeout
from vllm_vlora.tools.parsing import Command, Group
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

if TYPE_CHECKING:
    from collections.abc import Container

    from rich.console import Console

    from vllm_vlora.blending.text_router import RoutePolicy, TextRouter
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.router_files import RouterRecord
    from vllm_vlora.model.text_routing import TrainedRouter

router = typer.Typer(
    no_args_is_help=True,
    cls=Group,
    rich_markup_mode=None,
    help='Train, show, ask or remove what picks the task of requests for model="auto".',
)
# Labels that one line names at most, and that a prompt's weights are shown of.
_NAMED = 5
_LIKELIEST = 3
# Characters of a prompt in a table.
_PROMPT = 60
_OF_NO_TASK = "(of no task)"


@router.command(cls=Command)
def train(
    checkpoint: CheckpointRef,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE",
            help="Text of a task or an alias, .jsonl or .txt, whose prompts are used; or a folder with a "
            "file TASK.jsonl or TASK.txt for each. May be repeated.",
        ),
    ],
    others: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Prompts that are of no task and that the base model is to answer. May be repeated.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            metavar="X", help="Part of each task's prompts that is measured on, not trained on."
        ),
    ] = 0.2,
    fail_under: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Attach nothing and exit with 1 if less than X of the held-out prompts go right.",
            show_default=False,
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(metavar="N", help="Width of the network.")] = 64,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the prompts.")] = 8,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Draws what is held out and the first weights.")
    ] = 0,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a router on the tasks' prompts and attach it to the checkpoint.

    Requests with `model="auto"` are then answered by the task that their
    prompt looks like, or by the base model where it looks like none. Says how
    often the router is right on prompts that it has not seen, and what it
    takes for what. It reads text alone: no base model and no GPU is needed.
    Weights stay as they are; CKPT changes at once or not at all.

    Examples:
        vllm-vlora router train ckpt --data prompts/
        vllm-vlora router train ckpt --data sql=sql.jsonl --data french=fr.txt \\
            --others chats.jsonl --fail-under 0.95
    """
    with reported(verbose, timeout):
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.checkpoint.task_files import find_data
        from vllm_vlora.editing.routing import Labels, attach_router
        from vllm_vlora.evaluation.prompts import read_prompts
        from vllm_vlora.model.text_routing import OTHERS, RouterOptions, train_text_router

        if fail_under is not None and not held_out:
            raise OptionError("--fail-under needs held-out prompts; give --held-out above 0")
        options = RouterOptions(held_out, hidden, epochs, seed)
        if not Path(checkpoint).expanduser().is_dir():
            raise OptionError(f"{checkpoint} is no folder; pull it, and give its folder")
        files = find_data(Labels(Checkpoint.open(checkpoint)), data)
        texts = {task: read_prompts(paths) for task, paths in files.items()}
        if others:
            texts[OTHERS] = read_prompts(others)
        with progress_bar() as advance:
            trained = train_text_router(texts, options, advance)
        accuracy = trained.accuracy
        good = fail_under is None or (accuracy is not None and accuracy >= fail_under)
        if good:
            attach_router(
                checkpoint,
                trained.tasks,
                trained.weights,
                others=trained.others,
                temperature=trained.temperature,
                measured=trained.measured,
            )
        found = _describe_trained(trained, checkpoint, Checkpoint.open(checkpoint), good)
        print_result(found, _print_trained, as_json)
        if not good:
            open_console(stderr=True).print(
                f"{accuracy:.4f} of the held-out prompts go right, less than {fail_under:g}: "
                "nothing was attached",
                style="red",
                soft_wrap=True,
            )
            raise typer.Exit(EXIT_CHECK_FAILED)


@router.command(cls=Command)
def show(checkpoint: CheckpointRef, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Show a checkpoint's router: its tasks, and how often it was right.

    Also which tasks it does not know, and which it knows that are gone.

    Example:
        vllm-vlora router show ckpt
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.tools.summary import describe_router

        opened = Checkpoint.open(checkpoint, manifest_only=True)
        _record_of(opened, checkpoint)
        found = describe_router(opened)
        assert found is not None
        print_result({"checkpoint": checkpoint, **found}, _print_router, as_json)


@router.command(cls=Command)
def ask(
    checkpoint: CheckpointRef,
    text: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...", help="Prompts, as clients write them; - reads one from stdin."
        ),
    ],
    blend: Annotated[
        int,
        typer.Option(
            metavar="K",
            min=1,
            max=MAX_TERMS,
            help="Blend at most so many tasks, as VLLM_VLORA_ROUTE=blend:K does.",
        ),
    ] = 1,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Weight below which the base model answers: a server's VLLM_VLORA_ROUTE_THRESHOLD.",
            show_default="a server's default",
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Say what would answer prompts that are sent with `model="auto"`.

    And what the router thinks of them: its likeliest tasks and their
    weights. No server and no base model is needed.

    Examples:
        vllm-vlora router ask ckpt "how many orders over 90?"
        vllm-vlora router ask ckpt - --blend 2 < prompt.txt
    """
    with reported(verbose):
        from vllm_vlora.blending.text_router import RoutePolicy, TextRouter
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.checkpoint.router_files import read_router_weights

        opened = Checkpoint.open(checkpoint)
        record = _record_of(opened, checkpoint)
        asked = TextRouter(
            record.tasks, record.temperature, read_router_weights(opened.path, record)
        )
        policy = RoutePolicy(blend) if threshold is None else RoutePolicy(blend, threshold)
        known = {*opened.tasks, *opened.aliases}
        prompts = [_from_stdin() if one == "-" else one for one in text]
        rows = [_describe_pick(asked, prompt, known, policy) for prompt in prompts]
        data = {"checkpoint": checkpoint, "threshold": policy.threshold, "prompts": rows}
        print_result(data, _print_picks, as_json)


@router.command(cls=Command)
def remove(
    checkpoint: CheckpointRef,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Take a checkpoint's router away.

    Example:
        vllm-vlora router remove ckpt
    """
    with reported(verbose, timeout):
        from vllm_vlora.editing.routing import remove_router

        remove_router(checkpoint)
        data = {"checkpoint": checkpoint, "removed": True}
        print_result(data, _print_removed, as_json)


def _record_of(checkpoint: Checkpoint, ref: str) -> RouterRecord:
    if checkpoint.router is None:
        raise CheckpointError(f"{ref} has no router; train one: vllm-vlora router train")
    return checkpoint.router


def _from_stdin() -> str:
    """Bytes that are no UTF-8 tell the router nothing."""
    return typer.get_binary_stream("stdin").read().decode(errors="replace")


# --- what is said ---------------------------------------------------------------------------------


def _describe_trained(
    trained: TrainedRouter, ref: str, checkpoint: Checkpoint, attached: bool
) -> dict[str, Any]:
    """What ``--json`` prints; the label of text of no task is ""."""
    from vllm_vlora.checkpoint.router_files import router_fit
    from vllm_vlora.tools.summary import hiding_auto, measured_rows

    rows = measured_rows(trained.measured)
    for row in rows:
        row["confidence"] = trained.confidence.get(row["task"])
        row["taken_for"] = trained.confusion[row["task"]]
    return {
        "checkpoint": ref,
        "attached": attached,
        "accuracy": trained.accuracy,
        "temperature": trained.temperature,
        "threshold": trained.threshold,
        "routed": trained.routed,
        "routed_right": trained.routed_right,
        "held_out": sum(row["held_out"] for row in rows),
        "tasks": rows,
        "unknown_tasks": router_fit(trained.tasks, checkpoint.tasks, checkpoint.aliases).unknown,
        "gone_tasks": [],
        "hidden_by": hiding_auto(checkpoint),
    }


def _print_trained(console: Console, found: dict[str, Any]) -> None:
    from rich.text import Text

    from vllm_vlora.tools.summary import line, make_table, print_router_fit, print_seldom_right
    from vllm_vlora.wording import some_of

    table = make_table(["Task"], ["Trained", "Held out", "Right", "Accuracy", "Confidence"])
    for row in found["tasks"]:
        sure = row["confidence"]
        table.add_row(
            Text(row["task"] or _OF_NO_TASK),
            *_numbers(row),
            "-" if sure is None else f"{sure:.3f}",
        )
    console.print(table)
    for row in found["tasks"]:
        wrong = sorted(
            ((n, other) for other, n in row["taken_for"].items() if other != row["task"]),
            key=lambda pair: (-pair[0], pair[1]),
        )
        if wrong:
            named = [f"{other or _OF_NO_TASK} ({n})" for n, other in wrong]
            line(console, f"{row['task'] or _OF_NO_TASK}: taken for {some_of(named, _NAMED)}")
    if found["held_out"]:
        line(
            console,
            f"Right: {found['accuracy']:.4f} of {found['held_out']} held-out prompts. Above the weight "
            f"of {found['threshold']:g}, below which the base model answers: {found['routed']}, of which "
            f"{found['routed_right']} right.",
            style="bold",
        )
    if found["attached"]:
        line(console, f'Attached to {found["checkpoint"]}: ask for model="auto".')
        print_router_fit(console, found)
    print_seldom_right(console, found["tasks"])


def _print_router(console: Console, found: dict[str, Any]) -> None:
    from rich.text import Text

    from vllm_vlora.tools.summary import make_table, print_router_fit, print_seldom_right

    table = make_table(["Task"], ["Trained", "Held out", "Right", "Accuracy"])
    for row in found["measured"]:
        table.add_row(Text(row["task"] or _OF_NO_TASK), *_numbers(row))
    console.print(table)
    print_router_fit(console, found)
    print_seldom_right(console, found["measured"])


def _numbers(row: dict[str, Any]) -> list[str]:
    accuracy = row["accuracy"]
    return [
        str(row["trained"]),
        str(row["held_out"]),
        str(row["right"]),
        "-" if accuracy is None else f"{accuracy:.3f}",
    ]


def _describe_pick(
    asked: TextRouter, prompt: str, known: Container[str], policy: RoutePolicy
) -> dict[str, Any]:
    """What ``--json`` prints of a prompt; ``model`` is null for the base model."""
    from vllm_vlora.blend_names import blend_text

    pick, weights = asked.pick(prompt, known, policy), asked.weights(prompt)
    labels = [*asked.tasks, ""]
    order = sorted(range(len(weights)), key=lambda place: -weights[place])[:_LIKELIEST]
    return {
        "prompt": prompt,
        "model": None if pick.blend is None else blend_text(pick.blend),
        "confidence": pick.confidence,
        "likeliest": [{"task": labels[n], "weight": float(weights[n])} for n in order],
    }


def _in_short(prompt: str) -> str:
    words = " ".join(prompt.split())
    return words if len(words) <= _PROMPT else words[: _PROMPT - 3] + "..."


def _print_picks(console: Console, data: dict[str, Any]) -> None:
    from rich.text import Text

    from vllm_vlora.tools.summary import make_table

    table = make_table(["Prompt", "Answered by", "Likeliest"], ["Confidence"])
    for row in data["prompts"]:
        likeliest = ", ".join(
            f"{one['task'] or _OF_NO_TASK} {one['weight']:.3f}" for one in row["likeliest"]
        )
        table.add_row(
            Text(_in_short(row["prompt"])),
            Text("the base model" if row["model"] is None else row["model"]),
            Text(likeliest),
            f"{row['confidence']:.3f}",
        )
    console.print(table)


def _print_removed(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.tools.summary import line

    line(console, f"Removed the router of {data['checkpoint']}.")
