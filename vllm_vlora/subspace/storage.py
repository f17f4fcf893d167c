"""Subspaces in our checkpoint: what ``SharedSubspace.save`` writes and ``load`` reads.

Nothing but the checkpoint's own files is written, so that it is served, exported and validated like any
other. Floats come back bit for bit. Cores are stored dense, which is exact; ``vllm-vlora compress`` makes
smaller files. Singular values are derived from the tasks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_vlora.adapters.peft_config import lora_rank
from vllm_vlora.atomic import publish_folder
from vllm_vlora.checkpoint.card import model_card
from vllm_vlora.checkpoint.carried import keep_beside
from vllm_vlora.checkpoint.components import Asked, read_asked, write_asked
from vllm_vlora.checkpoint.layout import basis_nbytes, task_nbytes
from vllm_vlora.checkpoint.manifest import TaskRecord, is_checkpoint
from vllm_vlora.checkpoint.own_files import checkpoint_files
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import report_contents
from vllm_vlora.checkpoint.sources import checkpoint_folder
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import CheckpointError, OptionError
from vllm_vlora.foreign.vlora_files import META_FILE, VLoRAFiles
from vllm_vlora.quantize import FLOAT_DTYPES, FORMAT_OF_DTYPE, PackedMatrix, pack, unpack
from vllm_vlora.representations.flat import encode_flat
from vllm_vlora.representations.joint import dense_keeps_rank, split_core
from vllm_vlora.representations.spec import (
    BasisSpec,
    FlatSpec,
    ModuleSpec,
    Segment,
    fits_float32,
)
from vllm_vlora.representations.stored import FlatBasis, StoredModule
from vllm_vlora.subspace.fitting import core_rank, with_spectra
from vllm_vlora.subspace.layers import FlatLayer, JointLayer, Layer, Loadings, zero_loadings
from vllm_vlora.subspace.tasks import TaskOrigin, TaskProjection, with_loadings
from vllm_vlora.subspace.weights import has_alpha, plain_json


@dataclass(frozen=True)
class StoredSubspace:
    """What a checkpoint holds of a subspace; ``rank`` is the largest of its adapters."""

    layers: dict[str, Layer]
    tasks: dict[str, TaskProjection]
    rank: int
    asked: Asked = field(default_factory=Asked)


# --- writing --------------------------------------------------------------------------------------


def write_subspace(
    path: str | Path, stored: StoredSubspace, *, force: bool, allow_large_error: bool
) -> Path:
    """Publish a checkpoint atomically; returns its absolute path.

    Raises:
        BudgetError: a task is worse than none, and that is not allowed.
        OptionError: there is no task, or a dtype that cannot be stored.
        OutputError: the folder may not be replaced or cannot be written.
    """
    if not stored.tasks:
        raise OptionError("the subspace has no tasks; add one before it is saved")
    base_model = _base_model(stored.tasks)
    with publish_folder(path, force=force, owned=checkpoint_files) as folder:
        writer = CheckpointWriter(folder, base_model, allow_large_error=allow_large_error)
        for name, layer in stored.layers.items():
            _add_module(writer, name, layer)
        for task_id, task in stored.tasks.items():
            writer.add_task(
                task_id,
                _stored_modules(stored.layers, task),
                original_nbytes=original_nbytes(stored.layers, task, stored.rank),
                error=task.origin.error,
                adapter_config=_config(stored, task, base_model),
                source=task.origin.source,
                extra=task.origin.extra,
                renamed=task.origin.renamed,
            )
        contents = report_contents(
            folder, writer.tasks, writer.modules, basis_nbytes(writer.modules)
        )
        writer.finish(model_card(base_model, contents))
        keep_beside(Path(path).expanduser(), folder, writer.tasks)
        write_asked(folder, stored.asked)
    return Path(path).absolute()


def stored_nbytes(stored: StoredSubspace) -> int:
    """Bytes of the safetensors files that :func:`write_subspace` makes, heads left out."""
    places = {name: place for place, name in enumerate(stored.layers)}
    specs = [_spec(name, layer) for name, layer in stored.layers.items()]
    total = basis_nbytes(specs)
    for bare in stored.tasks.values():
        task = _with_layers(stored.layers, bare)
        segments = [
            Segment(places[name], representation(layer), _own_format(task, name), 1, core="dense")
            for name, layer in stored.layers.items()
            if name in task
        ]
        total += task_nbytes(segments, specs)
    return total


def original_nbytes(layers: Mapping[str, Layer], task: TaskProjection, rank: int) -> int:
    """A task's adapter's LoRA weights at 16 bits each; of one made here, an adapter's of ``rank``."""
    if task.origin.original_nbytes:
        return task.origin.original_nbytes
    held = [layer for name, layer in layers.items() if name in task]
    return 2 * sum(
        (layer.rank if isinstance(layer, FlatLayer) else rank) * (layer.d_in + layer.d_out)
        for layer in held
    )


