"""Tasks of several checkpoints as those of one: whatever is made of one's tasks can be made of them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import torch

from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.errors import BlendError
from vllm_vlora.representations.spec import ModuleSpec


class JoinedCheckpoint(Checkpoint):
    """A checkpoint that also has the tasks of others, which share nothing among theirs.

    Args:
        first: in whose place it stands; its bases are this one's.
        others: each with its own tasks, which stand before those of the same id.
        layer: a module's name -> the name of the layer of the model that it means.

    Raises:
        BlendError: a layer has other sizes in one of them than in another.
    """

    def __init__(
        self, first: Checkpoint, others: Sequence[Checkpoint], layer: Callable[[str], str]
    ) -> None:
        modules = _Modules(first.modules, layer)
        self._first = first
        # Whose a task is, and its modules' names there -> those here.
        self._holders: dict[str, tuple[Checkpoint, dict[str, str]]] = {}
        records = {}
        for other in others:
            places = [modules.place(spec) for spec in other.modules]
            names = {
                spec.name: modules.all[place].name for spec, place in zip(other.modules, places)
            }
            for task, record in other.tasks.items():
                self._holders[task] = other, names
                segments = [
                    msgspec.structs.replace(segment, module=places[segment.module])
                    for segment in record.segments
                ]
                records[task] = msgspec.structs.replace(record, segments=segments)
        config = msgspec.structs.replace(first.config, modules=modules.all)
        # Of an index no record is read for it.
        tasks = ChainMap(records, first.tasks)  # type: ignore[arg-type]
        super().__init__(first.path, config, tasks, first._state)

    def digest(self, task_id: str) -> str:
        """As the checkpoint says that has the task."""
        holder, _ = self._holders.get(task_id, (self._first, {}))
        return holder.digest(task_id)

    def load_task(
        self, task_id: str, device: torch.device | str = "cpu", narrow: bool = False
    ) -> StoredTask:
        """As the checkpoint does that has the task, under the names that modules have here."""
        if task_id not in self._holders:
            return self._first.load_task(task_id, device, narrow)
        holder, names = self._holders[task_id]
        stored = holder.load_task(task_id, device, narrow)
        return replace(stored, modules={names[name]: m for name, m in stored.modules.items()})


class _Modules:
    """Modules of several checkpoints, each layer once."""

    def __init__(self, modules: Sequence[ModuleSpec], layer: Callable[[str], str]) -> None:
        self.all = list(modules)
        self._layer = layer
        self._by_name = {spec.name: place for place, spec in enumerate(modules)}

    def place(self, spec: ModuleSpec) -> int:
        """Where a module stands, which comes last where its layer is not there yet."""
        place = self._by_name.get(spec.name)
        if place is None:
            layer = self._layer(spec.name)
            same = (n for n, held in enumerate(self.all) if self._layer(held.name) == layer)
            place = next(same, len(self.all))
            if place == len(self.all):
                self.all.append(ModuleSpec(spec.name, spec.d_in, spec.d_out, spec.kind))
            self._by_name[spec.name] = place
        held = self.all[place]
        if (held.d_in, held.d_out, held.kind) != (spec.d_in, spec.d_out, spec.kind):
            raise BlendError(
                f"module {spec.name} is {spec.d_out} x {spec.d_in} in one task and {held.d_out} x "
                f"{held.d_in} in another; blend tasks of one base model"
            )
        return place
