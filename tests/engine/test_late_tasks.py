"""Tasks that come after start-up, in real engines whose budget for them holds a part: float32, greedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_forks import ENGINE_ENVIRONMENT, run_script
from engine_world import ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World, exact

from vllm_vlora.errors import CheckpointError, MemoryBudgetError

pytestmark = pytest.mark.engine

LATE_MIB = 1
# Copies under many names: different tasks to the engine, with 122 and 53 KiB.
COPIES = {f"late-{i}": "ordinary" if i % 2 else "everything" for i in range(16)}


def _late_checkpoint(world: World, name: str) -> Path:
    adapters = {**world.adapters, "ordinary": world.ordinary}
    tasks = {task: adapters[copied] for task, copied in COPIES.items()}
    return world.compress(
        name, tasks, force=True, representation="private", quantize="none", ratio=0.1
    )


def _held(worker: Any) -> tuple[int, int]:
    """Bytes that tasks may take, and the number of those that came late."""
    store = worker.model_runner.lora_manager._adapter_manager.vlora_store
    assert store.arena_used <= store.arena_nbytes
    return store.arena_nbytes, sum("late" in task.path for task in store.tasks())


def _paths(worker: Any) -> list[str]:
    return list(worker.model_runner.lora_manager._adapter_manager.held_paths())


class Engine:
    """An engine in this process."""

    def __init__(self, world: World) -> None:
        from vllm import LLM

        self.world = world
        self.late = _late_checkpoint(world, "late")
        self.llm = LLM(
            str(world.model), enable_lora=True, max_loras=32, max_lora_rank=16, **ENGINE_ARGUMENTS
        )

    def ask(self, requests: list[Any]) -> list[list[int]]:
        from vllm import SamplingParams

        done = self.llm.generate(
            [{"prompt_token_ids": PROMPTS[0]}] * len(requests),
            SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True),
            lora_request=requests,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in done]

    def answer(self, name: str) -> list[int]:
        """Stock vLLM's."""
        return self.world.reference[COPIES.get(name, name)][0]

    def paths(self) -> list[str]:
        core = self.llm.llm_engine.engine_core.engine_core
        (found,) = core.model_executor.collective_rpc(_paths)
        return found

    def held(self) -> tuple[int, int]:
        core = self.llm.llm_engine.engine_core.engine_core
        (found,) = core.model_executor.collective_rpc(_held)
        return found


@pytest.fixture(scope="module", params=["direct beside a checkpoint", "no checkpoint"])
def engine(
    world: World, request: pytest.FixtureRequest, take_out_the_plugin: Callable[[], None]
) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_VLORA_LATE_MIB", str(LATE_MIB))
        patch.setenv("VLLM_VLORA_DEVICE_BYTES", "0")
        patch.setenv("VLLM_VLORA_HOST_BYTES", "0")
        preloaded = exact(world, "private") if request.param != "no checkpoint" else ""
        patch.setenv("VLLM_VLORA_CHECKPOINT", str(preloaded))
        take_out_the_plugin()  # The other engine's has another checkpoint.
        engine = Engine(world)
        yield engine
        engine.llm.llm_engine.engine_core.shutdown()


def test_the_least_recently_used_give_way_and_come_back(engine: Engine) -> None:
    from vllm_vlora import lora_request

    most = 0
    for _ in range(2):
        for name in COPIES:
            assert engine.ask([lora_request(engine.late, name)]) == [engine.answer(name)]
            most = max(most, engine.held()[1])
    assert 6 < most < len(COPIES)


def test_a_pinned_task_stays_while_the_others_give_way(engine: Engine) -> None:
    from vllm_vlora import lora_request

    pinned = lora_request(engine.late, "late-0")
    assert engine.ask([pinned]) == [engine.answer("late-0")]
    assert engine.llm.llm_engine.pin_lora(pinned.lora_int_id)
    for name in list(COPIES)[1:]:
        assert engine.ask([lora_request(engine.late, name)]) == [engine.answer(name)]
        assert pinned.lora_path in engine.paths()
    assert engine.ask([pinned]) == [engine.answer("late-0")]
    # Until it is removed: then it is the one that gives way, as nothing else is in use for longer.
    assert engine.llm.llm_engine.remove_lora(pinned.lora_int_id)
    for name in list(COPIES)[1:]:
        engine.ask([lora_request(engine.late, name)])
    assert pinned.lora_path not in engine.paths()
    assert engine.ask([pinned]) == [engine.answer("late-0")]


def test_a_pinned_task_does_not_give_way(engine: Engine) -> None:
    from vllm_vlora import lora_request

    pinned = lora_request(engine.late, "late-4")
    assert engine.llm.llm_engine.add_lora(pinned)
    assert engine.llm.llm_engine.pin_lora(pinned.lora_int_id)
    for name in COPIES:
        assert engine.ask([lora_request(engine.late, name)]) == [engine.answer(name)]
        assert pinned.lora_path in engine.paths()
    assert engine.llm.llm_engine.remove_lora(pinned.lora_int_id)
    for name in COPIES:
        engine.ask([lora_request(engine.late, name)])
    assert engine.ask([pinned]) == [engine.answer("late-4")]


def test_what_does_not_fit_beside_the_tasks_in_use_is_its_callers_error(engine: Engine) -> None:
    from vllm_vlora import lora_request

    requests = {name: lora_request(engine.late, name) for name in COPIES}
    with pytest.raises(MemoryBudgetError, match=r"no room for task 'late-.*VLLM_VLORA_LATE_MIB"):
        engine.ask(list(requests.values()))
    assert not engine.llm.llm_engine.has_unfinished_requests()
    # The engine lives, those held answer, and room is made for others again.
    some = ["late-3", "late-8", "late-15", "late-0"]
    assert engine.ask([None, *(requests[name] for name in some)]) == [
        engine.answer("base"), *(engine.answer(name) for name in some)
    ]  # fmt: skip
    engine.held()


def test_a_task_that_gave_way_and_is_gone_is_an_error_and_the_engine_lives(engine: Engine) -> None:
    from vllm_vlora import lora_request

    kept = _late_checkpoint(engine.world, "vanishing")
    first = lora_request(kept, "late-0")
    assert engine.ask([first]) == [engine.answer("late-0")]
    for name in COPIES:
        engine.ask([lora_request(engine.late, name)])
    shutil.rmtree(kept)
    with pytest.raises(CheckpointError, match="vanishing"):
        engine.ask([first])
    assert engine.ask([None]) == [engine.answer("base")]
    engine.held()


KV = """
import json, os, sys
os.environ.pop("VLLM_CPU_KVCACHE_SPACE")  # So that vLLM measures.
from vllm import LLM

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], gpu_memory_utilization=0.2, enable_lora=True, **job["arguments"])
    held = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    used = sum(tensor.size for tensor in held.kv_cache_tensors)
    print("RESULT " + json.dumps(used), flush=True)

if __name__ == "__main__":
    main()
"""


def test_the_kv_cache_leaves_the_budget_free(world: World) -> None:
    job = json.dumps({"model": str(world.model), "arguments": ENGINE_ARGUMENTS})
    with_room, without = (
        run_script(KV, job, VLLM_VLORA_LATE_MIB=late, VLLM_VLORA_CHECKPOINT="")
        for late in ("700", "0")
    )
    # What other processes take of the machine changes between the two starts: 96 MiB were seen.
    assert abs(without - with_room - (700 << 20)) < 250 << 20
