"""Two tensor-parallel ranks on CPU answer as one does: column- and row-parallel slices."""

from __future__ import annotations

import json

import pytest
from engine_world import (
    ADAPTERS,
    ENGINE_ARGUMENTS,
    MAX_TOKENS,
    PROMPTS,
    World,
    exact,
    run_script,
)

pytestmark = pytest.mark.engine

# A process of its own: two ranks of one engine want more of the machine than a shared one leaves.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm_vlora import lora_request

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], tensor_parallel_size=2, enable_lora=True, max_loras=3,
              max_lora_rank=16, **job["arguments"])
    requests = {"base": None, "ordinary": LoRARequest("ordinary", 1, job["ordinary"])}
    for kind, path in job["checkpoints"].items():
        for task in job["tasks"]:
            requests[f"{kind}/{task}"] = lora_request(path, task)
    items = [(name, n) for name in requests for n in range(len(job["prompts"]))]
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": job["prompts"][n]} for _, n in items], sampling,
                        lora_request=[requests[name] for name, _ in items], use_tqdm=False)
    answers = {}
    for (name, _), output in zip(items, done):
        answers.setdefault(name, []).append(list(output.outputs[0].token_ids))
    print("RESULT " + json.dumps(answers), flush=True)

if __name__ == "__main__":
    main()
"""


def test_two_ranks_answer_as_stock_on_one(world: World) -> None:
    checkpoints = {kind: str(exact(world, kind)) for kind in ("private", "joint")}
    job = {
        "model": str(world.model),
        "ordinary": str(world.ordinary),
        "checkpoints": checkpoints,
        "tasks": list(ADAPTERS),
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
        "prompts": PROMPTS,
    }
    found = run_script(SCRIPT, json.dumps(job), VLLM_VLORA_CHECKPOINT=checkpoints["private"])
    for name, answers in found.items():
        assert answers == world.reference[name.removeprefix("private/").removeprefix("joint/")], (
            name
        )
