"""The command line. Torch and the library are imported by the commands, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora._version import __version__
from vllm_vlora.tools.add_command import add, remove
from vllm_vlora.tools.alias_command import alias
from vllm_vlora.tools.analyze_command import analyze
from vllm_vlora.tools.benchmark_command import benchmark
from vllm_vlora.tools.cache_command import cache
from vllm_vlora.tools.calibrate_command import calibrate
from vllm_vlora.tools.common_options import (
    Originals,
    Timeout,
    all_option,
    force_option,
    output_option,
)
from vllm_vlora.tools.compress_command import compress
from vllm_vlora.tools.convert_command import convert
from vllm_vlora.tools.diff_command import diff
from vllm_vlora.tools.evaluate_command import evaluate
from vllm_vlora.tools.exporting import show_folders, write_folders
from vllm_vlora.tools.hub_command import pull, push
from vllm_vlora.tools.merge_command import merge
from vllm_vlora.tools.parsing import SETTINGS, Command, Group
from vllm_vlora.tools.ready_command import ready
from vllm_vlora.tools.reconstruct_command import reconstruct
from vllm_vlora.tools.router_command import router
from vllm_vlora.tools.serve_command import SERVE_SETTINGS, serve
from vllm_vlora.tools.terminal import (
    EXIT_CHECK_FAILED,
    AsJson,
    CheckpointRef,
    Verbose,
    prepare_process,
    print_result,
    progress_bar,
    reported,
)
from vllm_vlora.tools.top_command import top
from vllm_vlora.wording import count_of

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="vllm-vlora",
    no_args_is_help=True,
    add_completion=False,
    cls=Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def main() -> None:
    """Run the command line; see the module's exit codes."""
    # A signal before there is anything to clean up ends the program as it ends any other.
    command = typer.main.get_command(app)
    prepare_process()
    command()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-vlora {__version__}")
        raise typer.Exit


