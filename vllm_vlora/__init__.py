"""Compress LoRA adapters into one checkpoint and serve every task of it from vLLM.

Names are imported on first use: ``import vllm_vlora`` alone imports neither torch nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_vlora._version import __version__

if TYPE_CHECKING:
    from vllm_vlora.adapters import Adapter, open_adapter
    from vllm_vlora.adding import AddOptions, AddReport, add_adapters, remove_tasks
    from vllm_vlora.checkpoint import Checkpoint
    from vllm_vlora.compression import compress, predict
    from vllm_vlora.errors import VLoRAError
    from vllm_vlora.export import ConfigChanges, export_all, export_task
    from vllm_vlora.foreign.convert import convert
    from vllm_vlora.hub_repository import pull_checkpoint, push_checkpoint
    from vllm_vlora.memory import MemoryPlan, plan_memory
    from vllm_vlora.options import CompressOptions
    from vllm_vlora.plugin.requests import lora_request
    from vllm_vlora.rebuilding import rebuild
    from vllm_vlora.recovery import compress_to_quality
    from vllm_vlora.report import CompressReport
    from vllm_vlora.share_model import SHAREModel
    from vllm_vlora.subspace.algebra import (
        compute_svd,
        explained_variance_ratio,
        gram_schmidt,
        incremental_svd_update,
        nf4_pack,
        nf4_quantize_dequantize,
        nf4_unpack,
        project_onto_subspace,
        reconstruct_from_subspace,
        select_num_components,
    )
    from vllm_vlora.subspace.analysis import (
        adapter_diff,
        compute_similarity_matrix,
        find_clusters,
        find_outliers,
        subspace_coverage,
    )
    from vllm_vlora.subspace.blending import (
        blend_tasks,
        core_similarity,
        interpolate_tasks,
        negate_task,
    )
    from vllm_vlora.subspace.merging import dare_merge, task_arithmetic, ties_merge
    from vllm_vlora.subspace.model import VLoRAModel
    from vllm_vlora.subspace.pipeline import absorb_task, extract_adapter, init_subspace
    from vllm_vlora.subspace.router import TaskRouter
    from vllm_vlora.subspace.shared import SharedSubspace
    from vllm_vlora.subspace.tasks import TaskProjection
    from vllm_vlora.subspace.training import SubspaceTrainer, orthogonal_init
    from vllm_vlora.subspace.updates import LowRankUpdate, updates_of
    from vllm_vlora.subspace.weights import (
        LoRAWeights,
        load_adapter,
        load_adapter_from_hub,
        save_adapter,
    )
    from vllm_vlora.validation import validate

# Module -> the public names that it is the home of.
_NAMES = {
    "adapters": ("Adapter", "open_adapter"),
    "adding": ("AddOptions", "AddReport", "add_adapters", "remove_tasks"),
    "checkpoint": ("Checkpoint",),
    "compression": ("compress", "predict"),
    "errors": ("VLoRAError",),
    "export": ("ConfigChanges", "export_all", "export_task"),
    "foreign.convert": ("convert",),
    "hub_repository": ("pull_checkpoint", "push_checkpoint"),
    "memory": ("MemoryPlan", "plan_memory"),
    "options": ("CompressOptions",),
    "plugin.requests": ("lora_request",),
    "rebuilding": ("rebuild",),
    "recovery": ("compress_to_quality",),
    "report": ("CompressReport",),
    "share_model": ("SHAREModel",),
    "subspace.algebra": (
        "compute_svd",
        "explained_variance_ratio",
        "gram_schmidt",
        "incremental_svd_update",
        "nf4_pack",
        "nf4_quantize_dequantize",
        "nf4_unpack",
        "project_onto_subspace",
        "reconstruct_from_subspace",
        "select_num_components",
    ),
    "subspace.analysis": (
        "adapter_diff",
        "compute_similarity_matrix",
        "find_clusters",
        "find_outliers",
        "subspace_coverage",
    ),
    "subspace.blending": ("blend_tasks", "core_similarity", "interpolate_tasks", "negate_task"),
    "subspace.merging": ("dare_merge", "task_arithmetic", "ties_merge"),
    "subspace.model": ("VLoRAModel",),
    "subspace.pipeline": ("absorb_task", "extract_adapter", "init_subspace"),
    "subspace.router": ("TaskRouter",),
    "subspace.shared": ("SharedSubspace",),
    "subspace.tasks": ("TaskProjection",),
    "subspace.training": ("SubspaceTrainer", "orthogonal_init"),
    "subspace.updates": ("LowRankUpdate", "updates_of"),
    "subspace.weights": ("LoRAWeights", "load_adapter", "load_adapter_from_hub", "save_adapter"),
    "validation": ("validate",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Adapter",
    "AddOptions",
    "AddReport",
    "Checkpoint",
    "CompressOptions",
    "CompressReport",
    "ConfigChanges",
    "LoRAWeights",
    "LowRankUpdate",
    "MemoryPlan",
    "SHAREModel",
    "SharedSubspace",
    "SubspaceTrainer",
    "TaskProjection",
    "TaskRouter",
    "VLoRAError",
    "VLoRAModel",
    "__version__",
    "absorb_task",
    "adapter_diff",
    "add_adapters",
    "blend_tasks",
    "compress",
    "compress_to_quality",
    "compute_similarity_matrix",
    "compute_svd",
    "convert",
    "core_similarity",
    "dare_merge",
    "explained_variance_ratio",
    "export_all",
    "export_task",
    "extract_adapter",
    "find_clusters",
    "find_outliers",
    "gram_schmidt",
    "incremental_svd_update",
    "init_subspace",
    "interpolate_tasks",
    "load_adapter",
    "load_adapter_from_hub",
    "lora_request",
    "negate_task",
    "nf4_pack",
    "nf4_quantize_dequantize",
    "nf4_unpack",
    "open_adapter",
    "orthogonal_init",
    "plan_memory",
    "predict",
    "project_onto_subspace",
    "pull_checkpoint",
    "push_checkpoint",
    "rebuild",
    "reconstruct_from_subspace",
    "remove_tasks",
    "save_adapter",
    "select_num_components",
    "subspace_coverage",
    "task_arithmetic",
    "ties_merge",
    "updates_of",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vllm_vlora' has no attribute {name!r}")
    value = getattr(import_module(f"vllm_vlora.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
