"""What a request may ask for, of every kind of adapter in one batch: answered with PEFT's numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_forks import ENGINE_ENVIRONMENT
from engine_world import ADAPTERS, ENGINE_ARGUMENTS, World, mixed
from peft_oracle import Allow, Oracle, values

pytestmark = pytest.mark.engine

LONG = [(11 * i) % 250 + 1 for i in range(150)]  # longer than a block of the prefix cache on CPU
HEAD, EMBEDDING = "output head/ü", "embedding"
# Every kind: joint, private and mixed tasks that run direct, two that stand in slots, ordinary adapters
# (of which one has an lm_head and one an embedding), and the base model.
NAMES = ["base", "ordinary", *ADAPTERS, f"peft {HEAD}", f"peft {EMBEDDING}", "peft half-packed"]
SOME = [5, 17, 200, 31]


def _anything(scores: torch.Tensor, before: list[int]) -> torch.Tensor:
    return scores


def _some(scores: torch.Tensor, before: list[int]) -> torch.Tensor:
    masked = torch.full_like(scores, -torch.inf)
    masked[SOME] = scores[SOME]
    return masked


def _some_or_end(scores: torch.Tensor, before: list[int]) -> torch.Tensor:
    masked = _some(scores, before)
    if before:
        masked[0] = scores[0]
    return masked


def _without_some(scores: torch.Tensor, before: list[int]) -> torch.Tensor:
    scores[SOME] = -torch.inf
    return scores


def _biased(scores: torch.Tensor, before: list[int]) -> torch.Tensor:
    scores[SOME] += 8.0
    return scores


@dataclass(frozen=True)
class Feature:
    """Sampling parameters beside the usual ones, which tokens are the best then, and the prompt."""

    sampling: dict[str, Any]
    greedy: Allow | None = _anything
    prompt: tuple[int, ...] = tuple((7 * i) % 250 + 1 for i in range(9))

    def parameters(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        options: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
        options |= self.sampling
        if "regex" in options:
            options["structured_outputs"] = StructuredOutputsParams(regex=options.pop("regex"))
        return SamplingParams(**options)


FEATURES = {
    "plain": Feature({"logprobs": 2}),
    "prompt": Feature({"logprobs": 1, "prompt_logprobs": 3}),
    "whole vocabulary": Feature({"logprobs": -1, "prompt_logprobs": -1, "max_tokens": 2}),
    "two tokens": Feature({"prompt_logprobs": 0, "max_tokens": 1}, prompt=(3, 9)),
    "one token": Feature({"prompt_logprobs": 0, "max_tokens": 1}, prompt=(3,)),
    "long": Feature({"prompt_logprobs": 1}, prompt=tuple(LONG)),
    "again": Feature({"logprobs": 1}, prompt=tuple(LONG)),
    "several": Feature(
        {"n": 3, "temperature": 0.9, "seed": 5, "logprobs": 0, "prompt_logprobs": 0}, None
    ),
    "bias": Feature({"logit_bias": dict.fromkeys(SOME, 8.0), "logprobs": 0}, _biased),
    "allowed": Feature({"allowed_token_ids": SOME, "logprobs": 0}, _some),
    "bad words": Feature({"bad_words": [f"w{t}" for t in SOME], "logprobs": 0}, _without_some),
    "grammar": Feature(
        {"regex": "(w5|w17|w200|w31)+", "logprobs": 0, "ignore_eos": False}, _some_or_end
    ),
}


class Engine:
    """Direct tasks, two slots, prompts in pieces of 64 tokens, priorities, a prefix cache."""

    def __init__(self, world: World) -> None:
        from vllm import LLM

        self.oracle = Oracle(world)
        self.world = world
        self.checkpoint = mixed(world)
        self.llm = LLM(
            str(world.model),
            enable_lora=True,
            max_loras=16,
            max_lora_rank=16,
            max_logprobs=-1,
            max_num_batched_tokens=64,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            scheduling_policy="priority",
            **ENGINE_ARGUMENTS,
        )

    def request(self, name: str) -> Any:
        """Base, a task, or (after "peft ") the adapter of that name as an ordinary one."""
        from vllm.lora.request import LoRARequest

        from vllm_vlora import lora_request

        if name == "base":
            return None
        if name in ADAPTERS:
            return lora_request(self.checkpoint, name)
        folders = {"ordinary": self.world.ordinary, **self.world.adapters}
        adapter = name.removeprefix("peft ")
        return LoRARequest(name, 1 + list(folders).index(adapter), str(folders[adapter]))

    def check(self, name: str, feature: Feature, output: Any) -> None:
        name, prompt = name.removeprefix("peft "), list(feature.prompt)
        if "prompt_logprobs" in feature.sampling:
            self.oracle.check_prompt(name, prompt, values(output.prompt_logprobs))
        assert len(output.outputs) == feature.sampling.get("n", 1)
        for sequence in output.outputs:
            assert sequence.token_ids
            self.oracle.check_output(
                name, prompt, list(sequence.token_ids), values(sequence.logprobs), feature.greedy
            )


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_VLORA_CHECKPOINT", str(mixed(world)))
        patch.setenv("VLLM_VLORA_SLOTS", "2")
        engine = Engine(world)
        yield engine
        engine.llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("seed", range(2))
def test_every_feature_of_every_kind_of_adapter_in_one_batch(engine: Engine, seed: int) -> None:
    items = [(name, feature) for name in NAMES for feature in FEATURES]
    random.Random(seed).shuffle(items)
    outputs = engine.llm.generate(
        [{"prompt_token_ids": list(FEATURES[feature].prompt)} for _, feature in items],
        [FEATURES[feature].parameters() for _, feature in items],
        lora_request=[engine.request(name) for name, _ in items],
        priority=[place % 3 for place in range(len(items))],
        use_tqdm=False,
    )
    wrong = []
    for (name, feature), output in zip(items, outputs):
        try:
            engine.check(name, FEATURES[feature], output)
        except AssertionError as error:
            wrong.append((name, feature, str(error)[:200]))
    assert not wrong, f"{len(wrong)} of {len(items)}: {wrong[:20]}"
