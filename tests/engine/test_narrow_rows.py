"""Rows of 3 and 2 bits held as they are stored, in real engines, next to the same held with 4 bits."""

from __future__ import annotations

import json

import pytest
from engine_forks import run_script
from engine_world import ADAPTERS, ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_vlora import lora_request

def held(worker):
    store = worker.model_runner.lora_manager._adapter_manager.vlora_store
    direct = store.direct.memory().factors if store.direct else 0
    matrices = {part.a.format for task in store.tasks() if task.direct
                for part in task.direct.slices.values() if part.a}
    matrices |= {source.matrix.format for task in store.tasks()
                 for pair in task.sources.values() for source in pair}
    return direct, store.materialized_nbytes, sorted(matrices)

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_lora=True, max_loras=32, max_lora_rank=16, **job["arguments"])
    items = [(task, n) for n in range(len(job["prompts"])) for task in job["tasks"]]
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=1)
    done = llm.generate([{"prompt_token_ids": job["prompts"][n]} for _, n in items], sampling,
                        lora_request=[lora_request(job["checkpoint"], task) for task, _ in items],
                        use_tqdm=False)
    answers = [[[token, found[token].logprob] for token, found in
                zip(output.outputs[0].token_ids, output.outputs[0].logprobs)] for output in done]
    direct, materialized, formats = llm.collective_rpc(held)[0]
    print("RESULT " + json.dumps([answers, direct, materialized, formats]), flush=True)

if __name__ == "__main__":
    main()
"""


def test_tasks_answer_alike_from_fewer_bytes(world: World) -> None:
    """Direct ones and, of a head and an embedding, materialized ones in one engine; then all of them
    materialized."""
    from vllm_vlora.checkpoint.reader import Checkpoint

    folder = world.compress("narrow", world.adapters, representation="private", ratio=12)
    assert Checkpoint.open(folder).has_narrow_rows(ADAPTERS)
    job = {
        "model": str(world.model),
        "checkpoint": str(folder),
        "tasks": list(ADAPTERS),
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
        "prompts": PROMPTS,
    }
    found = {
        (rows, mode): run_script(
            SCRIPT,
            json.dumps(job),
            VLLM_VLORA_CHECKPOINT=str(folder),
            VLLM_VLORA_ROWS=rows,
            VLLM_VLORA_MODE=mode,
            VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        )
        for rows, mode in (("wide", "auto"), ("narrow", "auto"), ("narrow", "materialize"))
    }
    wide, narrow, slots = found.values()
    assert wide[0] == narrow[0]
    tokens = [
        [[token for token, _ in answer] for answer in answers] for answers, *_ in found.values()
    ]
    assert tokens[2] == tokens[0]
    assert len({json.dumps(answer) for answer in tokens[0]}) > len(PROMPTS)
    assert 0 < narrow[1] < 0.9 * wide[1]
    assert 0 < narrow[2] < wide[2]
    assert slots[1] == 0
    assert "nf4-narrow" not in wide[3]
    for _, _, _, formats in (narrow, slots):
        assert "nf4-narrow" in formats
