"""What a request must be answered: PEFT's logits of the tiny Llama of ``engine_world``, in float64.

A sequence is judged token by token, so nothing else has to generate it: every reported log-probability
is that of PEFT's logits, and a greedy token is the most likely one that the request allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from engine_world import World

# Of log-probabilities in float32: measured below 1e-4 but for one row, at the end of the longest prompt.
# There PEFT's own in float32 are 1.1e-3 from float64 on a CPU with AMX, and vLLM's 1e-3.
TOLERANCE = 3e-3
Allow = Callable[[torch.Tensor, list[int]], torch.Tensor]


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """As transformers, which computes it in float32 whatever x is."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)


class Oracle:
    """The base model and every adapter of a world under its name."""

    def __init__(self, world: World) -> None:
        self._folders: dict[str, Path] = {**world.adapters, "ordinary": world.ordinary}
        self._model_folder = world.model
        self._known: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    @cached_property
    def _model(self) -> Any:
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        base = LlamaForCausalLM.from_pretrained(self._model_folder, dtype=torch.float32)
        (first, folder), *others = self._folders.items()
        model = PeftModel.from_pretrained(base, folder, adapter_name=self._key(first))
        for name, folder in others:
            model.load_adapter(folder, adapter_name=self._key(name))
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = partial(_rms_norm, module)
        return model.double().eval()

    def _key(self, name: str) -> str:
        return f"number{list(self._folders).index(name)}"

    @torch.no_grad()
    def logits(self, name: str, tokens: list[int], embedded: int = 0) -> torch.Tensor:
        """(n, vocabulary): row i is what PEFT says of the token after token i; "base" has no adapter.

        The first ``embedded`` tokens come as the base model's embeddings, whatever the adapter has.
        """
        key = (name, tuple(tokens), embedded)
        if key not in self._known:
            if name != "base":
                self._model.set_adapter(self._key(name))
            with self._model.disable_adapter() if name == "base" else nullcontext():
                rows = torch.cat(
                    [
                        self.embed(tokens[:embedded]).double(),
                        self._model.get_input_embeddings()(torch.tensor(tokens[embedded:])),
                    ]
                )
                self._known[key] = self._model(inputs_embeds=rows[None]).logits[0]
        return self._known[key]

    @torch.no_grad()
    def embed(self, tokens: list[int]) -> torch.Tensor:
        """The base model's embeddings, (n, hidden size), in float32, as they are stored."""
        with self._model.disable_adapter():
            return self._model.get_input_embeddings()(
                torch.tensor(tokens, dtype=torch.long)
            ).float()

    def beams(self, name: str, prompt: list[int], width: int, count: int) -> dict[Any, float]:
        """The continuations of a beam search and their log-probabilities."""
        beams: dict[tuple[int, ...], float] = {(): 0.0}
        for _ in range(count):
            longer = {}
            for tokens, cumulated in beams.items():
                row = self.logits(name, [*prompt, *tokens])[-1].log_softmax(-1)
                for value, token in zip(*(found.tolist() for found in row.topk(2 * width))):
                    longer[(*tokens, token)] = cumulated + value
            beams = dict(sorted(longer.items(), key=lambda item: -item[1])[:width])
        return beams

    def check_output(
        self,
        name: str,
        prompt: list[int],
        tokens: list[int],
        logprobs: list[dict[int, float]] | None,
        greedy: Allow | None,
        embedded: int = 0,
        masked: bool = False,
    ) -> None:
        """Every token's log-probabilities, and with ``greedy`` that it is the best allowed one.

        ``masked``: log-probabilities are reported of what is allowed, as vLLM does with grammars.
        """
        rows = self.logits(name, [*prompt, *tokens], embedded)[len(prompt) - 1 :]
        for place, token in enumerate(tokens):
            row = rows[place]
            scores = row if greedy is None else greedy(row.clone(), tokens[:place])
            if logprobs is not None:
                assert token in logprobs[place]
                _compare(logprobs[place], scores if masked else row)
            if greedy is not None:
                assert scores[token] > scores.max() - TOLERANCE, (place, token)

    def check_prompt(self, name: str, prompt: list[int], found: list[Any]) -> None:
        """The log-probabilities of a prompt, of whose first token there are none."""
        assert len(found) == len(prompt)
        assert found[0] is None
        rows = self.logits(name, prompt)
        for place in range(1, len(prompt)):
            assert prompt[place] in found[place]
            _compare(found[place], rows[place - 1])


def _compare(found: dict[int, float], logits: torch.Tensor) -> None:
    want = logits.log_softmax(-1)
    for token, value in found.items():
        assert abs(value - want[token].item()) < TOLERANCE, (token, value, want[token].item())


def values(logprobs: Iterable[Any] | None) -> list[Any] | None:
    """vLLM's log-probabilities as plain numbers by token."""
    if logprobs is None:
        return None
    return [
        None if row is None else {token: entry.logprob for token, entry in row.items()}
        for row in logprobs
    ]
