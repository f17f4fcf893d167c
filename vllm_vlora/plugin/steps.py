"""What is done otherwise inside a step, where an error ends the engine.

It is put into the classes of the model runner that this worker has imported, of vLLM's two; the other
processes import neither.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.platforms import current_platform

from vllm_vlora.plugin.head_calls import (
    count_logits,
    embed_in_runner,
    map_logits,
    score_in_runner,
    score_in_worker,
)
from vllm_vlora.plugin.idle_steps import step_without_adapters
from vllm_vlora.plugin.seam_table import STEP_SEAMS, MissingSeamError

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]

_MARK = "_vlora_patched"
# Not there before 0.32.
_NEWER = "PromptLogprobsWorker.compute_prompt_token_id_logprobs"


def adapt_steps() -> None:
    """Patch the model runner of this worker; does nothing the second time.

    Raises:
        IncompatibleVLLMError: a part of it is not as it was when the plugin was checked.
    """
    wrappers: dict[str, Wrapper] = {
        "GPUModelRunner._preprocess": embed_in_runner,
        "GPUModelRunner._get_prompt_logprobs_dict": score_in_runner,
        "PromptLogprobsWorker.compute_prompt_logprobs": score_in_worker,
        _NEWER: score_in_worker,
        "GPUModelRunner.prepare_inputs": count_logits,
        "LoraState.make_lora_inputs": map_logits,
        "Worker.execute_dummy_batch": step_without_adapters,
    }
    if current_platform.is_cpu():
        wrappers["GPUModelRunner.sample_tokens"] = keep_seeds
    for seam in STEP_SEAMS:
        if seam.module not in sys.modules or seam.name not in wrappers:
            continue
        try:
            place = seam.find()
        except MissingSeamError:
            if seam.name == _NEWER:
                continue
            raise
        if not hasattr(place.value, _MARK):
            patched = wrappers[seam.name](place.value)
            setattr(patched, _MARK, True)
            setattr(place.owner, place.attribute, patched)


def keep_seeds(original: Callable[..., Any]) -> Callable[..., Any]:
    """``sample_tokens`` that draws nothing from the seeds of samples that are thrown away.

    Those of a prompt's earlier pieces are. vLLM takes their draws back by an offset, which generators of
    CUDA have and those of CPU do not: there a request with a ``seed`` whose prompt comes in pieces, of
    the base model too, ended the engine (seen on 0.32; the same lines are in 0.28 to 0.33).
    """

    @functools.wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators
        thrown_away = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        kept = {i: generators.pop(i) for i in thrown_away.tolist() if i in generators}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(kept)

    return sample_tokens
