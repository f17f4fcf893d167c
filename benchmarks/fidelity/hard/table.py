"""What ``auto`` keeps on the hard collections, beside every single representation: KL kept and recovered.

    python benchmarks/fidelity/hard/table.py                         all that ``train.py`` made
    python benchmarks/fidelity/hard/table.py prose-family --ratios 8 16

The adapters are measured once. At every size the best plan of each representation is written and judged
on held-out text, which no choice sees. ``auto`` is what the base model chooses by itself, on text that it
writes with the adapters; beside it stands what the error of the weights would choose. Nothing is fitted
to a collection: each is left out of what its choice goes by. In brackets: KL kept less the best one's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from fidelity.inputs import CollectionFolder  # noqa: E402
from vllm_vlora import CompressOptions, export_all, open_adapter  # noqa: E402
from vllm_vlora.adapters.collection import Collection  # noqa: E402
from vllm_vlora.checkpoint.reader import Checkpoint  # noqa: E402
from vllm_vlora.compression.pipeline import Compression  # noqa: E402
from vllm_vlora.errors import BudgetError  # noqa: E402
from vllm_vlora.evaluation.evaluator import EvaluationOptions, Evaluator  # noqa: E402
from vllm_vlora.evaluation.judge import SelfJudge  # noqa: E402

FOLDER = Path(".cache/hard")
RATIOS = (4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class Form:
    """A way of storing a collection at a size, and what it keeps on held-out text (means of tasks)."""

    name: str
    nbytes: int
    error: float
    likely_error: float
    judged: float
    kl_kept: float
    worst: float
    recovered: float


def measure(
    folder: Path, ratios: Sequence[float], examples: int, tasks: int | None
) -> Iterator[dict[str, Any]]:
    """A record for every size that can be had."""
    collection = CollectionFolder(folder, tasks)
    record = json.loads((folder / "collection.json").read_text(encoding="utf-8"))
    model = folder / record["model"]
    adapters = {task: open_adapter(path) for task, path in collection.in_basis.items()}
    data = {task: [collection.data(task)] for task in adapters}
    options = EvaluationOptions(max_examples=examples, batch_size=8, greedy_tokens=0)
    evaluator = Evaluator(model, data, options)
    with tempfile.TemporaryDirectory(prefix="bench-hard-") as scratch:
        started = time.process_time()
        whole = Compression(
            Collection(adapters),
            CompressOptions(executor="serial"),
            Path(scratch),
            bounded=False,
        )
        _ = whole.candidates.survey
        seconds = time.process_time() - started
        for ratio in ratios:
            yield {
                "collection": collection.name,
                "adapters": len(adapters),
                "ratio": ratio,
                "seconds_to_measure": seconds,
                **_at_size(whole, ratio, adapters, model, evaluator, Path(scratch) / f"{ratio:g}"),
            }


def _at_size(
    whole: Compression,
    ratio: float,
    adapters: Mapping[str, Any],
    model: Path,
    evaluator: Evaluator,
    folder: Path,
) -> dict[str, Any]:
    whole._options = replace(whole._options, ratio=ratio)
    try:
        forms = whole.best_of_each()
    except BudgetError as error:
        return {"reason": str(error)}
    trials = []
    for number, chosen in enumerate(forms):
        trials.append(folder / str(number))
        trials[-1].mkdir(parents=True)
        whole.write(trials[-1], chosen, trial=True)
    started = time.process_time()
    judged = SelfJudge(adapters, model, True, lambda *_: None)(trials)
    seconds = time.process_time() - started
    rows = [
        _form(chosen.plan, trial, statistics.fmean(v for v in kept.values() if v is not None),
              adapters, evaluator)
        for chosen, trial, kept in zip(forms, trials, judged)
    ]  # fmt: skip
    shutil.rmtree(folder)
    return {
        "forms": [vars(row) for row in rows],
        "auto": max(rows, key=lambda row: (row.judged, -row.likely_error)).name,
        "by_error": min(rows, key=lambda row: row.likely_error).name,
        "seconds_to_judge": seconds,
    }


def _form(
    plan: Any, trial: Path, judged: float, adapters: Mapping[str, Any], evaluator: Evaluator
) -> Form:
    checkpoint = Checkpoint.open(trial)
    folders = export_all(checkpoint, list(adapters), trial / "tasks", dtype=torch.float32)
    compared = {
        task: evaluator.compare(task, path, adapters[task].path) for task, path in folders.items()
    }
    kept = [one.kl_kept.value for one in compared.values() if one.kl_kept.value is not None]
    recovered = [
        one.recovered.value for one in compared.values() if one.recovered.value is not None
    ]
    return Form(
        plan.representation,
        checkpoint.nbytes,
        plan.rms_error,
        plan.likely_error,
        judged,
        statistics.fmean(kept),
        min(kept),
        statistics.fmean(recovered) if recovered else float("nan"),
    )


def rows_of(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: KL kept / recovered of every form, and what was chosen."""
    if "reason" in record:
        return
    forms = {form["name"]: form for form in record["forms"]}
    best = max(form["kl_kept"] for form in forms.values())
    cells = [
        ""
        if name not in forms
        else f"{forms[name]['kl_kept']:.4f} / {forms[name]['recovered']:.4f}"
        for name in ("private", "joint", "mixed", "flat")
    ]
    chosen, other = forms[record["auto"]], forms[record["by_error"]]
    yield (
        " | ".join(
            [
                f"| {record['collection']} | {record['ratio']:g}x",
                *cells,
                f"{record['auto']} ({chosen['kl_kept'] - best:+.4f})",
                f"{record['by_error']} ({other['kl_kept'] - best:+.4f})",
            ]
        )
        + " |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is named, or all that is there; prints a row a size and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collections", nargs="*", metavar="NAME")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--examples", type=int, default=16, help="held-out, of each task")
    parser.add_argument("--tasks", type=int, help="at most so many of a collection")
    parser.add_argument("--json", type=Path, help="append records, one a line")
    options = parser.parse_args(arguments)
    names = options.collections or sorted(
        p.parent.name for p in options.folder.glob("*/collection.json")
    )
    print("| collection | size | private | joint | mixed | flat | auto | by error |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        for record in measure(
            options.folder / name, options.ratios, options.examples, options.tasks
        ):
            for row in rows_of(record):
                print(row, flush=True)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
