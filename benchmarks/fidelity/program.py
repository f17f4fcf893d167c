"""What adapters keep when they are compressed: recovered fraction against bytes."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import RESULTS, can_plot, say, write_json

from fidelity import ours, seeds
from fidelity.built import Built, OutOfReachError
from fidelity.calibrations import Calibrations
from fidelity.inputs import CollectionFolder, training_record
from fidelity.methods import SEEDS, Method, parse_method
from fidelity.points import Judge, Point, PointStore, measure
from fidelity.report import SCHEMA_VERSION, plot, setting, table
from vllm_vlora.compression.options import REPRESENTATION_CHOICES
from vllm_vlora.errors import OptionError, VLoRAError

DESCRIPTION = """\
Every representation, and the seed libraries vlora-dev and lorashare, on real collections.

Recovered fraction = (loss_base - loss_compressed) / (loss_base - loss_adapter) on held-out text. The
tasks of a collection are compressed to each ratio; the tasks held out of the basis are added to the
finished checkpoint. A ratio counts the originals' LoRA weights at 16 bits each over all bytes of the
tensor files. The seed libraries write float32; their float32 tensors are counted at 16 bits, and
`nbytes_on_disk` has the files as they are.
"""
EXAMPLES = """\
  python examples/collections/train.py unrelated -o .cache/collections/unrelated
  python examples/collections/train.py family -o .cache/collections/family
  python benchmarks/run.py fidelity                       the collections made before, hours
  python benchmarks/run.py fidelity --quick               two tasks of each kind, few examples, two ratios
  python benchmarks/run.py fidelity --representations auto joint:quantize=int8 lorashare --ratios 8
