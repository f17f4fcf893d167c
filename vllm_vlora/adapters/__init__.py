"""PEFT adapter folders in, and many of them as one collection."""

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter

__all__ = ["Adapter", "open_adapter", "write_adapter"]