def representation(layer: Layer) -> str:
    """``flat`` or ``joint``."""
    return "flat" if isinstance(layer, FlatLayer) else "joint"


def _spec(name: str, layer: Layer) -> ModuleSpec:
    spec = ModuleSpec(name, layer.d_in, layer.d_out, layer.kind)
    if isinstance(layer, FlatLayer):
        k_in, k_out = layer.widths
        spec.flat = FlatSpec(layer.rank, k_out, k_in, layer.format)
    else:
        spec.basis = BasisSpec(*layer.widths, layer.format)
    return spec


def _add_module(writer: CheckpointWriter, name: str, layer: Layer) -> None:
    if isinstance(layer, FlatLayer):
        writer.add_module(name, layer.d_in, layer.d_out, layer.kind, flat=layer.basis())
    else:
        writer.add_module(name, layer.d_in, layer.d_out, layer.kind, basis=layer.basis())


def _stored_modules(layers: Mapping[str, Layer], task: TaskProjection) -> dict[str, StoredModule]:
    # What changes no layer is stored with all of them at the scale zero: a task has one at least.
    scale = 1.0 if task.loadings_a else 0.0
    task = _with_layers(layers, task)
    modules = {}
    for name, layer in layers.items():
        if name not in task:
            continue
        first, second = task.at(name)
        format = _own_format(task, name)
        if isinstance(layer, FlatLayer):
            assert second is not None
            stored = encode_flat(first, second, format, layer.rank)
        else:
            core = _packed_core(task, name) or pack(first, format)
            # What quantising adds to a core lies in all directions, and all of it is kept here.
            rank = core_rank(first) if format in FLOAT_DTYPES else min(first.shape)
            stored = StoredModule("joint", format, rank, {"C": core}, core="dense")
        error = task.origin.errors.get(name, 0.0)
        modules[name] = dataclasses.replace(stored, error=error, scale=scale)
    return modules


def _with_layers(layers: Mapping[str, Layer], task: TaskProjection) -> TaskProjection:
    """The task; one that changes no layer with zeros in all of them."""
    if task.loadings_a:
        return task
    return with_loadings(task, {name: zero_loadings(layer) for name, layer in layers.items()})


def _own_format(task: TaskProjection, layer: str) -> str:
    """The number format of a task's own numbers in a layer."""
    packed = _packed_core(task, layer)
    if packed is not None:
        return packed.format
    first, second = task.at(layer)
    dtype = first.dtype if second is None else torch.promote_types(first.dtype, second.dtype)
    if dtype not in FORMAT_OF_DTYPE:
        raise OptionError(
            f"task {task.task_id!r} is {dtype}, which cannot be stored; call to(dtype=torch.float32) "
            "first"
        )
    return FORMAT_OF_DTYPE[dtype]


def _packed_core(task: TaskProjection, layer: str) -> PackedMatrix | None:
    """The core as it was quantised, unless it was changed since."""
    packed = task.packed_cores.get(layer)
    if packed is None:
        return None
    core = task.loadings_a[layer]
    return packed if torch.equal(unpack(packed).to(core), core) else None


def _config(stored: StoredSubspace, task: TaskProjection, base_model: str | None) -> dict[str, Any]:
    """The adapter's own config; for a task that was made here, one that says what it is."""
    if task.origin.metadata or not task.origin.scale_known:
        return plain_json(task.origin.metadata)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": stored.rank,
        "lora_alpha": stored.rank,
        "target_modules": [n for n in stored.layers if n in _with_layers(stored.layers, task)],
    }


def _base_model(tasks: Mapping[str, TaskProjection]) -> str | None:
    """The base model that most tasks name."""
    names = [task.origin.metadata.get("base_model_name_or_path") for task in tasks.values()]
    counts = Counter(str(name) for name in names if name)
    return counts.most_common(1)[0][0] if counts else None


