"""Tasks in trellis codes in real engines: direct and from slots, next to the same as adapters."""

from __future__ import annotations

import json

import pytest
import torch
from engine_forks import run_script
from engine_world import ADAPTERS, ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_vlora import lora_request

def formats(worker):
    store = worker.model_runner.lora_manager._adapter_manager.vlora_store
    direct = {part.a.format for task in store.tasks() if task.direct
              for part in task.direct.slices.values() if part.a}
    slots = {source.matrix.format for task in store.tasks()
             for pair in task.sources.values() for source in pair}
    return sorted(direct), sorted(slots)

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_lora=True, max_loras=32, max_lora_rank=16, **job["arguments"])
    items = [(task, n) for n in range(len(job["prompts"])) for task in job["tasks"]]
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    if job["folders"]:
        from vllm.lora.request import LoRARequest
        names = {task: LoRARequest(task, n, job["folders"][task])
                 for n, task in enumerate(job["tasks"], 1)}
    else:
        names = {task: lora_request(job["checkpoint"], task) for task in job["tasks"]}
    done = llm.generate([{"prompt_token_ids": job["prompts"][n]} for _, n in items], sampling,
                        lora_request=[names[task] for task, _ in items], use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in done]
    held = [] if job["folders"] else llm.collective_rpc(formats)[0]
    print("RESULT " + json.dumps([answers, held]), flush=True)

if __name__ == "__main__":
    main()
"""


def test_tasks_answer_as_their_weights_do(world: World) -> None:
    """The weights are exported and served by vLLM as ordinary adapters."""
    from vllm_vlora.checkpoint.export import export_all
    from vllm_vlora.checkpoint.reader import Checkpoint

    folder = world.compress(
        "trellis", world.adapters, representation="private", ratio=8, codes="trellis"
    )
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.format_version == 5
    folders = export_all(checkpoint, ADAPTERS, folder.parent / "exported", dtype=torch.float32)
    job = {
        "model": str(world.model),
        "checkpoint": str(folder),
        "tasks": list(ADAPTERS),
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
        "prompts": PROMPTS,
        "folders": {},
    }
    settings = {"VLLM_VLORA_CHECKPOINT": str(folder), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    direct, slots = (
        run_script(SCRIPT, json.dumps(job), VLLM_VLORA_MODE=mode, **settings)
        for mode in ("auto", "materialize")
    )
    plain = run_script(
        SCRIPT, json.dumps(job | {"folders": {task: str(path) for task, path in folders.items()}})
    )
    assert direct[0] == slots[0] == plain[0]
    assert len({json.dumps(answer) for answer in direct[0]}) > len(PROMPTS)
    assert "trellis" in direct[1][0]
    assert not slots[1][0]
    assert "trellis" in slots[1][1]
