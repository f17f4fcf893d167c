"""Compress LoRA adapters into one checkpoint and serve every task of it from vLLM.

Names are imported on first use: ``import vllm_vlora`` alone imports neither torch nor vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_vlora._version import __version__
from vllm_vlora.lazy import is_installed, names_on_first_use

if TYPE_CHECKING:
    from vllm_vlora.adapters.discovery import FoundAdapters, find_adapters
    from vllm_vlora.adapters.fused_experts import split_experts
    from vllm_vlora.adapters.peft_folder import Adapter, open_adapter
    from vllm_vlora.checkpoint.export import ConfigChanges, export_all, export_task
    from vllm_vlora.checkpoint.hub import pull_checkpoint, push_checkpoint
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.report import CompressReport
    from vllm_vlora.checkpoint.validation import validate
    from vllm_vlora.compression.options import CompressOptions
    from vllm_vlora.compression.pipeline import compress, predict
    from vllm_vlora.compression.quality import compress_to_quality
    from vllm_vlora.editing.adding import add_adapters
    from vllm_vlora.editing.options import AddOptions, AddReport
    from vllm_vlora.editing.rebuilding import rebuild
    from vllm_vlora.editing.removing import remove_tasks
    from vllm_vlora.errors import VLoRAError
    from vllm_vlora.foreign.convert import convert
    from vllm_vlora.locking import waiting_at_most
    from vllm_vlora.merging.analysis import (
        adapter_diff,
        compute_similarity_matrix,
        find_clusters,
        find_outliers,
        subspace_coverage,
    )
    from vllm_vlora.merging.blending import (
        blend_tasks,
        core_similarity,
        interpolate_tasks,
        negate_task,
    )
    from vllm_vlora.merging.merging import dare_merge, task_arithmetic, ties_merge
    from vllm_vlora.model.router import TaskRouter
    from vllm_vlora.model.training import SubspaceTrainer, orthogonal_init
    from vllm_vlora.model.updates import LowRankUpdate, updates_of
    from vllm_vlora.model.vlora_model import VLoRAModel
    from vllm_vlora.plugin.memory import MemoryPlan, plan_memory
    from vllm_vlora.plugin.publishing import publish, publish_async, unpublish, unpublish_async
    from vllm_vlora.plugin.requests import lora_request
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
    from vllm_vlora.subspace.pipeline import absorb_task, extract_adapter, init_subspace
    from vllm_vlora.subspace.share_model import SHAREModel
    from vllm_vlora.subspace.shared import SharedSubspace
    from vllm_vlora.subspace.tasks import TaskProjection
    from vllm_vlora.subspace.weights import (
        LoRAWeights,
        load_adapter,
        load_adapter_from_hub,
        save_adapter,
    )

_PUBLISHING = ("publish", "publish_async", "unpublish", "unpublish_async")
# Module -> the public names that it is the home of.
_NAMES = {
    "adapters.discovery": ("FoundAdapters", "find_adapters"),
    "adapters.fused_experts": ("split_experts",),
    "adapters.peft_folder": ("Adapter", "open_adapter"),
    "checkpoint.export": ("ConfigChanges", "export_all", "export_task"),
    "checkpoint.hub": ("pull_checkpoint", "push_checkpoint"),
    "checkpoint.reader": ("Checkpoint",),
    "checkpoint.report": ("CompressReport",),
    "checkpoint.validation": ("validate",),
    "compression.options": ("CompressOptions",),
    "compression.pipeline": ("compress", "predict"),
    "compression.quality": ("compress_to_quality",),
    "editing.adding": ("add_adapters",),
    "editing.options": ("AddOptions", "AddReport"),
    "editing.rebuilding": ("rebuild",),
    "editing.removing": ("remove_tasks",),
    "errors": ("VLoRAError",),
    "foreign.convert": ("convert",),
    "locking": ("waiting_at_most",),
    "merging.analysis": (
        "adapter_diff",
        "compute_similarity_matrix",
        "find_clusters",
        "find_outliers",
        "subspace_coverage",
    ),
    "merging.blending": ("blend_tasks", "core_similarity", "interpolate_tasks", "negate_task"),
    "merging.merging": ("dare_merge", "task_arithmetic", "ties_merge"),
    "model.router": ("TaskRouter",),
    "model.training": ("SubspaceTrainer", "orthogonal_init"),
    "model.updates": ("LowRankUpdate", "updates_of"),
    "model.vlora_model": ("VLoRAModel",),
    "plugin.memory": ("MemoryPlan", "plan_memory"),
    "plugin.publishing": _PUBLISHING,
    "plugin.requests": ("lora_request",),
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
    "subspace.pipeline": ("absorb_task", "extract_adapter", "init_subspace"),
    "subspace.share_model": ("SHAREModel",),
    "subspace.shared": ("SharedSubspace",),
    "subspace.tasks": ("TaskProjection",),
    "subspace.weights": ("LoRAWeights", "load_adapter", "load_adapter_from_hub", "save_adapter"),
}

__all__ = [
    "Adapter",
    "AddOptions",
    "AddReport",
    "Checkpoint",
    "CompressOptions",
    "CompressReport",
    "FoundAdapters",
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
    "find_adapters",
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
    "publish",
    "publish_async",
    "pull_checkpoint",
    "push_checkpoint",
    "rebuild",
    "reconstruct_from_subspace",
    "remove_tasks",
    "save_adapter",
    "select_num_components",
    "split_experts",
    "subspace_coverage",
    "task_arithmetic",
    "ties_merge",
    "unpublish",
    "unpublish_async",
    "updates_of",
    "validate",
    "waiting_at_most",
]
# Their homes import vLLM, which a plain install lacks: `import *` takes the others.
if not is_installed("vllm"):
    __all__ = [name for name in __all__ if name not in ("lora_request", *_PUBLISHING)]


_HOMES = {name: f"vllm_vlora.{home}" for home, names in _NAMES.items() for name in names}
__getattr__ = names_on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
