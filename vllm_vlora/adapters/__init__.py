"""PEFT adapter folders in, and many of them as one collection."""

from typing import TYPE_CHECKING

from vllm_vlora.lazy import names_on_first_use

if TYPE_CHECKING:
    from vllm_vlora.adapters.fused_experts import split_experts
    from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter

__all__ = ["Adapter", "open_adapter", "split_experts", "write_adapter"]

__getattr__ = names_on_first_use(
    __name__,
    {
        "Adapter": "vllm_vlora.adapters.peft_folder",
        "open_adapter": "vllm_vlora.adapters.peft_folder",
        "split_experts": "vllm_vlora.adapters.fused_experts",
        "write_adapter": "vllm_vlora.adapters.peft_folder",
    },
)
