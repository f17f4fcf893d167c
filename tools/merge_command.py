"""``merge``: several adapters, or tasks of a checkpoint, become one."""

from __future__ import annotations

import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.errors import OptionError
from vllm_vlora.tools.common_options import (
    AllowLargeError,
    Timeout,
    adapters_argument,
    force_option,
    output_option,
)
from vllm_vlora.tools.terminal import (
    AsJson,
    Verbose,
    open_console,
    print_result,
    progress_bar,
    reported,
)
from vllm_vlora.wording import count_of, some_of

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.merging.blending import BlendedTask
    from vllm_vlora.merging.merging import MergedWeights
    from vllm_vlora.subspace.weights import LoRAWeights


class Method(str, Enum):
    """How updates become one."""

    average = "average"
    ties = "ties"
    dare = "dare"


def merge(
    adapters: Annotated[list[str], adapters_argument("; with --checkpoint, tasks of it")],
    output: Annotated[Path | None, output_option("The PEFT folder to write.")] = None,
    method: Annotated[Method, typer.Option(help="Weighted sum, TIES or DARE.")] = Method.average,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="One weight each. Default: 1 / N; 1 for ties, which takes a mean itself.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="D", help="ties: share of elements to keep. Default: 0.5."),
    ] = None,
    drop_rate: Annotated[
        float | None,
        typer.Option(metavar="P", help="dare: probability to drop an element. Default: 0.5."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="dare: of the random masks.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            help="The most that a layer may have. Default: for average what is exact, else the "
            "largest among the adapters.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="Merge tasks of this checkpoint.", show_default=False),
    ] = None,
    new_task: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="TASK",
            help="With --checkpoint: write the weighted sum into CKPT as this task.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="With --as: what TASK is stored in, as bfloat16, int8 or nf4-dq. Default: float32, "
            "which loses nothing.",
            show_default=False,
        ),
    ] = None,
    allow_large_error: AllowLargeError = False,
    force: Annotated[bool, force_option("an adapter at DIR, or TASK in CKPT")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Merge adapters into one: weighted sum, TIES or DARE.

    The sum is exact, in stacked factors. TIES and DARE choose elements of the
    updates, so their result is cut to a rank, and what that loses is said.
    Ranks and alphas may differ.

    Examples:
        vllm-vlora merge lora-a lora-b -o merged --weights 0.7,0.3
        vllm-vlora merge adapters/ -o merged --method ties --density 0.3 --rank 32
        vllm-vlora merge --checkpoint ckpt summarize translate --as both
        vllm-vlora merge --checkpoint ckpt sql fr --as both --format nf4-dq
    """
    with reported(verbose, timeout):
        chosen = _parse_weights(weights)
        options = _method_options(method, density, drop_rate, seed, rank)
        if checkpoint is not None and len(set(adapters)) < len(adapters):
            raise OptionError("a task is named twice; name each once, with one weight")
        if new_task is not None:
            _check_blend(checkpoint, output, method)
            assert checkpoint is not None
            blended = _blend(
                checkpoint,
                adapters,
                chosen,
                new_task,
                {
                    "rank": rank,
                    "format": format or "float32",
                    "replace": force,
                    "allow_large_error": allow_large_error,
                },
            )
            print_result(_describe_blend(blended, checkpoint), _print_blend, as_json)
            return
        if allow_large_error:
            raise OptionError("--allow-large-error is for a task in a checkpoint; give --as too")
        if format is not None:
            raise OptionError("--format is for a task in a checkpoint; give --checkpoint and --as")
        if output is None:
            raise OptionError("nowhere to write; give -o DIR, or --checkpoint CKPT --as TASK")
        _check_absent(output, force)
        names, opened, found = _read(adapters, checkpoint, output)
        if len(opened) < 2:
            raise OptionError(
                f"{count_of(len(opened), 'adapter')} given; name at least two to merge"
            )
        from vllm_vlora.merging.merging import MERGE_METHODS
        from vllm_vlora.subspace.weights import save_adapter
        from vllm_vlora.tools.summary import print_warnings

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            merged = MERGE_METHODS[method.value](opened, weights=chosen, **options)
        found += [str(warning.message) for warning in said]
        print_warnings(open_console(stderr=True), found)
        folder = save_adapter(merged, output, force=force)
        data = _describe(merged, names, method, chosen, folder) | {"warnings": found}
        print_result(data, _print, as_json)


def _parse_weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(
            f"--weights {text!r} is not numbers between commas; write it as 0.7,0.3"
        ) from error


def _method_options(
    method: Method,
    density: float | None,
    drop_rate: float | None,
    seed: int | None,
    rank: int | None,
) -> dict[str, Any]:
    """Arguments of the method; an option of another method is an error, not ignored."""
    given = {"density": density, "drop_rate": drop_rate, "seed": seed}
    own = {Method.average: (), Method.ties: ("density",), Method.dare: ("drop_rate", "seed")}
    for name, value in given.items():
        if value is not None and name not in own[method]:
            other = next(m.value for m, names in own.items() if name in names)
            raise OptionError(
                f"--{name.replace('_', '-')} is for --method {other}; leave it out with "
                f"{method.value}"
            )
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return {**options, "rank": rank}


def _check_absent(output: Path, force: bool) -> None:
    """What is in the way is found now, and not after a long merge."""
    from vllm_vlora.atomic import exists_error

    taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if taken and not force:
        raise exists_error(output)


def _read(
    refs: list[str], checkpoint: str | None, output: Path
) -> tuple[list[str], list[LoRAWeights], list[str]]:
    """Names, weights, and what was found in them and is not followed."""
    from vllm_vlora.atomic import check_apart
    from vllm_vlora.tools.summary import having_companions, print_left_behind

    messages = open_console(stderr=True)
    with progress_bar(messages) as advance:
        if checkpoint is not None:
            from vllm_vlora.checkpoint.reader import Checkpoint
            from vllm_vlora.merging.blending import read_tasks

            advance("read", 0, 1)
            opened = Checkpoint.open(checkpoint)
            check_apart(output, [opened.path])
            weights = read_tasks(opened, refs)
            for task, read_task in zip(refs, weights):
                read_task.name = task
            print_left_behind(messages, [task for task in refs if task in opened.attachments])
            return refs, weights, []
        from vllm_vlora.adapters.collection import reading_warnings
        from vllm_vlora.subspace.weights import LoRAWeights
        from vllm_vlora.tools.inputs import collect_shown

        adapters = collect_shown(refs, [], messages).adapters
        check_apart(output, [adapter.path for adapter in adapters.values()])
        print_left_behind(messages, having_companions(adapters))
        read = []
        for done, adapter in enumerate(adapters.values(), 1):
            read.append(LoRAWeights.from_adapter(adapter))
            advance("read", done, len(adapters))
        return list(adapters), read, reading_warnings(adapters)


def _check_blend(checkpoint: str | None, output: Path | None, method: Method) -> None:
    if checkpoint is None:
        raise OptionError("--as writes into a checkpoint; name it with --checkpoint CKPT")
    if output is not None:
        raise OptionError("--as writes into the checkpoint and -o an adapter; give one of them")
    if method is not Method.average:
        raise OptionError(
            f"--as stores a weighted sum, which {method.value} is not; write the merge with -o DIR "
            "and `vllm-vlora add` it"
        )


def _blend(
    checkpoint: str,
    tasks: list[str],
    weights: list[float] | None,
    new_task: str,
    options: dict[str, Any],
) -> BlendedTask:
    from vllm_vlora.merging.blending import blend_tasks

    chosen = [1 / len(tasks)] * len(tasks) if weights is None else weights
    if len(chosen) != len(tasks):
        raise OptionError(
            f"{count_of(len(chosen), 'weight')} for {count_of(len(tasks), 'task')}; give one weight each"
        )
    named = dict(zip(tasks, chosen))
    return blend_tasks(checkpoint, named, new_task, **options)


def _describe_blend(blended: BlendedTask, checkpoint: str) -> dict[str, Any]:
    low, high = blended.ranks
    return {
        "checkpoint": checkpoint,
        "task": blended.task_id,
        "stored_as": blended.representation,
        "min_rank": low,
        "max_rank": high,
        "bytes": blended.nbytes,
        "error": blended.error,
        "losses": blended.losses.to_dict(),
        "left_behind": list(blended.left_behind),
    }


def _print_blend(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.checkpoint.card import format_bytes
    from vllm_vlora.tools.summary import format_range, line, print_losses

    line(
        console,
        f"Wrote task {data['task']} into {data['checkpoint']}: {data['stored_as']}, rank "
        f"{format_range(data['min_rank'], data['max_rank'])}, {format_bytes(data['bytes'])}, "
        f"relative error {data['error']:.2g}.",
    )
    print_losses(console, data["losses"])
    if data["left_behind"]:
        line(
            console,
            f"Not in it, since the tasks have others: {', '.join(data['left_behind'])}",
            style="yellow",
        )


def _describe(
    merged: MergedWeights,
    names: list[str],
    method: Method,
    weights: list[float] | None,
    folder: Path,
) -> dict[str, Any]:
    default = 1.0 if method is Method.ties else 1 / len(names)
    return {
        "output": str(folder),
        "method": method.value,
        "adapters": names,
        "weights": [default] * len(names) if weights is None else weights,
        "seed": merged.seed,
        "modules": len(merged.layer_names),
        "max_rank": merged.rank,
        "truncation_error": merged.truncation_error,
        "adds_nothing": merged.adds_nothing,
    }


def _print(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.tools.summary import line

    terms = ", ".join(
        f"{weight:g} {name}" for name, weight in zip(data["adapters"], data["weights"])
    )
    seed = "" if data["seed"] is None else f", seed {data['seed']}"
    line(console, f"Merged {terms} ({data['method']}{seed}).")
    lost = data["truncation_error"]
    said = f"cutting it to this rank lost {lost:.1%} of its norm" if lost else "exact"
    line(
        console,
        f"{data['output']}: {count_of(data['modules'], 'module')}, rank up to {data['max_rank']}; "
        f"{said}.",
    )
    if lost:
        line(console, "A larger --rank loses less.", style="dim")
    if data["adds_nothing"]:
        what = count_of(len(data["adds_nothing"]), "module")
        line(console, f"Nothing is left of {what}: {some_of(data['adds_nothing'])}", style="yellow")
