"""The hard collections through the commands that users give: what they choose, and what that keeps.

    python benchmarks/fidelity/hard/commands.py                    compress --judge at 8x and 16x
    python benchmarks/fidelity/hard/commands.py code-ranks --forms auto private joint factored --add
    python benchmarks/fidelity/hard/commands.py code-close --forms auto private --ratios 8 --scaled
    python benchmarks/fidelity/hard/commands.py --minutes 0        only the tables

Every checkpoint is written by ``python -m vllm_vlora.tools compress``, and with --add the tasks that were
held out are put in by ``add``, with and without --expand. All of them are judged on held-out text beside
the originals. A record for each collection and size is appended to the JSON Lines file; what is there is
not measured again. With --scaled originals are measured too that are larger or smaller than they are,
and children whose way from their parent is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from fidelity.hard.command_tables import cells, command_tables  # noqa: E402
from fidelity.hard.forms import WEIGHTS  # noqa: E402
from fidelity.hard.table import RESULTS as MEASURED  # noqa: E402
from fidelity.hard.table import Judge, append, named, options_parser, read  # noqa: E402
from fidelity.inputs import CollectionFolder  # noqa: E402
from vllm_vlora import export_all  # noqa: E402
from vllm_vlora.checkpoint.reader import Checkpoint  # noqa: E402
from vllm_vlora.checkpoint.task_entry import common  # noqa: E402

RESULTS = Path("benchmarks/results/hard-commands-cpu.jsonl")
RATIOS = (8.0, 16.0)
FORMS = {
    "auto": ("--judge",),
    "auto --no-judge": ("--no-judge",),
    "private": ("--representation", "private"),
    "joint": ("--representation", "joint"),
    "factored": ("--representation", "factored"),
}
ADDED = {"added": (), "expanded": ("--expand",)}
# Of a whole original, and of the way from its parent.
SCALES = (0.9, 1.1, 1.2)
# Of what is stored.
STORED = 0.9
APART = (0.0, 0.9, 1.1, 1.5)


class CommandError(Exception):
    """A command ended with an error, which is the message."""


def run(*arguments: object) -> dict[str, Any]:
    """What a command prints as JSON."""
    command = [sys.executable, "-P", "-m", "vllm_vlora.tools", *map(str, arguments), "--json"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise CommandError(found.stderr.strip().splitlines()[-1])
    return json.loads(found.stdout)


def form_of(checkpoint: Checkpoint) -> str:
    """Its name in the tables of measured forms."""
    segments = [segment for record in checkpoint.tasks.values() for segment in record.segments]
    clusters = any(segment.rows is not None for segment in segments)
    name = common(segment.representation for segment in segments)
    return {"joint": "clusters", "mixed": "clusters-mixed"}.get(name, name) if clusters else name


class Cell:
    """One collection at one size."""

    def __init__(self, folder: Path, ratio: float, judge: Judge, tasks: int, work: Path) -> None:
        self._collection = CollectionFolder(folder)
        self._base = judge.model
        self._ratio, self._judge, self._work = ratio, judge, work
        names = list(self._collection.in_basis)
        count = min(tasks, len(names))
        self._shown = [names[place * len(names) // count] for place in range(count)]
        self.forms: dict[str, dict[str, Any]] = {}
        self._folders: dict[str, dict[str, Path]] = {}

    def compress(self, name: str, add: bool) -> None:
        """One form, and the tasks added to it; what refuses is kept in the command's own words."""
        target = self._work / name.replace(" ", "")
        adapters = self._collection.folder / "adapters"
        judged = ("--base", self._base) if name == "auto" else ()
        try:
            data = run("compress", adapters, "-o", target, "--ratio", f"{self._ratio:g}",
                       *FORMS[name], *judged)  # fmt: skip
        except CommandError as error:
            self.forms[name] = {"refused": str(error)}
            return
        self.forms[name] = _described(target, data)
        self._export(name, target, self._shown)
        for label, options in ADDED.items() if add else ():
            if options and not data["basis_bytes"]:
                continue
            self._add(name, label, options, target)

    def _add(self, name: str, label: str, options: Sequence[str], source: Path) -> None:
        target = source.with_name(f"{source.name}-{label}")
        folder = self._collection.folder / "held_out_of_basis"
        try:
            data = run("add", source, folder, "--ratio", f"{self._ratio:g}", "-o", target, *options)
        except CommandError as error:
            self.forms[name][label] = {"refused": str(error)}
            return
        stored = {task["task_id"]: task["kind"] for task in data["tasks"]}
        self.forms[name][label] = {"nbytes": data["bytes"], "stored": stored}
        self._export(f"{name} {label}", target, list(self._collection.held_out))

    def _export(self, name: str, target: Path, tasks: Sequence[str]) -> None:
        out = self._work / f"out-{target.name}"
        self._folders[name] = export_all(Checkpoint.open(target), tasks, out, dtype=torch.float32)

    def scale(self) -> None:
        """Forms that are smaller than they are, as their originals are measured too."""
        for form, tasks in list(self._folders.items()):
            if form in FORMS:
                name = f"{form} x {100 * STORED:.0f}%"
                parent = self._work / name.replace(" ", "")
                self._folders[name] = {
                    task: scaled(folder, STORED, parent / task) for task, folder in tasks.items()
                }
        self._scale_originals()

    def _scale_originals(self) -> None:
        """Originals larger and smaller than they are, and nearer to their parents and further."""
        for task in self._shown:
            original = self._collection.in_basis[task].resolve()
            record = json.loads((original.parents[1] / "collection.json").read_text("utf-8"))
            parent = record["tasks"][task]["parent"]
            for factor in SCALES:
                name = f"original x {100 * factor:.0f}%"
                folder = self._work / name.replace(" ", "") / task
                self._folders.setdefault(name, {})[task] = scaled(original, factor, folder)
            for factor in APART if parent is not None else ():
                name = f"apart x {100 * factor:.0f}%"
                folder = self._work / name.replace(" ", "") / task
                self._folders.setdefault(name, {})[task] = apart(
                    original, original.parents[1] / "parents" / parent, factor, folder
                )

    def judge(self) -> None:
        """Every form on held-out text, in one pass for each task."""
        for task, original in self._collection.all.items():
            folders = {name: tasks[task] for name, tasks in self._folders.items() if task in tasks}
            if not folders:
                continue
            for name, kept in self._judge.kept(task, original, folders, False).items():
                self._place(name)[task] = kept

    def _place(self, name: str) -> dict[str, Any]:
        """Where what a form's tasks keep belongs: of tasks added to it, in its own record."""
        for label in ADDED:
            if name.endswith(f" {label}"):
                return self.forms[name.removesuffix(f" {label}")][label].setdefault("tasks", {})
        return self.forms.setdefault(name, {}).setdefault("in_basis", {})


