"""From folders to folders: build a subspace, absorb an adapter, take a task out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.weights import LoRAWeights, save_adapter


def init_subspace(
    adapter_paths: Sequence[str | Path],
    task_ids: Sequence[str] | None = None,
    variance_threshold: float = 0.6,
    num_components: int | None = None,
    *,
    adaptive_k: bool = False,
    representation: str = "flat",
    missing: str = "error",
) -> SharedSubspace:
    """Fit a subspace to PEFT folders or Hub ids (``SharedSubspace.from_adapters``).

    Raises:
        AdapterError, OptionError, TaskIdError: as ``SharedSubspace.from_adapters``.

    Examples:
        >>> init_subspace(adapter_dirs, num_components=2)
        SharedSubspace(layers=2, k=2, rank=2, tasks=4, representation='flat')
    """
    return SharedSubspace.from_adapters(
        adapter_paths,
        task_ids,
        variance_threshold,
        num_components,
        adaptive_k,
        representation=representation,
        missing=missing,
    )


def absorb_task(subspace: SharedSubspace, adapter_path: str | Path, task_id: str) -> None:
    """Read an adapter and absorb it, in place (``SharedSubspace.absorb``).

    Raises:
        AdapterError, OptionError, TaskIdError: as ``SharedSubspace.absorb``.

    Examples:
        >>> absorb_task(subspace, adapter_dirs[0], "again")
        >>> len(subspace.tasks)
        5
    """
    subspace.absorb(adapter_path, task_id)


def extract_adapter(
    subspace: SharedSubspace, task_id: str, output_path: str | Path, *, force: bool = False
) -> LoRAWeights:
    """Write a task as a PEFT folder and return it.

    Args:
        force: replace a folder that holds a PEFT adapter and nothing else.

    Raises:
        TaskNotFoundError: no such task. OutputError: the folder may not be replaced or written.

    Examples:
        >>> extract_adapter(subspace, "task_0", folder / "task_0")
        LoRAWeights(rank=2, layers=2)
    """
    weights = subspace.reconstruct(task_id)
    save_adapter(weights, output_path, force=force)
    return weights
