"""Tasks that are published from tensors into a running ``vllm.LLM``: real engines, float32, greedy."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_forks import ENGINE_ENVIRONMENT
from engine_sums import Sums
from engine_world import ADAPTERS, ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World, exact
from safetensors.torch import load_file

from vllm_vlora.errors import (
    AdapterError,
    CheckpointError,
    TaskLoadError,
    TaskNotFoundError,
    VLoRAError,
)

pytestmark = pytest.mark.engine

RANK = 16
# Published in place of a task of the checkpoint, and beside them.
TAKEN, NEW = "attention", "policy"


def tensors_of(adapter: Path) -> dict[str, torch.Tensor]:
    """A state dict as PEFT makes it."""
    return load_file(adapter / "adapter_model.safetensors")


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


def _state(worker: Any) -> tuple[set[str], set[str]]:
    """Paths of tasks from memory: on the device, and anywhere in the worker."""
    store = worker.model_runner.lora_manager._adapter_manager.vlora_store
    held = {task.path for task in store.tasks() if "publish" in task.path}
    known = {*held, *store._in_memory, *store._staging, *store._images.held}
    return held, {path for path in known if "publish" in path}


class Engine:
    """An engine in this process."""

    def __init__(self, world: World, folder: Path | None) -> None:
        from vllm import LLM

        self.world, self.folder = world, folder
        self.llm: Any = LLM(
            str(world.model), enable_lora=True, max_loras=4, max_lora_rank=RANK,
            enable_prefix_caching=True, **ENGINE_ARGUMENTS,
        )  # fmt: skip

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    def publish(self, task: str, name: str, **options: Any) -> Any:
        """An adapter of the world, from its tensors alone."""
        from vllm_vlora import publish

        folder = self.world.ordinary if name == "ordinary" else self.world.adapters[name]
        tensors = tensors_of(folder)
        request = publish(self.llm, task, tensors, config=config_of(folder), **options)
        for tensor in tensors.values():
            tensor.fill_(float("nan"))  # They are the trainer's, who goes on.
        return request

    def ask(self, prompts: list[list[int]], requests: list[Any]) -> list[list[int]]:
        from vllm import SamplingParams

        done = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True),
            lora_request=requests,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in done]

    def check(self, request: Any, name: str) -> None:
        """Every prompt is answered as stock vLLM answers with the adapter's folder."""
        answers = self.ask(PROMPTS, [request] * len(PROMPTS))
        assert answers == self.world.reference[name]

    def state(self) -> tuple[set[str], set[str]]:
        (found,) = self.core.model_executor.collective_rpc(_state)
        return found


@pytest.fixture(scope="module", params=["direct beside a checkpoint", "no checkpoint"])
def engine(
    world: World, request: pytest.FixtureRequest, take_out_the_plugin: Callable[[], None]
) -> Iterator[Engine]:
    folder = None
    if request.param != "no checkpoint":
        folder = world.root / "beside-memory"
        shutil.copytree(exact(world, "private"), folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_VLORA_LATE_MIB", "1")
        patch.setenv("VLLM_VLORA_CHECKPOINT", str(folder or ""))
        take_out_the_plugin()  # The other engine's has another checkpoint.
        engine = Engine(world, folder)
        yield engine
        engine.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def _nothing_published(engine: Engine) -> Iterator[None]:
    yield
    from vllm_vlora import unpublish

    for task in (TAKEN, NEW):
        with contextlib.suppress(TaskNotFoundError):
            unpublish(engine.llm, task)
    assert engine.state() == (set(), set())


@pytest.mark.parametrize("name", [*ADAPTERS, "ordinary"])
def test_tensors_answer_as_stock_vllm_does_with_their_folder(engine: Engine, name: str) -> None:
    engine.check(engine.publish(NEW, name), name)


def test_factors_by_module_with_one_alpha(engine: Engine) -> None:
    from vllm_vlora import publish

    folder = engine.world.adapters["attention"]
    pairs: dict[str, list[Any]] = {}
    for key, tensor in sorted(tensors_of(folder).items()):
        module, side = key.removesuffix(".weight").rsplit(".lora_", 1)
        pairs.setdefault(module.removeprefix("base_model.model."), [None, None])[
            "AB".index(side)
        ] = tensor
    engine.check(
        publish(engine.llm, NEW, pairs, alpha=config_of(folder)["lora_alpha"]), "attention"
    )


def test_each_publication_answers_and_the_one_before_is_freed(engine: Engine) -> None:
    for name in ("attention", "everything", "half-packed", "attention"):
        request = engine.publish(NEW, name)
        assert request.lora_name == NEW
        for _ in range(2):  # The second time from the prefix cache.
            engine.check(request, name)
        assert engine.state() == ({request.lora_path}, {request.lora_path})


def test_requests_in_flight_finish_on_the_weights_they_began_with(engine: Engine) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    inner, done = engine.llm.llm_engine, {}

    def add(number: str, request: Any) -> None:
        prompt = {"prompt_token_ids": PROMPTS[int(number[-1])]}
        inner.add_request(number, prompt, sampling, lora_request=request)

    def step() -> None:
        for output in inner.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)

    old = engine.publish(NEW, "attention")
    for place in range(3):
        add(f"old-{place}", old)
    for _ in range(4):
        step()
    new = engine.publish(NEW, "everything")
    assert engine.state()[1] == {old.lora_path, new.lora_path}
    for place in range(3):
        add(f"new-{place}", new)
    while inner.has_unfinished_requests():
        step()
    for place in range(3):
        assert done[f"old-{place}"] == engine.world.reference["attention"][place]
        assert done[f"new-{place}"] == engine.world.reference["everything"][place]
    engine.check(new, "everything")
    assert engine.state()[1] == {new.lora_path}


