"""Two tensor-parallel ranks on CPU answer as one does: column- and row-parallel slices."""

from __future__ import annotations

import json

import pytest
from engine_forks import run_script
from engine_world import (
    ADAPTERS,
    ENGINE_ARGUMENTS,
    MAX_TOKENS,
    PROMPTS,
    World,
    exact,
    for_stock,
    mixed,
)

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.plugin.memory import plan_memory
from vllm_vlora.plugin.model_layers import read_model_shape

pytestmark = pytest.mark.engine

# A process of its own: two ranks of one engine want more of the machine than a shared one leaves.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm_vlora import lora_request

def held(worker):
    manager = worker.model_runner.lora_manager._adapter_manager
    path = manager.vlora_store.direct
    stacks = [s for layer in manager.modules.values()
              for side in (layer.lora_a_stacked, layer.lora_b_stacked)
              for s in (side if isinstance(side, tuple) else (side,))]
    memory = path.memory()
    return {
        "slots": sum(s.nbytes for s in stacks),
        "direct": memory.bases + memory.cores + memory.factors + memory.table,
        "materialized": manager.vlora_store.materialized_nbytes,
        "direct tasks": sum(manager.held_paths().values()),
    }

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], tensor_parallel_size=2, enable_lora=True, max_loras=3,
              max_lora_rank=16, **job["arguments"])
    memory = llm.collective_rpc(held)  # Before tasks of another checkpoint come.
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
    print("RESULT " + json.dumps([answers, memory]), flush=True)

if __name__ == "__main__":
    main()
"""


def test_two_ranks_answer_as_stock_on_one_and_hold_what_the_plan_says(world: World) -> None:
    checkpoints = {"mixed": str(mixed(world)), "joint": str(exact(world, "joint"))}
    job = {
        "model": str(world.model),
        "ordinary": str(world.ordinary),
        "checkpoints": checkpoints,
        "tasks": list(ADAPTERS),
        "arguments": {**ENGINE_ARGUMENTS, "max_num_batched_tokens": 512},
        "max_tokens": MAX_TOKENS,
        "prompts": PROMPTS,
    }
    found, memory = run_script(
        SCRIPT,
        json.dumps(job),
        VLLM_VLORA_CHECKPOINT=checkpoints["mixed"],
        VLLM_VLORA_SLOTS="2",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # To send a function to the workers.
    )
    for name, answers in found.items():
        assert answers == world.reference[name.removeprefix("mixed/").removeprefix("joint/")], name
    plan = plan_memory(
        Checkpoint.open(checkpoints["mixed"]),
        max_loras=3,
        tp=2,
        dtype="float32",
        max_lora_rank=16,
        peft_slots=2,
        model=read_model_shape(world.model),
        max_num_batched_tokens=512,
        cpu=True,
    ).mode("auto")
    for rank in memory:
        assert rank["direct tasks"] == len(ADAPTERS) - 2
        assert rank["slots"] == plan.slots_nbytes
        total = rank["slots"] + rank["direct"] + rank["materialized"]
        assert total == plan.total_nbytes


SHARDED = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm_vlora import lora_request

def slot(worker, adapter):
    manager = worker.model_runner.lora_manager._adapter_manager
    place = manager.lora_index_to_id.index(adapter)
    found = {}
    for name, layer in manager.modules.items():
        for side in ("lora_a_stacked", "lora_b_stacked"):
            stacks = getattr(layer, side)
            for i, stack in enumerate(stacks if isinstance(stacks, tuple) else (stacks,)):
                found[f"{name} {side} {i}"] = stack[place].clone()
    return found

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], tensor_parallel_size=2, fully_sharded_loras=True, enable_lora=True,
              max_loras=2, max_lora_rank=16, **job["arguments"])
    ask = llm.llm_engine.engine_core.engine_core.model_executor.collective_rpc
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)

    def generate(request):
        done = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling,
                            lora_request=[request] * len(job["prompts"]), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in done]

    answers, unequal, rows = {}, [], set()
    for number, (task, folder) in enumerate(job["adapters"].items(), 1):
        for kind, path in job["checkpoints"].items():
            answers[f"{kind}/{task}"] = generate(lora_request(path, task))
        ours = lora_request(job["checkpoints"]["private"], task)
        generate(ours)
        answers[f"stock/{task}"] = generate(LoRARequest(task, number, folder))
        pairs = zip(ask(slot, args=(ours.lora_int_id,)), ask(slot, args=(number,)))
        for rank, (got, want) in enumerate(pairs):
            unequal += [f"{task} {rank} {name}" for name in want if not got[name].equal(want[name])]
            rows |= {(name.split()[0].split(".")[-1], name.split()[1], want[name].shape[1])
                     for name in want if "layers" in name}
    print("RESULT " + json.dumps([answers, unequal, sorted(rows)]), flush=True)

if __name__ == "__main__":
    main()
"""


def test_fully_sharded_slots_hold_what_stock_puts_there(world: World) -> None:
    """A of column-parallel and B of row-parallel layers are cut as well: ranks of A, outputs of B."""
    job = {
        "model": str(world.model),
        "checkpoints": {kind: str(exact(world, kind)) for kind in ("private", "joint")},
        "adapters": {name: str(for_stock(path)) for name, path in world.adapters.items()},
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
        "prompts": PROMPTS,
    }
    answers, unequal, rows = run_script(
        SHARDED,
        json.dumps(job),
        VLLM_VLORA_CHECKPOINT=job["checkpoints"]["private"],
        VLLM_VLORA_MODE="materialize",
    )
    for name, tokens in answers.items():
        assert tokens == world.reference[name.split("/", 1)[1]], name
    assert unequal == []
    assert ["qkv_proj", "lora_a_stacked", 8] in rows
    assert ["o_proj", "lora_b_stacked", 64] in rows
