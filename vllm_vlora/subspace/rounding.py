"""Quantise what tasks share, and their own numbers."""

from __future__ import annotations

from torch import Tensor

from vllm_vlora.errors import OptionError
from vllm_vlora.quantize import NF4_BLOCK, PackedMatrix, pack, unpack
from vllm_vlora.subspace.algebra import nf4_quantize_dequantize
from vllm_vlora.subspace.layers import Layer, Loadings, round_rows

INT4 = "int4"
"""Rows on 15 levels. Not one of ``quantize.FORMATS``: it is saved as floats."""


def check_quantization(bits: int, method: str, block_size: int, double_quant: bool) -> str:
    """The format that options of ``SharedSubspace.quantize`` mean.

    Raises:
        OptionError: an option that does not exist or fit.
    """
    if method not in ("symmetric", "nf4"):
        raise OptionError(f"method is {method!r}; give symmetric or nf4")
    if bits not in (4, 8):
        raise OptionError(f"bits is {bits}; give 4 or 8")
    if block_size != NF4_BLOCK:
        raise OptionError(f"block_size is {block_size}; the format has blocks of {NF4_BLOCK}")
    if method == "nf4":
        return "nf4-dq" if double_quant else "nf4"
    if double_quant:
        raise OptionError('double_quant is for method="nf4"; leave it out')
    return "int8" if bits == 8 else INT4


def quantized_layer(layer: Layer, format: str) -> Layer:
    """The layer as it is in a format."""
    return layer.rounded(4) if format == INT4 else layer.quantized(format)


def quantized_loadings(loadings: Loadings, format: str) -> tuple[Loadings, PackedMatrix | None]:
    """A task's numbers in one layer as they are in a format, and a core's packing, if it has one."""
    first, second = loadings
    if second is not None:
        return (_rounded(first, format), _rounded(second, format)), None
    if format == INT4:
        return (round_rows(first, 4), None), None
    packed = pack(first, format)
    return (unpack(packed).to(first), None), packed


def _rounded(vector: Tensor, format: str) -> Tensor:
    """A flat task's loadings on the levels of a format."""
    if format in (INT4, "int8"):
        return round_rows(vector, 4 if format == INT4 else 8)
    return nf4_quantize_dequantize(vector, double_quant=format == "nf4-dq")
