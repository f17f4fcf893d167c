"""From a folder of adapters to one checkpoint, and a task of it back to a PEFT folder.

    python examples/quickstart.py                                   # the demo's ten adapters
    python examples/quickstart.py my-adapters/ -o my-checkpoint --ratio 8

Needs no GPU and no base model. What it does, the command line does as well:

    vllm-vlora compress ADAPTERS -o CKPT --ratio 6
    vllm-vlora validate CKPT
    vllm-vlora export CKPT TASK -o CKPT-TASK
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_vlora import (
    Adapter,
    Checkpoint,
    CompressOptions,
    CompressReport,
    VLoRAError,
    compress,
    export_task,
    open_adapter,
    validate,
)

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        adapters = open_all(options.adapters)
        print(f"{len(adapters)} adapters in {options.adapters}")
        report = compress(
            adapters, options.output, CompressOptions(ratio=options.ratio), force=options.force
        )
        print_report(report)
        problems = validate(options.output)
        print(f"{options.output}: {'; '.join(problems) or 'every file read, nothing wrong'}")
        worst = max(report.tasks, key=lambda task: task.error)
        folder = options.output.with_name(f"{options.output.name}-{worst.task_id}")
        export_task(Checkpoint.open(options.output), worst.task_id, folder, force=options.force)
        print(f"{worst.task_id}, which lost most, as a PEFT folder again: {folder}")
    except VLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"serve: vllm-vlora serve {options.output}")
    return 1 if problems else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "adapters", type=Path, nargs="?", default=HERE / "demo" / "adapters", help="PEFT folders"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("quickstart-checkpoint"), help="folder to write"
    )
    parser.add_argument(
        "--ratio", type=float, default=6.0, help="times smaller than 16-bit LoRA (default 6)"
    )
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    return parser.parse_args(arguments)


def open_all(folder: Path) -> dict[str, Adapter]:
    """Task id -> adapter, for every adapter below ``folder``; only headers are read."""
    found = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
    return {path.name: open_adapter(path) for path in found}


def print_report(report: CompressReport) -> None:
    """What every task takes now, and how far its update is from the original's."""
    print(f"{'task':<16} {'KB':>8} {'now':>8} {'error':>7}  stored as")
    for task in report.tasks:
        print(
            f"{task.task_id:<16} {task.original_nbytes / 1000:8,.1f} {task.nbytes / 1000:8,.1f} "
            f"{task.error:7.4f}  {task.representation}, {task.format}"
        )
    print(
        f"{report.ratio:.1f} times smaller than the adapters at 16 bits; "
        f"relative error {report.mean_error:.4f} on average, {report.worst_error:.4f} at worst"
    )


if __name__ == "__main__":
    sys.exit(main())
