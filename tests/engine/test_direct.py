"""Tasks that run direct, in real engines, next to stock vLLM's tokens: float32, greedy."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_forks import ENGINE_ENVIRONMENT, run, run_script
from engine_world import (
    ADAPTERS,
    ENGINE_ARGUMENTS,
    MAX_TOKENS,
    PROMPTS,
    World,
    exact,
    family,
    mixed,
    stock_tokens,
)

pytestmark = pytest.mark.engine

SLOTS = 2
# What stands in a slot even so: vLLM runs LoRA on these layers through other calls.
MATERIALIZED = {"output head/ü", "embedding"}


class Engine:
    """Sixty-four tasks may share a batch; two adapters that need a slot may."""

    def __init__(self, world: World) -> None:
        from vllm import LLM

        self.world = world
        self.checkpoint = mixed(world)
        self.llm = LLM(
            str(world.model), enable_lora=True, max_loras=64, max_lora_rank=16, **ENGINE_ARGUMENTS
        )

    def request(self, name: str) -> object:
        """Base, a task, or (after "peft ") the adapter of that name as an ordinary one."""
        from vllm.lora.request import LoRARequest

        from vllm_vlora import lora_request

        if name == "base":
            return None
        if name.startswith("peft "):
            number = list(ADAPTERS).index(name.removeprefix("peft "))
            return LoRARequest(name, 100 + number, str(self.world.adapters[name[5:]]))
        return lora_request(self.checkpoint, name)

    def generate(self, prompts: list[list[int]], requests: list) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        done = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling,
            lora_request=requests,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in done]


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[Engine]:
    patch = pytest.MonkeyPatch()
    for name, value in ENGINE_ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.setenv("VLLM_VLORA_CHECKPOINT", str(mixed(world)))
    patch.setenv("VLLM_VLORA_SLOTS", str(SLOTS))
    engine = Engine(world)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()
    patch.undo()


def _plain_peft() -> list[str]:
    """Adapters that every supported vLLM serves as PEFT does (before 0.32 patterns are ignored)."""
    return [f"peft {name}" for name, config in ADAPTERS.items() if "rank_pattern" not in config]


@pytest.mark.parametrize("task", list(ADAPTERS))
def test_one_task_answers_as_stock_does(engine: Engine, task: str) -> None:
    for number, prompt in enumerate(PROMPTS):
        tokens = engine.generate([prompt], [engine.request(task)])
        assert tokens == [engine.world.reference[task][number]]


@pytest.mark.parametrize("seed", range(3))
def test_everything_in_one_batch_with_more_adapters_than_slots(engine: Engine, seed: int) -> None:
    """Base, direct and materialized tasks, and five PEFT adapters, seven of them for two slots."""
    names = ["base", *ADAPTERS, *_plain_peft()]
    assert len(_plain_peft()) + len(MATERIALIZED) > SLOTS
    items = [(name, number) for name in names for number in range(len(PROMPTS))]
    random.Random(seed).shuffle(items)
    tokens = engine.generate(
        [PROMPTS[number] for _, number in items], [engine.request(name) for name, _ in items]
    )
    for (name, number), got in zip(items, tokens):
        assert got == engine.world.reference[name.removeprefix("peft ")][number], (name, number)


def test_a_request_that_waits_for_a_slot_can_be_aborted(engine: Engine) -> None:
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    names = _plain_peft()
    for name in names:
        core.add_request(
            f"abort-{name}", {"prompt_token_ids": PROMPTS[0]}, sampling,
            lora_request=engine.request(name),
        )  # fmt: skip
    # By the name that it was added under; what add_request returns is the engine's own.
    core.abort_request([f"abort-{names[-1]}"])
    answers = {}
    while core.has_unfinished_requests():
        answers |= {
            output.request_id: list(output.outputs[0].token_ids)
            for output in core.step()
            if output.finished
        }
    done = {key.split("-")[1]: tokens for key, tokens in answers.items()}
    want = {name: engine.world.reference[name.removeprefix("peft ")][0] for name in names[:-1]}
    assert done == {name.split("-")[0]: tokens for name, tokens in want.items()}
    name = next(iter(ADAPTERS))
    assert engine.generate([PROMPTS[1]], [engine.request(name)]) == [
        engine.world.reference[name][1]
    ]


def test_a_direct_task_is_listed_pinned_and_removed_like_an_adapter(engine: Engine) -> None:
    core = engine.llm.llm_engine
    request = engine.request("attention")
    assert core.add_lora(request)
    assert core.pin_lora(request.lora_int_id)
    assert request.lora_int_id in core.list_loras()
    assert core.remove_lora(request.lora_int_id)
    assert request.lora_int_id not in core.list_loras()
    assert engine.generate([PROMPTS[0]], [request]) == [engine.world.reference["attention"][0]]


def test_an_id_that_comes_with_another_task_gets_that_task(engine: Engine) -> None:
    first, second = engine.request("attention"), engine.request("everything")
    for request, name in ((first, "attention"), (second, "everything"), (first, "attention")):
        request.lora_int_id = 123_456
        tokens = engine.generate([PROMPTS[0]], [request])
        assert tokens == [engine.world.reference[name][0]]


def test_a_sleep_that_would_lose_the_tasks_is_refused_and_the_engine_goes_on(
    engine: Engine,
) -> None:
    with pytest.raises(Exception, match="sleep level 2 would lose the tasks"):
        engine.llm.sleep(level=2)
    name = next(iter(ADAPTERS))
    tokens = engine.generate([PROMPTS[0]], [engine.request(name)])
    assert tokens == [engine.world.reference[name][0]]


MANY = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_vlora.plugin.requests import all_requests

def main():
    job = json.loads(sys.argv[1])
    arguments = {**job["arguments"], "max_num_seqs": job["count"]}
    llm = LLM(job["model"], enable_lora=True, max_loras=job["count"], max_lora_rank=16, **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    names = [f"task-{i}" for i in range(job["count"])]
    # lora_request numbers all tasks at each call.
    requests = {request.lora_name: request for request in all_requests(job["checkpoint"])}
    done = llm.generate([{"prompt_token_ids": job["prompt"]}] * len(names), sampling,
                        lora_request=[requests[name] for name in names], use_tqdm=False)
    print("RESULT " + json.dumps([list(o.outputs[0].token_ids) for o in done]), flush=True)

if __name__ == "__main__":
    main()
"""


