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
from peft_oracle import Oracle

KERNELS = [
    pytest.param(True, marks=pytest.mark.engine, id="for GPUs"),
    pytest.param(False, marks=pytest.mark.slow, id="for CPUs"),
]
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
DRAFTED = []

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

def draft(self, input_batch, *args, **kwargs):
    # In place of a search, which the interpreter does not take: the answer, but for some tokens.
    drafts = self.drafts[:input_batch.num_reqs].zero_()
    for row, (request, state) in enumerate(zip(input_batch.req_ids, input_batch.idx_mapping_np)):
        number = int(request.split("-")[0])
        answer = job["answers"][number]
        done = int(self.req_states.total_len.gpu[state] - self.req_states.prompt_len.np[state])
        for column, place in enumerate(range(done, min(done + drafts.shape[1], len(answer)))):
            drafts[row, column] = answer[place] if (place + number) % 3 else 1
        if number == 1 and done < len(answer):
            DRAFTED.append(done)
    return drafts

def main():
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu import model_runner
    from vllm_vlora import lora_request

    if job["as_on_gpu"]:
        as_on_gpu()
    if job["speculative"]:
        from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
        NgramGPUSpeculator.propose = draft
    llm = LLM(job["model"], enable_lora=True, max_loras=job["max_loras"], max_lora_rank=16,
              speculative_config=job["speculative"], **job["arguments"])
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
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True,
                              prompt_logprobs=0 if job["speculative"] else None)
    found = []
    for names in job["batches"]:
        counted.clear()
        prompts = [{"prompt_token_ids": job["prompts"][n]} for _, n in names]
        done = llm.generate(prompts, sampling, lora_request=[requests[name] for name, _ in names],
                            use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in done]
        scored = [[row and {t: e.logprob for t, e in row.items()} for row in output.prompt_logprobs or []]
                  for output in done]
        found.append([tokens, sorted(set(counted)), scored])
        if job["speculative"]:
            continue  # The stand-in drafts for real requests alone.
        # A step of a rank without requests, as others of data parallel have it take.
        before = sorted(runner.lora_manager.list_adapters())
        counted.clear()
        worker.execute_dummy_batch()
        kept = before == sorted(runner.lora_manager.list_adapters())
        found[-1].append([kept, list(counted)])
    (punica,) = runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
    result = {"punica": type(punica).__name__, "graphs": runner.lora_capture_cases, "answers": found,
              "drafted": DRAFTED}
    print("RESULT " + json.dumps(result), flush=True)

if __name__ == "__main__":
    main()
"""


def _run(
    world: World,
    batches: list[list[tuple[str, int]]],
    gpu: bool = False,
    mode: str = "auto",
    speculative: dict[str, Any] | None = None,
) -> Any:
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
        "speculative": speculative,
        "answers": [world.reference[n.removeprefix("peft ")][i] for b in batches for n, i in b],
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


def _check_tokens(world: World, batches: list[list[tuple[str, int]]], result: Any) -> None:
    for batch, (answers, *_) in zip(batches, result["answers"], strict=True):
        for (name, number), tokens in zip(batch, answers, strict=True):
            want = world.reference[name.removeprefix("peft ")][number]
            assert len(tokens) in (KERNEL_TOKENS, MAX_TOKENS)
            assert tokens == want[: len(tokens)], (name, number)


@pytest.mark.parametrize("gpu", KERNELS)
def test_every_batch_answers_as_stock_and_finds_its_graph(world: World, gpu: bool) -> None:
    """With the LoRA kernels of both kinds."""
    if older_vllm(0, 32):
        pytest.skip("run on CPU since vLLM 0.32")
    batches = _batches(1)
    batches += batches[:2]
    result = _run(world, batches, gpu)
    assert result["punica"] == ("PunicaWrapperGPU" if gpu else "PunicaWrapperCPU")
    _check_tokens(world, batches, result)
    # The number of active adapters under which a batch finds its graph; see ``graph_cases``.
    assert result["graphs"] == [0, 1, MAX_LORAS + 1]
    base, direct, everything, *again = (set(counts) for _, counts, *_ in result["answers"])
    assert [base, direct] == again == [{0}, {1}]
    assert everything <= {0, 1, MAX_LORAS + 1}
    assert MAX_LORAS + 1 in everything
    assert [idle for *_, idle in result["answers"]] == [[True, [0]]] * len(batches)


@pytest.mark.engine
def test_drafts_and_prompts_are_scored_by_the_adapter_of_their_request(world: World) -> None:
    """Several rows of logits a request, with tasks that have an lm_head among others."""
    if older_vllm(0, 32):
        pytest.skip("run on CPU since vLLM 0.32")
    everything = _batches(2)[2:]
    ngram = {"method": "ngram", "num_speculative_tokens": 2} | dict.fromkeys(
        ("prompt_lookup_min", "prompt_lookup_max"), 1
    )
    result = _run(world, everything, mode="materialize", speculative=ngram)
    # Some drafts are accepted, some are not: after how many tokens the second request was drafted for.
    assert result["drafted"] == [1, 3, 6, 9]
    _check_tokens(world, everything, result)
    oracle = Oracle(world)
    for (name, number), rows in zip(everything[0], result["answers"][0][2], strict=True):
        scores = [row and {int(token): value for token, value in row.items()} for row in rows]
        oracle.check_prompt(name.removeprefix("peft "), PROMPTS[number], scores)
