"""What ``auto`` keeps on the hard collections, beside every single representation: KL kept and recovered.

    python benchmarks/fidelity/hard/table.py                      measure what is missing, then the tables
    python benchmarks/fidelity/hard/table.py prose-family --ratios 8 16
    python benchmarks/fidelity/hard/table.py --minutes 2.5          stop between two sizes; call it again
    python benchmarks/fidelity/hard/table.py --minutes 0            only the tables

A record for each collection and size is appended to the JSON Lines file as it is measured, and never
measured again. Every form of a collection is written at its size, tasks held out of the bases are added
to it, and all of them are judged on held-out text, which no choice sees, beside the original and the
base model. ``judged`` is KL kept on text that the model writes with the original, as ``auto`` judges
by itself. Nothing is fitted to a collection, so that each is left out of what its choice goes by.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from fidelity.hard.forms import Form, Measured, rescaled  # noqa: E402
from fidelity.hard.tables import tables  # noqa: E402
from fidelity.inputs import CollectionFolder  # noqa: E402
from vllm_vlora import CompressOptions, open_adapter  # noqa: E402
from vllm_vlora.adapters.collection import Collection  # noqa: E402
from vllm_vlora.compression.pipeline import Compression  # noqa: E402
from vllm_vlora.errors import BudgetError  # noqa: E402
from vllm_vlora.evaluation import evaluator as scoring  # noqa: E402
from vllm_vlora.evaluation.evaluator import EvaluationOptions, Evaluator  # noqa: E402
from vllm_vlora.evaluation.fidelity import Divergences, kl_kept, recovered_fraction  # noqa: E402
from vllm_vlora.evaluation.judge import SAMPLED_LENGTH, SAMPLED_TOKENS  # noqa: E402

FOLDER = Path(".cache/hard")
RESULTS = Path("benchmarks/results/hard-cpu.jsonl")
RATIOS = (4.0, 8.0, 16.0, 32.0)
# Scales of a stored update: least squares is 0, unbiased 1.
SCALED = {"unbiased": 1.0, "half-way": 0.5}


class Judge:
    """The base model of a collection, and the text that it is asked about."""

    def __init__(self, model: Path, collection: CollectionFolder, examples: int) -> None:
        data = {task: [collection.data(task)] for task in collection.all}
        options = EvaluationOptions(max_examples=examples, batch_size=8, greedy_tokens=0)
        self.model = model
        self._evaluator = Evaluator(model, data, options)
        self._written: dict[str, Any] = {}

    def written(self, task: str, original: Path) -> Any:
        """Text that the model writes with a task's original."""
        if task not in self._written:
            rows = self._evaluator.sample(original, SAMPLED_TOKENS, SAMPLED_LENGTH)
            self._written[task] = rows
        return self._written[task]

    def kept(
        self, task: str, original: Path, forms: Mapping[str, Path], judged: bool
    ) -> dict[str, dict[str, float | None]]:
        """KL kept and recovered of every form of a task on its held-out text, in one pass.

        ``kl_base`` is KL(original || base) in nats a token, ``alike`` the share of tokens for which the
        original and the form find the same most likely. ``judged``: KL kept on text of the model's
        own, too.
        """
        self._evaluator.choose_tokenizer(task, original)
        rows = self._evaluator._rows(task)
        sums: dict[tuple[str, str], Any] = {}

        def add(name: str, kind: str, seen: Any, costs: torch.Tensor) -> None:
            total = sums.setdefault((name, kind), scoring._Sums(rows))
            total.add(seen.batch, seen.owners, costs)

        alike = dict.fromkeys(forms, 0)
        with self._evaluator._loaded({"original": original, **forms}) as loaded:
            text = self._evaluator._text_of(task)
            for seen in self._evaluator._side_by_side(loaded, rows, text, list(forms)):
                add("original", "nll", seen, scoring._nll(seen.theirs, seen.targets))
                for name, logits in [("base", seen.base), *seen.ours.items()]:
                    add(name, "nll", seen, scoring._nll(logits, seen.targets))
                    add(name, "kl", seen, seen.divergences(logits))
                for name, logits in seen.ours.items():
                    alike[name] += seen.agreed(logits)
        losses = {key: total.finish(task) for key, total in sums.items()}
        own: dict[str, Any] = {}
        if judged:
            apart = self._evaluator.distances(
                self.written(task, original), original, list(forms.values())
            )
            own = {n: kl_kept(found, resamples=0).value for n, found in zip(forms, apart)}
        base, theirs = losses["base", "nll"], losses["original", "nll"]
        found: dict[str, dict[str, float | None]] = {}
        for name in forms:
            apart = Divergences(losses["base", "kl"].nll, losses[name, "kl"].nll, base.tokens)
            back = recovered_fraction(base, theirs, losses[name, "nll"], resamples=0)
            found[name] = {
                "kl_kept": kl_kept(apart, resamples=0).value,
                "recovered": back.value,
                "gain": base.loss - theirs.loss,
                "kl_base": apart.kl_base,
                "alike": alike[name] / int(base.tokens.sum()),
            } | ({"judged": own[name]} if judged else {})
        return found


