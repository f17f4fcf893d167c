"""The checkpoint folder: read, write, edit atomically, check, describe, export, push and pull."""

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter"]
