"""What punica is told of batches in which no adapter stands in a slot: once, and not at every new size.

vLLM derives punica's index tensors anew for each batch that differs from the last one. On a GPU it then
asks the device whether any adapter is in use (``LoRAKernelMeta.prepare_tensors``), for tokens and for
samples, twice each: the host waits for the step before, which asynchronous scheduling is there to avoid.
Batches of direct tasks alone have a new size with every prompt that comes and request that ends, and all
that punica must know of them is that none of its adapters is in them: tensors of -1 (0 for embeddings),
which are right for any shorter batch too, and how many of their elements count.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU


def update_seldom(wrapper: Any) -> None:
    """Have one of vLLM's punica wrappers derive its tensors only where they change."""
    on_device = isinstance(wrapper, PunicaWrapperGPU)
    wrapper.update_metadata = (_OnDevice if on_device else _OnHost)(wrapper)


class _OnHost:
    """``update_metadata`` that does nothing for a batch without adapters after another one of its size.

    Other wrappers than those of CUDA and ROCm keep more of a batch than its tensors, such as its longest
    sequence.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        # The size of a batch without adapters of which the tensors are; None where they are of another.
        self._size: tuple[int, int, bool] | None = None

    def __call__(self, mapping: LoRAMapping, *args: Any, **kwargs: Any) -> None:
        size = (len(mapping.index_mapping), len(mapping.prompt_mapping), mapping.is_prefill)
        empty = _is_empty(mapping)
        if empty and size == self._size:
            return
        self._size = None
        _derive(self._wrapper, mapping, *args, **kwargs)
        self._size = size if empty else None


class _OnDevice:
    """``update_metadata`` that derives tensors of no adapter for batches up to the next power of two."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        # Tokens and samples of which the tensors are of no adapter.
        self._empty = (0, 0)

    def __call__(self, mapping: LoRAMapping, *args: Any, **kwargs: Any) -> None:
        wrapper = self._wrapper
        if not _is_empty(mapping):
            self._empty = (0, 0)
            _derive(wrapper, mapping, *args, **kwargs)
            return
        tokens, samples = len(mapping.index_mapping), len(mapping.prompt_mapping)
        if tokens > self._empty[0] or samples > self._empty[1]:
            # Whatever fails on the way leaves nothing that is known.
            before, self._empty = self._empty, (0, 0)
            room = len(wrapper._token_lora_indices), len(wrapper._sampler_indices)
            longer = (
                min(_power_of_two(max(tokens, before[0])), room[0]),
                min(_power_of_two(max(samples, before[1])), room[1]),
            )
            _derive(wrapper, without_adapters(mapping, *longer), *args, **kwargs)
            # vLLM leaves the adapters of the batch before here, which ranks that share experts (data
            # and expert parallel) send with their tokens.
            wrapper.token_mapping_meta.token_lora_mapping.fill_(-1)
            self._empty = longer
        wrapper.is_prefill = mapping.is_prefill
        # Of the tokens, of the samples, of the samples in another form, and of the embeddings.
        wrapper.indices_len[:] = (tokens, samples, samples, tokens)


def _derive(wrapper: Any, *args: Any, **kwargs: Any) -> None:
    type(wrapper).update_metadata(wrapper, *args, **kwargs)


def _is_empty(mapping: LoRAMapping) -> bool:
    return not any(mapping.index_mapping) and not any(mapping.prompt_mapping)


def without_adapters(mapping: LoRAMapping, tokens: int, samples: int) -> LoRAMapping:
    """A mapping like another one, of so many tokens and samples of the base model."""
    return LoRAMapping(
        (0,) * tokens, (0,) * samples, is_prefill=mapping.is_prefill, type=mapping.type
    )


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