"""
COLLECTIONS = Path(".cache/collections")
RATIOS = (4.0, 8.0, 12.0, 16.0, 32.0, 64.0)
EXAMPLES_A_TASK = 16
QUICK_RATIOS, QUICK_EXAMPLES, QUICK_TASKS = (4.0, 12.0), 4, 2
CACHE = Path(".cache/bench_fidelity")


@dataclass(frozen=True)
class Run:
    """What stays the same over all points of one collection."""

    collection: CollectionFolder
    judge: Judge
    calibrations: Calibrations
    store: PointStore
    seeds_environment: Path
    resume: bool

    def points(self, method: Method, ratios: Sequence[float]) -> Iterator[Point]:
        """A point for every ratio, measured or taken from the store."""
        kept = {ratio: self._kept(method, ratio) for ratio in ratios}
        missing = [ratio for ratio, point in kept.items() if point is None]
        with tempfile.TemporaryDirectory(prefix="bench-fidelity-") as scratch:
            work = {ratio: Path(scratch) / f"{ratio:g}" for ratio in missing}
            if missing and method.is_seed:
                python = seeds.make_environment(self.seeds_environment)
                outputs = {work[ratio]: ratio for ratio in missing}
                seeds.run_worker(python, method.representation, self.collection, outputs)
            for ratio in ratios:
                point = kept[ratio] or self._measure(method, ratio, work[ratio])
                yield point

    def _kept(self, method: Method, ratio: float) -> Point | None:
        return self.store.read(self._key(method, ratio)) if self.resume else None

    def _key(self, method: Method, ratio: float) -> str:
        return self.store.key(self.collection, method, ratio)

    def _measure(self, method: Method, ratio: float, folder: Path) -> Point:
        point: Point = {
            "collection": self.collection.name,
            "representation": method.label,
            "ratio_asked": ratio,
        }
        started = time.perf_counter()
        try:
            built = self._build(method, ratio, folder)
            point |= measure(self.judge, self.collection, built)
        except OutOfReachError as error:
            point["reason"] = str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        point["seconds_in_all"] = time.perf_counter() - started
        self.store.write(self._key(method, ratio), point)
        return point

    def _build(self, method: Method, ratio: float, folder: Path) -> Built:
        if method.is_seed:
            return seeds.read_built(folder, method.representation, self.collection)
        calibration = self.calibrations.folder(self.collection) if method.is_calibrated else None
        return ours.build(method, ratio, self.collection, calibration, folder)


def run_all(options: argparse.Namespace, methods: Sequence[Method]) -> dict[str, Any]:
    """Measure every point; prints a line for each and writes the JSON file after each method."""
    report: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "setting": setting(options) | {"examples": options.examples},
        "collections": {},
        "points": [],
    }
    collections = [CollectionFolder(folder, options.tasks) for folder in options.collections]
    judge = Judge(options.model, collections, options.examples)
    calibrations = Calibrations(options.model, options.cache / "calibrations", options.resume)
    store = PointStore(options.cache / "points", str(options.model.resolve()), options.examples)
    for collection in collections:
        report["collections"][collection.name] = {
            "digest": collection.digest,
            "original_nbytes": collection.original_nbytes(collection.in_basis),
            "held_out_nbytes": collection.original_nbytes(collection.held_out),
            "training": training_record(collection.folder),
        }
        run = Run(collection, judge, calibrations, store, options.seeds_environment, options.resume)
        for method in methods:
            for point in run.points(method, options.ratios):
                report["points"].append(point)
                print(table([point]).splitlines()[-1], flush=True)
            write_json(options.json, report)
    return report


def add_options(parser: argparse.ArgumentParser) -> None:
    """The collections, the methods and the sizes."""
    parser.add_argument(
        "-o",
        "--output",
        dest="json",
        type=Path,
        help="the same (default: benchmarks/results/fidelity-cpu.json)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(".cache/smollm2"),
        help="the base model's folder (default: .cache/smollm2)",
    )
    parser.add_argument(
        "--collections",
        type=Path,
        nargs="+",
        default=[COLLECTIONS / "unrelated", COLLECTIONS / "family"],
        help="their folders (default: those that the first examples make)",
    )
    parser.add_argument(
        "--representations",
        nargs="+",
        metavar="NAME[:option=value,...]",
        help="auto, private, joint, ...; vlora-dev, vlora-dev-nf4, lorashare (default: all). Options "
        "are those of `compress`; calibration=@calibration gathers moments on the collection's "
        "calibration text",
    )
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        help=f"asked for (default: {' '.join(f'{ratio:g}' for ratio in RATIOS)})",
    )
    parser.add_argument("--examples", type=int, help=f"a task (default: {EXAMPLES_A_TASK})")
    parser.add_argument("--tasks", type=int, help="of each kind (default: all)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take points that were measured before with the same code and settings",
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"of points and calibrations (default: {CACHE})"
    )
    parser.add_argument(
        "--seeds-environment",
        type=Path,
        default=Path(".cache/seeds"),
        help="made on first use (default: .cache/seeds)",
    )


def resolve(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What was not given."""
    options.representations = options.representations or [*REPRESENTATION_CHOICES, *SEEDS]
    options.ratios = options.ratios or (QUICK_RATIOS if options.quick else RATIOS)
    options.examples = options.examples or (QUICK_EXAMPLES if options.quick else EXAMPLES_A_TASK)
    options.tasks = options.tasks or (QUICK_TASKS if options.quick else None)
    options.json = options.json or RESULTS / "fidelity-cpu.json"
    options.plot = options.plot or options.json.with_suffix(".svg")


def run(options: argparse.Namespace) -> int:
    """Measure, print and draw; returns the exit status, 2 when it cannot be run."""
    try:
        methods = [parse_method(text) for text in options.representations]
        if not options.model.is_dir():
            raise OptionError(
                f"no model in {options.model}; make it with examples/demo/prepare_model.py"
            )
        report = run_all(options, methods)
    except VLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(report["points"]))
    if can_plot():
        plot(report, options.plot)
    else:
        say("no plot: matplotlib is not installed")
    return 0