# --- reading --------------------------------------------------------------------------------------


def read_subspace(ref: str | Path) -> StoredSubspace:
    """Read a checkpoint of ours whose tasks are all flat or all joint, or one of vlora.

    Raises:
        CheckpointError: it cannot be read, is damaged, or has tasks that no subspace can hold.
    """
    folder = checkpoint_folder(ref, foreign=True)
    if (folder / META_FILE).is_file() and not is_checkpoint(folder):
        return _read_vlora(VLoRAFiles.open(folder))
    checkpoint = Checkpoint.open(folder)
    wanted = _one_representation(checkpoint)
    kinds = {module.name: module.kind for module in checkpoint.modules}
    layers: dict[str, Layer] = {}
    for name, shared, basis in checkpoint.shared():
        if shared != wanted:
            continue
        if isinstance(basis, FlatBasis):
            layers[name] = FlatLayer.from_basis(basis, kinds[name])
        else:
            layers[name] = JointLayer.from_basis(basis, kinds[name])
    flat = any(isinstance(layer, FlatLayer) for layer in layers.values())
    scales = _flat_scales(checkpoint) if flat else {}
    layers = {n: _rescaled(layer, scales.get(n, 1.0)) for n, layer in layers.items()}
    tasks = {task_id: _read_task(checkpoint, task_id, layers) for task_id in checkpoint.tasks}
    rank = max(adapter_rank(checkpoint, record) for record in checkpoint.tasks.values())
    return _finished(layers, tasks, rank, read_asked(folder))


def with_alpha(stored: StoredSubspace, alpha: float) -> StoredSubspace:
    """The subspace with the alpha of its tasks, none of which has one yet, folded in as alpha / r.

    Raises:
        OptionError: a task has its own, or ``alpha`` is no number for a scale.
    """
    if not fits_float32(alpha) or alpha == 0:
        raise OptionError(
            f"lora_alpha is {alpha}; give a number other than zero that float32 holds"
        )
    known = next((name for name, task in stored.tasks.items() if task.origin.scale_known), None)
    if known is not None:
        raise OptionError(
            f"task {known!r} has its own alpha / r, which is part of its update already; leave "
            "lora_alpha out"
        )
    layers: dict[str, Layer] = {}
    scales: dict[str, float] = {}
    for name, layer in stored.layers.items():
        scales[name] = alpha / (layer.rank if isinstance(layer, FlatLayer) else stored.rank)
        # Of a joint layer the cores have all of it.
        layers[name] = _rescaled(layer, scales[name]) if isinstance(layer, FlatLayer) else layer
    tasks = {
        task_id: with_loadings(
            task,
            {name: _scaled(task.at(name), scales[name]) for name in task.loadings_a},
            dataclasses.replace(task.origin, scale_known=True),
        )
        for task_id, task in stored.tasks.items()
    }
    return dataclasses.replace(stored, layers=with_spectra(layers, tasks.values()), tasks=tasks)


def _scaled(loadings: Loadings, scale: float) -> Loadings:
    """What makes the update ``scale`` times as large, of a flat layer along with its mean of B."""
    first, second = loadings
    return (first * scale, None) if second is None else (first, second * scale)


def _one_representation(checkpoint: Checkpoint) -> str:
    for task_id, record in checkpoint.tasks.items():
        for segment in record.segments:
            if segment.is_private:
                raise _cannot_hold(checkpoint, f"task {task_id!r} is stored privately")
            if segment.rows is not None and (segment.rows[0] or segment.rows[2]):
                raise _cannot_hold(checkpoint, f"task {task_id!r} stands on a basis of a cluster")
    found = {s.representation for r in checkpoint.tasks.values() for s in r.segments}
    if len(found) != 1:
        what = "it has no tasks" if not found else "some tasks are flat and some joint"
        raise _cannot_hold(checkpoint, what)
    return found.pop()


def _cannot_hold(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {why}, which is no SharedSubspace; open it with Checkpoint.open, or run its "
        "tasks with VLoRAModel"
    )