class Opened(NamedTuple):
    """A collection as it is measured: the adapters of its bases, who is judged, and the judge."""

    collection: CollectionFolder
    adapters: dict[str, Any]
    shown: list[str]
    judge: Judge

    def kept(self, forms: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, Any]]:
        """Form -> task -> what ``Judge.kept`` finds, of the shown tasks in these forms."""
        found = {
            task: self.judge.kept(
                task,
                self.collection.in_basis[task],
                {name: folders[task] for name, folders in forms.items()},
                False,
            )
            for task in self.shown
        }
        return {name: {task: found[task][name] for task in self.shown} for name in forms}


def opened(folder: Path, options: argparse.Namespace) -> Opened:
    """A collection with as many tasks shown as ``options.tasks`` says, spread over all of them."""
    collection = CollectionFolder(folder)
    record = json.loads((folder / "collection.json").read_text(encoding="utf-8"))
    adapters = {task: open_adapter(path) for task, path in collection.in_basis.items()}
    names, count = list(adapters), min(options.tasks, len(adapters))
    shown = [names[place * len(names) // count] for place in range(count)]
    judge = Judge(folder / record["model"], collection, options.examples)
    return Opened(collection, adapters, shown, judge)


def measure(
    folder: Path, ratios: Sequence[float], options: argparse.Namespace, until: float
) -> Iterator[dict[str, Any]]:
    """A record for every size."""
    collection, adapters, shown, judge = opened(folder, options)
    new = {task: open_adapter(path) for task, path in collection.held_out.items()}
    with tempfile.TemporaryDirectory(prefix="bench-hard-") as scratch:
        measured = Measured(adapters, Path(scratch))
        for ratio in ratios:
            if time.monotonic() > until:
                return
            started = time.process_time()
            with tempfile.TemporaryDirectory(prefix="bench-hard-") as work:
                measured._scratch = Path(work)
                forms = list(measured.forms(ratio, shown, new))
                yield {
                    "collection": collection.name,
                    "adapters": len(adapters),
                    "ratio": ratio,
                    "examples": options.examples,
                    "forms": _records(forms, collection, judge, shown, Path(work)),
                    "seconds_to_measure": measured.seconds,
                    "seconds": time.process_time() - started,
                    "load": os.getloadavg()[0],
                }


def _records(
    forms: Sequence[Form], collection: CollectionFolder, judge: Judge, shown: Sequence[str], work: Path
) -> dict[str, Any]:  # fmt: skip
    tasks: dict[str, dict[str, Any]] = {}
    for task in shown:
        original = collection.in_basis[task]
        folders = {form.name: form.tasks[task] for form in forms}
        for name in ("private", "joint"):
            for label, part in SCALED.items() if name in folders else ():
                target = work / f"{name}-{label}-{task}"
                folders[f"{name} {label}"] = rescaled(original, folders[name], part, target)
        tasks[task] = judge.kept(task, original, folders, True)
    for task, original in collection.held_out.items():
        folders = {f"{form.name}": form.added[task] for form in forms if form.added}
        folders |= {f"{form.name} grown": form.grown[task] for form in forms if form.grown}
        if folders:
            tasks[task] = judge.kept(task, original, folders, False)
    found: dict[str, Any] = {}
    for form in forms:
        plan = form.plan
        found[form.name] = {
            "representation": plan.representation,
            "nbytes": form.nbytes,
            "error": plan.rms_error,
            "private_loss": float(plan.private_losses.mean()),
            "loss": float(plan.losses.mean()),
            "likely_error": plan.likely_error,
            "shared": sum(len(shared.tasks) for shared in plan.joint.values()),
            "seconds": form.seconds,
            "nbytes_with_added": form.grown_nbytes,
        }
    names = dict.fromkeys(name for kept in tasks.values() for name in kept)
    for name in names:
        row = found.setdefault(name, {})
        for kind, chosen in (("in_basis", shown), ("added", list(collection.held_out))):
            row[kind] = {t: tasks[t][name] for t in chosen if name in tasks.get(t, {})}
    return found


def seconds(folder: Path) -> dict[str, Any]:
    """CPU seconds of ``compress`` at 8x by representation, without asking the model."""
    collection = CollectionFolder(folder)
    adapters = {task: open_adapter(path) for task, path in collection.in_basis.items()}
    found = {}
    for name in ("private", "joint", "flat", "auto"):
        started = time.process_time()
        with tempfile.TemporaryDirectory(prefix="bench-hard-") as scratch:
            options = CompressOptions(name, ratio=8, executor="serial")
            target = Path(scratch) / "out"
            target.mkdir()
            try:
                whole = Compression(Collection(adapters), options, Path(scratch))
                whole.write(target, whole.choose(), trial=True)
            except BudgetError:
                continue
        found[name] = time.process_time() - started
    return {"collection": collection.name, "compress_seconds": found, "load": os.getloadavg()[0]}


def options_parser(
    description: str | None, ratios: Sequence[float], results: Path
) -> argparse.ArgumentParser:
    """What is asked of every measurement of the hard collections, with these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collections", nargs="*", metavar="NAME")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios)
    parser.add_argument("--examples", type=int, default=8, help="held-out, of each task")
    parser.add_argument("--tasks", type=int, default=12, help="judged of a collection")
    parser.add_argument("--json", type=Path, default=results, help="JSON Lines; is appended to")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long")
    return parser


def named(options: argparse.Namespace) -> list[str]:
    """The collections that are named, or all that are there."""
    found = (path.parent.name for path in options.folder.glob("*/collection.json"))
    return options.collections or sorted(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is named, or all that is there, as far as it is missing; print the tables."""
    options = options_parser(__doc__, RATIOS, RESULTS).parse_args(arguments)
    names = named(options)
    until = time.monotonic() + 60 * options.minutes
    records = read(options.json)
    for name in names:
        own = [record for record in records if record["collection"] == name]
        missing = [r for r in options.ratios if r not in {record.get("ratio") for record in own}]
        if missing and time.monotonic() < until:
            for record in measure(options.folder / name, missing, options, until):
                records.append(append(options.json, record))
        if not any("compress_seconds" in r for r in own) and time.monotonic() < until:
            records.append(append(options.json, seconds(options.folder / name)))
    print(tables([record for record in records if record["collection"] in names]))
    return 0


def records_of(
    options: argparse.Namespace,
    measure: Callable[[Path, Sequence[float], argparse.Namespace], Iterable[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Those of the named collections at every size, measured as far as they are missing."""
    until = time.monotonic() + 60 * options.minutes
    records = read(options.json)
    for name in named(options):
        done = {record["ratio"] for record in records if record["collection"] == name}
        missing = [ratio for ratio in options.ratios if ratio not in done]
        if missing and time.monotonic() < until:
            for record in measure(options.folder / name, missing, options):
                records.append(append(options.json, record))
    return [record for record in records if record["collection"] in named(options)]


def read(path: Path) -> list[dict[str, Any]]:
    """The records that were measured before."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record, which is kept from now on."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(record["collection"], record.get("ratio", "seconds"), file=sys.stderr, flush=True)
    return record


if __name__ == "__main__":
    sys.exit(main())
