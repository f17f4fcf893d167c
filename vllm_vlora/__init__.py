"""Compress LoRA adapters into one checkpoint and serve every task of it from vLLM."""

from vllm_vlora._version import __version__

__all__ = ["__version__"]
