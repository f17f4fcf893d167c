"""PEFT adapter folders in, and many of them as one collection."""

from typing import TYPE_CHECKING

from vllm_vlora.lazy import names_on_first_use

if TYPE_CHECKING:
    from vllm_vlora.adapters.discovery import FoundAdapters, find_adapters
    from vllm_vlora.adapters.fused_experts import split_experts
    from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter

__all__ = [
    "Adapter",
    "FoundAdapters",
    "find_adapters",
    "open_adapter",
    "split_experts",
    "write_adapter",
]

__getattr__ = names_on_first_use(
    __name__,
    {
        "Adapter": "vllm_vlora.adapters.peft_folder",
        "FoundAdapters": "vllm_vlora.adapters.discovery",
        "find_adapters": "vllm_vlora.adapters.discovery",
        "open_adapter": "vllm_vlora.adapters.peft_folder",
        "split_experts": "vllm_vlora.adapters.fused_experts",
        "write_adapter": "vllm_vlora.adapters.peft_folder",
    },
)
