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
    from vllm_vlora.export import export_all, export_task
    from vllm_vlora.memory import MemoryPlan, plan_memory
    from vllm_vlora.options import CompressOptions
    from vllm_vlora.plugin.requests import lora_request
    from vllm_vlora.rebuilding import rebuild
    from vllm_vlora.recovery import compress_to_quality
    from vllm_vlora.report import CompressReport
    from vllm_vlora.validation import validate

_HOME = {
    "Adapter": "adapters",
    "open_adapter": "adapters",
    "Checkpoint": "checkpoint",
    "CompressOptions": "options",
    "CompressReport": "report",
    "compress": "compression",
    "predict": "compression",
    "compress_to_quality": "recovery",
    "AddOptions": "adding",
    "AddReport": "adding",
    "add_adapters": "adding",
    "remove_tasks": "adding",
    "rebuild": "rebuilding",
    "VLoRAError": "errors",
    "export_all": "export",
    "export_task": "export",
    "MemoryPlan": "memory",
    "plan_memory": "memory",
    "lora_request": "plugin.requests",
    "validate": "validation",
}

__all__ = [
    "AddOptions",
    "AddReport",
    "Adapter",
    "Checkpoint",
    "CompressOptions",
    "CompressReport",
    "MemoryPlan",
    "VLoRAError",
    "__version__",
    "add_adapters",
    "compress",
    "compress_to_quality",
    "export_all",
    "export_task",
    "lora_request",
    "open_adapter",
    "plan_memory",
    "predict",
    "rebuild",
    "remove_tasks",
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
