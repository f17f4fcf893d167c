"""What private tasks keep in trellis codes, beside NF4, at the same size.

    python benchmarks/fidelity/hard/trellis.py                     measure what is missing, then the table
    python benchmarks/fidelity/hard/trellis.py prose-unrelated --ratios 8 16

Both are written as ``vllm-vlora compress`` writes them, exported and judged on held-out text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from fidelity.hard.command_tables import kept_cell  # noqa: E402
from fidelity.hard.table import opened, options_parser, records_of  # noqa: E402
from vllm_vlora import CompressOptions, compress, export_all  # noqa: E402
from vllm_vlora.checkpoint.reader import Checkpoint  # noqa: E402
from vllm_vlora.compression.options import CODES_CHOICES  # noqa: E402

RESULTS = Path("benchmarks/results/hard-trellis-cpu.jsonl")
RATIOS = (8.0, 16.0)


def measure(
    folder: Path, ratios: Sequence[float], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A record for every size."""
    opening = opened(folder, options)
    for ratio in ratios:
        with tempfile.TemporaryDirectory(prefix="bench-hard-") as work:
            forms: dict[str, Mapping[str, Path]] = {}
            found = {}
            for codes in CODES_CHOICES:
                target, started = Path(work, codes), time.process_time()
                asked = CompressOptions(
                    "private", ratio=ratio, codes=codes, executor="serial", allow_large_error=True
                )
                report = compress(opening.adapters, target, asked)
                found[codes] = {
                    "cpu_s": time.process_time() - started,
                    "nbytes": Checkpoint.open(target).nbytes,
                    "mean_error": sum(task.error for task in report.tasks) / len(report.tasks),
                }
                exported = Path(work, f"{codes}-exported")
                forms[codes] = export_all(
                    Checkpoint.open(target), opening.shown, exported, dtype=torch.float32
                )
            yield {
                "collection": opening.collection.name,
                "ratio": ratio,
                "examples": options.examples,
                "codes": found,
                "kept": opening.kept(forms),
            }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """KL kept and recovered, mean errors and CPU seconds, a row for each collection and size."""
    lines = [
        f"| collection | size | {' | '.join(CODES_CHOICES)} | mean errors | CPU time |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = [kept_cell(record["kept"][codes]) for codes in CODES_CHOICES]
        for key, form in (("mean_error", ".3f"), ("cpu_s", ".1f")):
            cells.append(" / ".join(f"{record['codes'][c][key]:{form}}" for c in CODES_CHOICES))
        lines.append(f"| {record['collection']} | {record['ratio']:g}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is named, or all that is there, as far as it is missing; print the table."""
    options = options_parser(__doc__, RATIOS, RESULTS).parse_args(arguments)
    print(table(records_of(options, measure)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
