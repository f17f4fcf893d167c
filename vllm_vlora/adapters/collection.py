"""The adapters as one collection: by number, their modules united by layer, read either way.

Nothing here holds weights: every pass over the collection reads them again, module by module or
task by task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm_vlora.adapters.module_names import layer_shapes, shared_prefixes
from vllm_vlora.adapters.peft_config import base_name
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.errors import AdapterError
from vllm_vlora.representations.factors import ScaledFactors
from vllm_vlora.representations.spec import ModuleSpec
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.wording import some_of

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Module:
    """A module that some tasks adapt; ``tasks`` (their numbers) and ``ranks`` run in parallel.

    ``index`` is its place among the collection's modules, ``dtype`` holds that of every task.
    """

    index: int
    name: str
    d_in: int
    d_out: int
    kind: str
    tasks: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def original_nbytes(self) -> int:
        """Bytes of its LoRA weights in all tasks, at 16 bits each."""
        return 2 * sum(self.ranks) * (self.d_in + self.d_out)


class Collection:
    """The adapters by number, and the union of their modules.

    Where adapters have several names for one layer they are renamed, see ``module_names``.

    Args:
        known: modules whose names stay: those of the checkpoint that the adapters are added to.

    Raises:
        AdapterError: there are none, or two contradict each other.
        TaskIdError: a task id that is not allowed.
    """

    def __init__(self, adapters: Mapping[str, Adapter], known: Iterable[ModuleSpec] = ()) -> None:
        if not adapters:
            raise AdapterError("there are no adapters to compress; name at least one")
        self.task_ids = [validate_task_id(task_id) for task_id in adapters]
        self.adapters = under_shared_names(list(adapters.values()), known)
        self.original_nbytes = sum(adapter.original_nbytes for adapter in self.adapters)
        self.modules = self._unite()

    def _unite(self) -> dict[str, Module]:
        holders: dict[str, list[int]] = {}
        for task, adapter in enumerate(self.adapters):
            if not adapter.modules:
                raise AdapterError(
                    f"task {self.task_ids[task]!r} has no LoRA modules; leave it out"
                )
            for name in adapter.modules:
                holders.setdefault(name, []).append(task)
        return {
            name: self._module(index, name, holders[name])
            for index, name in enumerate(sorted(holders))
        }

    def _module(self, index: int, name: str, tasks: list[int]) -> Module:
        parts = [self.adapters[task].modules[name] for task in tasks]
        first, dtype = parts[0], parts[0].dtype
        for task, part in zip(tasks, parts):
            if (part.d_in, part.d_out, part.kind) != (first.d_in, first.d_out, first.kind):
                raise AdapterError(
                    f"module {name} is a {first.d_out} x {first.d_in} {first.kind} in task "
                    f"{self.task_ids[tasks[0]]!r} and a {part.d_out} x {part.d_in} {part.kind} in "
                    f"task {self.task_ids[task]!r}; compress adapters of one base model only"
                )
            dtype = torch.promote_types(dtype, part.dtype)
        ranks = tuple(part.rank for part in parts)
        return Module(index, name, first.d_in, first.d_out, first.kind, tuple(tasks), ranks, dtype)

    def read_module(
        self, module: Module, tasks: Sequence[int] | None = None
    ) -> Iterator[ScaledFactors]:
        """(A, B, scale) of one module of these tasks, by default all, in their order."""
        for task in module.tasks if tasks is None else tasks:
            adapter = self.adapters[task]
            a, b = adapter.factors(module.name)
            yield a, b, adapter.modules[module.name].scale

    def read_task(self, task: int, names: Sequence[str]) -> Iterator[tuple[str, ScaledFactors]]:
        """(module name, (A, B, scale)) of one task, in the order of ``names``."""
        adapter = self.adapters[task]
        for name, (a, b) in adapter.iter_factors(names):
            yield name, (a, b, adapter.modules[name].scale)

    @contextmanager
    def naming(self, task: int, module: str) -> Iterator[None]:
        """Turn a value that cannot be packed into an error that names where it stands."""
        try:
            yield
        except ValueError as error:
            raise AdapterError(f"task {self.task_ids[task]!r}, module {module}: {error}") from error


def under_shared_names(
    adapters: Sequence[Adapter], known: Iterable[ModuleSpec] = ()
) -> list[Adapter]:
    """The adapters with one name for each layer, where there is no doubt that it is one.

    Args:
        known: modules whose names stay.
    """
    shapes = [layer_shapes(adapter.modules) for adapter in adapters]
    found = shared_prefixes(shapes, layer_shapes({module.name: module for module in known}))
    return [
        adapter.under_names(prefixes) if prefixes else adapter
        for adapter, prefixes in zip(adapters, found)
    ]


def reading_warnings(adapters: Mapping[str, Adapter]) -> list[str]:
    """What was found in adapters and is not followed; a line each kind, naming the tasks."""
    said: dict[str, list[str]] = {}
    for task_id, adapter in adapters.items():
        for warning in adapter.warnings:
            said.setdefault(warning, []).append(repr(task_id))
    return [f"{some_of(tasks)}: {warning}" for warning, tasks in said.items()]


def common_base_model(adapters: Mapping[str, Adapter]) -> tuple[str | None, str | None]:
    """The base model that most adapters name, and a warning where they name several, or its revisions."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for task_id, adapter in adapters.items():
        name = base_name(adapter.config)
        if adapter.base_model is not None and name is not None:
            counts[adapter.base_model] += 1
            first.setdefault(name, task_id)
    if not counts:
        return None, None
    common = counts.most_common(1)[0][0]
    if len(first) == 1:
        return common, None
    named = [f"{name} (task {task_id!r})" for name, task_id in first.items()]
    return common, other_bases(named, f"recorded as {common}", "compress them apart")


def other_bases(named: Iterable[str], taken: str, advice: str) -> str:
    """What to say of adapters that name several base models.

    Args:
        taken: which of them is taken. advice: where they are not copies of one.
    """
    return (
        f"the adapters name different base models: {some_of(named)}; {taken}. If they are not copies of "
        f"one model, {advice}"
    )