def test_an_old_request_is_its_callers_error_and_the_engine_lives(engine: Engine) -> None:
    old = engine.publish(NEW, "attention")
    new = engine.publish(NEW, "everything")
    with pytest.raises(CheckpointError, match=r"published again.*use the request that"):
        engine.ask([PROMPTS[0]], [old])
    engine.check(new, "everything")


@pytest.fixture(scope="module")
def sums(world: World) -> Sums:
    return Sums(world)


def _check_blend(engine: Engine, sums: Sums, request: Any, weights: dict[str, float]) -> None:
    from vllm import SamplingParams

    done = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=1),
        lora_request=[request] * len(PROMPTS),
        use_tqdm=False,
    )
    for prompt, output in zip(PROMPTS, done, strict=True):
        tokens = list(output.outputs[0].token_ids)
        found = [step[token].logprob for token, step in zip(tokens, output.outputs[0].logprobs)]
        sums.check(weights, prompt, tokens, found)


def test_blends_are_the_sums_of_the_updates(engine: Engine, sums: Sums) -> None:
    from vllm_vlora import lora_request

    # What is published under a name is another adapter than the checkpoint's of that name.
    new = engine.publish(NEW, "everything")
    taken = engine.publish(TAKEN, "rslora")
    asked: dict[str, dict[str, float]] = {
        f"{NEW}*0.7+{TAKEN}*0.3": {"everything": 0.7, "rslora": 0.3},
        f"{TAKEN}*2-{NEW}*0.5": {"everything": -0.5, "rslora": 2.0},
        f"{NEW}*0.25": {"everything": 0.25},
    }
    if engine.folder is not None:
        asked |= {
            f"{NEW}*0.7+rslora*0.3": {"everything": 0.7, "rslora": 0.3},
            f"half-packed-{TAKEN}*1.5": {"half-packed": 1.0, "rslora": -1.5},
            f"{NEW}*0.5+embedding*0.5+{TAKEN}": {
                "everything": 0.5, "embedding": 0.5, "rslora": 1.0,
            },
        }  # fmt: skip
    for text, weights in asked.items():
        request = lora_request(engine.folder, text, published=[new, taken])
        for _ in range(2):  # The second time from the prefix cache.
            _check_blend(engine, sums, request, weights)


def test_a_blend_is_of_the_versions_that_it_was_made_of(engine: Engine, sums: Sums) -> None:
    from vllm import SamplingParams

    from vllm_vlora import lora_request

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=1)
    inner, done = engine.llm.llm_engine, {}
    taken = engine.publish(TAKEN, "rslora")
    text = f"{NEW}*0.7+{TAKEN}*0.3"
    old = lora_request(None, text, published=[engine.publish(NEW, "everything"), taken])
    inner.add_request("old", {"prompt_token_ids": PROMPTS[1]}, sampling, lora_request=old)
    inner.step()
    new = lora_request(None, text, published=[engine.publish(NEW, "attention"), taken])
    assert new.lora_name == old.lora_name
    inner.add_request("new", {"prompt_token_ids": PROMPTS[1]}, sampling, lora_request=new)
    while inner.has_unfinished_requests():
        done.update({o.request_id: o.outputs[0] for o in inner.step() if o.finished})
    for name, first in (("old", "everything"), ("new", "attention")):
        (output,) = [o for number, o in done.items() if number.startswith(name)]
        found = [step[t].logprob for t, step in zip(output.token_ids, output.logprobs)]
        sums.check({first: 0.7, "rslora": 0.3}, PROMPTS[1], list(output.token_ids), found)
    # With the last request of the old version its blend is gone too, and not before.
    _check_blend(engine, sums, new, {"attention": 0.7, "rslora": 0.3})
    assert old.lora_path not in engine.state()[1]
    with pytest.raises(CheckpointError, match="was published again or removed; make a new request"):
        engine.ask([PROMPTS[0]], [old])
    _check_blend(engine, sums, new, {"attention": 0.7, "rslora": 0.3})


