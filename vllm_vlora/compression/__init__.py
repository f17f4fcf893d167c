"""``compress``: the order of the work."""

from vllm_vlora.compression.pipeline import compress, predict

__all__ = ["compress", "predict"]
