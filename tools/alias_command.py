"""``alias``: other names for tasks, blends and canaries of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.errors import OptionError
from vllm_vlora.tools.common_options import Timeout
from vllm_vlora.tools.terminal import AsJson, CheckpointRef, Verbose, print_result, reported

if TYPE_CHECKING:
    from rich.console import Console


def alias(
    checkpoint: CheckpointRef,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The alias.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Argument(metavar="TASK", help="The task it stands for.", show_default=False),
    ] = None,
    blend: Annotated[
        str | None,
        typer.Option(metavar="BLEND", help="The blend it stands for.", show_default=False),
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option(
            metavar="TARGETS",
            help="Tasks or blends and their shares: 'A 90, B 10'.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away.")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Name tasks, blends and canaries of a checkpoint, or list the names.

    Requests may use an alias as `model`. A canary answers a client, who is
    told by X-VLora-Key or `user`, always with the same target. Weights stay
    as they are; CKPT changes at once or not at all.

    Examples:
        vllm-vlora alias ckpt
        vllm-vlora alias ckpt prod-sql sql-v7
        vllm-vlora alias ckpt prod-sql --canary "sql-v7 90, sql-v8 10"
        vllm-vlora alias ckpt mixed --blend "sql*0.7+french*0.3"
        vllm-vlora alias ckpt prod-sql --remove
    """
    targets = {"task": task, "blend": blend, "canary": canary}
    given = {kind: text for kind, text in targets.items() if text is not None}
    with reported(verbose, timeout):
        if name is None and (given or remove):
            raise OptionError("name the alias: vllm-vlora alias CKPT NAME ...")
        if name is not None and len(given) + remove != 1:
            raise OptionError("give one of TASK, --blend, --canary and --remove")
        if name is not None:
            _change(checkpoint, name, given)
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.tools.summary import describe_aliases

        opened = Checkpoint.open(checkpoint, manifest_only=True)
        data = {"checkpoint": checkpoint, "aliases": describe_aliases(opened.aliases)}
        print_result(data, _print_aliases, as_json)


def _change(checkpoint: str, name: str, given: dict[str, str]) -> None:
    """Set an alias to what is given; remove it where that is nothing."""
    from vllm_vlora.editing.aliasing import remove_alias, set_alias

    if not given:
        remove_alias(checkpoint, name)
    for kind, text in given.items():
        set_alias(checkpoint, name, text, kind=kind)


def _print_aliases(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.tools.summary import line, print_aliases

    print_aliases(console, data["aliases"])
    if not data["aliases"]:
        line(console, f"{data['checkpoint']} has no aliases.")
