"""vLLM's second model runner, which CUDA has by default, run on CPU with the plugin.

vLLM's CPU platform has that runner too and lacks only Triton for its kernels; the interpreter is enough
for them. Then vLLM's LoRA kernels for GPUs can be interpreted as well, and ours, so that an engine runs
what one on a GPU runs but for CUDA graphs, streams and attention.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from engine_forks import ENGINE_ENVIRONMENT
from engine_world import ADAPTERS, ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World, mixed, older_vllm

pytestmark = pytest.mark.engine

SLOTS = 2
MAX_LORAS = 8
# Tokens of an answer where kernels are interpreted: a prefill and a decode.
KERNEL_TOKENS = 2
# Ordinary adapters that every supported vLLM serves as PEFT does.
PLAIN = [name for name, config in ADAPTERS.items() if "rank_pattern" not in config][:2]
# What stands in a slot even so: vLLM runs LoRA on these layers through other calls.
MATERIALIZED = {"output head/ü", "embedding"}
DIRECT = [name for name in ADAPTERS if name not in MATERIALIZED]

SCRIPT = """
import json, sys, types
import triton.backends

# vLLM for CPU takes Triton where it has a backend for CPUs. Interpreted, it needs none.
driver = types.SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)

job = json.loads(sys.argv[1])

def as_on_gpu():
    # punica's kernels and ours instead of what both have for CPU.
    import importlib
    from vllm.platforms.cpu import CpuPlatform
    from vllm_vlora.plugin import layer_calls
    from vllm_vlora.triton_kernels import direct

    punica = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: punica)
    for name, most in (("shrink", 128), ("expand", 16)):
        # vLLM's own cut the sum into 64 programs, each a Python loop here.
        kernel = importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{name}_op")
        kernel.get_lora_op_configs = fewer_programs(kernel.get_lora_op_configs, most)
    layer_calls.add_direct = direct.add_direct_triton

def fewer_programs(original, block_k):
    sizes = {"block_m": 64, "block_n": 64, "block_k": block_k, "split_k": 1}
    return lambda *args, **kwargs: original(*args, **kwargs) | sizes

def main():
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu import model_runner
    from vllm_vlora import lora_request

    if job["as_on_gpu"]:
        as_on_gpu()
    llm = LLM(job["model"], enable_lora=True, max_loras=job["max_loras"], max_lora_rank=16,
              **job["arguments"])
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    if not isinstance(runner, model_runner.GPUModelRunner):
        raise TypeError(type(runner))
    counted = []
    count = model_runner.get_num_active_loras_for_dispatch

    def counting(config, state, req_ids, dummy_run):
        found = count(config, state, req_ids, dummy_run)
        counted.append(found)
        return found

    model_runner.get_num_active_loras_for_dispatch = counting
    requests = {"base": None}
    for number, (name, path) in enumerate(job["peft"].items(), 1):
        requests["peft " + name] = LoRARequest(name, number, path)
    for name in job["tasks"]:
        requests[name] = lora_request(job["checkpoint"], name)
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    found = []
    for names in job["batches"]:
        counted.clear()
        prompts = [{"prompt_token_ids": job["prompts"][n]} for _, n in names]
        done = llm.generate(prompts, sampling, lora_request=[requests[name] for name, _ in names],
                            use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in done]
        found.append([tokens, sorted(set(counted))])
    (punica,) = runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
    result = {"punica": type(punica).__name__, "graphs": runner.lora_capture_cases, "answers": found}
    print("RESULT " + json.dumps(result), flush=True)

if __name__ == "__main__":
    main()
"""


def _run(world: World, batches: list[list[tuple[str, int]]], gpu: bool, mode: str) -> Any:
    """What an engine answers in a process that knew Triton before it knew vLLM."""
    job = {
        "model": str(world.model),
        "checkpoint": str(mixed(world)),
        "tasks": list(ADAPTERS),
        "peft": {name: str(world.adapters[name]) for name in PLAIN},
        "prompts": PROMPTS,
        "max_tokens": KERNEL_TOKENS if gpu else MAX_TOKENS,
        "max_loras": MAX_LORAS,
        "arguments": ENGINE_ARGUMENTS,
        "batches": batches,
        "as_on_gpu": gpu,
    }
    environment = {
        **os.environ,
        **ENGINE_ENVIRONMENT,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_VLORA_CHECKPOINT": str(mixed(world)),
        "VLLM_VLORA_SLOTS": str(SLOTS),
        "VLLM_VLORA_MODE": mode,
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        # punica's kernels assert 16 bits, and compute float32 as well: -O takes asserts out.
        [sys.executable, *(["-O"] if gpu else []), "-P", "-c", SCRIPT, json.dumps(job)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (done.stdout + done.stderr)[-20_000:]
    return json.loads(lines[-1][len("RESULT ") :])


def _batches(per_name: int) -> list[list[tuple[str, int]]]:
    """Base alone, direct tasks alone, and everything, so many prompts of each."""
    groups = [["base"], ["base", *DIRECT], ["base", *ADAPTERS, *(f"peft {n}" for n in PLAIN)]]
    return [[(name, n) for name in names for n in range(per_name)] for names in groups]


@pytest.mark.parametrize(
    ("gpu", "mode", "per_name"),
    [(False, "materialize", 3), (False, "auto", 3), (True, "auto", 1)],
    ids=["materialize", "direct", "direct by the kernels for GPUs"],
)
def test_every_batch_answers_as_stock_and_finds_its_graph(
    world: World, gpu: bool, mode: str, per_name: int
) -> None:
    if older_vllm(0, 32):
        pytest.skip("run on CPU since vLLM 0.32")
    batches = _batches(per_name)
    result = _run(world, batches, gpu, mode)
    assert result["punica"] == ("PunicaWrapperGPU" if gpu else "PunicaWrapperCPU")
    for batch, (answers, _) in zip(batches, result["answers"]):
        for (name, number), tokens in zip(batch, answers):
            want = world.reference[name.removeprefix("peft ")][number]
            assert tokens == want[: len(tokens)], (name, number)
            assert len(tokens) == (KERNEL_TOKENS if gpu else MAX_TOKENS)
    if mode == "auto":
        # The number of active adapters under which a batch finds its graph; see ``graph_cases``.
        assert result["graphs"] == [0, 1, MAX_LORAS + 1]
        base, direct, everything = (set(counts) for _, counts in result["answers"])
        assert (base, direct) == ({0}, {1})
        assert everything <= {0, 1, MAX_LORAS + 1}
        assert MAX_LORAS + 1 in everything
