"""Direct tasks where a layer asks for its LoRA part alone, as it does on its side stream."""

from __future__ import annotations

import json

import pytest
from engine_forks import run_script
from engine_world import ADAPTERS, ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World, mixed

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams, envs
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA as Linear
from vllm.lora.request import LoRARequest
from vllm_vlora import lora_request

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_lora=True, max_loras=32, max_lora_rank=16, **job["arguments"])
    # vLLM has streams on GPUs alone. Without one its own code runs the two parts one after the other.
    calls, apart = [], Linear._apply_async_impl

    def apply(self, x, bias=None):
        calls.append(1)
        return apart(self, x, bias)

    envs.VLLM_LORA_ENABLE_DUAL_STREAM = True
    Linear.apply, Linear._events, Linear._lora_stream = apply, [None, None], None
    requests = {"base": None, "ordinary": LoRARequest("ordinary", 1, job["ordinary"])}
    requests |= {task: lora_request(job["checkpoint"], task) for task in job["tasks"]}
    items = [(name, n) for n in range(len(job["prompts"])) for name in requests]
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": job["prompts"][n]} for _, n in items], sampling,
                        lora_request=[requests[name] for name, _ in items], use_tqdm=False)
    answers = {}
    for (name, _), output in zip(items, done):
        answers.setdefault(name, []).append(list(output.outputs[0].token_ids))
    print("RESULT " + json.dumps([answers, len(calls)]), flush=True)

if __name__ == "__main__":
    main()
"""


def test_the_lora_part_alone_is_the_same(world: World) -> None:
    job = {
        "model": str(world.model),
        "ordinary": str(world.ordinary),
        "checkpoint": str(mixed(world)),
        "tasks": list(ADAPTERS),
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
        "prompts": PROMPTS,
    }
    answers, calls = run_script(SCRIPT, json.dumps(job), VLLM_VLORA_CHECKPOINT=job["checkpoint"])
    assert answers == {name: world.reference[name] for name in ("base", "ordinary", *ADAPTERS)}
    # Two layers of four linears, in every step.
    assert calls >= 8 * MAX_TOKENS
