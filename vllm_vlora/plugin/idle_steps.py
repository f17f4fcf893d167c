"""Steps of a rank without requests, for the sake of other data-parallel ranks, which have some.

vLLM runs a dummy batch then as it does at the start: it registers ``max_loras`` adapters that add
nothing, and removes all adapters afterwards, those of users too. With direct tasks ``max_loras`` is a
thousand or more, every one of which a slot is set for and cleared (12 ms with 1,024), the second model
runner runs all of them, and the ranks with requests wait. Here such a batch is the base model's alone,
and adapters stay where they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vllm_vlora.plugin.instead import instead_of

_MARK = "_vlora_idle"


def step_without_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Worker.execute_dummy_batch``."""

    @functools.wraps(original)
    def execute_dummy_batch(self: Any) -> Any:
        runner = self.model_runner
        if not runner.lora_config:
            return original(self)
        base_model = functools.partial(_base_model_alone, runner)
        with (
            instead_of(runner, "maybe_dummy_run_with_lora", lambda _: base_model),
            _idle(runner),
        ):
            return original(self)

    return execute_dummy_batch


@contextlib.contextmanager
def _base_model_alone(
    runner: Any,
    lora_config: Any,
    num_scheduled_tokens: np.ndarray,
    num_sampled_tokens: np.ndarray | None,
    *_: Any,
    **__: Any,
) -> Iterator[None]:
    """``LoRAModelRunnerMixin.maybe_dummy_run_with_lora`` of a batch without adapters."""
    samples = len(num_scheduled_tokens) if num_sampled_tokens is None else num_sampled_tokens.sum()
    tokens = int(num_scheduled_tokens.sum())
    runner._set_active_loras((0,) * int(samples), (0,) * tokens, set())
    yield


@contextlib.contextmanager
def _idle(runner: Any) -> Iterator[None]:
    """The second model runner, which takes a dummy batch for one with adapters, is told otherwise."""
    state = getattr(runner, "lora_state", None)
    if state is None:
        yield
        return
    setattr(state, _MARK, True)
    try:
        yield
    finally:
        delattr(state, _MARK)


def is_idle(lora_state: Any) -> bool:
    """Whether dummy batches of the second runner, whose ``LoraState`` it is, are the base model's now."""
    return _MARK in vars(lora_state)
