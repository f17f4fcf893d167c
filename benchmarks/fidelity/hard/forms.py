"""Every way in which ``auto`` could store a collection at a size, each by itself."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_vlora import CompressOptions, export_all, open_adapter
from vllm_vlora.adapters.collection import Collection
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.candidates import Candidates
from vllm_vlora.compression.pipeline import Compression
from vllm_vlora.compression.publishing import Chosen
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.errors import BudgetError
from vllm_vlora.planning.plan import Budget, Plan
from vllm_vlora.planning.problem import joint_problems, make_plans, mixed_problem
from vllm_vlora.planning.sharing import decide_sharing
from vllm_vlora.planning.survey import Survey

WEIGHTS = "adapter_model.safetensors"
# Sizes and forms to which tasks are added: these take longer than all else.
ADDED_RATIOS = (8.0, 16.0)
ADDED_TO = ("private", "joint", "flat", "mixed", "clusters-mixed")
GROWN = ("joint", "mixed")


@dataclass(frozen=True)
class Form:
    """A written checkpoint, and its tasks as PEFT folders.

    ``added`` are tasks put in afterwards, with and without growing bases (``grown``); both empty where
    they cannot be.
    """

    name: str
    plan: Plan
    nbytes: int
    seconds: float
    tasks: dict[str, Path]
    added: dict[str, Path]
    grown: dict[str, Path]
    grown_nbytes: tuple[int, int]


class Measured:
    """One collection, measured once; ``forms`` at as many sizes as wanted."""

    def __init__(self, adapters: Mapping[str, Any], scratch: Path) -> None:
        self.adapters, self._scratch = adapters, scratch
        started = time.process_time()
        self.compression = Compression(
            Collection(adapters), CompressOptions(executor="serial"), scratch, bounded=False
        )
        _ = self.compression.candidates.survey
        self.seconds = time.process_time() - started
        (scratch / "flat").mkdir()
        options = CompressOptions("flat", executor="serial")
        self._flat = Compression(Collection(adapters), options, scratch / "flat", bounded=False)

    def forms(self, ratio: float, shown: list[str], new: Mapping[str, Any]) -> Iterator[Form]:
        """What can be had; the caller removes the folders."""
        nbytes = math.floor(self.compression.collection.original_nbytes / ratio)
        budget = Budget(nbytes)
        for name, plans in self._plans(budget):
            compression = self._flat if name == "flat" else self.compression
            started = time.process_time()
            found = list(plans)
            best = min(found, key=budget.order, default=None)
            if best is None:
                continue
            encoded = compression._measured(best, budget, [])
            if encoded is None or self.compression.is_refused(encoded[0]):
                continue
            plan, cores = encoded
            seconds = time.process_time() - started
            folder = self._scratch / f"{ratio:g}-{name}"
            folder.mkdir()
            compression.write(folder, Chosen(plan, [], cores), trial=True)
            checkpoint = Checkpoint.open(folder)
            tasks = export_all(checkpoint, shown, folder / "out", dtype=torch.float32)
            nbytes = checkpoint.nbytes
            added, first, grown, second = {}, 0, {}, 0
            if ratio in ADDED_RATIOS and name in ADDED_TO:
                added, first = self._added(folder, new, ratio, False)
            if ratio in ADDED_RATIOS and name in GROWN:
                grown, second = self._added(folder, new, ratio, True)
            yield Form(name, plan, nbytes, seconds, tasks, added, grown, (first, second))

    def _added(
        self, folder: Path, new: Mapping[str, Any], ratio: float, expand: bool
    ) -> tuple[dict[str, Path], int]:
        target = folder.with_name(f"{folder.name}-added{'-grown' if expand else ''}")
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("out"))
        try:
            add_adapters(target, new, AddOptions(ratio=ratio), expand=expand)
        except BudgetError:
            return {}, 0
        checkpoint = Checkpoint.open(target)
        found = export_all(checkpoint, list(new), target / "out", dtype=torch.float32)
        return found, checkpoint.nbytes

    def _plans(self, budget: Budget) -> Iterator[tuple[str, Iterator[Plan]]]:
        found: Candidates = self.compression.candidates
        survey, formats = found.survey, found._formats
        yield "private", iter(make_plans(found._private_problems(), budget)[0])
        yield "joint", iter(make_plans(found._joint_problems(), budget)[0])
        yield "factored", self._factored(survey, formats, budget)
        yield "flat", iter(make_plans(self._flat.candidates._flat_problems(), budget)[0])
        yield "mixed", self._mixed(survey, budget)
        clusters = found._clusters
        if clusters is not None:
            yield "clusters", iter(make_plans(found._problems_on_bases(clusters), budget)[0])
            yield "clusters-mixed", self._mixed(clusters, budget)

    def _factored(self, survey: Survey, formats: Any, budget: Budget) -> Iterator[Plan]:
        for label in formats.labels:
            curve = next(iter(survey.joint.values())).curves[label]
            cores = formats.cores(curve.bases[0].format)
            problems = joint_problems(survey, label, cores, "factored", True)
            yield from make_plans(problems, budget)[0]

    def _mixed(self, survey: Survey, budget: Budget) -> Iterator[Plan]:
        found = self.compression.candidates
        best = min(make_plans(found._private_problems(), budget)[0], key=budget.order, default=None)
        headers = 0 if best is None else best.nbytes - best.data_nbytes
        assert budget.nbytes is not None
        size = budget.nbytes - headers
        sharing = decide_sharing(survey, found._formats, size)
        if not sharing.sharers:
            return
        plan = mixed_problem(survey, sharing).solve(budget)
        if plan is not None:
            yield plan


def rescaled(original: Path, stored: Path, power: float, folder: Path) -> Path:
    """A task with every module scaled towards <stored, original> = <original, original>.

    ``power`` is the exponent of that scale: 0 leaves the task, 1 makes it unbiased.
    """
    ours, theirs = open_adapter(stored), open_adapter(original)
    shutil.copytree(stored, folder)
    tensors = load_file(folder / WEIGHTS)
    whole = dict(theirs.iter_factors())
    for name, (a, b) in ours.iter_factors():
        a, b, (a0, b0) = a.double(), b.double(), (part.double() for part in whole[name])
        own = theirs.modules[name].scale * float(((a0 @ a0.T) * (b0.T @ b0)).sum())
        both = ours.modules[name].scale * float(((a @ a0.T) * (b.T @ b0)).sum())
        if both > 0:
            for key in tensors:
                if f".{name}.lora_B" in key:
                    tensors[key] = tensors[key] * (own / both) ** power
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder
