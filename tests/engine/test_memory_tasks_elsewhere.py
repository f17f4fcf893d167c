"""Tasks from memory where the engine core is a process of its own: two ranks, and an ``AsyncLLM``."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from engine_forks import run, start, stop
from engine_world import ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World, exact
from places import ROOT

pytestmark = pytest.mark.engine

COMMON = """
import asyncio, json, sys, time
import torch
from pathlib import Path
from safetensors.torch import load_file
from vllm import SamplingParams

job = json.loads(sys.argv[1])

def adapter(name):
    folder = Path(job["adapters"][name])
    config = json.loads((folder / "adapter_config.json").read_text())
    return {"tensors": load_file(folder / "adapter_model.safetensors"), "config": config}

def sampling(tokens):
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

def known(worker):
    store = worker.model_runner.lora_manager._adapter_manager.vlora_store
    paths = {*store._in_memory, *store._staging, *store._images.held,
             *(task.path for task in store.tasks())}
    direct = [task.direct is not None for task in store.tasks() if "publish" in task.path]
    return sorted(path for path in paths if "publish" in path), direct

def say(answers):
    print("RESULT " + json.dumps(answers), flush=True)
"""

RANKS = """
import vllm_vlora
from vllm import LLM

def main():
    llm = LLM(job["model"], tensor_parallel_size=2, enable_lora=True, max_loras=3,
              max_lora_rank=16, **job["arguments"])
    answers = {}
    for name in job["adapters"]:
        request = vllm_vlora.publish(llm, "policy", **adapter(name))
        done = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]],
                            sampling(job["max_tokens"]), lora_request=request, use_tqdm=False)
        answers[name] = [list(output.outputs[0].token_ids) for output in done]
    held = llm.collective_rpc(known)
    try:
        factors = torch.ones(1, 5), torch.ones(7, 1)
        vllm_vlora.publish(llm, "policy", {"model.layers.0.self_attn.q_proj": factors}, alpha=1)
        refusal = ""
    except vllm_vlora.VLoRAError as error:
        refusal = str(error)
    say([answers, held, request.lora_path, refusal])

if __name__ == "__main__":
    main()
"""

ASYNC = """
import vllm_vlora
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def ask(engine, name, number, tokens, request):
    prompt = {"prompt_token_ids": job["prompts"][number]}
    async for output in engine.generate(prompt, sampling(tokens), name, lora_request=request):
        last = output
    return list(last.outputs[0].token_ids)

async def work(engine):
    old = await vllm_vlora.publish_async(engine, "policy", **adapter("attention"))
    alone = await ask(engine, "alone", 0, job["long"], old)
    running = [asyncio.create_task(ask(engine, f"old-{i}", 0, job["long"], old)) for i in range(4)]
    await asyncio.sleep(0.2)
    new = await vllm_vlora.publish_async(engine, "policy", **adapter("everything"))
    in_flight = [task.done() for task in running]
    news = [await ask(engine, f"new-{i}", i, job["max_tokens"], new)
            for i in range(len(job["prompts"]))]
    olds = [await task for task in running]
    # Nothing is asked of the engine any more.
    until = time.monotonic() + 20
    while len((await engine.collective_rpc(known))[0][0]) > 1 and time.monotonic() < until:
        await asyncio.sleep(0.1)
    left = (await engine.collective_rpc(known))[0]
    await vllm_vlora.unpublish_async(engine, "policy")
    try:
        await ask(engine, "gone", 0, 5, new)
        gone = ""
    except Exception as error:
        gone = str(error.__cause__ or error)
    say([alone, olds, in_flight, news, left, new.lora_path, gone])

def main():
    arguments = AsyncEngineArgs(job["model"], enable_lora=True, max_loras=3, max_lora_rank=16,
                                **job["arguments"])
    async def all():
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            await work(engine)
        finally:
            engine.shutdown()
    asyncio.run(all())

if __name__ == "__main__":
    main()
"""
# So many that they last over a publication, and few enough for the engine's longest sequence.
LONG = 200


def _run(world: World, script: str, log: Path, **environment: str) -> Any:
    job = {
        "model": str(world.model),
        "arguments": ENGINE_ARGUMENTS,
        "adapters": {name: str(world.adapters[name]) for name in ("attention", "everything")},
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "long": LONG,
    }
    process = start(COMMON + script, json.dumps(job), log=log, VLLM_ALLOW_INSECURE_SERIALIZATION="1",
                    **environment)  # fmt: skip
    try:
        process.join(300)
    finally:
        stop(process, signal.SIGKILL)
    lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    assert lines, log.read_text()[-20_000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.mark.parametrize("kind", ["private", ""])
def test_every_rank_cuts_out_its_part(world: World, kind: str) -> None:
    checkpoint = str(exact(world, kind)) if kind else ""
    log = world.root / f"memory-ranks-{kind}.log"
    answers, held, path, refusal = _run(world, RANKS, log, VLLM_VLORA_CHECKPOINT=checkpoint)
    for name, found in answers.items():
        assert found == world.reference[name], name
    assert held == [[[path], [bool(kind)]]] * 2
    assert refusal.startswith("task 'policy' is not published: ")


@pytest.mark.parametrize("kind", ["private", ""])
def test_an_async_engine_goes_on_while_versions_change(world: World, kind: str) -> None:
    checkpoint = str(exact(world, kind)) if kind else ""
    log = world.root / f"memory-async-{kind}.log"
    alone, olds, in_flight, news, left, path, gone = _run(
        world, ASYNC, log, VLLM_VLORA_CHECKPOINT=checkpoint
    )
    assert alone[:MAX_TOKENS] == world.reference["attention"][0]
    assert not any(in_flight), "the old requests had ended before the new version came"
    assert olds == [alone] * 4
    assert news == world.reference["everything"]
    assert left == [[path], [bool(kind)]]
    assert "published again or unpublished" in gone


def test_the_example_learns_from_what_its_policy_answers(world: World) -> None:
    """Its engine's log-probabilities are those of the model that it trains, at every step."""
    script = (ROOT / "examples" / "reinforce.py").read_text()
    options = ["--model", str(world.model), "--steps", "20", "--wanted", "7"]
    _, output = run(script, *options, VLLM_VLORA_CHECKPOINT="")
    line = r"step +\d+: reward ([0-9.]+), published in [0-9.]+ ms, log-probabilities ([0-9.e+-]+) apart"
    found = [(float(reward), float(apart)) for reward, apart in re.findall(line, output)]
    assert len(found) == 20, output[-5000:]
    assert max(apart for _, apart in found) < 1e-3
    rewards = [reward for reward, _ in found]
    # Of 512 tokens each; without new weights they differ by 0.02.
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05