def test_a_thousand_distinct_tasks_in_one_batch(world: World) -> None:
    from vllm_vlora.checkpoint.export import export_task
    from vllm_vlora.checkpoint.reader import Checkpoint

    count, sample = 1024, (0, 1, 341, 682, 1023)
    path = family(world, count)
    job = {
        "model": str(world.model),
        "checkpoint": str(path),
        "count": count,
        "prompt": PROMPTS[0],
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
    }
    found = run_script(MANY, json.dumps(job), VLLM_VLORA_CHECKPOINT=str(path))
    checkpoint = Checkpoint.open(path)
    exported = {
        f"task-{i}": export_task(
            checkpoint, f"task-{i}", world.root / "family" / str(i), dtype=torch.float32
        )
        for i in sample
    }
    reference = stock_tokens(world.model, exported, PROMPTS[:1])
    assert {f"task-{i}": [found[i]] for i in sample} == reference
    # Neighbours may agree; a thousand that all did would be one task.
    assert len({tuple(tokens) for tokens in found}) > 20


COMPILED = """
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationMode
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.platforms.cpu import CpuPlatform
from vllm_vlora import lora_request

check = CpuPlatform.check_and_update_config.__func__
job = json.loads(sys.argv[1])

def keep_compilation(cls, config):
    # On CPU vLLM turns compilation off whenever LoRA is on.
    lora, config.lora_config = config.lora_config, None
    try:
        check(cls, config)
    finally:
        config.lora_config = lora
    if job["as_on_gpu"]:
        # In pieces between the attention layers, which are saved; without passes that name CUDA's
        # operators.
        compilation = config.compilation_config
        compilation.mode, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, []
        for name, value in list(vars(compilation.pass_config).items()):
            if value is True:
                setattr(compilation.pass_config, name, False)

def answer():
    arguments = {**job["arguments"], "enforce_eager": False}
    llm = LLM(job["model"], enable_lora=True, max_loras=16, max_lora_rank=16, **arguments)
    mode = llm.llm_engine.vllm_config.compilation_config.mode
    requests = {"base": None, "peft rslora": LoRARequest("rslora", 1, job["ordinary"])}
    requests |= {task: lora_request(job["checkpoint"], task) for task in job["tasks"]}
    items = [(name, n) for name in requests for n in range(len(job["prompts"]))]
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": job["prompts"][n]} for _, n in items], sampling,
                        lora_request=[requests[name] for name, _ in items], use_tqdm=False)
    answers = {}
    for (name, _), output in zip(items, done):
        answers.setdefault(name, []).append(list(output.outputs[0].token_ids))
    llm.llm_engine.engine_core.shutdown()
    return [mode.name, answers]

def main():
    CpuPlatform.check_and_update_config = classmethod(keep_compilation)
    if job["as_on_gpu"]:
        FixFunctionalizationPass.__call__ = lambda self, graph: None
    found = []
    for _ in range(job["engines"]):
        found.append(answer())
        gc.collect()
        cleanup_dist_env_and_memory()
    print("RESULT " + json.dumps(found), flush=True)

if __name__ == "__main__":
    main()
"""


