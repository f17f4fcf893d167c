"""``serve``: start vLLM with a checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vlora.tools.terminal import Verbose, open_console, reported

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.reader import Checkpoint

_PLUGIN = "vlora"
# Ours where they stand behind CKPT as well, up to a "--".
_SHOW_ONLY = ("--dry-run", "--print")
_BASE = "--base"

SERVE_SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""How the command is registered: what stands behind CKPT is vLLM's, whatever it looks like."""


def serve(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CKPT", help="The checkpoint: a folder, a Hub id or a URL."),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VLLM OPTIONS",
            help="Options of `vllm serve`, passed on as they are; behind `--` everything is.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model's folder or Hub id. Default: the one that the checkpoint names.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", "--print", help="Show the line that would run, and run nothing."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Serve every task of a checkpoint: start `vllm serve` with the right options.

    Sets VLLM_VLORA_CHECKPOINT, --enable-lora, --max-lora-rank and --max-loras
    (distinct tasks in one batch: all, at most 256; with
    VLLM_VLORA_MODE=materialize at most 8, as each takes memory), and names the
    base model. An option that you give yourself takes the place of ours.
    --base and --dry-run may stand before CKPT or behind it.

    The line that runs is shown, ready to paste. This process becomes vLLM:
    signals and exit codes are vLLM's own.

    Examples:
        vllm-vlora serve my-tasks
        vllm-vlora serve my-tasks --port 8001 --max-model-len 4096
        vllm-vlora serve org/my-tasks --base models/llama --tensor-parallel-size 4
        vllm-vlora serve org/my-tasks@main@sha256:DIGEST   # what `info` shows
        vllm-vlora serve my-tasks --dry-run
        vllm-vlora serve my-tasks -- --help
    """
    ours, bases, passed = _split(options or [])
    if "--help" in ours or "-h" in ours:
        typer.echo(context.get_help())
        return
    with reported(verbose):
        from vllm_vlora.checkpoint.pinning import absolute_ref
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.checkpoint.serving import CHECKPOINT_VARIABLE, shell_line
        from vllm_vlora.plugin.memory import refuse_unserved
        from vllm_vlora.wording import without_secrets

        given = _base([*([] if base is None else [base]), *bases])
        show_only = dry_run or any(word in _SHOW_ONLY for word in ours)
        opened = Checkpoint.open(checkpoint, manifest_only=show_only)
        refuse_unserved(opened)
        _check_plugins(os.environ)
        where, model = absolute_ref(checkpoint), _model(opened, given)
        arguments = ["serve", model, *_missing_options(opened, passed), *passed]
        shown_where = without_secrets(where)
        if show_only:
            typer.echo(shell_line(shown_where, ["vllm", *arguments]))
            return
        program = _vllm()
        shown = shell_line(
            shown_where, [Path(program).name if shutil.which("vllm") else program, *arguments]
        )
        open_console(stderr=True).print(shown, soft_wrap=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(program, [program, *arguments], {**os.environ, CHECKPOINT_VARIABLE: where})


def _split(words: Sequence[str]) -> tuple[list[str], list[str | None], list[str]]:
    """Our own flags behind CKPT, the values of --base there (None: missing), and what vLLM gets.

    The first ``--`` ends what is ours.
    """
    cut = words.index("--") if "--" in words else len(words)
    flags = {*_SHOW_ONLY, "--help", "-h"}
    ours, passed = list[str](), list[str]()
    bases = list[str | None]()
    before = iter(words[:cut])
    for word in before:
        if word in flags:
            ours.append(word)
        elif word == _BASE:
            bases.append(next(before, None))
        elif word.startswith(f"{_BASE}="):
            bases.append(word.removeprefix(f"{_BASE}="))
        else:
            passed.append(word)
    return ours, bases, passed + list(words[cut + 1 :])


def _base(given: Sequence[str | None]) -> str | None:
    """The base model that is named before CKPT or behind it, if one is.

    Raises:
        OptionError: several are, or the option has no value.
    """
    from vllm_vlora.errors import OptionError

    if None in given:
        raise OptionError("--base needs a value, the base model's folder or Hub id")
    if len(given) > 1:
        raise OptionError("--base is given twice; name one base model")
    return given[0] if given else None


def _model(checkpoint: Checkpoint, base: str | None) -> str:
    """The base model to serve; its name must not become an option.

    Raises:
        OptionError: none is given and none recorded, or it is no name.
    """
    from vllm_vlora.checkpoint.serving import is_model_name
    from vllm_vlora.errors import OptionError

    model = base if base is not None else checkpoint.base_model
    if model is None:
        raise OptionError(f"{checkpoint.path} names no base model; give it: --base MODEL")
    if not is_model_name(model):
        raise OptionError(f"the base model {model!r} is no name of a model; give one: --base MODEL")
    return model


def _missing_options(checkpoint: Checkpoint, given: Sequence[str]) -> list[str]:
    """What vLLM needs to serve every task, but for the options that are given.

    Raises:
        OptionError: an option switches LoRA off.
    """
    from vllm_vlora.checkpoint.serving import serve_options
    from vllm_vlora.errors import OptionError
    from vllm_vlora.plugin.settings import read_settings

    # vLLM reads --max_loras as --max-loras.
    if "--no-enable-lora" in given:
        raise OptionError("--no-enable-lora takes away what tasks need; leave it out")
    names = {word.partition("=")[0].replace("_", "-") for word in given if word.startswith("--")}
    materialize = not read_settings().direct
    wanted = serve_options(checkpoint.max_rank, len(checkpoint.tasks), materialize=materialize)
    return [
        word
        for name, value in wanted.items()
        if name not in names
        for word in (name, value)
        if word is not None
    ]


def _check_plugins(environment: Mapping[str, str]) -> None:
    """vLLM loads the plugins that VLLM_PLUGINS names, and without the variable all of them."""
    from vllm_vlora.errors import SettingError

    named = environment.get("VLLM_PLUGINS")
    if named is not None and _PLUGIN not in named.split(","):
        raise SettingError(
            f"VLLM_PLUGINS={named!r} leaves this plugin out, and vLLM would serve no task; add "
            f"{_PLUGIN}, or unset it"
        )


def _vllm() -> str:
    """The ``vllm`` command: on PATH, or beside this Python, whose folder need not be on it.

    Raises:
        SettingError: there is none.
    """
    from vllm_vlora.errors import SettingError

    found = shutil.which("vllm") or shutil.which("vllm", path=str(Path(sys.executable).parent))
    if found is None:
        raise SettingError(
            "there is no vllm command on PATH; install it with pip install 'vllm-vlora[serve]'"
        )
    return found
