"""``push`` and ``pull``: checkpoints on the Hugging Face Hub, and pulled from URLs as well."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.tools.common_options import Timeout, force_option, output_option
from vllm_vlora.tools.terminal import AsJson, Verbose, print_result, reported
from vllm_vlora.wording import count_of

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.checkpoint.hub import PushReport


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

    Examples:
        vllm-vlora push ckpt org/my-tasks --private
        vllm-vlora serve org/my-tasks
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.hub import push_checkpoint

        report = push_checkpoint(
            checkpoint, repo, private=private or None, message=message, revision=revision
        )
        print_result(
            asdict(report), lambda console, _: _print_pushed(console, checkpoint, report), as_json
        )


def pull(
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="The repository, org/name or org/name@revision, or a URL."
        ),
    ],
    output: Annotated[Path, output_option()],
    force: Annotated[bool, force_option("a checkpoint at DIR")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Download a checkpoint from the Hugging Face Hub or a URL into a folder.

    Every file is checked against its digest before DIR appears. `serve`,
    `info` and the others also take a Hub id or a URL itself; pull is for a
    copy of your own.

    Examples:
        vllm-vlora pull org/my-tasks@v1 -o ckpt
        vllm-vlora pull s3://bucket/my-tasks -o ckpt
    """
    with reported(verbose, timeout):
        from vllm_vlora.checkpoint.hub import pull_checkpoint

        opened = pull_checkpoint(repo, output, force=force)
        data = {
            "repo": repo,
            "checkpoint": str(opened.path),
            "tasks": len(opened.tasks),
            "bytes": opened.nbytes,
        }
        print_result(data, _print_pulled, as_json)


def _print_pushed(console: Console, checkpoint: Path, report: PushReport) -> None:
    from vllm_vlora.checkpoint.card import format_bytes
    from vllm_vlora.tools.summary import line

    line(
        console,
        f"{checkpoint} -> {report.repo_id}@{report.revision}: {count_of(report.tasks, 'task')}, "
        f"{format_bytes(report.nbytes)}",
    )
    line(console, report.url)


def _print_pulled(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.checkpoint.card import format_bytes
    from vllm_vlora.tools.summary import line

    size = format_bytes(data["bytes"])
    line(
        console,
        f"{data['repo']} -> {data['checkpoint']}: {count_of(data['tasks'], 'task')}, {size}",
    )