def test_a_blend_that_is_too_large_is_its_callers_error(engine: Engine) -> None:
    from vllm_vlora import lora_request

    requests = [engine.publish(NEW, "half-packed"), engine.publish(TAKEN, "everything")]
    blend = lora_request(None, f"{NEW}+{TAKEN}", published=requests)
    with pytest.raises(VLoRAError, match=r"has rank 24, the engine allows 16") as caught:
        engine.ask([PROMPTS[0]], [blend])
    assert "\n" not in str(caught.value)
    engine.check(requests[0], "half-packed")


def test_it_stands_before_the_checkpoints_task_until_it_is_taken_away(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_vlora import lora_request, unpublish
    from vllm_vlora.plugin.engine_core import tasks_of

    if engine.folder is None:
        pytest.skip("there is no checkpoint")
    # No API server asks here, for whose sake what is gone would be held for a while.
    monkeypatch.setattr(tasks_of(engine.core), "followed", False)
    state = engine.core.vlora_follow()
    engine.publish(TAKEN, "everything")
    served = dict(engine.core.vlora_tasks())
    assert list(served) == list(ADAPTERS)
    assert "publish" in served[TAKEN]
    # What API servers ask for says that the list is another.
    assert engine.core.vlora_follow() != state
    state = engine.core.vlora_follow()
    # The folder is published again; its workers look at it in threads of their own.
    again = engine.world.compress("again", {TAKEN: engine.world.ordinary}, ratio=0.1)
    shutil.rmtree(engine.folder)
    shutil.copytree(again, engine.folder)
    while engine.core.vlora_follow() == state:
        pass
    assert engine.core.vlora_tasks() == [(TAKEN, served[TAKEN])]
    request = engine.publish(NEW, "half-packed")
    engine.check(request, "half-packed")
    assert engine.core.vlora_tasks() == [(TAKEN, served[TAKEN]), (NEW, request.lora_path)]
    unpublish(engine.llm, TAKEN)
    engine.check(lora_request(engine.folder, TAKEN), "ordinary")
    with pytest.raises(TaskNotFoundError, match="no task was published as 'attention'"):
        unpublish(engine.llm, TAKEN)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "q_proj.lora_A" in key]:
        tensors[key] = tensors[key][:, :-1]


def _unknown_module(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "q_proj" in key]:
        tensors[key.replace("q_proj", "z_proj")] = tensors.pop(key)


def _half_a_pair(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(iter(tensors))]


def _ranks_differ(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = tensors[key][:-1]


def _a_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.score.weight"] = torch.zeros(2, 128)


def _above_the_rank(tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        times = -(-(RANK + 1) // 4)
        tensors[key] = torch.cat([tensor] * times, dim=0 if "lora_A" in key else 1)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_nan, AdapterError, "holds NaN or infinite values"),
        (_other_shape, TaskLoadError, "q_proj is 128 x 127"),
        (_unknown_module, TaskLoadError, "no LoRA layer for module .*z_proj"),
        (_half_a_pair, AdapterError, "has lora_B but no lora_A"),
        (_ranks_differ, AdapterError, "whose ranks differ"),
        (_a_head, AdapterError, "score.weight' is no LoRA factor"),
        (_above_the_rank, TaskLoadError, "--max-lora-rank 20"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_changes(
    engine: Engine, spoil: Callable[[dict[str, torch.Tensor]], None], error: type, message: str
) -> None:
    from vllm_vlora import publish

    before = engine.publish(NEW, "rslora")
    tensors = tensors_of(engine.world.adapters["attention"])
    spoil(tensors)
    with pytest.raises(error, match=message) as caught:
        publish(engine.llm, NEW, tensors, alpha=8)
    assert "\n" not in str(caught.value)
    assert engine.state()[1] == {before.lora_path}
    engine.check(before, "rslora")


@pytest.mark.parametrize("quantize", ["int8", "nf4", "nf4-dq"])
def test_quantised_factors_answer_as_what_they_stand_for(engine: Engine, quantize: str) -> None:
    """As the exact task of the dequantised factors does."""
    from vllm_vlora import publish
    from vllm_vlora.quantize import pack, unpack

    folder = engine.world.adapters["everything"]
    tensors = {}
    for key, tensor in tensors_of(folder).items():
        turned = "lora_B" in key
        rounded = unpack(pack(tensor.T.contiguous() if turned else tensor, quantize))
        tensors[key] = rounded.T.contiguous() if turned else rounded
    exact_one = publish(engine.llm, TAKEN, tensors, config=config_of(folder))
    request = engine.publish(NEW, "everything", quantize=quantize)
    assert engine.ask(PROMPTS, [request] * 3) == engine.ask(PROMPTS, [exact_one] * 3)
