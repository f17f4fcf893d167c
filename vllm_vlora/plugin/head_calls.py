"""Which adapter each row of logits belongs to, when prompts are scored as well.

vLLM maps rows of logits to adapters as the step samples: a row a request, or more under speculative
decoding. With ``prompt_logprobs`` (``echo`` of the API) it computes logits once more, a row a token of
the prompt, under the same map. Then the rows get the adapters of other requests, or the numbers of rows
differ and the step fails, which ends the engine (on CUDA the kernel leaves its arrays). So while
prompts are scored a row is mapped as the token is that it was computed from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

Logits = Callable[..., Any]

# The tokens of the batch whose logits are computed; None where they are the sampled ones.
_TOKENS: ContextVar[slice | None] = ContextVar("vllm_vlora_tokens", default=None)


class HeadPunica:
    """What the layer of logits calls instead of its punica wrapper, which sees everything else."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._on_cpu = current_platform.is_cpu()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def add_lora_logits(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> None:
        """Add every row's adapter's update to y in place."""
        assert scale == 1.0
        tokens = _TOKENS.get()
        if tokens is not None:
            add_logits(y, x, a, b, self._inner.token_lora_indices[tokens])
        elif self._on_cpu:
            # Stock gathers a slot's B (vocabulary x rank) for every row, also without an adapter.
            add_logits(y, x, a, b, self._inner.sampler_indices)
        else:
            self._inner.add_lora_logits(y, x, a, b, scale)


def add_logits(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor
) -> None:
    """y[i] += B A x[i] with the A and B in row i's slot, in float32.

    Args:
        y: (n, vocabulary), which may be padded to another width than B's.
        x: (n, hidden size).
        a: (slots, 1, rank, hidden size).
        b: (slots, 1, vocabulary, rank).
        slots: (n,) slot of each row, -1 for none.
    """
    assert len(slots) == len(x) == len(y)
    width = min(y.shape[1], b.shape[2])
    with gpu_sync_allowed():
        for slot in slots.unique().tolist():
            if slot >= 0:
                rows = (slots == slot).nonzero().flatten()
                shrunk = x[rows].float() @ a[slot, 0].float().T
                update = shrunk @ b[slot, 0, :width].float().T
                y[:, :width].index_add_(0, rows, update.to(y.dtype))


def score_in_runner(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._get_prompt_logprobs_dict`` of vLLM's first model runner."""

    @functools.wraps(original)
    def score(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: Any) -> Any:
        if not self.lora_config or not self.num_prompt_logprobs:
            return original(self, hidden_states, num_scheduled_tokens)
        with _logits_by_token(self.model, hidden_states):
            return original(self, hidden_states, num_scheduled_tokens)

    return score


def score_in_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    """What scores prompts in its second one, which is given the function of logits."""

    @functools.wraps(original)
    def score(self: Any, logits_fn: Logits, hidden_states: torch.Tensor, *rest: Any) -> Any:
        return original(self, by_token(logits_fn, hidden_states), hidden_states, *rest)

    return score


@contextmanager
def _logits_by_token(model: Any, hidden_states: torch.Tensor) -> Iterator[None]:
    """The model's ``compute_logits`` is called with rows of ``hidden_states`` meanwhile."""
    own = "compute_logits" in vars(model)
    original = model.compute_logits
    model.compute_logits = by_token(original, hidden_states)
    try:
        yield
    finally:
        if own:
            model.compute_logits = original
        else:
            del model.compute_logits


def by_token(logits: Logits, hidden_states: torch.Tensor) -> Logits:
    """The same function of rows of ``hidden_states``, whose row i is the batch's token i.

    The rows are known by where they lie in memory: a model may scale or norm them before its head.
    """
    start, width = hidden_states.storage_offset(), hidden_states.stride(0)
    memory = hidden_states.untyped_storage().data_ptr()

    def of_rows(rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert rows.untyped_storage().data_ptr() == memory, "rows that are no part of the batch"
        first = (rows.storage_offset() - start) // width
        held = _TOKENS.set(slice(first, first + len(rows)))
        try:
            return logits(rows, *args, **kwargs)
        finally:
            _TOKENS.reset(held)

    return of_rows
