"""``compress``: the order of the work."""

from typing import TYPE_CHECKING

from vllm_vlora.lazy import names_on_first_use

if TYPE_CHECKING:
    from vllm_vlora.compression.pipeline import compress, predict

__all__ = ["compress", "predict"]

__getattr__ = names_on_first_use(
    __name__,
    {
        "compress": "vllm_vlora.compression.pipeline",
        "predict": "vllm_vlora.compression.pipeline",
    },
)