def _compiled(world: World, engines: int, as_on_gpu: bool, **environment: str) -> list[list]:
    """(mode, answers) of engines with compiled graphs, one after another in one process."""
    # punica for CPU branches on the batch in embeddings, which a compiled graph would freeze.
    tasks = [task for task in ADAPTERS if task != "embedding"]
    job = {
        "model": str(world.model),
        "checkpoint": str(mixed(world)),
        "ordinary": str(world.adapters["rslora"]),
        "tasks": tasks,
        "prompts": PROMPTS,
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
        "engines": engines,
        "as_on_gpu": as_on_gpu,
    }
    return run_script(
        COMPILED,
        json.dumps(job),
        VLLM_VLORA_CHECKPOINT=str(mixed(world)),
        VLLM_VLORA_SLOTS=str(SLOTS),
        **environment,
    )


def _assert_as_stock(world: World, answers: dict[str, list[list[int]]]) -> None:
    for name, tokens in answers.items():
        assert tokens == world.reference[name.removeprefix("peft ")], name


def test_compiled_graphs_and_warm_up_with_dummies(world: World) -> None:
    """The graph is traced in a warm-up run with dummy adapters; batches of all kinds follow it."""
    # Traced by dynamo and run without inductor's C++: a minute less.
    [[mode, answers]] = _compiled(world, 1, as_on_gpu=False, VLLM_CPU_CI_ENV="1")
    assert mode != "NONE"
    _assert_as_stock(world, answers)


def test_an_engine_that_takes_anothers_graphs_from_vllms_cache(
    world: World, tmp_path: Path
) -> None:
    """The second engine's layers have other handles than those that the graphs were saved with."""
    known = Path(os.environ.get("VLLM_CACHE_ROOT", Path.home() / ".cache/vllm")) / "modelinfos"
    if known.exists():
        (tmp_path / "modelinfos").symlink_to(known)  # vLLM would take ten seconds to find it out.
    found = _compiled(world, 2, as_on_gpu=True, VLLM_CACHE_ROOT=str(tmp_path))
    assert list(tmp_path.glob("torch_compile_cache/**/*")), "nothing was saved"
    for mode, answers in found:
        assert mode == "VLLM_COMPILE"
        _assert_as_stock(world, answers)


START = """
import sys
from vllm import LLM
if __name__ == "__main__":
    LLM(sys.argv[1], enable_lora=True, max_loras=4, max_lora_rank=16, enforce_eager=True,
        dtype="float32", max_model_len=256)
"""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VLLM_VLORA_MODE": "direct"}, r"cannot run direct: .*VLLM_VLORA_MODE=auto"),
        ({"VLLM_VLORA_MODE": "fast"}, r"VLLM_VLORA_MODE='fast': use one of auto, direct"),
    ],
)
def test_what_cannot_run_is_refused_at_the_start_with_one_line(
    world: World, environment: dict[str, str], message: str
) -> None:
    checkpoint = str(exact(world, "private"))
    code, output = run(START, str(world.model), VLLM_VLORA_CHECKPOINT=checkpoint, **environment)
    assert code == 1
    assert re.search(message, output), output[-5000:]
