"""How long the operations on a checkpoint take on this machine."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_vlora._version import __version__
from vllm_vlora.adapters.collection import Progress
from vllm_vlora.adapters.saved_tensors import saved_tensors
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import TaskNotFoundError
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.planning.flat_curves import FlatProjection
from vllm_vlora.quantize import unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.stored import Basis, FlatBasis
from vllm_vlora.timing import seconds_of, spread, take_turns

_Operation = Callable[[], object]


def time_operations(
    checkpoint: Checkpoint, task: str | None, runs: int, progress: Progress
) -> dict[str, Any]:
    """Time loading, switching, reconstructing, projecting and exporting, on the CPU.

    Args:
        task: whose; None is the first one. runs: of each operation, after one that does not count.

    Returns:
        JSON data: the task, the machine, and for each operation p20, p50 and p80 in milliseconds.

    Raises:
        TaskNotFoundError: there is no such task, or none at all.
    """
    chosen = _choose(checkpoint, task)
    results = []
    with tempfile.TemporaryDirectory(prefix="vllm-vlora-benchmark-") as scratch:
        operations = list(_operations(checkpoint, chosen, Path(scratch)))
        for done, (name, meaning, operation) in enumerate(operations, 1):
            results.append({"operation": name, "what": meaning, **_timed(operation, runs)})
            progress("time", done, len(operations))
    return {
        "tasks": len(checkpoint.tasks),
        "modules": len(checkpoint.modules),
        "task": chosen,
        "unit": "ms",
        "runs": runs,
        **_machine(),
        "results": results,
    }


def _choose(checkpoint: Checkpoint, task: str | None) -> str:
    if task is None:
        if not checkpoint.tasks:
            raise TaskNotFoundError(f"{checkpoint.path} has no tasks to time; add one first")
        return next(iter(checkpoint.tasks))
    checkpoint.record(task)
    return task


def _operations(
    checkpoint: Checkpoint, task: str, scratch: Path
) -> Iterator[tuple[str, str, _Operation]]:
    """(name, what it means, what to time)."""
    shared = {(name, kind): basis for name, kind, basis in checkpoint.shared()}
    stored = checkpoint.load_task(task)

    def load() -> None:
        fresh = Checkpoint.open(checkpoint.path)
        for _ in fresh.shared():
            pass
        for task_id in fresh.tasks:
            fresh.load_task(task_id)

    def reconstruct() -> dict[str, Any]:
        return {
            name: decode(module, shared.get((name, module.representation)))
            for name, module in stored.modules.items()
        }

    yield "load", "open; read and check all files", load
    yield "load task", "read and check one task's file", lambda: checkpoint.load_task(task)
    yield "reconstruct", "one task to factors A and B, float32", reconstruct
    yield from _switches(checkpoint, task)
    yield from _projection(shared, reconstruct())
    yield (
        "export",
        "one task to a PEFT folder",
        lambda: export_task(checkpoint, task, scratch / "export", force=True),
    )


def _switches(checkpoint: Checkpoint, task: str) -> Iterator[tuple[str, str, _Operation]]:
    """Switching a PyTorch model between this task and another, or the base where there is one only."""
    other = next((task_id for task_id in checkpoint.tasks if task_id != task), None)
    switched = [task_id for task_id in (task, other) if task_id is not None]
    for name, meaning, cached in (
        ("switch", "VLoRAModel.set_task, tasks kept ready", 2),
        ("switch, cold", "VLoRAModel.set_task, read from the checkpoint", 1),
    ):
        model = VLoRAModel(_skeleton(checkpoint, switched), checkpoint, cached_tasks=cached)
        yield name, meaning, _Switch(model, task, other)


class _Switch:
    """Sets ``task`` when called, after ``between`` has put another one in its place untimed."""

    def __init__(self, model: Any, task: str, other: str | None) -> None:
        self._model, self._task, self._other = model, task, other

    def between(self) -> None:
        if self._other is None:
            self._model.refresh()
            self._model.clear_task()
        else:
            self._model.set_task(self._other)

    def __call__(self) -> None:
        self._model.set_task(self._task)


def _projection(
    shared: dict[tuple[str, str], Basis], factors: dict[str, Any]
) -> Iterator[tuple[str, str, _Operation]]:
    """Projecting the task's factors on the bases of its modules, where there are some."""
    steps: list[_Operation] = []
    for (name, _), basis in shared.items():
        if name not in factors:
            continue
        a, b = factors[name]
        if isinstance(basis, FlatBasis):
            if a.shape[0] != basis.rank:
                continue
            flat = FlatProjection(basis, "float32")
            steps.append(lambda flat=flat, a=a, b=b: flat(a, b, 1.0))  # type: ignore[misc]
        else:
            u, v = unpack(basis.u), unpack(basis.v)
            steps.append(
                lambda u=u, v=v, a=a, b=b: encode_joint(a, b, 1.0, u, v, "float32")  # type: ignore[misc]
            )
    if steps:
        meaning = f"one task's factors on {len(steps)} shared bases"
        yield "project", meaning, lambda: [step() for step in steps]


def _skeleton(checkpoint: Checkpoint, tasks: Sequence[str]) -> nn.Module:
    """A model that these tasks fit: layers of the right names and shapes, whose weights take no memory.

    Copies of the base model's weights are the model's own, as they are in the model itself.
    """
    root = nn.Module()
    for spec in checkpoint.modules:
        embeds = spec.kind == "embedding"
        shape = (spec.d_in, spec.d_out) if embeds else (spec.d_out, spec.d_in)
        _put(root, f"{spec.name}.weight", _zeros(shape), embeds=embeds)
    for task in tasks:
        extra = checkpoint.load_task(task).extra
        saved = saved_tensors(extra, checkpoint.record(task).adapter_config or {})
        # A layer is known by its weight, so that comes before its bias.
        for one in sorted(saved, key=lambda one: -extra[one.key].ndim):
            tensor = extra[one.key]
            own = _zeros(tensor.shape, tensor.dtype) if one.whole else tensor.float()
            _put(root, one.name, own)
    return root


def _put(root: nn.Module, path: str, tensor: torch.Tensor, *, embeds: bool = False) -> None:
    """Make the layer of a tensor where there is none, and the tensor its own."""
    *parents, last, name = path.split(".")
    parent = root
    for part in parents:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    if last not in parent._modules:
        parent.add_module(last, _layer(tensor.shape, embeds))
    setattr(parent.get_submodule(last), name, nn.Parameter(tensor, requires_grad=False))


def _layer(shape: Sequence[int], embeds: bool) -> nn.Module:
    if len(shape) != 2:
        return nn.Module()
    if embeds:
        return nn.Embedding(shape[0], shape[1], device="meta")
    return nn.Linear(shape[1], shape[0], bias=False, device="meta")


def _zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros((1,) * len(shape), dtype=dtype).expand(*shape)


def _timed(operation: _Operation, runs: int) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds, after one run that is not counted."""

    def clock() -> float:
        if isinstance(operation, _Switch):
            operation.between()
        return seconds_of(operation)

    (times,) = take_turns([clock], runs)
    return spread(times, 1e3)


def _machine() -> dict[str, Any]:
    return {
        "device": f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {
            "vllm-vlora": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
