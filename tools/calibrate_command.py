"""``calibrate``: gather what a base model's modules see, so that a fit can minimise that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.tools.common_options import (
    BatchSize,
    Device,
    ModelDtype,
    Timeout,
    force_option,
    output_option,
)
from vllm_vlora.tools.terminal import AsJson, Verbose, print_result, progress_bar, reported
from vllm_vlora.wording import count_of

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.fitting.calibration import Calibration


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The base model: a folder or a Hub id.")
    ],
    data: Annotated[
        list[Path],
        typer.Argument(metavar="DATA", help="Text like that of the tasks: .jsonl or .txt."),
    ],
    output: Annotated[Path, output_option()],
    max_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Stop after N tokens; 0: use all of the text."),
    ] = 65536,
    max_length: Annotated[
        int,
        typer.Option(metavar="N", help="Tokens of a row; plain text is split, the rest is cut."),
    ] = 512,
    batch_size: BatchSize = 4,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients/--no-gradients",
            help="Gather output gradients too, or inputs only, which often keeps less.",
        ),
    ] = True,
    full: Annotated[
        int, typer.Option(metavar="D", help="Keep moments of up to D dimensions whole.")
    ] = 2048,
    directions: Annotated[
        int,
        typer.Option(metavar="P", help="Directions kept of wider moments, beside a diagonal."),
    ] = 256,
    device: Device = None,
    dtype: ModelDtype = None,
    force: Annotated[bool, force_option("an existing calibration")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Gather second moments of a base model's modules on some text.

    A compression that is given them minimises what the model sees instead of
    plain differences of weights. One pass; the result serves every collection
    of adapters of this base model. Use text like that of the tasks, in the
    form that they are prompted in. Needs transformers.

    Examples:
        vllm-vlora calibrate org/model chats.jsonl -o calibration
        vllm-vlora calibrate models/llama a.jsonl b.txt -o moments --no-gradients
    """
    with reported(verbose, timeout):
        from vllm_vlora.atomic import check_apart, publish_folder
        from vllm_vlora.evaluation.base_model import quieten
        from vllm_vlora.evaluation.calibrate import GatherOptions
        from vllm_vlora.evaluation.calibrate import calibrate as run
        from vllm_vlora.fitting.calibration import calibration_files

        quieten()
        options = GatherOptions(
            max_tokens=max_tokens or None,
            max_length=max_length,
            batch_size=batch_size,
            gradients=gradients,
            full=full,
            directions=directions,
            device=device,
            dtype=dtype,
        )
        start = time.perf_counter()
        check_apart(output, data)
        # The output is claimed first: a folder that is in the way shows before the long pass.
        with publish_folder(output, force=force, owned=calibration_files) as folder:
            with progress_bar() as advance:
                calibration = run(model, data, options, advance)
            nbytes = calibration.write(folder)
        summary = summarize(calibration, output, nbytes, time.perf_counter() - start)
        print_result(summary, _print, as_json)


def summarize(
    calibration: Calibration, output: Path, nbytes: int, seconds: float
) -> dict[str, Any]:
    """What ``--json`` prints."""
    import msgspec

    from vllm_vlora.fitting.moments import FullMoment

    moments = calibration.moments
    return {
        "calibration": str(output),
        "bytes": nbytes,
        "seconds": seconds,
        "modules": len(calibration.modules),
        "moments": len(moments),
        "full_moments": sum(isinstance(moment, FullMoment) for moment in moments),
        **msgspec.to_builtins(calibration.source),
    }


def _print(console: Console, summary: dict[str, Any]) -> None:
    console.print(
        f"{count_of(summary['modules'], 'module')}, {count_of(summary['moments'], 'moment')} "
        f"({summary['full_moments']} whole), {count_of(summary['tokens'], 'token')} of "
        f"{count_of(summary['examples'], 'example')}"
    )
    size, seconds = summary["bytes"] / 1e6, summary["seconds"]
    console.print(f"Wrote {summary['calibration']} ({size:.1f} MB) in {seconds:.1f} s.")
