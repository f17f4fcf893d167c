"""Two pipeline-parallel ranks on CPU answer as one does: each holds what its layers need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_forks import run_script
from engine_world import ADAPTERS, ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World, exact, mixed

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.plugin.memory import plan_memory
from vllm_vlora.plugin.model_layers import read_model_shape
from vllm_vlora.representations.private import encode_private

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm_vlora import lora_request

measure = CPUWorker.determine_available_memory

def profile_first(self):
    # vLLM for CPU leaves this out where nothing is compiled, as with LoRA, and fails in its first step:
    # the second rank then has no buffers for what the first one sends.
    self.model_runner.profile_run()
    return measure(self)

CPUWorker.determine_available_memory = profile_first

def held(worker):
    manager = worker.model_runner.lora_manager._adapter_manager
    memory = manager.vlora_store.direct.memory()
    return {
        "modules": sorted({name.split(".")[2] for name in manager.modules if "layers" in name}),
        "tasks": memory.bases + memory.cores + memory.factors + manager.vlora_store.materialized_nbytes,
        "direct tasks": sum(manager.held_paths().values()),
        "bad": [path for path in manager.held_paths() if "rank" in path],
    }

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], pipeline_parallel_size=2, enable_lora=True, max_loras=3,
              max_lora_rank=16, **job["arguments"])
    ask = llm.llm_engine.engine_core.engine_core.model_executor.collective_rpc
    memory = ask(held)
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)

    def generate(items):
        done = llm.generate([{"prompt_token_ids": job["prompts"][n]} for _, n in items], sampling,
                            lora_request=[request for request, _ in items], use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in done]

    errors = []
    for path in job["bad"]:
        try:
            generate([(lora_request(path, "task"), 0)])
        except Exception as error:
            errors.append(str(error))
    late = ask(held)
    requests = {"base": None, "ordinary": LoRARequest("ordinary", 1, job["ordinary"])}
    for kind, path in job["checkpoints"].items():
        for task in job["tasks"]:
            requests[f"{kind}/{task}"] = lora_request(path, task)
    items = [(name, n) for name in requests for n in range(len(job["prompts"]))]
    answers = {}
    for (name, _), tokens in zip(items, generate([(requests[name], n) for name, n in items])):
        answers.setdefault(name, []).append(tokens)
    print("RESULT " + json.dumps([answers, memory, errors, late]), flush=True)

if __name__ == "__main__":
    main()
"""


def _private_task(folder: Path, module: str, d_out: int = 128) -> Path:
    """A checkpoint whose task adapts q_proj of the first layer, and ``module``."""
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    stored = {}
    for name, width in (("model.layers.0.self_attn.q_proj", 128), (module, d_out)):
        writer.add_module(name, 128, width)
        stored[name] = encode_private(torch.ones(2, 128), torch.ones(width, 2), 1.0, "float32")
    writer.add_task("task", stored, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return folder


def test_two_ranks_answer_as_stock_on_one_and_each_holds_its_layers(world: World) -> None:
    checkpoints = {"mixed": str(mixed(world)), "joint": str(exact(world, "joint"))}
    nobody = "model.layers.2.self_attn.q_proj"
    second = "model.layers.1.self_attn.q_proj"
    bad = [
        _private_task(world.root / "module of no rank", nobody),
        _private_task(world.root / "wrong on the second rank", second, d_out=96),
    ]
    job = {
        "model": str(world.model),
        "ordinary": str(world.ordinary),
        "checkpoints": checkpoints,
        "tasks": list(ADAPTERS),
        "bad": list(map(str, bad)),
        "arguments": {**ENGINE_ARGUMENTS, "max_num_batched_tokens": 512},
        "max_tokens": MAX_TOKENS,
        "prompts": PROMPTS,
    }
    found, memory, errors, late = run_script(
        SCRIPT,
        json.dumps(job),
        VLLM_VLORA_CHECKPOINT=checkpoints["mixed"],
        VLLM_VLORA_SLOTS="2",
    )
    for name, answers in found.items():
        assert answers == world.reference[name.removeprefix("mixed/").removeprefix("joint/")], name
    assert [rank["modules"] for rank in memory] == [["0"], ["1"]]
    assert {rank["direct tasks"] for rank in memory} == {len(ADAPTERS) - 2}
    plan = plan_memory(
        Checkpoint.open(checkpoints["mixed"]),
        max_loras=3,
        dtype="float32",
        max_lora_rank=16,
        peft_slots=2,
        model=read_model_shape(world.model),
        max_num_batched_tokens=512,
        cpu=True,
    ).mode("auto")
    held = sum(rank["tasks"] for rank in memory)
    assert held == plan.bases_nbytes + plan.cores_nbytes + plan.factors_nbytes
    # What one rank refuses, or none has, is held by no rank.
    assert len(errors) == 2
    assert f"the served model has no LoRA layer for module {nobody}" in errors[0]
    assert (
        f"module {second} is 96 x 128 (d_out x d_in) in the checkpoint and 128 x 128" in errors[1]
    )
    assert [rank["bad"] for rank in late] == [[], []]