@app.callback()
def vllm_vlora(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Compress LoRA adapters into one checkpoint that vLLM serves whole.

    Example:
        vllm-vlora compress adapters/ -o ckpt --ratio 6
        vllm-vlora info ckpt
        vllm-vlora serve ckpt

    Exit codes: 0 done; 1 the check failed, or the budget cannot be met; 2
    the call or its input is wrong.
    """


_MAKE, _LOOK = "Make and change checkpoints", "Look and judge"
_SERVE, _TAKE, _ADAPTERS = "Serve", "Take out and pass on", "Adapters"

app.command(cls=Command, rich_help_panel=_MAKE)(compress)


@app.command(cls=Command, rich_help_panel=_LOOK)
def info(
    checkpoint: CheckpointRef,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Plan rebuilds, and say whether one would pay."),
    ] = False,
    originals: Originals = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint holds, how to serve it and whether to rebuild it.

    Reads what names the tasks only, unless --rebuild is given; `validate`
    reads everything.

    Examples:
        vllm-vlora info ckpt
        vllm-vlora info org/checkpoint --json
        vllm-vlora info ckpt --rebuild --originals adapters/
    """
    if originals is not None and not rebuild:
        raise typer.BadParameter("is for --rebuild; give both or none", param_hint="--originals")
    with reported(verbose):
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.tools import rebuild_advice as advice
        from vllm_vlora.tools import summary as show

        opened = Checkpoint.open(checkpoint, manifest_only=not rebuild)
        data = show.summarize(opened, checkpoint)
        data["rebuild"] = advice.advise(opened)
        if rebuild:
            with progress_bar() as advance:
                data["rebuild"]["prediction"] = advice.predict(opened, originals, advance)
        print_result(data, _print_info, as_json)


def _print_info(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.tools import rebuild_advice as advice
    from vllm_vlora.tools import summary as show

    show.print_overview(console, data)
    show.print_attachments(console, data)
    show.print_aliases(console, data["aliases"])
    show.print_router(console, data["router"])
    show.print_modules(console, data)
    show.print_tasks(console, data)
    show.print_losses(console, data["losses"])
    advice.print_advice(console, data["rebuild"])
    show.print_serving(console, data)


@app.command(cls=Command, rich_help_panel=_LOOK)
def validate(
    checkpoint: CheckpointRef,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Read every file of a checkpoint and report what is wrong with it.

    Exit code 0: sound. 1: problems found, one line each. 2: there is no
    checkpoint there, or a newer version wrote it.

    Example:
        vllm-vlora validate ckpt && rsync -a ckpt server:/models/
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.validation import validate as run

        with progress_bar() as advance:
            problems = run(checkpoint, progress=lambda _, done, all_: advance("read", done, all_))
        from vllm_vlora.checkpoint.reader import Checkpoint

        content = None if problems else f"sha256:{Checkpoint.open(checkpoint).content_digest}"
        data = {
            "checkpoint": checkpoint,
            "sound": not problems,
            "content": content,
            "problems": problems,
        }
        print_result(data, _print_problems, as_json)
        if problems:
            raise typer.Exit(EXIT_CHECK_FAILED)


def _print_problems(console: Console, data: dict[str, Any]) -> None:
    from vllm_vlora.tools.summary import line

    for problem in data["problems"]:
        line(console, problem)
    found = (
        f"sound, {data['content']}" if data["sound"] else count_of(len(data["problems"]), "problem")
    )
    line(console, f"{data['checkpoint']}: {found}", style="bold")


@app.command(cls=Command, rich_help_panel=_TAKE)
def export(
    checkpoint: CheckpointRef,
    output: Annotated[Path, output_option()],
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="TASK", help="The tasks to take out.", show_default=False),
    ] = None,
    everything: Annotated[bool, all_option("task")] = False,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="A",
            help="Write this lora_alpha, and B to match. Default: the task's.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Write this base model. Default: the task's.", show_default=False
        ),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Write these target modules; they must select what is adapted. Default: full names.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, force_option("existing adapter folders")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Turn tasks back into standard PEFT folders.

    PEFT and vLLM load them without this package. One TASK makes DIR itself
    the adapter; several, or --all, make DIR/NAME for each, NAME being the
    task id in a form that every file system allows.

    Examples:
        vllm-vlora export ckpt summarize -o summarize-lora
        vllm-vlora export ckpt --all -o adapters/
    """
    if everything == bool(tasks):
        raise typer.BadParameter("name the tasks to export, or give --all", param_hint="TASK")
    with reported(verbose, timeout):
        from vllm_vlora.checkpoint.export import ConfigChanges, export_task
        from vllm_vlora.checkpoint.reader import Checkpoint, read_one_state

        targets = None if target_modules is None else tuple(target_modules.split(","))
        changes = ConfigChanges(alpha, base_model, targets)

        def write(opened: Checkpoint) -> dict[str, Path]:
            wanted = list(dict.fromkeys(tasks or opened.tasks))
            if len(wanted) == 1 and not everything:
                folder = export_task(opened, wanted[0], output, force=force, changes=changes)
                return {wanted[0]: folder}
            return write_folders(opened, wanted, output, "export", force=force, changes=changes)

        show_folders(read_one_state(checkpoint, write), as_json)


@app.command(cls=Command, rich_help_panel=_SERVE)
def plan(
    checkpoint: CheckpointRef,
    max_loras: Annotated[
        int, typer.Option(metavar="N", help="vLLM's --max-loras: tasks in one batch.")
    ],
    tp: Annotated[
        int, typer.Option("--tp", metavar="T", help="vLLM's --tensor-parallel-size.")
    ] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="FLOAT", help="The engine's dtype: bf16, fp16 or fp32.")
    ] = "bf16",
    max_lora_rank: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            help="vLLM's --max-lora-rank. Default: the least that holds the checkpoint.",
            show_default=False,
        ),
    ] = None,
    peft_slots: Annotated[
        int,
        typer.Option(metavar="P", help="VLLM_VLORA_SLOTS: slots beside the tasks that run direct."),
    ] = 8,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The served model's folder or config.json (Llama-like): counts the slots of all "
            "its layers.",
        ),
    ] = None,
    lora_target_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="vLLM's --lora-target-modules. May be repeated.",
            show_default=False,
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int, typer.Option(metavar="N", help="vLLM's option of that name.")
    ] = 8192,
    packed_basis: Annotated[
        bool, typer.Option("--packed-basis", help="VLLM_VLORA_BASIS=packed.")
    ] = False,
    basis_rows: Annotated[int, typer.Option(metavar="N", help="VLLM_VLORA_BASIS_ROWS.", min=0)] = 0,
    narrow_rows: Annotated[
        bool, typer.Option("--narrow-rows", help="VLLM_VLORA_ROWS=narrow.")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", help="Say what fits into this many GiB for adapters a device.", min=0
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Also show the share of a GPU of this size.", min=0),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="For vLLM's CPU build, which takes one slot more.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Count the memory that serving a checkpoint takes, in every mode.

    Beside stock vLLM with the same adapters. Reads the two JSON files only:
    nothing is loaded, no GPU is needed.

    Examples:
        vllm-vlora plan ckpt --max-loras 64
        vllm-vlora plan ckpt --max-loras 256 --tp 4 --model models/Llama-2-7b
        vllm-vlora plan ckpt --max-loras 64 --memory 8 --gpu-memory 80
    """
    with reported(verbose):
        from vllm_vlora.checkpoint.reader import Checkpoint
        from vllm_vlora.plugin.memory import plan_memory
        from vllm_vlora.plugin.model_layers import read_model_shape
        from vllm_vlora.tools import memory_table as show

        found = plan_memory(
            Checkpoint.open(checkpoint, manifest_only=True),
            max_loras=max_loras,
            tp=tp,
            dtype=dtype,
            max_lora_rank=max_lora_rank,
            peft_slots=peft_slots,
            model=read_model_shape(model) if model is not None else None,
            target_modules=lora_target_modules,
            max_num_batched_tokens=max_num_batched_tokens,
            packed_basis=packed_basis,
            basis_rows=basis_rows,
            narrow_rows=narrow_rows,
            memory=None if memory is None else show.gib(memory),
            cpu=cpu,
        )
        gpu_nbytes = None if gpu_memory is None else show.gib(gpu_memory)
        data = show.describe(found, checkpoint, gpu_nbytes)
        print_result(data, show.print_plan, as_json)


app.command(cls=Command, rich_help_panel=_SERVE, context_settings=SERVE_SETTINGS)(serve)
app.command(cls=Command, rich_help_panel=_SERVE)(ready)
app.command(cls=Command, rich_help_panel=_SERVE)(top)
app.add_typer(router, name="router", rich_help_panel=_MAKE)

for panel, commands in (
    (_MAKE, (add, remove, alias, calibrate, convert)),
    (_LOOK, (evaluate, benchmark)),
    (_TAKE, (reconstruct, push, pull, cache)),
    (_ADAPTERS, (analyze, diff, merge)),
):
    for command in commands:
        app.command(cls=Command, rich_help_panel=panel)(command)
