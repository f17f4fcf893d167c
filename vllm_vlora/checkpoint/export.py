"""Take a task out of a checkpoint: a standard PEFT folder that PEFT and stock vLLM load.

A task whose every module is *kept as it was* (private factors in a floating-point format, with the
rank and the scale that its own ``adapter_config`` gives) is written back bit for bit, with that
config; only where it does not select every module, or leaves that to the model ("all-linear"), are its
targets written anew. Any other task gets a config that describes the decoded factors:

- ``r`` is the most common rank; the others stand in ``rank_pattern`` under full module names.
- One scale s serves all modules, the most common one; B of a module with another scale is
  multiplied with scale / s. With s = alpha_m / r_m everywhere, versions of vLLM that ignore
  ``rank_pattern`` and ``alpha_pattern`` and take lora_alpha / r for every module are right too.
- ``target_modules`` lists the full names of exactly the adapted modules.

Modules have the names that the task's own adapter had, also where the checkpoint has others.
Tokenizer files and chat templates that were kept with the task are written beside them.

Private factors in a floating-point format are written in that format's dtype where their scale stays,
all others in float32, which holds what they decode to: products of a core and a basis too. 16 bits round
it once more (2**-9 relative in bfloat16), which on a model in float32 changes answers that are near a
tie; vLLM casts to the model's type either way.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_vlora.adapters.peft_config import OF_NEW_FACTORS, lora_rank, lora_scale, rank_options
from vllm_vlora.adapters.peft_folder import Factors, write_adapter
from vllm_vlora.adapters.peft_targets import full_targets, selects_all
from vllm_vlora.atomic import check_apart, exists_error
from vllm_vlora.checkpoint.attachments import read_attached
from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.errors import (
    CheckpointError,
    CheckpointReplacedError,
    OptionError,
    OutputError,
    VLoRAError,
)
from vllm_vlora.quantize import FLOAT_DTYPES, is_finite
from vllm_vlora.representations.registry import side_sources
from vllm_vlora.representations.stored import Basis, StoredModule
from vllm_vlora.task_ids import encode_task_id
from vllm_vlora.wording import count_of

logger = logging.getLogger(__name__)

_DECODED_DTYPE = torch.float32
# What tasks share, by the module's name and the tasks' representation.
_Shared = Mapping[tuple[str, str], Basis]


@dataclass(frozen=True)
class ConfigChanges:
    """What an exported ``adapter_config.json`` is to say; delta_W stays what it is.

    Attributes:
        alpha: ``lora_alpha``, at the most common rank; B is scaled to match. None keeps the task's.
        base_model: ``base_model_name_or_path``; None keeps the task's.
        target_modules: last parts of module names ("q_proj") that select the adapted modules;
            None keeps the task's.

    Raises:
        OptionError: alpha is not a positive number, or the list of targets is empty.

    Examples:
        >>> changes = ConfigChanges(alpha=32, base_model="org/model")
        >>> path = export_task(Checkpoint.open(checkpoint), "task_1", folder / "lora", changes=changes)
        >>> open_adapter(path).config["lora_alpha"], open_adapter(path).base_model
        (32, 'org/model')
    """

    alpha: float | None = None
    base_model: str | None = None
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise OptionError(f"alpha must be a positive number, got {self.alpha}")
        if self.target_modules is not None and not all(self.target_modules or ("",)):
            raise OptionError("target_modules must name modules: q_proj,v_proj")

    def apply(self, config: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
        """The config with these changes.

        Raises:
            OptionError: an adapted module is no target.
        """
        changed = dict(config)
        if self.base_model is not None:
            changed["base_model_name_or_path"] = self.base_model
        if self.target_modules is not None:
            for name in modules:
                if not any(f".{name}".endswith(f".{target}") for target in self.target_modules):
                    raise OptionError(
                        f"the task adapts {name}, which none of the target modules "
                        f"{', '.join(self.target_modules)} selects; name them all"
                    )
            changed["target_modules"] = list(self.target_modules)
        return changed


def export_task(
    checkpoint: Checkpoint,
    task_id: str,
    output: str | Path,
    *,
    force: bool = False,
    dtype: torch.dtype | None = None,
    changes: ConfigChanges | None = None,
) -> Path:
    """Write one task as the PEFT folder ``output``, atomically.

    Args:
        force: replace a folder that holds a PEFT adapter and nothing else.
        dtype: of the LoRA factors; None picks it per module (see the module's docstring).
        changes: to the config that is written.

    Returns:
        The folder's absolute path.

    Raises:
        TaskNotFoundError, CheckpointError: no such task, or the checkpoint is damaged.
        OptionError: the changes do not fit the task.
        OutputError: the folder may not be replaced or cannot be written.

    Examples:
        >>> path = export_task(Checkpoint.open(checkpoint), "task_1", folder / "lora")
        >>> sorted(file.name for file in path.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    bases = checkpoint.shared_by([task_id])
    return _export(checkpoint, task_id, bases, Path(output), force, dtype, changes)


def export_all(
    checkpoint: Checkpoint,
    task_ids: Iterable[str],
    output: str | Path,
    *,
    force: bool = False,
    dtype: torch.dtype | None = None,
    changes: ConfigChanges | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Path]:
    """Write tasks as the PEFT folders ``output/<portable name>``, each atomically.

    The name is :func:`task_ids.encode_task_id` of the task id. The bases are read once and held in
    their stored form. Unknown tasks and folders in the way are found before anything is written.

    Args:
        progress: called with (task id, tasks done, all tasks).

    Returns:
        Task id -> folder, in the order given, each task once.

    Raises:
        As :func:`export_task`; what was written before stays, and the message says how much, as a
            warning does of an interrupt.

    Examples:
        >>> written = export_all(Checkpoint.open(checkpoint), ["task_0", "task_3"], folder)
        >>> [path.name for path in written.values()]
        ['task_0', 'task_3']
    """
    folders = {task: Path(output).absolute() / encode_task_id(task) for task in task_ids}
    for task_id in folders:
        checkpoint.record(task_id)
    if not force:
        for folder in folders.values():
            _check_absent(folder)
    bases = checkpoint.shared_by(folders)
    written = 0
    try:
        for task_id, folder in folders.items():
            _export(checkpoint, task_id, bases, folder, force, dtype, changes)
            written += 1
            if progress is not None:
                progress(task_id, written, len(folders))
    except (VLoRAError, KeyboardInterrupt) as error:
        if not written:
            raise
        kept = (
            f"written before that and kept: {written} of {count_of(len(folders), 'task')}, "
            "--force replaces them"
        )
        if isinstance(error, KeyboardInterrupt):
            logger.warning("interrupted; %s", kept)
            raise
        # Adapters of two states do not belong together: not the error that begins again.
        kind = OutputError if isinstance(error, CheckpointReplacedError) else type(error)
        raise kind(f"{error}; {kept}") from error
    return folders


def _check_absent(folder: Path) -> None:
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise OutputError(f"cannot look into {folder}: {error.strerror}") from error
    if taken:
        raise exists_error(folder)


def _export(
    checkpoint: Checkpoint,
    task_id: str,
    bases: _Shared,
    output: Path,
    force: bool,
    dtype: torch.dtype | None,
    changes: ConfigChanges | None,
) -> Path:
    changes = changes or ConfigChanges()
    check_apart(output, [checkpoint.path])
    task = checkpoint.load_task(task_id)
    if not task.modules:
        raise CheckpointError(f"{checkpoint.path}: task {task_id!r} adapts no module")
    record = checkpoint.record(task_id)
    original = record.adapter_config
    # The adapter's own names, which are those of the model that it was made for.
    named = {record.own_name(name): stored for name, stored in task.modules.items()}
    kinds = {record.own_name(m.name): m.kind for m in checkpoint.modules if m.name in task.modules}
    if changes.alpha is None and _kept_as_it_was(named, original):
        targets = {} if selects_all(original, named) else full_targets(named)
        config, scale = {**original, **targets}, None
    else:
        rank = _common_rank(task)
        scale = _common_scale(task) if changes.alpha is None else changes.alpha / rank
        config = _new_config(named, original, scale, checkpoint.base_model)
    factors = _factors(task, bases, scale, dtype)
    return write_adapter(
        output,
        changes.apply(config, named),
        ((record.own_name(name), pair) for name, pair in factors),
        kinds,
        task.extra,
        companions=read_attached(checkpoint.path, checkpoint.attachments.get(task_id, {})),
        force=force,
    )


def _kept_as_it_was(modules: Mapping[str, StoredModule], config: Mapping[str, Any]) -> bool:
    """Whether ``config`` gives every stored module its rank and scale, so that it may stay."""
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        return False
    try:
        return all(
            stored.is_private
            and stored.format in FLOAT_DTYPES
            and stored.rank == lora_rank(config, name)
            # Of an update of zero the scale is not kept.
            and stored.scale in (0.0, lora_scale(config, name, stored.rank)[1])
            for name, stored in modules.items()
        )
    # A config without these numbers, or with patterns that are none, describes nothing.
    except (KeyError, TypeError, ValueError, AttributeError, re.error):
        return False


def _common_scale(task: StoredTask) -> float:
    """The most common scale other than zero; 1 if there is none."""
    counts = Counter(stored.scale for stored in task.modules.values() if stored.scale != 0.0)
    return counts.most_common(1)[0][0] if counts else 1.0


def _common_rank(task: StoredTask) -> int:
    return Counter(stored.rank for stored in task.modules.values()).most_common(1)[0][0]


def _factors(
    task: StoredTask,
    bases: _Shared,
    scale: float | None,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Factors]]:
    """Yield (name, (A, B)) with delta_W = scale * B A; ``scale`` None: each module's own."""
    for name, stored in task.modules.items():
        source_a, source_b = side_sources(stored, bases.get((name, stored.representation)))
        remaining = stored.scale / scale if scale is not None else 1.0
        b = dataclasses.replace(source_b, scale=remaining).to_dense().T
        # Times 1 and times 0 every dtype holds what it held.
        as_stored = stored.is_private and remaining in (0.0, 1.0)
        own = FLOAT_DTYPES.get(stored.format) if as_stored else None
        wanted = dtype or own or _DECODED_DTYPE
        yield name, (_cast(task, name, source_a.to_dense(), wanted), _cast(task, name, b, wanted))


def _cast(task: StoredTask, name: str, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = matrix.to(dtype)
    if not is_finite(result):
        raise CheckpointError(
            f"task {task.task_id!r}, module {name}: values up to {matrix.abs().max():.3g} do not "
            f"fit {dtype}; export with dtype float32"
        )
    return result


def _new_config(
    modules: Mapping[str, StoredModule],
    original: Mapping[str, Any],
    scale: float,
    base_model: str | None,
) -> dict[str, Any]:
    """``original`` with ranks, alphas and targets that describe the decoded factors."""
    pairs = {name: (stored.rank, scale * stored.rank) for name, stored in modules.items()}
    config = {"task_type": None, **original, **OF_NEW_FACTORS}
    config.update(
        rank_options(pairs),
        peft_type="LORA",
        **full_targets(pairs),
    )
    if not config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = base_model
    return config
