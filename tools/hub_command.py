"""``push`` and ``pull``: checkpoints on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_vlora.tools.terminal import AsJson, Verbose, open_console, print_json, reported


def push(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="The checkpoint to upload: a folder.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository, as org/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is made now.")
    ] = False,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH",
            help="The branch to write, made if there is none. Default: main.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Upload a checkpoint with its model card to the Hugging Face Hub.

    The checkpoint is checked first, and uploaded as one commit: nobody meets
    half of it. The token is HF_TOKEN, or that of `hf auth login`.

    [bold]Examples[/bold]

    vllm-vlora push ckpt org/my-tasks --private

    VLLM_VLORA_CHECKPOINT=org/my-tasks vllm serve BASE_MODEL --enable-lora
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.card import format_bytes
        from vllm_vlora.checkpoint.hub import push_checkpoint
        from vllm_vlora.tools import summary as show

        report = push_checkpoint(
            checkpoint, repo, private=private or None, message=message, revision=revision
        )
        if as_json:
            print_json(asdict(report))
            return
        console = open_console()
        show.line(
            console,
            f"{checkpoint} -> {report.repo_id}@{report.revision}: {report.tasks} tasks, "
            f"{format_bytes(report.nbytes)}",
        )
        show.line(console, report.url)


def pull(
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="The repository: org/name or org/name@revision.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at DIR.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Download a checkpoint from the Hugging Face Hub into a folder.

    Every file is checked against its digest before DIR appears. `serve`,
    `info` and the others also take a Hub id itself; pull is for a copy of
    your own.

    [bold]Example[/bold]

    vllm-vlora pull org/my-tasks@v1 -o ckpt
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.card import format_bytes
        from vllm_vlora.checkpoint.hub import pull_checkpoint
        from vllm_vlora.tools import summary as show

        opened = pull_checkpoint(repo, output, force=force)
        if as_json:
            print_json(
                {
                    "repo": repo,
                    "checkpoint": str(opened.path),
                    "tasks": len(opened.tasks),
                    "bytes": opened.nbytes,
                }
            )
            return
        show.line(
            open_console(),
            f"{repo} -> {opened.path}: {len(opened.tasks)} tasks, {format_bytes(opened.nbytes)}",
        )
