"""``reconstruct``: lorashare's name for taking adapters out of a checkpoint, of any kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vlora.tools.common_options import Timeout, all_option, force_option, output_option
from vllm_vlora.tools.exporting import show_folders, write_folders
from vllm_vlora.tools.terminal import AsJson, Verbose, open_console, reported

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.reader import Checkpoint


def reconstruct(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A checkpoint of ours, of lorashare or of vlora: a folder or a Hub id.",
        ),
    ],
    output: Annotated[Path, output_option()],
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The adapter to take out.", show_default=False),
    ] = None,
    everything: Annotated[bool, all_option("adapter")] = False,
    force: Annotated[bool, force_option("existing adapter folders")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write adapters of a checkpoint as standard PEFT folders.

    As `export` does, under lorashare's options, and from checkpoints of
    lorashare and vlora too. --adapter makes DIR itself the adapter, --all
    makes DIR/NAME for each, in a form of the name that every file system
    allows.

    Examples:
        vllm-vlora reconstruct ckpt --adapter cola -o cola-lora
        vllm-vlora reconstruct org/share-checkpoint --all -o adapters/
    """
    if everything == (adapter is not None):
        raise typer.BadParameter(
            "give --adapter NAME or --all, one of them", param_hint="--adapter"
        )
    with reported(verbose, timeout):
        from vllm_vlora.checkpoint.export import export_task

        with _opened(checkpoint) as opened:
            if adapter is not None:
                folders = {adapter: export_task(opened, adapter, output, force=force)}
            else:
                folders = write_folders(opened, opened.tasks, output, "reconstruct", force=force)
        show_folders(folders, as_json)


@contextmanager
def _opened(ref: str) -> Iterator[Checkpoint]:
    """A checkpoint of ours, or another package's, converted into a folder that is removed again."""
    from tempfile import TemporaryDirectory

    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.sources import checkpoint_folder
    from vllm_vlora.foreign.convert import convert, detect_kind
    from vllm_vlora.tools.summary import print_warnings

    folder = checkpoint_folder(ref, foreign=True)
    if detect_kind(folder) not in ("vlora", "lorashare"):
        yield Checkpoint.open(folder)
        return
    with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
        report = convert(folder, Path(scratch) / "converted")
        print_warnings(open_console(stderr=True), report.warnings)
        yield Checkpoint.open(report.path)