def _described(target: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    checkpoint = Checkpoint.open(target)
    errors = [task["error"] for task in data["tasks"]]
    return {
        "form": form_of(checkpoint),
        "nbytes": checkpoint.nbytes,
        "error": math.sqrt(sum(error**2 for error in errors) / len(errors)),
        "chosen_by": data["chosen_by"],
        "candidates": data["candidates"],
        "seconds": data["seconds"],
    }


def scaled(original: Path, factor: float, folder: Path) -> Path:
    """An adapter whose update is ``factor`` times as large."""
    shutil.copytree(original, folder)
    tensors = load_file(folder / WEIGHTS)
    for key in tensors:
        if ".lora_B." in key:
            tensors[key] = tensors[key] * factor
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def apart(child: Path, parent: Path, factor: float, folder: Path) -> Path:
    """parent + ``factor`` (child - parent), of twice the rank, so that alpha / r stays."""
    shutil.copytree(child, folder)
    ours, theirs = load_file(child / WEIGHTS), load_file(parent / WEIGHTS)
    tensors = {
        key: torch.cat([ours[key], theirs[key]])
        if ".lora_A." in key
        else torch.cat([factor * ours[key], (1 - factor) * theirs[key]], 1)
        for key in ours
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["r"], config["lora_alpha"] = 2 * config["r"], 2 * config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def measure(
    folder: Path, ratio: float, judge: Judge, options: argparse.Namespace
) -> dict[str, Any]:
    """The record of one collection at one size."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-hard-") as work:
        cell = Cell(folder, ratio, judge, options.tasks, Path(work))
        for name in options.forms:
            cell.compress(name, options.add)
        if options.scaled:
            cell.scale()
        cell.judge()
    return {
        "collection": folder.name,
        "ratio": ratio,
        "examples": options.examples,
        "forms": cell.forms,
        "seconds": time.monotonic() - started,
        "load": os.getloadavg()[0],
    }


def missing(records: Sequence[Mapping[str, Any]], name: str, ratio: float,
            options: argparse.Namespace) -> bool:  # fmt: skip
    """Whether a record lacks something that is asked for."""
    has = cells(records).get((name, ratio), {})
    return (
        not set(options.forms) <= has.keys()
        or (options.add and not any("added" in value for value in has.values()))
        or (options.scaled and not any(" x " in form for form in has))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is named, or all that is there, as far as it is missing; print the tables."""
    parser = options_parser(__doc__, RATIOS, RESULTS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=("auto",))
    parser.add_argument("--add", action="store_true", help="also add the tasks that were held out")
    parser.add_argument("--scaled", action="store_true", help="also measure scaled originals")
    parser.add_argument(
        "--measured", type=Path, default=MEASURED, help="what table.py has measured"
    )
    options = parser.parse_args(arguments)
    names = named(options)
    until = time.monotonic() + 60 * options.minutes
    records = read(options.json)
    for name in names:
        wanted = [ratio for ratio in options.ratios if missing(records, name, ratio, options)]
        if not wanted or time.monotonic() > until:
            continue
        folder = options.folder / name
        model = json.loads((folder / "collection.json").read_text("utf-8"))["model"]
        judge = Judge(folder / model, CollectionFolder(folder), options.examples)
        for ratio in wanted:
            if time.monotonic() < until:
                records.append(append(options.json, measure(folder, ratio, judge, options)))
    measured = [record for record in read(options.measured) if record.get("forms")]
    print(command_tables([r for r in records if r["collection"] in names], measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