def _read_task(checkpoint: Checkpoint, task_id: str, layers: Mapping[str, Layer]) -> TaskProjection:
    record, stored = checkpoint.record(task_id), checkpoint.load_task(task_id)
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    packed: dict[str, PackedMatrix] = {}
    for name, module in stored.modules.items():
        if module.is_flat and module.scale == 0:
            continue  # An update of zero, which no loadings stand for.
        loadings = _read_loadings(module, layers[name])
        first[name] = loadings[0]
        if loadings[1] is not None:
            second[name] = loadings[1]
        if module.core == "dense" and module.format not in FLOAT_DTYPES:
            packed[name] = module.matrices["C"]
    config = record.adapter_config
    origin = TaskOrigin(
        config,
        dict(stored.extra),
        {name: module.error for name, module in stored.modules.items()},
        record.error,
        record.original_nbytes,
        record.source,
        has_alpha(config),
        record.renamed,
    )
    return TaskProjection(task_id, first, second, origin, packed)


def _read_loadings(module: StoredModule, layer: Layer) -> Loadings:
    dtype = FLOAT_DTYPES.get(module.format, torch.float32)
    if isinstance(layer, FlatLayer):
        loadings_a, loadings_b = (unpack(module.matrices[side], dtype)[0] for side in "AB")
        # The scale, which stands on B, was taken into its mean (``_rescaled``).
        return loadings_a.clone(), loadings_b * module.scale
    if module.core == "dense":
        core = unpack(module.matrices["C"], dtype)
        if not dense_keeps_rank(module.format, module.rank, core.shape):
            a, b = split_core(core, module.rank)
            core = b.T @ a
    else:
        core = unpack(module.matrices["B"]).T @ unpack(module.matrices["A"])
    return layer.widened((core.clone() if module.scale == 1.0 else core * module.scale, None))


def _flat_scales(checkpoint: Checkpoint) -> dict[str, float]:
    """The scale that all tasks have in each layer; one that leaves it alone has zero."""
    scales: dict[str, float] = {}
    for record in checkpoint.tasks.values():
        for segment in record.segments:
            if segment.scale == 0:
                continue
            name = checkpoint.modules[segment.module].name
            if scales.setdefault(name, segment.scale) != segment.scale:
                raise _cannot_hold(checkpoint, f"flat tasks have several scales in layer {name}")
    return scales


def _rescaled(layer: Layer, scale: float) -> Layer:
    if scale == 1.0:
        return layer
    assert isinstance(layer, FlatLayer)
    return dataclasses.replace(layer, mean_b=layer.mean_b * scale, packed=None)


def adapter_rank(checkpoint: Checkpoint, record: TaskRecord) -> int:
    """The largest rank of a task's adapter; where its config says none, of what is stored."""
    config = record.adapter_config
    if not isinstance(config.get("r"), int):
        return record.max_rank
    names = [checkpoint.modules[segment.module].name for segment in record.segments]
    return max((lora_rank(config, record.own_name(name)) for name in names), default=1)


def _read_vlora(files: VLoRAFiles) -> StoredSubspace:
    """Components, means and loadings as vlora has them; it keeps no alpha."""
    layers: dict[str, Layer] = {}
    for name in files.layer_names:
        found = files.layer(name)
        sides = (found.mean_a, found.components_a, found.mean_b, found.components_b)
        layers[name] = FlatLayer(*sides, torch.zeros(0), torch.zeros(0))
    tasks = {}
    for task_id in files.task_ids:
        loadings = files.loadings(task_id)
        first, second = ({n: pair[side] for n, pair in loadings.items()} for side in (0, 1))
        tasks[task_id] = TaskProjection(task_id, first, second, TaskOrigin(scale_known=False))
    return _finished(layers, tasks, files.rank, files.asked)


def _finished(
    layers: dict[str, Layer], tasks: dict[str, TaskProjection], rank: int, asked: Asked
) -> StoredSubspace:
    """All in the one dtype that holds every number, with singular values."""
    kept = [layer.dtype for layer in layers.values()]
    kept += [t.dtype for task in tasks.values() for t in task.loadings_a.values()]
    kept += [t.dtype for task in tasks.values() for t in task.loadings_b.values()]
    dtype = kept[0]
    for other in kept[1:]:
        dtype = torch.promote_types(dtype, other)
    layers = {name: layer.to(None, dtype) for name, layer in layers.items()}
    tasks = {
        task_id: dataclasses.replace(
            task,
            loadings_a={n: t.to(dtype) for n, t in task.loadings_a.items()},
            loadings_b={n: t.to(dtype) for n, t in task.loadings_b.items()},
        )
        for task_id, task in tasks.items()
    }
    return StoredSubspace(with_spectra(layers, tasks.values()), tasks, rank, asked)
