"""The checkpoint folder: read, write, edit atomically, check, describe, export, push and pull."""

from typing import TYPE_CHECKING

from vllm_vlora.lazy import names_on_first_use

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter"]

__getattr__ = names_on_first_use(
    __name__,
    {
        "Checkpoint": "vllm_vlora.checkpoint.reader",
        "CheckpointWriter": "vllm_vlora.checkpoint.writer",
    },
)
