"""``vllm.LLM`` with the plugin, next to stock vLLM: a real engine, float32, greedy."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_forks import ENGINE_ENVIRONMENT
from engine_world import (
    ADAPTERS,
    ENGINE_ARGUMENTS,
    MAX_TOKENS,
    PROMPTS,
    World,
    exact,
    make_adapter,
    make_model,
    stock_tokens,
)

from vllm_vlora.errors import CheckpointError, TaskNotFoundError
from vllm_vlora.representations.spec import Segment

pytestmark = pytest.mark.engine

Generate = Callable[[list[list[int]], list], list[list[int]]]
SLOTS = 3


class Engine:
    """One engine for the module, with fewer slots than tasks and prefix caching on."""

    def __init__(self, world: World) -> None:
        from vllm import LLM

        self.world = world
        self.checkpoints = {name: exact(world, name) for name in ("private", "joint")}
        self.llm = LLM(
            str(world.model),
            enable_lora=True,
            max_loras=SLOTS,
            max_cpu_loras=4,
            max_lora_rank=16,
            enable_prefix_caching=True,
            **ENGINE_ARGUMENTS,
        )

    def request(self, name: str, kind: str = "private") -> object:
        from vllm.lora.request import LoRARequest

        from vllm_vlora import lora_request

        if name == "base":
            return None
        if name == "ordinary":
            return LoRARequest("ordinary", 77, str(self.world.ordinary))
        return lora_request(self.checkpoints[kind], name)

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
    patch.setenv("VLLM_VLORA_CHECKPOINT", str(exact(world, "private")))
    engine = Engine(world)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()
    patch.undo()


@pytest.mark.parametrize("kind", ["private", "joint"])
@pytest.mark.parametrize("task", list(ADAPTERS))
def test_one_task_answers_as_stock_does(engine: Engine, task: str, kind: str) -> None:
    for number, prompt in enumerate(PROMPTS):
        tokens = engine.generate([prompt], [engine.request(task, kind)])
        assert tokens == [engine.world.reference[task][number]]


@pytest.mark.parametrize("seed", range(3))
def test_mixed_batches_with_more_tasks_than_slots(engine: Engine, seed: int) -> None:
    """Base, ordinary PEFT and tasks of two checkpoints, in one call, through three slots."""
    names = ["base", "ordinary", *ADAPTERS]
    items = [(name, number) for name in names for number in range(len(PROMPTS))]
    random.Random(seed).shuffle(items)
    requests = [
        engine.request(name, "joint" if (seed + place) % 3 == 0 else "private")
        for place, (name, _) in enumerate(items)
    ]
    tokens = engine.generate([PROMPTS[number] for _, number in items], requests)
    for (name, number), got in zip(items, tokens):
        assert got == engine.world.reference[name][number], (name, number)


def test_a_task_returns_after_eviction(engine: Engine) -> None:
    first, *others = ADAPTERS
    want = [engine.world.reference[first][0]]
    assert engine.generate([PROMPTS[0]], [engine.request(first)]) == want
    for _ in range(2):  # twice round evicts from the slots and from vLLM's registry of four
        for name in others:
            engine.generate([PROMPTS[1]], [engine.request(name)])
    assert engine.generate([PROMPTS[0]], [engine.request(first)]) == want


def test_a_republished_task_never_answers_from_old_weights_or_old_prefix(
    engine: Engine, world: World
) -> None:
    from vllm_vlora import lora_request

    # Longer than the prefix cache's block on CPU (128 tokens), so that a stale block would be hit.
    prompt = [(11 * i) % 250 + 1 for i in range(150)]
    versions = []
    for seed in (501, 502):
        folder = world.root / f"version-{seed}"
        make_adapter(world.model, folder, seed, r=4, lora_alpha=8, target_modules=["v_proj"])
        versions.append(folder)
    reference = stock_tokens(
        world.model, {str(i): folder for i, folder in enumerate(versions)}, [prompt]
    )
    assert reference["0"] != reference["1"]
    requests = []
    for version, folder in enumerate(versions):
        path = world.compress("republished", {"task": folder}, force=True, ratio=0.1)
        requests.append(lora_request(path, "task"))
        for _ in range(2):  # the second time from the prefix cache
            assert engine.generate([prompt], [requests[-1]]) == reference[str(version)]
    assert requests[0].lora_path != requests[1].lora_path
    assert requests[0].lora_int_id != requests[1].lora_int_id
    # The same number under another path, as a user who numbers tasks by hand makes it.
    requests[1].lora_int_id = requests[0].lora_int_id
    assert engine.generate([prompt], [requests[1]]) == reference["1"]


def test_a_task_in_use_answers_on_after_its_checkpoint_was_published_again(
    engine: Engine, world: World
) -> None:
    """The old state was asked for, so it stays: nothing is read from disk inside a step."""
    from vllm_vlora import lora_request

    first, second, *others = ADAPTERS
    old = {"a": world.adapters[first], "b": world.adapters[second]}
    new = {"a": world.adapters[second], "b": world.adapters[first]}
    path = world.compress("swapped", old, ratio=0.1)
    before = {task: lora_request(path, task) for task in old}
    for task, name in (("a", first), ("b", second)):
        tokens = engine.generate([PROMPTS[0]], [before[task]])
        assert tokens == [world.reference[name][0]]
    world.compress("swapped", new, force=True, ratio=0.1)
    after = lora_request(path, "a")
    for name in others:  # until vLLM's registry has forgotten the old ones
        engine.generate([PROMPTS[1]], [engine.request(name)])
    # Both states of one task, of one name, in one batch.
    tokens = engine.generate([PROMPTS[0]] * 3, [after, before["b"], before["a"]])
    assert tokens == [world.reference[name][0] for name in (second, second, first)]


def test_the_old_request_of_a_replaced_task_is_an_error_and_the_engine_lives(
    engine: Engine, world: World
) -> None:
    from vllm_vlora import lora_request

    name, *_ = ADAPTERS
    path = world.compress("replaced", {"task": world.adapters[name]}, ratio=0.1)
    old = lora_request(path, "task")
    world.compress("replaced", {"task": world.ordinary}, force=True, ratio=0.1)
    with pytest.raises(Exception, match="published again"):
        engine.generate([PROMPTS[0]], [old])
    _still_answers(engine)


def _break_shape(world: World) -> Path:
    other = make_model(world.root / "other-model", hidden=64, seed=5)
    adapter = make_adapter(other, world.root / "other", 6, r=2, target_modules=["q_proj"])
    return world.compress("other-checkpoint", {"task": adapter}, ratio=0.1)


def _break_tensor(world: World) -> Path:
    path = shutil.copytree(exact(world, "private"), world.root / "damaged", dirs_exist_ok=True)
    for file in (path / "tasks").iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= 255
        file.write_bytes(bytes(data))
    return path


def _truncate(world: World) -> Path:
    path = shutil.copytree(exact(world, "private"), world.root / "truncated", dirs_exist_ok=True)
    for file in (path / "tasks").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_break_shape, "q_proj is 64 x 64"), (_break_tensor, "SHA-256"), (_truncate, "bytes")],
)
def test_a_bad_checkpoint_is_an_error_and_the_engine_lives(
    engine: Engine, world: World, damage: Callable[[World], Path], message: str
) -> None:
    from vllm_vlora import lora_request

    path = damage(world)
    task = "task" if damage is _break_shape else next(iter(ADAPTERS))
    request = lora_request(path, task)
    with pytest.raises(Exception, match=message):
        engine.generate([PROMPTS[0]], [request])
    _still_answers(engine)


def test_requests_for_what_does_not_exist(engine: Engine, tmp_path: Path) -> None:
    from vllm_vlora import lora_request

    with pytest.raises(TaskNotFoundError, match="nobody"):
        lora_request(engine.checkpoints["private"], "nobody")
    with pytest.raises(CheckpointError, match="compress"):
        lora_request(tmp_path, "task")


# Options, tasks, and what some segment must be for the case to be one.
LOSSY: dict[str, tuple[dict[str, Any], list[str], Callable[[Segment], bool]]] = {
    "nf4": (
        {"representation": "private", "quantize": "nf4", "double_quantize": False, "ratio": 1.8},
        ["everything", "attention"],
        lambda segment: segment.format == "nf4",
    ),
    "int8": (
        {"representation": "private", "quantize": "int8", "ratio": 1.8},
        ["everything", "attention"],
        lambda segment: segment.format == "int8",
    ),
    "bits": (
        {"representation": "private", "quantize": "nf4", "ratio": 4.5},
        ["everything", "half-packed"],
        lambda segment: segment.bits is not None,
    ),
    "flat": (
        {"representation": "flat", "num_components": 1},
        ["attention", "everything", "rslora"],
        lambda segment: segment.representation == "flat",
    ),
    "clusters": (
        {"representation": "joint", "quantize": "int8", "clusters": 3, "ratio": 2.0},
        ["attention", "everything", "rslora", "half-packed"],
        lambda segment: segment.rows is not None and segment.format == "int8",
    ),
}


def test_lossy_tasks_answer_as_their_export_does_in_stock_vllm(
    engine: Engine, world: World
) -> None:
    """What loses something, in every form that it is stored in, against its export as PEFT folders."""
    from vllm_vlora import lora_request
    from vllm_vlora.checkpoint.export import export_task
    from vllm_vlora.checkpoint.reader import Checkpoint

    exported, requests = {}, {}
    for kind, (options, names, holds) in LOSSY.items():
        path = world.compress(
            f"lossy-{kind}", {name: world.adapters[name] for name in names}, **options
        )
        checkpoint = Checkpoint.open(path)
        segments = [segment for r in checkpoint.tasks.values() for segment in r.segments]
        assert any(holds(segment) for segment in segments), kind
        for name in names:
            key = f"{name}-{kind}"
            requests[key] = lora_request(path, name)
            exported[key] = export_task(
                checkpoint, name, world.root / "exported" / key, dtype=torch.float32
            )
    for kind, (path, names) in _made_under_the_seeds_names(world).items():
        for name in names:
            key = f"{name}-{kind}"
            requests[key] = lora_request(path, name)
            exported[key] = export_task(
                Checkpoint.open(path), name, world.root / "exported" / key, dtype=torch.float32
            )
    reference = stock_tokens(world.model, exported, PROMPTS)
    for key, request in requests.items():
        tokens = engine.generate(PROMPTS, [request] * len(PROMPTS))
        assert tokens == reference[key], key


def _made_under_the_seeds_names(world: World) -> dict[str, tuple[Path, list[str]]]:
    """Checkpoints of SharedSubspace and SHAREModel, and a blend of two tasks written into one."""
    from vllm_vlora import SharedSubspace, SHAREModel, blend_tasks, load_adapter

    names = ["attention", "everything", "rslora"]
    subspace, share = world.root / "subspace", world.root / "share"
    SharedSubspace.from_adapters(
        [load_adapter(world.adapters[name]) for name in names],
        task_ids=names,
        num_components=6,
        representation="joint",
        missing="zero",
    ).save(subspace)
    blend_tasks(subspace, {"attention": 0.5, "everything": 0.5}, "blend")
    SHAREModel.from_adapters(
        {name: str(world.adapters[name]) for name in names}, num_components=6
    ).save_pretrained(share)
    return {"subspace": (subspace, [*names, "blend"]), "share": (share, names)}


def _still_answers(engine: Engine) -> None:
    name, *_ = ADAPTERS
    tokens = engine.generate([PROMPTS[0]] * 2, [engine.request(name), None])
    assert tokens == [engine.world.reference[name][0], engine.world.reference["base"][0]]
