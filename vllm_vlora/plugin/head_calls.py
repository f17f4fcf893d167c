"""Which adapter each row of logits or of embeddings belongs to, where rows are not those of the step.

vLLM maps rows of logits to adapters as the step samples: a row a request, or more under speculative
decoding. With ``prompt_logprobs`` (``echo`` of the API) it computes logits once more, a row a token of
the prompt, under the same map. Then the rows get the adapters of other requests, or the numbers of rows
differ and the step fails, which ends the engine (on CUDA the kernel leaves its arrays). So while
prompts are scored a row is mapped as the token is that it was computed from.

vLLM's second model runner has a row a request in that map under speculative decoding too, where logits
have one for each draft as well. There the map is made as long as they are.

Embeddings have a row a token of the batch. With ``--enable-prompt-embeds`` vLLM's first model runner
looks up only those tokens that did not come as embeddings, with the same two ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_vlora.plugin.instead import instead_of

Logits = Callable[..., Any]

# Float32 numbers that a temporary may have: 32 MiB. A prompt has a row of logits a token, and the update
# of all of them at once would be larger than they are. No profile of vLLM's has seen it.
_TEMPORARY = 1 << 23

# The tokens of the batch that the rows are of; None where rows are as vLLM's map has them.
_TOKENS: ContextVar[slice | torch.Tensor | None] = ContextVar("vllm_vlora_tokens", default=None)


class HeadPunica:
    """What lm_head and embeddings call instead of their punica wrapper, which sees everything else."""

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
            # One slot is every row's, as stock takes it.
            add_logits(y, x, a, b, self._inner.sampler_indices.expand(len(x)))
        else:
            self._inner.add_lora_logits(y, x, a, b, scale)

    @property
    def _embeddings_indices(self) -> torch.Tensor:
        """Where each token's slot begins in the layer's A, as the layer itself asks for it.

        The tokens are its last dimension; in 0.28 another one stands before it.
        """
        tokens, starts = _TOKENS.get(), self._inner._embeddings_indices
        return starts if tokens is None else starts[..., tokens]

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, **kwargs: Any
    ) -> None:
        """Add B x to y in place, where x are the rows of A that the layer looked up."""
        tokens = _TOKENS.get()
        if tokens is None:
            self._inner.add_lora_embedding(y, x, b, **kwargs)
        else:
            _expand(y, x, b, self._inner.token_lora_indices[tokens])


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
    shrunk = torch.empty(len(x), a.shape[2], dtype=torch.float32, device=x.device)
    for slot, rows in _rows_by_slot(slots):
        left = a[slot, 0].float().T
        for some in rows.split(_at_once(x.shape[1])):
            shrunk[some] = x[some].float() @ left
    _expand(y, shrunk, b, slots)


def _expand(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, slots: torch.Tensor) -> None:
    """y[i] += B x[i] with the B in row i's slot, over the columns that both have."""
    assert len(slots) == len(x) == len(y)
    width, step = min(y.shape[1], b.shape[2]), _at_once(b.shape[3])
    for slot, rows in _rows_by_slot(slots):
        for start in range(0, width, step):
            cols = slice(start, min(start + step, width))
            right = b[slot, 0, cols].float().T
            for some in rows.split(_at_once(right.shape[1])):
                update = x[some].float() @ right
                y[:, cols].index_add_(0, some, update.to(y.dtype))


def _at_once(size: int) -> int:
    """How many rows or columns of ``size`` float32 numbers each are computed at a time."""
    return max(_TEMPORARY // size, 1)


def _rows_by_slot(slots: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    with gpu_sync_allowed():
        return [
            (slot, (slots == slot).nonzero().flatten())
            for slot in slots.unique().tolist()
            if slot >= 0
        ]


def score_in_runner(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._get_prompt_logprobs_dict`` of vLLM's first model runner."""

    @functools.wraps(original)
    def score(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: Any) -> Any:
        if not self.lora_config or not self.num_prompt_logprobs:
            return original(self, hidden_states, num_scheduled_tokens)
        with instead_of(self.model, "compute_logits", lambda f: by_token(f, hidden_states)):
            return original(self, hidden_states, num_scheduled_tokens)

    return score


def score_in_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    """What scores prompts in its second one, which is given the function of logits."""

    @functools.wraps(original)
    def score(self: Any, logits_fn: Logits, hidden_states: torch.Tensor, *rest: Any) -> Any:
        return original(self, by_token(logits_fn, hidden_states), hidden_states, *rest)

    return score


def count_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner.prepare_inputs`` of the second one, which knows how many rows each request has."""

    @functools.wraps(original)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        self.lora_state.vlora_num_logits = np.diff(batch.cu_num_logits_np)
        return batch

    return prepare_inputs


def map_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """``LoraState.make_lora_inputs``, called next, whose first result is the adapter of each row."""

    @functools.wraps(original)
    def make_lora_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters, *rest = original(self, *args, **kwargs)
        return tuple(np.repeat(adapters, self.vlora_num_logits)), *rest

    return make_lora_inputs


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


def embed_in_runner(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._preprocess`` of the first one, which embeds the batch's tokens."""

    @functools.wraps(original)
    def preprocess(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_config or not self.enable_prompt_embeds:
            return original(self, scheduler_output, *args, **kwargs)
        is_token = self.is_token_ids.np[: scheduler_output.total_num_scheduled_tokens]
        with instead_of(self.model, "embed_input_ids", lambda f: of_some(f, is_token)):
            return original(self, scheduler_output, *args, **kwargs)

    return preprocess


def of_some(embed: Callable[..., Any], is_token: np.ndarray) -> Callable[..., Any]:
    """The same function, called for those tokens of a batch alone that came as tokens."""
    positions = np.nonzero(is_token)[0]

    def of_rows(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Models with images embed every token and leave out the others' rows afterwards.
        if len(positions) == len(is_token) or len(input_ids) != len(positions):
            return embed(input_ids, *args, **kwargs)
        held = _TOKENS.set(torch.from_numpy(positions).to(input_ids.device))
        try:
            return embed(input_ids, *args, **kwargs)
        finally:
            _TOKENS.reset(held)

    return of_rows
