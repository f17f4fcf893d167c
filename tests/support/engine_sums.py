"""What a model answers with weighted sums of adapters in its weights: PEFT's own updates, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from engine_world import MAX_TOKENS, World

# Of log-probabilities between two implementations in float32.
TOLERANCE = 1e-3


class Sums:
    """The base model with weighted sums of PEFT's updates in its weights."""

    def __init__(self, world: World) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
        from transformers import LlamaForCausalLM

        base = LlamaForCausalLM.from_pretrained(world.model, dtype=torch.float32)
        names = list(world.adapters)
        model = PeftModel.from_pretrained(base, world.adapters[names[0]], adapter_name="number0")
        for number, name in enumerate(names[1:], 1):
            model.load_adapter(world.adapters[name], adapter_name=f"number{number}")
        self._keys = {name: f"number{number}" for number, name in enumerate(names)}
        self._model = model.eval()
        self._layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        self._originals = [m.get_base_layer().weight.detach().clone() for m in self._layers]
        self.logits = cache(self._logits)

    @torch.no_grad()
    def _logits(self, weights: tuple[tuple[str, float], ...], tokens: tuple[int, ...]) -> Any:
        for layer, original in zip(self._layers, self._originals):
            total = original.double()
            for name, weight in weights:
                key = self._keys[name]
                if key in layer.lora_A or key in layer.lora_embedding_A:
                    total = total + weight * layer.get_delta_weight(key).double()
            layer.get_base_layer().weight.copy_(total)
        with self._model.disable_adapter():
            return self._model(torch.tensor([tokens])).logits[0]

    def check(
        self,
        weights: Mapping[str, float],
        prompt: Sequence[int],
        tokens: Sequence[int],
        logprobs: Sequence[float],
    ) -> None:
        """Every token of an answer is the likeliest, and has the log-probability that it should."""
        assert len(tokens) == MAX_TOKENS
        rows = self.logits(tuple(sorted(weights.items())), (*prompt, *tokens))[len(prompt) - 1 :]
        for place, (token, found) in enumerate(zip(tokens, logprobs, strict=True)):
            scores = rows[place].log_softmax(-1)
            assert scores[token] > scores.max() - TOLERANCE, (weights, place)
            assert abs(float(scores[token]) - found) < TOLERANCE, (weights, place)
