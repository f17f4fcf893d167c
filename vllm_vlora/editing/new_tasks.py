"""New adapters beside the checkpoint that they are added to, measured on its bases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

from vllm_vlora.adapters.collection import Collection, Module, Progress
from vllm_vlora.checkpoint.losses import predicted_loss
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_entry import column, entries
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.editing.projection import (
    BlockMeter,
    ModuleChoices,
    Rows,
    TaskPlanner,
    choices_of,
    used_blocks,
)
from vllm_vlora.errors import AdapterError
from vllm_vlora.planning.number_formats import formats_to_try
from vllm_vlora.planning.survey import SurveyJob, Surveyor, SurveySettings, check_calibration
from vllm_vlora.representations.spec import ModuleSpec, Segment
from vllm_vlora.representations.stored import Basis

Choices: TypeAlias = Mapping[tuple[int, str], ModuleChoices]
"""(number of a new task, module name) -> every way to store that module of it."""


class NewTasks:
    """Some adapters and the checkpoint that they are added to.

    Attributes:
        specs: of the checkpoint's modules by name, and of those that only the new tasks have.
        added: the latter. blocks: the rows of each module's basis that tasks use together.

    Raises:
        AdapterError: a module has another shape in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, collection: Collection, options: AddOptions) -> None:
        self.checkpoint, self.collection = checkpoint, collection
        self._formats = formats_to_try(
            collection, options.quantize, options.dtype, options.double_quantize
        )
        settings = SurveySettings(self._formats, calibration=options.calibration)
        self.surveyor = Surveyor(collection, settings)
        self.specs = {spec.name: spec for spec in checkpoint.modules}
        self.added = [m for name, m in collection.modules.items() if name not in self.specs]
        for module in self.added:
            self.specs[module.name] = ModuleSpec(
                module.name, module.d_in, module.d_out, module.kind
            )
        self._places = {name: place for place, name in enumerate(self.specs)}
        self._check_shapes()
        check_calibration(options.calibration, collection)
        self.blocks = self._find_blocks()

    def _check_shapes(self) -> None:
        for name, module in self.collection.modules.items():
            spec = self.specs[name]
            if (module.d_in, module.d_out, module.kind) != (spec.d_in, spec.d_out, spec.kind):
                task_id = self.collection.task_ids[module.tasks[0]]
                raise AdapterError(
                    f"module {name} is a {module.d_out} x {module.d_in} {module.kind} in task "
                    f"{task_id!r} and a {spec.d_out} x {spec.d_in} {spec.kind} in the checkpoint; "
                    "add adapters of its base model only"
                )

    def _find_blocks(self) -> dict[str, list[Rows]]:
        segments: dict[int, list[Segment]] = {}
        for segment in self.checkpoint.usage():
            segments.setdefault(segment.module, []).append(segment)
        return {
            name: used_blocks(self.specs[name], segments.get(self._places[name], []))
            for name in self.collection.modules
        }

    def walk(self, names: Sequence[str]) -> Iterator[tuple[Module, Basis | None]]:
        """These modules with their bases as the checkpoint has them; one shard is held at a time."""
        wanted = dict.fromkeys(names)
        if any(self.specs[name].basis is not None for name in wanted):
            for name, basis in self.checkpoint.bases():
                if name in wanted:
                    del wanted[name]
                    yield self.collection.modules[name], basis
        for name in wanted:
            yield self.collection.modules[name], None

    def cores(self, spec: ModuleSpec) -> list[str]:
        """The number formats to try for cores on a module's basis; none where it has no basis."""
        return [] if spec.basis is None else self._formats.cores(spec.basis.format)

    def measure(self, progress: Progress) -> dict[tuple[int, str], ModuleChoices]:
        """The chain of every module of every new task, on the bases as they are."""
        found: dict[tuple[int, str], ModuleChoices] = {}
        names = list(self.collection.modules)
        progress("measure", 0, len(names))
        for done, (module, basis) in enumerate(self.walk(names), 1):
            survey = self.surveyor(SurveyJob(module.name, True, ()))
            metric = self.surveyor.metric(module.name)
            blocks = []
            if basis is not None:
                blocks = [BlockMeter(basis, rows, metric) for rows in self.blocks[module.name]]
            formats = self.cores(self.specs[module.name])
            for task, factors in zip(module.tasks, self.collection.read_module(module)):
                with self.collection.naming(task, module.name):
                    found[task, module.name] = choices_of(
                        self._places[module.name],
                        factors,
                        survey.private[task],
                        survey.norms[task],
                        blocks,
                        formats,
                    )
            progress("measure", done, len(names))
        return found

    def planner(self, choices: Choices, task: int) -> TaskPlanner:
        """The planner of one new task."""
        adapter = self.collection.adapters[task]
        chains = [choices[task, name] for name in adapter.modules]
        return TaskPlanner(list(self.specs.values()), chains, adapter.extra)

    @cached_property
    def worst_error(self) -> float:
        """Of the tasks that the checkpoint has."""
        return max(column(self.checkpoint.tasks, "error"), default=math.inf)

    @cached_property
    def worst_predicted(self) -> float:
        """The greatest predicted loss of a task that the checkpoint has."""
        found = (task for _, task in entries(self.checkpoint.tasks))
        return max((predicted_loss(t.error, t.representation) for t in found), default=0.0)
